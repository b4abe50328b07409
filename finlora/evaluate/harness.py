"""lm-evaluation-harness's model class with batches sized by what memory takes."""

import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from fastdora import prefixes
from finlora.core import machine
from finlora.core.errors import UserError
from finlora.core.progress import progress
from finlora.models import shared
from finlora.models.generate import Answer, generate
from finlora.models.load import end_tokens

CPU_BATCH_TOKENS = 8192  # tokens at a time, prompts and answers: 2 GiB of an 8B model's float32 cache
LARGEST_BATCH = 1024


class BatchedHFLM(HFLM):
    """HFLM on a loaded model: prompts of one prefix go together, as many at a time as `batch_tokens` tokens take.

    lm-eval's own batch_size "auto" tries out batches of the full context length first, which takes 100 times as long
    as the answer to a short prompt. `tokens` maps a prompt to (its tokens, its answer's tokens, whether the answer
    ended). Without `batch_tokens` the free memory decides. eot_tokens: a recipe's, which end an answer too.
    """

    def __init__(self, model, tokenizer, batch_tokens: int | None = None, eot_tokens: Sequence[str] = ()):
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self.vocabulary = model.get_input_embeddings().num_embeddings
        # An adapter's tokenizer may have a padding token of its own; any token will do, since none attends to padding.
        if tokenizer.pad_token_id >= self.vocabulary:
            tokenizer.pad_token = tokenizer.eos_token
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal")
        self.batch_tokens, self.ends = batch_tokens, end_tokens(model, tokenizer, eot_tokens)
        self.tokens: dict[str, tuple[int, int, bool]] = {}

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Greedy answers in the order of the requests; a batch that does not fit in memory is halved."""
        asked = [request.args for request in requests]
        ids = self.tokenizer([prompt for prompt, _ in asked], add_special_tokens=False)["input_ids"]
        if (largest := max(map(max, ids))) >= self.vocabulary:
            raise UserError(
                f"the tokenizer has a token {largest:,} and the model {self.vocabulary:,} tokens: they do not belong "
                "together; name the adapter's own base with MODEL="
            )
        self.warn_of_bos(ids[0])
        answers = [""] * len(asked)
        alike: dict[str, list[int]] = {}
        for index, (_, options) in enumerate(asked):
            alike.setdefault(json.dumps(options), []).append(index)
        with progress("answers", "row") as show:
            done = 0
            show(done, len(asked))
            for indices in alike.values():
                options = normalize_gen_kwargs(asked[indices[0]][1])
                for batch in self.answers({index: ids[index] for index in indices}, options):
                    for index, answer in batch.items():
                        answers[index] = answer.text
                        self.tokens[asked[index][0]] = len(ids[index]), answer.tokens, answer.ended
                        self.cache_hook.add_partial("generate_until", asked[index], answer.text)
                    done += len(batch)
                    show(done, len(asked))
        return answers

    def warn_of_bos(self, ids: list[int]) -> None:
        """Say where a prompt begins with two beginning-of-text tokens, or lacks the one that its tokenizer adds."""
        bos, one = self.tokenizer.bos_token, self.tokenizer.bos_token_id
        adds = one is not None and self.tokenizer("a")["input_ids"][0] == one
        count = next((place for place, token in enumerate(ids) if token != one), len(ids))
        if count > 1 or (adds and not count):
            print(
                f"warning: prompts begin with {count or 'no'} {bos}, where the model expects one; look at the chat "
                "template, or choose another with PROMPT=",
                file=sys.stderr,
            )

    def answers(self, ids: dict[int, list[int]], options: dict) -> Iterator[dict[int, Answer]]:
        """The answers to prompts by their indices, a batch at a time. UserError for a prompt that is too long."""
        new, budget = options["max_gen_toks"], self.batch_tokens or batch_tokens(self.model)
        longest = max(map(len, ids.values())) + new
        if longest > self.max_length:
            raise UserError(
                f"a prompt and its answer take {longest:,} tokens and the model {self.max_length:,}; give fewer "
                "SHOTS=, or leave the set out with TASKS="
            )
        left, kept = order_by_prefix(ids, budget, shared.supports(self.model)), {}
        while left:
            rows, tokens = fill_batch(left, new, budget)
            answered = self.batch_answers([(ids[one.index], one.prefix) for one in left[:rows]], options, kept)
            if answered is None:
                budget = tokens // 2
                torch.cuda.empty_cache()
                continue
            yield {one.index: answer for one, answer in zip(left[:rows], answered, strict=True)}
            left = left[rows:]

    def batch_answers(
        self, prompts: list[tuple[list[int], int]], options: dict, kept: shared.Kept
    ) -> list[Answer] | None:
        """One batch's answers; None where several prompts do not fit in memory. prompts: tokens, and how many of them
        are a shared prefix.

        The caller tries again outside of the except block, whose traceback would keep the tensors in memory.
        """
        ids, prefixes = zip(*prompts, strict=True)
        limits = options["max_gen_toks"], options["until"], self.ends
        try:
            return generate(self.model, self.tokenizer, ids, *limits, prefixes, kept)
        except torch.OutOfMemoryError:
            kept.clear()
            if len(ids) == 1:
                raise
            return None

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """HFLM's, in groups of similar length, each with the batch size that its longest request allows.

        The choices of a question stay in one group, since HFLM computes a context's logits once for all of them.
        """
        tokens = {}
        for texts in zip(*[request.args for request in requests], strict=True):  # contexts, then continuations
            distinct = list(dict.fromkeys(texts))
            tokens |= zip(distinct, map(len, self.tokenizer(distinct)["input_ids"]), strict=True)
        lengths = [sum(tokens[text] for text in request.args) for request in requests]
        answers: list = [None] * len(requests)
        left = sorted(range(len(requests)), key=lambda index: -lengths[index])
        budget = self.batch_tokens or batch_tokens(self.model, logits=True)
        with progress("choices", "request") as show:
            show(0, len(requests))
            while left:
                longest = lengths[left[0]]
                group = [index for index in left if 4 * lengths[index] >= 3 * longest]
                self.batch_size_per_gpu = batch_size(budget, longest)
                answered = super().loglikelihood([requests[index] for index in group], disable_tqdm=True)
                for index, answer in zip(group, answered, strict=True):
                    answers[index] = answer
                left = left[len(group) :]
                show(len(requests) - len(left), len(requests))
        return answers


class Asked(NamedTuple):
    """A prompt by its index: the group that it shares a prefix with (-1: none), its tokens in it and beyond it."""

    index: int
    group: int
    prefix: int
    own: int


def order_by_prefix(ids: dict[int, list[int]], budget: int, sharing: bool) -> list[Asked]:
    """Prompts in the order in which they are asked: those of one prefix together, and else the longest first, since
    what does not fit should fail at once. budget: tokens of a batch. sharing: whether the model can share prefixes.
    """
    rows = [np.asarray(row) for row in ids.values()]
    found = prefixes.Shared(np.full(len(rows), -1), np.zeros(len(rows), dtype=np.int64))
    if sharing:
        found = prefixes.find(rows, [len(row) - 1 for row in rows], budget, len(rows))
    asked = [
        Asked(index, int(group), int(length), len(row) - int(length))
        for index, row, group, length in zip(ids, rows, found.groups, found.lengths, strict=True)
    ]
    longest: dict[int, int] = {}
    for one in asked:
        longest[one.group] = max(longest.get(one.group, 0), one.prefix + one.own)
    return sorted(asked, key=lambda one: (-longest[one.group], one.group, -one.own))


def fill_batch(left: list[Asked], new: int, budget: int) -> tuple[int, int]:
    """The rows from the first on that `budget` tokens take, at least one, and the tokens that these take.

    Those are of each prefix once, and for each row those of the longest beyond its prefix, with `new` of the answer.
    """
    taken, rows, before, longest, groups = 0, 0, 0, 0, {-1}
    for one in left[:LARGEST_BATCH]:
        before += 0 if one.group in groups else one.prefix
        groups.add(one.group)
        longest = max(longest, one.own)
        tokens = before + (rows + 1) * (longest + new)
        if rows and tokens > budget:
            break
        taken, rows = tokens, rows + 1
    return rows, taken


def batch_size(budget: int, longest: int) -> int:
    return max(1, min(LARGEST_BATCH, budget // longest))


def batch_tokens(model, logits: bool = False) -> int:
    """Tokens that fit in half of the free GPU memory, at two bytes a number; CPU_BATCH_TOKENS without a GPU.

    Where a sweep's points share the GPU each takes its part of that half: several that fill it leave none to the rest.
    A token takes 2 (keys, values) x layers x heads x head size in the cache, and while a layer is computed about ten
    activations of the hidden size and three of the MLP's; with `logits` also three of the vocabulary's size (logits,
    their float32 copy).
    """
    if not torch.cuda.is_available():
        return CPU_BATCH_TOKENS
    torch.cuda.empty_cache()
    config = model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cached = 2 * config.num_hidden_layers * heads * head_size
    activations = 10 * config.hidden_size + 3 * config.intermediate_size + 3 * logits * config.vocab_size
    free = torch.cuda.mem_get_info()[0] / int(os.environ.get(machine.POINTS_PER_GPU, 1))
    return max(1024, int(free / 2 / (2 * (cached + activations))))
