"""The study's rows and recipe: FPB, FiQA and TFNS, the sentiment rows whose sources and right labels are known.

    make data TASK=sentiment
    python -m bench.study.rows [--data data/raw] [--out data/study]

FinLoRA's test files are split anew, with corrected labels; rows about one text are on one side. Besides train.jsonl,
validation.jsonl and test/<set>_test.jsonl there are two files for what FinLoRA's own runs differ by:
published_labels.jsonl has TFNS's exchanged labels, third.jsonl a third of the rows. The recipe is RECIPE on these
files, with one validation an epoch, and with each row whole in packs of 4,608 tokens, as the recorded runs had it.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from finlora.core.errors import UserError, run
from finlora.core.files import write_text
from finlora.core.paths import RAW, ROOT, shown
from finlora.data.groups import row_groups
from finlora.data.test_sets import LabelledRow, read_set
from finlora.recipes.names import RECIPES

RECIPE = "sentiment_smollm2_bf16_r8_dora"
OUT = ROOT / "data" / "study"
SETS = ("fpb", "fiqa", "tfns")
TEST_ROWS, VALIDATION_ROWS, SEED = 1150, 400, 0


def make(data: Path, out: Path) -> None:
    """Write rows and recipe into `out`, and print how many rows each file has.

    UserError where a file is not the published one.
    """
    rows = [(name, row) for name in SETS for row in read_set(name, data).rows]
    groups = np.array(row_groups([row.context for _, row in rows]))
    order = np.random.default_rng(SEED).permutation(groups.max() + 1)
    before = np.cumsum(np.bincount(groups)[order]) - np.bincount(groups)[order]  # rows in the groups before each
    part = np.searchsorted([TEST_ROWS, TEST_ROWS + VALIDATION_ROWS], before, "right")[np.argsort(order)][groups]
    train, validation = ([row for (_, row), one in zip(rows, part, strict=True) if one == wanted] for wanted in (2, 1))
    write(out / "train.jsonl", (chat(row, row.corrected) for row in train))
    write(out / "validation.jsonl", (chat(row, row.corrected) for row in validation))
    write(out / "published_labels.jsonl", (chat(row, row.target) for row in train))
    third = np.random.default_rng(SEED).permutation(len(train))[: len(train) // 3]
    write(out / "third.jsonl", (chat(train[i], train[i].corrected) for i in sorted(third)))
    for name in SETS:
        test = [row for (of, row), one in zip(rows, part, strict=True) if one == 0 and of == name]
        lines = ({"context": row.context, "target": row.corrected} for row in test)
        write(out / "test" / f"{name}_test.jsonl", lines)
    recipe = (RECIPES / f"{RECIPE}.yaml").read_text(encoding="utf-8")
    recipe = recipe.replace("data/prepared/sentiment", shown(out))
    changes = {"evals_per_epoch": (4, 1), "saves_per_epoch": (4, 1), "sequence_len": (2560, 4608)}
    for key, (value, own) in (changes | {"fastdora_shared_prefixes": ("true", "false")}).items():
        if f"\n{key}: {value} " not in recipe:
            raise UserError(f"recipes/{RECIPE}.yaml: key '{key}' is not {value}; correct bench/study/rows.py")
        recipe = recipe.replace(f"\n{key}: {value} ", f"\n{key}: {own} ")
    write_text(out / f"{RECIPE}.yaml", recipe)


def chat(row: LabelledRow, answer: str) -> dict[str, list[dict[str, str]]]:
    return {"messages": [{"role": "user", "content": row.context}, {"role": "assistant", "content": answer}]}


def write(path: Path, rows: Iterable[dict]) -> None:
    lines = [json.dumps(row) + "\n" for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(lines))
    print(f"{shown(path)}: {len(lines):,} rows")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=RAW, help="with test/fpb_test.jsonl and so on")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    run(lambda: make(options.data.absolute(), options.out.absolute()))
