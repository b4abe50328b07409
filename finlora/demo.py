"""The whole path on two CPU cores: base model, DoRA through axolotl, merge, and a table on held-out rows (`make demo`).

finlora demo [--data rows.jsonl]
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoTokenizer

from finlora.core.errors import UserError
from finlora.core.paths import ROOT
from finlora.data import prepare, rows
from finlora.export.merge import merge
from finlora.models.load import load_base
from finlora.models.trained import load_trained
from finlora.recipes import names as recipe_names
from finlora.train import tiny
from finlora.train.run import is_unfinished, train
from finlora.train.runs import OUTPUTS

RECIPE = recipe_names.RECIPES / "demo_r8_dora.yaml"
HELD_OUT = tiny.SAMPLE / "test" / "fpb_test.jsonl"
MAX_NEW_TOKENS, BATCH = 12, 32


def demo(data: Path | None = None) -> dict[str, float]:
    """Train, merge and evaluate; return the accuracy of base, adapter and the most frequent answer ("usual").

    data: rows of your own; a fifth of them, without near-duplicates of the rest, is held out.
    """
    started = time.perf_counter()
    folder = prepare.PREPARED / "demo"
    if data is None:
        prepare.prepare("sentiment", tiny.SAMPLE, folder)
        held_out = [(row.context, row.target) for row in rows.read_rows(HELD_OUT)]
        base = tiny.build(tiny.sample_texts())
    else:
        prepare.prepare(
            "sentiment", out=folder, options=prepare.Options(file=str(data.absolute()), any_label=True, validation=0.2)
        )
        held_out = list(read_pairs(folder / "validation.jsonl"))
        # The base model learns from the train rows' prompts alone, never from an answer or a held-out row.
        base = tiny.build([prompt for prompt, _ in read_pairs(folder / "train.jsonl")])
    tiny.link(base)
    adapter = OUTPUTS / "demo_r8_dora"
    record = train(RECIPE, force=not is_unfinished(RECIPE))
    scores = evaluate(base, adapter, held_out)
    usual, count = Counter(target for _, target in held_out).most_common(1)[0]
    scores["usual"] = count / len(held_out)
    print(f"\n{len(held_out)} held-out rows of {data or HELD_OUT.relative_to(ROOT)}")
    print(f"{'model':<44}{'right answers':>14}")
    for label, key in (
        ("base model", "base"),
        (f"always the usual answer ({usual[:12]})", "usual"),
        (f"base + DoRA r8, merged ({record['metrics']['steps']} steps)", "adapter"),
    ):
        print(f"{label:<44}{scores[key]:>13.1%}")
    print(f"{time.perf_counter() - started:.0f} s in all; adapter and merged model: {adapter.relative_to(ROOT)}")
    return scores


def read_pairs(path: Path) -> Iterator[tuple[str, str]]:
    """(prompt, answer) of each row of a prepared file."""
    for line in path.read_text(encoding="utf-8").splitlines():
        user, assistant = json.loads(line)["messages"]
        yield user["content"], assistant["content"]


def evaluate(base: Path, adapter: Path, held_out: list[tuple[str, str]]) -> dict[str, float]:
    """The share of right answers of the base, and of the adapter merged into it (`make merge`)."""
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    folders = {"base": base, "adapter": merge(load_trained(RECIPE.stem), limit=0)}
    return {name: right_answers(load_base(str(folder), 16), tokenizer, held_out) for name, folder in folders.items()}


def right_answers(model, tokenizer, held_out: list[tuple[str, str]]) -> float:
    """The share of greedy answers that equal the target."""
    from finlora.models.generate import generate  # late: it imports bitsandbytes, see models.trained.disable_hub

    right = 0
    for start in range(0, len(held_out), BATCH):
        batch = held_out[start : start + BATCH]
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            for prompt, _ in batch
        ]
        ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
        answers = generate(model, tokenizer, ids, MAX_NEW_TOKENS)
        right += sum(answer.text.strip() == target.strip() for answer, (_, target) in zip(answers, batch, strict=True))
    return right / len(held_out)


def run(data: Path | None = None) -> None:
    """The demo; UserError where the adapter is no better than the base model or the most frequent answer."""
    try:
        scores = demo(data)
    except KeyboardInterrupt:
        if not is_unfinished(RECIPE):  # else training has said where it resumes
            print("\ninterrupted; the same command begins anew", file=sys.stderr)
        raise
    if scores["adapter"] <= max(scores["base"], scores["usual"]):
        raise UserError("the adapter is no better than the base model or the usual answer on these rows")
