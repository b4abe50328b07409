"""lm-evaluation-harness's model class with batches sized by what memory takes."""

import json
import logging
import sys
from collections.abc import Sequence

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from finlora.core.errors import UserError
from finlora.core.progress import progress
from finlora.models.generate import Answer, generate

CPU_BATCH_TOKENS = 8192  # padded tokens at a time, prompts and answers: 2 GiB of an 8B model's float32 cache
LARGEST_BATCH = 1024


class BatchedHFLM(HFLM):
    """HFLM on a loaded model: prompts go in order of length, as many at a time as `batch_tokens` tokens take.

    lm-eval's own batch_size "auto" tries out batches of the full context length first, which takes 100 times as long
    as the answer to a short prompt. `tokens` maps a prompt to (its tokens, its answer's tokens, whether the answer
    ended). Without `batch_tokens` the free memory decides. eot_tokens: see `end_tokens`.
    """

    def __init__(self, model, tokenizer, batch_tokens: int | None = None, eot_tokens: Sequence[str] = ()):
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self.vocabulary = model.get_input_embeddings().num_embeddings
        # An adapter's tokenizer may have a padding token of its own; any token will do, since none attends to padding.
        if tokenizer.pad_token_id >= self.vocabulary:
            tokenizer.pad_token = tokenizer.eos_token
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal")
        self.batch_tokens, self.eot_tokens = batch_tokens, eot_tokens
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
        # Requests with equal options stand together, the longest first: what does not fit fails at once.
        left = sorted(range(len(asked)), key=lambda index: (json.dumps(asked[index][1]), -len(ids[index])))
        budget = self.batch_tokens or batch_tokens(self.model)
        with progress("answers", "row") as show:
            show(0, len(asked))
            while left:
                options = normalize_gen_kwargs(asked[left[0]][1])
                longest = len(ids[left[0]]) + options["max_gen_toks"]
                if longest > self.max_length:
                    raise UserError(
                        f"a prompt and its answer take {longest:,} tokens and the model {self.max_length:,}; give "
                        "fewer SHOTS=, or leave the set out with TASKS="
                    )
                batch = [index for index in left[: batch_size(budget, longest)] if asked[index][1] == asked[left[0]][1]]
                answered = self.answers([ids[index] for index in batch], options)
                if answered is None:
                    budget = longest * len(batch) // 2
                    torch.cuda.empty_cache()
                    continue
                for index, answer in zip(batch, answered, strict=True):
                    answers[index] = answer.text
                    self.tokens[asked[index][0]] = len(ids[index]), answer.tokens, answer.ended
                    self.cache_hook.add_partial("generate_until", asked[index], answer.text)
                left = left[len(batch) :]
                show(len(asked) - len(left), len(asked))
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

    def answers(self, ids: list[list[int]], options: dict) -> list[Answer] | None:
        """One batch's answers; None where several prompts do not fit in memory.

        The caller tries again outside of the except block, whose traceback would keep the tensors in memory.
        """
        try:
            return generate(self.model, self.tokenizer, ids, options["max_gen_toks"], options["until"], self.eot_tokens)
        except torch.OutOfMemoryError:
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


def batch_size(budget: int, longest: int) -> int:
    return max(1, min(LARGEST_BATCH, budget // longest))


def batch_tokens(model, logits: bool = False) -> int:
    """Tokens that fit in half of the free GPU memory, at two bytes a number; CPU_BATCH_TOKENS without a GPU.

    A token takes 2 (keys, values) x layers x heads x head size in the cache, and while a layer is computed about ten
    activations of the hidden size and three of the MLP's; with `logits` also three of the vocabulary's size (logits,
    their float32 copy).
    """
    if not torch.cuda.is_available():
        return CPU_BATCH_TOKENS
    torch.cuda.empty_cache()
    config = model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    cached = 2 * config.num_hidden_layers * heads * (config.hidden_size // config.num_attention_heads)
    activations = 10 * config.hidden_size + 3 * config.intermediate_size + 3 * logits * config.vocab_size
    return max(1024, int(torch.cuda.mem_get_info()[0] / 2 / (2 * (cached + activations))))
