"""finlora.data.tokens: which tokenizer counts, and that Llama-3's own gives the lengths that data/tasks.yaml states."""

import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
from failures import refuses

from fastdora import prefixes
from finlora.core.paths import ROOT
from finlora.data import tokens
from finlora.data.rows import read_rows
from finlora.data.tasks import load_tasks
from finlora.recipes.load import load
from finlora.recipes.names import RECIPES

REAL = ROOT.parent / "shared" / "finlora" / "data"


@pytest.fixture
def no_cache(monkeypatch):
    monkeypatch.setattr(tokens, "try_to_load_from_cache", lambda *_: None)


def test_llama_models_stands_in_for_the_hub(tmp_path, monkeypatch, no_cache):
    model = tmp_path / "llama3" / "tokenizer.model"
    model.parent.mkdir()
    model.write_text("")
    package = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: package if name == "llama_models" else None)
    assert tokens.tokenizer_of(tokens.LLAMA) == model
    assert tokens.tokenizer_of("Qwen/Qwen3-8B") is None  # another model's tokens are not Llama's
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert tokens.tokenizer_of(tokens.LLAMA) is None


def test_tokens_by_a_tokenizer_model(tmp_path):
    """Merges in tiktoken's format: all bytes, and one pair; special tokens are one token each."""
    import base64

    merges = [bytes([byte]) for byte in range(256)] + [b"ab"]
    path = tmp_path / "tokenizer.model"
    path.write_text("".join(f"{base64.b64encode(merge).decode()} {rank}\n" for rank, merge in enumerate(merges)))
    count = tokens.counter(path)
    assert count(["ab", "abc", "é", "<|eot_id|>ab<|end_header_id|>", ""]) == [1, 2, 2, 3, 0]
    # Seven special tokens; names and blank lines are bytes here, and both texts are trimmed to one token.
    text = tokens.chat([("user", " ab "), ("assistant", "ab\n")])
    assert count([text])[0] == 7 + len("user\n\n") + 1 + len("assistant\n\n") + 1
    path.write_text("nothing of the kind\n")
    with refuses("not a tokenizer", "tokenizer.json", file=path):
        tokens.counter(path)


@pytest.mark.parametrize(
    ("file", "mean", "longest"),
    [
        ("test/fpb_test.jsonl", 67, 164),
        ("test/nwgi_test.jsonl", 94, 267),
        ("test/ner_test.jsonl", 149, 727),
        ("train/formula_train.jsonl", 131, 278),
        ("train/financebench_train.jsonl", 934, 2404),
        ("train/xbrl_term_train.jsonl", 71, 343),
        ("older/finer_test_older.jsonl.gz", 1855, 2842),
    ],
)
def test_real_lengths_by_llama_3s_tokenizer(file, mean, longest, no_cache):
    """The lengths behind tokens_about in data/tasks.yaml, recounted."""
    path = tokens.tokenizer_of(tokens.LLAMA)
    if path is None or not (REAL / file).exists():
        pytest.skip("needs FinLoRA's files in ../shared, and llama-models, which the dev extra has")
    counts = tokens.counter(path)([tokens.chat(row.turns) for row in read_rows(REAL / file, left_out=[])])
    assert (round(sum(counts) / len(counts)), max(counts)) == (mean, longest)


@pytest.mark.parametrize(
    ("task", "file"),
    [
        ("ner", "test/ner_test.jsonl"),
        ("formula", "train/formula_train.jsonl"),
        ("xbrl_term", "train/xbrl_term_train.jsonl"),
        ("finer", "older/finer_test_older.jsonl.gz"),
        ("sentiment", "test/fpb_test.jsonl"),
    ],
)
def test_what_a_row_adds_to_a_pack_that_shares_prefixes(task, file, no_cache):
    """packed_tokens_about in data/tasks.yaml, recounted with the recipe's packs."""
    path = tokens.tokenizer_of(tokens.LLAMA)
    if path is None or not (REAL / file).exists():
        pytest.skip("needs FinLoRA's files in ../shared, and llama-models, which the dev extra has")
    keys = load(RECIPES / f"{task}_r8_dora.yaml").keys
    tokenizer, rows = tokens.read_tokenizer(path), list(read_rows(REAL / file, left_out=[]))
    ids, asked = ([one.ids for one in tokenizer.encode_batch_fast(texts, add_special_tokens=False)] for texts in (
        [tokens.chat(row.turns) for row in rows],
        [f"{tokens.chat(row.turns[:-1])}<|start_header_id|>assistant<|end_header_id|>\n\n" for row in rows],
    ))  # fmt: skip
    sizes, together = np.array([len(row) for row in ids]), keys["fastdora_rows_per_prefix"]
    found = prefixes.find(
        [np.array(row) for row in ids], [len(row) - 1 for row in asked], keys["sequence_len"], together
    )
    packs = prefixes.pack(sizes, found, keys["sequence_len"], together, None, np.random.default_rng(0))
    shared = (({int(found.groups[row]): int(found.lengths[row]) for row in pack}).values() for pack in packs)
    filled = sum(map(sum, shared)) + int((sizes - found.lengths).sum())
    # Room that no row fits into belongs to the rows of a pack: the table's figure is of whole packs.
    lowest, highest = filled / len(rows), len(packs) * keys["sequence_len"] / len(rows)
    # 3%: the table's figures are rounded, and other draws fill packs a little differently.
    assert lowest * 0.97 <= load_tasks()[task].packed_tokens_about <= highest * 1.03
