"""The table of tasks: what it says against the real files, and what it refuses."""

import json
from collections import Counter
from pathlib import Path

import pytest
from failures import refuses

from finlora.data.tasks import TABLE, load_tasks, task

SHARED = Path(__file__).resolve().parents[2] / "shared" / "finlora"
TASKS = load_tasks()
TESTS = {name: test for entry in TASKS.values() for name, test in entry.tests.items()}
SMALL = """\
colour:
  about: the colour of a word
  released: true
  train: train/colour.jsonl
  labels: [red, green]
  metric: accuracy_f1
  max_new_tokens: 5
  licence: MIT
  source: https://example.org
  tests:
    colour:
      file: test/colour.jsonl
both:
  about: a mixture
  released: true
  train: train/both.jsonl
  licence: MIT
  source: https://example.org
  mixture_of: [colour]
"""


def test_a_mixture_has_the_tests_of_its_tasks():
    mixture = task("general_multi")
    assert mixture.mixture_of == ["sentiment", "headline", "ner"]
    assert list(mixture.tests) == ["fpb", "fiqa", "tfns", "nwgi", "headline", "ner"]
    assert mixture.max_new_tokens == 10
    assert task("reporting_multi").max_new_tokens == 100


def test_every_file_and_row_count_agrees_with_the_manifest():
    files = {entry["path"]: entry for entry in json.loads(TABLE.with_name("manifest.json").read_text())["files"]}
    told = 0
    for entry in TASKS.values():
        if entry.released:
            for path, rows in [
                (entry.train, entry.train_rows),
                *((test.file, test.rows) for test in entry.tests.values()),
            ]:
                assert files[f"data/{path}"].get("rows") == rows, path
                told += rows is not None
    assert told > 10


@pytest.mark.parametrize("name", [name for name, test in TESTS.items() if test.labels])
def test_the_labels_cover_the_real_file(name):
    test = TESTS[name]
    path = SHARED / "data" / test.file
    if not path.exists():
        pytest.skip(f"{path.name} is not in ../shared")
    counts = Counter(json.loads(line)["target"] for line in path.read_text().splitlines())
    assert set(counts) == set(test.labels)
    assert counts.total() == test.rows


def test_the_swap_of_tfns_shows_in_the_counts():
    test = TESTS["tfns"]
    assert sum(test.source_counts.values()) == test.rows
    path = SHARED / "data" / test.file
    if not path.exists():
        pytest.skip(f"{path.name} is not in ../shared")
    published = Counter(json.loads(line)["target"] for line in path.read_text().splitlines())
    assert published != test.source_counts
    swap = {"negative": "negative", "neutral": "positive", "positive": "neutral"}
    assert {swap[label]: count for label, count in published.items()} == test.source_counts


def test_a_misspelt_task_gets_the_nearest_name():
    with refuses("tasks.yaml", "sentiment", key="sentimnt"):
        task("sentimnt")
    with refuses("tasks.yaml", "sentiment, headline, ner", key="qqq"):
        task("qqq")


def test_a_test_set_inherits_and_optional_keys_are_none(tmp_path):
    (tmp_path / "tasks.yaml").write_text(SMALL)
    table = load_tasks(tmp_path / "tasks.yaml")
    assert table["colour"].train_rows is None and not table["colour"].mixture_of
    test = table["colour"].tests["colour"]
    assert (test.labels, test.metric, test.rows) == (["red", "green"], "accuracy_f1", None)
    assert table["both"].tests == {"colour": test} and table["both"].labels is None


LICENCE = "  licence: MIT\n  source: https://example.org\n"
LABELS, LIST = "[red, green]", "list"
FILE, LONGEST = "file: test/colour.jsonl", "max_new_tokens: 5"


@pytest.mark.parametrize(
    ("old", "new", "key", "words"),
    [
        ("metric: acc", "metrik: acc", "colour", ["unknown", "'metrik'", "metric?"]),
        (LICENCE + "  tests", "  tests", "colour", ["'licence'", "missing"]),
        (LABELS, "[yes, no]", "colour: labels", ["[True, False]", LIST, "quote"]),
        (LABELS, "[red, red]", "colour: labels", ["['red', 'red']", LIST, "different|distinct"]),
        (LABELS, "[]", "colour: labels", ["[]", LIST, "null"]),
        (LABELS, "red", "colour: labels", ["'red'", LIST, "null"]),
        ("accuracy_f1", "f1", "colour: metric", ["'f1'", "accuracy_f1, tag_accuracy_f1, accuracy, bertscore_f1"]),
        (LONGEST, "max_new_tokens: 0", "colour: max_new_tokens", ["0", "number of tokens"]),
        (LONGEST, "max_new_tokens: true", "colour: max_new_tokens", ["True", "number of tokens"]),
        (LONGEST, "max_new_tokens: 1.5", "colour: max_new_tokens", ["1.5", "number of tokens"]),
        ("released: true", "released: 'no'", "colour: released", ["'no'", "true", "false"]),
        ("train/colour.jsonl", "../colour.jsonl", "colour: train", ["'../colour.jsonl'", "train/", "test/"]),
        ("train/colour.jsonl", "5", "colour: train", ["5", "train/", "test/"]),
        ("train/colour.jsonl", "''", "colour: train", ["''", "train/", "test/"]),
        ("test/colour.jsonl", "test/../../x", "colour: tests: colour: file", ["'test/../../x'", "train/", "test/"]),
        (FILE, "rows: 5", "colour: tests: colour", ["'file'", "missing"]),
        (FILE, "file: test/c\n      row: 5", "colour: tests: colour", ["unknown", "'row'", "rows?"]),
        (
            *(FILE, "file: test/c\n      source_counts: {blue: 3}"),
            *("colour: tests: colour: source_counts", ["labels", "['red', 'green']"]),
        ),
        (FILE, "file: test/c\n      source_counts: 3", "colour: tests: colour: source_counts", ["labels"]),
        (f"    colour:\n      {FILE}", "    colour: 5", "colour: tests: colour", ["mapping", "comment"]),
        (f"  tests:\n    colour:\n      {FILE}", "  tests: {}", "colour: tests", ["at least one"]),
        (f"  tests:\n    colour:\n      {FILE}", "  tests: 5", "colour: tests", ["at least one"]),
        ("mixture_of: [colour]", "mixture_of: [color]", "both: mixture_of", ["'color'", "single task"]),
        ("mixture_of: [colour]", "mixture_of: [both]", "both: mixture_of", ["'both'", "single task"]),
        ("mixture_of: [colour]", "mixture_of: colour", "both: mixture_of", ["'colour'", "list of tasks"]),
        ("mixture_of: [colour]", "mixture_of: [colour]\n  labels: null", "both", ["unknown", "'labels'"]),
        (
            *("mixture_of: [colour]", "mixture_of: [colour]\n  published_rows: some"),
            *("both: published_rows", ["'some'", "smallest", "largest"]),
        ),
        (SMALL, "", None, ["empty", "git"]),
        (SMALL, "{}", None, ["no tasks", "git"]),
        (SMALL, "- colour", None, ["mapping", "git"]),
        (SMALL, "colour: 5", "colour", ["mapping", "comment"]),
        (SMALL, "caf\xe9: 5", None, ["not UTF-8", "git"]),
    ],
)
def test_a_wrong_table_is_refused_with_one_line(tmp_path, old, new, key, words):
    path = tmp_path / "tasks.yaml"
    assert old in SMALL
    path.write_bytes(SMALL.replace(old, new, 1).encode("latin-1"))
    with refuses(*words, file=path, key=key):
        load_tasks(path)


@pytest.mark.parametrize(
    ("old", "new", "line", "key"),
    [
        ("both:\n", "colour:\n", 13, "colour"),
        ("  released: true\n  train: train/both", "  about: b\n  train: b", 15, "about"),
    ],
)
def test_a_key_that_is_there_twice(tmp_path, old, new, line, key):
    path = tmp_path / "tasks.yaml"
    path.write_text(SMALL.replace(old, new, 1))
    with refuses("twice|duplicate|repeated", file=path, line=line, key=key):
        load_tasks(path)


def test_a_table_that_is_not_there(tmp_path):
    with refuses("cannot be read|unreadable", "No such file", "git", file=tmp_path / "tasks.yaml"):
        load_tasks(tmp_path / "tasks.yaml")
