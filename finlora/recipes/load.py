"""Load a recipe that can be trusted, list the recipes, check them all (`make recipes`, `make check`)."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from fastdora.plugin.keys import RecipeError, check_keys, kept_schema, read_checked
from finlora.core.errors import UserError, did_you_mean
from finlora.core.paths import ROOT
from finlora.recipes import rules
from finlora.recipes.bases import load_bases
from finlora.recipes.factorise import comments, factorise
from finlora.recipes.names import DECIDED_BY, RECIPES, names, parse_name
from finlora.recipes.recipe import DEBUGGING, Recipe, option_values

CACHE = ROOT / ".cache"
# Keys that a recipe's name decides: ARGS may not change them, or the folder and the adapter would not be the recipe's.
NAMED = {key for part in ("bits", "r", "alpha", "method", "name") for key in DECIDED_BY[part]}
# What is read from the recipe alone, before axolotl starts: the run would be prepared and recorded with that.
READ_HERE = {"base_model", "datasets", "test_datasets", "plugins"}


def load(path: Path, args: Sequence[str] = ()) -> Recipe:
    """A recipe that can be trusted: strict YAML, only keys and types that axolotl knows, content as the name says.

    args: axolotl's own options; they pass the checks of the keys that they set.
    """
    if args:
        check_options(path, args)
    try:
        keys = read_checked(path, CACHE)
        recipe = Recipe(path, keys, tuple(args), path.read_text(encoding="utf-8"), keys)
        if args:
            check_keys(recipe.settings, f"ARGS={shlex.join(args)}", kept_schema(recipe.keys["plugins"], CACHE))
    except RecipeError as error:
        raise UserError(str(error)) from error
    rules.check_name(recipe)
    rules.check_values(recipe)
    return recipe


def check_options(path: Path, args: Sequence[str]) -> None:
    """UserError where an option is none of axolotl's, or sets a key that belongs to the recipe."""
    from axolotl.cli.config_options import AXOLOTL_CONFIG_CLI_OPTIONS  # late: it sets up axolotl's logging, too

    source = f"ARGS={shlex.join(args)}"
    options = {option.strip() for names, *_ in AXOLOTL_CONFIG_CLI_OPTIONS for option in names[0].split("/")} | DEBUGGING
    for name in (arg.partition("=")[0] for arg in args if arg.startswith("--")):
        if name not in options:
            remedy = did_you_mean(name, options, cutoff=0.8) or f"put the key into a recipe, a copy of {path}"
            raise UserError(f"{source}: {name} is no option of axolotl's; {remedy.strip()}")
    if key := next((key for key in option_values(args) if key in NAMED | READ_HERE), None):
        raise UserError(f"{source}: {key} belongs to the recipe; copy {path} and edit that")


def check() -> None:
    """Check every recipe's keys, types, name and factorisation."""
    if found := problems():
        raise UserError("\nerror: ".join(found))
    print(
        f"{len(names())} recipes: every key is known to axolotl, and decided with its comment by one part of the name"
    )


def problems(drafts: Sequence[Path] = ()) -> list[str]:
    """What breaks the factorisation among the recipes, one line each. drafts: new ones that lie elsewhere."""
    paths = [*(RECIPES / f"{name}.yaml" for name in names()), *drafts]
    recipes = {path.stem: load(path).keys for path in paths}
    texts = {path.stem: comments(path.read_text(encoding="utf-8")) for path in paths}
    return [*factorise(recipes), *factorise(texts, "comment on key")]


def show(task: str | None) -> None:
    """Print the recipes, all of them or a task's."""
    tasks = sorted({parse_name(name)["task"] for name in names()})
    if task and task not in tasks:
        hint = did_you_mean(task, tasks) or f"one of {', '.join(tasks)}"
        raise UserError(f"TASK={task}: no such task; {hint.strip()}")
    shown = [name for name in names() if not task or parse_name(name)["task"] == task]
    head = f"{'recipe':<34}{'task':<17}{'base':<13}{'bits':>4}{'rank':>6}{'alpha':>7}  {'method':<8}"
    print(f"{head}{'trainable parameters':>20}")
    for name in shown:
        recipe = load(RECIPES / f"{name}.yaml")
        parts, count = recipe.parts, recipe.trainable_parameters
        print(
            f"{name:<34}{parts['task']:<17}{tag_of(recipe):<13}{parts['bits']:>4}{parts['r']:>6}{parts['alpha']:>7}  "
            f"{parts['method']:<8}{f'{count:,}' if count else 'after `make demo`':>20}"
        )


def tag_of(recipe: Recipe) -> str:
    """The tag of the recipe's base model, or the last part of its name where it has none."""
    name = recipe.keys["base_model"]
    return next((tag for tag, base in load_bases().items() if base.recipe.base_model == name), Path(name).name)
