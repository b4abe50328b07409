"""FinLoRA's published scores: eval/published.csv, and published_rebuttal.csv (3-shot and multi-task)."""

import csv
from collections import defaultdict
from functools import cache

from finlora.core.paths import ROOT

PUBLISHED, REBUTTAL = ROOT / "eval" / "published.csv", ROOT / "eval" / "published_rebuttal.csv"
# FinLoRA's models that the report sets beside ours, as these files call them.
BESIDE = {
    "base": "Llama 3.1 8B Instruct",
    "base, 3-shot": "Llama 3.1 8B Instruct, 3-shot",
    "LoRA": "LoRA 8bit r8",
    "QLoRA": "QLoRA 4bit r4",
    "DoRA": "DoRA 8bit r8",
    "rsLoRA": "rsLoRA 8bit r8",
    "LoRA, multi-task": "LoRA 8bit r8, multi-task",
}


@cache
def published() -> dict[str, dict[str, tuple[float, float]]]:
    """FinLoRA's tables: set -> model -> (score in percent, F1 0..1); the score is BERTScore F1 x 100 where there is no
    accuracy, an F1 that was not published is nan. `overall` holds the averages as printed. Source: FinLoRA, arXiv
    2505.19819, and its rebuttal."""
    table: dict[str, dict[str, tuple[float, float]]] = defaultdict(dict)
    for path in PUBLISHED, REBUTTAL:
        with open(path, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                f1 = float(row["f1_or_bertscore"] or "nan")
                table[row["set"]][row["model"]] = (float(row["accuracy_percent"] or f1 * 100), f1)
    return dict(table)


def published_average(model: str, sets: list[str] | None = None) -> float | None:
    """FinLoRA's average: the plain mean over data sets (all 19, or these) of the score in percent; None where one was
    not published."""
    sets = [name for name in published() if name != "overall"] if sets is None else sets
    scores = [published()[name].get(model) for name in sets]
    return None if None in scores else sum(score for score, _ in scores) / len(scores)
