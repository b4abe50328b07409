"""Train a recipe: check everything that can be checked first, then `axolotl preprocess`, then `axolotl train`.

finlora train sentiment_r8_dora [--tiny] [--force] [--gpus 4 --zero 2] [-- axolotl's own options]
"""

import datetime
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from finlora.core.compatible import make_compatible
from finlora.core.errors import UserError
from finlora.core.files import tensor_shapes, write_json, write_text
from finlora.core.paths import ROOT, shown
from finlora.core.provenance import device_name, git_state, versions
from finlora.recipes import load as recipes
from finlora.recipes import names as recipe_names
from finlora.recipes import rules
from finlora.recipes.bases import rank_of
from finlora.recipes.recipe import TINY_STEPS, Recipe, on_tiny_base
from finlora.train import runs, tiny, tracking
from finlora.train.curves import curves, picture
from finlora.train.distributed import ONE_PROCESS, Launch, distribute
from finlora.train.launch import preprocess_and_train
from finlora.train.preflight import adapter_difference, preflight, prepare_data
from finlora.train.runs import Identity, RunFolder, folder_lock


def train(
    path: Path,
    launch: Launch = ONE_PROCESS,
    *,
    small: bool = False,
    force: bool = False,
    args: Sequence[str] = (),
    tracker: str | None = None,
    epochs: int | None = None,
    first_adapter: str | None = None,
) -> dict[str, Any] | None:
    """Train the recipe in `path` and return what run.json holds. Raises UserError before anything is loaded.

    launch: the processes. small: on the tiny base model (TINY=1). force: set a finished or foreign run aside first.
    args: for axolotl. tracker: as in finlora/train/tracking.py. epochs: in place of the recipe's; a run of the same
    recipe with fewer goes on. first_adapter: the folder, or the trained recipe, whose adapter training starts from.
    Nodes after the first return None.
    """
    if epochs:
        args = [*args, "--num-epochs", str(epochs)]
    if first_adapter:
        args = [*args, "--lora-model-dir", shown(adapter_folder(first_adapter, small))]
    recipe = recipes.load(path, args)
    rules.check_paths(recipe)
    if epochs and (small or recipe.settings.get("max_steps")):
        limit = f"TINY=1 trains {TINY_STEPS} steps" if small else f"{recipe.where('max_steps')} ends the run"
        raise UserError(f"EPOCHS={epochs}: {limit} whatever the epochs; leave one of them out")
    if small:
        recipe = on_tiny_base(recipe, tiny_base())
    distributed = distribute(recipe, launch)
    tracking_options = tracking.options(tracker, distributed.recipe)
    folder = RunFolder(distributed.recipe.output_folder, launch.rank)
    with folder_lock(folder.path, launch.rank, make=False) as lock:
        recipe, needs_gpu, origin = preflight(distributed.recipe, launch, not force and folder.record is not None)
        if distributed.batch_kept:
            print(distributed.batch_kept, flush=True)
        identity = Identity.of(recipe)
        record, resume = folder.claim(path, identity, force, more_epochs=bool(epochs))
        if not record:
            started = datetime.datetime.now(datetime.timezone.utc)
            identity = folder.begin(replace(folder.identity or identity, start=recipe.fetched_files))
            if first := recipe.settings.get("lora_model_dir"):
                print(f"from      {first}: its adapter is trained on, with a new optimizer and learning rate schedule")
            options = [*distributed.launcher, *args, *tracking_options, *resume, *distributed.torchrun]
            preprocess_and_train(recipe, folder, options, not needs_gpu, lock)
            if launch.rank:
                print(f"node {launch.rank} of {launch.nodes} is done; the first node checks the adapter and reports")
                return None
            about = {"data_from": origin, "processes": launch.processes, "zero": distributed.zero}
            record = finish(recipe, folder, identity, started, about)
    print(summary(path, record))
    return record


def finish(
    recipe: Recipe, folder: RunFolder, identity: Identity, started: datetime.datetime, about: dict[str, Any]
) -> dict[str, Any]:
    """Check the adapter, write run.json and return what it holds.

    recipe, identity: as run. about: the entries of run.json that only the command knows.
    """
    metrics = folder.metrics
    if metrics is None or metrics["interrupted"]:
        raise UserError(
            f"{folder.path.relative_to(ROOT)}: training ended before its last step; run the same command to resume"
        )
    check_adapter(recipe, folder, metrics["base_layers"])
    make_compatible(folder.path)  # the tokenizer beside the adapter
    seconds = (datetime.datetime.now(datetime.timezone.utc) - started).total_seconds()
    record = about | {
        "tiny": recipe.tiny,
        "fsdp": recipe.keys.get("fsdp_version"),
        "recipe": recipe.path.stem,
        "base_model": recipe.base_name,
        "identity": identity.sha256,
        "args": identity.args,
        "adapter": folder.adapter,
        "data": identity.data,
        "start": identity.start,
        "goes_on_from": identity.goes_on_from,
        "metrics": {key: value for key, value in metrics.items() if key != "log"},
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "versions": versions(),
        "git": git_state(),
        "device": device_name(),
    }
    if plot := curves(metrics["log"]):
        write_text(folder.path / "curves.svg", picture(recipe.path.stem, plot))
    write_json(folder.path / "run.json", record)
    return record


def check_adapter(recipe: Recipe, folder: RunFolder, base_layers: dict[str, int]) -> None:
    """UserError where the saved adapter is not what the recipe says; it names the key.

    base_layers: how many of the base's layers have which class, by metrics.json.
    """
    keys, out, config = recipe.settings, folder.path, folder.adapter_config or {}
    if differs := adapter_difference(recipe, config):
        _, name, expected, saved = differs
        raise UserError(
            f"{out}/adapter_config.json: key '{name}' is {saved}, the recipe says {expected}; do not use it"
        )
    kind = {16: "Linear", 8: "Linear8bitLt", 4: "Linear4bit"}[recipe_names.bits_of(keys)]
    if set(base_layers) != {kind}:
        raise UserError(f"{out}: trained on {base_layers}, the recipe says {kind}; do not use it")
    shapes = tensor_shapes(out / "adapter_model.safetensors")
    layers = {
        name: name.removeprefix("base_model.model.").partition(".lora_A")[0] for name in shapes if "lora_A" in name
    }
    wrong = [layer for name, layer in layers.items() if shapes[name][0] != rank_of(keys, layer)]
    dora = any(name.endswith("lora_magnitude_vector") for name in shapes)
    if not layers or wrong or dora != keys["peft_use_dora"]:
        raise UserError(f"{out}: ranks of {wrong[:3]}, magnitudes {dora}: not what the recipe says; do not use it")


def adapter_folder(name: str, small: bool) -> Path:
    """The folder of FROM=: as given, or that of a trained recipe. UserError where it is neither."""
    folder = ROOT / name
    if folder.is_dir():
        return folder.resolve()
    try:
        folder = runs.of_recipe(name, small).adapter
        runs.check_start(folder)
        return folder
    except UserError as error:
        raise UserError(f"FROM={name}: is no folder of an adapter and no trained recipe ({error})") from error


def tiny_base() -> str:
    """The tiny base model's folder, from the repository's root; built where it is not there yet."""
    return str(tiny.build(tiny.sample_texts()).relative_to(ROOT))


def finished_run(path: Path, small: bool, args: Sequence[str]) -> dict[str, Any] | None:
    """run.json of the recipe's finished run on one GPU; None where `train` would train. Brings its data up to date."""
    recipe = replace(recipes.load(path), args=tuple(args))
    rules.check_paths(recipe)
    recipe, _ = prepare_data(on_tiny_base(recipe, tiny_base()) if small else recipe)
    folder = RunFolder(recipe.output_folder)
    return folder.record if folder.is_of(recipe) else None


def is_unfinished(path: Path) -> bool:
    """Whether the recipe's folder holds an interrupted run of it, which `train` resumes or begins again."""
    recipe = recipes.load(path)
    folder = RunFolder(recipe.output_folder)
    return not folder.record and folder.is_of(recipe)


def summary(path: Path, record: dict[str, Any]) -> str:
    """What a finished run shows: its adapter, time, speed and loss, and the command that comes next."""
    adapter, metrics = record["adapter"], record["metrics"]
    step = metrics.get("adapter_step", metrics["steps"])
    steps, here = metrics["steps"], metrics.get("steps_this_run", metrics["steps"])
    best = f" at step {step}, the best validation" if step < metrics["steps"] else ""
    recipe = recipe_names.option(path)
    if record.get("tiny"):
        then = f"make train RECIPE={recipe} on a GPU, or make demo"
    else:
        then = f"make eval RECIPE={recipe} BASE=1, or make merge RECIPE={recipe}"
    return (
        f"\nadapter   {adapter['file']} ({adapter['bytes'] / 1e6:.1f} MB)\n"
        f"time      {record['seconds']:.0f} s, of them {metrics['seconds']:.0f} s training "
        f"{f'{here} of ' if here < steps else ''}{steps} steps\n"
        f"speed     {metrics['samples_per_second']:.1f} samples/s, {metrics['tokens_per_second']:.0f} tokens/s\n"
        f"loss      {_digits(metrics['final_loss'])} (validation {_digits(metrics['final_eval_loss'])}){best}\n"
        f"next      {then}"
    )


def _digits(loss: float | None) -> str:
    return "none" if loss is None else f"{loss:.4f}"
