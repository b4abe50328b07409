"""lm-evaluation-harness's view of a model: greedy answers in batches that memory takes."""

import json
import os
from typing import Any

from finlora.core.errors import UserError

CPU_BATCH_TOKENS = 8192
LARGEST_BATCH = 1024


def harness(model, tokenizer, batch_tokens: int | None = None):
    """lm-eval's model around ours; `tokens` maps a prompt to its tokens, its answer's, and whether the answer ended.

    Prompts go in order of length, as many at a time as `batch_tokens` tokens take, fewer where memory does not suffice.
    lm-eval's own "auto" tries out full-length batches first, which takes 100 times as long as a short prompt's answer.
    """
    import logging

    import torch
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from tqdm import tqdm

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    known = model.get_input_embeddings().num_embeddings
    if tokenizer.pad_token_id >= known:  # an adapter's tokenizer may have one of its own; no token attends to it
        tokenizer.pad_token = tokenizer.eos_token

    class Model(HFLM):
        def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
            asked = [request.args for request in requests]
            ids = tokenizer([prompt for prompt, _ in asked], add_special_tokens=False)["input_ids"]
            if (largest := max(map(max, ids))) >= known:
                raise UserError(
                    f"the tokenizer has a token {largest:,} and the model {known:,} tokens: they do not belong "
                    "together; name the adapter's own base with MODEL="
                )
            answers = [""] * len(asked)
            left = sorted(range(len(asked)), key=lambda place: (json.dumps(asked[place][1]), -len(ids[place])))
            tokens = batch_tokens or _batch_tokens(model)
            with tqdm(total=len(asked), desc="answers", disable=disable_tqdm) as bar:
                while left:
                    given = asked[left[0]][1]
                    options = normalize_gen_kwargs(given)
                    longest = len(ids[left[0]]) + options["max_gen_toks"]
                    if longest > self.max_length:
                        raise UserError(
                            f"a prompt and its answer take {longest:,} tokens and the model {self.max_length:,}; leave "
                            "the set out with TASKS="
                        )
                    batch = [place for place in left[: _batch_size(tokens, longest)] if asked[place][1] == given]
                    try:
                        found = _answers(model, tokenizer, [ids[place] for place in batch], options)
                    except torch.OutOfMemoryError:
                        if len(batch) == 1:
                            raise
                        found = None
                    if found is None:  # out of the except block, which holds on to the tensors
                        tokens = longest * len(batch) // 2
                        torch.cuda.empty_cache()
                        continue
                    for place, (text, length, ended) in zip(batch, found, strict=True):
                        answers[place] = text
                        self.tokens[asked[place][0]] = len(ids[place]), length, ended
                        self.cache_hook.add_partial("generate_until", asked[place], text)
                    bar.update(len(batch))
                    left = left[len(batch) :]
            return answers

        def _detect_batch_size(self, *_, **__) -> int:
            return 0  # so that the schedule below decides, for likelihoods

        def _batch_scheduler(self, position: int, requests: tuple) -> int:
            if position == 0 or position == self.next_batch:
                longest = len(self.tok_encode("".join(requests[position][0])))
                self.size = _batch_size(batch_tokens or _batch_tokens(model, logits=True), longest)
                self.next_batch = position + self.size
            return self.size

    lm = Model(pretrained=model, tokenizer=tokenizer, batch_size="auto", backend="causal")
    lm.tokens = {}
    return lm


def _answers(model, tokenizer, ids: list[list[int]], options: dict[str, Any]) -> list[tuple[str, int, bool]]:
    """Greedy answers to tokenised prompts: text, tokens with the end, and whether there was one (else it was cut).

    What all prompts begin with, an instruction mostly, is computed once. `options` are lm-eval's: max_gen_toks, until.
    """
    import torch
    from lm_eval.models.utils_hf import stop_sequences_criteria
    from transformers import DynamicCache

    width = max(map(len, ids))
    shared = min(len(os.path.commonprefix(ids)), min(map(len, ids)) - 1) if len(ids) > 1 else 0
    gaps = [width - len(row) for row in ids]
    rows = [row[:shared] + [tokenizer.pad_token_id] * gap + row[shared:] for row, gap in zip(ids, gaps, strict=True)]
    there = [[1] * shared + [0] * gap + [1] * (width - shared - gap) for gap in gaps]
    inputs = {
        "input_ids": torch.tensor(rows, device=model.device),
        "attention_mask": torch.tensor(there, device=model.device),
    }
    configured = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])} - {None}
    until = options["until"]
    with torch.no_grad():
        if shared:
            cache = DynamicCache(config=model.config)
            model(inputs["input_ids"][:1, :shared], past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache.batch_repeat_interleave(len(ids))
            inputs["past_key_values"] = cache
        out = model.generate(
            **inputs,
            max_new_tokens=options["max_gen_toks"],
            do_sample=False,
            eos_token_id=sorted(ends),
            pad_token_id=tokenizer.pad_token_id,
            stopping_criteria=stop_sequences_criteria(tokenizer, until, width, len(ids)) if until else None,
        )
    found = []
    for row in out[:, width:].tolist():
        length = next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
        text = tokenizer.decode(row[:length], skip_special_tokens=True)
        stops = [place for place in map(text.find, until) if place >= 0]
        found.append((text[: min(stops, default=None)], length, row[length - 1] in ends or bool(stops)))
    return found


def _batch_size(tokens: int, longest: int) -> int:
    return max(1, min(LARGEST_BATCH, tokens // longest))


def _batch_tokens(model, logits: bool = False) -> int:
    """Prompt tokens that fit at once: half of the free memory, for keys and values, a layer's activations, logits."""
    import torch

    if not torch.cuda.is_available():
        return CPU_BATCH_TOKENS
    torch.cuda.empty_cache()
    config = model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    cached = 2 * config.num_hidden_layers * heads * (config.hidden_size // config.num_attention_heads) * 2
    passing = (10 * config.hidden_size + 3 * config.intermediate_size + 3 * logits * config.vocab_size) * 2
    return max(1024, int(torch.cuda.mem_get_info()[0] / 2 / (cached + passing)))
