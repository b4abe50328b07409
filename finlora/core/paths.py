"""The repository's root, and paths and names as they are shown to people."""

import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RAW = ROOT / "data" / "raw"  # FinLoRA's files as fetched
PREPARED = ROOT / "data" / "prepared"  # a folder of train.jsonl and validation.jsonl for each task
SAMPLE = ROOT / "data" / "sample"  # a few rows of each task, committed: what demo and tests run on


# A path of one machine in a text: absolute with two parts or more, below ~, a file's address, or on a Windows drive.
# What follows // is an address on the web.
_BEFORE, _PART = r"""(?<![^\s"'`=:,;(\[{|>])""", r"""[^\s"'`<>|,;:()\[\]{}/\\]+"""
MACHINE_PATH = re.compile(rf"{_BEFORE}(?:file://)?(?:~|/{_PART})(?:/{_PART})+/?|{_BEFORE}[A-Za-z]:(?:\\+{_PART})+")


def is_machine_path(value: str) -> bool:
    """Whether a whole value is a path of one machine; it may have spaces."""
    return (os.path.isabs(value) and len(Path(value).parts) > 2) or value.startswith(("~/", "./", "../"))


def public_name(model: str) -> str:
    """A hub id as it is; the last part of a folder's path."""
    return Path(model).resolve().name if is_machine_path(model) or (ROOT / model).is_dir() else model


def slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", Path(name).name).strip("-.") or "model"


def shown(path: str | Path) -> str:
    """A path from the repository's root where it is inside; a name of the Hub as it is."""
    return os.path.relpath(path, ROOT) if Path(path).is_absolute() and Path(path).is_relative_to(ROOT) else str(path)


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())
