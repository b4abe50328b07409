"""Distributed runs: what a recipe becomes on GPUs and nodes, what cannot work there, and how torchrun is called."""

import importlib.util
import itertools
import json
import math
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finlora.core.errors import UserError
from finlora.core.paths import ROOT
from finlora.recipes.recipe import Recipe

MIN_PACK = 128  # tokens: shorter packs would hold no row of any task, and leave a GPU idle


@dataclass(frozen=True)
class Launch:
    """How a run is spread over processes, by the command's options.

    gpus: processes on this node. nodes, rank, master: how many nodes there are, which of them this is, and HOST:PORT
    of the first. zero: DeepSpeed's ZeRO stage. fsdp: 2 for torch's FSDP2. offload: optimizer (and in stage 3 and FSDP2
    weights) in the CPU's memory. ray: gpus x nodes workers of a Ray cluster. cpu: without a GPU, however long it takes.
    """

    gpus: int = 1
    nodes: int = 1
    rank: int = 0
    master: str | None = None
    zero: int | None = None
    offload: bool = False
    fsdp: int | None = None
    ray: bool = False
    cpu: bool = False

    @property
    def processes(self) -> int:
        return self.gpus * self.nodes

    @property
    def gpus_needed(self) -> int:
        """GPUs that this node must have whatever the model's size: distributed runs, and DeepSpeed, need one each."""
        return self.gpus if self.processes > 1 or self.zero else 0


ONE_PROCESS = Launch()


@dataclass(frozen=True)
class Distributed:
    """A recipe as some processes run it."""

    recipe: Recipe
    batch_kept: str | None  # how the recipe's batch is kept; None for one process
    zero: int | None  # DeepSpeed's stage
    launcher: list[str]  # axolotl's options that choose it
    torchrun: list[str]  # what follows `--`


def distribute(recipe: Recipe, launch: Launch) -> Distributed:
    """UserError where the recipe cannot be trained so, or options contradict each other."""
    keys, batch_kept = share_batch(recipe.path, recipe.keys, launch.gpus, launch.nodes)
    keys = shard(recipe.path, keys, launch.zero, launch.offload, launch.fsdp, launch.processes)
    keys = epochs_to_steps(keys) if launch.ray else keys
    return Distributed(replace(recipe, keys=keys), batch_kept, stage(recipe.path, keys), *launcher(launch))


def share_batch(path: Path, recipe: dict[str, Any], gpus: int, nodes: int) -> tuple[dict[str, Any], str | None]:
    """The recipe for gpus x nodes processes with its global batch kept, and a line that says how (None for one).

    The batch is micro_batch_size x gradient_accumulation_steps rows, or packs of sequence_len tokens. Fewer
    accumulation steps keep it where they divide; otherwise packs become shorter, so that the tokens of a step stay
    the same (rounding cuts less than a token for each pack). UserError where neither can keep it.
    """
    processes = gpus * nodes
    if processes == 1:
        return recipe, None
    micro, length, packed = recipe["micro_batch_size"], recipe["sequence_len"], recipe.get("sample_packing")
    batch = micro * recipe["gradient_accumulation_steps"]
    trains = f"GPUS={gpus}{f' NODES={nodes}' if nodes > 1 else ''}: {path.stem} trains"
    on_one, longer = f"{batch}", ""
    if batch % processes == 0:
        each = batch // processes
        micro = math.gcd(micro, each)
    elif packed:
        on_one, longer = (
            f"{batch} of {length:,}",
            "; a row that is longer needs fewer GPUs" + _faster(recipe, processes),
        )
        micro, each, tokens = 1, -(-batch // processes), batch * length
        length = tokens // (each * processes)
        if length < MIN_PACK:
            raise UserError(f"{trains} {tokens:,} tokens a step, too few for {processes} processes; use fewer")
    else:
        fitting = ", ".join(str(number) for number in range(1, batch + 1) if batch % number == 0)
        raise UserError(
            f"{trains} {batch} rows a step, which {processes} processes cannot share; use {fitting}, or set "
            "sample_packing: true"
        )
    changed = {"micro_batch_size": micro, "gradient_accumulation_steps": each // micro, "sequence_len": length}
    unit = f"packs of {length:,} tokens" if packed else "rows"
    message = (
        f"global batch kept: {processes} processes x {each} {unit} a step, as the recipe's {on_one} on one{longer}"
    )
    return recipe | changed, message


def whole_packs(recipe: dict[str, Any], processes: int) -> int | None:
    """The fewest accumulation steps, not below the recipe's, with which no pack is shortened; None where none is."""
    micro, steps = recipe["micro_batch_size"], recipe["gradient_accumulation_steps"]
    if not recipe.get("sample_packing") or micro * steps % processes == 0:
        return None
    return next(more for more in itertools.count(steps) if micro * more % processes == 0)


def _faster(recipe: dict[str, Any], processes: int) -> str:
    """What else `make train` proposes where packs are shortened, which uses GPUs less well."""
    more, length = whole_packs(recipe, processes), recipe["sequence_len"]
    times = f"{more / recipe['gradient_accumulation_steps']:g}"
    return (
        f"\nfaster, but another training: gradient_accumulation_steps: {more} in the recipe, packs of {length:,} "
        f"tokens on each, {times} times the batch and as many times fewer steps; `make plan` has the time of both"
    )


def shard(
    path: Path, recipe: dict[str, Any], zero: int | None, offload: bool, fsdp: int | None = None, processes: int = 2
) -> dict[str, Any]:
    """The recipe with DeepSpeed's ZeRO stage or FSDP2, `offload` to the CPU's memory. UserError for what cannot work.

    Stage 3 releases frozen weights after each forward, which checkpointing that is not re-entrant cannot recompute
    (fastdora/plugin/zero3.py), so it becomes re-entrant: the same gradients, another order of freeing.
    """
    if not (zero or fsdp):
        if offload:
            raise UserError("OFFLOAD=1 needs ZERO=2, ZERO=3 or FSDP=2: nothing else moves to the CPU's memory")
        return recipe
    if zero and fsdp:
        raise UserError(f"ZERO={zero} FSDP={fsdp}: a run is sharded by one of them; leave one out")
    if key := next((key for key in ("deepspeed", "fsdp_config", "fsdp") if recipe.get(key)), None):
        asked = f"ZERO={zero}" if zero else f"FSDP={fsdp}"
        raise UserError(f"{path}: key '{key}' already chooses how to shard; remove it or leave {asked} out")
    if fsdp:
        if processes == 1:
            raise UserError("FSDP=2 shares a model among several GPUs; set GPUS=2 or more, or leave FSDP out")
        return recipe | {"fsdp_version": fsdp, "fsdp_config": fsdp2_keys(recipe, offload)}
    if offload and zero == 1:
        raise UserError("OFFLOAD=1 needs ZERO=2 or ZERO=3: ZERO=1 has no configuration with offload here")
    changed: dict[str, Any] = {"deepspeed": f"recipes/deepspeed/zero{zero}{'_offload' if offload else ''}.json"}
    if zero == 3 and recipe.get("gradient_checkpointing"):
        kwargs = recipe.get("gradient_checkpointing_kwargs") or {}
        changed["gradient_checkpointing_kwargs"] = kwargs | {"use_reentrant": True}
    return recipe | changed


def fsdp2_keys(recipe: dict[str, Any], offload: bool) -> dict[str, Any]:
    """Axolotl's `fsdp_config:` for a recipe; fastdora/plugin/fsdp2.py says what others would do."""
    return {
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",  # the model names its decoder layers
        "state_dict_type": "SHARDED_STATE_DICT",
        "reshard_after_forward": True,
        "cpu_ram_efficient_loading": not (recipe.get("load_in_8bit") or recipe.get("load_in_4bit")),
        "offload_params": offload,
    }


def epochs_to_steps(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe with checkpoints and validations as a fraction of the run instead of so many an epoch, for Ray.

    Axolotl (0.19.0) computes the fraction from the number, and then refuses a recipe with both when it validates it
    again on each of Ray's workers.
    """
    changed = dict(recipe)
    for per_epoch, fraction in (("saves_per_epoch", "save_steps"), ("evals_per_epoch", "eval_steps")):
        if number := changed.pop(per_epoch, None):
            changed[fraction] = 1.0 / (number * recipe["num_epochs"])
    return changed


def launcher(launch: Launch) -> tuple[list[str], list[str]]:
    """Axolotl's options that choose a launcher, and what follows `--`: torchrun's own. UserError names the variable.

    Ray: axolotl's trainer on the cluster of RAY_ADDRESS, or on this machine without one.
    """
    if launch.ray:
        if launch.rank or launch.master:
            raise UserError("RAY=1 finds its nodes itself; leave NODE_RANK and MASTER out")
        if not importlib.util.find_spec("ray"):
            raise UserError(f"RAY=1 needs Ray, which is not pinned here: {sys.executable} -m pip install 'ray[train]'")
        return ["--use-ray", "--ray-num-workers", str(launch.processes)], []
    if launch.processes == 1:
        return ["--launcher", "python"], []
    if launch.nodes == 1:
        place = ["--standalone"]
    else:
        if not 0 <= launch.rank < launch.nodes:
            ranks = f"0 to {launch.nodes - 1}, another on each node"
            raise UserError(f"NODE_RANK={launch.rank}: with NODES={launch.nodes} it is {ranks}")
        address = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[\w.-]+)(?::(\d+))?", launch.master or "")
        port = int(address and address[2] or 29500)
        if not address or not 0 < port < 65536:
            needs = f"NODES={launch.nodes} needs the first node's HOST:PORT, as in node0:29500"
            raise UserError(f"MASTER={launch.master or ''}: {needs}")
        # An hour's timeout: the first node tokenizes before it starts.
        place = [f"--nnodes={launch.nodes}", f"--node_rank={launch.rank}", f"--master_addr={address[1]}"]
        place += [f"--master_port={port}", "--rdzv_conf=timeout=3600"]
    return ["--launcher", "torchrun"], ["--", *place, f"--nproc_per_node={launch.gpus}"]


def weight_share(path: Path, recipe: dict[str, Any], processes: int) -> float:
    """Of the base's weights, what each of so many processes keeps on its GPU. UserError as `stage`."""
    fsdp, zero = recipe.get("fsdp_config"), zero_section(path, recipe) or {}
    if not fsdp and zero.get("stage") != 3:
        return 1.0
    offloaded = fsdp.get("offload_params") if fsdp else zero.get("offload_param")
    return 0.0 if offloaded else 1 / processes


def stage(path: Path, recipe: dict[str, Any]) -> int | None:
    """The ZeRO stage of a recipe's `deepspeed:`, or None without one."""
    section = zero_section(path, recipe)
    return None if section is None else section.get("stage", 0)


def zero_section(path: Path, recipe: dict[str, Any]) -> dict[str, Any] | None:
    """`zero_optimization` of a recipe's `deepspeed:`, or None without one."""
    config = recipe.get("deepspeed")
    if isinstance(config, str):
        try:
            config = dict(json.loads((ROOT / config).read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: key 'deepspeed': {recipe['deepspeed']} is no JSON object; fix it") from error
    return config.get("zero_optimization", {}) if config else None
