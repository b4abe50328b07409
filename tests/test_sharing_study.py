"""bench/study/sharing.py: its rows, its sweeps, and its table."""

import gzip
import json

import numpy as np
import pytest
import yaml

from bench.study import rows, sharing
from finlora.data.groups import row_groups
from finlora.sweep import points
from tests.test_study import row


def test_rows_of_one_text_or_filing_are_on_one_side(tmp_path, monkeypatch):
    monkeypatch.setattr(sharing, "OUT", tmp_path)
    monkeypatch.setattr(sharing, "FILINGS", (2, 1, 3))
    monkeypatch.setattr(sharing, "FINER", (12, 4, 4))
    monkeypatch.setattr(rows, "make", lambda data, out: None)  # tests/test_study.py has it
    folders = {name: tmp_path / name for name in sharing.TASKS}
    monkeypatch.setattr(sharing, "TASKS", {n: t._replace(folder=folders[n]) for n, t in sharing.TASKS.items()})
    (tmp_path / "older").mkdir()
    with gzip.open(tmp_path / "older" / "finer_test_older.jsonl.gz", "wt", encoding="utf-8") as file:
        for number in range(20):
            sentence = row("fpb", number // 2)["context"].split()[10:]
            file.write(
                json.dumps({"context": f'1. in sentence: "{" ".join(sentence)} {number % 2}?"\n', "target": "A"}) + "\n"
            )
    sharing.make(tmp_path)
    for task, sizes in (("filings", (40, 20, 15)), ("finer", (12, 4, 4))):
        folder = folders[task]
        texts = [
            [json.loads(line)["messages"][0]["content"] for line in (folder / f"{part}.jsonl").open(encoding="utf-8")]
            for part in ("train", "validation")
        ]
        (file,) = (folder / "test").iterdir()
        texts.append([json.loads(line)["context"] for line in file.open(encoding="utf-8")])
        assert tuple(map(len, texts)) == sizes
        if task == "filings":
            texts = [[text.partition("</>\n")[0] for text in part] for part in texts]
            assert sum(len(set(part)) for part in texts) == len(set().union(*texts)) == 6
        else:
            part = np.repeat(range(3), sizes)
            groups = row_groups(sum(texts, []))
            assert len(set(groups)) == len(set(zip(groups, part, strict=True))) == 10
        recipe = yaml.safe_load((folder / f"{sharing.TASKS[task].recipe}.yaml").read_text(encoding="utf-8"))
        assert recipe["datasets"][0]["path"] == f"{folder}/train.jsonl" and recipe["evals_per_epoch"] == 1


@pytest.mark.parametrize("task", sharing.TASKS)
def test_each_task_has_whole_rows_and_three_ways_to_share_them(task, tmp_path):
    content = yaml.safe_load((sharing.HERE / "sharing" / f"{task}.yaml").read_text(encoding="utf-8"))
    assert content["seed"] == list(range(1, 9))
    file = tmp_path / f"{task}.yaml"
    file.write_text(yaml.safe_dump(content | {"seed": [1]}), encoding="utf-8")
    recipe = tmp_path / f"{sharing.TASKS[task].recipe}.yaml"
    recipe.write_text(sharing.draft(recipe.stem)[1], encoding="utf-8")
    labels = [sharing.label(point.changes) for point in points.plan(recipe, file)]
    assert labels[0] == "whole rows" and len(set(labels)) == 4


def test_the_difference_is_taken_seed_by_seed():
    """Whole rows get two and four of four rows with seeds 1 and 2, shared ones a row less each; seed 3 has no pair."""
    bits = {0b1100: (1, False), 0b1111: (2, False), 0b1000: (1, True), 0b1110: (2, True), 0b0000: (3, True)}
    runs = [
        {"changes": {"fastdora_shared_prefixes": shared, "fastdora_rows_per_prefix": 5}, "seed": seed}
        | {"right": bytes([right << 4]).hex(), "rows": 80, "steps": 8}
        for right, (seed, shared) in bits.items()
    ]
    task = {"row": [0, 1, 2, 3], "group": [0, 1, 2, 3], "runs": runs}
    whole, shared = sharing.arms(task)
    assert (whole.score.accuracy, whole.difference) == (0.75, None)
    assert shared.score.accuracy == pytest.approx(1 / 3) and shared.difference["difference"] == -0.25
    found = {"about": {}, "tasks": {"filings": task}}
    assert json.loads(sharing.text_of(found)) == found
    lines = sharing.table(found).splitlines()
    assert lines[2] == "| filings | whole rows | 10 | 2 | 75.0 |  |  |"
    assert lines[3].startswith("| filings | shared, 5 rows a prefix | 10 | 3 | 33.3 | -25.0 |")


def test_the_readmes_table_is_that_of_the_record_and_its_words_hold():
    found = json.loads(sharing.RECORD.read_text(encoding="utf-8"))
    assert sharing.text_of(found) == sharing.RECORD.read_text(encoding="utf-8")
    text = sharing.README.read_text(encoding="utf-8")
    assert f"{sharing.BEGIN}{sharing.table(found)}{sharing.END}" in text
    for task, reach in (("sentiment", 0.013), ("filings", 0.05)):
        differences = [arm.difference for arm in sharing.arms(found["tasks"][task])[1:]]
        assert len(differences) == 3 and all(-reach <= one["low"] <= 0 <= one["high"] <= reach for one in differences)
