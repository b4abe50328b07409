"""Recipes: their names, their files, and what holds across all of them (`make recipes`, `make check`).

A name is `<task>[_4bit|_bf16]_r<rank>[_a<alpha>]_<lora|dora|rslora>`; 8-bit and alpha 16 are the untagged defaults.
"""

import argparse
import csv
import difflib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from fastdora.keys import RecipeError, check_keys, read_recipe
from tools.cli import ROOT, UserError, replacing, run

RECIPES = ROOT / "recipes"
FINLORA_RUNS = RECIPES / "finlora_runs.csv"
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
ABOVE_ZERO = (
    "lora_r",
    "lora_alpha",
    "sequence_len",
    "micro_batch_size",
    "gradient_accumulation_steps",
    "num_epochs",
    "learning_rate",
)
# Axolotl has a default for each of these; a recipe is held against what it says itself.
NEEDED = (
    *DECIDED_BY["bits"],
    *DECIDED_BY["method"],
    *DECIDED_BY["name"],
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "datasets",
    "sequence_len",
    "micro_batch_size",
    "gradient_accumulation_steps",
    "num_epochs",
)
# The demo recipe adapts a model of four million parameters, so its sizes and rates are its own.
DEMO_OWN = ["base_model", "learning_rate", "logging_steps", "evals_per_epoch", "saves_per_epoch"]


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


def compose_name(task: str, recipe: dict[str, Any]) -> str:
    """The name that says what a recipe of this task holds; parse_name reads it back."""
    bits = "_4bit" if recipe.get("load_in_4bit") else "" if recipe.get("load_in_8bit") else "_bf16"
    alpha = "" if recipe["lora_alpha"] == 16 else f"_a{recipe['lora_alpha']}"
    method = "rslora" if recipe.get("peft_use_rslora") else "dora" if recipe.get("peft_use_dora") else "lora"
    return f"{task}{bits}_r{recipe['lora_r']}{alpha}_{method}"


def names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


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
    if re.fullmatch(r"\w+", recipe) and path.is_file():
        return path
    known = names() + list(finlora)
    near = difflib.get_close_matches(recipe, known, 3, 0.5)
    hint = f"did you mean {', '.join(near)}?" if near else "`make recipes` lists them"
    raise UserError(f"RECIPE={recipe}: no such recipe; {hint}")


def finlora_runs() -> list[dict[str, str]]:
    """FinLoRA's 51 configured runs and the recipe of each."""
    with FINLORA_RUNS.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def load(path: Path) -> dict[str, Any]:
    """A recipe that can be trusted: strict YAML, only keys and types that axolotl knows, content as the name says."""
    try:
        recipe = read_recipe(path)
        if "fastdora.FastDoraPlugin" not in (recipe.get("plugins") or []):
            raise UserError(f"{path}: key 'plugins': add fastdora.FastDoraPlugin; without it rows are lost in silence")
        check_keys(recipe, str(path), axolotl_schema(recipe["plugins"]))
    except RecipeError as error:
        raise UserError(str(error)) from error
    check_name(path, recipe)
    check_needed(str(path), recipe)
    return recipe


def check_needed(source: str, recipe: dict[str, Any]) -> None:
    """Raise UserError where what the checks before and after a run read is missing, or is no size."""
    for key in NEEDED:
        if recipe.get(key) is None:
            raise UserError(f"{source}: key '{key}' is missing; give it a value")
    for key in ABOVE_ZERO:
        if isinstance(recipe.get(key), int | float) and not recipe[key] > 0:
            raise UserError(f"{source}: key '{key}' is {recipe[key]}; give it a value above 0")
    if recipe.get("lora_target_linear"):
        raise UserError(f"{source}: key 'lora_target_linear': list the modules in lora_target_modules and remove it")
    check_targets(source, recipe)
    check_groups(source, recipe)


def check_targets(source: str, recipe: dict[str, Any]) -> None:
    """Raise UserError where `lora_target_modules` is no list, or names a layer twice or none of the base model's."""
    targets, sizes = recipe["lora_target_modules"], shape(recipe["base_model"])
    where = f"{source}: key 'lora_target_modules'"
    if not isinstance(targets, list) or not targets:
        raise UserError(f"{where} is {json.dumps(targets)}; write a list, as in [q_proj, v_proj]")
    for number, target in enumerate(targets):
        if target in targets[:number]:
            raise UserError(f"{where}: {target} stands twice; keep one")
        if sizes and target not in linear_layers(sizes):
            raise UserError(f"{where}: {target} is none of {', '.join(linear_layers(sizes))}")


def check_groups(source: str, recipe: dict[str, Any]) -> None:
    """Raise UserError for a module of `lr_groups` that no trained parameter has in its name: axolotl ignores it."""
    if not recipe.get("lr_groups"):
        return
    parts = ["lora_A", "lora_B", *["lora_magnitude_vector"] * bool(recipe.get("peft_use_dora"))]
    places = [f"layers.{i}.{block}" for i in range(200) for block in ("self_attn", "mlp")]
    trained = [
        f"base_model.model.model.{place}.{target}.{part}.default.weight"
        for place in places
        for target in recipe["lora_target_modules"]
        for part in parts
    ]
    for group in recipe["lr_groups"]:
        for module in group["modules"]:
            if not any(module in name for name in trained):
                if "magnitude" in module and not recipe.get("peft_use_dora"):
                    raise UserError(f"{source}: key 'lr_groups': LoRA has no {module}; take a recipe with DoRA")
                raise UserError(
                    f"{source}: key 'lr_groups': {module} is in the name of nothing that is trained; take a part of "
                    f"{trained[0]}, say {', '.join([*recipe['lora_target_modules'], *parts])}"
                )


def axolotl_schema(plugins: Any) -> dict[str, Any]:
    """The strict JSON schema of axolotl and `plugins`; importing axolotl takes ten seconds, so it is kept in `.cache`.

    Raises RecipeError naming a plugin that cannot be imported.
    """
    from fastdora.keys import input_schema

    names = tuple(name for name in plugins if isinstance(name, str)) if isinstance(plugins, list) else ()
    source = b"".join((ROOT / "fastdora" / name).read_bytes() for name in ("keys.py", "args.py"))
    state = "".join(version(package) for package in ("axolotl", "transformers", "pydantic")) + str(names)
    key = hashlib.sha256(source + state.encode()).hexdigest()[:12]
    cached = ROOT / ".cache" / f"axolotl-schema-{key}.json"
    if cached.is_file():
        return json.loads(cached.read_text(encoding="utf-8"))
    schema = input_schema(names)
    with replacing(cached) as file:
        json.dump(schema, file)
    return schema


def check_name(path: Path, recipe: dict[str, Any]) -> None:
    """Raise UserError where a recipe's content is not what its name says (names outside the grammar say nothing).

    A recipe writes to outputs/<name>; one that lies in outputs/ itself, as a sweep's points do, beside itself.
    """
    parts = parse_name(path.stem)
    if not parts:
        return
    folder, outputs = path.resolve().parent, (ROOT / "outputs").resolve()
    out = "outputs" / (folder.relative_to(outputs) if folder.is_relative_to(outputs) else Path()) / path.stem
    expected = {
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
    for key, value in expected.items():
        if recipe.get(key) != value:
            raise UserError(f"{path}: key '{key}' is {recipe.get(key)}, but the name says {value}; change one of them")


def factorise(recipes: dict[str, dict[str, Any]]) -> Iterator[str]:
    """One line for each key of a recipe that is not decided by its own part of the name.

    `recipes` maps names to contents. What most recipes with the same part have is taken as right.
    """
    part_of = {key: part for part, keys in DECIDED_BY.items() for key in keys}
    every_key = {key for recipe in recipes.values() for key in recipe}
    for key in sorted(every_key):
        part = part_of.get(key)
        groups: dict[Any, list[str]] = {}
        for name in recipes:
            parts = parse_name(name)
            if not parts:
                yield f"recipes/{name}.yaml: the name is not <task>[_4bit|_bf16]_r<rank>[_a<alpha>]_<lora|dora|rslora>"
            elif not (parts["task"] == "demo" and key in DEMO_OWN):
                groups.setdefault(parts.get(part), []).append(name)
        for value, members in groups.items():
            texts = {name: _text(recipes[name].get(key), name if part == "name" else "") for name in members}
            usual = Counter(texts.values()).most_common(1)[0][0]
            where = f"recipes with {part} {value}" if value is not None else "recipes"
            for name, text in texts.items():
                if text != usual:
                    yield f"recipes/{name}.yaml: key '{key}' is {text}, in the other {where} it is {usual}"


def _text(value: Any, name: str) -> str:
    text = json.dumps(value, sort_keys=True)
    return text.replace(name, "<name>") if name else text


def shape(base_model: str) -> dict[str, Any] | None:
    """The sizes in a base model's config: a local folder's config.json, else tools/base_models.yaml, else None.

    Raises UserError where the folder's does not have a Llama's.
    """
    config = ROOT / base_model / "config.json"
    if config.is_file():
        try:
            sizes = json.loads(config.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            sizes = None
        needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        if not isinstance(sizes, dict) or not all(isinstance(sizes.get(key), int) for key in needed):
            raise UserError(f"{config}: has not {', '.join(needed)}; take a model of Llama's kind")
        return sizes
    return yaml.safe_load((ROOT / "tools" / "base_models.yaml").read_text(encoding="utf-8")).get(base_model)


def linear_layers(shape: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each linear layer of one Llama block."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    kv = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    return {
        "q_proj": (hidden, hidden),
        "k_proj": (hidden, kv),
        "v_proj": (hidden, kv),
        "o_proj": (hidden, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }


def trainable_parameters(recipe: dict[str, Any], shape: dict[str, Any]) -> int:
    """r (in + out) for each adapted matrix, and with DoRA one magnitude for each of its outputs (arXiv 2402.09353)."""
    layers = linear_layers(shape)
    block = 0
    for target in recipe["lora_target_modules"]:
        inputs, outputs = layers[target]
        block += recipe["lora_r"] * (inputs + outputs) + (outputs if recipe.get("peft_use_dora") else 0)
    return block * shape["num_hidden_layers"]


def main() -> None:
    parser = argparse.ArgumentParser(description="List the recipes, or check them all.")
    parser.add_argument("--task", help="only the recipes of this task")
    parser.add_argument("--check", action="store_true", help="check every recipe's keys, types, name and factorisation")
    args = parser.parse_args()
    if args.check:
        recipes = {path.stem: load(path) for path in sorted(RECIPES.glob("*.yaml"))}
        problems = list(factorise(recipes))
        if problems:
            raise UserError("\nerror: ".join(problems))
        print(f"{len(recipes)} recipes: every key is known to axolotl and decided by one part of the name")
        return
    tasks = sorted({parse_name(name)["task"] for name in names()})
    if args.task and args.task not in tasks:
        near = difflib.get_close_matches(args.task, tasks, 3)
        raise UserError(
            f"TASK={args.task}: no such task; {'did you mean ' + near[0] if near else 'one of ' + ', '.join(tasks)}"
        )
    shown = [name for name in names() if not args.task or parse_name(name)["task"] == args.task]
    print(f"{'recipe':<34}{'task':<17}{'bits':>4}{'rank':>6}{'alpha':>7}  {'method':<8}{'trainable parameters':>20}")
    for name in shown:
        parts, recipe = parse_name(name), load(RECIPES / f"{name}.yaml")
        sizes = shape(recipe["base_model"])
        count = f"{trainable_parameters(recipe, sizes):,}" if sizes else "after `make demo`"
        print(
            f"{name:<34}{parts['task']:<17}{parts['bits']:>4}{parts['r']:>6}{parts['alpha']:>7}  "
            f"{parts['method']:<8}{count:>20}"
        )


if __name__ == "__main__":
    run(main)
