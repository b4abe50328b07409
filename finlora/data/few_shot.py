"""Questions with examples before them (SHOTS=), in the form of FinLoRA's test_few_shot.py.

The examples are drawn from the task's train file for each row by itself: the same ones whatever LIMIT= is and in
whatever order the rows stand. None of them is of the row's group (finlora/data/groups.py). lm-eval's own sampler
(0.4.11) cannot do this: it is not told the row that it draws for where the examples come from another file.
"""

import random
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from finlora.core.errors import UserError
from finlora.data.test_sets import all_sets, read_set, read_train

SEED = 42  # FinLoRA's


def questions(name: str, folder: Path, shots: int, labels: str) -> list[str]:
    """What each row of a test set asks, with `shots` examples under these labels before it; without any its context.

    Raises UserError where there is no train file, or where it has too few rows that are not of a test row's group.
    """
    tests = read_set(name, folder)
    if not shots:
        return [row.context for row in tests.rows]
    train = read_train(all_sets()[name].task, folder)
    if len(train.rows) < shots:
        raise UserError(f"SHOTS={shots}: {train.path} has {len(train.rows)} rows; give fewer examples")
    key = "corrected" if labels == "corrected" else "target"
    examples = [(row.context, getattr(row, key)) for row in train.rows]
    return [
        with_examples(row.context, [examples[place] for place in places])
        for row, places in zip(tests.rows, _draw(name, folder, shots, tests.sha256, train.sha256), strict=True)
    ]


def with_examples(question: str, examples: Iterable[tuple[str, str]]) -> str:
    told = (f"Example {n}:\nInput: {context}\nAnswer: {target}\n\n" for n, (context, target) in enumerate(examples, 1))
    return f"{''.join(told)}Input: {question}\nAnswer:"


@lru_cache(maxsize=32)  # to group a train file takes a minute
def _draw(name: str, folder: Path, shots: int, *_: str) -> list[list[int]]:
    """The places in the train file of each test row's examples; the last arguments are the files' checksums."""
    from finlora.data.groups import row_groups  # late: it imports scipy

    tests, train = read_set(name, folder), read_train(all_sets()[name].task, folder)
    groups = row_groups([row.context for row in (*tests.rows, *train.rows)])
    of_test, of_train = groups[: len(tests.rows)], groups[len(tests.rows) :]
    size = Counter(of_train)
    drawn = []
    for row, group in zip(tests.rows, of_test, strict=True):
        others = len(train.rows) - size[group]
        if others < shots:
            raise UserError(
                f"SHOTS={shots}: {train.path} has {others} rows that are not about the text of row {row.row} of "
                f"{tests.path}; give fewer examples"
            )
        places = random.Random(f"{SEED} {row.context}").sample(range(len(train.rows)), shots + size[group])
        drawn.append([place for place in places if of_train[place] != group][:shots])
    return drawn
