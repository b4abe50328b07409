"""Intervals and paired differences: against scipy, sums by hand, and what must hold whatever the rows are."""

import random
import time
from collections import Counter
from math import comb

import numpy as np
import pytest
from failures import refuses
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, binom, binomtest, norm, t

from finlora.data.tasks import TestSet
from finlora.evaluate import statistics as stats
from finlora.evaluate.scorers import bertscore_items, codes, f1, finlora, summary
from finlora.evaluate.statistics import STATISTICS, _around, _deviations, interval, paired

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
def test_a_deviation_is_what_one_item_more_changes(statistic, rows, data):
    """Measured: one item more beside very many copies of all."""
    items, copies = items_of(rows), 3000
    value, deviations = _deviations(items, statistic)
    assert value == pytest.approx(summary(items)[statistic]) and deviations.mean() == pytest.approx(0, abs=1e-12)
    place = data.draw(st.sampled_from(range(len(deviations))))
    target, predicted, classes = codes(items)
    more = np.full(len(target), float(copies))
    more[place] += 1
    counts = [np.bincount(of, weights=more, minlength=classes + 1)[:classes] for of in (target, predicted)]
    counts.append(np.bincount(target, weights=more * (target == predicted), minlength=classes))
    scores = {"accuracy": counts[2].sum() / more.sum()}
    scores["weighted_f1"], scores["macro_f1"] = f1(*counts)
    assert (scores[statistic] - value) * more.sum() == pytest.approx(deviations[place], abs=0.05)


@pytest.mark.parametrize("statistic", STATISTICS)
@given(rows=ROWS, level=st.sampled_from([0.1, 0.95]), groups=st.sampled_from([1, 2, 15]))
def test_an_interval_holds_the_score_and_has_width(statistic, rows, level, groups):
    items = items_of(rows)
    items["group"] = [row // groups for row in items["row"]]
    low, high = interval(items, statistic, level=level)
    score = summary(items)[statistic]
    assert 0 <= low <= score + 1e-9 and score - 1e-9 <= high <= 1 and high - low > 0.001
    wider = interval(items, statistic, level=0.99)
    assert wider.low <= low + 1e-9 and high <= wider.high + 1e-9


@pytest.mark.parametrize(("right", "rows"), [(0, 1), (1, 1), (43, 43), (42, 43), (0, 43), (117, 235), (1200, 1212)])
def test_rows_that_stand_alone_have_the_exact_interval(right, rows):
    items = items_of([[("a", "a" if row < right else "b")] for row in range(rows)])
    for level in (0.8, 0.95):
        expected = binomtest(right, rows).proportion_ci(level)
        assert interval(items, level=level) == pytest.approx((expected.low, expected.high), abs=1e-9)


@pytest.mark.parametrize("rows", [1, 43, 235, 1212])
def test_the_interval_of_lone_rows_covers_every_share(rows):
    """Summed over all counts of right answers, so without chance."""
    right = np.arange(rows + 1)
    ends = np.array(
        [_around(k / rows, np.repeat([1 - k / rows, -k / rows], [k, rows - k]), np.arange(rows), 0.95) for k in right]
    )
    for share in [*np.linspace(0.5, 1, 26), 0.99, 0.995, 0.999]:
        covered = (ends[:, 0] <= share + 1e-12) & (share - 1e-12 <= ends[:, 1])
        assert binom.pmf(right, rows, share)[covered].sum() >= 0.95 - 1e-9, share


# NER's 98 sentences are asked 17 to 204 times.
SIZES = [17] * 50 + [34] * 25 + [51] * 13 + [85] * 6 + [119] * 2 + [153, 204]


@pytest.mark.parametrize(("share", "agree"), [(0.6, 1.0), (0.6, 0.5), (0.9, 1.0), (0.98, 1.0), (0.98, 0.0)])
def test_groups_are_covered_whether_their_rows_agree_or_not(share, agree):
    draw, group = np.random.default_rng(1), np.repeat(np.arange(len(SIZES)), SIZES)
    covered = alarms = 0
    for _ in range(200):
        one, other = (draw_answers(draw, group, share, agree) for _ in range(2))
        low, high = _around(one.mean(), one - one.mean(), group, 0.95)
        covered += low <= share <= high
        a, b = (
            {"row": list(range(len(group))), "group": group, "target": [""] * len(group), "right": list(answers)}
            for answers in (one, other)
        )
        alarms += paired(a, b, resamples=200)["distinguishable"]
    # 0.95 and 0.05 of 200, and three standard deviations of chance
    assert covered >= 181 and alarms <= 19


def draw_answers(draw, group, share, agree) -> np.ndarray:
    """Right (1) or wrong (0): the rows of a group alike with probability `agree`, else each for itself."""
    of_group, alone = draw.random(group.max() + 1)[group], draw.random(len(group))
    return (np.where(draw.random(group.max() + 1)[group] < agree, of_group, alone) < share).astype(float)


def test_copies_add_nothing_and_independent_rows_do():
    alone = items_of([[("a", "a" if row % 5 else "b")] for row in range(100)])
    copies = items_of([[("a", "a" if row // 20 % 5 else "b")] for row in range(2000)]) | {
        "group": [row // 20 for row in range(2000)]
    }
    apart = items_of([[("a", "a" if row % 5 else "b")] for row in range(2000)]) | {"group": copies["group"]}
    widths = [high - low for low, high in map(interval, (alone, copies, apart))]
    assert widths[1] == pytest.approx(widths[0], rel=0.03)  # Student's t of 99 degrees of freedom is 1.2% wider
    assert widths[2] < widths[0] / 2


@pytest.mark.parametrize(("groups", "size"), [(2, 2), (10, 2), (10, 4), (60, 3)])
def test_groups_that_agree_are_as_many_answers_less_what_students_t_takes(groups, size):
    items = items_of([[("a", "a" if row // size % 2 else "b")] for row in range(groups * size)])
    items["group"] = [row // size for row in range(groups * size)]
    for level in (0.8, 0.95):
        tail = (1 - level) / 2
        number = groups * (norm.isf(tail) / t.isf(tail, groups - 1)) ** 2
        expected = beta.ppf([tail, 1 - tail], [number / 2, number / 2 + 1], [number / 2 + 1, number / 2])
        assert interval(items, level=level) == pytest.approx(tuple(expected))


def test_an_interval_is_as_wide_as_the_normal_approximation():
    items = answers(1000, 0.6, 1)
    score = summary(items)["accuracy"]
    half = 1.96 * (score * (1 - score) / 1000) ** 0.5
    assert interval(items) == pytest.approx((score - half, score + half), abs=0.002)
    low, high = interval(items, level=0.8)
    assert high - low == pytest.approx(2 * half * 1.2816 / 1.96, rel=0.04)
    values = [0.2, 0.4, 0.9, 0.7] * 100
    assert interval(bertscore_items(values)) == pytest.approx(
        (np.mean(values) - 1.96 * np.std(values) / 20, np.mean(values) + 1.96 * np.std(values) / 20), abs=0.002
    )
    few = [0.40, 0.42, 0.44, 0.38, 0.36]
    half = t.isf(0.025, 4) * np.std(few) / 5**0.5
    assert interval(bertscore_items(few)) == pytest.approx((0.4 - half, 0.4 + half), abs=0.01)


def test_the_f1_interval_is_as_wide_as_redrawn_rows_say():
    rows = [[item] for item in zip(*(answers(400, 0.7, 2)[key] for key in ("target", "predicted")), strict=True)]
    draw = random.Random(3)
    for statistic in ("weighted_f1", "macro_f1"):
        redrawn = [summary(items_of(draw.choices(rows, k=400)))[statistic] for _ in range(300)]
        low, high = interval(items_of(rows), statistic)
        assert high - low == pytest.approx(2 * 1.96 * np.std(redrawn), rel=0.15)  # 4% by chance of 300


def test_the_tags_of_a_row_stay_together():
    # Four tags that are right or wrong together are one observation: twice the width of four independent ones.
    together = items_of([[("a", "a" if row % 2 else "b")] * 4 for row in range(200)])
    alone = items_of([[item] for item in zip(together["target"], together["predicted"], strict=True)])
    wide, narrow = (high - low for low, high in map(interval, (together, alone)))
    assert wide / narrow == pytest.approx(2, rel=0.05)


def test_what_is_not_certain_has_width():
    """Of n answers that are all right 0.025 ** (1 / n) is the exact lower end, whatever the score is called."""
    for rows, items in ((5, items_of([[("a", "a")]] * 5)), (3, bertscore_items([1.0] * 3))):
        assert interval(items) == pytest.approx((0.025 ** (1 / rows), 1))
    assert interval(items_of([[("a", "a")]] * 5), "macro_f1") == pytest.approx((0.025**0.2, 1))
    low, high = interval(bertscore_items([0.3] * 50))
    assert low < 0.29 < 0.31 < high
    one_answer = items_of([[("a", "a")] * 4])
    assert interval(one_answer) == (0, 1)  # one observation of a share that tags may have in part


@given(rows=ROWS, random=st.randoms(), groups=st.sampled_from([1, 3]))
def test_swapping_the_two_changes_the_sign(rows, random, groups):
    a, b = items_of(rows), items_of(swapped(rows, random))
    a["group"] = b["group"] = [row // groups for row in a["row"]]
    forward, back = paired(a, b, resamples=60), paired(b, a, resamples=60)
    assert forward["difference"] == pytest.approx(summary(b)["accuracy"] - summary(a)["accuracy"], abs=1e-12)
    assert [-back["difference"], -back["high"], -back["low"]] == pytest.approx(
        [forward["difference"], forward["low"], forward["high"]], abs=1e-9
    )
    assert (back["p"], back["only_b"], back["only_a"]) == (forward["p"], forward["only_a"], forward["only_b"])
    assert back["distinguishable"] == forward["distinguishable"]
    assert forward["low"] <= forward["difference"] <= forward["high"] and 0 < forward["p"] <= 1
    assert forward["rows"] == len(rows) >= forward["only_a"] + forward["only_b"]
    assert forward["groups"] == len(set(a["group"]))


def test_a_difference_is_as_sure_as_the_normal_approximation():
    a, b = answers(1500, 0.6, 1), answers(1500, 0.7, 2)
    gain = np.array(b["right"]) - np.array(a["right"])
    result = paired(a, b)
    half = 1.96 * gain.std() / 1500**0.5
    assert (result["low"], result["high"]) == pytest.approx((gain.mean() - half, gain.mean() + half), abs=0.003)
    draw = np.random.default_rng(4)
    values = draw.uniform(0.3, 0.6, 200)
    other = values + draw.normal(0.03, 0.05, 200)
    result = paired(bertscore_items(values), bertscore_items(other))
    half = 1.96 * (other - values).std() / 200**0.5
    assert (result["low"], result["high"]) == pytest.approx(
        ((other - values).mean() - half, (other - values).mean() + half), abs=0.002
    )


@given(rows=ROWS)
def test_a_subject_does_not_differ_from_itself(rows):
    items = items_of(rows)
    result = paired(items, items, resamples=30)
    low, high = result.pop("low"), result.pop("high")
    assert low == pytest.approx(-high) and 0 < high <= 1  # other rows could tell them apart
    same = {"difference": 0.0, "p": 1.0, "only_a": 0, "only_b": 0, "rows": len(rows), "groups": len(rows)}
    assert result == same | {"distinguishable": False}


def test_gains_and_losses_exclude_each_other():
    """A row that gains cannot lose: the variance of their difference is more than the sum of theirs."""
    a = items_of([[("a", "ab"[row % 2])] for row in range(400)])
    b = items_of([[("a", "ba"[row % 2])] for row in range(400)])
    result = paired(a, b)
    assert (result["low"], result["high"]) == pytest.approx((-1.96 / 20, 1.96 / 20), rel=0.05)
    # 20 of 100 gain and none loses: Clopper and Pearson's ends of both.
    a, b = (items_of([[("a", "a" if row >= start else "b")] for row in range(100)]) for start in (20, 0))
    gains, losses = (binomtest(count, 100).proportion_ci() for count in (20, 0))
    result = paired(a, b)
    assert result["low"] == pytest.approx(0.2 - np.hypot(0.2 - gains.low, losses.high))
    assert result["high"] == pytest.approx(gains.high)


def test_f1_where_nobody_names_the_last_class():
    items = items_of([[("a", "a")], [("b", "a")], [("b", "a")], [("c", "a")]])
    for statistic in ("weighted_f1", "macro_f1"):
        low, high = interval(items, statistic)
        assert low < summary(items)[statistic] < high


def test_equal_answers_bound_a_difference():
    """Of n rows none differs: each may gain or lose up to the exact bound of 0 of n."""
    items = answers(235, 0.8, 1)
    bound = 1 - 0.025 ** (1 / 235)
    result = paired(items, items)
    assert (result["low"], result["high"]) == pytest.approx((-bound, bound))


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


def test_a_difference_is_of_2000_resamples_from_seed_0():
    draw = random.Random(5)
    a, b = (bertscore_items([draw.random() for _ in range(37)]) for _ in "ab")
    assert paired(a, b) == paired(a, b, 2000, 0, 0.95) != paired(a, b, seed=1)


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
    # Five rows better and none worse: the interval is above 0, but McNemar's p is 2 / 2**5.
    few = [items_of([[("x", "x" if row >= start else "y")] for row in range(20)]) for start in (5, 0)]
    result = paired(*few)
    assert result["p"] == 2 / 2**5 and result["low"] > 0 and not result["distinguishable"]
    # All better, but one so much more that the next ones may be anything.
    result = paired(bertscore_items([0.2] * 10), bertscore_items([0.21] * 9 + [0.9]))
    assert result["p"] < 0.01 and result["low"] < 0 and not result["distinguishable"]
    # 12 of 20: sure by both, but not at a level that p does not reach.
    few[0] = items_of([[("x", "x" if row >= 12 else "y")] for row in range(20)])
    assert paired(*few)["low"] > 0 and paired(*few)["distinguishable"]
    assert not paired(*few, level=1 - 2 / 2**12)["distinguishable"]


def test_rows_about_one_text_are_one_observation():
    """204 copies of a row in which b is better are no reason to prefer b; 20 such texts are."""
    for groups, sure in ((1, False), (20, True)):
        a = items_of([[("x", "y")]] * 204 + [[("x", "x")]] * 40)
        b = items_of([[("x", "x")]] * 244)
        a["group"] = b["group"] = [row % groups for row in range(204)] + list(range(204, 244))
        result = paired(a, b)
        assert (result["only_b"], result["rows"], result["groups"]) == (204, 244, groups + 40)
        assert result["distinguishable"] == sure and (result["p"] < 0.001) == sure


def test_the_false_alarms_of_equal_subjects_are_few():
    alarms = Counter(
        paired(answers(60, 0.7, 2 * seed + 1), answers(60, 0.7, 2 * seed + 2), resamples=200)["distinguishable"]
        for seed in range(100)
    )
    assert alarms[True] <= 11  # 5% of 100, and three standard deviations


def test_a_big_set_takes_seconds():
    a, b = answers(20500, 0.8, 1), answers(20500, 0.81, 2)
    start = time.process_time()
    paired(a, b)
    interval(a, "macro_f1")
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
    with refuses("statistic", "accuracy, weighted_f1, macro_f1", key="acuracy"):
        interval(items, "acuracy")
    with refuses("macro_f1", "class", "accuracy"):
        interval(bertscore_items([0.5]), "macro_f1")
    nothing = bertscore_items([])
    for score in (interval, lambda items: paired(items, items)):
        with refuses("answers", "evaluate"):
            score(nothing)
