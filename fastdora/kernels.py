"""The arithmetic around the large products, fused: Triton on a GPU in 16 bits, the same formulas in torch elsewhere.

Shapes: T tokens, K inputs, N outputs, R rank. Each Triton kernel reads and writes its large operand once. Sums that
cross programs go through partial results in a fixed order, so that equal runs give equal bits.
"""

import functools
from typing import NamedTuple

import torch

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
    _low_rank_kernel[(triton.cdiv(tokens, tiles["BLOCK_T"]),)](
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
    _low_rank_backward_kernel[(triton.cdiv(inputs, tiles["BLOCK_K"]), splits)](
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
    _combine_kernel[(triton.cdiv(tokens, tiles["BLOCK_T"]), triton.cdiv(outputs, tiles["BLOCK_N"]))](
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
    _combine_backward_kernel[(triton.cdiv(outputs, tiles["BLOCK_N"]), splits)](
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
    _widen_int8_kernel[(rows, triton.cdiv(columns, 4096))](weight, scales, wide_weight, columns, BLOCK=4096)
    return wide_weight


def widen_4bit(packed: torch.Tensor, state, dtype: torch.dtype) -> torch.Tensor:
    """bitsandbytes' NF4 or FP4 weight, (N, K), from its bytes and its QuantState (QLoRA, arXiv 2305.14314, section 3).

    One launch; bitsandbytes takes three for double quantisation, in which the blocks' scales are 8-bit themselves.
    """
    out = torch.empty(state.shape, dtype=dtype, device=packed.device)
    more = state.state2 if state.nested else None
    second = (None, None, None) if more is None else (more.code, more.absmax, state.offset)
    _widen_4bit_kernel[(triton.cdiv(packed.numel(), 1024),)](
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
    _grams_kernel[(len(layers),)](table, grams, rank, BLOCK_K=2048 // block_r, BLOCK_R=block_r, num_warps=4)
    kind = {torch.int8: tl.int8, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[first.weight.dtype]
    _row_norms_kernel[(triton.cdiv(max(sizes), 32), len(layers))](
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
    _quantise_rows_kernel[(rows,)](
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
    _int8_to_fp8_kernel[(triton.cdiv(rows, 64), triton.cdiv(columns, 128))](
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


if triton is not None:

    @triton.jit
    def _kept(rows, columns, width, threshold, multiplier, offset):
        value = rows.to(tl.uint32)[:, None] * width + columns.to(tl.uint32)[None, :]
        value = value * multiplier + offset
        value = (value ^ (value >> 16)) * 0x7FEB352D
        value = (value ^ (value >> 15)) * 0x846CA68B
        value = (value ^ (value >> 16)) >> 1
        return value >= threshold

    @triton.jit(do_not_specialize=["threshold", "multiplier", "offset"])
    def _low_rank_kernel(
        x, a, t, tokens, inputs, rank, stride_r, stride_k, scale, threshold, seed,
        READ: tl.constexpr, multiplier, offset,
        BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, DROPOUT: tl.constexpr,
    ):  # fmt: skip
        if DROPOUT and READ:
            multiplier, offset = tl.load(seed).to(tl.uint32), tl.load(seed + 1).to(tl.uint32)
        rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
        ranks = tl.arange(0, BLOCK_R)
        lines = rows.to(tl.int64) * inputs
        total = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
        for start in range(0, inputs, BLOCK_K):
            columns = start + tl.arange(0, BLOCK_K)
            inside = (rows < tokens)[:, None] & (columns < inputs)[None, :]
            value = tl.load(x + lines[:, None] + columns[None, :], mask=inside, other=0.0)
            if DROPOUT:
                value = tl.where(_kept(rows, columns, inputs, threshold, multiplier, offset), value, 0.0)
            factor = tl.load(
                a + columns[:, None] * stride_k + ranks[None, :] * stride_r,
                mask=(columns < inputs)[:, None] & (ranks < rank)[None, :],
                other=0.0,
            )
            total = tl.dot(value, factor.to(value.dtype), total)
        tl.store(
            t + rows[:, None] * rank + ranks[None, :],
            (total * scale).to(t.dtype.element_ty),
            mask=(rows < tokens)[:, None] & (ranks < rank)[None, :],
        )

    @triton.jit(do_not_specialize=["threshold", "multiplier", "offset"])
    def _low_rank_backward_kernel(
        dt, x, a, dx, parts, tokens, inputs, rank, stride_r, stride_k, share, scale, threshold, seed,
        READ: tl.constexpr, multiplier, offset,
        BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, DROPOUT: tl.constexpr,
        INTO_X: tl.constexpr,
    ):  # fmt: skip
        if DROPOUT and READ:
            multiplier, offset = tl.load(seed).to(tl.uint32), tl.load(seed + 1).to(tl.uint32)
        columns = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
        split = tl.program_id(1)
        ranks = tl.arange(0, BLOCK_R)
        within = (ranks < rank)[:, None] & (columns < inputs)[None, :]
        factor = tl.load(a + ranks[:, None] * stride_r + columns[None, :] * stride_k, mask=within, other=0.0)
        total = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
        end = tl.minimum((split + 1) * share, tokens)
        for start in range(split * share, end, BLOCK_T):
            rows = start + tl.arange(0, BLOCK_T)
            places = rows.to(tl.int64)[:, None] * inputs + columns[None, :]
            inside = (rows < end)[:, None] & (columns < inputs)[None, :]
            small = tl.load(
                dt + rows[:, None] * rank + ranks[None, :],
                mask=(rows < end)[:, None] & (ranks < rank)[None, :],
                other=0.0,
            )
            value = tl.load(x + places, mask=inside, other=0.0)
            if DROPOUT:
                kept = _kept(rows, columns, inputs, threshold, multiplier, offset)
                value = tl.where(kept, value, 0.0)
            total = tl.dot(tl.trans(small), value, total)
            if INTO_X:
                added = tl.dot(small, factor.to(small.dtype)) * scale
                if DROPOUT:
                    added = tl.where(kept, added, 0.0)
                before = tl.load(dx + places, mask=inside, other=0.0)
                tl.store(dx + places, (before + added).to(dx.dtype.element_ty), mask=inside)
        place = parts + (split * rank + ranks[:, None]) * inputs + columns[None, :]
        tl.store(place, total * scale, mask=within)

    @triton.jit
    def _combine_kernel(
        base, t, b, gain, bias, y, tokens, outputs, rank, s,
        BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, GAIN: tl.constexpr, BIAS: tl.constexpr,
    ):  # fmt: skip
        rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
        columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        ranks = tl.arange(0, BLOCK_R)
        inside = (rows < tokens)[:, None] & (columns < outputs)[None, :]
        places = rows.to(tl.int64)[:, None] * outputs + columns[None, :]
        small = tl.load(
            t + rows[:, None] * rank + ranks[None, :],
            mask=(rows < tokens)[:, None] & (ranks < rank)[None, :],
            other=0.0,
        )
        factor = tl.load(
            b + columns[None, :] * rank + ranks[:, None],
            mask=(ranks < rank)[:, None] & (columns < outputs)[None, :],
            other=0.0,
        )
        value = tl.load(base + places, mask=inside, other=0.0) + s * tl.dot(small, factor.to(small.dtype))
        if GAIN:
            value *= tl.load(gain + columns, mask=columns < outputs, other=0.0).to(tl.float32)[None, :]
        if BIAS:
            value += tl.load(bias + columns, mask=columns < outputs, other=0.0).to(tl.float32)[None, :]
        tl.store(y + places, value.to(y.dtype.element_ty), mask=inside)

    @triton.jit
    def _combine_backward_kernel(
        dy, base, t, b, gain, norm, dz, parts, tokens, outputs, rank, share, size, s,
        BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, GAIN: tl.constexpr,
    ):  # fmt: skip
        columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        split = tl.program_id(1)
        ranks = tl.arange(0, BLOCK_R)
        total = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
        if GAIN:
            factor = tl.load(
                b + columns[None, :] * rank + ranks[:, None],
                mask=(ranks < rank)[:, None] & (columns < outputs)[None, :],
                other=0.0,
            )
            gains = tl.load(gain + columns, mask=columns < outputs, other=0.0).to(tl.float32)
            total_gain = tl.zeros((BLOCK_N,), dtype=tl.float32)
        end = tl.minimum((split + 1) * share, tokens)
        for start in range(split * share, end, BLOCK_T):
            rows = start + tl.arange(0, BLOCK_T)
            places = rows.to(tl.int64)[:, None] * outputs + columns[None, :]
            inside = (rows < end)[:, None] & (columns < outputs)[None, :]
            small = tl.load(
                t + rows[:, None] * rank + ranks[None, :],
                mask=(rows < end)[:, None] & (ranks < rank)[None, :],
                other=0.0,
            )
            value = tl.load(dy + places, mask=inside, other=0.0)
            if GAIN:
                z = tl.load(base + places, mask=inside, other=0.0) + s * tl.dot(small, factor.to(small.dtype))
                total_gain += tl.sum(value.to(tl.float32) * z, axis=0)
                value = (value.to(tl.float32) * gains[None, :]).to(dz.dtype.element_ty)
                tl.store(dz + places, value, mask=inside)
            total = tl.dot(tl.trans(value), small, total)
        own = parts + split * size
        tl.store(
            own + columns[:, None] * rank + ranks[None, :],
            total * s,
            mask=(columns < outputs)[:, None] & (ranks < rank)[None, :],
        )
        if GAIN:
            norms = tl.load(norm + columns, mask=columns < outputs, other=1.0).to(tl.float32)
            tl.store(own + outputs * rank + columns, total_gain / norms, mask=columns < outputs)

    @triton.jit
    def _widen_int8_kernel(weight, scales, out, columns, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(weight + row * columns + places, mask=places < columns, other=0)
        scale = tl.load(scales + row).to(tl.float32) * (1.0 / 127.0)
        tl.store(
            out + row * columns + places, (value.to(tl.float32) * scale).to(out.dtype.element_ty), mask=places < columns
        )

    @triton.jit
    def _widen_4bit_kernel(
        packed, code, scales, code2, scales2, offset, out, count,
        NESTED: tl.constexpr, SIZE: tl.constexpr, SIZE2: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = places < (count + 1) // 2
        byte = tl.load(packed + places, mask=inside, other=0).to(tl.int32)
        block = places * 2 // SIZE
        scale = tl.load(scales + block, mask=inside, other=0)
        if NESTED:
            scale2 = tl.load(scales2 + block // SIZE2, mask=inside, other=0.0)
            scale = tl.load(code2 + scale.to(tl.int32), mask=inside, other=0.0) * scale2 + tl.load(offset)
        high = tl.load(code + (byte >> 4), mask=inside, other=0.0) * scale
        low = tl.load(code + (byte & 15), mask=inside, other=0.0) * scale
        both = tl.program_id(0) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
        tl.store(out + both, tl.interleave(high, low).to(out.dtype.element_ty), mask=both < count)

    # A row of the table: addresses of weight, a, b, m, base_square, scales; N, K, and where the layer's results start.

    @triton.jit
    def _grams_kernel(table, grams, rank, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr):
        layer = tl.program_id(0)
        a = tl.load(table + layer * 9 + 1).to(tl.pointer_type(tl.float32))
        inputs = tl.load(table + layer * 9 + 7).to(tl.int32)
        ranks = tl.arange(0, BLOCK_R)
        total = tl.zeros((BLOCK_R, BLOCK_R), dtype=tl.float32)
        for start in range(0, inputs, BLOCK_K):
            columns = start + tl.arange(0, BLOCK_K)
            inside = (ranks < rank)[:, None] & (columns < inputs)[None, :]
            factor = tl.load(a + ranks[:, None] * inputs + columns[None, :], mask=inside, other=0.0)
            total = tl.dot(factor, tl.trans(factor), total, input_precision="tf32x3")
        tl.store(
            grams + (layer * rank + ranks[:, None]) * rank + ranks[None, :],
            total,
            mask=(ranks < rank)[:, None] & (ranks < rank)[None, :],
        )

    @triton.jit
    def _row_norms_kernel(
        table, factors, grams, norms, gains, rank,
        KIND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, SCALES: tl.constexpr,
    ):  # fmt: skip
        layer = tl.program_id(1)
        row = table + layer * 9
        outputs = tl.load(row + 6).to(tl.int32)
        rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        if tl.program_id(0) * BLOCK_N < outputs:
            weight = tl.load(row).to(tl.pointer_type(KIND))
            a = tl.load(row + 1).to(tl.pointer_type(tl.float32))
            b = tl.load(row + 2).to(tl.pointer_type(tl.float32))
            m = tl.load(row + 3).to(tl.pointer_type(tl.float32))
            base_square = tl.load(row + 4).to(tl.pointer_type(tl.float32))
            inputs = tl.load(row + 7).to(tl.int32)
            place = tl.load(row + 8)
            s = tl.load(factors + layer)
            ranks = tl.arange(0, BLOCK_R)
            inside = rows < outputs
            wa = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
            for start in range(0, inputs, BLOCK_K):
                columns = start + tl.arange(0, BLOCK_K)
                value = tl.load(
                    weight + rows.to(tl.int64)[:, None] * inputs + columns[None, :],
                    mask=inside[:, None] & (columns < inputs)[None, :],
                    other=0,
                ).to(tl.float32)
                factor = tl.load(
                    a + ranks[None, :] * inputs + columns[:, None],
                    mask=(columns < inputs)[:, None] & (ranks < rank)[None, :],
                    other=0.0,
                )
                high = (factor.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)
                wa = tl.dot(value, factor - high, wa, input_precision="tf32")
                wa = tl.dot(value, high, wa, input_precision="tf32")
            if SCALES:
                scales = tl.load(row + 5).to(tl.pointer_type(tl.float32))
                wa *= tl.load(scales + rows, mask=inside, other=0.0)[:, None] * (1.0 / 127.0)
            small = tl.load(
                b + rows[:, None] * rank + ranks[None, :], mask=inside[:, None] & (ranks < rank)[None, :], other=0.0
            )
            gram = tl.load(
                grams + (layer * rank + ranks[:, None]) * rank + ranks[None, :],
                mask=(ranks < rank)[:, None] & (ranks < rank)[None, :],
                other=0.0,
            )
            change = (2.0 * s * wa + s * s * tl.dot(small, gram, input_precision="tf32x3")) * small
            base = tl.load(base_square + rows, mask=inside, other=1.0)
            # The second is what float32 resolves: 8 times its rounding, 2^-20.
            square = tl.maximum(base + tl.sum(change, axis=1), base * 9.5367431640625e-07)
            found = tl.sqrt(tl.maximum(square, 1.17549435e-38))
            gain = tl.load(m + rows, mask=inside, other=0.0) / found
            tl.store(norms + place + rows, found, mask=inside)
            tl.store(gains + place + rows, tl.where(square > 1.17549435e-38, gain, 0.0), mask=inside)

    @triton.jit
    def _quantise_rows_kernel(x, factors, q, scales, columns, BLOCK: tl.constexpr, FACTORS: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        places = tl.arange(0, BLOCK)
        value = tl.load(x + row * columns + places, mask=places < columns, other=0.0).to(tl.float32)
        if FACTORS:
            value *= tl.load(factors + places, mask=places < columns, other=0.0)
        largest = tl.max(tl.abs(value), axis=0)
        scale = tl.where(largest == 0, 1.0, largest / 448.0)
        value = tl.minimum(tl.maximum(value / scale, -448.0), 448.0)
        tl.store(q + row * columns + places, value.to(q.dtype.element_ty), mask=places < columns)
        tl.store(scales + row, scale)

    @triton.jit
    def _int8_to_fp8_kernel(weight, q, rows, columns, stride_n, stride_k, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
        lines = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        places = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = (lines < rows)[:, None] & (places < columns)[None, :]
        value = tl.load(weight + lines[:, None] * columns + places[None, :], mask=inside, other=0)
        tl.store(
            q + lines[:, None] * stride_n + places[None, :] * stride_k,
            value.to(tl.float32).to(q.dtype.element_ty),
            mask=inside,
        )
