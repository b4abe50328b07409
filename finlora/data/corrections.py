"""Labels of the published files that are wrong for certain, and the right ones: data/corrections.yaml.

Callers that have the file ask `applies` once, so that a file that is not the published one is left alone, and then
`corrected_target` for each row. The files on disk keep their published labels.
"""

import re
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import BeforeValidator, field_validator, model_validator

from finlora.core.files import git_blob_sha1
from finlora.core.paths import ROOT
from finlora.core.tables import Record, expecting, read_entry, read_table

TABLE = ROOT / "data" / "corrections.yaml"


class Row(Protocol):
    """What is read of a row (finlora.data.rows.Row has it)."""

    line: int
    context: str
    target: str


def _compiled(expression: Any) -> re.Pattern:
    try:
        return re.compile(expression)
    except (re.error, TypeError) as error:
        raise ValueError(f"{expression!r} is not a regular expression ({error})") from error


Expression = Annotated[re.Pattern, BeforeValidator(_compiled)]
Counts = Annotated[dict[str, int], expecting("a mapping of labels to counts")]


class Rows(Record):
    """Which rows of a file are corrected; the comment at the top of data/corrections.yaml explains each key."""

    context: Expression
    without: Expression
    not_copied: Annotated[int, expecting("a number of copies")]
    source_counts: Counts


class Answer(Record):
    """A wrong answer, the right one, and the calculation that gives it, in Python."""

    published: str
    corrected: str
    derivation: str


class Correction(Record):
    """What is wrong with one file: labels that are exchanged (in all rows where `rows` is None), or answers by line."""

    git_blob_sha1: str
    labels: dict[str, str] = {}
    answers: dict[int, Answer] = {}
    evidence: str
    rows: Rows | None = None

    @field_validator("labels", mode="before")
    @classmethod
    def _exchange(cls, labels: Any) -> Any:
        if not isinstance(labels, dict) or set(labels) != set(labels.values()):
            raise ValueError("must exchange labels for each other (the same ones on both sides)")
        return labels

    @model_validator(mode="after")
    def _one_kind(self) -> "Correction":
        if bool(self.labels) == bool(self.answers):
            raise ValueError("one of the keys 'labels' and 'answers' is missing, or both are there; keep one")
        return self


@cache
def load_corrections(path: Path = TABLE) -> dict[str, Correction]:
    """The corrections by file. Raises UserError that names file and key for an unknown, missing or wrong key."""
    return {file: read_entry(path, file, entry, Correction) for file, entry in read_table(path, "corrections").items()}


def applies(file: str, path: Path) -> bool:
    """Whether `file` (its path under data/raw) has corrections and `path`, where it lies, holds its published bytes."""
    entry = load_corrections().get(file)
    return entry is not None and git_blob_sha1(path) == entry.git_blob_sha1


def standing(file: str, row: Row) -> str:
    """What the corrections say of a row: "certain", "unsure" (may have the defect, stays as published) or "other"."""
    entry = load_corrections().get(file)
    if entry is None:
        return "other"
    if entry.answers:
        return "certain" if row.line in entry.answers else "other"
    rows = entry.rows
    if rows is None:
        return "certain"
    if not rows.context.match(row.context):
        return "other"
    return "unsure" if rows.without.search(row.context) else "certain"


def corrected_target(file: str, row: Row) -> str:
    """The row's corrected label, which is its published one wherever the table has nothing certain to say."""
    if standing(file, row) != "certain":
        return row.target
    entry = load_corrections()[file]
    return entry.answers[row.line].corrected if entry.answers else entry.labels.get(row.target, row.target)
