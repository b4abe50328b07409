"""SHOTS=: which examples stand before a question, that they belong to a result's identity, and what is refused."""

import json
import re

import pytest
from failures import failed, refuses, says
from test_endpoint import server  # noqa: F401 (a fixture)
from test_eval_models import adapters  # noqa: F401 (a fixture)
from test_eval_run import ASK, WORDS, asked, evaluate, read, tests_folder, write_rows  # noqa: F401 (fixtures)

from finlora.core.paths import SAMPLE
from finlora.data import test_sets
from finlora.data.few_shot import questions
from finlora.data.groups import row_groups
from finlora.data.rows import read_rows
from finlora.evaluate import compare, report, results

TRAIN = "train/finlora_sentiment_train.jsonl"
THINGS = "rent wheat cocoa tin gas steel sugar cars ships pulp salt wool".split()


def write_train(folder, contexts, name=TRAIN):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"context": text, "target": WORDS[n % 3]}) + "\n" for n, text in enumerate(contexts)]
    path.write_text("".join(lines))
    return path


def sentence(number):
    """Words that no other number's has: their rows are in groups of their own."""
    return f"{ASK}Input: {' '.join(f'{thing}{number}' for thing in THINGS)}\nAnswer: "


@pytest.fixture
def train(tests_folder):  # noqa: F811
    """Of 40 rows, and of each test row of fpb once the same and once nearly."""
    tests = [row.context for row in read_rows(tests_folder / "test" / "fpb_test.jsonl")]
    near = [text.replace("Share", "The share").replace(" of the fund", " of the Fund!") for text in tests]
    return write_train(tests_folder, [*map(sentence, range(40)), *tests, *near])


def parts(question):
    """The examples of a question, each a context and a target, and the question itself."""
    *told, last = re.split(r"(?:\A|\n\n)(?:Example \d+:\n)?(?=Input: Instruction|Input: Explain|Input: Use)", question)[
        1:
    ]
    examples = [re.fullmatch(r"Input: (.*)\nAnswer: (.*)", text, re.DOTALL).groups() for text in told]
    return examples, re.fullmatch(r"Input: (.*)\nAnswer:", last, re.DOTALL)[1]


def test_examples_of_the_train_file_stand_before_each_question(evaluate, train, capsys):  # noqa: F811
    plain = evaluate()[0]
    folder = evaluate("--shots", "3")[0]
    assert folder.name == f"{plain.name}-3shot" and read(plain)[0]["shots"] is None
    about, rows = read(folder)
    assert about["shots"] == json.loads((folder / "run.json").read_text())["shots"] == 3
    known = {row.context: row.target for row in read_rows(train)}
    own = {row["context"] for row in rows}
    for row in rows:
        prompt = row["prompt"].removeprefix("<|begin_of_text|>")
        assert re.findall(r"Example (\d+):", prompt) == ["1", "2", "3"]
        examples, asked_ = parts(prompt)
        assert asked_ == row["context"] and len(examples) == 3
        assert all(known[context] == target for context, target in examples)
        near = row_groups([row["context"], *(context for context, _ in examples)])
        assert near.count(near[0]) == 1 and row["context"] not in dict(examples)
    assert len({row["prompt"].rpartition("Input:")[0] for row in rows}) > len(own) / 2, "drawn for each row by itself"
    # Which examples a row has depends neither on the limit nor on the order of the rows.
    by_context = {row["context"]: row["prompt"] for row in rows}
    few = read(evaluate("--shots", "3", "--limit", "5", "--name", "few")[0])[1]
    assert [row["prompt"] for row in few] == [row["prompt"] for row in rows[:5]]
    file = train.parent.parent / "test" / "fpb_test.jsonl"
    file.write_text("".join(reversed(file.read_text().splitlines(keepends=True))))
    assert {
        row["context"]: row["prompt"] for row in read(evaluate("--shots", "3", "--name", "few")[0])[1]
    } == by_context


def test_other_examples_are_another_result(evaluate, train, asked, capsys):  # noqa: F811
    base = {"adapter": None}
    folder = evaluate("--shots", "2", "--name", "mine", **base)[0]
    count = sum(asked)
    before = read(folder)
    assert read(evaluate("--shots", "2", "--name", "mine", **base)[0]) == before and sum(asked) == count
    for shots in ([], ["--shots", "3"]):
        with refuses("another model", "shots: 2 ->", "FORCE=1", "NAME=", file="results/mine"):
            evaluate("--name", "mine", *shots, **base)
    # Another train file is other examples: only rows whose prompt it changes are asked again.
    lines = train.read_text().splitlines(keepends=True)
    prompts = {row["prompt"] for row in before[1]}
    train.write_text("".join([*(line.replace("rent", "rents") for line in lines[:9]), *lines[9:]]))
    again = read(evaluate("--shots", "2", "--name", "mine", **base)[0])[1]
    assert "other examples" in capsys.readouterr().out
    changed = sum(row["prompt"] not in prompts for row in again)
    assert 0 < changed < len(again) and sum(asked) == count + changed


def test_examples_have_the_labels_that_labels_names(tmp_path, monkeypatch):
    from finlora.core.files import git_blob_sha1
    from finlora.data.corrections import Correction

    write_rows(tmp_path, "fpb", 3)
    path = write_train(tmp_path, map(sentence, range(9)))
    labels = {"positive": "negative", "negative": "positive"}
    entry = Correction(git_blob_sha1=git_blob_sha1(path), labels=labels, evidence="none")
    monkeypatch.setattr("finlora.data.corrections.load_corrections", lambda: {TRAIN: entry})
    known = {row.context: row.target for row in read_rows(path)}
    for asked_, exchange in (("published", {}), ("corrected", labels)):
        for question in questions("fpb", tmp_path, 3, asked_):
            assert all(exchange.get(known[context], known[context]) == target for context, target in parts(question)[0])


def test_an_endpoint_is_asked_with_them_too(evaluate, train, server):  # noqa: F811
    given = {"model": "served", "adapter": None, "prompt": "saved"}
    folder = evaluate("--endpoint", server.url, "--shots", "2", "--limit", "4", **given)[0]
    assert folder.name == "served-2shot"
    sent = {body["messages"][0]["content"] for _, body, _ in server.log if body}
    expected = questions("fpb", train.parent.parent, 2, "corrected")[:4]
    assert sent == set(expected) and all(len(parts(text)[0]) == 2 for text in sent)


def test_real_rows(shared):
    """Financial Math and XBRL Term: examples are never about the test row's own question."""
    for name in "formula", "xbrl_term":
        tests = test_sets.read_set(name, shared).rows
        asked_ = questions(name, shared, 3, "corrected")
        train = test_sets.read_train(test_sets.all_sets()[name].task, shared).rows
        known = {(row.context, row.corrected) for row in train}
        groups = row_groups([row.context for row in (*tests, *train)])
        of_train = {row.context: group for row, group in zip(train, groups[len(tests) :], strict=True)}
        for row, group, question in zip(tests, groups, asked_, strict=False):
            examples, context = parts(question)
            assert context == row.context and len(examples) == 3 and set(examples) <= known
            assert group not in {of_train[example] for example, _ in examples}
        assert asked_ == questions(name, shared, 3, "corrected")


def test_what_is_refused(evaluate, tests_folder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(test_sets, "RAW", tmp_path / "raw")
    missing = tmp_path / "raw" / TRAIN
    with refuses("missing", "make data TASK=sentiment", "SHOTS=", file=missing):
        evaluate("--shots", "3")
    path = write_train(tests_folder, map(sentence, range(4)))
    with refuses("4 rows", "fewer", str(path), file="SHOTS=5"):
        evaluate("--shots", "5")
    write_train(
        tests_folder, [*map(sentence, range(2)), read_rows(tests_folder / "test/fpb_test.jsonl").__next__().context]
    )
    with refuses("2 rows", "row 1", "fewer", file="SHOTS=3"):
        evaluate("--shots", "3")
    with refuses("MMLU", "TASKS=", file="SHOTS=3"):
        evaluate("--shots", "3", tasks="fpb,mmlu")
    write_train(tests_folder, [sentence(number).replace("Input:", "Input:" + " far" * 6000) for number in range(3)])
    with refuses("tokens", "16,384", "SHOTS=", "TASKS="):
        evaluate("--shots", "3")
    assert not list((tmp_path / "results").glob("*/fpb/set.json"))


def test_a_negative_number_is_one_line(command):
    failed(command("finlora", "eval", "--shots", "-1"), "--shots", "'-1'", "0 or more")


def test_the_sample_has_train_rows_for_a_tiny_run():
    assert len(parts(questions("fpb", SAMPLE, 3, "corrected")[0])[0]) == 3


def test_report_and_comparison_say_how_many(evaluate, train, tmp_path, capsys):  # noqa: F811
    evaluate("--base", "--shots", "3")
    evaluate()
    models, _ = results.read(tmp_path / "results")
    shot, plain = models["dora-raw-3shot"], models["dora-raw"]
    assert results.base_of(shot, models).run.shots == 3 and results.base_of(plain, models) is None
    assert "3-shot" in report.facts(shot.run) and "shot" not in report.facts(plain.run)
    capsys.readouterr()
    compare.compare("dora-raw", "dora-raw-3shot", tmp_path / "results")
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    says(warnings[0], "examples", "none (A)", "3 (B)")
