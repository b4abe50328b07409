"""Prepare a task's train file for axolotl: chat messages, split into train.jsonl and validation.jsonl.

    finlora prepare sentiment
    finlora prepare cfa --file questions.csv --columns question=context,answer=target

The same sources and options give the same bytes. Exact duplicates stay in: FinLoRA repeats rows to balance data sets
(each FiQA row stands 21 times in the sentiment file), so leaving them out would change what is trained. All copies
and near-duplicates of a row are on the same side of the split. prepared.json records what went in and came out, and is
written last: without it, or where a checksum differs, nothing counts as prepared.
"""

import json
import os
import random
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import ValidationError
from tqdm import tqdm

from finlora.core.errors import UserError, typed
from finlora.core.files import read_json, replacing, sha256, write_json
from finlora.core.paths import PREPARED, RAW
from finlora.core.tables import Record
from finlora.data.corrections import TABLE as CORRECTIONS
from finlora.data.corrections import applies, corrected_target, standing
from finlora.data.layouts import Reading
from finlora.data.neardup import duplicate_groups, near_duplicate_groups
from finlora.data.readers import check_regular_file
from finlora.data.rows import LeftOut, Row, preview, read_rows
from finlora.data.tasks import Mixture, Task, load_tasks
from finlora.data.tasks import task as find_task

FORMAT = 2  # of the prepared files; raise it whenever the same sources would give other bytes
SMALLEST_TO_SPLIT = 10  # rows; a validation loss over less than one row in ten says nothing
LINES_SHOWN = 10

_encode = json.JSONEncoder().encode  # escapes all but ASCII, so that no reader takes U+2028 for the end of a line


class Options(Record):
    """How a task is prepared.

    file: one's own rows in place of FinLoRA's; columns: what its keys or columns are (layouts.LAYOUTS), as
    context_column and target_column say it of a question and its answer. Its answers must be among the task's labels
    unless any_label. validation: the share of rows held out, 0 for none; fewer than 10 rows are all trained on. labels:
    "corrected" (data/corrections.yaml) or "published", for FinLoRA's files. mixture: how many rows each task gives
    where a mixture is built from its tasks: "balanced", as many as the largest has, or "finlora", as FinLoRA's script
    does (`published_rows` in data/tasks.yaml).
    """

    file: str | None = None
    context_column: str = "context"
    target_column: str = "target"
    columns: dict[str, str] = {}
    any_label: bool = False
    seed: int = 42
    validation: float = 0.02
    labels: Literal["corrected", "published"] = "corrected"
    mixture: Literal["balanced", "finlora"] = "balanced"

    @property
    def mapping(self) -> dict[str, str]:
        """The names of layouts.LAYOUTS by the file's own."""
        if self.context_column == self.target_column:
            raise UserError(f"{self.file}: the context and the target cannot both be {self.context_column!r}")
        named = {self.context_column: "context", self.target_column: "target"}
        return {name: meant for name, meant in named.items() if name != meant} | self.columns


class LeftOutRows(Record):
    """How many rows are left out for one reason, and the first lines."""

    rows: int
    first_lines: list[int]


class Source(Record):
    """A file that rows come from. corrected: rows whose label was exchanged; unsure: rows that may have the defect that
    corrections.yaml describes, kept as published; unused: columns that are not read."""

    path: str
    sha256: str
    rows: int
    left_out: dict[str, LeftOutRows]
    kept: int
    corrected: int
    unsure: int
    layout: str = ""
    unused: list[str] = []
    notes: list[str] = []


class InTest(Record):
    """Own rows that a test set holds too: in the same words, and nearly (those included) with the first lines."""

    same_words: int
    near: int
    first_lines: list[int]


class Prepared(Record):
    """prepared.json: what went in and came out. outputs: the files' SHA-256 by name. absent_tests: the files of test
    sets that own rows were not compared with."""

    task: str
    format: int
    origin: str
    settings: Options
    corrections_sha256: str | None
    sources: list[Source]
    rows: dict[str, int]
    near_duplicate_groups: int
    outputs: dict[str, str]
    in_tests: dict[str, InTest] = {}
    absent_tests: list[str] = []


def prepare(task: str, raw: Path | None = None, out: Path | None = None, options: Options | None = None) -> Prepared:
    """Write `out`/train.jsonl, validation.jsonl and prepared.json for a task and return what prepared.json holds.

    raw: the folder of fetched files (default data/raw); out: default data/prepared/TASK. A mixture comes from its own
    file where that is in `raw` (and options.mixture is "balanced"), and is built from its tasks' files otherwise.
    Raises UserError for an unknown task, a missing or malformed source, or a split that cannot be made.
    """
    entry, options = find_task(task), options or Options()
    raw, out = Path(raw or RAW), Path(out or PREPARED / task)
    if not 0 <= options.validation <= 0.5:
        raise UserError(f"validation {options.validation}: give a share of the rows from 0 to 0.5")
    origin, paths = _sources(task, entry, raw, options)
    corrections = _sha256(CORRECTIONS) if options.labels == "corrected" and not options.file else None
    sources, rows = zip(*(_read(raw, path, entry, options) for path in paths), strict=True)
    groups = near_duplicate_groups(row.prompt for part in rows for row in part)
    held_out = _choose_groups(task, groups, options.validation, options.seed)
    in_tests = _in_tests(entry, raw, rows[0]) if options.file else {}
    smallest = options.mixture == "finlora" and entry.published_rows == "smallest"
    _remove_leftovers(out)
    counts = _write(out, sources, rows, [group in held_out for group in groups], options, smallest)
    read = sum(source.rows for source in sources)
    record = Prepared(
        task=task,
        format=FORMAT,
        origin=origin,
        settings=options,
        corrections_sha256=corrections,
        sources=list(sources),
        rows={"read": read, "left_out": read - len(groups)} | counts,
        near_duplicate_groups=len(set(groups)),
        outputs={name: _sha256(out / name) for name in ("train.jsonl", "validation.jsonl")[: 1 + bool(held_out)]},
        in_tests=in_tests,
        absent_tests=[test.file for test in entry.tests.values() if options.file and not (raw / test.file).exists()],
    )
    write_json(out / "prepared.json", record.model_dump())
    return record


def refresh(task: str, raw: Path | None = None, out: Path | None = None) -> Prepared:
    """Prepare a task again from what it was prepared from last, the user's own file and all options included.

    A task that was never prepared (or whose prepared.json cannot be read) is prepared from FinLoRA's file.
    """
    record = read_prepared(out or PREPARED / task)
    return prepare(task, raw, out, record.settings if record else None)


def read_prepared(folder: Path) -> Prepared | None:
    """What the prepared.json of a folder holds, also of an earlier format; None where it cannot be read."""
    try:
        return Prepared.model_validate(read_json(Path(folder) / "prepared.json"))
    except ValidationError:
        return None


def why_stale(
    task: str, raw: Path | None = None, out: Path | None = None, options: Options | None = None
) -> str | None:
    """Return why a task has to be prepared (again), in one line, or None where its files are current.

    Sources, corrections and outputs are compared by content. With `options` those must be equal.
    """
    entry = find_task(task)
    raw, out = Path(raw or RAW), Path(out or PREPARED / task)
    path, record = out / "prepared.json", read_prepared(out)
    if record is None:
        return f"{path}: {'cannot be read' if path.exists() else 'is not there'}"
    if record.format != FORMAT or record.task != task:
        return f"{path}: was made by another version, whose validation split may differ, or for another task"
    if options is not None and record.settings != options:
        return f"{path}: was made with other options"
    try:
        _, paths = _sources(task, entry, raw, record.settings)
        if paths != [source.path for source in record.sources]:
            return f"{path}: was made from other files"
        checks = [(raw / source.path, source.sha256) for source in record.sources]
        if record.corrections_sha256 is not None:
            checks.append((CORRECTIONS, record.corrections_sha256))
        checks += [(out / name, digest) for name, digest in record.outputs.items()]
        for checked, digest in checks:
            if _sha256(checked) != digest:
                return f"{checked}: has changed since {task} was prepared"
    except UserError as error:
        return str(error)
    return None


def _sources(task: str, entry: Task | Mixture, raw: Path, options: Options) -> tuple[str, list[str]]:
    """Where the rows come from, in words, and the files' paths under `raw` (absolute for an own file)."""
    if options.file is not None:
        return "own file", [options.file]
    files = {task: entry.train}
    origin = "published file"
    if entry.mixture_of and (options.mixture == "finlora" or not os.path.lexists(raw / entry.train)):
        files = {part: find_task(part).train for part in entry.mixture_of}
        origin = "single tasks"
    for part, path in files.items():
        if not os.path.lexists(raw / path):
            if not entry.released:
                raise UserError(f"{raw / path}: is not released; run `make data TASK={task} FILE=your_rows.jsonl`")
            # FinLoRA's own file of a mixture would do too, unless the mixture is to be built.
            name = part if options.mixture == "finlora" else task
            raise UserError(f"{raw / path}: is not there; run `make data TASK={name}`")
    return origin, list(files.values())


def _read(raw: Path, name: str, entry: Task | Mixture, options: Options) -> tuple[Source, list[Row]]:
    """The rows of a source that are kept, with corrected labels where those apply, and the source's record."""
    path, own = raw / name, options.file is not None
    allowed = entry.labels if own and not options.any_label else None
    columns, digest = options.mapping, _sha256(path)
    before = os.stat(path)
    left_out: list[LeftOut] = []
    reading = Reading()
    reader = read_rows(path, columns, None if own else left_out, reading, entry.labels or ())
    rows = list(tqdm(reader, desc=path.name, unit=" rows", disable=None, leave=False))
    if unknown := [row for row in rows if allowed and row.target not in allowed]:
        raise UserError(_unknown_labels(path, unknown, allowed))
    if not path.exists() or (path.stat().st_ino, path.stat().st_mtime_ns) != (before.st_ino, before.st_mtime_ns):
        raise UserError(f"{path}: changed while it was read; run this again when it is whole")
    corrected = unsure = 0
    if options.labels == "corrected" and not own and applies(name, path):
        unsure = sum(standing(name, row) == "unsure" for row in rows)
        published, rows = rows, [row._replace(target=corrected_target(name, row)) for row in rows]
        corrected = sum(one != other for one, other in zip(published, rows, strict=True))
    source = Source(
        path=name,
        sha256=digest,
        rows=len(rows) + len(left_out),
        left_out=_reasons(left_out),
        kept=len(rows),
        corrected=corrected,
        unsure=unsure,
        layout=reading.layout,
        unused=list(reading.unused),
        notes=reading.notes,
    )
    return source, rows


def _unknown_labels(path: Path, rows: list[Row], allowed: list[str]) -> str:
    """What to say of own rows whose answers are no labels: how many there are, and the first of them."""
    first = ", ".join(f"{row.target[:40]!r} in line {row.line}" for row in rows[:5])
    more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    count = f"the answers of {len(rows)} rows are" if len(rows) > 1 else "the answer of a row is"
    return (
        f"{path}:{rows[0].line}: {count} none of {', '.join(allowed)} ({first}{more}); correct them, or accept any "
        f"answer with {typed('--any-label')}"
    )


def _message_line(row: Row) -> bytes:
    return (_encode({"messages": [turn._asdict() for turn in row.turns]}) + "\n").encode()


def _reasons(left_out: list[LeftOut]) -> dict[str, LeftOutRows]:
    lines: dict[str, list[int]] = {}
    for line, reason in left_out:
        lines.setdefault(reason, []).append(line)
    return {reason: LeftOutRows(rows=len(each), first_lines=each[:LINES_SHOWN]) for reason, each in lines.items()}


def _in_tests(entry: Task | Mixture, raw: Path, rows: list[Row]) -> dict[str, InTest]:
    """Of each test set that is in `raw`, the own rows that it holds too."""
    tests = {
        name: [row.prompt for row in read_rows(raw / test.file, left_out=[], labels=test.labels or ())]
        for name, test in entry.tests.items()
        if (raw / test.file).exists()
    }
    same, near = duplicate_groups(chain((row.prompt for row in rows), *tests.values()))
    overlaps, start = {}, len(rows)
    for name, contexts in tests.items():
        test = slice(start, start + len(contexts))
        alike = np.flatnonzero(np.isin(near[: len(rows)], near[test])).tolist()
        if alike:
            equal = int(np.isin(same[: len(rows)], same[test]).sum())
            first = [rows[number].line for number in alike[:LINES_SHOWN]]
            overlaps[name] = InTest(same_words=equal, near=len(alike), first_lines=first)
        start = test.stop
    return overlaps


def _choose_groups(task: str, groups: list[int], share: float, seed: int) -> set[int]:
    """Choose whole near-duplicate groups, in a seeded order, that together hold at most this share of the rows."""
    sizes = Counter(groups)
    if not share or len(groups) < SMALLEST_TO_SPLIT:
        return set()
    order = list(sizes)
    random.Random(seed).shuffle(order)
    room = max(1, round(len(groups) * share))
    chosen = set()
    for group in order:
        if sizes[group] <= room:
            chosen.add(group)
            room -= sizes[group]
    if not chosen:
        # Every group is larger than the share: hold out the smallest if that leaves most rows to train on.
        smallest = min(order, key=sizes.__getitem__)
        if 2 * sizes[smallest] > len(groups):
            option = typed("--validation 0")
            raise UserError(f"{task}: all rows are near-duplicates of each other; add rows or prepare with {option}")
        chosen.add(smallest)
    return chosen


def _write(
    out: Path,
    sources: Sequence[Source],
    rows: Sequence[list[Row]],
    held_out: list[bool],
    options: Options,
    smallest: bool,
) -> dict[str, int]:
    """Write both files from the rows of each source and return the counts. held_out: of all rows, one after the other.

    Of several sources (a mixture) each gives as many train rows as the largest: smaller ones are repeated whole, and a
    seeded sample of their rows fills what is left over (with options.mixture "finlora" their first rows, as FinLoRA's
    script does). smallest: each gives as many as the smallest instead, a seeded sample. Validation rows are never
    repeated.
    """
    flags = iter(held_out)
    marked = [[(row, next(flags)) for row in part] for part in rows]
    train = [[row for row, held in part if not held] for part in marked]
    validation = [row for part in marked for row, held in part if held]
    counts = [len(part) for part in train]
    if not all(counts):
        raise UserError(f"{sources[counts.index(0)].path}: leaves no rows to train on; add rows")
    each = min(counts) if smallest else max(counts)
    with ExitStack() as files:  # neither is renamed into place before both are written
        if validation:
            file = files.enter_context(replacing(out / "validation.jsonl", "wb"))
            file.writelines(map(_message_line, validation))
            file.flush()
        file = files.enter_context(replacing(out / "train.jsonl", "wb"))
        for part in train:
            copies, rest = divmod(each, len(part))
            first = options.mixture == "finlora" and copies
            extra = range(rest) if first else sorted(random.Random(options.seed).sample(range(len(part)), rest))
            file.writelines(map(_message_line, chain(*[part] * copies, (part[number] for number in extra))))
    if not validation:
        (out / "validation.jsonl").unlink(missing_ok=True)
    return {
        "repeated": sum(max(0, each - count) for count in counts),
        "not_sampled": sum(max(0, count - each) for count in counts),
        "train": each * len(sources),
        "validation": len(validation),
    }


def _remove_leftovers(out: Path) -> None:
    """Remove what killed runs left beside the outputs; a file still written to has a fresh time and is kept."""
    for path in out.glob(".*.json*.*"):
        try:
            if time.time() - path.stat().st_mtime > 3600:
                path.unlink()
        except OSError:
            continue


def _sha256(path: Path) -> str:
    check_regular_file(path)
    try:
        return sha256(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the file") from error


def run(tasks: Sequence[str], raw: Path | None, out: Path | None, options: Options) -> None:
    """Prepare tasks that are not prepared yet, and say what is there."""
    if (options.file or out) and len(tasks) != 1:
        options = f"{typed('--file', 'FILE=')} and {typed('--out ...')}"
        raise UserError(f"{options}: name the one task that they are for (TASK=...)")
    for task in tasks or [name for name, entry in load_tasks().items() if entry.released]:
        find_task(task)
        folder = out or PREPARED / task
        record = read_prepared(folder)
        if record and record.settings.file and not options.file:
            raise UserError(
                f"{folder}: was prepared from your own file {record.settings.file}; name it again with "
                f"{typed('--file', 'FILE=')}, or remove the folder to go back to FinLoRA's rows"
            )
        reason = why_stale(task, raw, out, options)
        if record and reason is None:
            fetched = [path for path in record.absent_tests if ((raw or RAW) / path).exists()]
            reason = f"{fetched[0]}: was not there to compare with" if fetched else None
        if record and reason is None:
            print(f"{_summary(record, folder)} (already there)")
            continue
        if options.file:
            print(preview(Path(options.file), options.mapping, find_task(task).labels or ()), flush=True)
        prepared = prepare(task, raw, out, options)
        if record:
            print(f"{reason}: prepared again")
        print(_summary(prepared, folder))


def _summary(record: Prepared, out: Path) -> str:
    rows = record.rows
    lines = [f"{record.task}: {rows['read']} rows from {', '.join(source.path for source in record.sources)}"]
    for source in record.sources:
        for reason, left_out in source.left_out.items():
            lines.append(f"  left out of {source.path}: {left_out.rows} rows, {reason} ({_shown(left_out)})")
        if source.unused:
            lines.append(f"  not used of {source.path}: {', '.join(source.unused)}")
        for note in source.notes:
            lines.append(f"  taken although {source.path} has it: {note}")
        if source.corrected or source.unsure:
            counts = f"{source.corrected} corrected, {source.unsure} unsure and kept"
            lines.append(f"  labels of {source.path}: {counts}")
    for name, overlap in record.in_tests.items():
        lines.append(
            f"  ! {overlap.near} of these rows are in the test set {name} too, {overlap.same_words} in the same words "
            f"({_shown(overlap)}): remove them, or the score on {name} is memory"
        )
    if record.absent_tests:
        remedy = f"`finlora fetch {record.task}` brings them" if find_task(record.task).released else "not released"
        lines.append(f"  ! not checked for test rows: {', '.join(record.absent_tests)}: not there ({remedy})")
    if rows["repeated"]:
        lines.append(f"  repeated to balance the tasks: {rows['repeated']} rows")
    if rows["not_sampled"]:
        lines.append(f"  not drawn, to balance the tasks: {rows['not_sampled']} rows")
    lines.append(f"  {rows['train']} train and {rows['validation']} validation rows -> {out}")
    return "\n".join(lines)


def _shown(rows: LeftOutRows | InTest) -> str:
    count = rows.rows if isinstance(rows, LeftOutRows) else rows.near
    return f"lines {', '.join(map(str, rows.first_lines))}{', ...' if count > len(rows.first_lines) else ''}"
