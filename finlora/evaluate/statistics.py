"""How sure a score is: intervals, and paired differences of two models on the same rows.

Rows that belong together (finlora/data/groups.py) and the tags of one answer are one observation: intervals and tests
work on groups. A score is a mean over items; from how far the sums over groups scatter follows how many independent
answers the items amount to, and Clopper and Pearson's interval is taken for that number, as Korn and Graubard (Survey
Methodology 24, 1998) do for surveys. bench/intervals.py measures how often all of this is right.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from finlora.core.errors import UserError
from finlora.evaluate.scorers import Items, codes

STATISTICS = ("accuracy", "weighted_f1", "macro_f1")
NOISE = 1e-9  # of floats; BERTScore is measured to 1e-7
CHUNK = 2**21  # random signs held at a time
# How groups scatter is not known from a few wrong answers. This much of a group whose items agree is added to what is
# seen: from 0 to 1 the intervals of bench/intervals.py cover enough, and become wider where items do not agree.
PRIOR = 0.5


class Interval(NamedTuple):
    low: float
    high: float


def interval(items: Items, statistic: str = "accuracy", level: float = 0.95) -> Interval:
    """Where the score of `items` would be if there were as many rows as one likes; each end 0 to 1.

    The exact interval where rows stand alone and are right or wrong; never without width. F1 is taken to first order.
    Raises UserError where there are no items, and for F1 where there are no classes.
    """
    value, deviations = _deviations(items, statistic)
    return _around(value, deviations, _groups(items), level)


def average(scores: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """The plain mean of scores (each with the ends of its interval) and its interval.

    The intervals are of sets of rows and independent: theirs are combined by squares of the distances to the ends
    (MOVER, Zou and Donner 2008).
    """
    values, lows, highs = np.array(scores, float).T
    mean = float(values.mean())
    below, above = np.linalg.norm(values - lows), np.linalg.norm(highs - values)
    return mean, mean - float(below) / len(values), mean + float(above) / len(values)


def paired(items_a: Items, items_b: Items, resamples: int = 2000, seed: int = 0, level: float = 0.95) -> dict[str, Any]:
    """How far b is from a on the same rows.

    difference (b - a of the mean of right) with its interval low, high, which has width even where both answer alike;
    p, two-sided, for "neither is better": the exact McNemar test where each group is one right or wrong item, otherwise
    a sign-flip permutation test of the groups' differences with `resamples` flips, so never below 1 / (resamples + 1);
    only_a and only_b, the rows in which one does better; rows; groups. `distinguishable` is true only when the interval
    excludes 0 and p is below 1 - level.
    Raises UserError where the rows or their targets differ, and where there are none.
    """
    if (items_a["row"], items_a["target"]) != (items_b["row"], items_b["target"]):
        raise UserError(_difference(items_a, items_b))
    gain = _right(items_b) - _right(items_a)
    group = _groups(items_a)
    low, high = _around_difference(gain, group, level)
    by_row = np.bincount(np.unique(items_a["row"], return_inverse=True)[1], weights=gain)
    only_a, only_b = int((by_row < 0).sum()), int((by_row > 0).sum())
    by_group = np.bincount(group, weights=gain)
    if len(by_group) == len(gain) and np.isin(gain, (-1, 0, 1)).all():
        p = float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    else:
        p = _sign_flip(by_group, resamples, seed)
    return {
        "difference": float(gain.mean()),
        "low": low,
        "high": high,
        "p": p,
        "only_a": only_a,
        "only_b": only_b,
        "rows": len(by_row),
        "groups": len(by_group),
        "distinguishable": not low <= 0 <= high and p < 1 - level,
    }


def _deviations(items: Items, statistic: str) -> tuple[float, np.ndarray]:
    """The statistic of all items, and by how much each item moves it (times their number; 0 on average)."""
    if statistic not in STATISTICS:
        raise UserError(f"{statistic!r} is no statistic; choose one of {', '.join(STATISTICS)}")
    right = _right(items)
    if statistic == "accuracy":
        return float(right.mean()), right - right.mean()
    if not any(items["target"]):
        raise UserError(f"{statistic} needs classes and these items have none; use accuracy, the mean of their values")
    target, predicted, classes = codes(items)
    hit = target == predicted
    support = np.bincount(target, minlength=classes)
    both = support + np.bincount(predicted, minlength=classes + 1)[:classes]
    # Predictions outside the targets' classes have a last class, which counts for nothing.
    score = np.append(2 * np.bincount(target[hit], minlength=classes) / both, 0.0)
    weight = support if statistic == "weighted_f1" else np.full(classes, len(target) / classes)
    slope = np.append(weight / both, 0.0)
    value = float(weight @ score[:-1] / len(target))
    # F = 2 hits / (support + claims), so dF = (2 dhits - F (dsupport + dclaims)) / (support + claims).
    moved = slope[target] * (2 * hit - score[target]) - slope[predicted] * score[predicted]
    if statistic == "weighted_f1":  # whose weights move too
        moved = moved + score[target] - value
    return value, moved


def _around(value: float, deviations: np.ndarray, group: np.ndarray, level: float) -> Interval:
    """The interval around a mean of values from 0 to 1, given each one's deviation from it and its group.

    The design effect is how many times more the groups' sums scatter than if items were independent: at most about the
    size of the group that an average item is in, where the items of a group always agree.
    """
    count, squares = len(deviations), float((deviations**2).sum())
    size = float((np.bincount(group) ** 2).sum() / count)  # of the group that an average item is in
    scatter = float((np.bincount(group, weights=deviations) ** 2).sum())
    effect = max(1.0, (scatter + PRIOR * size**2) / (squares + PRIOR * size))
    # How many right or wrong answers scatter as little as one of these items: 1 where items are right or wrong.
    worth = count * value * (1 - value) / squares if squares > NOISE * count else 1.0
    number = count * worth / effect
    if size > 1 or not math.isclose(worth, 1):  # the scatter is estimated: Student's t is wider than the normal
        freedom, tail = count / size - 1, (1 - level) / 2
        number *= (stats.norm.isf(tail) / stats.t.isf(tail, freedom)) ** 2 if freedom > 0 else 0.0
    return _clopper_pearson(number * value, number * (1 - value), level)


def _clopper_pearson(right: float, wrong: float, level: float) -> Interval:
    """Of `right` answers beside `wrong` ones, which need not be whole numbers (scipy's binomtest asks for those)."""
    tail = (1 - level) / 2
    low = stats.beta.ppf(tail, right, wrong + 1) if right > NOISE else 0.0
    high = stats.beta.isf(tail, right + 1, wrong) if wrong > NOISE else 1.0
    return Interval(float(low), float(high))


def _around_difference(gain: np.ndarray, group: np.ndarray, level: float) -> Interval:
    """The interval of the mean of b - a, from those of what b gains and what b loses (MOVER, Zou 2007)."""
    means, intervals, sums = [], [], []
    for part in (np.maximum(gain, 0), np.maximum(-gain, 0)):
        means.append(float(part.mean()))
        intervals.append(_around(means[-1], part - means[-1], group, level))
        sums.append(np.bincount(group, weights=part - means[-1]))
    scale = float(np.linalg.norm(sums[0]) * np.linalg.norm(sums[1]))
    correlation = float(sums[0] @ sums[1]) / scale if scale else 0.0

    def span(gained: float, lost: float) -> float:
        return math.sqrt(max(0.0, gained**2 + lost**2 - 2 * correlation * gained * lost))

    (more, less), (gains, losses) = means, intervals
    return Interval(
        more - less - span(more - gains.low, losses.high - less),
        more - less + span(gains.high - more, less - losses.low),
    )


def _right(items: Items) -> np.ndarray:
    if not items["right"]:
        raise UserError("there are no answers to score; evaluate at least one row")
    return np.array(items["right"], float)


def _groups(items: Items) -> np.ndarray:
    """The group of each item, counted from 0 without gaps; a row is one where no groups are known."""
    return np.unique(items.get("group", items["row"]), return_inverse=True)[1]


def _sign_flip(differences: np.ndarray, resamples: int, seed: int) -> float:
    differences = differences[differences != 0]
    observed = abs(differences.sum()) * (1 - 1e-9)  # a float's noise must not hide a tie
    generator = np.random.default_rng(seed)
    step = max(1, CHUNK // max(1, len(differences)))
    beyond = 0
    for start in range(0, resamples, step):
        signs = generator.integers(0, 2, (min(step, resamples - start), len(differences)), dtype=np.int8) * 2 - 1
        beyond += int((abs(signs @ differences) >= observed).sum())
    return (beyond + 1) / (resamples + 1)


def _difference(items_a: Items, items_b: Items) -> str:
    rows = [len(set(items["row"])) for items in (items_a, items_b)]
    what = f"{rows[0]} and {rows[1]} rows" if rows[0] != rows[1] else ""
    if not what:
        columns = (items[key] for items in (items_a, items_b) for key in ("row", "target"))
        places = zip(*columns, strict=False)  # one may have a tag more in its last row
        row = next((place[0] for place in places if place[:2] != place[2:]), items_a["row"][-1])
        what = f"row {row + 1} has another target or place"
    return f"the two were not scored on the same rows ({what}); evaluate both with the same file, labels and LIMIT"
