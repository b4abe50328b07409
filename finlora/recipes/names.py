"""Recipes' names, what a part of a name decides, and the file that has a name.

A name is `<task>[_4bit|_bf16]_r<rank>[_a<alpha>]_<lora|dora|rslora>`; 8-bit and alpha 16 are the untagged defaults.
"""

import csv
import re
from pathlib import Path
from typing import Any

from finlora.core.errors import UserError, did_you_mean
from finlora.core.paths import ROOT

RECIPES = ROOT / "recipes"
FINLORA_RUNS = RECIPES / "finlora_runs.csv"
BASES = RECIPES / "bases.yaml"  # the sizes of base models; no recipe
NAME = re.compile(
    r"(?P<task>[a-z_]+?)(?:_(?P<bits>4bit|bf16))?_r(?P<r>\d+)(?:_a(?P<alpha>\d+))?_(?P<method>lora|dora|rslora)"
)

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
    ],
    "bits": ["load_in_8bit", "load_in_4bit", "adapter"],
    "r": ["lora_r"],
    "alpha": ["lora_alpha"],
    "method": ["peft_use_dora", "peft_use_rslora"],
    "name": ["output_dir", "dataset_prepared_path"],
}


def parse_name(name: str) -> dict[str, Any] | None:
    """The parts of a recipe's name: task, bits (16, 8, 4), r, alpha, method; None where it is not of the grammar."""
    match = NAME.fullmatch(name)
    if not match:
        return None
    bits = {"4bit": 4, "bf16": 16, None: 8}[match["bits"]]
    return {
        "task": match["task"],
        "bits": bits,
        "r": int(match["r"]),
        "alpha": int(match["alpha"] or 16),
        "method": match["method"],
    }


def bits_of(recipe: dict[str, Any]) -> int:
    """Of the base's weights."""
    return 8 if recipe.get("load_in_8bit") else 4 if recipe.get("load_in_4bit") else 16


def method_of(recipe: dict[str, Any]) -> str:
    return "rslora" if recipe.get("peft_use_rslora") else "dora" if recipe.get("peft_use_dora") else "lora"


def compose_name(task: str, recipe: dict[str, Any]) -> str:
    """The name that says what a recipe of this task holds; parse_name reads it back."""
    bits = {4: "_4bit", 8: "", 16: "_bf16"}[bits_of(recipe)]
    alpha = "" if recipe["lora_alpha"] == 16 else f"_a{recipe['lora_alpha']}"
    return f"{task}{bits}_r{recipe['lora_r']}{alpha}_{method_of(recipe)}"


def option(path: Path) -> str:
    """What RECIPE= says for this recipe: the name of one in recipes/, the path of any other."""
    return path.stem if path.resolve().parent == RECIPES else str(path)


def names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml") if path != BASES)


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
    if re.fullmatch(r"\w+", recipe) and path.is_file() and path != BASES:
        return path
    known = names() + list(finlora)
    hint = did_you_mean(recipe, known, 3, 0.5) or "`make recipes` lists them"
    raise UserError(f"RECIPE={recipe}: no such recipe; {hint.strip()}")


def finlora_runs() -> list[dict[str, str]]:
    """FinLoRA's 51 configured runs and the recipe of each."""
    with FINLORA_RUNS.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
