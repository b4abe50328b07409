"""Test sets as they are asked: their rows and examples, how long answers may be, and what measures BERTScore."""

import hashlib
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from finlora.core.errors import UserError
from finlora.core.paths import RAW, SAMPLE, shown
from finlora.data import few_shot
from finlora.data.test_sets import SetRows, all_sets, choose, read_set
from finlora.train.runs import TrainedRecipe

# What fine-tuning may have cost: lm-eval reads and scores these sets, 5-shot.
FORGETTING = {
    "mmlu": {"files": "mmlu/default", "metric": "acc", "filter": "none", "dataset": "cais/mmlu"},
    "gsm8k": {"files": "gsm8k", "metric": "exact_match", "filter": "flexible-extract", "dataset": "openai/gsm8k"},
}


class Length(NamedTuple):
    """How long an answer may be: enough for the longest target of its set, or as in FinLoRA (LENGTHS=published)."""

    lengths: str  # whole or published
    max_new_tokens: int
    targets_cut: int  # rows whose target has more tokens than that


class Encoder(NamedTuple):
    """What measures BERTScore: a hub id or folder, and a layer of it. FinLoRA's, and the layer that bert-score takes
    for it, of 12.
    """

    model: str = "ProsusAI/finbert"
    layer: int = 10

    def __str__(self) -> str:
        """As set.json has it."""
        return f"{shown(self.model)}, layer {self.layer}"


@dataclass(frozen=True)
class Questions:
    """What is asked of every model on one test set."""

    name: str
    folder: Path  # of the test files
    source: SetRows | None  # None for MMLU and GSM8K, which lm-eval reads
    labels: str = "corrected"  # or published
    shots: int = 0  # examples before each question
    limit: int | None = None  # only the first rows
    sha256: str | None = None  # of all questions with their examples; None without any
    length: Length | None = None  # None for MMLU and GSM8K, which have limits of their own
    kept: list[dict[str, Any]] = field(default_factory=list)  # rows of answers.jsonl whose answers stay

    @property
    def metric(self) -> str:
        return "lm_eval" if self.source is None else all_sets()[self.name].metric

    @property
    def options(self) -> dict[str, Any]:
        """lm-eval's for generation, in the order of its cache keys; without `until` 0.4.11 cuts at a blank line."""
        return {"max_gen_toks": self.length.max_new_tokens, "do_sample": False, "until": []}


def choose_sets(
    tasks: str | None, trained: TrainedRecipe, tests: str | None = None, shots: int = 0
) -> tuple[list[str], Path]:
    """The test sets and the folder of their files: TESTS=, data/raw, or the sample where a tiny run has no others."""
    sets = named_sets(tasks or "") or named_sets(trained.task or "")
    if not sets:
        raise UserError(
            "no test set is named; give TASKS=, for example TASKS=general, TASKS=sentiment or TASKS=fpb,tfns"
        )
    files = {name: all_sets()[name].file for name in sets if name in all_sets()}
    if shots and len(files) < len(sets):
        raise UserError(f"SHOTS={shots}: MMLU and GSM8K have examples of their own; leave them out with TASKS=")
    if tests or not trained.tiny or not files or any((RAW / file).is_file() for file in files.values()):
        return sets, Path(tests) if tests else RAW
    sets = [name for name, file in files.items() if (SAMPLE / file).is_file()]
    if not sets:
        raise UserError("the test files are not here and there is no sample of them; run `make data TASK=...`")
    print(f"no test file is fetched: taking the sample rows of {', '.join(sets)}")
    return sets, SAMPLE


def named_sets(tasks: str) -> list[str]:
    """The sets that the names in TASKS= stand for; `forgetting` is MMLU and GSM8K."""
    names = [name for name in re.split(r"[,\s]+", tasks) if name]
    own = [task for name in names for task in (FORGETTING if name == "forgetting" else [name]) if task in FORGETTING]
    rest = [name for name in names if name not in FORGETTING and name != "forgetting"]
    return list(dict.fromkeys((choose(rest) if rest else []) + own))


def read_questions(
    name: str, folder: Path = RAW, labels: str = "corrected", shots: int = 0, limit: int | None = None
) -> Questions:
    """The questions of a set, whose length `with_length` measures. UserError where a file is missing or malformed."""
    if name in FORGETTING:
        if folder != RAW and not (folder / name).is_dir():
            copy = f"put a copy of {FORGETTING[name]['dataset']} there"
            raise UserError(f"{folder / name}: is missing; {copy}, or leave TESTS= out")
        return Questions(name, folder, None, limit=limit)
    asked = few_shot.questions(name, folder, shots, labels)
    digest = hashlib.sha256("\0".join(asked).encode()).hexdigest() if shots else None
    return Questions(name, folder, read_set(name, folder), labels, shots, limit, digest)


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
