"""Distributed runs: what a recipe becomes on GPUs and nodes, what cannot work there, and how torchrun is called."""

import importlib.util
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finlora.core.errors import UserError
from finlora.core.paths import ROOT
from finlora.recipes.recipe import Recipe

DEEPSPEED = ROOT / "recipes" / "deepspeed"
STAGES = (1, 2, 3)
MIN_PACK = 128  # tokens: shorter packs would hold no row of any task, and leave a GPU idle


@dataclass(frozen=True)
class Launch:
    """How a run is spread over processes, by the command's options.

    gpus: processes on this node. nodes, rank, master: how many nodes there are, which of them this is, and HOST:PORT
    of the first. zero: DeepSpeed's ZeRO stage. fsdp: 2 for torch's FSDP2. offload: optimizer (and in stage 3 and FSDP2
    weights) in the CPU's memory. ray: gpus x nodes workers of a Ray cluster.
    """

    gpus: int = 1
    nodes: int = 1
    rank: int = 0
    master: str | None = None
    zero: int | None = None
    offload: bool = False
    fsdp: int | None = None
    ray: bool = False

    @property
    def processes(self) -> int:
        return self.gpus * self.nodes

    @property
    def gpus_needed(self) -> int:
        """GPUs that this node must have whatever the model's size: distributed runs, and DeepSpeed, need one each."""
        return self.gpus if self.processes > 1 or self.zero else 0


def distribute(recipe: Recipe, launch: Launch) -> tuple[Recipe, str | None]:
    """The recipe as these processes run it, and a line that says how its batch is kept (None for one process)."""
    keys, message = share_batch(recipe.path, recipe.keys, launch.gpus, launch.nodes)
    keys = shard(recipe.path, keys, launch.zero, launch.offload, launch.fsdp, launch.processes)
    return Recipe(recipe.path, epochs_to_steps(keys) if launch.ray else keys), message


def share_batch(path: Path, recipe: dict[str, Any], gpus: int, nodes: int) -> tuple[dict[str, Any], str | None]:
    """The recipe for gpus x nodes processes with its global batch kept, and a line that says how (None for one).

    The batch is micro_batch_size x gradient_accumulation_steps rows, or packs of sequence_len tokens. Fewer
    accumulation steps keep it where they divide; otherwise packs become shorter, so that the tokens of a step stay
    the same (rounding cuts less than a token for each pack). UserError where neither can keep it.
    """
    processes = gpus * nodes
    if processes == 1:
        return recipe, None
    micro, length = recipe["micro_batch_size"], recipe["sequence_len"]
    batch = micro * recipe["gradient_accumulation_steps"]
    if batch % processes == 0:
        each = batch // processes
        micro = math.gcd(micro, each)
    elif recipe.get("sample_packing"):
        micro, each = 1, -(-batch // processes)
        step_tokens = batch * length
        length = step_tokens // (each * processes)
        if length < MIN_PACK:
            raise UserError(
                f"GPUS={gpus}{f' NODES={nodes}' if nodes > 1 else ''}: {path.stem} trains {step_tokens:,} tokens a "
                f"step, too few for {processes} processes; use fewer"
            )
    else:
        fitting = [number for number in range(1, batch + 1) if batch % number == 0]
        raise UserError(
            f"GPUS={gpus}{f' NODES={nodes}' if nodes > 1 else ''}: {path.stem} trains {batch} rows a step, which "
            f"{processes} processes cannot share; use {', '.join(map(str, fitting))}, or set sample_packing: true"
        )
    changed = {"micro_batch_size": micro, "gradient_accumulation_steps": each // micro, "sequence_len": length}
    unit = f"packs of {length:,} tokens" if recipe.get("sample_packing") else "rows"
    before = f"{batch} of {recipe['sequence_len']:,}" if length != recipe["sequence_len"] else f"{batch}"
    message = f"global batch kept: {processes} processes x {each} {unit} a step, as the recipe's {before} on one"
    return recipe | changed, message


def shorter_packs_hint(written: Recipe, shared: Recipe) -> str:
    """What to add to axolotl's refusal of a row: packs may have been made shorter to share the batch."""
    length = shared.keys["sequence_len"]
    if length == written.keys["sequence_len"]:
        return ""
    return f"; if a row is longer than the {length:,} tokens of these packs, use fewer GPUs"


def shard(
    path: Path, recipe: dict[str, Any], zero: int | None, offload: bool, fsdp: int | None = None, processes: int = 2
) -> dict[str, Any]:
    """The recipe with DeepSpeed's ZeRO stage or FSDP2, `offload` to the CPU's memory. UserError for what cannot work.

    Stage 3 releases frozen weights after each forward, which checkpointing that is not re-entrant cannot recompute
    (fastdora/plugin/zero3.py), so it becomes re-entrant: the same gradients, another order of freeing.
    """
    if zero is None and fsdp is None:
        if offload:
            raise UserError("OFFLOAD=1 needs ZERO=2, ZERO=3 or FSDP=2: nothing else moves to the CPU's memory")
        return recipe
    if zero is not None and fsdp is not None:
        raise UserError(f"ZERO={zero} FSDP={fsdp}: a run is sharded by one of them; leave one out")
    if zero is not None and zero not in STAGES:
        raise UserError(f"ZERO={zero}: DeepSpeed's stages are 1, 2 and 3; use one of them")
    if fsdp is not None and fsdp != 2:
        raise UserError(f"FSDP={fsdp}: only FSDP2 is offered; use FSDP=2")
    asked = f"ZERO={zero}" if zero is not None else f"FSDP={fsdp}"
    if key := next((key for key in ("deepspeed", "fsdp_config", "fsdp") if recipe.get(key)), None):
        raise UserError(f"{path}: key '{key}' already chooses how to shard; remove it or leave {asked} out")
    if fsdp is not None:
        if processes == 1:
            raise UserError("FSDP=2 shares a model among several GPUs; set GPUS=2 or more, or leave FSDP out")
        return recipe | {"fsdp_version": fsdp, "fsdp_config": fsdp2_keys(recipe, offload)}
    if offload and zero == 1:
        raise UserError("OFFLOAD=1 needs ZERO=2 or ZERO=3: ZERO=1 has no configuration with offload here")
    name = f"zero{zero}{'_offload' if offload else ''}.json"
    changed: dict[str, Any] = {"deepspeed": str((DEEPSPEED / name).relative_to(ROOT))}
    if zero == 3 and recipe.get("gradient_checkpointing"):
        changed["gradient_checkpointing_kwargs"] = (recipe.get("gradient_checkpointing_kwargs") or {}) | {
            "use_reentrant": True
        }
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
    gpus, nodes, rank, master = launch.gpus, launch.nodes, launch.rank, launch.master
    if launch.ray:
        if rank or master:
            raise UserError("RAY=1 finds its nodes itself; leave NODE_RANK and MASTER out")
        if not importlib.util.find_spec("ray"):
            raise UserError(f"RAY=1 needs Ray, which is not pinned here: {sys.executable} -m pip install 'ray[train]'")
        return ["--use-ray", "--ray-num-workers", str(launch.processes)], []
    if launch.processes == 1:
        return ["--launcher", "python"], []
    options = [f"--nproc_per_node={gpus}"]
    if nodes == 1:
        return ["--launcher", "torchrun"], ["--", "--standalone", *options]
    if not 0 <= rank < nodes:
        raise UserError(f"NODE_RANK={rank}: with NODES={nodes} it is 0 to {nodes - 1}, another on each node")
    host, port = split_master(master, nodes)
    return ["--launcher", "torchrun"], [
        "--",
        f"--nnodes={nodes}",
        f"--node_rank={rank}",
        f"--master_addr={host}",
        f"--master_port={port}",
        "--rdzv_conf=timeout=3600",  # seconds; the first node tokenizes before it starts
        *options,
    ]


def split_master(master: str | None, nodes: int) -> tuple[str, int]:
    match = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[\w.-]+)(?::(\d+))?", master or "")
    if not match or not 0 < int(match[2] or 29500) < 65536:
        raise UserError(f"MASTER={master or ''}: NODES={nodes} needs the first node's HOST:PORT, as in node0:29500")
    return match[1], int(match[2] or 29500)


def stage(recipe: dict[str, Any]) -> int | None:
    """The ZeRO stage of a recipe's `deepspeed:`, or None without one."""
    config = recipe.get("deepspeed")
    if not config:
        return None
    if not isinstance(config, dict):
        config = json.loads((ROOT / config).read_text(encoding="utf-8"))
    return config.get("zero_optimization", {}).get("stage", 0)
