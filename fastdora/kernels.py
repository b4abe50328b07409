"""The arithmetic around the large products, fused: Triton on a GPU in 16 bits, the same formulas in torch elsewhere.

Shapes: T tokens, K inputs, N outputs, R rank. Each Triton kernel reads and writes its large operand once. Sums that
cross programs go through partial results in a fixed order, so that equal runs give equal bits.
"""

import functools
from typing import NamedTuple

import torch

from fastdora import triton_kernels

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's builds for machines without a GPU may come without it
    triton = None

NARROW = (torch.bfloat16, torch.float16, torch.int8, torch.uint8)
# Tiles by the largest padded rank that they serve. SPLITS: partial sums over T, one a program of a backward kernel.
TILES = {
    "low_rank": {
        16: dict(BLOCK_T=16, BLOCK_K=256, num_warps=4, num_stages=4),
        64: dict(BLOCK_T=32, BLOCK_K=128, num_warps=4, num_stages=3),
        256: dict(BLOCK_T=16, BLOCK_K=32, num_warps=4, num_stages=3),
    },
    "low_rank_backward": {
        16: dict(SPLITS=16, BLOCK_T=64, BLOCK_K=64, num_warps=4, num_stages=2),
        64: dict(SPLITS=16, BLOCK_T=64, BLOCK_K=64, num_warps=4, num_stages=3),
        256: dict(SPLITS=16, BLOCK_T=64, BLOCK_K=32, num_warps=4, num_stages=3),
    },
    "combine": {
        16: dict(BLOCK_T=32, BLOCK_N=128, num_warps=8, num_stages=3),
        64: dict(BLOCK_T=64, BLOCK_N=128, num_warps=4, num_stages=3),
        256: dict(BLOCK_T=32, BLOCK_N=64, num_warps=4, num_stages=3),
    },
    "combine_backward": {
        16: dict(SPLITS=8, BLOCK_T=64, BLOCK_N=128, num_warps=8, num_stages=4),
        64: dict(SPLITS=16, BLOCK_T=64, BLOCK_N=64, num_warps=4, num_stages=3),
        256: dict(SPLITS=16, BLOCK_T=64, BLOCK_N=32, num_warps=4, num_stages=3),
    },
}
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


def fused(x: torch.Tensor) -> bool:
    """Whether `x` takes the Triton path: 16 or 8 bits on a GPU."""
    return triton is not None and x.is_cuda and x.dtype in NARROW


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over many terms are taken."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _as_given(x: torch.Tensor) -> torch.autocast:
    """Products of float32 in float32: autocast would take them in 16 bits."""
    return torch.autocast(x.device.type, enabled=False)


# -- dropout -----------------------------------------------------------------------------------------------------------
# The mask is a hash of the element's index and of two numbers a call: nothing is stored, recomputation and the backward
# pass draw the same one, and every device draws the same one. The mixing is that of a 32-bit finaliser.


Seed = tuple[int, int] | torch.Tensor  # two numbers; int64 (2,) on the GPU where a CUDA graph reads them


def keep_mask(seed: Seed, shape: tuple[int, int], p: float, device: torch.device) -> torch.Tensor:
    """The elements that dropout keeps, bool (T, K): the i-th where hash(i * seed[0] + seed[1]) >= p * 2^31."""
    low = 0xFFFFFFFF
    value = torch.arange(shape[0] * shape[1], dtype=torch.int64, device=device)
    value = (value * seed[0] + seed[1]) & low
    value = ((value ^ (value >> 16)) * 0x7FEB352D) & low
    value = ((value ^ (value >> 15)) * 0x846CA68B) & low
    value = (value ^ (value >> 16)) >> 1
    return (value >= threshold(p)).view(shape)


def threshold(p: float) -> int:
    return min(int(p * 2**31), 2**31 - 1)


class Seeds:
    """Seeds of one forward pass in a tensor (count, 2), so that a CUDA graph reads new ones at each replay.

    Within `with seeds:` `draw_seed` hands out its rows in turn; `draw` fills it with what as many calls would have
    drawn.
    """

    given: "Seeds | None" = None

    def __init__(self, count: int, device: torch.device):
        self.table = torch.empty(count, 2, dtype=torch.int64, device=device)

    def draw(self) -> None:
        drawn = torch.randint(0, 2**31 - 1, self.table.shape)
        drawn[:, 0] |= 1
        self.table.copy_(drawn, non_blocking=True)

    def __enter__(self) -> None:
        self.rows, Seeds.given = iter(self.table), self

    def __exit__(self, *_) -> None:
        Seeds.given = None


def draw_seed() -> Seed:
    """Two numbers for `keep_mask` from torch's CPU generator, which activation checkpointing restores; no GPU waits."""
    if Seeds.given is not None:
        return next(Seeds.given.rows)
    first, second = torch.randint(0, 2**31 - 1, (2,)).tolist()
    return first | 1, second


def _seed_arguments(seed: Seed, other: torch.Tensor) -> tuple:
    """Address of a seed in memory, whether it is read from there, and the seed where it is not."""
    return (seed, True, 1, 0) if isinstance(seed, torch.Tensor) else (other, False, *seed)


def _dropped(x: torch.Tensor, p: float, seed: Seed) -> torch.Tensor:
    return x * keep_mask(seed, x.shape, p, x.device) / (1 - p) if p else x


# -- the low-rank path -------------------------------------------------------------------------------------------------


def low_rank(x: torch.Tensor, a: torch.Tensor, scale: float, p: float, seed: Seed) -> torch.Tensor:
    """t = scale * dropout(x) A^T; x (T, K), a (R, K) with any strides -> (T, R) in x's dtype."""
    if not fused(x):
        return scale * (_dropped(x, p, seed) @ a.to(x.dtype).t())
    tokens, inputs = x.shape
    rank = a.shape[0]
    t = torch.empty(tokens, rank, dtype=x.dtype, device=x.device)
    if not x.numel():
        return t.zero_()
    tiles = _tiles("low_rank", rank)
    triton_kernels._low_rank_kernel[(triton.cdiv(tokens, tiles["BLOCK_T"]),)](
        x, a, t, tokens, inputs, rank, a.stride(0), a.stride(1), scale / (1 - p), threshold(p),
        *_seed_arguments(seed, x),
        DROPOUT=p > 0, **tiles,
    )  # fmt: skip
    return t


def low_rank_backward(
    dt: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    dx: torch.Tensor | None,
    p: float,
    seed: Seed,
) -> torch.Tensor:
    """dA = dt^T dropout(x), in the wide dtype; adds the low-rank path's share, dropout(dt A), to `dx` in place.

    dt (T, R), x and dx (T, K), a (R, K). dx: None where x needs no gradient.
    """
    if not fused(x):
        if dx is not None:
            dx += _dropped(dt @ a.to(dt.dtype), p, seed)
        with _as_given(x):
            return dt.to(wide(x.dtype)).t() @ _dropped(x, p, seed).to(wide(x.dtype))
    tokens, inputs = x.shape
    rank = a.shape[0]
    if not x.numel():
        return torch.zeros(rank, inputs, dtype=torch.float32, device=x.device)
    tiles = _tiles("low_rank_backward", rank)
    splits = tiles.pop("SPLITS")
    parts = torch.empty(splits, rank, inputs, dtype=torch.float32, device=x.device)
    triton_kernels._low_rank_backward_kernel[(triton.cdiv(inputs, tiles["BLOCK_K"]), splits)](
        dt, x, a, x if dx is None else dx, parts, tokens, inputs, rank, a.stride(0), a.stride(1),
        triton.cdiv(tokens, splits), 1 / (1 - p), threshold(p), *_seed_arguments(seed, x),
        DROPOUT=p > 0, INTO_X=dx is not None, **tiles,
    )  # fmt: skip
    return parts.sum(0)


# -- gain * (base + s t B^T) + bias ------------------------------------------------------------------------------------


def combine(
    base: torch.Tensor,
    t: torch.Tensor,
    b: torch.Tensor,
    s: float,
    gain: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """y = gain * (base + s t B^T) + bias; base (T, N), t (T, R), b (N, R), gain and bias (N,) -> (T, N).

    gain: None for LoRA; `base` is overwritten then, since the backward pass does not need it.
    """
    if not fused(base):
        to = wide(base.dtype)  # rounded once, as the kernel does
        with _as_given(base):
            z = torch.addmm(base.to(to), t.to(to), b.to(to).t(), alpha=s)
        z = z if gain is None else z * gain
        return (z if bias is None else z + bias.to(to)).to(base.dtype)
    tokens, outputs = base.shape
    rank = b.shape[1]
    y = base if gain is None else torch.empty_like(base)
    if not base.numel():
        return y
    tiles = _tiles("combine", rank)
    triton_kernels._combine_kernel[(triton.cdiv(tokens, tiles["BLOCK_T"]), triton.cdiv(outputs, tiles["BLOCK_N"]))](
        base, t, b, gain, bias, y, tokens, outputs, rank, s,
        GAIN=gain is not None, BIAS=bias is not None, **tiles,
    )  # fmt: skip
    return y


def combine_backward(
    dy: torch.Tensor,
    base: torch.Tensor | None,
    t: torch.Tensor,
    b: torch.Tensor,
    s: float,
    gain: torch.Tensor | None,
    norm: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(dz, dm, dB): dz = gain * dy (T, N); dm = sum_T(dy * z) / norm (N,) and dB = s dz^T t (N, R) in the wide dtype.

    z = base + s t B^T is made again from `base`, which the forward pass leaves as it is. For LoRA gain and norm, (N,),
    are None, and dz is dy.
    """
    if not fused(dy):
        to = wide(dy.dtype)
        dm, dz = None, dy
        if gain is not None:
            with _as_given(base):
                z = torch.addmm(base.to(to), t.to(to), b.to(to).t(), alpha=s)
            dm, dz = (dy.to(to) * z).sum(0) / norm, (dy.to(to) * gain).to(dy.dtype)
        with _as_given(dz):
            return dz, dm, s * (dz.to(to).t() @ t.to(to))
    tokens, outputs = dy.shape
    rank = b.shape[1]
    tiles = _tiles("combine_backward", rank)
    splits = tiles.pop("SPLITS")
    dz = dy if gain is None else torch.empty_like(dy)
    size = outputs * (rank + (gain is not None))
    parts = torch.empty(splits, size, dtype=torch.float32, device=dy.device)
    triton_kernels._combine_backward_kernel[(triton.cdiv(outputs, tiles["BLOCK_N"]), splits)](
        dy, base, t, b, gain, norm, dz, parts, tokens, outputs, rank, triton.cdiv(tokens, splits), size, s,
        GAIN=gain is not None, **tiles,
    )  # fmt: skip
    total = parts.sum(0)
    db = total[: outputs * rank].view(outputs, rank)
    return dz, None if gain is None else total[outputs * rank :], db


# -- weights -----------------------------------------------------------------------------------------------------------


def widen_int8(weight: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """W = int8 * scale / 127 a row, as bitsandbytes quantises (LLM.int8, arXiv 2208.07339); (N, K), (N,) -> (N, K)."""
    if not fused(weight):
        to = wide(dtype)
        return (weight.to(to) * (scales.to(to) / 127).unsqueeze(1)).to(dtype)
    wide_weight = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    weight, (rows, columns) = weight.contiguous(), weight.shape
    triton_kernels._widen_int8_kernel[(rows, triton.cdiv(columns, 4096))](
        weight, scales, wide_weight, columns, BLOCK=4096
    )
    return wide_weight


def widen_4bit(packed: torch.Tensor, state, dtype: torch.dtype) -> torch.Tensor:
    """bitsandbytes' NF4 or FP4 weight, (N, K), from its bytes and its QuantState (QLoRA, arXiv 2305.14314, section 3).

    One launch; bitsandbytes takes three for double quantisation, in which the blocks' scales are 8-bit themselves.
    """
    out = torch.empty(state.shape, dtype=dtype, device=packed.device)
    more = state.state2 if state.nested else None
    second = (None, None, None) if more is None else (more.code, more.absmax, state.offset)
    triton_kernels._widen_4bit_kernel[(triton.cdiv(packed.numel(), 1024),)](
        packed, state.code, state.absmax, *second, out, out.numel(),
        NESTED=state.nested, SIZE=state.blocksize, SIZE2=more.blocksize if more else 1, BLOCK=1024,
    )  # fmt: skip
    return out


LARGEST_RANK = 64  # of `row_norms`: the sums of one program stay in its registers


class Adapted(NamedTuple):
    """What a layer's norm is made of: weight (N, K), row scales (N,) of int8 weights, adapters and ||W||^2 a row."""

    weight: torch.Tensor
    scales: torch.Tensor | None
    a: torch.Tensor  # (R, K)
    b: torch.Tensor  # (N, R)
    m: torch.Tensor  # (N,)
    s: float
    base_square: torch.Tensor  # (N,)


def row_norms(layers: list[Adapted]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(norm, m / norm) of each layer, float32 (N,): norm = ||W + s B A|| a row, as dora.norm_and_gain has it.

    At least 1e-19, where m / norm is 0, and at least 2^-10 of ||W||: float32's terms resolve no smaller sum.

    All layers in two launches, by a table of addresses: one layer alone does not fill a GPU. Weights are of one dtype,
    16 bits or int8; a, b and m float32 and contiguous, of one rank, at most LARGEST_RANK. tf32 products keep float32
    precision here: the weight has fewer bits than tf32, and the adapter is split into two terms.
    """
    first = layers[0]
    rank, device = first.a.shape[0], first.a.device
    sizes = [layer.weight.shape[0] for layer in layers]
    norms, gains = torch.empty(2, sum(sizes), dtype=torch.float32, device=device).unbind()
    grams = torch.empty(len(layers), rank, rank, dtype=torch.float32, device=device)
    table, start = [], 0
    for layer, size in zip(layers, sizes, strict=True):
        scales = 0 if layer.scales is None else layer.scales.data_ptr()
        tensors = (layer.weight, layer.a, layer.b, layer.m, layer.base_square)
        table += [*(tensor.data_ptr() for tensor in tensors), scales, *layer.weight.shape, start]
        start += size
    table = torch.tensor(table, dtype=torch.int64).to(device, non_blocking=True)
    factors = torch.tensor([layer.s for layer in layers], dtype=torch.float32).to(device, non_blocking=True)
    block_r = _block(rank)
    triton_kernels._grams_kernel[(len(layers),)](
        table, grams, rank, BLOCK_K=2048 // block_r, BLOCK_R=block_r, num_warps=4
    )
    kind = {torch.int8: tl.int8, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[first.weight.dtype]
    triton_kernels._row_norms_kernel[(triton.cdiv(max(sizes), 32), len(layers))](
        table, factors, grams, norms, gains, rank,
        KIND=kind, BLOCK_N=32, BLOCK_K=128, BLOCK_R=block_r, SCALES=first.scales is not None, num_warps=4,
    )  # fmt: skip
    return list(zip(norms.split(sizes), gains.split(sizes), strict=True))


# -- fp8 ---------------------------------------------------------------------------------------------------------------


def quantise_rows(x: torch.Tensor, factors: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """x * factors in e4m3 with a scale a row: (T, K) -> (T, K) e4m3 and (T, 1) float32, x ~ q * scale.

    factors: (K,) float32, multiplied in before; None for ones. A row of zeros gets scale 1.
    """
    if not fused(x):
        value = x.float() if factors is None else x.float() * factors
        scale = value.abs().amax(1, keepdim=True) / FP8_MAX
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        return (value / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale
    x, (rows, columns) = x.contiguous(), x.shape
    q = torch.empty(rows, columns, dtype=FP8, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(columns)
    triton_kernels._quantise_rows_kernel[(rows,)](
        x, factors, q, scale, columns, BLOCK=block, FACTORS=factors is not None, num_warps=8 if block > 4096 else 4
    )
    return q, scale


def int8_to_fp8(weight: torch.Tensor, transpose: bool = False) -> torch.Tensor:
    """int8 values as e4m3 (four significant bits are kept); (N, K) -> (N, K), or (K, N) where transpose is set."""
    if not fused(weight):
        return (weight.t() if transpose else weight).float().to(FP8).contiguous()
    weight, (rows, columns) = weight.contiguous(), weight.shape
    q = torch.empty((columns, rows) if transpose else (rows, columns), dtype=FP8, device=weight.device)
    strides = (1, rows) if transpose else (columns, 1)
    triton_kernels._int8_to_fp8_kernel[(triton.cdiv(rows, 64), triton.cdiv(columns, 128))](
        weight, q, rows, columns, *strides, BLOCK_N=64, BLOCK_K=128, num_warps=4
    )
    return q


@functools.cache
def _block(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))  # a Triton dot has at least 16 columns


def _tiles(kernel: str, rank: int) -> dict[str, int]:
    block_r = _block(rank)
    largest = next((size for size in TILES[kernel] if block_r <= size), 256)
    return TILES[kernel][largest] | {"BLOCK_R": block_r}
