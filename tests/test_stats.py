"""Intervals and paired differences: against scikit-learn, sums by hand, and what must hold whatever the rows are."""

import random
import time
from collections import Counter
from math import comb

import numpy as np
import pytest
from failures import refuses
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from finlora.data.tasks import TestSet
from finlora.evaluate import statistics as stats
from finlora.evaluate.scorers import bertscore_items, finlora, summary
from finlora.evaluate.statistics import STATISTICS, _resampled, _totals, interval, paired

# Rows of one to three items, as (target, predicted).
ROWS = st.lists(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abcde")), min_size=1, max_size=3),
    min_size=1,
    max_size=15,
)


def items_of(rows: list[list[tuple[str, str]]]) -> dict[str, list]:
    flat = [(row, *item) for row, items in enumerate(rows) for item in items]
    return {
        "row": [row for row, _, _ in flat],
        "target": [target for _, target, _ in flat],
        "predicted": [predicted for _, _, predicted in flat],
        "right": [float(target == predicted) for _, target, predicted in flat],
        "unparsed": [False for _ in flat],
    }


def answers(count: int, share: float, seed: int, classes: str = "abc", per_row: int = 1) -> dict[str, list]:
    """Items with the same targets for every seed and share, and about that share of right answers."""
    targets, own = random.Random(0), random.Random(seed)
    draw = targets.choices(classes, k=count * per_row)
    flat = [(target, target if own.random() < share else own.choice(classes)) for target in draw]
    return items_of([flat[start : start + per_row] for start in range(0, len(flat), per_row)])


def swapped(rows, random) -> list[list[tuple[str, str]]]:
    return [[(target, random.choice("abcde")) for target, _ in items] for items in rows]


@pytest.mark.parametrize("statistic", STATISTICS)
@given(rows=ROWS, data=st.data())
def test_a_resample_scores_like_its_rows_written_out(statistic, rows, data):
    drawn = data.draw(st.lists(st.sampled_from(range(len(rows))), min_size=1, max_size=20))
    totals, score = _totals(items_of(rows), statistic)
    value = score(np.bincount(drawn, minlength=len(rows)) @ totals)
    written_out = items_of([rows[row] for row in drawn])
    assert value == pytest.approx(summary(written_out)[statistic])
    target, predicted = written_out["target"], written_out["predicted"]
    if statistic == "accuracy":
        expected = sum(one == other for one, other in zip(target, predicted, strict=True)) / len(target)
    else:
        labels = sorted(set(target))
        expected = f1_score(target, predicted, labels=labels, average=statistic.removesuffix("_f1"), zero_division=0)
    assert value == pytest.approx(expected)


def test_rows_are_drawn_whole_evenly_and_repeatably():
    drawn = np.concatenate(list(_resampled(7, 3000, 1)))
    assert drawn.shape == (3000, 7) and set(drawn.sum(axis=1)) == {7}
    assert drawn.mean(axis=0) == pytest.approx(np.ones(7), abs=0.08)
    assert drawn.var() == pytest.approx(1 - 1 / 7, abs=0.03)  # of a binomial count of 7 draws at 1/7 each
    assert (drawn == np.concatenate(list(_resampled(7, 3000, 1)))).all()
    big = list(_resampled(20500, 250, 0))
    assert sum(len(part) for part in big) == 250 and len(big) > 1


@pytest.mark.parametrize("statistic", STATISTICS)
@given(rows=ROWS, seed=st.integers(0, 5), level=st.sampled_from([0.1, 0.95]))
def test_an_interval_holds_the_score(statistic, rows, seed, level):
    items = items_of(rows)
    low, high = interval(items, statistic, resamples=50, seed=seed, level=level)
    assert 0 <= low <= summary(items)[statistic] + 1e-12 and summary(items)[statistic] - 1e-12 <= high <= 1 + 1e-12
    assert interval(items, statistic, resamples=50, seed=seed, level=level) == (low, high)


def test_an_interval_is_as_wide_as_the_normal_approximation():
    items = answers(1000, 0.6, 1)
    score = summary(items)["accuracy"]
    half = 1.96 * (score * (1 - score) / 1000) ** 0.5
    assert interval(items) == pytest.approx((score - half, score + half), abs=0.004)
    low, high = interval(items, level=0.8)
    assert high - low == pytest.approx(2 * half * 1.2816 / 1.96, rel=0.08)
    values = [0.2, 0.4, 0.9, 0.7] * 100
    assert interval(bertscore_items(values)) == pytest.approx(
        (np.mean(values) - 1.96 * np.std(values) / 20, np.mean(values) + 1.96 * np.std(values) / 20), abs=0.004
    )


def test_the_tags_of_a_row_stay_together():
    # Four tags that are right or wrong together are one observation: twice the width of four independent ones.
    together = items_of([[("a", "a" if row % 2 else "b")] * 4 for row in range(200)])
    alone = items_of([[item] for item in zip(together["target"], together["predicted"], strict=True)])
    wide, narrow = (high - low for low, high in map(interval, (together, alone)))
    assert wide / narrow == pytest.approx(2, rel=0.1)


def test_equal_rows_have_no_width():
    assert interval(items_of([[("a", "a")]] * 5), "macro_f1") == (1.0, 1.0)
    assert interval(bertscore_items([0.0] * 3)) == (0.0, 0.0)


@pytest.mark.parametrize("statistic", STATISTICS)
@given(rows=ROWS, random=st.randoms())
def test_swapping_the_two_changes_the_sign(statistic, rows, random):
    a, b = items_of(rows), items_of(swapped(rows, random))
    forward, back = paired(a, b, statistic, resamples=60), paired(b, a, statistic, resamples=60)
    assert forward["difference"] == pytest.approx(summary(b)[statistic] - summary(a)[statistic], abs=1e-12)
    assert [-back["difference"], -back["high"], -back["low"]] == pytest.approx(
        [forward["difference"], forward["low"], forward["high"]], abs=1e-12
    )
    assert (back["p"], back["only_b"], back["only_a"]) == (forward["p"], forward["only_a"], forward["only_b"])
    assert back["distinguishable"] == forward["distinguishable"]
    assert forward["low"] <= forward["difference"] <= forward["high"] and 0 < forward["p"] <= 1
    assert forward["rows"] == len(rows) >= forward["only_a"] + forward["only_b"]


@given(rows=ROWS, statistic=st.sampled_from(STATISTICS))
def test_a_subject_does_not_differ_from_itself(rows, statistic):
    items = items_of(rows)
    same = {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0, "only_a": 0, "only_b": 0, "rows": len(rows)}
    assert paired(items, items, statistic, resamples=30) == same | {"distinguishable": False}


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (0, 1), (1, 5), (9, 3), (0, 6), (20, 20), (40, 62)])
def test_mcnemar_equals_the_sum_by_hand(only_a, only_b):
    rows = [("ab", "a")] * only_a + [("ab", "b")] * only_b + [("ab", "ab")] * 7 + [("ab", "")] * 3
    a, b = (items_of([[("x", "x" if name in who else "y")] for _, who in rows]) for name in "ab")
    result = paired(a, b, resamples=20)
    count = only_a + only_b
    tail = sum(comb(count, k) for k in range(min(only_a, only_b) + 1)) / 2**count
    assert result["p"] == pytest.approx(min(1.0, 2 * tail if count else 1.0))
    assert (result["only_a"], result["only_b"], result["rows"]) == (only_a, only_b, count + 10)


def test_sign_flips_equal_all_flips_written_out():
    rng = random.Random(3)
    a = [rng.random() for _ in range(12)]
    b = [value + rng.gauss(0.05, 0.1) for value in a]
    differences = np.array(b) - np.array(a)
    signs = 1 - 2 * ((np.arange(2**12)[:, None] >> np.arange(12)) & 1)
    exact = (abs(signs @ differences) >= abs(differences.sum()) - 1e-12).mean()
    result = paired(bertscore_items(a), bertscore_items(b), resamples=20000)
    assert 0.01 < exact < 0.9 and result["p"] == pytest.approx(exact, abs=0.015)
    assert result["only_a"] + result["only_b"] == 12


def test_flips_that_tie_count_and_are_summed_over_all_chunks(monkeypatch):
    """Of three equal differences a quarter of all flips are as far from 0; a float's noise hides none."""
    monkeypatch.setattr(stats, "CHUNK", 64)
    result = paired(bertscore_items([0.1, 0.2, 0.3]), bertscore_items([0.4, 0.5, 0.6]), resamples=4000)
    assert result["p"] == pytest.approx(0.25, abs=0.03)


def test_figures_are_of_2000_resamples_from_seed_0():
    draw = random.Random(5)
    a, b = (bertscore_items([draw.random() for _ in range(37)]) for _ in "ab")
    assert interval(a) == interval(a, "accuracy", 2000, 0, 0.95) != interval(a, seed=1)
    assert paired(a, b) == paired(a, b, "accuracy", 2000, 0, 0.95) != paired(a, b, seed=1)


def test_rows_of_several_tags_are_compared_whole():
    spec = TestSet.model_construct(metric="tag_accuracy_f1", labels=None)
    targets = ["A,B,C"] * 40
    a, b = finlora(spec, ["A,x,x"] * 40, targets), finlora(spec, ["A,B,x"] * 39 + ["x"], targets)
    result = paired(a, b)
    assert (result["only_a"], result["only_b"], result["rows"]) == (1, 39, 40)
    assert result["p"] == pytest.approx(1 / 2001) and result["distinguishable"]
    assert result["difference"] == pytest.approx((78 - 40) / 120)


def test_distinguishable_needs_the_interval_and_the_test():
    a, b = answers(400, 0.6, 1), answers(400, 0.8, 2)
    assert paired(a, b)["distinguishable"] and not paired(a, answers(400, 0.61, 3))["distinguishable"]
    # Five rows better and none worse: no resample without a gain is likely, but McNemar's p is 2 / 2**5.
    few = [items_of([[("x", "x" if row >= start else "y")] for row in range(20)]) for start in (5, 0)]
    result = paired(*few)
    assert result["low"] > 0 and result["p"] == 0.0625 and not result["distinguishable"]
    # b answers 35 rows more of 110 right, but loses half of a small class: the interval of macro F1 holds 0.
    a = items_of([[("m", "m")]] * 60 + [[("m", "z")]] * 40 + [[("n", "n")]] * 10)
    b = items_of([[("m", "m")]] * 100 + [[("n", "n")]] * 5 + [[("n", "z")]] * 5)
    result = paired(a, b, "macro_f1")
    assert result["low"] < 0 < result["high"] and result["p"] < 1e-6 and not result["distinguishable"]
    assert paired(a, b)["distinguishable"]


def test_the_false_alarms_of_equal_subjects_are_few():
    alarms = Counter(
        paired(answers(60, 0.7, 2 * seed + 1), answers(60, 0.7, 2 * seed + 2), resamples=200)["distinguishable"]
        for seed in range(100)
    )
    assert alarms[True] <= 11  # 5% of 100, and three standard deviations


def test_a_big_set_takes_seconds():
    a, b = answers(20500, 0.8, 1), answers(20500, 0.81, 2)
    start = time.process_time()
    paired(a, b, "macro_f1")
    assert time.process_time() - start < 5


def test_other_rows_are_refused():
    a = items_of([[("a", "a")], [("b", "b")], [("c", "c")]])
    fewer = items_of([[("a", "a")], [("b", "b")]])
    other = items_of([[("a", "a")], [("c", "b")], [("c", "c")]])
    for items, *words in ((fewer, "3", "2"), (other, "row 2", "target"), (items_of([]), "3", "0")):
        with refuses(*words, "evaluate both", "LIMIT"):
            paired(a, items)
    one, two = items_of([[("a", "a")], [("b", "b")]]), items_of([[("a", "a")], [("b", "b"), ("c", "c")]])
    three = items_of([[("a", "a")], [("b", "b")], [("c", "c")] * 2])
    for first, second, row in ((one, two, 2), (two, one, 2), (three, a, 3)):  # a tag more in the last row
        with refuses(f"row {row}", "evaluate both", "LIMIT"):
            paired(first, second)


def test_what_cannot_be_scored_is_said():
    items = items_of([[("a", "a")]])
    for score in (interval, lambda items, statistic: paired(items, items, statistic)):
        with refuses("statistic", "accuracy, weighted_f1, macro_f1", key="acuracy"):
            score(items, "acuracy")
        with refuses("answers", "evaluate"):
            score(bertscore_items([]), "accuracy")
        with refuses("macro_f1", "class", "accuracy"):
            score(bertscore_items([0.5]), "macro_f1")
