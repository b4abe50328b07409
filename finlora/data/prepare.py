"""Prepare a task's train file for axolotl: chat messages, split into train.jsonl and validation.jsonl.

    finlora prepare sentiment
    finlora prepare cfa --file questions.csv --context-column question --target-column answer

The same sources and options give the same bytes. Exact duplicates stay in: FinLoRA repeats rows to balance data sets
(each FiQA row stands 21 times in the sentiment file), so leaving them out would change what is trained. All copies
and near-duplicates of a row are on the same side of the split. prepared.json records what went in and came out, and is
written last: without it, or where a checksum differs, nothing counts as prepared.
"""

import hashlib
import json
import os
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from finlora.core.errors import UserError
from finlora.core.files import replacing, sha256
from finlora.core.paths import PREPARED, RAW
from finlora.data.corrections import TABLE as CORRECTIONS
from finlora.data.corrections import applies, corrected_target, standing
from finlora.data.neardup import near_duplicate_groups
from finlora.data.rows import LeftOut, Row, check_regular_file, read_rows
from finlora.data.tasks import Mixture, Task, load_tasks
from finlora.data.tasks import task as find_task

LABELS = ("corrected", "published")
FORMAT = 1  # of the prepared files; raise it whenever the same sources would give other bytes
SMALLEST_TO_SPLIT = 10  # rows; a validation loss over less than one row in ten says nothing
LINES_SHOWN = 10

# A text that holds one of these would end the turn or open another one.
CONTROL_TOKEN = re.compile(
    r"<\|(?:begin_of_text|end_of_text|start_header_id|end_header_id|eot_id|eom_id|python_tag"
    r"|finetune_right_pad_id|reserved_special_token_\d+)\|>"
)
_encode = json.JSONEncoder().encode  # escapes all but ASCII, so that no reader takes U+2028 for the end of a line


def prepare(
    task: str,
    raw: Path | None = None,
    out: Path | None = None,
    *,
    file: Path | None = None,
    context_column: str = "context",
    target_column: str = "target",
    any_label: bool = False,
    seed: int = 42,
    validation: float = 0.02,
    labels: str = "corrected",
) -> dict[str, Any]:
    """Write `out`/train.jsonl, validation.jsonl and prepared.json for a task and return what prepared.json holds.

    raw: the folder of fetched files (default data/raw); out: default data/prepared/TASK. With `file` (JSON lines, CSV
    or Parquet) the rows come from the user's own file, whose answers must be among the task's labels unless
    `any_label`. validation: the share of rows held out, 0 for none; fewer than 10 rows are all trained on. labels:
    "corrected" (data/corrections.yaml) or "published", for FinLoRA's files. A mixture comes from its own file where
    that is in `raw`, and is built from its tasks' files otherwise.
    Raises UserError for an unknown task, a missing or malformed source, or a split that cannot be made.
    """
    return _prepare(task, raw, out, _settings(file, context_column, target_column, any_label, seed, validation, labels))


def refresh(task: str, raw: Path | None = None, out: Path | None = None) -> dict[str, Any]:
    """Prepare a task again from what it was prepared from last, the user's own file and all options included.

    A task that was never prepared (or whose prepared.json cannot be read) is prepared from FinLoRA's file.
    """
    record = _record_or_none(Path(out or PREPARED / task) / "prepared.json")
    return _prepare(task, raw, out, record["settings"] if record else _settings())


def is_current(task: str, raw: Path | None = None, out: Path | None = None) -> bool:
    """Whether the prepared files are whole and made from the sources as they are now, by their contents' checksums."""
    return why_stale(task, raw, out) is None


def why_stale(
    task: str, raw: Path | None = None, out: Path | None = None, settings: dict[str, Any] | None = None
) -> str | None:
    """Return why a task has to be prepared (again), in one line, or None where its files are current.

    Sources, corrections and outputs are compared by content. With `settings` (as in prepared.json) those must be equal.
    """
    entry = find_task(task)
    raw, out = Path(raw or RAW), Path(out or PREPARED / task)
    path = out / "prepared.json"
    try:
        record = _read_record(path)
        if record["format"] != FORMAT or record["task"] != task:
            return f"{path}: was made by another version or for another task"
        if settings is not None and record["settings"] != settings:
            return f"{path}: was made with other options"
        _, expected = _sources(task, entry, raw, record["settings"])
        if [source["path"] for source in expected] != [source["path"] for source in record["sources"]]:
            return f"{path}: was made from other files"
        checks = [(raw / source["path"], source["sha256"]) for source in record["sources"]]
        if record["corrections_sha256"] is not None:
            checks.append((CORRECTIONS, record["corrections_sha256"]))
        checks += [(out / name, digest) for name, digest in record["outputs"].items()]
        for checked, digest in checks:
            if _sha256(checked) != digest:
                return f"{checked}: has changed since {task} was prepared"
    except FileNotFoundError:
        return f"{path}: is not there"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{path}: cannot be read"
    except UserError as error:
        return str(error)
    return None


def _prepare(task: str, raw: Path | None, out: Path | None, settings: dict[str, Any]) -> dict[str, Any]:
    entry = find_task(task)
    raw, out = Path(raw or RAW), Path(out or PREPARED / task)
    if not 0 <= settings["validation"] <= 0.5:
        raise UserError(f"validation {settings['validation']}: give a share of the rows from 0 to 0.5")
    if settings["labels"] not in LABELS:
        raise UserError(f"labels {settings['labels']!r}: choose {' or '.join(LABELS)}")
    origin, sources = _sources(task, entry, raw, settings)
    own = settings["file"] is not None
    corrections = _sha256(CORRECTIONS) if settings["labels"] == "corrected" and not own else None
    try:
        out.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out)
        with tempfile.TemporaryFile(dir=out) as spool:
            allowed = entry.labels if own and not settings["any_label"] else None
            groups = near_duplicate_groups(_spool(sources, raw, spool, settings, allowed))
            held_out = _choose_groups(task, groups, settings["validation"], settings["seed"])
            rows, outputs = _write(out, spool, sources, groups, held_out, settings["seed"])
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); free some space or choose --out") from error
    record = {
        "task": task,
        "format": FORMAT,
        "origin": origin,
        "settings": settings,
        "corrections_sha256": corrections,
        "sources": sources,
        "rows": rows,
        "near_duplicate_groups": len(set(groups)),
        "outputs": outputs,
    }
    with replacing(out / "prepared.json") as handle:
        json.dump(record, handle, indent=1, ensure_ascii=False)
        handle.write("\n")
    return record


def _settings(
    file: Path | None = None,
    context_column: str = "context",
    target_column: str = "target",
    any_label: bool = False,
    seed: int = 42,
    validation: float = 0.02,
    labels: str = "corrected",
) -> dict[str, Any]:
    return {
        "file": None if file is None else os.path.abspath(file),
        "context_column": context_column,
        "target_column": target_column,
        "any_label": any_label,
        "seed": seed,
        "validation": validation,
        "labels": labels,
    }


def _read_record(path: Path) -> dict[str, Any]:
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["settings"].keys() != _settings().keys():
        raise KeyError("settings")
    return record


def _record_or_none(path: Path) -> dict[str, Any] | None:
    try:
        return _read_record(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _sources(task: str, entry: Task | Mixture, raw: Path, settings: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """Where the rows come from, in words, and the files with their paths under `raw` (absolute for an own file)."""
    if settings["file"] is not None:
        return "own file", [{"path": settings["file"]}]
    paths = [entry.train]
    origin = "published file"
    if entry.mixture_of and not os.path.lexists(raw / entry.train):
        paths = [find_task(part).train for part in entry.mixture_of]
        origin = "single tasks"
    for path in paths:
        if not os.path.lexists(raw / path):
            if entry.released:
                raise UserError(f"{raw / path}: is not there; run `make data TASK={task}`")
            raise UserError(f"{raw / path}: is not released; run `make data TASK={task} FILE=your_rows.jsonl`")
    return origin, [{"path": path} for path in paths]


def _spool(
    sources: list[dict[str, Any]], raw: Path, spool: IO[bytes], settings: dict[str, Any], allowed: list[str] | None
) -> Iterator[str]:
    """Read every source, write its rows as chat messages to `spool` and yield their contexts, in the same order.

    Each source gains its checksum and its counts: rows (read), left_out (reason -> rows and lines), kept, and those of
    the labels: corrected, and unsure (may carry the defect that corrections.yaml describes, kept as published).
    """
    own = settings["file"] is not None
    for source in sources:
        path = raw / source["path"]
        source["sha256"], before = _sha256(path), _stamp(path)
        columns = (settings["context_column"], settings["target_column"]) if own else ("context", "target")
        correcting = settings["labels"] == "corrected" and not own and applies(source["path"], path)
        left_out: list[LeftOut] = []
        kept = corrected = unsure = 0
        rows = read_rows(path, *columns, left_out=None if own else left_out)
        for row in tqdm(rows, desc=path.name, unit=" rows", disable=None, leave=False):
            complaint = _control_token(row)
            if complaint and own:
                raise UserError(f"{path}:{row.line}: {complaint}; remove it")
            if complaint:
                left_out.append(LeftOut(row.line, complaint))
                continue
            target = row.target
            if allowed and target not in allowed:
                raise UserError(
                    f"{path}:{row.line}: the answer {target[:40]!r} is none of {', '.join(allowed)};"
                    " correct it or pass --any-label"
                )
            if correcting:
                target = corrected_target(source["path"], row)
                corrected += target != row.target
                unsure += standing(source["path"], row) == "unsure"
            kept += 1
            spool.write(_message_line(row.context, target))
            yield row.context
        if _stamp(path) != before:
            raise UserError(f"{path}: changed while it was read; run this again when it is whole")
        source |= {"rows": kept + len(left_out), "left_out": _reasons(left_out), "kept": kept}
        source |= {"corrected": corrected, "unsure": unsure}


def _message_line(context: str, target: str) -> bytes:
    return (
        f'{{"messages": [{{"role": "user", "content": {_encode(context)}}}, '
        f'{{"role": "assistant", "content": {_encode(target)}}}]}}\n'
    ).encode()


def _control_token(row: Row) -> str | None:
    for text in row.context, row.target:
        if "<|" in text and (found := CONTROL_TOKEN.search(text)):
            return f"holds the chat's control token {found[0]}"
    return None


def _reasons(left_out: list[LeftOut]) -> dict[str, dict[str, Any]]:
    lines: dict[str, list[int]] = {}
    for line, reason in left_out:
        lines.setdefault(reason, []).append(line)
    return {reason: {"rows": len(found), "first_lines": found[:LINES_SHOWN]} for reason, found in lines.items()}


def _choose_groups(task: str, groups: list[int], share: float, seed: int) -> set[int]:
    """Choose whole near-duplicate groups, in a seeded order, that together hold at most the share of rows wanted."""
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
            if not room:
                break
    if not chosen:
        # Every group is larger than the share: hold out the smallest if that leaves most rows to train on.
        smallest = min(order, key=sizes.__getitem__)
        if 2 * sizes[smallest] > len(groups):
            raise UserError(f"{task}: all rows are near-duplicates of each other; add rows or pass --validation 0")
        chosen.add(smallest)
    return chosen


def _write(
    out: Path, spool: IO[bytes], sources: list[dict[str, Any]], groups: list[int], held_out: set[int], seed: int
) -> tuple[dict[str, int], dict[str, str]]:
    """Write both files from the spooled rows; return the counts and the files' checksums.

    Of several sources (a mixture) each gives as many train rows as the largest: smaller ones are repeated whole, and a
    seeded sample of their rows fills what is left over. Validation rows are never repeated.
    """
    train_rows = []
    first = 0
    for source in sources:
        own_groups = groups[first : first + source["kept"]]
        train_rows.append(sum(group not in held_out for group in own_groups))
        first += source["kept"]
    largest = max(train_rows)
    if not all(train_rows):
        raise UserError(f"{sources[train_rows.index(0)]['path']}: leaves no rows to train on; add rows")

    rows = {"read": sum(source["rows"] for source in sources), "left_out": 0, "repeated": 0, "train": 0}
    rows |= {"left_out": rows["read"] - len(groups), "validation": len(groups) - sum(train_rows)}
    digests = {"train.jsonl": hashlib.sha256()}
    if held_out:
        digests["validation.jsonl"] = hashlib.sha256()
    else:
        (out / "validation.jsonl").unlink(missing_ok=True)

    spool.seek(0)
    with replacing(out / "train.jsonl", "wb") as train:
        if held_out:
            with replacing(out / "validation.jsonl", "wb") as validation:
                for line, group in zip(spool, groups, strict=True):
                    if group in held_out:
                        validation.write(line)
                        digests["validation.jsonl"].update(line)
        spool.seek(0)
        first = 0
        for source, count in zip(sources, train_rows, strict=True):
            copies, rest = divmod(largest, count)
            extra = set(random.Random(seed).sample(range(count), rest))
            start = spool.tell()
            for copy in range(copies + bool(rest)):
                spool.seek(start)
                number = 0
                for group in groups[first : first + source["kept"]]:
                    line = spool.readline()
                    if group in held_out:
                        continue
                    if copy < copies or number in extra:
                        train.write(line)
                        digests["train.jsonl"].update(line)
                        rows["train"] += 1
                    number += 1
            first += source["kept"]
    rows["repeated"] = rows["train"] - sum(train_rows)
    return rows, {name: digest.hexdigest() for name, digest in digests.items()}


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


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def run(tasks: Sequence[str], raw: Path | None, out: Path | None, **given: Any) -> None:
    """Prepare tasks that are not prepared yet, and say what is there. given: the options of `prepare`."""
    if (given["file"] or out) and len(tasks) != 1:
        raise UserError("--file and --out: name the one task that they are for (TASK=...)")
    for task in tasks or [name for name, entry in load_tasks().items() if entry.released]:
        _prepare_one(task, raw, out, given)


def _prepare_one(task: str, raw: Path | None, out: Path | None, given: dict[str, Any]) -> None:
    find_task(task)
    settings = _settings(**given)
    folder = out or PREPARED / task
    record = _record_or_none(folder / "prepared.json")
    if record and record["settings"]["file"] and not settings["file"]:
        raise UserError(
            f"{folder}: was prepared from your own file {record['settings']['file']}; name it again with --file, "
            "or remove the folder to go back to FinLoRA's rows"
        )
    if why_stale(task, raw, out, settings) is None:
        print(f"{_summary(record, folder)} (already there)")
    else:
        print(_summary(_prepare(task, raw, out, settings), folder))


def _summary(record: dict[str, Any], out: Path) -> str:
    rows = record["rows"]
    lines = [f"{record['task']}: {rows['read']} rows from {', '.join(source['path'] for source in record['sources'])}"]
    for source in record["sources"]:
        for reason, found in source["left_out"].items():
            shown = ", ".join(map(str, found["first_lines"]))
            more = ", ..." if found["rows"] > len(found["first_lines"]) else ""
            lines.append(f"  left out of {source['path']}: {found['rows']} rows, {reason} (lines {shown}{more})")
        if source["corrected"] or source["unsure"]:
            counts = f"{source['corrected']} corrected, {source['unsure']} unsure and kept"
            lines.append(f"  labels of {source['path']}: {counts}")
    if rows["repeated"]:
        lines.append(f"  repeated to balance the tasks: {rows['repeated']} rows")
    lines.append(f"  {rows['train']} train and {rows['validation']} validation rows -> {out}")
    return "\n".join(lines)
