"""Load a recipe that can be trusted, list the recipes, check them all (`make recipes`, `make check`)."""

from pathlib import Path

from fastdora.plugin.keys import RecipeError, read_checked
from finlora.core.errors import UserError, did_you_mean
from finlora.core.paths import ROOT
from finlora.recipes import rules
from finlora.recipes.factorise import comments, factorise
from finlora.recipes.names import RECIPES, names, parse_name
from finlora.recipes.recipe import Recipe

CACHE = ROOT / ".cache"


def load(path: Path) -> Recipe:
    """A recipe that can be trusted: strict YAML, only keys and types that axolotl knows, content as the name says."""
    try:
        keys = read_checked(path, CACHE)
    except RecipeError as error:
        raise UserError(str(error)) from error
    recipe = Recipe(path, keys)
    rules.check(recipe)
    return recipe


def check() -> None:
    """Check every recipe's keys, types, name and factorisation."""
    paths = {name: RECIPES / f"{name}.yaml" for name in names()}
    recipes = {name: load(path).keys for name, path in paths.items()}
    texts = {name: comments(path.read_text(encoding="utf-8")) for name, path in paths.items()}
    problems = [*factorise(recipes), *factorise(texts, "comment on key")]
    if problems:
        raise UserError("\nerror: ".join(problems))
    print(
        f"{len(recipes)} recipes: every key is known to axolotl, and decided with its comment by one part of the name"
    )


def show(task: str | None) -> None:
    """Print the recipes, all of them or a task's."""
    tasks = sorted({parse_name(name)["task"] for name in names()})
    if task and task not in tasks:
        hint = did_you_mean(task, tasks) or f"one of {', '.join(tasks)}"
        raise UserError(f"TASK={task}: no such task; {hint.strip()}")
    shown = [name for name in names() if not task or parse_name(name)["task"] == task]
    print(f"{'recipe':<34}{'task':<17}{'bits':>4}{'rank':>6}{'alpha':>7}  {'method':<8}{'trainable parameters':>20}")
    for name in shown:
        recipe = load(RECIPES / f"{name}.yaml")
        parts, count = recipe.parts, recipe.trainable_parameters
        print(
            f"{name:<34}{parts['task']:<17}{parts['bits']:>4}{parts['r']:>6}{parts['alpha']:>7}  "
            f"{parts['method']:<8}{f'{count:,}' if count else 'after `make demo`':>20}"
        )
