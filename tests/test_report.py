"""The report: what it shows, what it refuses to be stopped by, and how it looks in a real browser."""

import csv
import json
import re
import shutil
import subprocess
import sys
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import made
import pytest
from failures import refuses, says

from finlora.core.html import Table, number, percent, signed, templates, visible
from finlora.core.plot import Axis, ticks
from finlora.data.tasks import load_tasks
from finlora.evaluate import report as report_module
from finlora.evaluate import results
from finlora.evaluate.published import BESIDE, PUBLISHED, published, published_average
from finlora.evaluate.report import Average, Model, Report, ScoreRow, report
from finlora.evaluate.scorers import finlora, summary
from finlora.evaluate.statistics import interval, paired
from finlora.train import curves as train_curves
from finlora.train.curves import curves

ROOT = Path(__file__).resolve().parent.parent
BASE = "base-llama-3-1-8b-instruct-8bit"
SETS = {name: test for task in load_tasks().values() for name, test in task.tests.items()}


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """The results with the report on them, for tests that only read: (folder, what it shows)."""
    folder = made.everything(tmp_path_factory.mktemp("reported") / "results")
    return folder, report(folder)


@pytest.fixture
def everything(tmp_path):
    """Results of which a test changes something: a fifth of the rows of `reported`."""
    return made.everything(tmp_path / "results", part=5)


def page(folder: Path) -> str:
    return (folder / "index.html").read_text(encoding="utf-8")


def model(shown: Report, name: str) -> Model:
    return next(model for model in shown.models if model.name == name)


def rows_of(shown: Report, name: str, test: str) -> list[ScoreRow]:
    return [row for row in model(shown, name).rows if row.set == test]


def notes(shown: Report, name: str, *words: str) -> int:
    """How many of the notes on a model hold all these words."""
    one = model(shown, name)
    return sum(
        all(re.search(rf"(?<!\w)({word})", note, re.IGNORECASE) for word in words)
        for note in report_module.notes(one.results, one.base)
    )


def matrices(shown: Report, name: str, test: str) -> list[Table]:
    answers = model(shown, name).results.sets[test]
    return [report_module.confusion_matrix(answers, labels) for labels in answers.labels()]


def overview(shown: Report, title: str) -> dict[str, dict[str, str]]:
    """The table at the top whose title begins so: row -> column -> text. Empty where there is none."""
    table = next((table for heading, table in shown.overview if heading.startswith(title)), Table([], []))
    heads, *rows = table.texts()
    return {row[0]: dict(zip(heads[1:], row[1:], strict=True)) for row in rows}


def answers_of(folder: Path, name: str, test: str) -> list[list]:
    """The rows that the page of all answers embeds: line, prompt, right, answer, prediction, scores, marks."""
    text = (folder / name / test / "answers.html").read_text(encoding="utf-8")
    return json.loads(re.search(r'id="rows">(.*?)</script>', text, re.S)[1])


def warned(capsys) -> list[str]:
    """What stderr says, without the word that begins each line."""
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("warning: ") for line in lines)
    return [line.removeprefix("warning: ") for line in lines]


# FinLoRA's figures


@pytest.mark.parametrize(("name", "average"), [("base", 37.05), ("DoRA", 69.53), ("LoRA", 74.74), ("rsLoRA", 73.82)])
def test_the_published_overall_average_comes_out(name, average):
    assert round(published_average(BESIDE[name]), 2) == average


def test_every_printed_average_but_one_is_the_mean_of_its_column():
    off = {
        model: round(published_average(model), 2)
        for model, (printed, _) in published()["overall"].items()
        if abs(published_average(model) - printed) > 0.01
    }
    assert off == {"GPT-4o": 66.44}  # printed: 63.39


def test_the_published_table_covers_the_19_test_sets():
    assert set(published()) - {"overall"} == set(SETS) and len(SETS) == 19
    beside = {name for name in BESIDE.values() if "multi" not in name}
    assert all(beside <= set(models) for models in published().values())


def test_what_was_not_published_has_no_average():
    """FinLoRA's rebuttal has no multi-task adapter for CFA and CPA."""
    missing = {name for name, models in published().items() if BESIDE["LoRA, multi-task"] not in models}
    assert missing == {"cfa_level1", "cfa_level2", "cfa_level3", "cpa_reg", "overall"}
    assert published_average(BESIDE["LoRA, multi-task"]) is None
    for name in (BESIDE[name] for name in ("base, 3-shot", "LoRA, multi-task")):
        assert published_average(name, ["fpb", "tfns"]) == pytest.approx(
            (published()["fpb"][name][0] + published()["tfns"][name][0]) / 2
        )


def test_the_published_figures_are_those_of_finlora():
    source = ROOT.parent / "shared" / "finlora" / "published_results.csv"
    if not source.exists():
        pytest.skip("../shared/finlora is not here: the copy was not compared")
    with open(source, newline="") as theirs, open(PUBLISHED, newline="") as ours:
        copied = [{key: value for key, value in row.items() if key != "set"} for row in csv.DictReader(ours)]
        assert copied == list(csv.DictReader(theirs))


# What it shows


def test_a_score_its_interval_and_its_difference_are_those_of_the_scorers(reported):
    folder, shown = reported
    row = rows_of(shown, "sentiment_r8_dora", "fpb")[0]

    def items(name):
        lines = [json.loads(line) for line in open(folder / name / "fpb" / "answers.jsonl")]
        return finlora(SETS["fpb"], [line["answer"] for line in lines], [line["target"] for line in lines])

    ours, base = items("sentiment_r8_dora"), items(BASE)
    assert row.score.accuracy == summary(ours)["accuracy"]
    assert (row.score.low, row.score.high) == interval(ours)
    assert row.score.f1_interval == interval(ours, "weighted_f1")
    assert row.difference == paired(base, ours)
    expected = f"{percent(row.score.accuracy)} [{percent(row.score.low, 1)}, "
    assert expected in (folder / "README.md").read_text()
    assert f"<b>{percent(row.score.accuracy)}</b>" in page(folder)


def test_both_label_versions_are_beside_each_other_and_the_defect_is_explained(reported):
    folder, shown = reported
    corrected, as_published = rows_of(shown, "sentiment_r8_dora", "tfns")
    assert (corrected.labels, as_published.labels) == ("corrected", "published")
    assert corrected.score.accuracy > 0.8 > 0.5 > as_published.score.accuracy
    theirs = overview(shown, "Models")["FinLoRA DoRA (published)"]
    assert theirs["tfns (corrected labels)"] == "–" and theirs["tfns (published labels)"] == "59.09 (0.702)"
    for text in page(folder), (folder / "README.md").read_text():
        assert re.search(
            r"tfns: labels .*wrong.* 475 .*neutral.* 1,566 positive.* corrected .* published ", " ".join(text.split())
        )
    labels = [table.caption.split(" labels")[0] for table in matrices(shown, "sentiment_r8_dora", "tfns")]
    assert labels == ["corrected", "published"]


def test_published_labels_come_first_where_they_were_asked_for(everything):
    for path in everything.glob("*/tfns/set.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"labels_used": "published"}))
    assert [row.labels for row in rows_of(report(everything), BASE, "tfns")] == ["published", "corrected"]


def test_rows_that_were_trained_on_are_left_out_of_a_line_of_their_own(reported):
    whole, unseen = rows_of(reported[1], "sentiment_r8_dora", "fpb")
    assert (whole.rows, unseen.rows) == (240, 216) and unseen.only and not whole.only
    assert unseen.difference["rows"] == 216 and whole.comparable and not unseen.comparable


def test_so_they_are_under_both_versions_of_the_labels(tmp_path):
    folder = made.subject(tmp_path, "a")
    rows = [row | {"seen": number % 2 == 0} for number, row in enumerate(made.label_rows(60, 0.9, exchanged=True))]
    made.answered(folder, "tfns", rows)
    rows = rows_of(report(tmp_path), "a", "tfns")
    lines = [(row.labels, bool(row.only), row.rows) for row in rows]
    without = [("corrected", True, 30), ("published", True, 30)]
    assert lines == [("corrected", False, 60), ("published", False, 60), *without]
    assert f"{rows[3].only}, published " in page(tmp_path)


def test_strict_scores_appear_where_they_differ(reported):
    shown = reported[1]
    fpb, formula = (rows_of(shown, "sentiment_r8_dora", name)[0] for name in ("fpb", "formula"))
    assert fpb.others["strict"].accuracy < fpb.score.accuracy  # "The sentiment is neutral" has the label in it
    assert formula.others["strict"].accuracy == formula.score.accuracy and formula.others["strict"].unparsed == 5
    rows = dict(report_module.tables(shown.models[0]))[""].texts()
    shown_as = {row[0].split()[0]: row[rows[0].index("strict")] for row in reversed(rows)}
    assert shown_as["formula"] == "same" and shown_as["fpb"].startswith(percent(fpb.others["strict"].accuracy))


def test_two_scorings_are_not_the_same_where_only_accuracy_agrees(tmp_path):
    """By FinLoRA's rules a wrong answer is a class of its own under its raw text, strictly it is a label."""
    rows = [{"target": "positive", "answer": "positive"}] * 3 + [{"target": "negative", "answer": "positive."}] * 2
    made.answered(made.subject(tmp_path, "a"), "fpb", [dict(row) for row in rows])
    shown = report(tmp_path)
    (row,) = rows_of(shown, "a", "fpb")
    strict = row.others["strict"]
    assert strict.accuracy == row.score.accuracy and strict.weighted_f1 < row.score.weighted_f1
    (heads, cells) = dict(report_module.tables(shown.models[0]))[""].texts()
    assert cells[heads.index("strict")].startswith("60.00 [")


def test_models_by_sets_with_finloras_figures_and_the_measure_of_each_set(reported):
    table = overview(reported[1], "Models")
    names = [name for name in table if not name.startswith("FinLoRA")]
    assert names == ["sentiment_r8_dora", "sentiment_r8_lora", BASE]
    assert [name for name in table if name not in names] == [f"FinLoRA {name} (published)" for name in BESIDE]
    heads = ["fpb", "tfns (corrected labels)", "tfns (published labels)", "xbrl_term (BERTScore F1)", "formula"]
    assert list(table[BASE]) == [*heads, "mmlu (general task)"]
    row = rows_of(reported[1], BASE, "fpb")[0]
    assert table[BASE]["fpb"].startswith(f"{percent(row.score.accuracy)} [{percent(row.score.low, 1)}, ")
    assert table["FinLoRA base, 3-shot (published)"]["fpb"] == "76.40"
    assert table["FinLoRA LoRA, multi-task (published)"]["xbrl_term (BERTScore F1)"] == "67.60 (0.676)"


@pytest.mark.parametrize(
    "change", [{"published_file": False}, {"published_file": None}, {"rows": 1212}], ids=["own", "unknown", "some rows"]
)
def test_other_rows_than_the_published_ones_share_no_table_with_finloras_figures(tmp_path, change):
    """Nor an axis, which each table has of its own; nor an average."""
    folder = made.subject(tmp_path, "sample_r8_dora")
    made.answered(folder, "fpb", made.label_rows(48, 0.86), **change)
    made.answered(folder, "fiqa", made.label_rows(40, 0.8), **change)
    shown = report(tmp_path)
    assert overview(shown, "Models") == {}
    (name,) = other = overview(shown, "On other rows")
    assert name == folder.name and re.search(r"\] on 48 rows", other[name]["fpb"])
    (mean,) = overview(shown, "Averages").values()
    assert all(figure == "–" for column, figure in mean.items() if column.startswith("FinLoRA"))
    for text in page(tmp_path), (tmp_path / "README.md").read_text():
        assert "85.64" not in text and "81.93" not in text  # FinLoRA's figures of fpb


def test_both_kinds_of_rows_at_once_are_two_tables(everything):
    path = everything / "sentiment_r8_lora" / "fpb" / "set.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"published_file": False}))
    shown = report(everything)
    assert overview(shown, "Models")["sentiment_r8_lora"]["fpb"] == "–"
    assert list(overview(shown, "On other rows")) == ["sentiment_r8_lora"]


def test_any_two_adapters_have_their_paired_difference(everything):
    made.answered(made.subject(everything, "third"), "fpb", made.label_rows(48, 0.3, seed=9))
    other = made.subject(everything, "other-file")
    made.answered(other, "fpb", made.label_rows(48, 0.3, seed=9), sha256="other")
    shown = report(everything)
    table = overview(shown, "Differences")
    names = ["other-file", "sentiment_r8_dora", "sentiment_r8_lora", "third"]
    assert list(table) == [f"{b} − {a}" for place, a in enumerate(names) for b in names[place + 1 :]]
    subjects, _ = results.read(everything)
    a, b = (subjects[name].sets["fpb"] for name in ("sentiment_r8_lora", "third"))
    expected = paired(*results.pair(a, b, "published")[1:])
    cell = table["third − sentiment_r8_lora"]["fpb"]
    assert cell.startswith(f"{signed(expected['difference'])} ▼ [{signed(expected['low'], 1)}, ")
    assert table["third − other-file"]["fpb"] == "–" and "SHA-256" in page(everything)
    assert table["third − sentiment_r8_lora"]["formula"] == "–"


def averages(shown: Report, name: str, **of) -> list[Average]:
    means = report_module.averages(model(shown, name).rows, comparable=True)
    return [mean for mean in means if all(getattr(mean, key) == value for key, value in of.items())]


def test_accuracy_and_bertscore_are_averaged_apart_beside_finloras_mixed_average(reported):
    rows = model(reported[1], "sentiment_r8_dora").rows
    scores = {(row.set, row.labels): row.score for row in rows if not row.only}
    means = {(mean.of, mean.labels): mean for mean in averages(reported[1], "sentiment_r8_dora")}
    kinds = [("accuracy", "corrected"), ("both, as FinLoRA's", "corrected")]
    kinds += [("accuracy", "published"), ("BERTScore F1", "published"), ("both, as FinLoRA's", "published")]
    assert list(means) == kinds
    for labels in "corrected", "published":
        accuracy = [scores[name, "published"] for name in ("fpb", "formula")] + [scores["tfns", labels]]
        mean, both = means["accuracy", labels], means["both, as FinLoRA's", labels]
        assert mean.accuracy == pytest.approx(sum(score.accuracy for score in accuracy) / 3)
        term = scores["xbrl_term", "published"]
        assert both.accuracy == pytest.approx((3 * mean.accuracy + term.accuracy) / 4)
        # Independent intervals combine by their squares (MOVER).
        below = sum((score.accuracy - score.low) ** 2 for score in accuracy) ** 0.5 / 3
        assert mean.accuracy - mean.low == pytest.approx(below)
        assert bool(both.published) == (labels == "published")
    both = means["both, as FinLoRA's", "published"]
    assert both.sets == ["fpb", "tfns", "xbrl_term", "formula"]
    assert both.published["DoRA"] == pytest.approx((81.93 + 59.09 + 60.6 + 28.5) / 4)
    assert means["accuracy", "published"].published["DoRA"] == pytest.approx((81.93 + 59.09 + 28.5) / 3)
    assert means["BERTScore F1", "published"].published["DoRA"] == pytest.approx(60.6)


def test_with_all_19_sets_it_is_finloras_overall_average(tmp_path):
    folder = made.subject(tmp_path, "all_r8_dora")
    for name, spec in SETS.items():
        rows = made.label_rows(6, 1.0)
        if spec.metric == "bertscore_f1":
            rows = [row | {"bertscore": 0.5} for row in rows]
        made.answered(folder, name, rows, metric=spec.metric, labels=spec.labels)
    shown = report(tmp_path)
    (mean,) = averages(shown, "all_r8_dora", of="FinLoRA's overall average")
    assert mean.published["base"] == pytest.approx(37.05, abs=0.005) and mean.published["LoRA, multi-task"] is None
    assert mean.accuracy == pytest.approx((17 * 1 + 2 * 0.5) / 19)
    assert re.search(r"average\W+19 ", (tmp_path / "README.md").read_text())


def test_a_general_task_is_paired_with_the_base(reported):
    row, base = (rows_of(reported[1], name, "mmlu")[0] for name in ("sentiment_r8_dora", BASE))
    assert base.score.accuracy == pytest.approx(0.675) and row.kind == "general task"
    assert row.difference["difference"] == pytest.approx(row.score.accuracy - base.score.accuracy)
    assert row.difference["rows"] == 120


def test_a_confusion_matrix_counts_every_row_once(reported):
    shown = reported[1]
    (table,) = matrices(shown, "sentiment_r8_dora", "fpb")
    heads, *rows = table.texts()
    assert heads == ["right", *made.THREE, "unparsed", "rows"]
    assert sum(int(count) for row in rows for count in row[1:-1]) == 240 == sum(int(row[-1]) for row in rows)
    right = sum(int(row[heads.index(row[0])]) for row in rows)
    assert right == round(rows_of(shown, "sentiment_r8_dora", "fpb")[0].others["strict"].accuracy * 240)


def test_all_answers_can_be_looked_through_right_and_wrong(reported):
    folder, shown = reported
    link = "sentiment_r8_dora/fpb/answers.html"
    assert f'href="{link}"' in page(folder) and (folder / link).is_file()
    rows = answers_of(folder, "sentiment_r8_dora", "fpb")
    kept = [json.loads(line) for line in open(folder / "sentiment_r8_dora" / "fpb" / "answers.jsonl")]
    assert [(row[0], row[2], row[3]) for row in rows] == [(row["row"], row["target"], row["answer"]) for row in kept]
    scores = rows_of(shown, "sentiment_r8_dora", "fpb")[0]
    assert sum(row[5][0] for row in rows) == pytest.approx(scores.score.accuracy * 240)
    assert sum(row[5][2] for row in rows) == pytest.approx(scores.others["strict"].accuracy * 240)
    assert "seen in training" in rows[0][6] and not any("seen" in mark for mark in rows[1][6])
    assert {row[4] for row in rows if row[3] == "I think it is mixed."} == {"unparsed"}
    empty = answers_of(folder, "sentiment_r8_dora", "xbrl_term")[7]
    assert (empty[0], empty[3], empty[5], empty[6]) == (8, "", [0.0], ["empty"])
    question = answers_of(folder, "sentiment_r8_dora", "mmlu")[0]
    assert question[0] == "mmlu/1" and question[5] in ([0.0], [1.0])


def test_an_answer_of_several_tags_is_one_row(tmp_path):
    folder = made.subject(tmp_path, "one")
    made.answered(folder, "finer", [{"target": "A,B", "answer": "A,C"}, {"target": "B", "answer": "B"}])
    report(tmp_path)
    rows = answers_of(tmp_path, "one", "finer")
    assert [(row[0], row[5][0]) for row in rows] == [(1, 0.5), (2, 1.0)]


def test_corrected_labels_and_what_was_published_are_both_on_the_page_of_answers(reported):
    rows = answers_of(reported[0], "sentiment_r8_dora", "tfns")
    assert {row[6][-1] for row in rows if row[2] == "neutral"} == {"published label: positive"}
    assert not any("published" in mark for row in rows if row[2] == "negative" for mark in row[6])


def test_format_time_and_tokens(tmp_path):
    folder = made.subject(tmp_path, "one")
    rows = [{"target": "neutral", "answer": "neutral"} for _ in range(8)]
    rows[0] |= {"answer": " ", "stopped": False}
    rows[1] |= {"answer": "It is mixed"}
    made.answered(folder, "fpb", rows, seconds=4.0)
    (heads, row) = dict(report_module.tables(report(tmp_path).models[0]))["Format and time"].texts()
    shown = dict(zip(heads, row, strict=True))
    assert (shown["unparsed"], shown["most tokens"], shown["answers cut"]) == ("2 (25.0%)", "10", "1 (12.5%)")
    assert (shown["empty"], shown["rows/s"], shown["prompt tokens"], shown["answer tokens"]) == ("1", "2", "480", "16")


def test_the_same_results_give_the_same_bytes(everything):
    """In another process, with another order of sets."""
    report(everything)
    before = [(everything / name).read_bytes() for name in ("index.html", "README.md")]
    again = subprocess.run(
        [sys.executable, "-m", "finlora", "report", "--results", str(everything)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "7"},
    )
    assert again.returncode == 0, again.stderr
    assert re.search(r"\b3 .*\b5 ", again.stdout), "how many models and sets"
    assert before == [(everything / name).read_bytes() for name in ("index.html", "README.md")]


@pytest.mark.parametrize(
    ("about", "limit", "cut", "said"),
    [
        ({"lengths": "published", "targets_cut": 3, "max_new_tokens": 50}, "50 (FinLoRA's)", "3", 1),
        ({"lengths": "whole", "targets_cut": 0, "max_new_tokens": 311}, "311 (every target fits)", "0", 0),
        ({"max_new_tokens": 50}, "50", "–", 0),  # by an earlier version
    ],
)
def test_which_limit_answers_had_and_how_many_targets_it_cuts(tmp_path, about, limit, cut, said):
    folder = made.subject(tmp_path, "one")
    made.answered(folder, "xbrl_term", [{"target": "a", "answer": "b", "bertscore": 0.4}] * 8, **about)
    shown = report(tmp_path)
    heads, row = dict(report_module.tables(shown.models[0]))["Format and time"].texts()
    cells = dict(zip(heads, row, strict=True))
    assert (cells["most tokens"], cells["targets cut"]) == (limit, cut)
    assert notes(shown, "one", "LENGTHS=published", "xbrl_term 3 of 8") == said


# What a reader must know first


def test_a_tiny_model_other_files_and_limit_are_said(tmp_path):
    folder = made.subject(tmp_path, "sentiment_r8_dora.tiny", tiny=True, git={"commit": "abc", "changed": True})
    made.answered(folder, "fpb", made.label_rows(5, 1.0), rows=1212, limit=5, published_file=False)
    made.answered(folder, "fiqa", made.label_rows(5, 1.0))
    shown = report(tmp_path)
    for words in ("tiny",), ("published", "fpb$|fpb\\W"), ("fpb 5 of 1,212",), ("commit",), ("BASE=1",):
        assert notes(shown, folder.name, *words) == 1, words
    assert "5 <small>of 1,212</small>" in " ".join(page(tmp_path).split())
    assert [row.comparable for row in shown.models[0].rows] == [False, True]  # fpb, fiqa


def test_it_is_said_where_nobody_knows_what_was_trained_on(tmp_path):
    rows = [row | {"seen": None} for row in made.label_rows(5, 1.0)]
    made.answered(made.subject(tmp_path, "hub-adapter"), "fpb", rows)
    shown = report(tmp_path)
    assert notes(shown, "hub-adapter", "train", "known|unknown") == 1
    assert len(rows_of(shown, "hub-adapter", "fpb")) == 1


def test_another_prompt_of_the_base_is_said(everything):
    path = everything / BASE / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prompt": "raw"}))
    assert notes(report(everything), "sentiment_r8_dora", BASE, "prompt", "raw") == 1


def test_a_base_with_the_same_prompt_is_preferred_and_others_are_not_taken(everything):
    for name, facts in ("a-raw", {"prompt": "raw"}), ("b-4bit", {"bits": 4}), ("c-other", {"model": "other"}):
        made.answered(made.subject(everything, name, adapter=False, **facts), "fpb", made.label_rows(240, 0.5))
    subjects, _ = results.read(everything)
    assert results.base_of(subjects["sentiment_r8_dora"], subjects).name == BASE
    assert results.base_of(subjects[BASE], subjects) is None


def test_only_rows_that_both_answered_are_compared(everything):
    folder = everything / BASE / "fpb"
    kept = (folder / "answers.jsonl").read_text().splitlines(keepends=True)[:30]
    (folder / "answers.jsonl").write_text("".join(kept))
    about = json.loads((folder / "set.json").read_text())
    (folder / "set.json").write_text(json.dumps(about | {"evaluated": 30, "limit": 30}))
    row = rows_of(report(everything), "sentiment_r8_dora", "fpb")[0]
    assert (row.rows, row.difference["rows"]) == (48, 30)
    assert re.search(r"\b30 rows", (everything / "README.md").read_text())


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("fpb", {"sha256": "other"}, "SHA-256"),
        ("xbrl_term", {"encoder": "other, layer 3"}, "other, layer 3"),
    ],
)
def test_a_base_that_answered_something_else_gives_no_difference(everything, name, change, reason):
    path = everything / BASE / name / "set.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    shown = report(everything)
    assert rows_of(shown, "sentiment_r8_dora", name)[0].difference is None
    assert notes(shown, "sentiment_r8_dora", name, BASE, reason) == 1


# What is broken


def cut_line(folder):
    path = folder / "answers.jsonl"
    path.write_text(path.read_text()[:-30])


def drop_row(folder):
    path = folder / "answers.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def twice(folder):
    path = folder / "answers.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:-1], lines[0]]))


def rewrite(key, value):
    def change(folder):
        path = folder / "answers.jsonl"
        first, *rest = path.read_text().splitlines(keepends=True)
        row = json.loads(first)
        row[key] = value
        path.write_text("".join([json.dumps(row) + "\n", *rest]))

    return change


def set_json(**change):
    def write(folder):
        path = folder / "set.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    return write


# What harms fpb/, and what is said of it: the file in fpb/, its line, the key or set, and words.
BROKEN = {
    "unfinished": (lambda folder: (folder / "set.json").unlink(), "", None, None, ["unfinished", "48", "make eval"]),
    "cut": (cut_line, "answers.jsonl", 48, None, ["cut", "set.json"]),
    "not JSON": (lambda folder: (folder / "set.json").write_text("{"), "set.json", None, None, ["read"]),
    "not UTF-8": (
        lambda folder: (folder / "answers.jsonl").write_bytes(b"\xff\n"),
        "answers.jsonl",
        None,
        None,
        ["read", "utf-8", "set.json"],
    ),
    "no answers": (lambda folder: (folder / "answers.jsonl").unlink(), "answers.jsonl", None, None, ["there|missing"]),
    "a list": (lambda folder: (folder / "set.json").write_text("[]"), "set.json", None, None, ["object"]),
    "a row less": (drop_row, "answers.jsonl", None, None, ["47", "48", "set.json"]),
    "a row twice": (twice, "answers.jsonl", 48, None, ["row 1", "twice|duplicate", "set.json"]),
    "an answer that is a number": (rewrite("answer", 1), "answers.jsonl", 1, "answer", []),
    "a row that is no number": (rewrite("row", True), "answers.jsonl", 1, "row", []),
    "labels of another kind": (set_json(labels_used="mine"), "set.json", None, "labels_used", ["corrected"]),
    "another set": (set_json(set="tfns"), "set.json", None, "tfns", ["fpb/"]),
    "no metric": (set_json(metric=None), "set.json", None, "metric", []),
}


@pytest.mark.parametrize(("harm", "name", "number", "key", "words"), BROKEN.values(), ids=BROKEN)
def test_what_is_broken_is_named_and_stops_nothing_else(everything, capsys, harm, name, number, key, words):
    folder = everything / "sentiment_r8_dora" / "fpb"
    harm(folder)
    shown = report(everything)
    (line,) = warned(capsys)
    says(line, *words, "make eval|evaluate", file=folder / name, line=number, key=key)
    assert not rows_of(shown, "sentiment_r8_dora", "fpb") and rows_of(shown, "sentiment_r8_dora", "tfns")
    for text in page(everything), (everything / "README.md").read_text():
        assert line in unescape(text)


def test_a_missing_bertscore_is_named(everything, capsys):
    rewrite("bertscore", None)(everything / BASE / "xbrl_term")
    report(everything)
    (line,) = warned(capsys)
    says(line, "set.json", "evaluate", file=everything / BASE / "xbrl_term" / "answers.jsonl", line=1, key="bertscore")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model": 3}'])
def test_a_broken_run_json_is_named(everything, capsys, text):
    (everything / "sentiment_r8_lora" / "run.json").write_text(text)
    assert len(report(everything).models) == 2
    (line,) = warned(capsys)
    says(line, "evaluate", file=everything / "sentiment_r8_lora" / "run.json")


def test_answers_that_a_killed_evaluation_kept_are_named(everything, capsys):
    (everything / "killed").mkdir()
    for name in "killed", BASE:
        (everything / name / "answers.part.jsonl").write_text("[1]\n[2]\n")
    report(everything)
    for name, line in zip((BASE, "killed"), warned(capsys), strict=True):
        says(line, "unfinished", "2", "make eval", file=everything / name)


def test_results_set_aside_and_stray_files_are_passed_over(everything, capsys):
    shutil.copytree(everything / BASE, everything / "aside" / "earlier")
    (everything / ".hidden").mkdir()
    (everything / "notes.txt").write_text("mine")
    assert len(report(everything).models) == 3
    assert capsys.readouterr().err == ""


def test_nothing_to_report_on_is_one_line_that_says_what_to_do(tmp_path):
    for folder in tmp_path / "none", tmp_path:
        with refuses("no results", "make eval RECIPE=", file=folder):
            report(folder)
    made.answered(made.subject(tmp_path, "one"), "fpb", made.label_rows(5, 1.0))
    (tmp_path / "one" / "fpb" / "set.json").unlink()
    with refuses("finish", "make eval RECIPE=", file=tmp_path):
        report(tmp_path)
    assert not (tmp_path / "index.html").exists()


# Texts and numbers


class Strict(HTMLParser):
    """Fails at a tag that is not closed, closed twice or closed in another order; collects texts and ids."""

    VOID = {"meta", "link", "br", "wbr", "input"}

    def __init__(self, text: str):
        super().__init__()
        self.open, self.texts, self.ids, self.hrefs, self.tags = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"an attribute twice in <{tag}> at {self.getpos()}"
        self.ids += [value for name, value in attrs if name == "id"]
        self.hrefs += [value for name, value in attrs if name in ("href", "src")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in ("line", "circle", "polyline"), f"<{tag}/> is no closed element in HTML"

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> at {self.getpos()} closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_is_whole_html_that_needs_nothing_else(reported):
    folder = reported[0]
    pages = [folder / "index.html", *folder.glob("*/*/answers.html")]
    assert len(pages) == 1 + 3 * 5
    for path in pages:
        text = path.read_text(encoding="utf-8")
        assert text.startswith('<!doctype html>\n<html lang="en">')
        parsed = Strict(text)
        assert len(parsed.ids) == len(set(parsed.ids))
        for href in parsed.hrefs:
            assert href == "data:," or href[1:] in parsed.ids or (path.parent / href).is_file(), href
        assert "http" not in re.sub(r"<style>.*?</style>", "", text, flags=re.S) and "@import" not in text
        levels = [int(tag[1]) for tag in parsed.tags if re.fullmatch(r"h[1-6]", tag)]
        assert levels[0] == 1 and all(below - above <= 1 for above, below in zip(levels, levels[1:], strict=False))


HOSTILE = [
    "<script>alert(1)</script>",
    "</pre></details><h1>gone</h1>",
    "positive\u202e\u200b\x00\x1b[31m",
    "\ud800 half a character",
    "{{ 7 * 7 }} {% raw %}",
    "|a|b| &lt; &amp;",
]


@pytest.fixture
def hostile(everything):
    name = "a_very_long_name_" * 8 + "<b>&"
    folder = made.subject(
        everything, name, model="<i>model</i>|x", method="<u>", prompt="</style>", versions={"<x>": 1}
    )
    rows = [
        {"target": "positive", "answer": text, "context": f"{text}\n" + "long</details>" * 200 + "x" * 900}
        for text in HOSTILE
    ]
    made.answered(folder, "fpb", rows, file="<script>.jsonl")
    terms = [{"target": text, "answer": text, "bertscore": 0.1} for text in HOSTILE]
    made.answered(folder, "xbrl_term", terms)
    made.answered(folder, "xbrl_extract_formula_calculations", [{"target": "1" * 300, "answer": "2" * 3000}])
    return everything


def test_texts_of_the_model_and_the_data_stay_text(hostile):
    report(hostile)
    (folder,) = hostile.glob("a_very_long_name_*")
    parsed = Strict(page(hostile))
    assert (parsed.tags.count("script"), parsed.tags.count("h1")) == (1, 1) and not {"i", "u"} & set(parsed.tags)
    assert "<script>.jsonl" in "".join(parsed.texts) and "</style>" in "".join(parsed.texts)
    assert "<b>" not in (hostile / "README.md").read_text()
    for name in "fpb", "xbrl_term":
        parsed = Strict((folder / name / "answers.html").read_text(encoding="utf-8"))
        assert parsed.tags.count("script") == 3 and parsed.tags.count("h1") == 1
        shown = answers_of(hostile, folder.name, name)
        answers = [HOSTILE[0], HOSTILE[1], "positive\\u202e\\u200b\\u0000\\u001b[31m", "\\ud800 half a character"]
        assert [row[3] for row in shown] == [*answers, *HOSTILE[4:]]


def test_what_hides_in_a_text_is_made_visible():
    assert visible("  a\tb \n\n c  ") == "··a⇥\tb·↵\n↵\n·c··"
    assert visible("a\r\nb\xa0c") == "a\\u000d↵\nb\\u00a0c"
    long = visible("a" * 5000)
    assert "2,000" in long and len(long) < 3100
    assert visible("a" * 3100) == "a" * 3100


def test_numbers():
    assert [signed(value) for value in (0.0371, -0.0371, -0.00001)] == ["+3.71", "−3.71", "0.00"]
    assert [number(value) for value in (None, 12345, 12.55, 0.1234, 0.0)] == ["–", "12,345", "12.6", "0.123", "0"]


@pytest.mark.parametrize(("low", "high"), [(0.2, 9.15), (1.0, 1.0), (0.0, 0.0), (0.21, 0.22), (-3, 1e6)])
def test_an_axis_holds_its_values(low, high):
    marks = ticks(low, high)
    assert marks[0] <= low and marks[-1] >= high and 2 <= len(marks) <= 7


def test_axis_labels_that_would_overlap_are_left_out():
    axis = Axis(0, 1, [(1, "end"), (0, "0"), (0.01, "near"), (0.5, "middle")])
    assert [text for _, text in axis.spaced_labels()] == ["0", "middle", "end"]
    many = Axis(1, 64, [(2**power, f"{2**power / 1e5:g}") for power in range(7)], log=True)
    assert len(many.spaced_labels()) == 7 and len(Axis(1, 64, many.labels).spaced_labels()) < 7


@pytest.mark.parametrize(
    "log",
    [
        None,
        {},
        [],
        [3],
        [{"step": 1, "loss": 2.0}],
        [{"step": 1, "loss": "x"}, {"loss": 1}],
        [{"step": 1, "loss": float("nan")}] * 2,
    ],
)
def test_no_curve_without_two_logged_steps(log):
    assert curves(log) is None


def test_a_curve_lies_in_its_box():
    plot = curves(made.training_log())
    (loss, validation), (rate,) = (panel.series for panel in plot.panels)
    assert validation.points[-1].y == pytest.approx(made.training_log()[-1]["eval_loss"])
    assert (plot.axis.low, plot.axis.high, len(validation.points)) == (0, 400, 5)
    drawn = templates().get_template("core/plot.svg.jinja").module.plot(plot)
    lines = [line.split() for line in re.findall(r'points="([^"]+)"', drawn)]
    assert [len(line) for line in lines] == [len(loss.points), len(validation.points), len(rate.points)]
    assert all(0 <= float(place) <= 1 for line in lines for point in line for place in point.split(","))


def test_a_picture_of_the_curves_is_an_svg_with_each_of_them():
    picture = ElementTree.fromstring(train_curves.picture("mine", curves(made.training_log())))
    assert picture.tag == "{http://www.w3.org/2000/svg}svg"
    texts = " ".join(picture.itertext())
    for words in "mine", "loss, at the end", "validation loss, at the end", "learning rate, at the end 0.0001":
        assert words in texts
    assert len(list(picture.iter("{http://www.w3.org/2000/svg}polyline"))) == 3


# A real browser


@pytest.fixture
def browser(tmp_path):
    """Run a headless browser on a file: returns (stdout, its lines from the page's console)."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not found:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH: the page was not opened in a browser")

    def run(file: Path, *options: str) -> tuple[str, list[str]]:
        profile = tmp_path / "profile"
        shutil.rmtree(profile, ignore_errors=True)
        quiet = (
            "disable-gpu disable-quic no-first-run disable-background-networking disable-component-update disable-sync"
        )
        command = [found, "--headless=new", "--no-sandbox", *(f"--{option}" for option in quiet.split())]
        command += ["--enable-logging=stderr", "--v=0", "--hide-scrollbars", f"--user-data-dir={profile}"]
        done = subprocess.run(
            [*command, *options, file.as_uri()], capture_output=True, text=True, timeout=120, errors="replace"
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return run


MEASURE = """<script>document.querySelectorAll("details").forEach(d => d.open = true);
parent.document.title = "measured " + document.documentElement.scrollWidth + " " + innerWidth;
console.log("the console is read");</script>"""


@pytest.mark.parametrize("width", [400, pytest.param(1200, marks=pytest.mark.slow)])
def test_a_browser_shows_the_page_without_errors_and_without_sideways_scrolling(hostile, browser, tmp_path, width):
    report(hostile)
    # A window cannot be as narrow as a telephone, a frame can.
    inside = escape(page(hostile).replace("</body>", f"{MEASURE}</body>"))
    probe = tmp_path / "probe.html"
    frame = f'<!doctype html><iframe srcdoc="{inside}" style="width: {width}px; height: 900px; border: 0"></iframe>'
    probe.write_text(frame, encoding="utf-8")
    dom, said = browser(probe, "--window-size=1300,1000", "--dump-dom")
    wide, window = map(int, re.search(r"<title>measured (\d+) (\d+)</title>", dom).groups())
    assert window == width and wide <= window
    assert len(said) == 1 and "the console is read" in said[0]


USE_TABLE = """<script>
const all = selector => [...document.querySelectorAll(selector)], table = all("table")[0];
const names = () => [...table.tBodies[0].rows].filter(row => !row.hidden).map(row => row.cells[0].innerText.trim());
const head = text => all("table thead th").find(head => head.textContent.startsWith(text));
const type = (which, text) => {
  const input = document.querySelector(`[data-filters=${which}]`);
  input.value = text;
  input.dispatchEvent(new Event("input"));
};
const found = {};
head("fpb").querySelector("button").click();
found.highest = names();
head("fpb").querySelector("button").click();
found.lowest = names();
head("model").querySelector("button").click();
found.named = names();
type("rows", "r8_dora rslora");
found.filtered = names();
type("columns", "bertscore, formula");
found.columns = [...table.tHead.rows[0].cells].filter(cell => !cell.hidden)
  .map(cell => cell.firstChild.firstChild.textContent.trim());
type("columns", "");
type("rows", "");
found.hints = all(".hint").filter(hint => hint.offsetHeight > 0).length;
found.wider = all(".box").filter(box => box.offsetHeight > 0 && box.scrollWidth > box.clientWidth).length;
parent.document.title = JSON.stringify(found);
</script>"""

USE_ANSWERS = """<script>
const choose = (id, value) => { at(id).value = value; at(id).dispatchEvent(new Event("input")); };
const found = {all: at("count").textContent, first: document.querySelectorAll("article").length};
at("next").click();
found.next = at("count").textContent;
choose("which", "wrong");
found.wrong = at("count").textContent;
choose("scoring", [...at("scoring").options].find(option => option.text === "strict").value);
found.strict = at("count").textContent;
found.pair = at("pair").options[1].textContent;
choose("pair", at("pair").options[1].value);
found.of_pair = at("count").textContent;
choose("words", "no such words");
found.none = at("count").textContent;
parent.document.title = JSON.stringify(found);
</script>"""


def in_frame(browser, folder: Path, file: Path, script: str, width: int) -> dict:
    """What the script says after it has used the page, in a frame of this width."""
    inside = escape(file.read_text(encoding="utf-8").replace("</body>", f"{script}</body>"))
    probe = folder / "probe.html"
    frame = f'<!doctype html><iframe srcdoc="{inside}" style="width: {width}px; height: 900px; border: 0"></iframe>'
    probe.write_text(frame, encoding="utf-8")
    dom, said = browser(probe, "--window-size=1400,1000", "--dump-dom")
    assert said == []
    return json.loads(unescape(re.search(r"<title>(.*?)</title>", dom)[1]))


@pytest.mark.parametrize("width", [400, pytest.param(1280, marks=pytest.mark.slow)])
def test_a_browser_sorts_and_filters_and_hints_at_what_is_out_of_sight(reported, browser, tmp_path, width):
    folder, shown = reported
    found = in_frame(browser, tmp_path, folder / "index.html", USE_TABLE, width)
    table = overview(shown, "Models")
    by_score = sorted(table, key=lambda name: float(table[name]["fpb"].split()[0]))
    plain = [re.sub(r"[()]", "", name) for name in by_score]
    assert found["lowest"] == plain and found["highest"] == plain[::-1]
    assert found["named"][-1] == "sentiment_r8_lora" and sorted(found["named"]) == sorted(plain)
    assert found["filtered"] == ["FinLoRA rsLoRA published", "sentiment_r8_dora"]
    assert found["columns"] == ["model", "xbrl_term", "formula"]
    assert found["hints"] == found["wider"] and (found["wider"] > 0 or width > 400)


def test_a_browser_looks_through_the_answers(reported, browser, tmp_path):
    folder, shown = reported
    found = in_frame(browser, tmp_path, folder / "sentiment_r8_dora" / "fpb" / "answers.html", USE_ANSWERS, 400)
    row = rows_of(shown, "sentiment_r8_dora", "fpb")[0]
    wrong, strict = (round(240 * (1 - score.accuracy)) for score in (row.score, row.others["strict"]))
    assert (found["all"], found["first"], found["next"]) == ("1 to 50 of 240", 50, "51 to 100 of 240")
    assert (found["wrong"], found["strict"]) == (f"1 to {wrong} of {wrong}", f"1 to {min(strict, 50)} of {strict}")
    count = re.search(r" → .* \((\d+)\)$", found["pair"])[1]
    assert found["of_pair"] == f"1 to {count} of {count}" and found["none"] == "none"


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_screenshot_is_not_blank(reported, browser, tmp_path, scheme):
    from PIL import Image

    shot = tmp_path / "shot.png"
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    _, said = browser(reported[0] / "index.html", "--window-size=400,1200", f"--screenshot={shot}", *dark)
    assert said == []
    with Image.open(shot) as image:
        assert image.size == (400, 1200)
        colours = image.convert("RGB").getcolors(2**24)
        (_, paper) = max(colours)
        assert len(colours) > 100
        assert (sum(paper) > 3 * 200) == (scheme == "light")
