"""A recipe that was read and checked, with all that its keys decide: base, sizes, files, memory, folders."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from fastdora.plugin.checksums import Digests, starting_files
from finlora.core.errors import UserError
from finlora.core.files import read_json, sha256
from finlora.core.paths import ROOT
from finlora.recipes.bases import (
    TEXT_FILES,
    Base,
    fetch_base,
    find_base,
    layers_of,
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
# Options of both axolotl's commands that are no keys of a recipe.
DEBUGGING = {"--debug", "--no-debug", "--debug-text-only", "--no-debug-text-only", "--debug-num-examples", "--prompter"}


@dataclass(frozen=True)
class Recipe:
    """path: its file. keys: axolotl's keys with their values, as written or (after `on_tiny_base` and
    finlora/train/distributed.py) as run. args: axolotl's own options, which set some of them. text, written: the file
    and its keys. source: what an error begins with, where that is not the file. tiny: with TINY=1.
    """

    path: Path
    keys: dict[str, Any]
    args: tuple[str, ...] = ()
    text: str = ""
    written: dict[str, Any] = field(default_factory=dict)
    source: str | None = None
    tiny: bool = False

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What is trained: the keys with axolotl's options in their places."""
        return with_options(self.keys, self.args)

    @cached_property
    def as_run(self) -> str:
        """The text that axolotl reads, without its options: the file's own where its keys are what is run."""
        if self.keys == self.written:
            return self.text
        return f"# As run, from {self.path}\n{yaml.safe_dump(self.keys, sort_keys=False, width=120)}"

    def where(self, key: str) -> str:
        """What an error on a key begins with: the file and the key, or the options where they set it."""
        by_options = key.partition(".")[0] in {name.partition(".")[0] for name in option_values(self.args)}
        return f"{f'ARGS={shlex.join(self.args)}' if by_options else self.source or self.path}: key '{key}'"

    @cached_property
    def parts(self) -> dict[str, Any] | None:
        """The parts of its name; None for a name outside the grammar."""
        return parse_name(self.path.stem)

    @property
    def base(self) -> Base | None:
        """Its base model in recipes/bases.yaml; None for any other."""
        return find_base(self.keys["base_model"])

    @cached_property
    def shape(self) -> dict[str, Any] | None:
        """The base model's sizes; None where they are not known."""
        return shape(self.settings["base_model"])

    @property
    def layers(self) -> list[str]:
        """The linear layers of one block of the base model, which an adapter may target; none where not known."""
        return list(linear_layers(self.shape)) if self.shape else []

    @property
    def targets(self) -> list[str]:
        """The linear layers of one block that are adapted."""
        if self.settings.get("lora_target_linear"):
            return self.layers or layers_of(self.where("base_model"), self.base_config)
        return self.settings["lora_target_modules"]

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
    def base_name(self) -> str:
        """The hub id, or the folder behind the link that the recipe names: `.cache/tiny` may point elsewhere later."""
        folder = ROOT / self.keys["base_model"]
        return os.path.relpath(folder.resolve(), ROOT) if folder.is_dir() else self.keys["base_model"]

    @property
    def memory(self) -> float | None:
        """GiB that training takes on one GPU; None for a base model of unknown sizes."""
        return memory_estimate(self.settings, self.shape) if self.shape else None

    @property
    def on_cpu(self) -> bool:
        """Whether the base model is known and small enough to train on a CPU."""
        return bool(self.shape) and on_cpu(self.shape)

    @property
    def trainable_parameters(self) -> int | None:
        return trainable_parameters(self.settings, self.shape) if self.shape else None

    @property
    def output_folder(self) -> Path:
        return ROOT / self.keys["output_dir"]

    @property
    def data_files(self) -> list[str]:
        return [entry["path"] for kind in ("datasets", "test_datasets") for entry in self.keys.get(kind) or []]

    @property
    def data_sha256(self) -> dict[str, str]:
        """SHA-256 of each data file as it is now."""
        return {name: sha256(ROOT / name) for name in self.data_files}

    @property
    def starting_files(self) -> Digests:
        """SHA-256 of the files that training starts from, as they are now: base model, first adapter, templates."""
        return starting_files(self.settings, ROOT)

    @property
    def fetched_files(self) -> Digests:
        """`starting_files` once the base model's weights are here; a hub's are fetched, which takes minutes."""
        fetch_base(self.path, self.keys)
        return self.starting_files


def on_tiny_base(recipe: Recipe, base: str) -> Recipe:
    """The recipe with the tiny base model, lengths and steps for a CPU, and folders of its own (TINY=1).

    What the recipe's own base decides of the prompt is the untagged base's, whose tokens the tiny one has.
    """
    theirs = recipe.base.recipe.keys if recipe.base else {}
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
    return replace(recipe, keys=keys, tiny=True)


def output_folder(keys: dict[str, Any], tiny: bool) -> Path:
    """Where a recipe's run lies; TINY=1 has the same folders below outputs/tiny."""
    out, outputs = ROOT / keys["output_dir"], ROOT / "outputs"
    return outputs / "tiny" / os.path.relpath(out, outputs) if tiny else out


def option_values(args: Sequence[str]) -> dict[str, Any]:
    """The recipe keys that axolotl's options set: `--learning-rate 0.1`, `--seed=1`, `--tf32`, `--no-tf32`."""
    values: dict[str, Any] = {}
    for arg, following in zip(args, [*args[1:], "--"], strict=False):
        option, equals, value = arg.partition("=")
        if not arg.startswith("--") or option in DEBUGGING:
            continue
        key = option.removeprefix("--").replace("-", "_")
        if equals or not following.startswith("--"):
            values[key] = _value(value if equals else following)
        else:
            values[key.removeprefix("no_")] = not key.startswith("no_")
    return values


def with_options(keys: dict[str, Any], args: Sequence[str]) -> dict[str, Any]:
    """The keys with axolotl's options in their places: `--special-tokens.pad-token` sets one within another."""
    keys = dict(keys)
    for name, value in option_values(args).items():
        key, dot, inner = name.partition(".")
        keys[key] = (keys.get(key) or {}) | {inner: value} if dot else value
    return keys


def _value(text: str) -> Any:
    """The value of an option as axolotl (0.19.0) takes it: a number, true, false, null, else text, never a list."""
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    words = {"true": True, "yes": True, "false": False, "no": False, "null": None, "none": None, "~": None}
    return words.get(text.lower(), text)
