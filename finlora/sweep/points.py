"""The points of a sweep: a sweep file is read, each point gets a name and a whole recipe of its own."""

import hashlib
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fastdora.plugin import safety
from fastdora.plugin.keys import RecipeError, check_keys, kept_schema, read_recipe
from finlora.core.errors import UserError, did_you_mean
from finlora.core.files import write_text
from finlora.core.paths import ROOT, shown
from finlora.recipes import load as recipes
from finlora.recipes import names as recipe_names
from finlora.recipes import rules
from finlora.recipes.recipe import Recipe

SWEEPS = recipe_names.RECIPES / "sweeps"
OWN = ("output_dir", "dataset_prepared_path", "plugins")  # what a sweep may not vary
# Keys that make one column of the table together; every other key is a column of its own.
COLUMNS = {
    "lora_r": "rank",
    "lora_alpha": "alpha",
    **dict.fromkeys(("load_in_8bit", "load_in_4bit", "adapter"), "bits"),
    **dict.fromkeys(("peft_use_dora", "peft_use_rslora"), "method"),
}
OF_SEVERAL_KEYS = {"bits": recipe_names.bits_of, "method": recipe_names.method_of}
EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


@dataclass(frozen=True)
class SweepPoint:
    number: int  # from 1, in the sweep file's order
    name: str
    changes: dict[str, Any]  # as the sweep file says
    differs: dict[str, Any]  # from the base recipe
    recipe: dict[str, Any]  # whole
    path: Path  # of the recipe's file

    def write(self, recipe: Path) -> None:
        """Write the recipe. Its text is a part of the run's identity: it says nothing that an edit may change."""
        text = f"# {shown(recipe)}{' with ' if self.differs else ''}{changes_text(self.differs)}\n"
        text += yaml.safe_dump(self.recipe, sort_keys=False, width=120)
        if not self.path.is_file() or self.path.read_text(encoding="utf-8") != text:
            write_text(self.path, text)


def find(name: str) -> Path:
    """The file of a sweep by its name in recipes/sweeps or by a path. UserError lists what there is."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else SWEEPS / f"{name}.yaml"
    if name and path.is_file():
        return path.absolute()
    known = sorted(path.stem for path in SWEEPS.glob("*.yaml"))
    hint = did_you_mean(Path(name).stem, known)
    raise UserError(f"SWEEP={name}: no such sweep; {hint}there are {', '.join(known)}, and any YAML file by its path")


def plan(recipe: Path, file: Path) -> list[SweepPoint]:
    """The points of a sweep in its file's order.

    Raises UserError for a key or a value that axolotl does not know, and for points that are equal.
    """
    base = recipes.load(recipe).keys
    schema = kept_schema(base["plugins"], recipes.CACHE)
    folder = ROOT / "outputs" / "sweeps" / f"{recipe.stem}.{file.stem}"
    points: list[SweepPoint] = []
    for number, changes in enumerate(read(file), 1):
        # The base's order first, then the alphabet's: the text must not follow the sweep file's.
        merged = base | dict(sorted(changes.items(), key=str))
        merged = {key: value for key, value in merged.items() if value is not None}
        try:
            safety.check(merged, shown(file))
            check_keys(merged, shown(file), schema)
        except RecipeError as error:
            raise UserError(str(error)) from error
        rules.check_values(Recipe(recipe, merged, source=f"{shown(file)}: point {number}"))
        differs = {key: merged.get(key) for key in differing(base, merged)}
        name = name_of(recipe.stem, differs, merged)
        out = (folder / name).relative_to(ROOT)
        whole = merged | {"output_dir": str(out), "dataset_prepared_path": str(out / "tokenised")}
        point = SweepPoint(number, name, changes, differs, whole, folder / f"{name}.yaml")
        refuse_equal(file, point, points)
        try:
            rules.check_name(Recipe(point.path, whole))
        except UserError as error:
            reason = str(error).removeprefix(f"{point.path}: ")
            text = f"{shown(file)}: point {number} ({changes_text(changes)}) would be {name}: {reason}"
            raise UserError(text) from error
        points.append(point)
    return points


def refuse_equal(file: Path, point: SweepPoint, others: list[SweepPoint]) -> None:
    """UserError where another point trains the same, or has the same name."""

    def trained(point: SweepPoint) -> dict[str, Any]:
        keys = {key: value for key, value in point.recipe.items() if key not in OWN}
        return keys | {
            "lora_target_modules": sorted(keys.get("lora_target_modules") or [])
        }  # their order changes nothing

    for other in others:
        numbers = f"{shown(file)}: points {other.number} and {point.number}"
        if trained(other) == trained(point):
            raise UserError(f"{numbers} are equal ({changes_text(point.changes)}); remove one")
        if other.name == point.name:
            raise UserError(f"{numbers} would both be {point.name}; rename one")


def read(file: Path) -> list[dict[str, Any]]:
    """What each point of a sweep file changes, in the file's order: axolotl's `generate_sweep_configs`, unshuffled."""
    try:
        content = read_recipe(file)
    except RecipeError as error:
        raise UserError(str(error).replace(str(file), shown(file))) from error
    pairs = content.pop("_", None)
    for key, values in [*content.items(), *([] if pairs is None else [("_", pairs)])]:
        if not isinstance(values, list):
            raise UserError(f"{shown(file)}: key '{key}' is {values!r}; write a list of values")
        if not values:
            raise UserError(f"{shown(file)}: key '{key}': the list is empty; give it values or remove the key")
    for number, pair in enumerate(pairs or [], 1):
        if not isinstance(pair, dict) or not pair:
            raise UserError(f"{shown(file)}: key '_': entry {number} is {pair!r}; write keys with their values")
    for key in [*content, *(key for pair in pairs or [] for key in pair)]:
        if key in OWN:
            raise UserError(f"{shown(file)}: key '{key}' is the sweep's own; remove it")
    if twice := [key for key in content if any(key in pair for pair in pairs or [])]:
        raise UserError(f"{shown(file)}: key '{twice[0]}' is below '_' too; keep one")
    combinations = itertools.product(*content.values())
    return [
        numbers(dict(zip(content, values, strict=True)) | pair) for values in combinations for pair in pairs or [{}]
    ]


def numbers(value: Any) -> Any:
    """The value with 1e-4 as a number: YAML 1.1 reads it as text."""
    if isinstance(value, dict):
        return {key: numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [numbers(inner) for inner in value]
    return float(value) if isinstance(value, str) and EXPONENT.fullmatch(value) else value


def differing(base: dict[str, Any], recipe: dict[str, Any]) -> list[str]:
    return [key for key in sorted(base.keys() | recipe.keys()) if base.get(key) != recipe.get(key)]


def name_of(stem: str, differs: dict[str, Any], recipe: dict[str, Any]) -> str:
    """What differs from the base recipe: in the grammar of recipes' names where that can say it, then as .key-value."""
    parts = recipe_names.parse_name(stem)
    first = recipe_names.compose_name(parts | recipe_names.parts_of(recipe)) if parts else stem
    rest = [f"{key}-{in_name(value)}" for key, value in differs.items() if not (parts and key in recipe_names.IN_NAME)]
    return ".".join([first, *rest])


def in_name(value: Any) -> str:
    """A value as a part of a file's name; a digest of what is too long or has other characters."""
    items = value if isinstance(value, list) else [value]
    if all(isinstance(item, dict) and {"name", "lr"} <= item.keys() for item in items):
        items = [part for group in items for part in (group["name"], group["lr"])]
    text = "-".join(item if isinstance(item, str) else json.dumps(item, default=str) for item in items)
    if not re.fullmatch(r"[\w.-]{1,80}", text):
        return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:8]
    return text


def changes_text(changes: dict[str, Any]) -> str:
    return ", ".join(f"{key}: {json.dumps(value, default=str)}" for key, value in changes.items())


def column_of(key: str) -> str:
    return COLUMNS.get(key, key)


def value_of(column: str, recipe: dict[str, Any]) -> Any:
    if column in OF_SEVERAL_KEYS:
        return OF_SEVERAL_KEYS[column](recipe)
    return recipe.get({"rank": "lora_r", "alpha": "lora_alpha"}.get(column, column))


def as_text(column: str, recipe: dict[str, Any]) -> str:
    value = value_of(column, recipe)
    if column == "lr_groups":
        return ", ".join(f"{group['name']} {group['lr']:g}" for group in value or []) or "as learning_rate"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
