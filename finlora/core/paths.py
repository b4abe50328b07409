"""The repository's root, and paths and names as they are shown to people."""

import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RAW = ROOT / "data" / "raw"  # FinLoRA's files as fetched
PREPARED = ROOT / "data" / "prepared"  # a folder of train.jsonl and validation.jsonl for each task
SAMPLE = ROOT / "data" / "sample"  # a few rows of each task, committed: what demo and tests run on


def slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", Path(name).name).strip("-.") or "model"


def shown(path: str) -> str:
    return os.path.relpath(path, ROOT) if Path(path).is_absolute() and Path(path).is_relative_to(ROOT) else path


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())
