"""Greedy answers to a batch of prompts."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from lm_eval.models.utils_hf import stop_sequences_criteria
from transformers import DynamicCache, TextStreamer

from finlora.models import shared
from finlora.models.load import end_tokens


class Answer(NamedTuple):
    """`tokens` counts the end token too; `ended` is False where max_new_tokens cut the answer."""

    text: str
    tokens: int
    ended: bool


def generate(
    model,
    tokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: Sequence[str] = (),
    ends: Sequence[int] | None = None,
    prefixes: Sequence[int] | None = None,
    kept: shared.Kept | None = None,
) -> list[Answer]:
    """One greedy answer for each prompt, given as token ids; texts are cut before the first of the `stop` strings.

    ends: the tokens that end an answer (default: `end_tokens` of no recipe). prefixes, kept: see `shared.answer`;
    without them what all prompts begin with is computed once. Models that `shared` does not support get padded prompts.
    """
    ends = ends or end_tokens(model, tokenizer)
    if not shared.supports(model):
        return padded(model, tokenizer, prompts, max_new_tokens, stop, ends)
    if prefixes is None:
        prefixes = [_common(prompts)] * len(prompts)

    def ended(ids: list[int]) -> bool:
        return ids[-1] in ends or (bool(stop) and any(text in tokenizer.decode(ids) for text in stop))

    rows = shared.answer(model, prompts, prefixes, max_new_tokens, ended, kept)
    return [_answer(tokenizer, row, ends, stop) for row in rows]


def padded(
    model,
    tokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: Sequence[str] = (),
    ends: Sequence[int] | None = None,
    streamer: TextStreamer | None = None,
) -> list[Answer]:
    """The same by transformers' own generation, for any model; what all prompts begin with is computed once.

    streamer: prints the answer to one prompt.
    """
    width, common = max(map(len, prompts)), _common(prompts)
    gaps = [width - len(prompt) for prompt in prompts]
    ids = [
        [*prompt[:common], *[tokenizer.pad_token_id] * gap, *prompt[common:]]
        for prompt, gap in zip(prompts, gaps, strict=True)
    ]
    mask = [[1] * common + [0] * gap + [1] * (width - common - gap) for gap in gaps]
    inputs = {
        "input_ids": torch.tensor(ids, device=model.device),
        "attention_mask": torch.tensor(mask, device=model.device),
    }
    ends = ends or end_tokens(model, tokenizer)
    with torch.no_grad():
        if common:
            cache = DynamicCache(config=model.config)
            model(inputs["input_ids"][:1, :common], past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache.batch_repeat_interleave(len(prompts))
            inputs["past_key_values"] = cache
        out = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            eos_token_id=ends,
            pad_token_id=tokenizer.pad_token_id,
            streamer=streamer,
            stopping_criteria=stop_sequences_criteria(tokenizer, stop, width, len(prompts)) if stop else None,
        )
    return [_answer(tokenizer, row, ends, stop) for row in out[:, width:].tolist()]


def _common(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with; at least one token of each is left over, and all of a single one."""
    return min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1) if len(prompts) > 1 else 0


def _answer(tokenizer, ids: list[int], ends: Sequence[int], stop: Sequence[str]) -> Answer:
    """One row of generate's output: what follows its first end token is padding. The text is without that token."""
    length = next((position + 1 for position, token in enumerate(ids) if token in ends), len(ids))
    ended = ids[length - 1] in ends
    text = tokenizer.decode(ids[: length - ended], skip_special_tokens=True)
    stops = [position for position in map(text.find, stop) if position >= 0]
    return Answer(text[: min(stops, default=None)], length, ended or bool(stops))
