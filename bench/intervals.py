"""How often the intervals of finlora/evaluate/statistics.py cover, and how often equal models are called different.

    python -m bench.intervals [--data DIR] [--draws 2000] [--pooled-draws 1000]

Writes bench/intervals.json. Answers are drawn on the groups that each set's rows have (finlora/data/groups.py): on the
test files of DIR, and on the rows of earlier versions of FinLoRA's files in DIR/older/*.jsonl.gz where there are any.
A row is right with a probability; with another probability the rows of a group agree, else each is drawn by itself.
Two equal models answer alike in half of the groups. `pooled` is of all these sets together: the average of their scores
as in the report, and the pooled line of `make compare`. `lone_rows` needs no draws: it sums over all counts.
"""

import argparse
import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binom

from finlora.core.paths import RAW
from finlora.data.groups import row_groups
from finlora.data.test_sets import all_sets
from finlora.evaluate.compare import join
from finlora.evaluate.scorers import Items
from finlora.evaluate.statistics import average, interval, paired

OUT = Path(__file__).with_suffix(".json")
SHARES = (0.5, 0.7, 0.9, 0.98)  # of right answers
AGREE = (0.0, 0.5, 1.0)  # how often the rows of a group are right or wrong together
CLASSES = 3


def contexts(data: Path) -> dict[str, list[str]]:
    files = {name: data / spec.file for name, spec in all_sets().items()}
    files |= {path.name.removesuffix(".jsonl.gz"): path for path in sorted(data.glob("older/*.jsonl.gz"))}
    found = {}
    for name, path in files.items():
        if path.is_file():
            with gzip.open(path, "rt") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
                found[name] = [json.loads(line)["context"] for line in file]
    return found


def answered(right: np.ndarray, group: np.ndarray, target: np.ndarray, other: np.ndarray) -> Items:
    columns = {"group": group, "target": target, "predicted": np.where(right, target, other), "right": right}
    return {"row": list(range(len(group)))} | {key: values.tolist() for key, values in columns.items()}


def draw_right(draw: np.random.Generator, group: np.ndarray, share: float, agree: float) -> np.ndarray:
    count = group.max() + 1
    alike = draw.random(count)[group] < agree
    return np.where(alike, draw.random(count)[group], draw.random(len(group))) < share


def measure(draw: np.random.Generator, group: np.ndarray, share: float, agree: float, draws: int) -> dict[str, float]:
    """Shares of the draws in which an interval covers and in which equal models are told apart; and mean widths.

    The classes of wrong answers are drawn evenly from the others, so that of n rows of three classes weighted and macro
    F1 are the share of right answers in the limit.
    """
    count = dict.fromkeys(("accuracy", "weighted_f1", "difference", "distinguishable", "width"), 0.0)
    for _ in range(draws):
        target = draw.integers(0, CLASSES, len(group))
        other = (target + draw.integers(1, CLASSES, len(group))) % CLASSES
        one, two = (draw_right(draw, group, share, agree) for _ in range(2))
        two = np.where(draw.random(group.max() + 1)[group] < 0.5, one, two)
        a, b = answered(one, group, target, other), answered(two, group, target, other)
        for statistic in ("accuracy", "weighted_f1"):
            low, high = interval(a, statistic)
            count[statistic] += low <= share <= high
            count["width"] += (high - low) * (statistic == "accuracy")
        difference = paired(a, b, resamples=400)
        count["difference"] += difference["low"] <= 0 <= difference["high"]
        count["distinguishable"] += difference["distinguishable"]
    return {"share": share, "agree": agree} | {key: round(value / draws, 4) for key, value in count.items()}


def pooled(groups: dict[str, np.ndarray], draws: int) -> dict[str, Any]:
    """All sets together, with as many right answers in each, and with another share of them in each."""
    cases = []
    for seed, (shares, agree) in enumerate(itertools.product(([0.9], SHARES), AGREE)):
        of_sets = [shares[place % len(shares)] for place in range(len(groups))]
        draw = np.random.default_rng(seed)
        cases.append(measure_pooled(draw, list(groups.values()), of_sets, agree, draws))
        print(f"pooled: {cases[-1]}", flush=True)
    return {"draws": draws, "sets": list(groups), "cases": cases}


def measure_pooled(
    draw: np.random.Generator, groups: list[np.ndarray], shares: list[float], agree: float, draws: int
) -> dict[str, float]:
    """As `measure`, for the average of all sets' scores, and for the difference of two models on all their rows."""
    count = dict.fromkeys(("accuracy", "difference", "distinguishable", "width"), 0.0)
    for _ in range(draws):
        scores, pairs = [], []
        for group, share in zip(groups, shares, strict=True):
            target = np.zeros(len(group), int)
            one, two = (draw_right(draw, group, share, agree) for _ in range(2))
            two = np.where(draw.random(group.max() + 1)[group] < 0.5, one, two)
            a, b = (answered(right, group, target, target + 1) for right in (one, two))
            scores.append((float(one.mean()), *interval(a)))
            pairs.append((a, b))
        _, low, high = average(scores)
        count["accuracy"] += low <= np.mean(shares) <= high
        count["width"] += high - low
        difference = paired(*join(pairs), resamples=400)
        count["difference"] += difference["low"] <= 0 <= difference["high"]
        count["distinguishable"] += difference["distinguishable"]
    return {"share": round(float(np.mean(shares)), 4), "agree": agree} | {
        key: round(value / draws, 4) for key, value in count.items()
    }


def lone_rows(rows: int) -> dict[str, float]:
    """The least coverage of n rows that stand alone, over shares of right answers from 0.5 to 1."""
    names = list(range(rows))
    ends = np.array([interval({"row": names, "right": [1.0] * k + [0.0] * (rows - k)}) for k in range(rows + 1)])
    covered = {
        share: float(binom.pmf(np.arange(rows + 1), rows, share)[(ends[:, 0] <= share) & (share <= ends[:, 1])].sum())
        for share in [*np.linspace(0.5, 1, 101).round(3), 0.999]
    }
    worst = min(covered, key=covered.get)
    return {"rows": rows, "least_coverage": round(covered[worst], 4), "at": float(worst)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=RAW)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--pooled-draws", type=int, default=1000)
    args = parser.parse_args()
    draw = np.random.default_rng(0)
    groups = {name: np.array(row_groups(texts)) for name, texts in contexts(args.data).items()}
    sets = []
    for name, group in groups.items():
        # Where hardly any row has a fellow it does not matter how often fellows agree.
        few = len(set(group)) > 0.9 * len(group)
        cases = [measure(draw, group, share, agree, args.draws) for share in SHARES for agree in AGREE[2 * few :]]
        sets.append({"set": name, "rows": len(group), "groups": len(set(group)), "cases": cases})
        worst = [min(case[key] for case in cases) for key in ("accuracy", "weighted_f1", "difference")]
        alarms = max(case["distinguishable"] for case in cases)
        print(f"{name}: least coverage {min(worst):.3f}, most false differences {alarms:.3f}", flush=True)
    lone = [lone_rows(rows) for rows in (1, 43, 235, 1212)]
    found = {"draws": args.draws, "lone_rows": lone, "pooled": pooled(groups, args.pooled_draws), "sets": sets}
    OUT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
