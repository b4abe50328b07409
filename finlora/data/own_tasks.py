"""Tasks of one's own (`make task`): their rows in data/raw, an entry in data/own_tasks.yaml, a task file and a recipe.

From then on every command takes the task by its name, as one of data/tasks.yaml.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from finlora.core.errors import UserError, typed
from finlora.core.files import replacing, write_text
from finlora.core.paths import RAW, ROOT, shown
from finlora.data import tasks
from finlora.data.rows import Row, preview, read_rows
from finlora.data.test_sets import TASK_FILES, all_sets, groups
from finlora.data.tokens import chat, find_measure

PATTERN = ROOT / "recipes" / "cfa_r8_dora.yaml"  # of the new recipe; cfa's rows are people's own as well
MOST_LABELS, LONGEST_LABEL = 30, 60  # more or longer answers than these are no closed set
NUMBER = re.compile(r"[-+]?\$?\d[\d,]*(\.\d+)?%?")
HEAD = "# Tasks of your own, as `make task` writes them; the keys are those of data/tasks.yaml.\n\n"


def add(
    name: str, file: Path, test: Path, columns: Mapping[str, str], labels: list[str] | None, metric: str | None
) -> None:
    """Add a task, or replace one of that name, and say what was found. UserError where rows or options are wrong."""
    own = tasks.read_table(tasks.OWN_TABLE, "tasks") if tasks.OWN_TABLE.exists() else {}
    if not re.fullmatch("[a-z]+(_[a-z]+)*", name):
        raise UserError(f"NAME={name}: becomes a part of recipes' names; write lower-case words, joined by _")
    if name not in own and name in {*tasks.load_tasks(), *all_sets(), *groups()}:
        raise UserError(f"NAME={name}: is a task or test set of this repository; choose another name")
    print(preview(file, columns, labels or ()), flush=True)
    train_rows, test_rows = ([*read_rows(path, columns, labels=labels or ())] for path in (file, test))
    if row := next((row for row in test_rows if row.earlier), None):
        raise UserError(f"{test}:{row.line}: has turns before its question, and evaluation asks one question")
    labels = labels or _closed_set([row.target for row in train_rows])
    for path, rows in (file, train_rows), (test, test_rows):
        if row := next((row for row in rows if labels and row.target not in labels), None):
            known = f"none of {', '.join(labels)}"
            remedy = f"correct it, or name all labels by {typed('--labels', 'LABELS=')}"
            raise UserError(f"{path}:{row.line}: {row.target[:40]!r} is {known}; {remedy}")
    keys = yaml.safe_load(PATTERN.read_text(encoding="utf-8"))
    measure = find_measure(keys["base_model"])
    # Without a tokenizer: Llama-3's tokens have about four bytes of English text, and two of anything else.
    count = measure.count if measure else lambda texts: [len(text.encode()) // 2 for text in texts]
    lengths = count([chat(row.turns) for row in train_rows])
    entry = _entry(name, (file, train_rows), (test, test_rows), labels, metric)
    entry["tokens_about"] = sum(lengths) // len(lengths)
    entry["max_new_tokens"] = max(count([row.target for row in train_rows + test_rows])) + 1
    tasks.read_entry(tasks.OWN_TABLE, name, entry, tasks.Task)
    for path, rows in (entry["train"], train_rows), (entry["tests"][name]["file"], test_rows):
        with replacing(RAW / path) as written:
            written.writelines(json.dumps(_as_json(row, rows), ensure_ascii=False) + "\n" for row in rows)
    task_file = {"include": "../_finlora.yaml", "task": name, "tag": ["own"], "dataset_kwargs": {"test_set": name}}
    write_text(TASK_FILES / "own" / f"{name}.yaml", yaml.safe_dump(task_file, sort_keys=False))
    table = yaml.safe_dump(own | {name: entry}, sort_keys=False, allow_unicode=True, width=120)
    write_text(tasks.OWN_TABLE, HEAD + table)
    recipe = _write_recipe(name, max(lengths))
    answers = f"labels {', '.join(labels)}" if labels else "any answer"
    print(f"{name}: {len(train_rows)} train and {len(test_rows)} test rows; {answers}; metric {entry['metric']}")
    print(f"  the entry is in {shown(tasks.OWN_TABLE)}, the recipe is recipes/{recipe}.yaml")
    print(f"next      make audit TASK={name}; make train RECIPE={recipe}; make eval RECIPE={recipe}")


def _entry(
    name: str,
    train: tuple[Path, list[Row]],
    test: tuple[Path, list[Row]],
    labels: list[str] | None,
    metric: str | None,
) -> dict[str, Any]:
    """The task's entry, without its lengths."""
    (file, train_rows), (test_file, test_rows) = train, test
    if metric is None:
        numbers = all(NUMBER.fullmatch(row.target) for row in train_rows)
        metric = "accuracy_f1" if labels else "accuracy" if numbers else "bertscore_f1"
    return {
        "about": f"rows of your own from {file.name}",
        "released": False,
        "own": True,
        "train": f"train/{name}.jsonl",
        "train_rows": len(train_rows),
        "labels": labels,
        "metric": metric,
        "licence": "your own",
        "source": str(file.absolute()),
        "tests": {name: {"file": f"test/{name}.jsonl", "rows": len(test_rows), "source": str(test_file.absolute())}},
    }


def _closed_set(answers: list[str]) -> list[str] | None:
    """The labels, where answers are few, short and repeated; None where they are texts or numbers of their own."""
    labels = sorted(set(answers))
    repeated = len(labels) <= MOST_LABELS and 2 * len(labels) <= len(answers)
    return labels if repeated and max(map(len, labels)) <= LONGEST_LABEL else None


def _as_json(row: Row, rows: list[Row]) -> dict[str, Any]:
    if any(each.earlier for each in rows):
        return {"messages": [turn._asdict() for turn in row.turns]}
    return {"context": row.context, "target": row.target}


def _write_recipe(name: str, longest: int) -> str:
    """Write the task's first recipe, where there is none, and return its name."""
    path = PATTERN.with_name(PATTERN.name.replace("cfa", name))
    if not path.exists():
        text = PATTERN.read_text(encoding="utf-8").replace("cfa", name)
        length = max(yaml.safe_load(text)["sequence_len"], -(-longest // 512) * 512)
        write_text(path, re.sub(r"(?m)^sequence_len: \d+", f"sequence_len: {length}", text))
    return path.stem
