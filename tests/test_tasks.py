"""The table of tasks: what it says against the real files, and what it refuses."""

import json
from collections import Counter
from pathlib import Path

import pytest

from data.tasks import TABLE, load_tasks, task
from tools.cli import UserError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "finlora"
TASKS = load_tasks()
TESTS = {name: test for entry in TASKS.values() for name, test in entry["tests"].items()}
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


def test_the_twelve_tasks():
    singles = ["sentiment", "headline", "ner", "finer", "xbrl_term", "xbrl_extract", "formula", "financebench", "cfa"]
    assert list(TASKS) == [*singles, "general_multi", "reporting_multi", "analysis_multi"]
    assert [name for name, entry in TASKS.items() if not entry["released"]] == ["cfa"]


def test_the_test_sets_and_their_longest_answers():
    # The figures of FinLoRA's evaluation script.
    longest = {name: test["max_new_tokens"] for name, test in TESTS.items()}
    assert longest == {
        **dict.fromkeys(["fpb", "fiqa", "tfns", "nwgi", "headline", "ner"], 10),
        **dict.fromkeys(["finer", "fnxl"], 100),
        **dict.fromkeys(["xbrl_term", "formula", "financebench"], 50),
        **dict.fromkeys(["xbrl_extract_tags", "xbrl_extract_value"], 20),
        **dict.fromkeys(["xbrl_extract_formula", "xbrl_extract_formula_calculations"], 30),
        **dict.fromkeys(["cfa_level1", "cfa_level2", "cfa_level3", "cpa_reg"], 30),
    }


def test_a_mixture_has_the_tests_of_its_tasks():
    mixture = task("general_multi")
    assert mixture["mixture_of"] == ["sentiment", "headline", "ner"]
    assert list(mixture["tests"]) == ["fpb", "fiqa", "tfns", "nwgi", "headline", "ner"]
    assert mixture["max_new_tokens"] == 10
    assert task("reporting_multi")["max_new_tokens"] == 100


def test_every_file_and_row_count_agrees_with_the_manifest():
    files = {entry["path"]: entry for entry in json.loads(TABLE.with_name("manifest.json").read_text())["files"]}
    told = 0
    for entry in TASKS.values():
        if entry["released"]:
            for path, rows in [
                (entry["train"], entry["train_rows"]),
                *((test["file"], test["rows"]) for test in entry["tests"].values()),
            ]:
                assert files[f"data/{path}"].get("rows") == rows, path
                told += rows is not None
    assert told > 10


@pytest.mark.parametrize("name", [name for name, test in TESTS.items() if test["labels"]])
def test_the_labels_cover_the_real_file(name):
    test = TESTS[name]
    path = SHARED / "data" / test["file"]
    if not path.exists():
        pytest.skip(f"{path.name} is not in ../shared")
    counts = Counter(json.loads(line)["target"] for line in path.read_text().splitlines())
    assert set(counts) == set(test["labels"])
    assert counts.total() == test["rows"]


def test_the_swap_of_tfns_shows_in_the_counts():
    test = TESTS["tfns"]
    assert sum(test["source_counts"].values()) == test["rows"]
    path = SHARED / "data" / test["file"]
    if not path.exists():
        pytest.skip(f"{path.name} is not in ../shared")
    published = Counter(json.loads(line)["target"] for line in path.read_text().splitlines())
    assert published != test["source_counts"]
    swap = {"negative": "negative", "neutral": "positive", "positive": "neutral"}
    assert {swap[label]: count for label, count in published.items()} == test["source_counts"]


def test_a_misspelt_task_gets_the_nearest_name():
    with pytest.raises(UserError, match=r"^tasks.yaml has no task 'sentimnt': did you mean sentiment\?$"):
        task("sentimnt")
    with pytest.raises(UserError, match=r"^tasks.yaml has no task 'qqq': choose one of sentiment, headline, .*"):
        task("qqq")


def test_a_test_set_inherits_and_optional_keys_are_none(tmp_path):
    (tmp_path / "tasks.yaml").write_text(SMALL)
    table = load_tasks(tmp_path / "tasks.yaml")
    assert table["colour"]["train_rows"] is None and table["colour"]["mixture_of"] == []
    test = table["colour"]["tests"]["colour"]
    assert (test["labels"], test["metric"], test["rows"]) == (["red", "green"], "accuracy_f1", None)
    assert table["both"]["tests"] == {"colour": test} and table["both"]["labels"] is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("metric: acc", "metrik: acc", "colour: unknown key 'metrik'; did you mean metric?"),
        ("  licence: MIT\n  source: https://example.org\n  tests", "  tests", "colour: the key 'licence' is missing"),
        ("[red, green]", "[yes, no]", "colour: labels: [True, False] is not a list of different strings"),
        ("[red, green]", "[red, red]", "colour: labels: ['red', 'red'] is not a list of different strings"),
        ("[red, green]", "[]", "colour: labels: [] is not a list of different strings"),
        ("accuracy_f1", "f1", "colour: metric: 'f1' is not one of accuracy_f1, "),
        ("max_new_tokens: 5", "max_new_tokens: 0", "colour: max_new_tokens: 0 is not a number of tokens"),
        ("max_new_tokens: 5", "max_new_tokens: true", "colour: max_new_tokens: True is not a number of tokens"),
        ("released: true", "released: 'no'", "colour: released: 'no' is neither true nor false"),
        (
            "train/colour.jsonl",
            "../colour.jsonl",
            "colour: train: '../colour.jsonl' is not a path under train/ or test/",
        ),
        ("test/colour.jsonl", "test/../../x", "colour: tests: colour: file: 'test/../../x' is not a path"),
        ("file: test/colour.jsonl", "rows: 5", "colour: tests: colour: the key 'file' is missing"),
        ("file: test/colour.jsonl", "file: test/c\n      row: 5", "colour: tests: colour: unknown key 'row'; did you"),
        (
            "file: test/colour.jsonl",
            "file: test/c\n      source_counts: {blue: 3}",
            "colour: tests: colour: source_counts: its labels must be among ['red', 'green']",
        ),
        ("    colour:\n      file: test/colour.jsonl", "    colour: 5", "colour: tests: colour: is not a mapping"),
        ("  tests:\n    colour:\n      file: test/colour.jsonl", "  tests: {}", "colour: tests: give at least one"),
        ("mixture_of: [colour]", "mixture_of: [color]", "both: mixture_of: 'color' is not a single task"),
        ("mixture_of: [colour]", "mixture_of: [both]", "both: mixture_of: 'both' is not a single task"),
        ("mixture_of: [colour]", "mixture_of: colour", "both: mixture_of: 'colour' is not a list of tasks"),
        ("mixture_of: [colour]", "mixture_of: [colour]\n  labels: null", "both: unknown key 'labels'"),
        ("both:\n", "colour:\n", "line 13: the key 'colour' is there twice"),
        (
            "  released: true\n  train: train/both",
            "  about: b\n  train: train/both",
            "line 15: the key 'about' is there",
        ),
        (SMALL, "", "holds no tasks; restore it from git"),
        (SMALL, "- colour", "holds no tasks; restore it from git"),
        (SMALL, "colour: 5", "colour: is not a mapping of keys"),
        (SMALL, "colour: [", "cannot be read (while parsing a flow node"),
        (SMALL, "caf\xe9: 5", "cannot be read ('utf-8' codec"),
    ],
)
def test_a_wrong_table_is_refused_with_one_line(tmp_path, old, new, message):
    path = tmp_path / "tasks.yaml"
    assert old in SMALL
    path.write_bytes(SMALL.replace(old, new, 1).encode("latin-1"))
    with pytest.raises(UserError) as caught:
        load_tasks(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


def test_a_table_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot be read \\(No such file or directory\\)"):
        load_tasks(tmp_path / "tasks.yaml")
