"""Two subjects on the same rows: what is said, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import made
import pytest

from data.tasks import task
from eval.compare import compare
from eval.scorers import finlora, summary
from eval.stats import paired
from tools.cli import UserError

ROOT = Path(__file__).resolve().parent.parent
A, B, BASE = "sentiment_r8_dora", "sentiment_r8_lora", "base-llama-3-1-8b-instruct-8bit"


@pytest.fixture
def everything(tmp_path):
    return made.everything(tmp_path)


def change(folder: Path, **keys) -> None:
    path = folder if folder.suffix else folder / "set.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def keep(folder: Path, count: int, **keys) -> None:
    rows = (folder / "answers.jsonl").read_text().splitlines(keepends=True)[:count]
    (folder / "answers.jsonl").write_text("".join(rows))
    change(folder, evaluated=count, **keys)


def test_a_line_is_what_the_scorers_and_the_statistics_say(everything):
    lines = compare(BASE, B, everything)
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
        rows = [json.loads(line) for line in open(everything / name / "fpb" / "answers.jsonl")]
        answers, targets = [row["answer"] for row in rows], [row["target"] for row in rows]
        items.append(finlora(task("sentiment")["tests"]["fpb"], answers, targets))
    expected = {"a": summary(items[0])["accuracy"], "b": summary(items[1])["accuracy"]} | paired(*items)
    assert expected.items() <= lines[0].items()


def test_the_pooled_line_holds_every_row_once(everything):
    *lines, pooled = compare(BASE, B, everything)
    counted = [line for line in lines if line["pooled"]]
    assert [(line["set"], line["labels"]) for line in counted] == [("fpb", ""), ("tfns", "corrected"), ("formula", "")]
    assert pooled["rows"] == sum(line["rows"] for line in counted) == 600
    assert pooled["a"] == pytest.approx(sum(line["a"] * line["rows"] for line in counted) / 600)
    assert (pooled["only_a"], pooled["only_b"]) == tuple(
        sum(one[key] for one in counted) for key in ("only_a", "only_b")
    )


def test_it_says_plainly_whether_there_is_a_difference(everything, capsys):
    compare(A, B, everything)
    said = capsys.readouterr().out
    assert "\nfpb: A and B cannot be told apart on these 240 rows.\n" in said
    compare(B, BASE, everything)
    said = capsys.readouterr().out
    assert "\nfpb: A is better than B by 29.58 points, distinguishable on these 240 rows.\n" in said
    assert "\npooled (3 sets): A is better than B by " in said
    assert "\ntfns (published labels): A and B cannot be told apart" in said


def test_a_subject_is_as_good_as_its_copy(everything):
    made.answered(made.subject(everything, "copy"), "fpb", made.label_rows(240, 0.86, 2))
    (line,) = compare(A, "copy", everything)
    assert (line["difference"], line["low"], line["high"], line["p"]) == (0, 0, 0, 1)
    assert not line["distinguishable"]


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ("sentiment_r8_dor", B, f"has no subject 'sentiment_r8_dor'; there is {A}, {B}"),
        (A, "zzz", "has no subject 'zzz'; there is base-llama"),
        ("..", B, "has no subject '..'"),
        ("", "", "name two subjects, as in make compare A="),
        (A, A, f"A and B are both {A}; name two"),
    ],
)
def test_who_is_not_there_is_named(everything, a, b, said):
    with pytest.raises(UserError, match="(?m)^[^\n]*$") as error:
        compare(a, b, everything)
    assert said in str(error.value)


def test_no_common_set(everything):
    made.answered(made.subject(everything, "other"), "fiqa", made.label_rows(5, 1))
    with pytest.raises(UserError, match=f"no set that both answered: {A} has fpb, .*; other has fiqa; evaluate both"):
        compare(A, "other", everything)


@pytest.mark.parametrize(
    ("name", "harm", "said"),
    [
        ("fpb", {"sha256": "other"}, f"fpb: {A} and {B} answered another file (its SHA-256 differs)"),
        ("xbrl_term", {"encoder": "a, layer 2"}, "another measure (ProsusAI/finbert, layer 10 and a, layer 2)"),
        ("tfns", {"labels_used": "published"}, f"run make eval for {B} again with LABELS=corrected"),
    ],
)
def test_what_cannot_be_compared_is_refused(everything, name, harm, said):
    change(everything / B / name, **harm)
    with pytest.raises(UserError) as error:
        compare(A, B, everything)
    assert said in str(error.value)


def test_other_rows_are_refused(everything):
    path = everything / B / "fpb" / "answers.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[2]["target"] = lines[2]["corrected"] = {"neutral": "negative"}.get(lines[2]["target"], "neutral")
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"answered other rows \(row 3 has another target\)"):
        compare(A, B, everything)
    for line in lines:
        line["row"] += 1000
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"other rows \(none that both answered\)"):
        compare(A, B, everything)


def test_labels_that_are_the_same_anyway_are_no_reason_to_refuse(everything):
    change(everything / B / "fpb", labels_used="published")
    assert compare(A, B, everything)[0]["rows"] == 240


def test_other_prompts_limits_models_and_seen_rows_are_warned_of(everything, capsys):
    keep(everything / B / "fpb", 50, limit=50)
    change(everything / B / "run.json", prompt="raw", model="another")
    line = compare(A, B, everything)[0]
    assert line["rows"] == 50
    assert capsys.readouterr().err.splitlines() == [
        f"warning: the models differ: {made.MODEL} and another",
        "warning: the prompts differ: the chat template saved with the model (A), "
        "the raw context, as FinLoRA tested (B)",
        "warning: fpb: A answered 240 rows, B 50; compared on the 50 that both did",
        "warning: fpb: rows were trained on, 24 by A and 5 by B",
    ]


def test_another_template_is_warned_of(everything, capsys):
    change(everything / B / "run.json", template_sha256="other")
    compare(A, B, everything)
    assert "warning: the chat templates differ" in capsys.readouterr().err


def test_an_unfinished_set_is_named_and_the_others_compared(everything, capsys):
    (everything / A / "fpb" / "set.json").unlink()
    assert compare(A, B, everything)[0]["set"] == "tfns"
    assert "fpb: unfinished" in capsys.readouterr().err
    (everything / A / "run.json").unlink()
    with pytest.raises(UserError, match="cannot be used"):
        compare(A, B, everything)


def test_broken_results_of_others_do_not_matter(everything, capsys):
    (everything / BASE / "run.json").write_text("{")
    compare(A, B, everything)
    assert "run.json" not in capsys.readouterr().err


def test_the_command_line(everything):
    def run(*names):
        command = [sys.executable, "-m", "eval.compare", *names, "--results", str(everything)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    done = run(A, B)
    assert done.returncode == 0 and done.stdout.startswith(
        f"A  {A}: Llama-3.1-8B-Instruct · 8-bit · DoRA r 8, alpha 16"
    )
    refused = run(A, "nobody")
    assert refused.returncode == 1 and refused.stdout == ""
    assert refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1
