"""Load a recipe that can be trusted, list the recipes, check them all (`make recipes`, `make check`)."""

import difflib
import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastdora.plugin.keys import RecipeError, check_keys, read_recipe
from finlora.core.errors import UserError
from finlora.core.files import replacing
from finlora.core.paths import ROOT
from finlora.recipes.bases import linear_layers, shape, trainable_parameters
from finlora.recipes.factorise import comments, factorise
from finlora.recipes.names import DECIDED_BY, RECIPES, check_name, names, parse_name

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
    from fastdora.plugin.keys import input_schema

    names = tuple(name for name in plugins if isinstance(name, str)) if isinstance(plugins, list) else ()
    source = b"".join((ROOT / "fastdora" / "plugin" / name).read_bytes() for name in ("keys.py", "args.py"))
    state = "".join(version(package) for package in ("axolotl", "transformers", "pydantic")) + str(names)
    key = hashlib.sha256(source + state.encode()).hexdigest()[:12]
    cached = ROOT / ".cache" / f"axolotl-schema-{key}.json"
    if cached.is_file():
        return json.loads(cached.read_text(encoding="utf-8"))
    schema = input_schema(names)
    with replacing(cached) as file:
        json.dump(schema, file)
    return schema


def check() -> None:
    """Check every recipe's keys, types, name and factorisation."""
    recipes = {path.stem: load(path) for path in sorted(RECIPES.glob("*.yaml"))}
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(RECIPES.glob("*.yaml"))}
    problems = [
        *factorise(recipes),
        *factorise({name: comments(text) for name, text in texts.items()}, "comment on key"),
    ]
    if problems:
        raise UserError("\nerror: ".join(problems))
    print(
        f"{len(recipes)} recipes: every key is known to axolotl, and decided with its comment by one part of the name"
    )


def show(task: str | None) -> None:
    """Print the recipes, all of them or a task's."""
    tasks = sorted({parse_name(name)["task"] for name in names()})
    if task and task not in tasks:
        near = difflib.get_close_matches(task, tasks, 3)
        raise UserError(
            f"TASK={task}: no such task; {'did you mean ' + near[0] if near else 'one of ' + ', '.join(tasks)}"
        )
    shown = [name for name in names() if not task or parse_name(name)["task"] == task]
    print(f"{'recipe':<34}{'task':<17}{'bits':>4}{'rank':>6}{'alpha':>7}  {'method':<8}{'trainable parameters':>20}")
    for name in shown:
        parts, recipe = parse_name(name), load(RECIPES / f"{name}.yaml")
        sizes = shape(recipe["base_model"])
        count = f"{trainable_parameters(recipe, sizes):,}" if sizes else "after `make demo`"
        print(
            f"{name:<34}{parts['task']:<17}{parts['bits']:>4}{parts['r']:>6}{parts['alpha']:>7}  "
            f"{parts['method']:<8}{count:>20}"
        )
