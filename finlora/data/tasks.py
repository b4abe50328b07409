"""The table of tasks, data/tasks.yaml, read and checked in one place."""

import difflib
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from finlora.core.errors import UserError
from finlora.core.paths import ROOT

TABLE = ROOT / "data" / "tasks.yaml"
METRICS = ("accuracy_f1", "tag_accuracy_f1", "accuracy", "bertscore_f1")

TASK_KEYS = {
    "about",
    "released",
    "train",
    "train_rows",
    "train_rows_about",
    "tokens_about",
    "labels",
    "metric",
    "max_new_tokens",
    "licence",
    "source",
    "tests",
}
MIXTURE_KEYS = {"about", "released", "train", "train_rows", "train_rows_about", "licence", "source", "mixture_of"}
TEST_KEYS = {
    "file",
    "rows",
    "rows_about",
    "labels",
    "source_counts",
    "metric",
    "max_new_tokens",
    "licence",
    "source",
}
OPTIONAL = {"train_rows", "train_rows_about", "tokens_about", "rows", "rows_about", "source_counts"}
INHERITED = ("labels", "metric", "max_new_tokens", "licence", "source")


def load_tasks(path: Path = TABLE) -> dict[str, dict[str, Any]]:
    """Every task of the table by name, each with all its keys: optional ones are None where they are not given.

    A test set has its task's labels, metric, max_new_tokens, licence and source where it does not state its own.
    A mixture has the tests of its tasks, `mixture_of`, no labels, and the longest max_new_tokens of its tasks;
    every other task has an empty `mixture_of`. Paths are relative to data/raw.
    Raises UserError that names the file and the key for an unknown, missing or wrong key.
    """
    try:
        text = path.read_text(encoding="utf-8")
        _refuse_twins(path, yaml.compose(text, yaml.SafeLoader))
        table = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({_one_line(error)}); restore it from git") from error
    if not isinstance(table, dict) or not table:
        raise UserError(f"{path}: holds no tasks; restore it from git")
    for name, entry in table.items():
        if not isinstance(entry, dict):
            raise UserError(f"{path}: {name}: is not a mapping of keys; see the comment at the top of the file")
        _check_task(f"{path}: {name}", entry)
    for name, entry in table.items():
        if entry["mixture_of"]:
            _add_parts(f"{path}: {name}", entry, table)
    return table


def task(name: str, path: Path = TABLE) -> dict[str, Any]:
    """One task of the table; a name that it does not hold raises UserError with the nearest one."""
    table = _cached(path)
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(table)}"
        raise UserError(f"{path.name} has no task {name!r}: {hint}")
    return table[name]


@cache
def _cached(path: Path) -> dict[str, dict[str, Any]]:
    return load_tasks(path)


def _check_task(where: str, entry: dict[str, Any]) -> None:
    mixture = "mixture_of" in entry
    _check_keys(where, entry, MIXTURE_KEYS if mixture else TASK_KEYS)
    if not isinstance(entry["released"], bool):
        raise UserError(f"{where}: released: {entry['released']!r} is neither true nor false")
    _check_path(f"{where}: train", entry["train"])
    if mixture:
        entry.update(labels=None, metric=None, max_new_tokens=None, tests={})
        return
    entry["mixture_of"] = []
    _check_values(where, entry)
    if not isinstance(entry["tests"], dict) or not entry["tests"]:
        raise UserError(f"{where}: tests: give at least one test set by name")
    for name, test in entry["tests"].items():
        at = f"{where}: tests: {name}"
        if not isinstance(test, dict):
            raise UserError(f"{at}: is not a mapping of keys; see the comment at the top of the file")
        for key in INHERITED:
            test.setdefault(key, entry[key])
        _check_keys(at, test, TEST_KEYS)
        _check_path(f"{at}: file", test["file"])
        _check_values(at, test)
        counts = test["source_counts"]
        if counts is not None and (not isinstance(counts, dict) or set(counts) - set(test["labels"] or counts)):
            raise UserError(f"{at}: source_counts: its labels must be among {test['labels']}")


def _check_keys(where: str, entry: dict[str, Any], known: set[str]) -> None:
    for key in entry:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise UserError(f"{where}: unknown key {key!r}" + (f"; did you mean {near[0]}?" if near else ""))
    for key in sorted(known - OPTIONAL):
        if key not in entry:
            raise UserError(f"{where}: the key {key!r} is missing")
    for key in known & OPTIONAL:
        entry.setdefault(key, None)


def _check_path(where: str, value: Any) -> None:
    parts = Path(value).parts if isinstance(value, str) else ()
    if not parts or parts[0] not in ("train", "test") or ".." in parts:
        raise UserError(f"{where}: {value!r} is not a path under train/ or test/")


def _check_values(where: str, entry: dict[str, Any]) -> None:
    labels = entry["labels"]
    whole = isinstance(labels, list) and labels and all(isinstance(label, str) for label in labels)
    if labels is not None and (not whole or len(set(labels)) < len(labels)):
        # An unquoted Yes or No is a boolean in YAML.
        raise UserError(f"{where}: labels: {labels!r} is not a list of different strings, or null; quote each one")
    if entry["metric"] not in METRICS:
        raise UserError(f"{where}: metric: {entry['metric']!r} is not one of {', '.join(METRICS)}")
    longest = entry["max_new_tokens"]
    if not isinstance(longest, int) or isinstance(longest, bool) or longest < 1:
        raise UserError(f"{where}: max_new_tokens: {longest!r} is not a number of tokens")


def _add_parts(where: str, entry: dict[str, Any], table: dict[str, dict[str, Any]]) -> None:
    if not isinstance(entry["mixture_of"], list):
        raise UserError(f"{where}: mixture_of: {entry['mixture_of']!r} is not a list of tasks")
    for part in entry["mixture_of"]:
        if part not in table or table[part]["mixture_of"]:
            raise UserError(f"{where}: mixture_of: {part!r} is not a single task of the table")
        entry["tests"].update(table[part]["tests"])
    entry["max_new_tokens"] = max(table[part]["max_new_tokens"] for part in entry["mixture_of"])


def _refuse_twins(path: Path, node: yaml.Node | None) -> None:
    """YAML itself lets the last of two equal keys win without a word."""
    if not isinstance(node, yaml.MappingNode):
        return
    seen = set()
    for key, value in node.value:
        if key.value in seen:
            raise UserError(f"{path}: line {key.start_mark.line + 1}: the key {key.value!r} is there twice")
        seen.add(key.value)
        _refuse_twins(path, value)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return " ".join(str(error).split())
