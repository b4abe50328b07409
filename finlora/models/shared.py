"""Greedy answers to many prompts, of which each prefix that they share is computed once and none is padded.

Three kinds of forward pass, each with its tokens in one row: over all prefixes; over what follows them in each prompt;
then over one token of each answer at a time. Every layer keeps keys and values of the prefixes once, and those of each
prompt's other tokens in a row of a cache. A token attends to its prompt's prefix and to its prompt's own tokens so far
in two calls of torch's flash kernel, joined by their sums of exponentials (fastdora/kernels.py merge_attention).
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from types import SimpleNamespace
from typing import NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from fastdora import attention, kernels
from fastdora.dora import Unsupported
from fastdora.plugin.errors import first_line

NAME = "finlora_shared"
# What a model's generation_config may say: greedy decoding does nothing else with it. Penalties would change answers.
GREEDY = {"bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p", "min_p"}
GREEDY |= {"max_length", "max_new_tokens", "transformers_version", "_from_model_config", "use_cache"}
GREEDY |= {"cache_implementation", "output_attentions", "output_hidden_states"}

Kept = dict[tuple[int, ...], list[torch.Tensor]]  # a prefix's tokens: each layer's keys and values (2, tokens, G, D)


class Prefixes(NamedTuple):
    """Prefixes end to end: where each begins and ends, the longest, and each layer's keys and values (2, T, G, D)."""

    ids: list[tuple[int, ...]]
    edges: list[int]
    bounds: torch.Tensor  # edges as the flash kernel takes them, int32
    longest: int
    layers: list[torch.Tensor]


@dataclass
class Cache:
    """Keys and values (2, prompts, width, G, D) of each prompt's own tokens, by layer."""

    prompts: int
    width: int
    layers: list[torch.Tensor] = field(default_factory=list)


@dataclass
class Pass:
    """A forward pass's tokens: whose they are, their places there, and what they attend to.

    Bounds are int32 tensors: where each part begins, and the last one ends.
    """

    edges: list[int]  # bounds of each prompt's tokens in this pass
    bounds: torch.Tensor  # the same
    longest: int  # tokens of a prompt in this pass
    prefixes: Prefixes | None = None
    groups: torch.Tensor | None = None  # bounds of the tokens that attend to each prefix
    longest_group: int = 0
    cache: Cache | None = None
    rows: torch.Tensor | None = None  # of the cache, and places in them, for each token
    places: torch.Tensor | None = None
    starts: torch.Tensor | None = None  # bounds of the cache's rows
    used: torch.Tensor | None = None  # int32: tokens that each prompt has in the cache after a step
    seen: int = 0  # the most of them; 0: the first pass over these prompts
    kept: list[torch.Tensor] = field(default_factory=list)  # without a cache, each layer's keys and values


def supports(model) -> bool:
    """Whether a transformers model has plain causal attention in all layers, a configuration of plain decoding and, on
    a GPU, a dtype and a head size that torch's flash kernel takes there.
    """
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    if model.device.type == "cuda" and not (
        model.dtype in (torch.bfloat16, torch.float16)
        and kernel_works(model.device, model.dtype, heads, getattr(config, "num_key_value_heads", heads), width)
    ):
        return False
    before = model.config._attn_implementation
    try:
        attention.install(model)
    except Unsupported:
        return False
    finally:
        model.config._attn_implementation = before
    return set(model.generation_config.to_diff_dict()) <= GREEDY


@cache
def kernel_works(device, dtype: torch.dtype, heads: int, groups: int, width: int) -> bool:
    """Whether the flash kernel gives on this device what it gives in float32 on the CPU, but for rounding.

    Older GPUs have none, and torch may change what is an operator of its own.
    """
    try:
        outputs = _trial(device, dtype, heads, groups, width)
        error = (outputs - _trial("cpu", dtype, heads, groups, width, torch.float32)).abs().max().item()
        fault = f"its attention is {error:.2g} from float32's" if not error < 0.05 else ""
    except Exception as reason:  # an operator that is not there, other arguments, a kernel that does not compile
        fault = first_line(reason)
    if fault:
        print(f"prompts are padded, not grouped by what they share: {fault}", file=sys.stderr, flush=True)
    return not fault


def _trial(device, rounded: torch.dtype, heads: int, groups: int, width: int, dtype: torch.dtype | None = None):
    """Attention of random tokens, float32 on the CPU: a first pass and a step of four prompts, three with prefixes."""
    draw = torch.Generator().manual_seed(0)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, width, generator=draw).to(rounded).to(device, dtype or rounded)

    def attend(run: Pass) -> torch.Tensor:
        tokens = run.edges[-1]
        states = (values(1, count, tokens) for count in (heads, groups, groups))
        return _attend(SimpleNamespace(layer_idx=0), *states, None, shared_pass=run)[0].float().cpu()

    edges, sizes, of_row = [0, 40, 47], [3, 1, 5, 2], [0, 0, 1, -1]
    prefixes = Prefixes([(0,), (1,)], edges, _int32(edges, device), 40, [values(2, 47, groups)])
    kept = Cache(len(sizes), max(sizes) + 1)
    first = attend(_pass(device, sizes, of_row, prefixes, kept))
    return torch.cat([first, attend(_step(_pass(device, [1] * 4, of_row, prefixes, kept), sizes, 0))], 1)


@torch.no_grad()
def answer(
    model,
    prompts: Sequence[Sequence[int]],
    shared: Sequence[int],
    max_new_tokens: int,
    ended: Callable[[list[int]], bool],
    kept: Kept | None = None,
) -> list[list[int]]:
    """The tokens of each prompt's greedy answer, up to where `ended` says so of them, or max_new_tokens.

    shared: how many tokens at each prompt's beginning are computed once for all prompts that begin with the same; fewer
    than it has. kept: prefixes of an earlier call with this model; then holds that of this call's last prompt.
    """
    prefix_of = [tuple(prompt[:size]) for prompt, size in zip(prompts, shared, strict=True)]
    order = sorted(range(len(prompts)), key=lambda index: (not prefix_of[index], prefix_of[index], index))
    distinct = list(dict.fromkeys(prefix_of[index] for index in order if prefix_of[index]))
    sizes = [len(prompts[index]) - shared[index] for index in order]
    number = {prefix: place for place, prefix in enumerate(distinct)} | {(): -1}
    of_row = [number[prefix_of[index]] for index in order]
    starts = [len(prefix_of[index]) for index in order]
    with _attention(model):
        prefixes = _compute_prefixes(model, distinct, kept, prefix_of[-1]) if distinct else None
        own = Cache(len(prompts), max(sizes) + max_new_tokens)
        ids = [token for index in order for token in prompts[index][shared[index] :]]
        positions = [start + place for start, size in zip(starts, sizes, strict=True) for place in range(size)]
        run = _pass(model.device, sizes, of_row, prefixes, own)
        last = run.bounds[1:].long() - 1
        token = _forward(model, ids, positions, run, last).argmax(-1)
        written: list[list[int]] = [[] for _ in prompts]
        open_rows = set(range(len(prompts)))
        run = _pass(model.device, [1] * len(prompts), of_row, prefixes, own)
        for step in range(max_new_tokens):
            for row, one in enumerate(token.tolist()):
                if row in open_rows:
                    written[row].append(one)
                    if ended(written[row]):
                        open_rows.remove(row)
            if not open_rows or step + 1 == max_new_tokens:
                break
            _step(run, sizes, step)
            positions = [start + size + step for start, size in zip(starts, sizes, strict=True)]
            token = _forward(model, token.unsqueeze(0), positions, run, 0).argmax(-1)
    return [ids for _, ids in sorted(zip(order, written, strict=True))]


def _compute_prefixes(model, distinct: list[tuple[int, ...]], kept: Kept | None, last: tuple[int, ...]) -> Prefixes:
    """Keys and values of the prefixes, of those that are not in `kept` by one forward pass; keeps the `last`."""
    parts = {prefix: layers for prefix, layers in (kept or {}).items() if prefix in distinct}
    new = [prefix for prefix in distinct if prefix not in parts]
    sizes = [len(prefix) for prefix in distinct]
    edges = [0, *accumulate(sizes)]
    if new:
        run = _pass(model.device, [len(prefix) for prefix in new], [-1] * len(new))
        ids = [token for prefix in new for token in prefix]
        _forward(model, ids, [place for prefix in new for place in range(len(prefix))], run, 1)
        bounds = [0, *accumulate(map(len, new))]
        for prefix, start, end in zip(new, bounds, bounds[1:], strict=False):
            parts[prefix] = [layer[:, start:end] for layer in run.kept]
    layers = (
        run.kept if new == distinct else [torch.cat(part, 1) for part in zip(*map(parts.get, distinct), strict=True)]
    )
    if kept is not None:
        kept.clear()
        if last:
            start, end = edges[distinct.index(last) :][:2]
            kept[last] = [layer[:, start:end].clone() for layer in layers]  # not a view, which would keep all
    return Prefixes(distinct, edges, _int32(edges, model.device), max(sizes), layers)


def _pass(
    device, sizes: list[int], of_row: list[int], prefixes: Prefixes | None = None, cache: Cache | None = None
) -> Pass:
    """A pass over so many tokens of each prompt. of_row: the number of its prefix, in order, or -1, which come last."""
    edges = [0, *accumulate(sizes)]
    run = Pass(edges, _int32(edges, device), max(sizes), prefixes, cache=cache)
    if prefixes:
        groups = [edges[of_row.index(number)] for number in range(len(prefixes.ids))]
        groups.append(edges[next((row for row, number in enumerate(of_row) if number < 0), len(of_row))])
        run.groups = _int32(groups, device)
        run.longest_group = max(b - a for a, b in zip(groups, groups[1:], strict=False))
    if cache:
        run.rows = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(device)
        run.places = torch.tensor([place for size in sizes for place in range(size)], device=device)
        run.starts = torch.arange(len(sizes) + 1, dtype=torch.int32, device=device) * cache.width
    return run


def _step(run: Pass, sizes: list[int], step: int) -> Pass:
    """The pass over each answer's token of this number. sizes: of the prompts' own tokens."""
    run.places = torch.tensor(sizes, device=run.bounds.device) + step
    run.used, run.seen = (run.places + 1).int(), max(sizes) + step + 1
    return run


def _int32(values: list[int], device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def _forward(model, ids, positions: list[int], run: Pass, logits: torch.Tensor | int) -> torch.Tensor:
    """Logits (tokens, vocabulary) at the places asked for (0: all), of tokens that are all in one row."""
    ids = ids if torch.is_tensor(ids) else torch.tensor([ids], device=model.device)
    positions = torch.tensor([positions], device=model.device)
    return model(ids, position_ids=positions, use_cache=False, logits_to_keep=logits, shared_pass=run).logits[0]


@contextmanager
def _attention(model) -> Iterator[None]:
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    before = model.config._attn_implementation
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before


def _attend(module, query, key, value, attention_mask, *, shared_pass: Pass, scaling=None, **kwargs):
    """query (1, H, T, D), key and value (1, G, T, D) -> (1, T, H, D); see the module's docstring."""
    # Contiguous: the flash kernel gives its output the query's strides (empty_like), and merging reads rows of (H, D).
    run, query = shared_pass, query[0].transpose(0, 1).contiguous()
    new = torch.cat([key, value]).transpose(1, 2)  # (2, T, G, D)
    if run.cache is None:
        run.kept.append(new)
    else:
        layers = run.cache.layers
        if module.layer_idx == len(layers):
            layers.append(new.new_zeros(2, run.cache.prompts, run.cache.width, *new.shape[2:]))
        layers[module.layer_idx][:, run.rows, run.places] = new
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attend = _flash_gpu if query.is_cuda else _flash_cpu
    return attend(query, new, run, module.layer_idx, scale).unsqueeze(0), None


def _flash_gpu(query, new, run: Pass, layer: int, scale: float):
    call = torch.ops.aten._flash_attention_forward
    if run.seen:
        keys, values = run.cache.layers[layer].flatten(1, 2)
        # max_q 2, not 1: for 1 the kernel folds the heads of a key into tokens, and its logsumexp has another layout.
        sizes = run.bounds, run.starts, 2, run.seen
        out, lse = call(query, keys, values, *sizes, 0.0, False, False, scale=scale, seqused_k=run.used)[:2]
    else:
        sizes = run.bounds, run.bounds, run.longest, run.longest
        out, lse = call(query, *new, *sizes, 0.0, True, False, scale=scale)[:2]
    if run.prefixes:
        sizes = run.groups, run.prefixes.bounds, max(2, run.longest_group), run.prefixes.longest
        part, part_lse = call(query, *run.prefixes.layers[layer], *sizes, 0.0, False, False, scale=scale)[:2]
        kernels.merge_attention(out, lse, part, part_lse, run.groups)
    return out


def _flash_cpu(query, new, run: Pass, layer: int, scale: float):
    if run.seen:
        mask = torch.arange(run.seen) < run.used[:, None]
        mask = query.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)[:, None, None]
        out, lse = _attend_cpu(query[:, None], *run.cache.layers[layer][:, :, : run.seen], scale, mask)
        out, lse = out[:, 0], lse[:, 0]
    else:
        ends = zip(run.edges, run.edges[1:], strict=False)
        parts = [_attend_cpu(query[None, a:b], *new[:, None, a:b], scale, causal=True) for a, b in ends]
        out, lse = (torch.cat([part[0] for part in each]) for each in zip(*parts, strict=True))
    if run.prefixes:
        edges = run.prefixes.edges
        groups = run.groups.tolist()
        for a, b, start, end in zip(groups, groups[1:], edges, edges[1:], strict=False):
            part, part_lse = _attend_cpu(query[None, a:b], *run.prefixes.layers[layer][:, None, start:end], scale)
            # As fastdora/kernels.py merge_attention does.
            weight = torch.sigmoid(lse[a:b] - part_lse[0]).unsqueeze(-1)
            out[a:b] = (weight * out[a:b] + (1 - weight) * part[0]).to(out.dtype)
    return out


def _attend_cpu(query, keys, values, scale: float, mask=None, causal: bool = False):
    """query (B, Q, H, D), keys and values (B, K, G, D) -> output (B, Q, H, D), logsumexp (B, Q, H)."""
    (batch, length, heads, width), groups = query.shape, keys.shape[2]
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    if causal:  # a key's heads repeated; else they are as good as more queries
        keys, values = (x.repeat_interleave(heads // groups, 1) for x in (keys, values))
        query = query.transpose(1, 2)
    else:
        query = query.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # (B, G, H / G * Q, D)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, keys, values, 0.0, causal, attn_mask=mask, scale=scale
    )
    out, lse = out.reshape(batch, heads, length, width), lse.reshape(batch, heads, length)
    return out.transpose(1, 2), lse.transpose(1, 2)
