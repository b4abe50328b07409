"""The whole path on two CPU cores: base model, DoRA through axolotl, merge, and a table on held-out rows (`make demo`).

finlora demo [--data rows.jsonl]
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from transformers import AutoTokenizer

from finlora.core.errors import UserError
from finlora.core.paths import ROOT, shown
from finlora.data import prepare, rows
from finlora.data.layouts import parse_columns
from finlora.data.tasks import load_tasks
from finlora.evaluate import scorers
from finlora.export import merge
from finlora.models.load import load_base
from finlora.models.trained import load_trained
from finlora.recipes import names as recipe_names
from finlora.recipes.bases import fetch_base, load_bases
from finlora.recipes.packaged import Unreachable
from finlora.train import tiny
from finlora.train.run import is_unfinished, train
from finlora.train.runs import OUTPUTS

RECIPE = recipe_names.RECIPES / "demo_smollm2_bf16_r8_dora.yaml"
TINY_RECIPE = recipe_names.RECIPES / "demo_r8_dora.yaml"
HELD_OUT = tiny.SAMPLE / "test" / "fpb_test.jsonl"
FEWEST_HELD_OUT = 5  # rows: fewer say nothing
ROWS = 100  # of a real model's scores
# Tokens of an answer: a base model's is a sentence.
SHORTEST_ANSWER, LONGEST_ANSWER, BATCH = 12, 64, 64

Pairs = list[tuple[str, str]]  # prompt and answer


class Score(NamedTuple):
    """Shares of right answers, as a person reads them and strictly; the seconds that the answers took; the first."""

    read: float
    strict: float
    seconds: float
    answer: str


def demo(data: Path | None = None, columns: str | None = None) -> dict[str, Score]:
    """Train, merge and evaluate; return the scores of base, adapter and the most frequent answer ("usual").

    data: rows of your own; a fifth of them, without near-duplicates of the rest, is held out. columns: what their keys
    or columns are, as NAME=context,NAME=target.
    """
    started = time.perf_counter()
    base = real_base()
    recipe = RECIPE if base else TINY_RECIPE
    held_out = prepare_rows(data, columns)
    if base:  # at most so many rows, evenly over the whole, which may be sorted by answer: a minute
        held_out = held_out[:: -(-len(held_out) // ROWS)]
    else:
        base = tiny_base(data)
    record = train(recipe, force=not is_unfinished(recipe))
    merged = merge.run(load_trained(recipe.stem), limit=0)
    labels = load_tasks()["sentiment"].labels if data is None else None
    tokenizer = AutoTokenizer.from_pretrained(OUTPUTS / recipe.stem)
    scores = {
        name: evaluate(folder, tokenizer, held_out, labels) for name, folder in (("base", base), ("adapter", merged))
    }
    usual = Counter(target for _, target in held_out).most_common(1)[0][0]
    scores["usual"] = score([usual] * len(held_out), held_out, labels, 0)
    where = f"{len(held_out)} held-out rows of {data or HELD_OUT.relative_to(ROOT)}"
    print(f"\n{where}\n{'right answers:':<48}{'as read':>9}{'strictly':>10}{'seconds':>9}")
    for label, key in (
        (f"base model ({base.resolve().name})", "base"),
        (f"always the usual answer ({usual[:12]})", "usual"),
        (f"base + DoRA r8, merged ({record['metrics']['steps']} steps)", "adapter"),
    ):
        print(f"{label:<48}{scores[key].read:>9.1%}{scores[key].strict:>10.1%}{scores[key].seconds:>9.0f}")
    for role, text in ("user", held_out[0][0]), ("base", scores["base"].answer), ("merged", scores["adapter"].answer):
        print(f"{role + ':':<9}{text.strip()}".replace("\n", f"\n{'':<9}"))
    took = time.perf_counter() - started
    print(f"{took:.0f} s in all, {record['metrics']['seconds']:.0f} of them training; model: {shown(merged)}")
    return scores


def real_base() -> Path | None:
    """SmolLM2's folder; None, and a line that says why, where it is neither here nor to be had."""
    try:
        return fetch_base(RECIPE, {"base_model": load_bases()["smollm2"].recipe.base_model})
    except Unreachable as reason:
        print(
            f"on a made-up model of four million parameters instead of SmolLM2: {reason}", file=sys.stderr, flush=True
        )
        return None


def tiny_base(data: Path | None) -> Path:
    """It learns from the sample's or the train rows' prompts alone, never from an answer or a held-out row."""
    own = prepare.PREPARED / "demo" / "train.jsonl"
    base = tiny.build([prompt for prompt, _ in read_pairs(own)] if data else tiny.sample_texts())
    tiny.link(base)
    return base


def prepare_rows(data: Path | None, columns: str | None = None) -> Pairs:
    """Write the demo's train and validation rows; return those held out. UserError where they are too few."""
    folder = prepare.PREPARED / "demo"
    if data is None:
        prepare.prepare("sentiment", tiny.SAMPLE, folder)
        return [(row.context, row.target) for row in rows.read_rows(HELD_OUT)]
    mapping = parse_columns(columns)
    if row := next((row for row in rows.read_rows(data, mapping) if row.earlier), None):
        raise UserError(f"{data}:{row.line}: has turns before its question; `make data` takes such rows")
    options = prepare.Options(file=str(data.absolute()), columns=mapping, any_label=True, validation=0.2)
    count = prepare.prepare("sentiment", out=folder, options=options).rows
    if count.get("validation", 0) < FEWEST_HELD_OUT:
        raise UserError(
            f"{data}: {count['read']} rows are too few to hold some out without near-duplicates of the rest; give at "
            f"least {5 * FEWEST_HELD_OUT} different ones"
        )
    held_out = list(read_pairs(folder / "validation.jsonl"))
    if sum(target.lower() in prompt.lower() for prompt, target in held_out) < len(held_out) / 2:
        print(
            f"{data}: the answers (as {held_out[0][1][:30]!r}) do not stand in the prompts, so the base model cannot "
            "know them; a list of them in each prompt lets it choose",
            file=sys.stderr,
        )
    return held_out


def read_pairs(path: Path) -> Iterator[tuple[str, str]]:
    """(prompt, answer) of each row of a prepared file."""
    for line in path.read_text(encoding="utf-8").splitlines():
        user, assistant = json.loads(line)["messages"]
        yield user["content"], assistant["content"]


def evaluate(folder: Path, tokenizer, held_out: Pairs, labels: list[str] | None) -> Score:
    """The scores of a model's greedy answers."""
    from finlora.models.generate import generate  # late: it imports bitsandbytes, see models.trained.disable_hub

    model, started = load_base(str(folder), 16, fast=True), time.perf_counter()
    longest = max(len(ids) for ids in tokenizer([target for _, target in held_out])["input_ids"])
    limit = min(max(longest + 1, SHORTEST_ANSWER), LONGEST_ANSWER)
    answers: list[str] = []
    for start in range(0, len(held_out), BATCH):
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            for prompt, _ in held_out[start : start + BATCH]
        ]
        ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
        answers += [answer.text for answer in generate(model, tokenizer, ids, limit)]
    return score(answers, held_out, labels, time.perf_counter() - started)


def score(answers: list[str], held_out: Pairs, labels: list[str] | None, seconds: float) -> Score:
    spec = load_tasks()["sentiment"].tests["fpb"].model_copy(update={"labels": labels})
    targets = [target for _, target in held_out]
    read, strict = (sum(way(spec, answers, targets)["right"]) for way in (scorers.read, scorers.strict))
    return Score(read / len(targets), strict / len(targets), seconds, answers[0])


def run(data: Path | None = None, columns: str | None = None) -> None:
    """The demo; UserError where the adapter is no better than the base model or the most frequent answer."""
    try:
        scores = demo(data, columns)
    except KeyboardInterrupt:
        if not any(
            is_unfinished(recipe) for recipe in (RECIPE, TINY_RECIPE)
        ):  # else training has said where it resumes
            print("\ninterrupted; the same command begins anew", file=sys.stderr)
        raise
    if scores["adapter"].read <= max(scores["base"].read, scores["usual"].read):
        raise UserError("the adapter is no better than the base model or the usual answer on these rows")
