"""What the task files beside it call: FinLoRA's rows and scores in lm-evaluation-harness's terms."""

from pathlib import Path
from typing import Any

from datasets import Dataset

from finlora.core.paths import RAW
from finlora.data.test_sets import all_sets, read_set
from finlora.evaluate.scorers import scorings, summary


def rows(test_set: str, folder: str = str(RAW), labels: str = "corrected", **_: Any) -> dict[str, Dataset]:
    """One test set as lm-eval's `test` split: row, set, context, published, corrected, and target (as wanted)."""
    found = read_set(test_set, Path(folder)).rows
    return {
        "test": Dataset.from_list(
            [
                {
                    "row": row.row,
                    "context": row.context,
                    "published": row.target,
                    "corrected": row.corrected,
                    "target": row.corrected if labels == "corrected" else row.target,
                    "set": test_set,
                }
                for row in found
            ]
        )
    }


def results(doc: dict[str, Any], answers: list[str]) -> dict[str, tuple[str, str, str]]:
    answer = (doc["set"], answers[0], doc["target"])
    return {"finlora": answer, "strict": answer}


def finlora(answers: list[tuple[str, str, str]]) -> float:
    return _accuracy(answers, "finlora")


def strict(answers: list[tuple[str, str, str]]) -> float:
    return _accuracy(answers, "strict")


def _accuracy(answers: list[tuple[str, str, str]], scoring: str) -> float:
    """Accuracy over a set; NaN for sets that BERTScore judges (finlora.evaluate.runner adds it, since it needs an
    encoder)."""
    name = answers[0][0]
    score = scorings(name, all_sets()[name]).get(scoring)
    if score is None:
        return float("nan")
    return summary(score([answer for _, answer, _ in answers], [target for *_, target in answers]))["accuracy"]
