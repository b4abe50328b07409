"""Attention within packed samples through torch's own variable-length kernel: flash-attn need not be built.

A pack is several samples in one row; a sample starts where `position_ids` is 0. On a GPU in 16 bits torch's flash
kernel takes the samples' boundaries, computed once a batch; elsewhere each sample attends in a call of its own.
"""

import weakref

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fastdora.dora import Unsupported

NAME = "fastdora_varlen"
_last: tuple = (lambda: None, None, None)  # the latest position_ids (a weak reference), their version and boundaries


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


def boundaries(position_ids: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Cumulative sample lengths in the flattened batch, int32 (samples + 1,), and the longest sample's length.

    position_ids (B, S): 0 starts a sample, and so does each row.
    """
    starts = position_ids == 0
    starts[:, 0] = True  # whatever its first position is: a row never continues the one before
    edges = torch.cat([starts.flatten().nonzero().squeeze(1), starts.new_full((1,), starts.numel(), dtype=torch.long)])
    return edges.to(torch.int32), int(edges.diff().max())


def cache_boundaries(position_ids: torch.Tensor, edges: torch.Tensor, longest: int) -> None:
    """Cache a batch's boundaries for its layers, which all receive the same tensor of positions."""
    global _last
    _last = weakref.ref(position_ids), _version(position_ids), (edges, longest)


def cached_boundaries(position_ids: torch.Tensor, rows: int) -> tuple[torch.Tensor, int]:
    """The boundaries of a batch of `rows` rows; computed where they are not cached, for which a GPU is synchronized."""
    version = _version(position_ids)
    # The tensor itself, not its id or address, which a later tensor may have again.
    if _last[0]() is not position_ids or version is None or _last[1] != version:
        cache_boundaries(position_ids, *boundaries(position_ids.expand(rows, -1)))
    return _last[2]


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
    edges, longest = cached_boundaries(position_ids, query.shape[0])
    batch, heads, length, width = query.shape
    flat = [x.transpose(1, 2).reshape(batch * length, x.shape[1], width) for x in (query, key, value)]
    attend = _on_gpu if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) else _one_by_one
    scale = width**-0.5 if scaling is None else scaling
    return attend(*flat, edges, longest, scale).view(batch, length, heads, width), None


def _on_gpu(query, key, value, edges, longest, scale):
    # The operator that torch.nn.attention.varlen.varlen_attn calls: that wrapper costs the CPU half a millisecond a
    # layer and takes no scale in torch 2.11.
    return torch.ops.aten._flash_attention_forward(
        query, key, value, edges, edges, longest, longest, 0.0, True, False, scale=scale
    )[0]


# The reference: a call of sdpa per sample, in any dtype. Its loop would leave a GPU waiting for the CPU.
def _one_by_one(query, key, value, edges, longest, scale):
    parts = []
    sizes = edges.diff().tolist()
    for q, k, v in zip(query.split(sizes), key.split(sizes), value.split(sizes), strict=True):
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        part = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        parts.append(part.squeeze(0).transpose(0, 1))
    return torch.cat(parts)


def _mask(batch_size, q_length, kv_length, *args, attention_mask=None, **kwargs):
    if attention_mask is None and q_length == kv_length:
        return None  # causal within samples, which varlen_attention needs no mask for
    return sdpa_mask(batch_size, q_length, kv_length, *args, attention_mask=attention_mask, **kwargs)
