"""Load a recipe that can be trusted, list the recipes, check them all (`make recipes`, `make check`)."""

from collections.abc import Sequence
from pathlib import Path

from fastdora.plugin.keys import RecipeError, read_checked
from finlora.core.errors import UserError, did_you_mean
from finlora.core.paths import ROOT
from finlora.recipes import rules
from finlora.recipes.bases import load_bases
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
