"""Two subjects on the same rows: the sentences about them, and what is refused."""

import json
import re
import shutil
from pathlib import Path

import made
import pytest
from failures import failed, refuses, says

from finlora.data.tasks import task
from finlora.evaluate.compare import compare
from finlora.evaluate.scorers import finlora, summary
from finlora.evaluate.statistics import paired

A, B, BASE = "sentiment_r8_dora", "sentiment_r8_lora", "base-llama-3-1-8b-instruct-8bit"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Results for tests that only read them."""
    return made.everything(tmp_path_factory.mktemp("results"))


@pytest.fixture
def everything(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "results")


def change(folder: Path, **keys) -> None:
    path = folder if folder.suffix else folder / "set.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def keep(folder: Path, count: int, **keys) -> None:
    rows = (folder / "answers.jsonl").read_text().splitlines(keepends=True)[:count]
    (folder / "answers.jsonl").write_text("".join(rows))
    change(folder, evaluated=count, **keys)


def test_a_line_is_what_the_scorers_and_the_statistics_say(whole):
    lines = compare(BASE, B, whole)
    assert [(line["set"], line["labels"]) for line in lines] == [
        ("fpb", ""),
        ("tfns", "corrected"),
        ("tfns", "published"),
        ("xbrl_term", ""),
        ("formula", ""),
        ("mmlu", ""),
        ("pooled", "3 sets"),
    ]
    items = []
    for name in BASE, B:
        rows = [json.loads(line) for line in open(whole / name / "fpb" / "answers.jsonl")]
        answers, targets = [row["answer"] for row in rows], [row["target"] for row in rows]
        items.append(finlora(task("sentiment").tests["fpb"], answers, targets))
    expected = {"a": summary(items[0])["accuracy"], "b": summary(items[1])["accuracy"]} | paired(*items)
    assert expected.items() <= lines[0].items()


def test_the_pooled_line_holds_every_row_once(whole):
    *lines, pooled = compare(BASE, B, whole)
    counted = [line for line in lines if line["pooled"]]
    assert [(line["set"], line["labels"]) for line in counted] == [("fpb", ""), ("tfns", "corrected"), ("formula", "")]
    assert pooled["rows"] == sum(line["rows"] for line in counted) == 600
    assert pooled["a"] == pytest.approx(sum(line["a"] * line["rows"] for line in counted) / 600)
    assert (pooled["only_a"], pooled["only_b"]) == tuple(
        sum(one[key] for one in counted) for key in ("only_a", "only_b")
    )


def test_it_says_plainly_whether_there_is_a_difference(whole, capsys):
    """One sentence a line of the table, which names the better one only where they can be told apart."""

    def sentences(a, b):
        compare(a, b, whole)
        return dict(re.findall(r"^(\w+(?: \([^)]*\))?): (.*)$", capsys.readouterr().out, re.M))

    by_set = sentences(A, B)
    assert "240" in by_set["fpb"] and not re.search("better", by_set["fpb"])
    by_set = sentences(B, BASE)
    assert re.search(r"\bA .*better .*\bB .*29\.58 .*240", by_set["fpb"])
    assert re.search(r"\bA .*better .*\bB ", by_set["pooled (3 sets)"])
    (published,) = [text for name, text in by_set.items() if name.startswith("tfns (published")]
    assert not re.search("better", published)
    assert re.search(r"\bB .*better .*\bA .*29\.58 .*240", sentences(BASE, B)["fpb"])


def test_a_subject_is_as_good_as_its_copy(everything):
    made.answered(made.subject(everything, "copy"), "fpb", made.label_rows(240, 0.86, 2))
    (line,) = compare(A, "copy", everything)
    assert (line["difference"], line["p"]) == (0, 1) and line["low"] == -line["high"] < 0
    assert not line["distinguishable"]


@pytest.mark.parametrize("key", ["context", "prompt"])  # earlier results have the prompt alone
def test_rows_about_one_text_count_as_one_also_pooled(tmp_path, key, capsys):
    for name, answer in (("one", "positive"), ("two", "neutral")):
        folder = made.subject(tmp_path, name)
        for test_set, texts in (("fpb", 5), ("fiqa", 3)):
            rows = [{"target": "neutral", "answer": answer} for _ in range(60)]
            for number, row in enumerate(rows):
                row["context"] = f"Instruction: What, {number}?\nInput: Text {number % texts} says it.\nAnswer: "
            path = made.answered(folder, test_set, rows) / "answers.jsonl"
            if key == "prompt":
                lines = [json.loads(line) for line in path.read_text().splitlines()]
                lines = [line | {"prompt": line.pop("context")} for line in lines]
                path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = compare("one", "two", tmp_path)
    assert [(line["set"], line["rows"], line["groups"]) for line in lines] == [
        ("fpb", 60, 5),
        ("fiqa", 60, 3),
        ("pooled", 120, 8),
    ]
    assert re.search(r"^fpb +60 +5 ", capsys.readouterr().out, re.M)
    # 60 rows better and none worse, of 5 texts and of 3: 2 of the 2**5 or 2**3 signs are as far from 0.
    assert [line["p"] for line in lines] == pytest.approx([2 / 2**5, 2 / 2**3, 2 / 2**8], abs=0.03)
    assert [line["distinguishable"] for line in lines] == [False, False, True]


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ("sentiment_r8_dor", B, ["'sentiment_r8_dor'", f"{A}, {B}"]),
        (A, "zzz", ["'zzz'", f"{BASE}, {A}, {B}"]),
        ("..", B, ["'..'", f"{BASE}, {A}, {B}"]),
        ("", "", [f"make compare A={BASE} B={B}"]),
        (A, A, [f"both {A}", "two"]),
    ],
)
def test_who_is_not_there_is_named(whole, a, b, words):
    with refuses(*words):
        compare(a, b, whole)


def test_no_common_set(everything):
    made.answered(made.subject(everything, "other"), "fiqa", made.label_rows(5, 1))
    with refuses("both", f"{A} has fpb, tfns, xbrl_term, formula, mmlu", "other has fiqa", "TASKS="):
        compare(A, "other", everything)


@pytest.mark.parametrize(
    ("name", "harm", "words"),
    [
        ("fpb", {"sha256": "other"}, ["SHA-256", "evaluate one"]),
        ("xbrl_term", {"encoder": "a, layer 2"}, ["ProsusAI/finbert, layer 10", "a, layer 2", "evaluate one"]),
        ("tfns", {"labels_used": "published"}, [f"make eval for {B}", "LABELS=corrected"]),
    ],
)
def test_what_cannot_be_compared_is_refused(everything, name, harm, words):
    change(everything / B / name, **harm)
    with refuses(A, B, *words, file=name):
        compare(A, B, everything)


def test_other_rows_are_refused(everything):
    path = everything / B / "fpb" / "answers.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[2]["target"] = lines[2]["corrected"] = {"neutral": "negative"}.get(lines[2]["target"], "neutral")
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with refuses(A, B, "row 3 ", "target", "evaluate one", file="fpb"):
        compare(A, B, everything)
    for line in lines:
        line["row"] += 1000
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with refuses(A, B, "rows", "none", "evaluate one", file="fpb"):
        compare(A, B, everything)


def test_labels_that_are_the_same_anyway_are_no_reason_to_refuse(everything):
    change(everything / B / "fpb", labels_used="published")
    assert compare(A, B, everything)[0]["rows"] == 240


def test_other_prompts_limits_models_and_seen_rows_are_warned_of(everything, capsys):
    keep(everything / B / "fpb", 50, limit=50)
    change(everything / B / "run.json", prompt="raw", model="another")
    line = compare(A, B, everything)[0]
    assert line["rows"] == 50
    expected = [("models", made.MODEL, "another"), ("prompts", "chat template", "(A)", "raw", "(B)")]
    expected += [("fpb: ", "A", "240", "B", "50"), ("fpb: ", "train", "24 by A", "5 by B")]
    for words, line in zip(expected, capsys.readouterr().err.splitlines(), strict=True):
        assert line.startswith("warning: ")
        for word in words:
            assert word in line


def test_another_template_is_warned_of(everything, capsys):
    compare(A, B, everything)
    assert "template" not in capsys.readouterr().err
    change(everything / B / "run.json", template_sha256="other")
    compare(A, B, everything)
    assert re.search("^warning: .*template", capsys.readouterr().err, re.M)


def test_an_unfinished_set_is_named_and_the_others_compared(everything, capsys):
    (everything / A / "fpb" / "set.json").unlink()
    assert compare(A, B, everything)[0]["set"] == "tfns"
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "fpb: " in line and "240" in line]
    says(line.removeprefix("warning: "), "unfinished", "make eval", file=everything / A / "fpb")
    (everything / A / "run.json").unlink()
    with refuses("used", "evaluate", file=everything / A):
        compare(A, B, everything)


def test_broken_results_of_others_do_not_matter(everything, capsys):
    (everything / BASE / "run.json").write_text("{")
    compare(A, B, everything)
    assert "run.json" not in capsys.readouterr().err


def test_the_command_line(whole, command):
    done = command("finlora", "compare", A, B, "--results", str(whole))
    first = done.stdout.splitlines()[0]
    assert done.returncode == 0 and re.match(rf"A +{A}: .*8-bit.* DoRA r 8, alpha 16", first), done
    refused = command("finlora", "compare", A, "nobody", "--results", str(whole))
    assert failed(refused, "'nobody'") and refused.stdout == ""
