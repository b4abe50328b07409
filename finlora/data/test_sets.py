"""FinLoRA's test sets: their names and groups, and their rows with published and corrected labels."""

from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from finlora.core.errors import UserError, did_you_mean
from finlora.core.files import sha256, stamp
from finlora.core.paths import RAW, ROOT
from finlora.data.corrections import applies, corrected_target
from finlora.data.fetch import is_right, read_manifest
from finlora.data.rows import LeftOut, read_rows
from finlora.data.tasks import Task, TestSet, load_tasks

TASK_FILES = ROOT / "eval" / "tasks"


class LabelledRow(NamedTuple):
    """A row of a test or train file: its line, its texts as published, and its corrected label."""

    row: int
    context: str
    target: str
    corrected: str


@dataclass(frozen=True)
class SetRows:
    """A test or train file as read: its name as shown to people, and whether it is FinLoRA's by its checksum.

    left_out: rows of FinLoRA's file that have nothing to answer; in one's own they are errors.
    """

    rows: list[LabelledRow]
    path: str
    sha256: str
    published_file: bool
    left_out: list[LeftOut]


@cache
def all_sets() -> dict[str, TestSet]:
    """Every test set by name, in the order of data/tasks.yaml."""
    return {name: test for task in load_tasks().values() if isinstance(task, Task) for name, test in task.tests.items()}


@cache
def finlora_sets() -> list[str]:
    return [name for name, test in all_sets().items() if not load_tasks()[test.task].own]


@cache
def groups() -> dict[str, list[str]]:
    """Names of several sets: FinLoRA's four groups (tags of the task files), `own`, the tasks, `all` of FinLoRA's."""
    tagged: dict[str, list[str]] = {}
    for name in all_sets():
        folder = TASK_FILES if name in finlora_sets() else TASK_FILES / "own"
        text = (folder / f"{name}.yaml").read_text(encoding="utf-8")
        group = yaml.load(text, Loader=yaml.BaseLoader)["tag"][0]
        tagged.setdefault(group, []).append(name)
    tasks = {name: list(entry.tests) for name, entry in load_tasks().items()}
    # The task `finer` has two sets and one of them its name: the name stands for both.
    return tagged | {name: sets for name, sets in tasks.items() if sets != [name]} | {"all": finlora_sets()}


def choose(names: list[str]) -> list[str]:
    """The test sets that names of sets, tasks and groups stand for, each once. UserError names the nearest."""
    known, several = all_sets(), groups()
    chosen: dict[str, None] = {}
    for name in names:
        if name not in known and name not in several:
            hint = did_you_mean(name, [*known, *several], 3) or f"there are {', '.join([*several, *known])}"
            raise UserError(f"TASKS={','.join(names)}: no test set or group {name!r}; {hint.strip()}")
        chosen |= dict.fromkeys(several.get(name) or [name])
    return list(chosen)


def read_set(name: str, folder: Path = RAW) -> SetRows:
    """The rows of a test set, from its file under `folder`.

    Only a file with the checksum of FinLoRA's is corrected. Raises UserError for a file that is missing or malformed,
    and for one in data/raw that is not the published one.
    """
    spec = all_sets()[name]
    return _read(Path(folder), spec.file, spec.task, tuple(spec.labels or ()), f"leave {name} out with TASKS=")


def read_train(task: str, folder: Path = RAW) -> SetRows:
    """The rows of a task's train file, from which SHOTS= draws examples: under `folder`, else in data/raw."""
    entry = load_tasks()[task]
    folder = Path(folder) if (Path(folder) / entry.train).is_file() else RAW
    return _read(folder, entry.train, task, tuple(entry.labels or ()), "leave SHOTS= out")


def _read(folder: Path, *about: Any) -> SetRows:
    return _parse(stamp(folder / about[0]), folder, *about)


@lru_cache(maxsize=32)  # an evaluation reads a file several times; one that changes has another stamp
def _parse(_: Any, folder: Path, file: str, task: str, labels: tuple[str, ...], otherwise: str) -> SetRows:
    path = folder / file
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    pinned = next((one for one in read_manifest().files if one.local == file), None)
    if not path.is_file():
        where = f"make data TASK={task}" if pinned else f"bring your own as {shown}"
        raise UserError(f"{shown}: is missing; {where}, or {otherwise}")
    published = pinned is not None and is_right(path, pinned)
    if pinned and not published and folder == RAW:
        raise UserError(
            f"{shown}: is not FinLoRA's published file (its checksum differs); run `make data TASK={task}`, or "
            "keep files of your own in another folder and name it with TESTS="
        )
    correcting = applies(file, path)
    left_out: list[LeftOut] = []
    read = list(read_rows(path, left_out=left_out if published else None, labels=labels))
    if row := next((row for row in read if row.earlier), None):
        text = "has turns before its question, and evaluation asks one question; put them into it"
        raise UserError(f"{shown}:{row.line}: {text}")
    rows = [LabelledRow(*row[:3], corrected_target(file, row) if correcting else row.target) for row in read]
    return SetRows(rows, str(shown), sha256(path), published, left_out)
