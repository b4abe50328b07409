"""finlora.data.tokens: which tokenizer counts, and that Llama-3's own gives the lengths that data/tasks.yaml states."""

import importlib.util
from types import SimpleNamespace

import pytest
from failures import refuses

from finlora.core.paths import ROOT
from finlora.data import tokens
from finlora.data.rows import read_rows

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
