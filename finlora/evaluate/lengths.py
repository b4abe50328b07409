"""How long an answer may be: enough for the longest target of its set, or as in FinLoRA (LENGTHS=published)."""

from pathlib import Path
from typing import NamedTuple

from finlora.data.test_sets import all_sets, read_set


class Length(NamedTuple):
    """`targets_cut` is the number of rows whose target has more tokens than `max_new_tokens`."""

    lengths: str
    max_new_tokens: int
    targets_cut: int


def answer_length(name: str, folder: Path, lengths: str, tokenizer) -> Length:
    """The limit of a test set, which leaves room for an end token. lengths: whole or published.

    Without a tokenizer, behind an endpoint, a target's UTF-8 bytes stand for its tokens: it has no more of them.
    """
    rows = read_set(name, folder).rows
    texts = sorted({text for row in rows for text in (row.target, row.corrected)})
    tokens = tokenizer(texts, add_special_tokens=False)["input_ids"] if tokenizer else map(str.encode, texts)
    sizes = dict(zip(texts, map(len, tokens), strict=True))
    limit = all_sets()[name].max_new_tokens
    if lengths == "whole":
        limit = max(limit, *(size + 1 for size in sizes.values()))
    return Length(lengths, limit, sum(sizes[row.target] > limit for row in rows))
