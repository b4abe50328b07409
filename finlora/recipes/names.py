"""Recipes' names, what a part of a name decides, and the file that has a name.

A name is GRAMMAR; Llama-3.1-8B (the first of recipes/bases.yaml), 8-bit and alpha 16 are the untagged defaults.
"""

import csv
import difflib
import re
from pathlib import Path
from typing import Any

from finlora.core.errors import UserError, did_you_mean
from finlora.core.paths import ROOT
from finlora.recipes.bases import TABLE, load_bases, untagged

RECIPES = ROOT / "recipes"
FINLORA_RUNS = RECIPES / "finlora_runs.csv"
GRAMMAR = "<task>[_<base>][_4bit|_bf16]_r<rank>[_a<alpha>]_<lora|dora|rslora>"
BITS = {"4bit": 4, "bf16": 16, None: 8}
ALPHA = 16

GIVEN_PARTS = re.compile(r"_r\d+(_|$)|_(lora|dora|rslora)(_|$)")  # what is likely to be meant as a name

# Which part of the name decides a key. Every key that is not here is the same in all recipes.
DECIDED_BY = {
    "task": [
        "datasets",
        "test_datasets",
        "sequence_len",
        "gradient_accumulation_steps",
        "num_epochs",
        "eval_sample_packing",
        "fastdora_graphs",
        "fastdora_shared_prefixes",
        "fastdora_rows_per_prefix",
    ],
    "base": ["base_model", "chat_template", "special_tokens", "eot_tokens", "learning_rate"],
    "bits": ["load_in_8bit", "load_in_4bit", "adapter"],
    "r": ["lora_r"],
    "alpha": ["lora_alpha"],
    "method": ["peft_use_dora", "peft_use_rslora"],
    "name": ["output_dir", "dataset_prepared_path"],
}

IN_NAME = {key for part in ("bits", "r", "alpha", "method") for key in DECIDED_BY[part]}  # what `parts_of` reads


def parse_name(name: str) -> dict[str, Any] | None:
    """The parts of a recipe's name: task, base (its tag), bits (16, 8, 4), r, alpha, method; None for any other name.

    Names of tasks and of bases contain underscores: a base is told by the tags that there are.
    """
    match = re.fullmatch(
        rf"(?P<task>[a-z_]+?)(?:_(?P<base>{'|'.join(load_bases())}))?(?:_(?P<bits>4bit|bf16))?"
        r"_r(?P<r>\d+)(?:_a(?P<alpha>\d+))?_(?P<method>lora|dora|rslora)",
        name,
    )
    if not match:
        return None
    return {
        "task": match["task"],
        "base": match["base"] or untagged(),
        "bits": BITS[match["bits"]],
        "r": int(match["r"]),
        "alpha": int(match["alpha"] or ALPHA),
        "method": match["method"],
    }


def compose_name(parts: dict[str, Any]) -> str:
    """The name of these parts, without what is a default; parse_name reads it back."""
    base = "" if parts["base"] == untagged() else f"_{parts['base']}"
    bits = next(f"_{tag}" if tag else "" for tag, bits in BITS.items() if bits == parts["bits"])
    alpha = "" if parts["alpha"] == ALPHA else f"_a{parts['alpha']}"
    return f"{parts['task']}{base}{bits}_r{parts['r']}{alpha}_{parts['method']}"


def parts_of(recipe: dict[str, Any]) -> dict[str, Any]:
    """The parts of a name that a recipe's content says: bits, r, alpha and method."""
    alpha = recipe.get("lora_alpha")
    return {"bits": bits_of(recipe), "r": recipe.get("lora_r"), "alpha": alpha, "method": method_of(recipe)}


def decided(parts: dict[str, Any], out: Path) -> dict[str, Any]:
    """The values of the keys that the parts of a name decide, but for its task and base.

    out: where the recipe writes to, as outputs/<name>.
    """
    return {
        "load_in_8bit": parts["bits"] == 8,
        "load_in_4bit": parts["bits"] == 4,
        "adapter": "qlora" if parts["bits"] == 4 else "lora",
        "lora_r": parts["r"],
        "lora_alpha": parts["alpha"],
        "peft_use_dora": parts["method"] == "dora",
        "peft_use_rslora": parts["method"] == "rslora",
        "output_dir": str(out),
        "dataset_prepared_path": str(out / "tokenised"),
    }


def bits_of(recipe: dict[str, Any]) -> int:
    """Of the base's weights."""
    return 8 if recipe.get("load_in_8bit") else 4 if recipe.get("load_in_4bit") else 16


def method_of(recipe: dict[str, Any]) -> str:
    return "rslora" if recipe.get("peft_use_rslora") else "dora" if recipe.get("peft_use_dora") else "lora"


def option(path: Path) -> str:
    """What RECIPE= says for this recipe: the name of one in recipes/, the path of any other."""
    return path.stem if path.resolve().parent == RECIPES else str(path)


def names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml") if path != TABLE)


def tasks() -> list[str]:
    """The tasks that have recipes; the demo's is none."""
    return sorted({parts["task"] for parts in map(parse_name, names()) if parts} - {"demo"})


def fault_of(name: str) -> str | None:
    """What is wrong with a recipe's name, with the right one where that can be told; None where nothing is."""
    parts, rest = {}, f"_{name}_"
    for part, pattern in {
        "base": "|".join(load_bases()),
        "bits": "4bit|8bit|16bit|bf16",
        "r": r"r\d+",
        "alpha": r"a\d+",
        "method": "lora|dora|rslora",
    }.items():
        if found := re.search(f"_({pattern})(?=_)", rest):
            parts[part], rest = found[1], rest[: found.start()] + rest[found.end() :]
    if "r" not in parts or "method" not in parts:
        return f"a name is {GRAMMAR}"
    task = rest.strip("_")
    known = tasks()
    if task not in known:
        before = max((one for one in known if task.startswith(f"{one}_")), key=len, default=None)
        if before:
            base, tags = task.removeprefix(f"{before}_"), list(load_bases())
            hint = did_you_mean(base, tags, cutoff=0.5) or f"there are {', '.join(tags[1:])}"
            return f"{base} is no base model of recipes/bases.yaml; {hint.strip()}"
        near = difflib.get_close_matches(task, known, 1)
        if near:
            return f"did you mean {name.replace(task, near[0])}?"
        return f"{task or 'nothing'} is no task that has recipes; there are {', '.join(known)}"
    right = compose_name(
        {
            "task": task,
            "base": parts.get("base", untagged()),
            "bits": {"8bit": 8, "16bit": 16}.get(parts.get("bits")) or BITS[parts.get("bits")],
            "r": int(parts["r"][1:]),
            "alpha": int(parts.get("alpha", f"a{ALPHA}")[1:]),
            "method": parts["method"],
        }
    )
    return None if right == name else f"a name is {GRAMMAR}, without what is a default: {right}"


def find(recipe: str) -> Path:
    """The file of a recipe given by its name, by FinLoRA's run name, or by a path. UserError names the nearest."""
    if recipe.endswith((".yaml", ".yml")):
        path = Path(recipe)
        if path.is_file():
            return path
        if "/" in recipe:
            raise UserError(f"RECIPE={recipe}: no such file; give a recipe's name or a file that is there")
        recipe = path.stem
    finlora = {row["run"]: row["recipe"] for row in finlora_runs()}
    path = RECIPES / f"{finlora.get(recipe, recipe)}.yaml"
    if re.fullmatch(r"\w+", recipe) and path.is_file() and path != TABLE:
        return path
    near = did_you_mean(recipe, names() + list(finlora), 3, 0.5)
    hint = near or "`make recipes` lists them"
    if parse_name(recipe) or (GIVEN_PARTS.search(recipe) and "_llama_3_1_8b_" not in recipe):
        fault = fault_of(recipe) or f"`make new RECIPE={recipe}` writes it"
        hint = fault if "did you mean" in fault else near + fault
    raise UserError(f"RECIPE={recipe}: no such recipe; {hint.strip()}")


def finlora_runs() -> list[dict[str, str]]:
    """FinLoRA's 51 configured runs and the recipe of each."""
    with FINLORA_RUNS.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
