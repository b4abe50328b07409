"""Checkpoints with a seal: written when a checkpoint is complete, checked before a run resumes from it.

transformers writes a checkpoint file by file. A run that is killed meanwhile leaves one that fails to load, or loads
without its optimizer and without an error. Here the last file is `seal.json`: sizes and SHA-256 of all others, and the
run's recipe and data. Needs neither torch nor axolotl.
"""

import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastdora.plugin.checksums import changed_files, sha256

SEAL, PREFIX = "seal.json", "checkpoint-"
# Keys that may change between a run and its resumption: paths and devices, logging, how often it saves; and what
# axolotl (0.19.0) estimates anew at each start, from an order of rows that no seed has drawn (sample_packing_eff_est).
MAY_CHANGE = re.compile(
    r"axolotl_config_path|output_dir|dataset_prepared_path|dataset_num_proc|dataset_processes|capabilities|"
    r"env_capabilities|device|device_map|local_rank|resume_from_checkpoint|auto_resume_from_checkpoints|logging_.*|"
    r"include_tkps|include_tokens_per_second|sample_packing_eff_est|saves?_.*|dataloader_.*|ddp_timeout|"
    r"use_(tensorboard|wandb|mlflow|comet|trackio)|wandb_.*|(hf_)?mlflow_.*|comet_.*|trackio_.*|.*(token|api_key|password|secret)"
)
# Keys that follow from how many epochs a run has; and schedules whose checkpoints hold the number of steps they began
# with, so that they cannot become longer ones (axolotl 0.19.0: `RexLR` and torch's OneCycleLR).
BY_EPOCHS = ("num_epochs", "eval_steps")
FIXED_LENGTH = ("one_cycle", "rex")


class BrokenCheckpoint(Exception):
    """A checkpoint that is not complete or has changed; the text says how."""


def seal(folder: Path, run: dict[str, Any]) -> None:
    """Seal the complete checkpoint in `folder`. run: what must be equal for another run to resume from it."""
    content = {"files": {name: _digest(folder / name) for name in _names(folder)}, "run": run}
    beside = folder / f".{SEAL}"
    with beside.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, folder / SEAL)


def check(folder: Path) -> dict[str, Any]:
    """The run of a checkpoint whose files are those of its seal. Raises BrokenCheckpoint for any other."""
    try:
        content = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        sealed, run = content["files"], content["run"]
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in sealed.items()}
    except FileNotFoundError:
        reason = f"it has no {SEAL}: the run was ended while it was written" if folder.is_dir() else "no such folder"
        raise BrokenCheckpoint(reason) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise BrokenCheckpoint(f"{SEAL} cannot be read") from None
    for name, (size, digest) in files.items():
        file = folder / name
        if not file.is_file():
            raise BrokenCheckpoint(f"{name} is missing")
        if file.stat().st_size != size:
            raise BrokenCheckpoint(f"{name} has {file.stat().st_size} of {size} bytes")
        if _digest(file)["sha256"] != digest:
            raise BrokenCheckpoint(f"{name} has changed")
    return run


def numbered(out: Path) -> list[Path]:
    """The checkpoints of an output folder, the newest first."""
    folders = [path for path in out.glob(f"{PREFIX}*") if re.fullmatch(rf"{PREFIX}\d+", path.name) and path.is_dir()]
    return sorted(folders, key=lambda path: int(path.name.split("-")[1]), reverse=True)


def last_whole(out: Path) -> tuple[Path | None, dict[str, Any], list[str]]:
    """The newest complete checkpoint (None without one), its run, and a line for each newer one that was set aside.

    A broken one is renamed to `broken-checkpoint-<step>`, which axolotl and transformers' rotation ignore.
    """
    lines = []
    for folder in numbered(out):
        try:
            return folder, check(folder), lines
        except BrokenCheckpoint as error:
            aside = next(path for path in _asides(folder) if not path.exists())
            folder.rename(aside)
            lines.append(f"{folder} is broken ({error}); set aside as {aside.name}")
    return None, {}, lines


def not_resumable(folder: Path, error: BrokenCheckpoint) -> str:
    """What to say of a checkpoint that `resume_from_checkpoint` names."""
    return (
        f"key 'resume_from_checkpoint': {folder} cannot be resumed from ({error}); name a complete checkpoint, or set "
        "lora_model_dir to start from an adapter"
    )


def for_more_epochs(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The keys of a run as they would be with the epochs of another one's, where those are more; else as they are."""
    if (now.get("num_epochs") or 0) <= (before.get("num_epochs") or math.inf):
        return before
    return before | {key: now.get(key) for key in BY_EPOCHS}


def has_optimizer(folder: Path) -> bool:
    """Whether a checkpoint holds the optimizer's state: `save_only_model` leaves it out, and a run would begin anew."""
    return any(folder.glob("optimizer*")) or any(folder.glob("global_step*"))  # the second: DeepSpeed's


def plain(value: Any) -> Any:
    """The value as JSON reads it back, so that it can be compared with a seal's."""
    return json.loads(json.dumps(value, default=str, sort_keys=True))


def _asides(folder: Path) -> Iterator[Path]:
    yield folder.with_name(f"broken-{folder.name}")
    number = 2
    while True:
        yield folder.with_name(f"broken-{folder.name}.{number}")
        number += 1


def _names(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(folder)) for path in files if path.name not in (SEAL, f".{SEAL}"))


def _digest(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """How two runs differ: up to three recipe keys, else the files; None where they do not.

    Files that a run starts from are compared where both have them: seals of before 2026-11 name none.
    """
    old, new = before.get("recipe", {}), now.get("recipe", {})
    keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    keys = [key for key in keys if not MAY_CHANGE.fullmatch(key)]  # a seal of before may have more of them
    if keys:
        return ", ".join(f"key '{key}' was {old.get(key)} and is {new.get(key)}" for key in keys[:3])
    files = [name for name, digest in now.get("data", {}).items() if before.get("data", {}).get(name) != digest]
    files += changed_files(before.get("start", {}), now.get("start", {}))
    return f"{', '.join(files)} changed" if files else None
