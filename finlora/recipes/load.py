"""Load a recipe that can be trusted, list the recipes, check them all (`make recipes`, `make check`)."""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fastdora.plugin.keys import RecipeError, read_checked
from finlora.core.errors import UserError, did_you_mean
from finlora.core.files import sha256
from finlora.core.paths import ROOT
from finlora.recipes import rules
from finlora.recipes.bases import linear_layers, shape, trainable_parameters
from finlora.recipes.factorise import comments, factorise
from finlora.recipes.memory import memory_estimate, on_cpu
from finlora.recipes.names import RECIPES, names, parse_name

CACHE = ROOT / ".cache"
# TINY=1 shortens packs and steps to what a CPU does in seconds.
TINY_LENGTH, TINY_STEPS = 512, 2


@dataclass(frozen=True)
class Recipe:
    """A recipe that was read and checked once, and what its keys decide.

    path: its file. keys: axolotl's keys with their values, as written or (after `on_tiny_base` and
    finlora/train/distributed.py) as run.
    """

    path: Path
    keys: dict[str, Any]

    @cached_property
    def parts(self) -> dict[str, Any] | None:
        """The parts of its name; None for a name outside the grammar."""
        return parse_name(self.path.stem)

    @cached_property
    def shape(self) -> dict[str, Any] | None:
        """The base model's sizes; None where they are not known."""
        return shape(self.keys["base_model"])

    @property
    def layers(self) -> list[str]:
        """The linear layers of one block of the base model, which an adapter may target; none where not known."""
        return list(linear_layers(self.shape)) if self.shape else []

    @property
    def memory(self) -> float | None:
        """GiB that training takes on one GPU; None for a base model of unknown sizes."""
        return memory_estimate(self.keys, self.shape) if self.shape else None

    @property
    def on_cpu(self) -> bool:
        """Whether the base model is known and small enough to train on a CPU."""
        return bool(self.shape) and on_cpu(self.shape)

    @property
    def trainable_parameters(self) -> int | None:
        return trainable_parameters(self.keys, self.shape) if self.shape else None

    @property
    def output_folder(self) -> Path:
        return ROOT / self.keys["output_dir"]

    @property
    def data_files(self) -> list[str]:
        return data_files(self.keys)

    @property
    def data_sha256(self) -> dict[str, str]:
        """SHA-256 of each data file as it is now."""
        return {name: sha256(ROOT / name) for name in self.data_files}


def load(path: Path) -> Recipe:
    """A recipe that can be trusted: strict YAML, only keys and types that axolotl knows, content as the name says."""
    try:
        keys = read_checked(path, CACHE)
    except RecipeError as error:
        raise UserError(str(error)) from error
    rules.check(path, keys)
    return Recipe(path, keys)


def on_tiny_base(recipe: Recipe, base: str) -> Recipe:
    """The recipe with the tiny base model, lengths and steps for a CPU, and folders of its own (TINY=1)."""
    out = str(output_folder(recipe.keys, tiny=True).relative_to(ROOT))
    keys = recipe.keys | {
        "base_model": base,
        "sequence_len": min(TINY_LENGTH, recipe.keys["sequence_len"]),
        "excess_length_strategy": "drop",
        "max_steps": TINY_STEPS,
        "output_dir": out,
        "dataset_prepared_path": f"{out}/tokenised",
    }
    return Recipe(recipe.path, keys)


def output_folder(keys: dict[str, Any], tiny: bool) -> Path:
    """Where a recipe's run lies; TINY=1 has the same folders below outputs/tiny."""
    out, outputs = ROOT / keys["output_dir"], ROOT / "outputs"
    return outputs / "tiny" / os.path.relpath(out, outputs) if tiny else out


def data_files(keys: dict[str, Any]) -> list[str]:
    entries = [*keys.get("datasets", []), *keys.get("test_datasets", [])]
    return [entry["path"] for entry in entries]


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
