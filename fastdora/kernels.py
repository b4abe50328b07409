"""Everything around the large matmuls: each formula in a docstring with its torch code, the twin of a Triton kernel.

On a GPU in 16 or 8 bits the functions run the kernels of triton_kernels.py, on all else the torch code.
Shapes: T tokens, K inputs, N outputs, R rank.
"""

from typing import NamedTuple

import bitsandbytes as bnb
import torch

from fastdora import dropout
from fastdora.dropout import Seed

try:
    from fastdora import triton_kernels
except ImportError:  # torch's builds for machines without a GPU may come without Triton
    triton_kernels = None

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.int8, torch.uint8)
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0  # e4m3's largest finite number


def use_triton(x: torch.Tensor) -> bool:
    """Whether `x` takes the Triton path: 16 or 8 bits on a GPU."""
    return triton_kernels is not None and x.is_cuda and x.dtype in TRITON_DTYPES


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over many terms, and of norms: float32, float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _without_autocast(x: torch.Tensor) -> torch.autocast:
    """Keep float32 matmuls in float32: autocast would run them in 16 bits."""
    return torch.autocast(x.device.type, enabled=False)


def low_rank(x: torch.Tensor, a: torch.Tensor, scale: float, p: float, seed: Seed) -> torch.Tensor:
    """t = scale * dropout(x) A^T; x (T, K), a (R, K) with any strides -> (T, R) in x's dtype.

    p: dropout's probability; kept elements are divided by 1 - p.
    """
    if use_triton(x):
        return triton_kernels.low_rank(x, a, scale, p, seed)
    return scale * (dropout.apply(x, p, seed) @ a.to(x.dtype).t())


def low_rank_backward(
    dt: torch.Tensor, x: torch.Tensor, a: torch.Tensor, dx: torch.Tensor | None, p: float, seed: Seed
) -> torch.Tensor:
    """dA = dt^T dropout(x), (R, K) in sum_dtype; and dx += dropout(dt A) in place, the low-rank path's share.

    dt (T, R), x and dx (T, K), a (R, K). dx: None where x needs no gradient.
    """
    if use_triton(x):
        return triton_kernels.low_rank_backward(dt, x, a, dx, p, seed)
    if dx is not None:
        dx += dropout.apply(dt @ a.to(dt.dtype), p, seed)
    to = sum_dtype(x.dtype)
    with _without_autocast(x):
        return dt.to(to).t() @ dropout.apply(x, p, seed).to(to)


def epilogue(
    base: torch.Tensor,
    t: torch.Tensor,
    b: torch.Tensor,
    s: float,
    mag_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """y = mag_scale * (base + s t B^T) + bias, with base = x W0^T from the matmul before.

    base (T, N), t (T, R), b (N, R), mag_scale and bias (N,) -> (T, N) in base's dtype, computed in sum_dtype. base and
    t may be columns of wider matrices. mag_scale: None for LoRA; the kernel overwrites a whole `base` then, since the
    backward pass does not need it.
    """
    if use_triton(base):
        return triton_kernels.epilogue(base, t, b, s, mag_scale, bias)
    to = sum_dtype(base.dtype)  # rounded once, as the kernel does
    z = _z(base, t, b, s, to)
    y = z if mag_scale is None else z * mag_scale
    return (y if bias is None else y + bias.to(to)).to(base.dtype)


def epilogue_backward(
    dy: torch.Tensor,
    base: torch.Tensor | None,
    t: torch.Tensor,
    b: torch.Tensor,
    s: float,
    mag_scale: torch.Tensor | None,
    norm: torch.Tensor | None,
    dz: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(dz, dm, dB): dz = mag_scale * dy, dm = sum_T(dy * z) / norm and dB = s dz^T t, with z = base + s t B^T.

    dy and base (T, N), t (T, R), b (N, R), mag_scale and norm (N,) -> dz (T, N) in dy's dtype, dm (N,) and dB (N, R) in
    sum_dtype. For LoRA base, mag_scale, norm and dm are None. base and t may be columns of wider matrices. dz: where it
    is written, with base's strides; None: a new tensor, or for LoRA dy itself.
    """
    if use_triton(dy):
        return triton_kernels.epilogue_backward(dy, base, t, b, s, mag_scale, norm, dz)
    to = sum_dtype(dy.dtype)
    dm, value = None, dy
    if mag_scale is not None:
        dm = (dy.to(to) * _z(base, t, b, s, to)).sum(0) / norm
        value = (dy.to(to) * mag_scale).to(dy.dtype)
    dz = value if dz is None else dz.copy_(value)
    with _without_autocast(dz):
        return dz, dm, s * (dz.to(to).t() @ t.to(to))


def _z(base: torch.Tensor, t: torch.Tensor, b: torch.Tensor, s: float, dtype: torch.dtype) -> torch.Tensor:
    """z = base + s t B^T in `dtype`."""
    with _without_autocast(base):
        return torch.addmm(base.to(dtype), t.to(dtype), b.to(dtype).t(), alpha=s)


def merge_attention(
    out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor, within: torch.Tensor
) -> None:
    """Join attention to two sets of keys, in place: out = w out + (1 - w) part, with w = sigmoid(lse - part_lse).

    out and part (T, H, D); lse and part_lse float32 (H, T), each the logarithm of a softmax's denominator, of which
    `lse` becomes the logarithm of the sum. within: int32, whose first and last entries bound the tokens that have a
    part; all others stay (arXiv 2205.14135, section 3.1, for two blocks).
    """
    if use_triton(out):
        return triton_kernels.merge_attention(out, lse, part, part_lse, within)
    rows = slice(int(within[0]), int(within[-1]))
    weight = torch.sigmoid(lse[:, rows] - part_lse[:, rows]).t().unsqueeze(2)
    to = sum_dtype(out.dtype)
    out[rows] = (weight * out[rows].to(to) + (1 - weight) * part[rows].to(to)).to(out.dtype)
    lse[:, rows] = torch.logaddexp(lse[:, rows], part_lse[:, rows])


def add_rows(total: torch.Tensor, part: torch.Tensor, within: torch.Tensor) -> None:
    """total += part in place, (T, H, D), for the tokens from within[0] to within[-1]; others of `part` are not read."""
    if use_triton(total):
        return triton_kernels.add_rows(total, part, within)
    rows = slice(int(within[0]), int(within[-1]))
    total[rows] += part[rows]


def sum_copies(
    dk: torch.Tensor, dv: torch.Tensor, copies: torch.Tensor, key_edges: torch.Tensor, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of keys and values from those of their copies: each token's own, and of a prefix's all copies'.

    dk and dv (keys, G, D) -> (T, G, D) in their dtype, summed in sum_dtype; copies and key_edges: attention.Segments;
    tokens: T, since the buffers of a CUDA graph may be longer.
    """
    if use_triton(dk):
        return triton_kernels.sum_copies(dk, dv, copies, key_edges, tokens)
    own, first, count, place = copies[: 4 * tokens].long().view(-1, 4).unbind(1)
    token = torch.arange(tokens, device=dk.device).repeat_interleave(count)
    nth = torch.arange(len(token), device=dk.device) - (count.cumsum(0) - count)[token]
    source = key_edges.long()[first[token] + nth] + place[token]
    sums = []
    for part in (dk, dv):
        wide = part.to(sum_dtype(part.dtype))
        sums.append(wide[own].index_add(0, token, wide[source]).to(part.dtype))
    return sums[0], sums[1]


def dequantize_int8(weight: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """W[n, k] = int8[n, k] * scales[n] / 127, as bitsandbytes quantizes (LLM.int8(), arXiv 2208.07339, section 2.1).

    weight int8 (N, K), scales float32 (N,) -> out, contiguous (N, K).
    """
    if use_triton(weight):
        return triton_kernels.dequantize_int8(weight, scales, out)
    to = sum_dtype(out.dtype)
    return out.copy_(weight.to(to) * (scales.to(to) / 127).unsqueeze(1))


def dequantize_4bit(packed: torch.Tensor, state: bnb.functional.QuantState, out: torch.Tensor) -> torch.Tensor:
    """bitsandbytes' NF4 or FP4 weight (QLoRA, arXiv 2305.14314, section 3): W = code[nibble] * scale of its block.

    packed: two values a byte, the high half first; state: code and scales -> out, contiguous (N, K). With double
    quantization the scale is code2[scales[block]] * scales2[block of blocks] + offset.
    """
    if use_triton(as_bytes := packed.view(torch.uint8)):  # bitsandbytes may store the bytes as another dtype
        return triton_kernels.dequantize_4bit(as_bytes, state, out)
    return out.copy_(bnb.functional.dequantize_4bit(packed, state))


class NormInputs(NamedTuple):
    """What a layer's weight norm is computed from."""

    weight: torch.Tensor  # (N, K)
    scales: torch.Tensor | None  # (N,), of int8 weights
    a: torch.Tensor  # (R, K)
    b: torch.Tensor  # (N, R)
    m: torch.Tensor  # (N,)
    s: float  # LoRA's scaling
    base_square: torch.Tensor  # ||W||^2 per row, (N,)


def quantize_rows(x: torch.Tensor, factors: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """q = x * factors / scale in e4m3, with scale = max_k |x * factors| / 448 per row, 1 for a row of zeros.

    x (T, K), factors float32 (K,) or None for ones -> q (T, K) e4m3, scale (T, 1) float32.
    """
    if use_triton(x):
        return triton_kernels.quantize_rows(x, factors)
    value = x.float() if factors is None else x.float() * factors
    scale = value.abs().amax(1, keepdim=True) / FP8_MAX
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    # Clamped: value / scale may be rounded to more than 448, which e4m3 casts to NaN.
    return (value / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def int8_to_fp8(weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """int8 values rounded to e4m3, which keeps four significant bits; (N, K) -> out (N, K), which may be transposed."""
    if use_triton(weight):
        return triton_kernels.int8_to_fp8(weight, out)
    return out.copy_(weight.float())
