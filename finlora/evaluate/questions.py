"""A test set as it is asked: its rows and examples, how long answers may be, and the answers through lm-eval."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from finlora.core.paths import RAW
from finlora.data import few_shot
from finlora.data.neardup import normalise
from finlora.data.test_sets import TASK_FILES, SetRows, all_sets, read_set
from finlora.evaluate import forgetting
from finlora.evaluate.results import Row, SetResult


class Length(NamedTuple):
    """How long an answer may be: enough for the longest target of its set, or as in FinLoRA (LENGTHS=published)."""

    lengths: str  # whole or published
    max_new_tokens: int
    targets_cut: int  # rows whose target has more tokens than that


@dataclass(frozen=True)
class Questions:
    """What is asked of every model on one test set."""

    name: str
    folder: Path  # of the test files
    source: SetRows | None  # None for MMLU and GSM8K, which lm-eval reads
    labels: str = "corrected"  # or published
    shots: int = 0  # examples before each question
    sha256: str | None = None  # of all questions with their examples; None without any
    length: Length | None = None  # None for MMLU and GSM8K, which have limits of their own

    @property
    def metric(self) -> str:
        return "lm_eval" if self.source is None else all_sets()[self.name].metric

    @property
    def options(self) -> dict[str, Any]:
        """lm-eval's for generation, in the order of its cache keys; without `until` 0.4.11 cuts at a blank line."""
        return {"max_gen_toks": self.length.max_new_tokens, "do_sample": False, "until": []}


def read_questions(name: str, folder: Path = RAW, labels: str = "corrected", shots: int = 0) -> Questions:
    """The questions of a set, whose length `with_length` measures. UserError where a file is missing or malformed."""
    if name in forgetting.TASKS:
        forgetting.check(name, folder)
        return Questions(name, folder, None)
    asked = few_shot.questions(name, folder, shots, labels)
    digest = hashlib.sha256("\0".join(asked).encode()).hexdigest() if shots else None
    return Questions(name, folder, read_set(name, folder), labels, shots, digest)


def with_length(questions: Questions, lengths: str, tokenizer) -> Questions:
    """With the limit of its answers, which leaves room for an end token. lengths: whole or published.

    Without a tokenizer, behind an endpoint, a target's UTF-8 bytes stand for its tokens: it has no more of them.
    """
    if questions.source is None:
        return questions
    rows = questions.source.rows
    texts = sorted({text for row in rows for text in (row.target, row.corrected)})
    tokens = tokenizer(texts, add_special_tokens=False)["input_ids"] if tokenizer else map(str.encode, texts)
    sizes = dict(zip(texts, map(len, tokens), strict=True))
    limit = all_sets()[questions.name].max_new_tokens
    if lengths == "whole":
        limit = max(limit, *(size + 1 for size in sizes.values()))
    return replace(questions, length=Length(lengths, limit, sum(sizes[row.target] > limit for row in rows)))


def answers(
    lm, questions: Questions, limit: int | None, trained_on: set[str] | None = None
) -> tuple[SetResult, list[Row]]:
    """The questions through lm-eval, only the first `limit` where there is one, and a row for each answer.

    `trained_on` holds normalised contexts; a row whose context is one of them is marked as seen.
    """
    name, source = questions.name, questions.source
    if source is None:
        return forgetting.answers(lm, name, questions.folder, limit)
    from lm_eval import evaluate  # late: it takes seconds
    from lm_eval.tasks import TaskManager, get_task_dict

    options = {"folder": str(questions.folder), "labels": questions.labels, "shots": questions.shots}
    tasks = TaskManager(include_path=str(TASK_FILES), include_defaults=False, metadata=options)
    task = get_task_dict([name], tasks)
    task[name].set_config("generation_kwargs", questions.options)
    answered = evaluate(lm, task, limit=limit, apply_chat_template=True, bootstrap_iters=0)
    rows = []
    for sample in sorted(answered["samples"][name], key=lambda sample: sample["doc"]["row"]):
        doc, prompt = sample["doc"], sample["arguments"][0][0]
        prompt_tokens, answer_tokens, stopped = lm.tokens[prompt]
        rows.append(
            {
                "row": doc["row"],
                "prompt": prompt,
                "context": doc["context"],
                "target": doc["published"],
                "corrected": doc["corrected"],
                "answer": sample["resps"][0][0],
                "seen": None if trained_on is None else normalise(doc["context"]) in trained_on,
                "prompt_tokens": prompt_tokens,
                "answer_tokens": answer_tokens,
                "stopped": stopped,
            }
        )
    spec = all_sets()[name]
    if source.left_out:
        lines = ", ".join(str(line) for line, _ in source.left_out[:5])
        print(f"warning: {source.path}: {len(source.left_out)} rows without an answer were left out (line {lines})")
    result = SetResult(
        set=name,
        task=spec.task,
        file=source.path,
        sha256=source.sha256,
        published_file=source.published_file,
        rows=len(source.rows),
        evaluated=len(rows),
        labels=spec.labels,
        metric=spec.metric,
        **questions.length._asdict(),
        prompt_tokens=sum(row["prompt_tokens"] for row in rows),
        answer_tokens=sum(row["answer_tokens"] for row in rows),
        labels_used=questions.labels,
        shots=questions.shots or None,
        questions_sha256=questions.sha256,
    )
    return result, rows
