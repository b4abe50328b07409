"""Train a recipe: check everything that can be checked first, then `axolotl preprocess`, then `axolotl train`.

finlora train sentiment_r8_dora [--tiny] [--force] [--gpus 4 --zero 2] [-- axolotl's own options]
"""

import datetime
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from finlora.core.errors import UserError
from finlora.core.files import read_json, replacing
from finlora.core.paths import ROOT
from finlora.core.provenance import device_name, git_state, versions
from finlora.data import prepare
from finlora.data.tasks import load_tasks
from finlora.recipes import load as recipes
from finlora.recipes import names as recipe_names
from finlora.recipes.bases import fetch_base
from finlora.train import distributed, runs, tiny
from finlora.train import tracking as track
from finlora.train.preflight import check_adapter, check_device, check_disk, check_messages, check_places
from finlora.train.runs import base_model, claim_folder, folder_lock, identify, identity_digest

TINY_LENGTH, TINY_STEPS = 512, 2
# Keys that a recipe's name decides: ARGS may not change them, or the folder and the adapter would not be the recipe's.
NAMED = {key for part in ("bits", "r", "alpha", "method", "name") for key in recipe_names.DECIDED_BY[part]}


def train(
    path: Path,
    *,
    small: bool = False,
    force: bool = False,
    args: list[str] | None = None,
    gpus: int = 1,
    nodes: int = 1,
    rank: int = 0,
    master: str | None = None,
    zero: int | None = None,
    offload: bool = False,
    fsdp: int | None = None,
    ray: bool = False,
    tracker: str | None = None,
) -> dict[str, Any] | None:
    """Train the recipe in `path` and return what run.json holds. Raises UserError before anything is loaded.

    small: on the tiny base model (TINY=1). force: set a finished or foreign run aside first. args: for axolotl.
    gpus: processes on this node; nodes, rank, master: of how many this is which, and HOST:PORT of the first. zero:
    DeepSpeed's stage, with optimizer (and in stage 3 weights) in the CPU's memory where offload says so. fsdp: 2 for
    torch's FSDP2. ray: on a Ray cluster, gpus x nodes workers. tracker: as in finlora/train/tracking.py. The nodes
    after the first return None: the first one checks the adapter and writes run.json.
    """
    args = args or []
    for key in option_names(args):
        if key in NAMED:
            raise UserError(f"ARGS={shlex.join(args)}: {key} belongs to the recipe's name; copy {path} and edit that")
    recipe = recipes.load(path)
    check_places(path, recipe)
    whole = for_tiny(recipe) if small else recipe
    recipes.check_targets(str(path), whole)  # the tiny base model has layers of its own
    run_recipe, say = distributed.spread(path, whole, gpus, nodes)
    run_recipe = distributed.shard(path, run_recipe, zero, offload, fsdp, gpus * nodes)
    launch, launcher_args = distributed.launcher(gpus, nodes, rank, master, ray)
    if ray:
        run_recipe = distributed.for_ray(run_recipe)
    out = ROOT / run_recipe["output_dir"]
    tracking = track.options(tracker, out)
    # Ray's GPUs may be elsewhere; it waits until it has them.
    needs_gpu = ray or check_device(path, run_recipe, gpus if gpus * nodes > 1 or zero else 0)
    if say:
        print(say, flush=True)
    with folder_lock(out, rank) as lock:
        sources = prepare_data(path, run_recipe, small)
        identity = identify(path, recipe, run_recipe, args)
        if rank:
            fetch_base(path, run_recipe)
            config = out / f".recipe.node{rank}.yaml"  # not a file that the first node would take for another run's
            with replacing(config) as file:
                file.write(identity["recipe"])
            axolotl("train", config, [*launch, *args, *tracking, *launcher_args], not needs_gpu, lock)
            print(f"node {rank} of {nodes} is done; the first node checks the adapter and reports")
            return None
        finished = claim_folder(path, out, identity, force)
        if finished:
            print(f"{out.relative_to(ROOT)} is already trained with this recipe and data; FORCE=1 trains again")
            report(path, out, finished, small)
            return finished
        check_disk(path, run_recipe, out, needs_gpu)
        fetch_base(path, run_recipe)
        config = out / "recipe.yaml"  # what is recorded is what is trained, whoever edits the recipe now
        for name in ("metrics.json", "stepping"):
            (out / name).unlink(missing_ok=True)
        started = datetime.datetime.now(datetime.timezone.utc)
        with distributed.shorter_packs(whole, run_recipe):
            axolotl("preprocess", config, args, not needs_gpu, lock)
        axolotl("train", config, [*launch, *args, *tracking, *launcher_args], not needs_gpu, lock)
        metrics = read_metrics(out)
        adapter = check_adapter(run_recipe, out, metrics)
        record = {
            "recipe": path.stem,
            "tiny": small,
            "base_model": base_model(run_recipe),
            "identity": identity_digest(identity),
            "args": args,
            "adapter": adapter,
            "data": identity["data"],
            "data_from": sources,
            "metrics": {key: value for key, value in metrics.items() if key != "log"},
            "started": started.isoformat(timespec="seconds"),
            "seconds": round((datetime.datetime.now(datetime.timezone.utc) - started).total_seconds(), 1),
            "versions": versions(),
            "git": git_state(),
            "device": device_name(),
            "processes": gpus * nodes,
            "zero": distributed.stage(run_recipe),
            "fsdp": run_recipe.get("fsdp_version"),
        }
        with replacing(out / "run.json") as file:
            json.dump(record, file, indent=1)
            file.write("\n")
    report(path, out, record, small)
    return record


def finished_run(path: Path, small: bool, args: list[str]) -> dict[str, Any] | None:
    """run.json of the recipe's finished run on one GPU; None where `train` would train. Brings its data up to date."""
    recipe = recipes.load(path)
    check_places(path, recipe)
    run_recipe = for_tiny(recipe) if small else recipe
    prepare_data(path, run_recipe, small)
    out = ROOT / run_recipe["output_dir"]
    before = read_json(out / "started.json")
    same = before and not runs.difference(before, identify(path, recipe, run_recipe, args))
    return read_json(out / "run.json") if same else None


def option_names(args: list[str]) -> list[str]:
    """The recipe keys that axolotl's options change (and their values, which are no keys)."""
    return [arg.lstrip("-").split("=")[0].replace("-", "_").removeprefix("no_") for arg in args]


def for_tiny(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe with base model, lengths and steps for a CPU, and folders of its own."""
    out = str(runs.output_folder(recipe, small=True).relative_to(ROOT))
    base = str(tiny.build(tiny.sample_texts()).relative_to(ROOT))
    return recipe | {
        "base_model": base,
        "sequence_len": min(TINY_LENGTH, recipe["sequence_len"]),
        "excess_length_strategy": "drop",
        "max_steps": TINY_STEPS,
        "output_dir": out,
        "dataset_prepared_path": f"{out}/tokenised",
    }


def prepare_data(path: Path, recipe: dict[str, Any], small: bool) -> str:
    """Bring every data file of the recipe up to date; return where the rows come from: raw, sample or own.

    A TINY run on a task that is not fetched takes the sample rows, and points the recipe at them. Every line of files
    that are not ours is read before anything is loaded, so that a malformed one is named.
    """
    origin = "own"
    for kind in ("datasets", "test_datasets"):
        for entry in recipe.get(kind, []):
            file = Path(entry["path"])
            if file.parts[:2] != ("data", "prepared") or file.parts[2] not in load_tasks():
                check_messages(path, ROOT / file)
                continue
            task, out = file.parts[2], ROOT / file.parent
            stale = prepare.why_stale(task, out=out)
            if small and stale:
                out = prepare.PREPARED / "sample" / task
                if prepare.why_stale(task, tiny.SAMPLE, out):
                    # Enough rows to fill one pack of the validation set, and no more: each costs time at every look.
                    prepare.prepare(task, tiny.SAMPLE, out, validation=0.02 if "sentiment" in task_parts(task) else 0.2)
                entry["path"] = str((out / file.name).relative_to(ROOT))
                origin = "sample"
            else:
                if stale:
                    prepare.refresh(task, out=out)
                origin = "raw"
            if not (ROOT / entry["path"]).is_file():
                raise UserError(f"{path}: key '{kind}': {entry['path']} is missing; run `make data TASK={task}`")
    return origin


def task_parts(task: str) -> list[str]:
    return load_tasks()[task].mixture_of or [task]


def axolotl(command: str, config: Path, args: list[str], local: bool, lock) -> None:
    """Run one axolotl command with its output visible; UserError when it fails, and on Ctrl-C a whole checkpoint.

    local: the base model is small, so nothing is spread over processes. The hub is never asked: `fetch_base` has.
    """
    env = os.environ | {
        "AXOLOTL_DO_NOT_TRACK": os.environ.get("AXOLOTL_DO_NOT_TRACK", "1"),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a recipe's paths are this repository's
        "RAY_USAGE_STATS_ENABLED": os.environ.get("RAY_USAGE_STATS_ENABLED", "0"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600",  # torchrun would kill a checkpoint under way after 30 s
    }
    if command == "train" or local:
        # 0: none but this one. Tokens are ready by then, and others would only start anew, axolotl's imports included.
        env["AXOLOTL_DATASET_NUM_PROC"] = "0"
    # Its own process group: Ctrl-C reaches it from here alone, and once. The lock goes with it.
    child = subprocess.Popen(
        [sys.executable, "-m", "axolotl.cli.main", command, str(config), *args],
        cwd=ROOT,
        env=env,
        start_new_session=True,
        pass_fds=[lock.fileno()],
    )
    try:
        code = child.wait()
    except (KeyboardInterrupt, SystemExit):
        # During preprocess and loading nothing is worth keeping; while steps run the plugin answers with a checkpoint.
        out = ROOT / yaml.safe_load(config.read_text(encoding="utf-8"))["output_dir"]
        stepping = command == "train" and (out / "stepping").exists()
        os.killpg(child.pid, signal.SIGINT if stepping else signal.SIGTERM)
        if stepping:
            print("\ninterrupted: finishing the step under way and saving a checkpoint", file=sys.stderr, flush=True)
        try:
            child.wait()
        except KeyboardInterrupt:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        partial = out / "adapter_model.safetensors"
        if partial.exists():
            partial.rename(out / "interrupted_adapter_model.safetensors")
        print(f"interrupted; run the same command again to go on from {out.relative_to(ROOT)}", file=sys.stderr)
        raise
    if code:
        raise UserError(f"axolotl {command} {config} failed with exit code {code}; the reason stands above")


def read_metrics(out: Path) -> dict[str, Any]:
    metrics = read_json(out / "metrics.json")
    if metrics is None or metrics["interrupted"]:
        raise UserError(f"{out.relative_to(ROOT)}: training ended before its last step; run the same command to go on")
    return metrics


def report(path: Path, out: Path, record: dict[str, Any], small: bool) -> None:
    adapter, metrics = record["adapter"], record["metrics"]
    print(
        f"\nadapter   {adapter['file']} ({adapter['bytes'] / 1e6:.1f} MB)\n"
        f"time      {record['seconds']:.0f} s, of them {metrics['seconds']:.0f} s training {metrics['steps']} steps\n"
        f"speed     {metrics['samples_per_second']:.1f} samples/s, {metrics['tokens_per_second']:.0f} tokens/s\n"
        f"loss      {metrics['final_loss']} (validation {metrics['final_eval_loss']})\n"
        f"next      {next_command(path, small)}"
    )


def next_command(path: Path, small: bool) -> str:
    if small:
        return f"make train RECIPE={path.stem} on a GPU, or make demo"
    recipe = path.stem if path.resolve().parent == recipe_names.RECIPES else path
    return f"make eval RECIPE={recipe} BASE=1, or make merge RECIPE={recipe}"
