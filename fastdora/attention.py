"""Attention within packed samples through torch's own variable-length kernel: flash-attn need not be built.

A pack is several samples in one row; a sample starts where `position_ids` is 0. On a GPU in 16 bits torch's flash
kernel takes the samples' boundaries, computed once a batch; elsewhere each sample attends in a call of its own.

Where rows share prefixes (prefixes.py) the pack's segments are prefixes and suffixes; a suffix attends to itself and to
its group's prefix. Of short prefixes each row gets a copy of the keys and values, for one call of the flash kernel.
Long ones are not copied: a second call attends to them, and the results are merged by their sums of exponentials
(kernels.merge_attention). Both backward calls take the merged output and logsumexp, which makes their probabilities
those of the whole softmax (as in ring attention, arXiv 2310.01889), and their gradients add up.
"""

import weakref
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fastdora import kernels
from fastdora.dora import Unsupported

NAME = "fastdora_varlen"
_last: tuple = (lambda: None, None, None)  # the latest position_ids (a weak reference), their version and segments


class Segments(NamedTuple):
    """What attends within itself in a flattened batch, and which of it attends to a shared prefix as well.

    edges: int32 (segments + 1,), cumulative lengths. suffixes and prefixes: int32 (groups + 1,), where each group's
    suffixes and its prefix begin, and where the last ones end; both contiguous, prefixes from 0. None: nothing is
    shared. The longest segment, group of suffixes and prefix size the kernels' launches.

    copied: int32 (keys,), for each segment in turn the tokens whose keys it sees, a suffix's prefix first; key_edges:
    int32 (segments + 1,), where each segment's begin. copies: int32 (4 T,), of each token where its own key is among
    the copied ones, and for one of a prefix the first segment that it has a copy in, their number, and its place in the
    prefix. None: prefixes are not copied.

    kept: int64, the positions in a row whose outputs are read, and at its end the row's last, which no loss reads: a
    CUDA graph repeats it to fill its buffer. None: all are read.
    """

    edges: torch.Tensor
    longest: int
    suffixes: torch.Tensor | None = None
    prefixes: torch.Tensor | None = None
    longest_suffixes: int = 0
    longest_prefix: int = 0
    copied: torch.Tensor | None = None
    key_edges: torch.Tensor | None = None
    copies: torch.Tensor | None = None
    longest_keys: int = 0
    kept: torch.Tensor | None = None


def install(model: torch.nn.Module) -> None:
    """Switch a transformers model to this attention.

    Raises Unsupported unless all of its layers have plain causal attention.
    """
    config = model.config.get_text_config()
    kinds = {*(getattr(config, "layer_types", None) or ())} - {"full_attention"}
    if getattr(config, "use_bidirectional_attention", False):
        kinds.add("use_bidirectional_attention")
    if not getattr(config, "layer_types", None) and getattr(config, "sliding_window", None):
        kinds.add("sliding_window")
    if kinds:
        raise Unsupported(f"{config.model_type} uses {', '.join(sorted(kinds))}, not plain causal attention")
    AttentionInterface.register(NAME, varlen_attention)
    AttentionMaskInterface.register(NAME, _mask)
    model.config._attn_implementation = NAME
    if getattr(model.get_decoder(), "layers", None):
        _skip_what_nobody_reads(model.get_decoder().layers[-1])


def _skip_what_nobody_reads(layer: torch.nn.Module) -> None:
    """Apply the last decoder layer's output projection and MLP at `Segments.kept` alone; elsewhere they give zeros.

    By hooks, so that any decoder whose layer has these modules is served: they work on each position by itself. A
    second call does nothing.
    """
    output, mlp = getattr(getattr(layer, "self_attn", None), "o_proj", None), getattr(layer, "mlp", None)
    # A mixture of experts, which has no down_proj itself, counts its tokens.
    if output is None or not hasattr(mlp, "down_proj") or hasattr(layer, "fastdora_skips"):
        return
    layer.fastdora_skips = True
    kept, length = None, 0

    def begin(module, args, kwargs):
        nonlocal kept, length
        positions = kwargs.get("position_ids")
        kept = _last[2].kept if _is_cached(positions) else None
        length = 0 if kept is None else positions.shape[1]

    def select(module, args):
        return args if kept is None else (args[0].index_select(1, kept), *args[1:])

    def scatter(module, args, out):
        return out if kept is None else out.new_zeros(len(out), length, out.shape[2]).index_copy(1, kept, out)

    layer.register_forward_pre_hook(begin, with_kwargs=True)
    for module in (output, mlp):
        module.register_forward_pre_hook(select)
        module.register_forward_hook(scatter)


def boundaries(position_ids: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Cumulative sample lengths in the flattened batch, int32 (samples + 1,), and the longest sample's length.

    position_ids (B, S): 0 starts a sample, and so does each row.
    """
    starts = position_ids == 0
    starts[:, 0] = True  # whatever its first position is: a row never continues the one before
    edges = torch.cat([starts.flatten().nonzero().squeeze(1), starts.new_full((1,), starts.numel(), dtype=torch.long)])
    return edges.to(torch.int32), int(edges.diff().max())


def cache_segments(position_ids: torch.Tensor, segments: Segments) -> None:
    """Cache a batch's segments for its layers, which all receive the same tensor of positions."""
    global _last
    _last = weakref.ref(position_ids), _version(position_ids), segments


def cached_segments(position_ids: torch.Tensor, rows: int) -> Segments:
    """The segments of a batch of `rows` rows; computed where they are not cached, for which a GPU is synchronized.

    Raises ValueError for a segment that goes on from a shared prefix: its positions do not tell which.
    """
    if not _is_cached(position_ids):
        later = position_ids[:, 1:]
        if ((later != 0) & (later != position_ids[:, :-1] + 1)).any():
            raise ValueError("rows share prefixes, but this copy of the positions came without its segments")
        cache_segments(position_ids, Segments(*boundaries(position_ids.expand(rows, -1))))
    return _last[2]


def _is_cached(position_ids: torch.Tensor | None) -> bool:
    # The tensor itself, not its id or address, which a later tensor may have again.
    return position_ids is not None and _last[0]() is position_ids and _last[1] == _version(position_ids) is not None


def _version(position_ids: torch.Tensor) -> int | None:
    """How often a tensor was written in place; None for tensors of inference mode, which have no version counter."""
    return None if position_ids.is_inference() else position_ids._version


def varlen_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """Causal attention within samples; query (B, H, S, D), key and value (B, G, S, D), G divides H -> (B, S, H, D).

    With a mask, or with cached keys before the queries, transformers' sdpa attention. Raises ValueError for dropout or
    a sliding window, which packs would ignore.
    """
    position_ids = kwargs.get("position_ids")
    # Padded batches have a mask; in generation the cached keys are longer than the queries.
    if attention_mask is not None or position_ids is None or query.shape[2] != key.shape[2]:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout or kwargs.get("sliding_window"):
        raise ValueError(f"{NAME} has neither attention dropout nor a sliding window; set another attn_implementation")
    segments = cached_segments(position_ids, query.shape[0])
    batch, heads, length, width = query.shape
    # Contiguous: of one row the reshaped tensor is a view, and the flash kernel gives its output the query's strides.
    flat = [x.transpose(1, 2).reshape(batch * length, x.shape[1], width).contiguous() for x in (query, key, value)]
    attend = _on_gpu if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) else _one_by_one
    scale = width**-0.5 if scaling is None else scaling
    return attend(*flat, segments, scale).view(batch, length, heads, width), None


def _on_gpu(query, key, value, segments, scale):
    if segments.copied is not None:
        return _CopiedAttention.apply(query, key, value, segments, scale)
    if segments.suffixes is not None:
        return _SharedAttention.apply(query, key, value, segments, scale)
    return _flash(query, key, value, segments, scale)[0]


def _flash(query, key, value, segments, scale):
    # The operator that torch.nn.attention.varlen.varlen_attn calls: that wrapper costs the CPU half a millisecond a
    # layer and takes no scale in torch 2.11. Returns output, logsumexp (H, T), and two tensors for the backward pass.
    edges, longest = segments.edges, segments.longest
    return torch.ops.aten._flash_attention_forward(
        query, key, value, edges, edges, longest, longest, 0.0, True, False, scale=scale
    )[:4]


class _CopiedAttention(torch.autograd.Function):
    """Attention of segments to copied keys and values: those of its prefix, if it has one, and its own.

    Copied again in the backward pass, rather than kept. Causal attention of fewer queries than keys is that of the last
    ones: the kernel aligns them at the end.
    """

    @staticmethod
    def forward(ctx, query, key, value, segments, scale):
        edges = (segments.edges, segments.key_edges, segments.longest, segments.longest_keys)
        out, lse, *state = torch.ops.aten._flash_attention_forward(
            query, *(x[segments.copied] for x in (key, value)), *edges, 0.0, True, False, scale=scale
        )[:4]
        ctx.save_for_backward(query, key, value, out, lse, *state)
        ctx.segments, ctx.scale, ctx.edges = segments, scale, edges
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        query, key, value, out, lse, philox, unused = ctx.saved_tensors
        copied = [x[ctx.segments.copied] for x in (key, value)]
        dq, *d_copied = torch.ops.aten._flash_attention_backward(
            d_out.contiguous(), query, *copied, out, lse, *ctx.edges, 0.0, True, philox, unused, scale=ctx.scale
        )
        dk, dv = kernels.sum_copies(*d_copied, ctx.segments.copies, ctx.segments.key_edges, len(query))
        return dq, dk, dv, None, None


class _SharedAttention(torch.autograd.Function):
    """Attention of segments to themselves, and of suffixes to their prefixes; see the module's docstring.

    The kernel leaves what lies outside of its edges unwritten: the tokens before the first suffix and after the last,
    and in the gradients those after the last prefix. Merging and adding read only what lies within.
    """

    @staticmethod
    def forward(ctx, query, key, value, segments, scale):
        out, lse, *state = _flash(query, key, value, segments, scale)
        to_prefix = (segments.suffixes, segments.prefixes, segments.longest_suffixes, segments.longest_prefix)
        part, part_lse, *part_state = torch.ops.aten._flash_attention_forward(
            query, key, value, *to_prefix, 0.0, False, False, scale=scale
        )[:4]
        kernels.merge_attention(out, lse, part, part_lse, segments.suffixes)
        ctx.save_for_backward(query, key, value, out, lse, *state, *part_state)
        ctx.segments, ctx.scale = segments, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        *tensors, philox, unused, part_philox, part_unused = ctx.saved_tensors
        edges, longest, suffixes, prefixes, longest_suffixes, longest_prefix, *_ = ctx.segments
        backward = torch.ops.aten._flash_attention_backward
        d_out = d_out.contiguous()
        dq, dk, dv = backward(
            d_out, *tensors, edges, edges, longest, longest, 0.0, True, philox, unused, scale=ctx.scale
        )
        part = backward(
            d_out, *tensors, suffixes, prefixes, longest_suffixes, longest_prefix, 0.0, False, part_philox,
            part_unused, scale=ctx.scale,
        )  # fmt: skip
        for gradient, share, within in zip((dq, dk, dv), part, (suffixes, prefixes, prefixes), strict=True):
            kernels.add_rows(gradient, share, within)
        return dq, dk, dv, None, None


# The reference: a call of sdpa per segment, in any dtype. Its loop would leave a GPU waiting for the CPU.
def _one_by_one(query, key, value, segments, scale):
    parts, starts = [], segments.edges.tolist()
    groups = [] if segments.suffixes is None else _groups(segments)
    for start, end in zip(starts, starts[1:], strict=False):
        first, last = next(((a, b) for begin, over, a, b in groups if begin <= start < over), (start, start))
        q = query[start:end].transpose(0, 1).unsqueeze(0)
        k, v = (torch.cat([x[first:last], x[start:end]]).transpose(0, 1).unsqueeze(0) for x in (key, value))
        mask = {"is_causal": True}
        if first < last:  # the whole prefix, and what is not later: is_causal would align queries with the first keys
            seen = q.new_ones(end - start, last - first + end - start, dtype=torch.bool)
            mask = {"attn_mask": seen.tril(last - first)}
        part = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True, **mask)
        parts.append(part.squeeze(0).transpose(0, 1))
    return torch.cat(parts)


def _groups(segments: Segments) -> list[tuple[int, int, int, int]]:
    """For each group the first and the end of its suffixes, and of its prefix."""
    suffixes, prefixes = segments.suffixes.tolist(), segments.prefixes.tolist()
    return list(zip(suffixes, suffixes[1:], prefixes, prefixes[1:], strict=False))


def _mask(batch_size, q_length, kv_length, *args, attention_mask=None, **kwargs):
    if attention_mask is None and q_length == kv_length:
        return None  # causal within samples, which varlen_attention needs no mask for
    return sdpa_mask(batch_size, q_length, kv_length, *args, attention_mask=attention_mask, **kwargs)
