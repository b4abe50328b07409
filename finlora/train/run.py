"""Train a recipe: check everything that can be checked first, then `axolotl preprocess`, then `axolotl train`.

finlora train sentiment_r8_dora [--tiny] [--force] [--gpus 4 --zero 2] [-- axolotl's own options]
"""

import datetime
import hashlib
import json
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastdora.plugin.keys import RecipeError, check_keys, kept_schema
from finlora.core.compatible import make_compatible
from finlora.core.errors import UserError, did_you_mean
from finlora.core.files import write_json
from finlora.core.paths import ROOT
from finlora.core.provenance import device_name, git_state, versions
from finlora.recipes import load as recipes
from finlora.recipes import names as recipe_names
from finlora.recipes import rules
from finlora.recipes.bases import fetch_base
from finlora.recipes.recipe import Recipe, on_tiny_base
from finlora.train import distributed, tiny
from finlora.train import tracking as track
from finlora.train.base_model import check_base
from finlora.train.distributed import Launch
from finlora.train.launch import axolotl, log_file
from finlora.train.preflight import preflight, prepare_data
from finlora.train.runs import (
    RunFolder,
    claim_folder,
    config_file,
    difference,
    folder_lock,
    identify,
    option_values,
    resume_options,
    write_identity,
)

# Keys that a recipe's name decides: ARGS may not change them, or the folder and the adapter would not be the recipe's.
NAMED = {key for part in ("bits", "r", "alpha", "method", "name") for key in recipe_names.DECIDED_BY[part]}
# What is read from the recipe alone, before axolotl starts: the run would be prepared and recorded with that.
READ_HERE = {"base_model", "datasets", "test_datasets", "plugins"}
# Options of both axolotl's commands that are no keys of a recipe.
DEBUGGING = {"--debug", "--no-debug", "--debug-text-only", "--no-debug-text-only", "--debug-num-examples", "--prompter"}
ONE_PROCESS = Launch()


def train(
    path: Path,
    launch: Launch = ONE_PROCESS,
    *,
    small: bool = False,
    force: bool = False,
    args: list[str] | None = None,
    tracker: str | None = None,
) -> dict[str, Any] | None:
    """Train the recipe in `path` and return what run.json holds. Raises UserError before anything is loaded.

    launch: the processes. small: on the tiny base model (TINY=1). force: set a finished or foreign run aside first.
    args: for axolotl. tracker: as in finlora/train/tracking.py. The nodes after the first return None: the first one
    checks the adapter and writes run.json.
    """
    args = args or []
    check_args(path, args)
    recipe = recipes.load(path)
    rules.check_paths(recipe)
    written = on_tiny_base(recipe, tiny_base()) if small else recipe
    as_run, message = distributed.distribute(written, launch)
    check_options(written, args)
    hint, zero = distributed.shorter_packs_hint(written, as_run), distributed.stage(as_run.keys)
    launcher, launcher_args = distributed.launcher(launch)
    out, rank = as_run.output_folder, launch.rank
    track.check_recipe(path, recipe.keys | option_values(args))
    tracking = track.options(tracker, out)
    with folder_lock(out, rank, make=False) as lock:
        trained = not force and RunFolder(out).record is not None
        needs_gpu, origin = preflight(with_options(as_run, args), launch, small, trained)
        if message:
            print(message, flush=True)
        identity, config = identify(recipe, as_run, args), config_file(out, rank)
        resume_args = [] if trained else resume_options(path, out, identity, force)
        record = claim_folder(path, out, identity, force, rank)
        if record:
            print(f"{out.relative_to(ROOT)} is already trained with this recipe and data; FORCE=1 trains again")
        else:
            fetch_base(path, as_run.keys)
            identity = identify(recipe, as_run, args)  # with a hub's model that was fetched
            started = datetime.datetime.now(datetime.timezone.utc)
            print(f"log       {log_file(config).relative_to(ROOT)} (VERBOSE=1 shows it)", flush=True)
            train_args = [*launcher, *args, *tracking, *resume_args, *launcher_args]
            with naming(path, config):
                if not rank:
                    write_identity(out, identity)
                    preprocess(config, args, not needs_gpu, lock, hint)
                axolotl("train", config, train_args, not needs_gpu, lock)
            if rank:
                print(f"node {rank} of {launch.nodes} is done; the first node checks the adapter and reports")
                return None
            about = {
                "tiny": small,
                "data_from": origin,
                "processes": launch.processes,
                "zero": zero,
                "fsdp": as_run.keys.get("fsdp_version"),
            }
            record = finish(as_run, identity, started, about)
    print(summary(path, record))
    return record


def finish(
    recipe: Recipe, identity: dict[str, Any], started: datetime.datetime, about: dict[str, Any]
) -> dict[str, Any]:
    """Check the adapter, write run.json and return what it holds.

    recipe, identity: as run. about: the entries of run.json that the command's options decide.
    """
    folder = RunFolder(recipe.output_folder)
    metrics = folder.metrics
    if metrics is None or metrics["interrupted"]:
        raise UserError(
            f"{folder.path.relative_to(ROOT)}: training ended before its last step; run the same command to resume"
        )
    check_adapter(recipe, folder, metrics)
    make_compatible(folder.path)  # the tokenizer beside the adapter
    seconds = (datetime.datetime.now(datetime.timezone.utc) - started).total_seconds()
    record = about | {
        "recipe": recipe.path.stem,
        "base_model": base_model(recipe.keys),
        "identity": hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        "args": identity["args"],
        "adapter": folder.adapter,
        "data": identity["data"],
        "start": identity["start"],
        "metrics": {key: value for key, value in metrics.items() if key != "log"},
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "versions": versions(),
        "git": git_state(),
        "device": device_name(),
    }
    write_json(folder.path / "run.json", record)
    return record


def finished_run(path: Path, small: bool, args: list[str]) -> dict[str, Any] | None:
    """run.json of the recipe's finished run on one GPU; None where `train` would train. Brings its data up to date."""
    recipe = recipes.load(path)
    rules.check_paths(recipe)
    as_run = on_tiny_base(recipe, tiny_base()) if small else recipe
    prepare_data(as_run, small)
    folder = RunFolder(as_run.output_folder)
    before = folder.identity
    same = before and not difference(before, identify(recipe, as_run, args))
    return folder.record if same else None


def is_unfinished(path: Path) -> bool:
    """Whether the recipe's folder holds an interrupted run of it, which `train` resumes or begins again."""
    recipe = recipes.load(path)
    folder = RunFolder(recipe.output_folder)
    if folder.identity is None or folder.record:
        return False
    return not difference(folder.identity, identify(recipe, recipe, []))


def check_args(path: Path, args: list[str]) -> None:
    """UserError where an option is none of axolotl's, changes what the recipe's name says, or is refused."""
    if not args:
        return
    from axolotl.cli.config_options import AXOLOTL_CONFIG_CLI_OPTIONS  # late: it sets up axolotl's logging, too

    source = f"ARGS={shlex.join(args)}"
    options = {option.strip() for names, *_ in AXOLOTL_CONFIG_CLI_OPTIONS for option in names[0].split("/")}
    for arg in args:
        name = arg.partition("=")[0]
        if name.startswith("--") and name not in options | DEBUGGING:
            remedy = did_you_mean(name, options, cutoff=0.8) or f"put the key into a recipe, a copy of {path}"
            raise UserError(f"{source}: {name} is no option of axolotl's; {remedy.strip()}")
    for key, value in option_values(args).items():
        if key in NAMED | READ_HERE:
            raise UserError(f"{source}: {key} belongs to the recipe; copy {path} and edit that")
        if reason := rules.why_refused("recipe", key, value):
            raise UserError(f"{source}: {key}{reason}")


def check_options(recipe: Recipe, args: list[str]) -> None:
    """UserError where axolotl's options, in their places in the recipe, break a rule for its keys."""
    if not args:
        return
    source, changed = f"ARGS={shlex.join(args)}", with_options(recipe, args)
    try:
        check_keys(changed.keys, source, kept_schema(changed.keys["plugins"], recipes.CACHE))
        rules.validate(source, changed)
        rules.check_paths(changed)
        check_base(changed)
    except RecipeError as error:
        raise UserError(str(error)) from error
    except UserError as error:
        raise UserError(
            f"{source}: {str(error).removeprefix(f'{source}: ').removeprefix(f'{recipe.path}: ')}"
        ) from error


def with_options(recipe: Recipe, args: list[str]) -> Recipe:
    """The recipe with axolotl's options in their places."""
    keys = dict(recipe.keys)
    for name, value in option_values(args).items():
        key, dot, inner = name.partition(".")
        if f"--{name.replace('_', '-')}" not in DEBUGGING:
            keys[key] = (keys.get(key) or {}) | {inner: value} if dot else value
    return Recipe(recipe.path, keys)


def tiny_base() -> str:
    """The tiny base model's folder, from the repository's root; built where it is not there yet."""
    return str(tiny.build(tiny.sample_texts()).relative_to(ROOT))


def base_model(keys: dict[str, Any]) -> str:
    """The hub id, or the folder behind the link that the recipe names: `.cache/tiny` may point elsewhere later."""
    folder = ROOT / keys["base_model"]
    return os.path.relpath(folder.resolve(), ROOT) if folder.is_dir() else keys["base_model"]


@contextmanager
def naming(path: Path, config: Path) -> Iterator[None]:
    """In the plugin's errors, the recipe that was written instead of its copy in the run's folder."""
    try:
        yield
    except UserError as error:
        copy, colon, rest = str(error).partition(": ")
        raise (UserError(f"{path}{colon}{rest}") if copy == str(config) else error) from error.__cause__


def preprocess(config: Path, args: list[str], local: bool, lock, hint: str) -> None:
    """Tokenize the rows. hint: added to the line of a failure; a row may be longer than packs that were shortened."""
    for name in ("metrics.json", "stepping"):  # an earlier attempt's
        (config.parent / name).unlink(missing_ok=True)
    try:
        axolotl("preprocess", config, args, local, lock)
    except UserError as error:
        raise UserError(f"{error}{hint}") from error


def check_adapter(recipe: Recipe, folder: RunFolder, metrics: dict[str, Any]) -> None:
    """UserError where the saved adapter is not what the recipe says; it names the key."""
    from safetensors import SafetensorError, safe_open  # 0.3 s of start-up that only a run's end needs

    keys, out, config = recipe.keys, folder.path, folder.adapter_config
    expected = {
        "r": keys["lora_r"],
        "lora_alpha": keys["lora_alpha"],
        "lora_dropout": keys["lora_dropout"],
        "use_dora": keys["peft_use_dora"],
        "use_rslora": keys["peft_use_rslora"],
        "target_modules": sorted(keys["lora_target_modules"]),
    }
    for key, value in expected.items():
        saved = config.get(key)
        saved = sorted(saved) if isinstance(saved, list) else saved
        if saved != value:
            raise UserError(
                f"{out}/adapter_config.json: key '{key}' is {saved}, the recipe says {value}; do not use it"
            )
    kind = "Linear8bitLt" if keys["load_in_8bit"] else "Linear4bit" if keys["load_in_4bit"] else "Linear"
    if set(metrics["base_layers"]) != {kind}:
        raise UserError(f"{out}: trained on {metrics['base_layers']}, the recipe says {kind}; do not use it")
    file = out / "adapter_model.safetensors"
    try:
        with safe_open(file, "pt") as tensors:
            names = list(tensors.keys())
            ranks = {tensors.get_slice(name).get_shape()[0] for name in names if name.endswith("lora_A.weight")}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read ({error}); train again with FORCE=1") from error
    dora = any(name.endswith("lora_magnitude_vector") for name in names)
    if ranks != {keys["lora_r"]} or dora != keys["peft_use_dora"]:
        raise UserError(f"{file}: ranks {sorted(ranks)}, magnitudes {dora}: not what the recipe says; do not use it")


def summary(path: Path, record: dict[str, Any]) -> str:
    """What a finished run shows: its adapter, time, speed and loss, and the command that comes next."""
    adapter, metrics = record["adapter"], record["metrics"]
    step = metrics.get("adapter_step", metrics["steps"])
    best = f" at step {step}, the best validation" if step < metrics["steps"] else ""
    recipe = recipe_names.option(path)
    if record.get("tiny"):
        then = f"make train RECIPE={recipe} on a GPU, or make demo"
    else:
        then = f"make eval RECIPE={recipe} BASE=1, or make merge RECIPE={recipe}"
    return (
        f"\nadapter   {adapter['file']} ({adapter['bytes'] / 1e6:.1f} MB)\n"
        f"time      {record['seconds']:.0f} s, of them {metrics['seconds']:.0f} s training {metrics['steps']} steps\n"
        f"speed     {metrics['samples_per_second']:.1f} samples/s, {metrics['tokens_per_second']:.0f} tokens/s\n"
        f"loss      {_digits(metrics['final_loss'])} (validation {_digits(metrics['final_eval_loss'])}){best}\n"
        f"next      {then}"
    )


def _digits(loss: float | None) -> str:
    return "none" if loss is None else f"{loss:.4f}"
