"""A recipe that was read and checked, with all that its keys decide: base, sizes, files, memory, folders."""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from finlora.core.errors import UserError
from finlora.core.files import read_json, sha256
from finlora.core.paths import ROOT
from finlora.recipes.bases import (
    TEXT_FILES,
    fetch_base,
    find_base,
    linear_layers,
    load_bases,
    shape,
    trainable_parameters,
    untagged,
)
from finlora.recipes.memory import memory_estimate, on_cpu
from finlora.recipes.names import parse_name

# TINY=1 shortens packs and steps to what a CPU does in seconds.
TINY_LENGTH, TINY_STEPS = 512, 2


@dataclass(frozen=True)
class Recipe:
    """path: its file. keys: axolotl's keys with their values, as written or (after `on_tiny_base` and
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

    @cached_property
    def base_folder(self) -> Path:
        """The base model's configuration and tokenizer; a hub's are fetched. UserError where there is no such model."""
        return fetch_base(self.path, self.keys, files=TEXT_FILES)

    @cached_property
    def base_config(self) -> dict[str, Any]:
        """What its config.json holds."""
        config = read_json(self.base_folder / "config.json")
        if not isinstance(config, dict):
            raise UserError(
                f"{self.path}: key 'base_model': {self.base_folder} has no config.json; name a model's folder"
            )
        return config

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


def on_tiny_base(recipe: Recipe, base: str) -> Recipe:
    """The recipe with the tiny base model, lengths and steps for a CPU, and folders of its own (TINY=1).

    What the recipe's own base decides of the prompt is the untagged base's, whose tokens the tiny one has.
    """
    own = find_base(recipe.keys["base_model"])
    theirs = own.recipe.keys if own else {}
    like = load_bases()[untagged()].recipe.keys | {"learning_rate": recipe.keys["learning_rate"]}
    keys = {
        key: like.get(key) if key in theirs and value == theirs[key] else value for key, value in recipe.keys.items()
    }
    out = str(output_folder(recipe.keys, tiny=True).relative_to(ROOT))
    keys |= {
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
    entries = [*(keys.get("datasets") or []), *(keys.get("test_datasets") or [])]
    return [entry["path"] for entry in entries]
