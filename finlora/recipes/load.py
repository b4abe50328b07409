"""Load a recipe that can be trusted, list the recipes, check them all (`make recipes`, `make check`)."""

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastdora.plugin.keys import RecipeError, check_keys, input_schema, read_recipe
from finlora.core.errors import UserError, did_you_mean
from finlora.core.files import replacing, sha256
from finlora.core.paths import ROOT
from finlora.recipes.bases import linear_layers, shape, trainable_parameters
from finlora.recipes.factorise import comments, factorise
from finlora.recipes.memory import memory_estimate, on_cpu
from finlora.recipes.names import RECIPES, names, parse_name
from finlora.recipes.rules import validate

CACHE = ROOT / ".cache"
PLUGIN = ROOT / "fastdora" / "plugin"  # whose keys are part of the schema
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
        keys = read_recipe(path)
        if "fastdora.FastDoraPlugin" not in (keys.get("plugins") or []):
            raise UserError(f"{path}: key 'plugins': add fastdora.FastDoraPlugin; without it rows are lost in silence")
        check_keys(keys, str(path), axolotl_schema(keys["plugins"]))
    except RecipeError as error:
        raise UserError(str(error)) from error
    recipe = Recipe(path, keys)
    check_name(recipe)
    validate(str(path), keys, recipe.layers)
    return recipe


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
    tiny = Recipe(recipe.path, keys)
    validate(str(recipe.path), keys, tiny.layers)  # they may be others than the recipe's base model has
    return tiny


def output_folder(keys: dict[str, Any], tiny: bool) -> Path:
    """Where a recipe's run lies; TINY=1 has the same folders below outputs/tiny."""
    out, outputs = ROOT / keys["output_dir"], ROOT / "outputs"
    return outputs / "tiny" / os.path.relpath(out, outputs) if tiny else out


def data_files(keys: dict[str, Any]) -> list[str]:
    entries = [*keys.get("datasets", []), *keys.get("test_datasets", [])]
    return [entry["path"] for entry in entries]


def check_name(recipe: Recipe) -> None:
    """Raise UserError where a recipe's content is not what its name says (names outside the grammar say nothing).

    A recipe writes to outputs/<name>; one that lies in outputs/ itself, as a sweep's points do, beside itself.
    """
    path, parts = recipe.path, recipe.parts
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
        if recipe.keys.get(key) != value:
            raise UserError(
                f"{path}: key '{key}' is {recipe.keys.get(key)}, but the name says {value}; change one of them"
            )


def check_paths(recipe: Recipe) -> None:
    """UserError for a path of the recipe that leads out of this repository, through `..`, a link, or from the root.

    What is written lies in outputs/. A base model may lie anywhere: it is only read, and only as safetensors.
    """
    keys, outputs = recipe.keys, ROOT / "outputs"
    for key in ("output_dir", "dataset_prepared_path"):
        where, place = f"{recipe.path}: key '{key}': {keys[key]}", Path(os.path.normpath(ROOT / keys[key]))
        if place == outputs or not place.is_relative_to(outputs):
            raise UserError(f"{where} is not in outputs/; name a folder there")
        inside = (outputs / part for part in (place.relative_to(outputs), *place.relative_to(outputs).parents))
        if link := next((part for part in inside if part != outputs and part.is_symlink()), None):
            raise UserError(
                f"{where}: {link.relative_to(ROOT)} is a link; remove it and name a folder in outputs/, which may "
                "itself be a link to another disk"
            )
    for key, name in _files(recipe):
        # Each of these may be a link or a mount of its own.
        roots = (ROOT, ROOT / "data", ROOT / "data" / "raw", ROOT / "data" / "prepared")
        if not any((ROOT / name).resolve().is_relative_to(root.resolve()) for root in roots):
            raise UserError(f"{recipe.path}: key '{key}': {name} leads out of the repository; copy it to data/")
        if key not in ("datasets", "test_datasets") and not (ROOT / name).is_file():
            raise UserError(f"{recipe.path}: key '{key}': {name} is not there; fix the path")


def _files(recipe: Recipe) -> list[tuple[str, str]]:
    """(key, path) of each file that the recipe names: rows, templates, DeepSpeed's configuration."""
    keys = recipe.keys
    entries = [(kind, entry) for kind in ("datasets", "test_datasets") for entry in keys.get(kind) or []]
    files = [(kind, entry["path"]) for kind, entry in entries]
    for key, holder in [("", keys), *((f"{kind}.", entry) for kind, entry in entries)]:
        template = holder.get("chat_template_jinja")
        # Axolotl (0.19.0) takes a path that is not there for the template itself: every prompt would be that path.
        if template and "\n" not in template and "{" not in template:
            files.append((f"{key}chat_template_jinja", template))
    if isinstance(keys.get("deepspeed"), str):
        files.append(("deepspeed", keys["deepspeed"]))
    return files


def axolotl_schema(plugins: Any) -> dict[str, Any]:
    """The strict JSON schema of axolotl and `plugins`; importing axolotl takes ten seconds, so it is kept in `.cache`.

    Raises RecipeError naming a plugin that cannot be imported.
    """
    names = tuple(name for name in plugins if isinstance(name, str)) if isinstance(plugins, list) else ()
    source = b"".join((PLUGIN / name).read_bytes() for name in ("keys.py", "args.py"))
    state = "".join(version(package) for package in ("axolotl", "transformers", "pydantic")) + str(names)
    key = hashlib.sha256(source + state.encode()).hexdigest()[:12]
    cached = CACHE / f"axolotl-schema-{key}.json"
    if cached.is_file():
        return json.loads(cached.read_text(encoding="utf-8"))
    schema = input_schema(names)
    with replacing(cached) as file:
        json.dump(schema, file)
    return schema


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
