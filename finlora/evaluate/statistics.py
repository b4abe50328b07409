"""How sure a score is: bootstrap intervals, and paired differences of two subjects on the same rows.

Rows are resampled, never items: the tags of one answer stay together. Every draw follows `seed`, so figures repeat.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from scipy import sparse, stats

from finlora.core.errors import UserError
from finlora.evaluate.scorers import Items, codes, f1

STATISTICS = ("accuracy", "weighted_f1", "macro_f1")
CHUNK = 2**21  # row weights held at a time: 16 MiB


def interval(
    items: Items, statistic: str = "accuracy", resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """The percentile bootstrap interval of a score: (low, high), each 0 to 1.

    It always holds the score itself: where the percentiles miss it (macro F1 of few rows loses classes in resamples)
    the interval is widened to it. Rows that all score the same give an interval without width, however few they are.
    """
    totals, score = _totals(items, statistic)
    estimate = float(score(totals.sum(axis=0)))
    values = np.concatenate([score(weights @ totals) for weights in _resampled(totals.shape[0], resamples, seed)])
    return _widened(values, level, estimate)


def paired(
    items_a: Items,
    items_b: Items,
    statistic: str = "accuracy",
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Any]:
    """How far b is from a on the same rows.

    difference (b - a) with its paired bootstrap interval low, high; p, two-sided, for "neither answers more rows
    right", whatever the statistic: the exact McNemar test where each row is one right or wrong item, otherwise a
    sign-flip permutation test of the rows' differences with `resamples` flips, so never below 1 / (resamples + 1);
    only_a and only_b, the rows in which one does better; rows. `distinguishable` is true only when the interval
    excludes 0 and p is below 1 - level.
    Raises UserError where the rows or their targets differ.
    """
    if (items_a["row"], items_a["target"]) != (items_b["row"], items_b["target"]):
        raise UserError(_difference(items_a, items_b))
    (totals_a, score_a), (totals_b, score_b) = _totals(items_a, statistic), _totals(items_b, statistic)
    rows = totals_a.shape[0]
    estimate = float(score_b(totals_b.sum(axis=0)) - score_a(totals_a.sum(axis=0)))
    drawn = _resampled(rows, resamples, seed)
    values = np.concatenate([score_b(weights @ totals_b) - score_a(weights @ totals_a) for weights in drawn])
    low, high = _widened(values, level, estimate)
    by_row = [np.bincount(_row_numbers(items), weights=items["right"]) for items in (items_a, items_b)]
    only_a, only_b = int((by_row[0] > by_row[1]).sum()), int((by_row[0] < by_row[1]).sum())
    if all(np.isin(right, (0, 1)).all() for right in by_row):
        p = float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    else:
        p = _sign_flip(by_row[1] - by_row[0], resamples, seed)
    return {
        "difference": estimate,
        "low": low,
        "high": high,
        "p": p,
        "only_a": only_a,
        "only_b": only_b,
        "rows": rows,
        "distinguishable": not low <= 0 <= high and p < 1 - level,
    }


def _totals(items: Items, statistic: str) -> tuple[sparse.csr_array, Callable[[np.ndarray], np.ndarray]]:
    """What each row adds to the counts that a statistic is made of, and the statistic of such counts (last axis)."""
    if statistic not in STATISTICS:
        raise UserError(f"{statistic!r} is no statistic; choose one of {', '.join(STATISTICS)}")
    if not items["row"]:
        raise UserError("there are no answers to score; evaluate at least one row")
    row = _row_numbers(items)
    if statistic == "accuracy":
        counts = np.stack([np.bincount(row, weights=items["right"]), np.bincount(row)], axis=1)
        return sparse.csr_array(counts), lambda sums: sums[..., 0] / sums[..., 1]
    if not any(items["target"]):
        raise UserError(f"{statistic} needs classes and these items have none; use accuracy, the mean of their values")
    target, predicted, classes = codes(items)
    hit, claim = target == predicted, predicted < classes
    place = np.concatenate([row, row[claim], row[hit]])
    column = np.concatenate([target, classes + predicted[claim], 2 * classes + target[hit]])
    counts = sparse.csr_array((np.ones(len(place)), (place, column)), shape=(row.max() + 1, 3 * classes))

    def score(sums: np.ndarray) -> np.ndarray:
        return f1(*np.split(sums, 3, axis=-1))[statistic == "macro_f1"]

    return counts, score


def _row_numbers(items: Items) -> np.ndarray:
    """The rows of items, counted from 0 without gaps."""
    return np.unique(items["row"], return_inverse=True)[1]


def _resampled(rows: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each row is drawn, (some resamples, rows), until there are `resamples` of them."""
    generator = np.random.default_rng(seed)
    step = max(1, CHUNK // rows)
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        drawn = generator.integers(0, rows, (count, rows)) + np.arange(count)[:, None] * rows
        yield np.bincount(drawn.ravel(), minlength=count * rows).reshape(count, rows).astype(float)


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


def _widened(values: np.ndarray, level: float, estimate: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return min(float(low), estimate), max(float(high), estimate)


def _difference(items_a: Items, items_b: Items) -> str:
    rows = [len(set(items["row"])) for items in (items_a, items_b)]
    what = f"{rows[0]} and {rows[1]} rows" if rows[0] != rows[1] else ""
    if not what:
        pairs = zip(*(zip(items["row"], items["target"], strict=True) for items in (items_a, items_b)), strict=False)
        row = next((one[0] for one, other in pairs if one != other), items_a["row"][-1])
        what = f"row {row + 1} has another target or place"
    return f"the two were not scored on the same rows ({what}); evaluate both with the same file, labels and LIMIT"
