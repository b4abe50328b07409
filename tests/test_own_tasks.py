"""A task of one's own: what `make task` writes, and that data, audit and evaluation take it by its name."""

import csv
import json
import random
import shutil
from pathlib import Path

import pytest
import yaml
from failures import refuses, says

from finlora import cli
from finlora.data import own_tasks, prepare, tasks, test_sets
from finlora.data.audit import audit
from finlora.data.fetch import fetch
from finlora.recipes.load import load

CACHED = (tasks.load_tasks, test_sets.all_sets, test_sets.finlora_sets, test_sets.groups)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Folders in place of the repository's, and no answers about tasks kept from before or for later."""
    shutil.copytree(test_sets.TASK_FILES, tmp_path / "tasks", ignore=shutil.ignore_patterns("own", "__pycache__"))
    (tmp_path / "recipes").mkdir()
    shutil.copy(own_tasks.PATTERN, tmp_path / "recipes")
    monkeypatch.setattr(tasks, "OWN_TABLE", tmp_path / "own_tasks.yaml")
    monkeypatch.setattr(own_tasks, "RAW", tmp_path / "raw")
    monkeypatch.setattr(own_tasks, "PATTERN", tmp_path / "recipes" / own_tasks.PATTERN.name)
    for module in own_tasks, test_sets:
        monkeypatch.setattr(module, "TASK_FILES", tmp_path / "tasks")
    for function in CACHED:
        function.cache_clear()
    yield tmp_path
    for function in CACHED:
        function.cache_clear()


def write(path: Path, count: int, answers: list[str], seed: int = 0) -> Path:
    draw = random.Random(seed)
    rows = [(" ".join(f"{draw.getrandbits(40):x}" for _ in range(9)), draw.choice(answers)) for _ in range(count)]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("question", "answer"), *rows])
    return path


def make(folder: Path, *options: str, name: str = "credit_risk", answers: tuple[str, ...] = ("good", "bad")) -> None:
    train = write(folder / "train.csv", 40, list(answers))
    test = write(folder / "test.csv", 10, list(answers), seed=1)
    columns = "question=context,answer=target"
    cli.call(["task", "--name", name, "--file", str(train), "--test", str(test), "--columns", columns, *options])
    for function in CACHED:
        function.cache_clear()


def test_every_step_takes_the_task_by_its_name(folder, capsys):
    make(folder)
    shown = capsys.readouterr().out
    says(shown.splitlines()[-3], "40 train", "10 test", "bad, good", "accuracy_f1", file="credit_risk")
    entry = tasks.task("credit_risk")
    assert (entry.labels, entry.metric, entry.train_rows, entry.own) == (["bad", "good"], "accuracy_f1", 40, True)
    assert fetch(["credit_risk"], folder / "raw") == []
    record = prepare.prepare("credit_risk", folder / "raw", folder / "out")
    assert (record.rows["train"], record.rows["validation"]) == (39, 1)
    report = audit("credit_risk", folder / "raw", count_tokens=False)
    assert [file["rows"] for file in report["files"]] == [40, 10] and not any(
        f["attention"] for f in report["findings"]
    )
    assert test_sets.choose(["own"]) == test_sets.choose(["credit_risk"]) == ["credit_risk"]
    assert "credit_risk" not in test_sets.choose(["all"])
    assert [row.row for row in test_sets.read_set("credit_risk", folder / "raw").rows] == [*range(1, 11)]
    recipe = load(folder / "recipes" / "credit_risk_r8_dora.yaml")
    assert recipe.keys["datasets"][0]["path"] == "data/prepared/credit_risk/train.jsonl"


def test_lm_eval_reads_the_tasks_file(folder):
    from lm_eval.tasks import TaskManager, get_task_dict

    make(folder)
    options = {"folder": str(folder / "raw"), "labels": "corrected"}
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False, metadata=options)
    task = get_task_dict(["credit_risk"], manager)["credit_risk"]
    rows = [json.loads(line) for line in (folder / "raw/test/credit_risk.jsonl").read_text().splitlines()]
    assert [(doc["context"], doc["target"]) for doc in task.test_docs()] == [(r["context"], r["target"]) for r in rows]


@pytest.mark.parametrize(
    ("answers", "options", "labels", "metric"),
    [
        (("1.5", *(str(number) for number in range(99))), (), None, "accuracy"),
        (tuple(f"because of {number}" for number in range(99)), (), None, "bertscore_f1"),
        (("yes", "no"), ("--labels", "yes,no,perhaps"), ["yes", "no", "perhaps"], "accuracy_f1"),
        (("yes", "no"), ("--metric", "accuracy"), ["no", "yes"], "accuracy"),
    ],
)
def test_labels_and_metric_follow_the_answers_or_the_options(folder, answers, options, labels, metric):
    make(folder, *options, answers=answers)
    entry = yaml.safe_load(tasks.OWN_TABLE.read_text())["credit_risk"]
    assert (entry["labels"], entry["metric"]) == (labels, metric)


def test_tasks_stand_beside_each_other_and_one_made_again_is_replaced(folder):
    make(folder)
    make(folder, name="default_risk")
    recipe = folder / "recipes" / "credit_risk_r8_dora.yaml"
    recipe.write_text(recipe.read_text() + "# mine\n")
    make(folder, answers=("high", "low"))
    assert tasks.task("credit_risk").labels == ["high", "low"] and tasks.task("default_risk").labels == ["bad", "good"]
    assert recipe.read_text().endswith("# mine\n")


def test_mistakes_write_nothing(folder):
    for name, words in (("sentiment", ["another name"]), ("fpb", ["another name"]), ("Risk 2", ["lower-case"])):
        with refuses(*words, key=f"NAME={name}"):
            make(folder, name=name)
    with refuses("'bad'", "good", "--labels", file=folder / "train.csv", line=3):
        make(folder, "--labels", "good")
    chat = [{"role": role, "content": f"{role} speaks"} for role in ("user", "assistant", "user", "assistant")]
    (folder / "test.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    (folder / "one.jsonl").write_text(json.dumps({"messages": chat[:2]}) + "\n")
    with refuses("turns", "one question", file=folder / "test.jsonl", line=1):
        cli.call(["task", "--name", "risk", "--file", str(folder / "one.jsonl"), "--test", str(folder / "test.jsonl")])
    assert not (folder / "raw").exists() and not tasks.OWN_TABLE.exists() and not (folder / "tasks" / "own").exists()
