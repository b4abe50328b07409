"""FinLoRA's published scores (eval/published.csv)."""

import csv
from collections import defaultdict
from functools import cache

from finlora.core.paths import ROOT

PUBLISHED = ROOT / "eval" / "published.csv"
# FinLoRA's models that stand beside ours, as published.csv calls them.
BESIDE = {
    "base": "Llama 3.1 8B Instruct",
    "LoRA": "LoRA 8bit r8",
    "QLoRA": "QLoRA 4bit r4",
    "DoRA": "DoRA 8bit r8",
    "rsLoRA": "rsLoRA 8bit r8",
}


@cache
def published() -> dict[str, dict[str, tuple[float, float]]]:
    """FinLoRA's table: set -> model -> (score in percent, F1 0..1); the score is BERTScore F1 x 100 where there is no
    accuracy. `overall` holds the averages as printed. Source: FinLoRA, arXiv 2505.19819."""
    table: dict[str, dict[str, tuple[float, float]]] = defaultdict(dict)
    with open(PUBLISHED, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            f1 = float(row["f1_or_bertscore"] or "nan")
            table[row["set"]][row["model"]] = (float(row["accuracy_percent"] or f1 * 100), f1)
    return dict(table)


def published_average(model: str, sets: list[str] | None = None) -> float:
    """FinLoRA's average: the plain mean over data sets (all 19, or these) of the score in percent."""
    scores = [models[model][0] for name, models in published().items() if name != "overall"]
    if sets is not None:
        scores = [published()[name][model][0] for name in sets]
    return sum(scores) / len(scores)
