"""How sure a setting is that was trained with several seeds: over the seeds and over the test rows together.

Each run answers the same rows. Other seeds and other rows would both give other scores, so their variances add up: that
of the runs' means, and that of the groups of rows, of whose answers the mean over runs is taken. This is a crossed
design with random seeds and rows; what a seed does to a row is counted in both, so intervals are rather too wide than
too narrow. Degrees of freedom are Satterthwaite's (Biometrics Bulletin 2, 1946).
"""

import math
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from finlora.evaluate.scorers import Items
from finlora.evaluate.statistics import interval


class Mean(NamedTuple):
    """A mean score and its interval, 0 to 1."""

    accuracy: float
    low: float
    high: float


def mean_score(runs: list[Items], level: float = 0.95) -> Mean:
    """The mean score of runs on the same rows; its interval is that of the rows, widened by the seeds' variance."""
    right = np.array([items["right"] for items in runs], float)
    rows = interval(runs[0] | {"right": right.mean(0).tolist()}, level=level)
    mean, seeds = float(right.mean()), 0.0
    if len(runs) > 1:
        seeds = float(stats.t.isf((1 - level) / 2, len(runs) - 1)) * math.sqrt(_seed_variance(right))
    low, high = mean - math.hypot(mean - rows.low, seeds), mean + math.hypot(rows.high - mean, seeds)
    return Mean(mean, max(0.0, low), min(1.0, high))


def paired_over_seeds(a: list[Items], b: list[Items], level: float = 0.95) -> dict[str, Any]:
    """How far the runs of b are from those of a, run by run (one seed each) on the same rows; keys as `paired` has."""
    gain = np.array([items["right"] for items in b], float) - np.array([items["right"] for items in a], float)
    group = np.unique(a[0]["group"], return_inverse=True)[1]
    by_item, difference = gain.mean(0), float(gain.mean())
    sums = np.bincount(group, weights=by_item - difference)
    seeds, rows = _seed_variance(gain), float((sums**2).sum()) / gain.shape[1] ** 2
    rows *= len(sums) / max(1, len(sums) - 1)
    variance = seeds + rows
    p, reach = float(difference == 0), 0.0
    if variance:
        freedom = variance**2 / (seeds**2 / (len(gain) - 1) + rows**2 / max(1, len(sums) - 1))
        p = 2 * float(stats.t.sf(abs(difference) / math.sqrt(variance), freedom))
        reach = float(stats.t.isf((1 - level) / 2, freedom)) * math.sqrt(variance)
    by_row = np.bincount(np.unique(a[0]["row"], return_inverse=True)[1], weights=by_item)
    return {
        "difference": difference,
        "low": difference - reach,
        "high": difference + reach,
        "p": p,
        "only_a": int((by_row < 0).sum()),
        "only_b": int((by_row > 0).sum()),
        "rows": len(by_row),
        "groups": len(sums),
        "distinguishable": p < 1 - level,
    }


def _seed_variance(values: np.ndarray) -> float:
    """Of the mean over runs, (runs, items): their means' variance over their number."""
    return float(values.mean(1).var(ddof=1)) / len(values)
