"""Labels of the published files that are wrong for certain, and the right ones: data/corrections.yaml.

Callers that have the file ask `applies` once, so that a file that is not the published one is left alone, and then
`corrected_target` for each row. The files on disk keep their published labels.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import yaml

from finlora.core.errors import UserError
from finlora.core.paths import ROOT
from finlora.data.fetch import is_right

TABLE = ROOT / "data" / "corrections.yaml"
KEYS = {"git_blob_sha1", "labels", "evidence"}
ROW_KEYS = {"context", "without", "not_copied", "source_counts"}


class Row(Protocol):
    """What is read of a row (finlora.data.rows.Row has it)."""

    context: str
    target: str


@cache
def load_corrections(path: Path = TABLE) -> dict[str, dict[str, Any]]:
    """The table by file, with compiled expressions; `rows` is None where a correction holds for the whole file.

    Raises UserError that names the file and the key for an unknown, missing or wrong key.
    """
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())}); restore it from git") from error
    if not isinstance(table, dict):
        raise UserError(f"{path}: holds no corrections; restore it from git")
    for file, entry in table.items():
        _check_keys(f"{path}: {file}", entry, KEYS, {"rows"})
        entry.setdefault("rows", None)
        labels = entry["labels"]
        if not isinstance(labels, dict) or set(labels) != set(labels.values()):
            raise UserError(f"{path}: {file}: labels must exchange labels for each other (the same ones on both sides)")
        if entry["rows"] is not None:
            _check_keys(f"{path}: {file}: rows", entry["rows"], ROW_KEYS, set())
            for key in ("context", "without"):
                try:
                    entry["rows"][key] = re.compile(entry["rows"][key])
                except (re.error, TypeError) as error:
                    raise UserError(f"{path}: {file}: rows.{key} is not a regular expression ({error})") from error
    return table


def applies(file: str, path: Path) -> bool:
    """Whether `file` (its path under data/raw) has corrections and `path`, where it lies, holds its published bytes."""
    entry = load_corrections().get(file)
    return entry is not None and is_right(path, {"git_blob_sha1": entry["git_blob_sha1"]})


def standing(file: str, row: Row) -> str:
    """What the corrections say of a row: "certain", "unsure" (may have the defect, stays as published) or "other"."""
    entry = load_corrections().get(file)
    if entry is None:
        return "other"
    rows = entry["rows"]
    if rows is None:
        return "certain"
    if not rows["context"].match(row.context):
        return "other"
    return "unsure" if rows["without"].search(row.context) else "certain"


def corrected_target(file: str, row: Row) -> str:
    """The row's corrected label, which is its published one wherever the table has nothing certain to say."""
    if standing(file, row) != "certain":
        return row.target
    return load_corrections()[file]["labels"].get(row.target, row.target)


def _check_keys(where: str, entry: Any, needed: set[str], optional: set[str]) -> None:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: must hold keys ({', '.join(sorted(needed))})")
    for key in sorted(entry.keys() - needed - optional):
        raise UserError(f"{where}: unknown key {key}; known are {', '.join(sorted(needed | optional))}")
    for key in sorted(needed - entry.keys()):
        raise UserError(f"{where}: {key} is missing")
