"""The scorers: FinLoRA's rules against a restatement of them, the strict rules, and what holds on every test set."""

import os
import re
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from failures import refuses
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from finlora.data import tasks
from finlora.data.rows import read_rows
from finlora.data.tasks import load_tasks
from finlora.evaluate.scorers import _earliest, _lowered, bertscore_items, f1, finlora, read, scorings, strict, summary

ROOT = Path(__file__).resolve().parent.parent
TESTS = {name: spec for entry in load_tasks().values() for name, spec in entry.tests.items()}
SCORED = [name for name, spec in TESTS.items() if spec.metric != "bertscore_f1"]
SEVEN = TESTS["nwgi"].labels
# Targets in the form of the test sets whose rows are not at hand.
MADE = {
    "nwgi": SEVEN * 2,
    "headline": ["Yes", "No", "No"],
    "ner": ["location", "person", "organization"],
    "finer": ["Goodwill,DebtInstrumentFaceAmount,Goodwill", "LineOfCredit, Goodwill", "DebtInstrument"],
    "fnxl": ["LineOfCreditFacilityMaximumBorrowingCapacity,LineOfCredit", "Goodwill"],
    "xbrl_extract_tags": ["us-gaap:Assets", "us-gaap:AssetsCurrent", "us-gaap:Revenues"],
    "xbrl_extract_value": ["25337", "2533", "0.0525", "-14", "2021-12-31"],
    "xbrl_extract_formula": ["us-gaap:Liabilities / us-gaap:Assets", "(us-gaap:Assets / us-gaap:Revenues) * 100"],
    "xbrl_extract_formula_calculations": ["(27314000000 / 146516000000) * 100", "37540 / 12420", "3 - 5"],
    **{name: ["A", "B", "C", "B"] for name in ("cfa_level1", "cfa_level2", "cfa_level3", "cpa_reg")},
}


@pytest.fixture
def targets_of(request):
    """A test set's targets: real ones, or made ones for the sets whose rows are not at hand."""

    def targets(name: str) -> list[str]:
        if name in MADE:
            return MADE[name]
        return [row.target for row in read_rows(request.getfixturevalue("shared") / TESTS[name].file)]

    return targets


def spec_of(metric: str = "accuracy_f1", labels: list[str] | None = None) -> tasks.TestSet:
    return tasks.unlisted_set({"metric": metric, "labels": labels})


def right(items) -> list[float]:
    return items["right"]


def finlora_label(answer: str, labels) -> str:
    return _earliest(answer, _lowered(labels)) or answer


# What holds on every test set


def test_the_nineteen_sets_and_their_scorings():
    assert len(TESTS) == 19 and len(SCORED) == 17
    ways = {name: list(scorings(name, spec)) for name, spec in TESTS.items()}
    assert ways.pop("xbrl_term") == ways.pop("financebench") == []
    assert ways.pop("nwgi") == ["finlora", "read", "strict", "three classes"]
    for name in ("formula", "xbrl_extract_value", "xbrl_extract_formula_calculations"):
        assert ways.pop(name) == ["finlora", "read", "strict", "within 1%"]
    assert set(map(tuple, ways.values())) == {("finlora", "read", "strict")}


@pytest.mark.parametrize("name", SCORED)
def test_perfect_answers_score_one_and_garbage_nothing(name, targets_of):
    targets = targets_of(name)
    for way, score in scorings(name, TESTS[name]).items():
        perfect = summary(score(targets, targets))
        assert (perfect["accuracy"], perfect["weighted_f1"], perfect["macro_f1"]) == (1.0, 1.0, 1.0), way
        assert perfect["unparsed"] == 0 and perfect["items"] >= len(targets), way
        for garbage in ("###", ""):
            worst = summary(score([garbage] * len(targets), targets))
            assert (worst["accuracy"], worst["weighted_f1"], worst["macro_f1"]) == (0.0, 0.0, 0.0), (way, garbage)
            assert worst["unparsed"] == worst["items"] == perfect["items"], (way, garbage)
        if way != "finlora":
            prose = summary(score(["I am sorry, I cannot answer this question"] * len(targets), targets))
            assert (prose["accuracy"], prose["unparsed"]) == (0.0, prose["items"]), way


@pytest.mark.parametrize("name", SCORED)
def test_shifted_answers_lose_by_every_rule(name, targets_of):
    targets = targets_of(name)
    answers = targets[1:] + targets[:1]
    for way, score in scorings(name, TESTS[name]).items():
        items = score(answers, targets)
        result = summary(items)
        assert 0 <= result["accuracy"] < 1 and 0 <= result["weighted_f1"] < 1 and 0 <= result["macro_f1"] < 1, way
        assert set(items["right"]) <= {0.0, 1.0}


def test_no_score_depends_on_the_hash_seed():
    code = (
        "from finlora.data.tasks import unlisted_set\nfrom finlora.evaluate.scorers import *\n"
        "targets = ['1', '15', '150.0', '15.0', '5.0', '0', 'A', 'a', 'ab', *'BbCcDdEe'] * 3\n"
        "answers = ['150.0', '15', 'x 15.0 1', 'ab', 'A5', '0.150'] * 8 + ['A', 'a', '15']\n"
        "for metric in ('accuracy', 'accuracy_f1', 'tag_accuracy_f1'):\n"
        "    for way in (finlora, strict):\n"
        "        print(way(unlisted_set({'metric': metric, 'labels': None}), answers, targets))\n"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(printed) == 1 and printed.pop().count(b"right") == 6


# FinLoRA's rules

ALPHABET = "abAB15.0 ,-\n"
LABELS = st.lists(st.text(ALPHABET.replace(",", ""), min_size=1, max_size=5), min_size=1, max_size=6)


def restated(targets: list[str], answers: list[str], tags: bool) -> tuple[list[str], list[str]]:
    """Targets and classes by shared/finlora/FACTS.md: a regular expression takes the leftmost, longest label first."""
    pairs = []
    for answer, target in zip(answers, targets, strict=True):
        answer = answer.split("Answer:")[-1].strip()
        if tags:
            parts = [part.strip().replace("\n", "") for part in answer.split(",")]
            for place, tag in enumerate(target.split(",")):
                pairs.append((tag.strip().replace("\n", ""), parts[place] if place < len(parts) else ""))
        else:
            pairs.append((target, answer))
    alternatives = sorted({re.escape(target) for target, _ in pairs if target}, key=len, reverse=True)
    pattern = re.compile("|".join(alternatives) or "(?!)", re.IGNORECASE)
    classes = []
    for target, answer in pairs:
        first = pattern.search(answer)
        hit = (first[0] if first else answer).upper() == target.upper()
        classes.append(target if hit else answer)
    return [target for target, _ in pairs], classes


@given(st.data(), st.booleans())
def test_finlora_equals_the_restatement(data, tags):
    text = st.one_of(st.text(ALPHABET, max_size=12), st.just("Answer:"))
    targets = data.draw(LABELS)
    if tags:
        targets = [",".join(data.draw(LABELS)) for _ in targets]
    labels = [label for target in targets for label in target.split(",")]
    piece = st.one_of(text, st.sampled_from(labels), st.sampled_from(targets).map(str.swapcase))
    answers = [data.draw(st.lists(piece, max_size=3).map("".join)) for _ in targets]
    spec = spec_of("tag_accuracy_f1" if tags else "accuracy_f1")
    items = finlora(spec, answers, targets)
    expected, classes = restated(targets, answers, tags)
    assert (items["target"], items["predicted"]) == (expected, classes)
    assert items["right"] == [float(one == other) for one, other in zip(classes, expected, strict=True)]


@pytest.mark.parametrize("name", ["fpb", "fiqa", "tfns", "formula"])
def test_finlora_equals_the_restatement_on_real_rows(name, targets_of):
    targets = targets_of(name)
    forms = ["{}", "The answer is {}.", "{} or rather {}", "{}5", "-{}", "\n\n{}", "Answer: {}\nInput:", "no idea"]
    others = targets[7:] + targets[:7]
    answers = [
        forms[row % len(forms)].format(*((other, target) if row % 3 else (target, other)))
        for row, (target, other) in enumerate(zip(targets, others, strict=True))
    ]
    items = finlora(TESTS[name], answers, targets)
    assert (items["target"], items["predicted"]) == restated(targets, answers, False)
    assert 0 < summary(items)["accuracy"] < 1


@given(st.text(ALPHABET, max_size=12), LABELS, st.randoms())
def test_the_order_of_labels_counts_for_nothing(answer, labels, random):
    first = finlora_label(answer, labels)
    random.shuffle(labels)
    assert finlora_label(answer, labels) == finlora_label(answer, set(labels)) == first
    assert first in labels or first == answer


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("150.0", "150.0"),
        ("15", "15"),
        ("1500", "150"),
        ("about 15.0", "15.0"),
        ("-15", "15"),
        ("POSITIVE", "positive"),
        ("not neutral but positive", "neutral"),
        ("positive, neutral or positive", "positive"),
        ("unknown", "unknown"),
        ("", ""),
    ],
)
def test_the_earliest_label_then_the_longest(answer, label):
    labels = ["15", "150", "150.0", "15.0", "positive", "neutral", "", "1"]
    assert {finlora_label(answer, order) for order in list(permutations(labels, len(labels)))[::997]} == {label}


def test_labels_that_differ_in_case_are_one():
    assert finlora_label("YES", ["yes", "Yes"]) == finlora_label("YES", ["Yes", "yes"]) == "Yes"
    assert right(finlora(spec_of(), ["YES", "yes"], ["yes", "Yes"])) == [1.0, 1.0]


def test_finlora_takes_the_targets_as_labels_and_not_the_tables():
    spec = spec_of(labels=["negative", "neutral", "positive"])
    assert right(finlora(spec, ["neutral positive"], ["positive"])) == [1.0]
    assert right(finlora(spec, ["neutral positive", ""], ["positive", "neutral"])) == [0.0, 0.0]


def test_for_f1_a_wrong_answer_is_its_own_class():
    # So F1 is made of recall alone: 2 r / (1 + r). FinLoRA's LoRA on FPB: accuracy 85.64%, F1 0.922.
    targets = ["up"] * 10000
    answers = ["up."] * 8564 + ["down."] * 1436
    items = finlora(spec_of(), answers, targets)
    assert set(items["predicted"]) == {"up", "down."}
    assert summary(items)["weighted_f1"] == pytest.approx(2 * 0.8564 / 1.8564) == pytest.approx(0.9226, abs=1e-4)
    assert summary(finlora(spec_of(), ["down", "down"], ["up", "down"]))["weighted_f1"] == pytest.approx(1 / 3)


def test_the_f1_of_a_wrong_answer_with_a_line_break_is_that_of_the_label():
    """FinLoRA strips an answer first: of 1,212 FPB rows answered "\\nneutral" weighted F1 is 0.4518 and not 0.6015."""
    targets = ["neutral"] * 729 + ["positive"] * 338 + ["negative"] * 145
    result = summary(finlora(TESTS["fpb"], ["\nneutral"] * 1212, targets))
    assert result == summary(finlora(TESTS["fpb"], ["neutral"] * 1212, targets))
    assert result["weighted_f1"] == pytest.approx(f1_score(targets, ["neutral"] * 1212, average="weighted"))
    assert result["weighted_f1"] == pytest.approx(0.4518, abs=5e-5)


def test_what_stands_after_the_last_answer_counts():
    answers = ["Answer: positive", "negative. Answer: positive\nAnswer:\n neutral ", "positive Answer:", "answer: up"]
    items = finlora(spec_of(), answers, ["positive", "neutral", "positive", "down"])
    assert items["right"] == [1.0, 1.0, 0.0, 0.0]
    assert items["predicted"] == ["positive", "neutral", "", "answer: up"]


def test_a_line_break_within_a_tag_is_none():
    spec = spec_of("tag_accuracy_f1")
    assert right(finlora(spec, ["Line\nOfCredit,\nGoodwill\n"], ["LineOfCredit,Good\nwill"])) == [1.0, 1.0]


def test_tags_by_their_place():
    spec = spec_of("tag_accuracy_f1")
    targets = ["Goodwill,LineOfCredit,Goodwill", "LineOfCreditFacility"]
    for way in (finlora, strict):
        items = way(spec, [" goodwill , linEofcredit", "LineOfCreditFacility,Goodwill,Goodwill"], targets)
        assert items["row"] == [0, 0, 0, 1]
        assert items["target"] == ["Goodwill", "LineOfCredit", "Goodwill", "LineOfCreditFacility"]
        assert items["right"] == [1.0, 1.0, 0.0, 1.0]
        assert items["unparsed"] == [False, False, True, False]
    assert right(finlora(spec, ["1. Goodwill, x LineOfCredit", ""], targets)) == [1.0, 1.0, 0.0, 0.0]
    items = strict(spec, ["1. Goodwill, LineOfCreditFacility, Other", ""], targets)
    assert items["predicted"] == ["unparsed", "LineOfCreditFacility", "other", "unparsed"]


# The strict rules


@pytest.mark.parametrize(
    ("answer", "predicted"),
    [
        ("positive", "positive"),
        (" Positive.\n", "positive"),
        ('"POSITIVE"', "positive"),
        ("**positive**", "positive"),
        ("{positive}", "positive"),
        ("strong  positive", "strong positive"),
        ("neutral", "neutral"),
        ("The sentiment is positive", "unparsed"),
        ("positive/neutral", "unparsed"),
        ("posit", "unparsed"),
        ("", "unparsed"),
    ],
)
def test_a_strict_answer_is_the_label(answer, predicted):
    spec = spec_of(labels=["positive", "neutral", "strong positive"])
    items = strict(spec, [answer], ["positive"])
    assert items["predicted"] == [predicted]
    assert (items["right"], items["unparsed"]) == ([predicted == "positive"], [predicted == "unparsed"])


@given(
    st.sampled_from(SCORED),
    st.data(),
    st.sampled_from(["{}", " {}\n", '"{}"', "{}.", "\t“{}”  ", "**{}**"]),
    st.sampled_from([str, str.upper, str.lower, str.swapcase]),
)
def test_case_space_and_quotes_count_for_nothing(name, data, form, case):
    target = data.draw(st.sampled_from(MADE.get(name) or ["positive", "neutral"] * (name != "formula") or ["15092.44"]))
    if TESTS[name].metric == "tag_accuracy_f1":
        answer = ",".join(form.format(case(tag)) for tag in target.split(","))
    else:
        answer = form.format(case(target))
    for way, score in scorings(name, TESTS[name]).items():
        assert set(right(score([answer], [target]))) == {1.0}, way


@pytest.mark.parametrize(
    ("answer", "target", "exact", "near"),
    [
        ("15,092.44", "15092.44", True, True),
        ("$15,092.4378", "15092.44", True, True),
        ("15092.45", "15092.44", False, True),
        ("15243.0", "15092.44", False, True),
        ("15245.0", "15092.44", False, False),
        ("0.333", "0.33", True, True),
        ("0.34", "0.33", False, False),
        ("(1,499.76)", "-1499.76", True, True),
        ("-$1499.76", "-1499.76", True, True),
        ("−1499.76", "-1499.76", True, True),
        ("1499.76", "-1499.76", False, False),
        ("1.52e12", "1520000000000.0", True, True),
        ("3.04%", "0.03", True, True),
        ("12.5 %", "12.5", True, True),
        ("15.4%", "15%", False, False),
        ("1500%", "15%", False, False),
        ("15%", "1500%", False, False),
        ("0.5", "5", False, False),
        (".50", "0.5", True, True),
        ("5.", "5.0", True, True),
        ("0.00", "0.0", True, True),
        ("0.1", "0.0", False, False),
    ],
)
def test_numbers(answer, target, exact, near):
    ways = scorings("formula", TESTS["formula"])
    for way, expected in (("strict", exact), ("within 1%", near)):
        items = ways[way]([answer], [target])
        assert (items["right"], items["unparsed"]) == ([expected], [False]), way


@pytest.mark.parametrize(
    "answer",
    ["", "NPV = 5.0", "5.0 USD", "five", "1,50", "1.2.3", "10/2", "nan", "inf", "1e999", "5.0 5.0", "(5.0", "$"],
)
def test_what_is_no_number_is_a_format_failure(answer):
    for way in ("strict", "within 1%"):
        items = scorings("formula", TESTS["formula"])[way]([answer], ["5.0"])
        assert (items["predicted"], items["right"], items["unparsed"]) == (["unparsed"], [0.0], [True])


@pytest.mark.parametrize(
    ("answer", "exact", "near", "unparsed"),
    [
        ("(27314000000/146516000000)*100", True, True, False),
        ("27,314,000,000 ÷ $146,516,000,000 × 100", True, True, False),
        ("Margin = 100 * 27314000000 / 146516000000 = 18.64", True, True, False),
        ("18.64", False, False, True),
        ("18.642332304993", False, False, True),
        ("-(2)", False, False, True),
        ("100 * 27500000000 / 146516000000", False, True, False),
        ("27314000000 * 146516000000 ^ -1 * 10 ^ 2", True, True, False),
        ("(27314000000 / 5536000000) * 100", False, False, False),
        ("27314000000 / 0", False, False, True),
        ("9**9**9**9**9", False, False, True),
        ("(-8)^(1/3)", False, False, True),
        ("(" * 400 + "1" + ")" * 400, False, False, True),
        ("(" * 40 + "1", False, False, True),
        ("0 + " * 200 + "(27314000000 / 146516000000) * 100", False, False, True),
        ("5(3)", False, False, True),
        ("__import__('os')", False, False, True),
        ("us-gaap:Revenues / 2", False, False, True),
        ("", False, False, True),
    ],
)
def test_calculations_by_their_value(answer, exact, near, unparsed):
    name = "xbrl_extract_formula_calculations"
    for way, expected in (("strict", exact), ("within 1%", near)):
        items = scorings(name, TESTS[name])[way]([answer], ["(27314000000 / 146516000000) * 100"])
        assert (items["right"], items["unparsed"]) == ([expected], [unparsed]), way


def test_a_calculation_of_zero_is_a_calculation():
    name = "xbrl_extract_formula_calculations"
    for kind in "strict", "read":
        assert scorings(name, TESTS[name])[kind](["(5 - 5) / 3", "5 - 4"], ["(7 - 7) / 3"] * 2)["right"] == [1, 0], kind


def test_extracted_values_are_exact_and_dates_are_no_sums():
    spec = TESTS["xbrl_extract_value"]
    targets = ["0.0525", "25337", "2021-12-31", "2021-12-31", "10-K"]
    items = strict(spec, ["0.053", "$25,337", "2021-11-32", "2021-12-31", "10-K"], targets)
    assert items["right"] == [0.0, 1.0, 0.0, 1.0, 1.0]
    assert right(strict(spec, ["5.25%", "25337.0", "1978", "1978", "-10"], targets)) == [0.0, 1.0, 0.0, 0.0, 0.0]
    targets = ["34728000000", "16.15", "5%", "1" + "0" * 40]
    assert right(strict(spec, ["34728000020", "1615%", "0.05", "1" + "0" * 39 + "1"], targets)) == [0.0] * 4
    assert right(strict(spec, ["$34,728,000,000", "16.150", "5.0 %", "1e40"], targets)) == [1.0] * 4


def test_formulas_as_text():
    spec = TESTS["xbrl_extract_formula"]
    target = "(us-gaap:Liabilities / us-gaap:Assets) * 100"
    answers = ["(us-gaap:Liabilities/us-gaap:Assets)*100", "us-gaap:Assets", "the formula is us-gaap:Assets"]
    items = strict(spec, answers, [target] * 3)
    assert items["right"] == [1.0, 0.0, 0.0] and items["unparsed"] == [False, False, True]


def test_nwgi_in_three_classes():
    answers = ["mildly positive", "strong positive", "positive", "neutral", "mildly negative", "very bad", "negative"]
    ways = scorings("nwgi", TESTS["nwgi"])
    items = ways["three classes"](answers, SEVEN)
    assert items["target"] == ["negative"] * 3 + ["neutral"] + ["positive"] * 3
    assert items["predicted"] == ["positive", "positive", "positive", "neutral", "negative", "unparsed", "negative"]
    assert items["unparsed"] == [False] * 5 + [True, False]
    assert right(ways["three classes"](SEVEN, SEVEN[1:] + SEVEN[:1])) == [1, 1, 0, 0, 1, 1, 0]
    assert sum(right(ways["strict"](SEVEN, SEVEN[1:] + SEVEN[:1]))) == 0
    assert right(ways["strict"](["Mildly Positive.", "positive"], ["mildly positive", "mildly positive"])) == [1.0, 0.0]


def test_three_classes_without_a_table_are_those_of_the_targets():
    score = scorings("nwgi", TESTS["nwgi"].model_copy(update={"labels": None}))["three classes"]
    assert right(score(["positive", "negative"], ["strong positive", "neutral"])) == [1.0, 0.0]


def test_a_label_in_brackets_is_itself_where_the_table_has_it():
    spec = spec_of(labels=["(a)", "a", "b"])
    assert strict(spec, ["(a)", "(b)"], ["b", "b"])["predicted"] == ["(a)", "b"]


def test_a_wrong_number_is_the_class_that_it_spells():
    items = strict(spec_of("accuracy"), ["1e3", "9"], ["5.0", "1E3"])
    assert items["predicted"] == ["1E3", "9"]


def test_tags_are_texts_even_where_they_are_numbers():
    for way in (read, strict):
        assert right(way(spec_of("tag_accuracy_f1"), ["5.00, 6"], ["5.0, 6"])) == [0.0, 1.0]


def test_several_words_are_an_answer_where_the_target_is_several():
    items = strict(spec_of(), ["gross margin", "gross margin"], ["net income", "income"])
    assert items["predicted"] == ["gross margin", "unparsed"]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("2^3", 1.0),
        ("'2 * 4'", 1.0),
        ("X2 * 4X", 0.0),
        ("-8 * -1", 1.0),
        ("800% / 1", 1.0),
        ("True * 8", 0.0),
        ("8 * = 16 / 2", 1.0),
        ("8*1 " + "+0" * 248, 1.0),
        ("8*1  " + "+0" * 248, 0.0),
    ],
    ids=lambda value: str(value)[:12],
)
def test_what_a_calculation_may_hold(answer, expected):
    """Powers, quotes, signs, percentages, at most 500 characters; no names, and the first part that is one."""
    assert right(strict(spec_of(), [answer], ["8 * 1"])) == [expected]


def test_zero_equals_zero_exactly():
    for share in (0.0, 0.01):
        assert right(strict(spec_of(), ["0.00", "0.001"], ["0", "0"], share=share)) == [1.0, 0.0]


def test_a_target_outside_the_tables_labels_is_an_answer():
    items = strict(spec_of(labels=["A", "B"]), ["C", "B", "D"], ["C", "B", "B"])
    assert items["predicted"] == ["C", "B", "unparsed"]


TEXTS = st.text("abAB15.0 ,-/%()$eE*^=+", max_size=10)


@given(
    st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6),
    st.sampled_from(["accuracy", "accuracy_f1", "tag_accuracy_f1"]),
    st.sampled_from([None, ["a", "B", "1"]]),
    st.randoms(),
)
def test_what_holds_for_any_answers(pairs, metric, labels, random):
    answers, targets = zip(*pairs, strict=True)
    spec = spec_of(metric, labels)
    near = strict(spec, answers, targets, share=0.01)
    for items in (finlora(spec, answers, targets), strict(spec, answers, targets), near):
        assert len({len(column) for column in items.values()}) == 1 and set(items["row"]) == set(range(len(pairs)))
        assert set(items["right"]) <= {0.0, 1.0}
        columns = (items[key] for key in ("right", "target", "predicted", "unparsed"))
        for one, target, predicted, unparsed in zip(*columns, strict=True):
            assert (predicted == target) == bool(one) and not (one and unparsed)
        result = summary(items)
        assert all(result[key] is None or 0 <= result[key] <= 1 for key in ("accuracy", "weighted_f1", "macro_f1"))
    assert all(one <= other for one, other in zip(right(strict(spec, answers, targets)), near["right"], strict=True))
    for way in (finlora, strict):
        assert set(right(way(spec, targets, targets))) == {1.0}
        # The order of rows moves the items and changes none.
        rows = list(range(len(pairs)))
        random.shuffle(rows)
        moved = way(spec, [answers[row] for row in rows], [targets[row] for row in rows])
        by_row = {row: [] for row in rows}
        for place, one in zip(moved["row"], moved["right"], strict=True):
            by_row[rows[place]].append(one)
        assert [one for row in sorted(by_row) for one in by_row[row]] == right(way(spec, answers, targets))


# Summaries


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abcde")), min_size=1, max_size=30))
def test_summary_equals_scikit_learn(pairs):
    targets, predicted = (list(column) for column in zip(*pairs, strict=True))
    hits = [float(one == other) for one, other in pairs]
    items = {"row": list(range(len(pairs))), "target": targets, "predicted": predicted, "right": hits}
    result = summary(items | {"unparsed": [name == "e" for name in predicted]})
    assert result["accuracy"] == pytest.approx(sum(hits) / len(hits))
    assert result["weighted_f1"] == pytest.approx(f1_score(targets, predicted, average="weighted", zero_division=0))
    macro = f1_score(targets, predicted, labels=sorted(set(targets)), average="macro", zero_division=0)
    assert result["macro_f1"] == pytest.approx(macro)
    assert (result["unparsed"], result["items"]) == (predicted.count("e"), len(pairs))


def test_f1_of_several_counts_at_once():
    """Each row of counts has its own scores, and a class without targets counts in neither mean."""
    support, claims, hits = np.array([[[4, 0, 2], [1, 3, 0]], [[2, 1, 3], [0, 4, 0]], [[2, 0, 1], [0, 3, 0]]])
    weighted, macro = f1(support, claims, hits)
    assert weighted == pytest.approx([(4 * 2 / 3 + 2 * 0.4) / 6, 3 * (6 / 7) / 4])
    assert macro == pytest.approx([(2 / 3 + 0.4) / 2, (6 / 7) / 2])


def test_bertscore_items_have_a_mean_and_no_classes():
    items = bertscore_items([0.5, 0.0, 1.0])
    assert items["row"] == [0, 1, 2] and items["target"] == items["predicted"] == [""] * 3
    scores = {"accuracy": 0.5, "weighted_f1": None, "macro_f1": None, "unparsed": 0, "items": 3, "groups": 3}
    assert summary(items) == scores
    assert summary(items | {"group": [0, 1, 0]}) == scores | {"groups": 2}


def test_no_answers_are_an_error_and_no_score():
    for items in (bertscore_items([]), finlora(spec_of(), [], []), strict(spec_of(), [], [])):
        with refuses("answers", "evaluate"):
            summary(items)
    with pytest.raises(ValueError):
        finlora(spec_of(), ["a"], [])
