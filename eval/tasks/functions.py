"""What the task files beside it call: FinLoRA's rows and scores in lm-evaluation-harness's terms."""

from pathlib import Path
from typing import Any

from datasets import Dataset

from finlora.core.paths import RAW
from finlora.data.few_shot import questions
from finlora.data.test_sets import all_sets, read_set
from finlora.evaluate.scorers import scorings, summary


def rows(
    test_set: str, folder: str = str(RAW), labels: str = "corrected", shots: int = 0, **_: Any
) -> dict[str, Dataset]:
    """One test set as lm-eval's `test` split.

    Columns: row, set, context, question (the context, behind `shots` examples), published and corrected label, and
    target, which is the one that `labels` names.
    """
    documents = [
        {
            "row": row.row,
            "context": row.context,
            "question": question,
            "published": row.target,
            "corrected": row.corrected,
            "target": row.corrected if labels == "corrected" else row.target,
            "set": test_set,
        }
        for row, question in zip(
            read_set(test_set, Path(folder)).rows, questions(test_set, Path(folder), shots, labels), strict=True
        )
    ]
    return {"test": Dataset.from_list(documents)}


def results(doc: dict[str, Any], answers: list[str]) -> dict[str, tuple[str, str, str]]:
    """process_results: (set, answer, target) for each scoring; the aggregations below score a set as a whole."""
    answer = (doc["set"], answers[0], doc["target"])
    return {"finlora": answer, "read": answer, "strict": answer}


def finlora(answers: list[tuple[str, str, str]]) -> float:
    return _accuracy(answers, "finlora")


def read(answers: list[tuple[str, str, str]]) -> float:
    return _accuracy(answers, "read")


def strict(answers: list[tuple[str, str, str]]) -> float:
    return _accuracy(answers, "strict")


def _accuracy(answers: list[tuple[str, str, str]], scoring: str) -> float:
    """Accuracy over a set by finlora.evaluate.scorers.

    NaN for sets that BERTScore judges: finlora.evaluate.results adds it, since it needs an encoder.
    """
    test_set = answers[0][0]
    score = scorings(test_set, all_sets()[test_set]).get(scoring)
    if score is None:
        return float("nan")
    return summary(score([answer for _, answer, _ in answers], [target for *_, target in answers]))["accuracy"]
