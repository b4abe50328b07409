"""Everything around the large matmuls: fused Triton kernels on a GPU in 16 bits, the same formulas in torch elsewhere.

Each function holds the formula in its docstring, its torch twin, and the launch of its kernel in triton_kernels.py.
Shapes: T tokens, K inputs, N outputs, R rank. Each Triton kernel reads and writes its large operand once. Sums that
cross programs go through partial results in a fixed order, so that equal runs give equal bits.
"""

import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch

from fastdora import triton_kernels

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's builds for machines without a GPU may come without it
    triton = None

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.int8, torch.uint8)
# Tile sizes by kernel and by the largest padded rank that they serve. Those of rank 16 are the fastest of a grid at the
# sentiment recipe's sizes (bench/tune_kernels.py, which writes the file); all fit in the 99 KiB of shared memory of
# 24 GB cards.
# SPLITS: partial sums over T in a backward kernel, one a program.
TILES_FILE = Path(__file__).with_name("tiles.json")
TILES = {
    kernel: {int(rank): tiles for rank, tiles in by_rank.items()}
    for kernel, by_rank in json.loads(TILES_FILE.read_text(encoding="utf-8")).items()
}
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0  # e4m3's largest finite number


def use_triton(x: torch.Tensor) -> bool:
    """Whether `x` takes the Triton path: 16 or 8 bits on a GPU."""
    return triton is not None and x.is_cuda and x.dtype in TRITON_DTYPES


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over many terms, and of norms: float32, float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _without_autocast(x: torch.Tensor) -> torch.autocast:
    """Keep float32 matmuls in float32: autocast would run them in 16 bits."""
    return torch.autocast(x.device.type, enabled=False)


# -- dropout -----------------------------------------------------------------------------------------------------------
# The mask is a hash of the element's index and of two numbers a call: nothing is stored, and the backward pass,
# gradient checkpointing and every device draw the same mask. The mixing is the 32-bit finalizer "lowbias32" of Chris
# Wellons' hash prospector (shifts 16, 15, 16).


Seed = tuple[int, int] | torch.Tensor  # int64 (2,) on the GPU where a CUDA graph reads them


def keep_mask(seed: Seed, shape: tuple[int, int], p: float, device: torch.device) -> torch.Tensor:
    """The elements that dropout keeps, bool (T, K): the i-th where hash(i * seed[0] + seed[1]) >= p * 2^31."""
    low = 0xFFFFFFFF  # int64 arithmetic kept to 32 bits
    value = torch.arange(shape[0] * shape[1], dtype=torch.int64, device=device)
    value = (value * seed[0] + seed[1]) & low
    value = ((value ^ (value >> 16)) * 0x7FEB352D) & low
    value = ((value ^ (value >> 15)) * 0x846CA68B) & low
    value = (value ^ (value >> 16)) >> 1
    return (value >= threshold(p)).view(shape)


def threshold(p: float) -> int:
    """The 31-bit hash from which on an element is kept."""
    return min(int(p * 2**31), 2**31 - 1)


class Seeds:
    """Seeds of one forward pass in a tensor (count, 2), so that a CUDA graph reads new ones at each replay.

    Within `with seeds:` each call of `draw_seed` returns the next row; `draw` fills the rows with what as many calls
    outside would have drawn.
    """

    active: "Seeds | None" = None

    def __init__(self, count: int, device: torch.device):
        self.table = torch.empty(count, 2, dtype=torch.int64, device=device)

    def draw(self) -> None:
        drawn = torch.randint(0, 2**31 - 1, self.table.shape)
        drawn[:, 0] |= 1
        self.table.copy_(drawn, non_blocking=True)

    def __enter__(self) -> None:
        self.rows, Seeds.active = iter(self.table), self

    def __exit__(self, *_) -> None:
        Seeds.active = None


def draw_seed() -> Seed:
    """Two numbers for `keep_mask` from torch's CPU generator, which activation checkpointing restores; no GPU waits."""
    if Seeds.active is not None:
        return next(Seeds.active.rows)
    first, second = torch.randint(0, 2**31 - 1, (2,)).tolist()
    return first | 1, second


def _seed_arguments(seed: Seed, unused: torch.Tensor) -> tuple:
    """The kernels' seed, READ, multiplier, offset: a pointer that is read, or two numbers and a pointer that is not."""
    return (seed, True, 1, 0) if isinstance(seed, torch.Tensor) else (unused, False, *seed)


def _dropped(x: torch.Tensor, p: float, seed: Seed) -> torch.Tensor:
    return x * keep_mask(seed, x.shape, p, x.device) / (1 - p) if p else x


# -- the low-rank path -------------------------------------------------------------------------------------------------


def low_rank(x: torch.Tensor, a: torch.Tensor, scale: float, p: float, seed: Seed) -> torch.Tensor:
    """t = scale * dropout(x) A^T; x (T, K), a (R, K) with any strides -> (T, R) in x's dtype.

    p: dropout's probability; kept elements are divided by 1 - p.
    """
    if not use_triton(x):
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
    """dA = dt^T dropout(x), (R, K) in sum_dtype; and dx += dropout(dt A) in place, the low-rank path's share.

    dt (T, R), x and dx (T, K), a (R, K). dx: None where x needs no gradient.
    """
    if not use_triton(x):
        if dx is not None:
            dx += _dropped(dt @ a.to(dt.dtype), p, seed)
        with _without_autocast(x):
            return dt.to(sum_dtype(x.dtype)).t() @ _dropped(x, p, seed).to(sum_dtype(x.dtype))
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


# -- epilogue of the base matmul ---------------------------------------------------------------------------------------


def epilogue(
    base: torch.Tensor,
    t: torch.Tensor,
    b: torch.Tensor,
    s: float,
    mag_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """y = mag_scale * (base + s t B^T) + bias, with base = x W0^T from the matmul before.

    base (T, N), t (T, R), b (N, R), mag_scale and bias (N,) -> (T, N) in base's dtype, computed in sum_dtype.
    mag_scale: None for LoRA; `base` is overwritten then, since the backward pass does not need it.
    """
    if not use_triton(base):
        to = sum_dtype(base.dtype)  # rounded once, as the kernel does
        with _without_autocast(base):
            z = torch.addmm(base.to(to), t.to(to), b.to(to).t(), alpha=s)
        z = z if mag_scale is None else z * mag_scale
        return (z if bias is None else z + bias.to(to)).to(base.dtype)
    tokens, outputs = base.shape
    rank = b.shape[1]
    y = base if mag_scale is None else torch.empty_like(base)
    if not base.numel():
        return y
    tiles = _tiles("epilogue", rank)
    triton_kernels._epilogue_kernel[(triton.cdiv(tokens, tiles["BLOCK_T"]), triton.cdiv(outputs, tiles["BLOCK_N"]))](
        base, t, b, mag_scale, bias, y, tokens, outputs, rank, s,
        DORA=mag_scale is not None, BIAS=bias is not None, **tiles,
    )  # fmt: skip
    return y


def epilogue_backward(
    dy: torch.Tensor,
    base: torch.Tensor | None,
    t: torch.Tensor,
    b: torch.Tensor,
    s: float,
    mag_scale: torch.Tensor | None,
    norm: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(dz, dm, dB): dz = mag_scale * dy, dm = sum_T(dy * z) / norm and dB = s dz^T t, with z = base + s t B^T.

    dy and base (T, N), t (T, R), b (N, R), mag_scale and norm (N,) -> dz (T, N) in dy's dtype, dm (N,) and dB (N, R) in
    sum_dtype. For LoRA base, mag_scale and norm are None, dz is dy and dm None.
    """
    if not use_triton(dy):
        to = sum_dtype(dy.dtype)
        dm, dz = None, dy
        if mag_scale is not None:
            with _without_autocast(base):
                z = torch.addmm(base.to(to), t.to(to), b.to(to).t(), alpha=s)
            dm, dz = (dy.to(to) * z).sum(0) / norm, (dy.to(to) * mag_scale).to(dy.dtype)
        with _without_autocast(dz):
            return dz, dm, s * (dz.to(to).t() @ t.to(to))
    tokens, outputs = dy.shape
    rank = b.shape[1]
    tiles = _tiles("epilogue_backward", rank)
    splits = tiles.pop("SPLITS")
    dz = dy if mag_scale is None else torch.empty_like(dy)
    size = outputs * (rank + (mag_scale is not None))
    parts = torch.empty(splits, size, dtype=torch.float32, device=dy.device)
    triton_kernels._epilogue_backward_kernel[(triton.cdiv(outputs, tiles["BLOCK_N"]), splits)](
        dy, base, t, b, mag_scale, norm, dz, parts, tokens, outputs, rank, triton.cdiv(tokens, splits), size, s,
        DORA=mag_scale is not None, **tiles,
    )  # fmt: skip
    total = parts.sum(0)
    db = total[: outputs * rank].view(outputs, rank)
    return dz, None if mag_scale is None else total[outputs * rank :], db


# -- weights -----------------------------------------------------------------------------------------------------------


def dequantize_int8(weight: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """W[n, k] = int8[n, k] * scales[n] / 127, as bitsandbytes quantizes (LLM.int8(), arXiv 2208.07339, section 2.1).

    weight int8 (N, K), scales float32 (N,) -> (N, K) in `dtype`.
    """
    if not use_triton(weight):
        to = sum_dtype(dtype)
        return (weight.to(to) * (scales.to(to) / 127).unsqueeze(1)).to(dtype)
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    weight, (rows, columns) = weight.contiguous(), weight.shape
    triton_kernels._dequantize_int8_kernel[(rows, triton.cdiv(columns, 4096))](weight, scales, out, columns, BLOCK=4096)
    return out


def dequantize_4bit(packed: torch.Tensor, state, dtype: torch.dtype) -> torch.Tensor:
    """bitsandbytes' NF4 or FP4 weight (QLoRA, arXiv 2305.14314, section 3): W = code[nibble] * scale of its block.

    packed: uint8, two values a byte, the high half first; state: its QuantState, which holds the shape (N, K). With
    double quantization the scale is code2[scales[block]] * scales2[block of blocks] + offset. One launch; bitsandbytes
    takes three. GPU only: elsewhere bitsandbytes' own function is the twin (quantized.py).
    """
    out = torch.empty(state.shape, dtype=dtype, device=packed.device)
    nested = state.state2 if state.nested else None
    second = (None, None, None) if nested is None else (nested.code, nested.absmax, state.offset)
    triton_kernels._dequantize_4bit_kernel[(triton.cdiv(packed.numel(), 1024),)](
        packed, state.code, state.absmax, *second, out, out.numel(),
        NESTED=state.nested, SIZE=state.blocksize, SIZE2=nested.blocksize if nested else 1, BLOCK=1024,
    )  # fmt: skip
    return out


LARGEST_RANK = 64  # of `row_norms`: the sums of one program stay in its registers


class NormInputs(NamedTuple):
    """What a layer's weight norm is computed from."""

    weight: torch.Tensor  # (N, K)
    scales: torch.Tensor | None  # (N,), of int8 weights
    a: torch.Tensor  # (R, K)
    b: torch.Tensor  # (N, R)
    m: torch.Tensor  # (N,)
    s: float  # LoRA's scaling
    base_square: torch.Tensor  # ||W||^2 per row, (N,)


def row_norms(layers: list[NormInputs]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(norm, m / norm) of each layer, float32 (N,): norm = ||W + s B A|| per row, expanded as in dora.py.

    GPU only; dora.norm_and_scale is the twin. All layers share two launches, by a table of addresses, because one layer
    alone does not fill a GPU. Weights have one dtype, 16 bits or int8; a, b and m are float32 and contiguous, of one
    rank, at most LARGEST_RANK. tf32 matmuls keep float32's precision here: a weight has fewer bits than tf32, and the
    adapter is split into two terms. The norm is at least 1e-19 (m / norm is 0 there) and at least 2^-10 of ||W||, since
    float32's terms resolve no smaller sum.
    """
    first = layers[0]
    rank, device = first.a.shape[0], first.a.device
    sizes = [layer.weight.shape[0] for layer in layers]
    norms, mag_scales = torch.empty(2, sum(sizes), dtype=torch.float32, device=device).unbind()
    grams = torch.empty(len(layers), rank, rank, dtype=torch.float32, device=device)
    table, start = [], 0
    for layer, size in zip(layers, sizes, strict=True):
        scales = 0 if layer.scales is None else layer.scales.data_ptr()
        tensors = (layer.weight, layer.a, layer.b, layer.m, layer.base_square)
        table += [*(tensor.data_ptr() for tensor in tensors), scales, *layer.weight.shape, start]
        start += size
    table = torch.tensor(table, dtype=torch.int64).to(device, non_blocking=True)
    factors = torch.tensor([layer.s for layer in layers], dtype=torch.float32).to(device, non_blocking=True)
    block_r = _padded_rank(rank)
    triton_kernels._grams_kernel[(len(layers),)](
        table, grams, rank, BLOCK_K=2048 // block_r, BLOCK_R=block_r, num_warps=4
    )
    kind = {torch.int8: tl.int8, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[first.weight.dtype]
    triton_kernels._row_norms_kernel[(triton.cdiv(max(sizes), 32), len(layers))](
        table, factors, grams, norms, mag_scales, rank,
        KIND=kind, BLOCK_N=32, BLOCK_K=128, BLOCK_R=block_r, SCALES=first.scales is not None, num_warps=4,
    )  # fmt: skip
    return list(zip(norms.split(sizes), mag_scales.split(sizes), strict=True))


# -- fp8 ---------------------------------------------------------------------------------------------------------------


def quantize_rows(x: torch.Tensor, factors: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """q = x * factors / scale in e4m3, with scale = max_k |x * factors| / 448 per row, 1 for a row of zeros.

    x (T, K), factors float32 (K,) or None for ones -> q (T, K) e4m3, scale (T, 1) float32.
    """
    if not use_triton(x):
        value = x.float() if factors is None else x.float() * factors
        scale = value.abs().amax(1, keepdim=True) / FP8_MAX
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        return (value / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale
    x, (rows, columns) = x.contiguous(), x.shape
    q = torch.empty(rows, columns, dtype=FP8, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(columns)
    triton_kernels._quantize_rows_kernel[(rows,)](
        x, factors, q, scale, columns, BLOCK=block, FACTORS=factors is not None, num_warps=8 if block > 4096 else 4
    )
    return q, scale


def int8_to_fp8(weight: torch.Tensor, transpose: bool = False) -> torch.Tensor:
    """int8 values rounded to e4m3, which keeps four significant bits; (N, K) -> (N, K), or (K, N) with transpose."""
    if not use_triton(weight):
        return (weight.t() if transpose else weight).float().to(FP8).contiguous()
    weight, (rows, columns) = weight.contiguous(), weight.shape
    q = torch.empty((columns, rows) if transpose else (rows, columns), dtype=FP8, device=weight.device)
    strides = (1, rows) if transpose else (columns, 1)
    triton_kernels._int8_to_fp8_kernel[(triton.cdiv(rows, 64), triton.cdiv(columns, 128))](
        weight, q, rows, columns, *strides, BLOCK_N=64, BLOCK_K=128, num_warps=4
    )
    return q


@functools.cache
def _padded_rank(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))  # tl.dot takes at least 16 columns


def _tiles(kernel: str, rank: int) -> dict[str, int]:
    block_r = _padded_rank(rank)
    largest = next((size for size in TILES[kernel] if block_r <= size), 256)
    return TILES[kernel][largest] | {"BLOCK_R": block_r}
