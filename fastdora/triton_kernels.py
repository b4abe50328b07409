"""The Triton kernels, each with the function that launches it below; kernels.py has the same formulas in torch.

Shapes: T tokens (`tokens`), K inputs, N outputs, R rank (at most BLOCK_R, padded with zeros). Matrices are row-major
unless strides are given, sums are float32. A kernel's arguments are pointers, sizes and constants, since it takes
nothing else, and it is one function because it is one program on the GPU: hence the long lists and bodies. Each kernel
reads and writes its large operands once. `parts` are partial sums, which the launching function adds up in a fixed
order (equal runs give equal bits, which atomics would not). Offsets into the large operands are int64: T * K may exceed
2^31. `tiles`: the sizes to launch with in place of tiles.json's.
"""

import functools
import json
from pathlib import Path

import torch
import triton
import triton.language as tl

from fastdora.dropout import Seed, threshold

# Tile sizes by kernel and by the largest padded rank that they serve. Those of rank 16 are the fastest of a grid at the
# sentiment recipe's sizes (bench/tune_kernels.py, which writes the file); all fit in the 99 KiB of shared memory of
# 24 GB cards. SPLITS: partial sums over T in a backward kernel, one a program.
TILES_FILE = Path(__file__).with_name("tiles.json")
TILES = {
    kernel: {int(rank): tiles for rank, tiles in by_rank.items()}
    for kernel, by_rank in json.loads(TILES_FILE.read_text(encoding="utf-8")).items()
}
Tiles = dict[str, int]


@functools.cache
def padded_rank(rank: int) -> int:
    """The rank as a tile's width: a power of two, which tl.arange takes, and at least the 16 that tl.dot takes."""
    return max(16, triton.next_power_of_2(rank))


def tiles_of(kernel: str, rank: int, tiles: Tiles | None = None) -> Tiles:
    """The constants to launch `kernel` with at this rank: `tiles`, or tiles.json's."""
    block_r = padded_rank(rank)
    largest = next((size for size in TILES[kernel] if block_r <= size), 256)
    return (tiles or TILES[kernel][largest]) | {"BLOCK_R": block_r}


def _seed_arguments(seed: Seed, unused: torch.Tensor) -> tuple:
    """The kernels' seed, READ, multiplier, offset: a pointer that is read, or two numbers and a pointer that is not."""
    return (seed, True, 1, 0) if isinstance(seed, torch.Tensor) else (unused, False, *seed)


@triton.jit
def _load(matrix, rows, columns, height, width, stride_r, stride_c):
    """The tile rows x columns of a matrix (height, width); 0 outside of it, which adds nothing to a sum."""
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    return tl.load(matrix + rows[:, None] * stride_r + columns[None, :] * stride_c, mask=inside, other=0.0)


@triton.jit
def _store(matrix, rows, columns, height, width, stride, value):
    """Write a tile of a matrix (height, width) with rows `stride` apart, in its dtype; nothing outside of it."""
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    tl.store(matrix + rows[:, None] * stride + columns[None, :], value.to(matrix.dtype.element_ty), mask=inside)


# -- the low-rank path -------------------------------------------------------------------------------------------------


@triton.jit
def _keep(rows, columns, width, threshold, multiplier, offset):
    """Dropout's mask of a tile, as dropout.keep_mask: hash(index * multiplier + offset) >= threshold."""
    # uint32 wraps around, as keep_mask's & 0xFFFFFFFF does.
    value = rows.to(tl.uint32)[:, None] * width + columns.to(tl.uint32)[None, :]
    value = value * multiplier + offset
    value = (value ^ (value >> 16)) * 0x7FEB352D
    value = (value ^ (value >> 15)) * 0x846CA68B
    value = (value ^ (value >> 16)) >> 1
    return value >= threshold


# Numbers that differ at each call: Triton would compile anew where one happens to be 1 or a multiple of 16.
@triton.jit(do_not_specialize=["threshold", "multiplier", "offset"])
def _low_rank_kernel(
    x, a, t, tokens, inputs, rank, stride, stride_r, stride_k, scale, threshold, seed,
    READ: tl.constexpr, multiplier, offset,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """t = scale * dropout(x) A^T: x (T, K) and a (R, K) by strides -> t (T, R). One program per BLOCK_T rows."""
    if DROPOUT and READ:
        multiplier, offset = tl.load(seed).to(tl.uint32), tl.load(seed + 1).to(tl.uint32)
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    ranks = tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    for start in range(0, inputs, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        value = _load(x, rows.to(tl.int64), columns, tokens, inputs, stride, 1)
        if DROPOUT:
            value = tl.where(_keep(rows, columns, inputs, threshold, multiplier, offset), value, 0.0)
        factor = _load(a, columns, ranks, inputs, rank, stride_k, stride_r)
        total = tl.dot(value, factor.to(value.dtype), total)
    # Dropout's 1 / (1 - p) is part of `scale`: one multiplication per result, not one per element of x.
    _store(t, rows, ranks, tokens, rank, rank, total * scale)


def low_rank(
    x: torch.Tensor, a: torch.Tensor, scale: float, p: float, seed: Seed, tiles: Tiles | None = None
) -> torch.Tensor:
    """kernels.low_rank."""
    (tokens, inputs), rank = x.shape, a.shape[0]
    t = torch.empty(tokens, rank, dtype=x.dtype, device=x.device)
    if not x.numel():
        return t.zero_()
    tiles = tiles_of("low_rank", rank, tiles)
    _low_rank_kernel[(triton.cdiv(tokens, tiles["BLOCK_T"]),)](
        x, a, t, tokens, inputs, rank, x.stride(0), a.stride(0), a.stride(1), scale / (1 - p), threshold(p),
        *_seed_arguments(seed, x),
        DROPOUT=p > 0, **tiles,
    )  # fmt: skip
    return t


@triton.jit(do_not_specialize=["threshold", "multiplier", "offset"])
def _low_rank_backward_kernel(
    dt, x, a, dx, parts, tokens, inputs, rank, stride_r, stride_k, share, scale, threshold, seed,
    READ: tl.constexpr, multiplier, offset,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, DROPOUT: tl.constexpr,
    INTO_X: tl.constexpr,
):  # fmt: skip
    """parts[split] = scale * dt^T dropout(x), over `share` tokens; with INTO_X dx += dropout(dt A) * scale.

    dt (T, R), x and dx (T, K), a (R, K) by strides; parts (SPLITS, R, K) float32. scale is dropout's 1 / (1 - p).
    One program per BLOCK_K columns and split, so that x is read once for both results.
    """
    if DROPOUT and READ:
        multiplier, offset = tl.load(seed).to(tl.uint32), tl.load(seed + 1).to(tl.uint32)
    columns = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    split = tl.program_id(1)
    ranks = tl.arange(0, BLOCK_R)
    factor = _load(a, ranks, columns, rank, inputs, stride_r, stride_k)
    total = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    end = tl.minimum((split + 1) * share, tokens)
    for start in range(split * share, end, BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T)
        small = _load(dt, rows, ranks, end, rank, rank, 1)
        value = _load(x, rows.to(tl.int64), columns, end, inputs, inputs, 1)
        if DROPOUT:
            keep = _keep(rows, columns, inputs, threshold, multiplier, offset)
            value = tl.where(keep, value, 0.0)
        total = tl.dot(tl.trans(small), value, total)
        if INTO_X:
            added = tl.dot(small, factor.to(small.dtype)) * scale
            if DROPOUT:
                added = tl.where(keep, added, 0.0)
            # Read and written without atomics: no other program has this tile.
            before = _load(dx, rows.to(tl.int64), columns, end, inputs, inputs, 1)
            _store(dx, rows.to(tl.int64), columns, end, inputs, inputs, before + added)
    _store(parts + split * rank * inputs, ranks, columns, rank, inputs, inputs, total * scale)


def low_rank_backward(
    dt: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    dx: torch.Tensor | None,
    p: float,
    seed: Seed,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """kernels.low_rank_backward."""
    (tokens, inputs), rank = x.shape, a.shape[0]
    if not x.numel():
        return torch.zeros(rank, inputs, dtype=torch.float32, device=x.device)
    tiles = tiles_of("low_rank_backward", rank, tiles)
    splits = tiles.pop("SPLITS")
    parts = torch.empty(splits, rank, inputs, dtype=torch.float32, device=x.device)
    _low_rank_backward_kernel[(triton.cdiv(inputs, tiles["BLOCK_K"]), splits)](
        dt, x, a, x if dx is None else dx, parts, tokens, inputs, rank, a.stride(0), a.stride(1),
        triton.cdiv(tokens, splits), 1 / (1 - p), threshold(p), *_seed_arguments(seed, x),
        DROPOUT=p > 0, INTO_X=dx is not None, **tiles,
    )  # fmt: skip
    return parts.sum(0)


# -- epilogue of the base matmul ---------------------------------------------------------------------------------------


@triton.jit
def _epilogue_kernel(
    base, t, b, mag_scale, bias, y, tokens, outputs, rank, stride, stride_t, s,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, DORA: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """y = mag_scale * (base + s t B^T) + bias: base and y (T, N), t (T, R), b (N, R), mag_scale and bias (N,).

    The rows of base are `stride` and those of t `stride_t` apart. Without DORA mag_scale is not read and y may be base
    itself.
    """
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_R)
    small = _load(t, rows, ranks, tokens, rank, stride_t, 1)
    factor = _load(b, ranks, columns, rank, outputs, 1, rank)  # B^T
    value = _load(base, rows.to(tl.int64), columns, tokens, outputs, stride, 1)
    value = value + s * tl.dot(small, factor.to(small.dtype))
    if DORA:
        value *= tl.load(mag_scale + columns, mask=columns < outputs, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        value += tl.load(bias + columns, mask=columns < outputs, other=0.0).to(tl.float32)[None, :]
    _store(y, rows.to(tl.int64), columns, tokens, outputs, outputs, value)


def epilogue(
    base: torch.Tensor,
    t: torch.Tensor,
    b: torch.Tensor,
    s: float,
    mag_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """kernels.epilogue."""
    (tokens, outputs), rank = base.shape, b.shape[1]
    # DoRA's backward pass reads base again, and what is one of several layers' is not y's memory layout.
    y = base if mag_scale is None and base.stride(0) == outputs else base.new_empty(tokens, outputs)
    if not base.numel():
        return y
    tiles = tiles_of("epilogue", rank, tiles)
    _epilogue_kernel[(triton.cdiv(tokens, tiles["BLOCK_T"]), triton.cdiv(outputs, tiles["BLOCK_N"]))](
        base, t, b, mag_scale, bias, y, tokens, outputs, rank, base.stride(0), t.stride(0), s,
        DORA=mag_scale is not None, BIAS=bias is not None, **tiles,
    )  # fmt: skip
    return y


@triton.jit
def _epilogue_backward_kernel(
    dy, base, t, b, mag_scale, norm, dz, parts, tokens, outputs, rank, stride, stride_t, share, size, s,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, DORA: tl.constexpr,
):  # fmt: skip
    """dz = mag_scale * dy, dB = s dz^T t and dm = sum_T(dy * z) / norm, with z = base + s t B^T.

    dy, base and dz (T, N), t (T, R), b (N, R), mag_scale and norm (N,); parts[split]: dB (N, R), then dm (N,), over
    `share` tokens. The rows of base and dz are `stride`, those of t `stride_t` apart. Without DORA dz is dy and only dB
    is computed. One program per BLOCK_N columns and split.
    """
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    ranks = tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    if DORA:
        factor = _load(b, ranks, columns, rank, outputs, 1, rank)  # B^T
        mag_scales = tl.load(mag_scale + columns, mask=columns < outputs, other=0.0).to(tl.float32)
        total_dm = tl.zeros((BLOCK_N,), dtype=tl.float32)
    end = tl.minimum((split + 1) * share, tokens)
    for start in range(split * share, end, BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T)
        small = _load(t, rows, ranks, end, rank, stride_t, 1)
        value = _load(dy, rows.to(tl.int64), columns, end, outputs, outputs, 1)
        if DORA:
            # z is computed again from t, which is N / R times smaller: writing it would cost the forward pass T * N.
            z = _load(base, rows.to(tl.int64), columns, end, outputs, stride, 1)
            z = z + s * tl.dot(small, factor.to(small.dtype))
            total_dm += tl.sum(value.to(tl.float32) * z, axis=0)
            # Rounded before it enters dB, so that dA, dB and dx are of the same dz.
            value = (value.to(tl.float32) * mag_scales[None, :]).to(dz.dtype.element_ty)
            _store(dz, rows.to(tl.int64), columns, end, outputs, stride, value)
        total = tl.dot(tl.trans(value), small, total)
    own = parts + split * size
    _store(own, columns, ranks, outputs, rank, rank, total * s)
    if DORA:
        norms = tl.load(norm + columns, mask=columns < outputs, other=1.0).to(tl.float32)
        tl.store(own + outputs * rank + columns, total_dm / norms, mask=columns < outputs)


def epilogue_backward(
    dy: torch.Tensor,
    base: torch.Tensor | None,
    t: torch.Tensor,
    b: torch.Tensor,
    s: float,
    mag_scale: torch.Tensor | None,
    norm: torch.Tensor | None,
    dz: torch.Tensor | None = None,
    tiles: Tiles | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """kernels.epilogue_backward."""
    (tokens, outputs), rank = dy.shape, b.shape[1]
    tiles = tiles_of("epilogue_backward", rank, tiles)
    splits = tiles.pop("SPLITS")
    if mag_scale is None:
        dz = dy if dz is None else dz.copy_(dy)
    elif dz is None:
        dz = torch.empty_like(dy)
    size = outputs * (rank + (mag_scale is not None))
    parts = torch.empty(splits, size, dtype=torch.float32, device=dy.device)
    _epilogue_backward_kernel[(triton.cdiv(outputs, tiles["BLOCK_N"]), splits)](
        dy, base, t, b, mag_scale, norm, dz, parts, tokens, outputs, rank, dz.stride(0), t.stride(0),
        triton.cdiv(tokens, splits), size, s,
        DORA=mag_scale is not None, **tiles,
    )  # fmt: skip
    total = parts.sum(0)
    db = total[: outputs * rank].view(outputs, rank)
    return dz, None if mag_scale is None else total[outputs * rank :], db


# -- quantized weights -------------------------------------------------------------------------------------------------


@triton.jit
def _dequantize_int8_kernel(weight, scales, out, columns, BLOCK: tl.constexpr):
    """out[n, k] = weight[n, k] * scales[n] / 127: int8 (N, K), float32 (N,) -> (N, K)."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(weight + row * columns + offsets, mask=offsets < columns, other=0)
    scale = tl.load(scales + row).to(tl.float32) * (1.0 / 127.0)
    value = (value.to(tl.float32) * scale).to(out.dtype.element_ty)
    tl.store(out + row * columns + offsets, value, mask=offsets < columns)


def dequantize_int8(weight: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """kernels.dequantize_int8."""
    weight, (rows, columns) = weight.contiguous(), weight.shape
    _dequantize_int8_kernel[(rows, triton.cdiv(columns, 4096))](weight, scales, out, columns, BLOCK=4096)
    return out


@triton.jit
def _dequantize_4bit_kernel(
    packed, code, scales, code2, scales2, offset, out, count,
    NESTED: tl.constexpr, SIZE: tl.constexpr, SIZE2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[i] = code[nibble i] * scale of block i // SIZE; two values a byte, the high half first.

    packed uint8 (count / 2,), code float32 (16,), out (count,). NESTED (double quantization): scales are uint8, and
    a block's scale is code2[scales[block]] * scales2[block // SIZE2] + offset.
    """
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < (count + 1) // 2
    byte = tl.load(packed + offsets, mask=inside, other=0).to(tl.int32)
    block = offsets * 2 // SIZE  # both values of a byte are of one block: bitsandbytes' sizes are even
    scale = tl.load(scales + block, mask=inside, other=0)
    if NESTED:
        scale2 = tl.load(scales2 + block // SIZE2, mask=inside, other=0.0)
        scale = tl.load(code2 + scale.to(tl.int32), mask=inside, other=0.0) * scale2 + tl.load(offset)
    high = tl.load(code + (byte >> 4), mask=inside, other=0.0) * scale
    low = tl.load(code + (byte & 15), mask=inside, other=0.0) * scale
    both = tl.program_id(0) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
    # Of an odd number of values the last byte's second half lies past the weight, hence a mask of its own.
    tl.store(out + both, tl.interleave(high, low).to(out.dtype.element_ty), mask=both < count)


def dequantize_4bit(packed: torch.Tensor, state, out: torch.Tensor) -> torch.Tensor:
    """kernels.dequantize_4bit, packed in uint8: one launch, where bitsandbytes takes three."""
    nested = state.state2 if state.nested else None
    second = (None, None, None) if nested is None else (nested.code, nested.absmax, state.offset)
    _dequantize_4bit_kernel[(triton.cdiv(packed.numel(), 1024),)](
        packed, state.code, state.absmax, *second, out, out.numel(),
        NESTED=state.nested, SIZE=state.blocksize, SIZE2=nested.blocksize if nested else 1, BLOCK=1024,
    )  # fmt: skip
    return out


# -- weight norms ------------------------------------------------------------------------------------------------------

LARGEST_RANK = 64  # of `row_norms`: the sums of one program stay in its registers
# The layers' table has nine int64 a row: the addresses of weight, a, b, m, base_square and scales; N, K, and the
# index of the layer's first result.


@triton.jit
def _grams_kernel(table, grams, rank, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr):
    """grams[layer] = A A^T, (R, R) float32. tf32x3: three tf32 matmuls, which keep float32's precision."""
    layer = tl.program_id(0)
    a = tl.load(table + layer * 9 + 1).to(tl.pointer_type(tl.float32))
    inputs = tl.load(table + layer * 9 + 7).to(tl.int32)
    ranks = tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_R, BLOCK_R), dtype=tl.float32)
    for start in range(0, inputs, BLOCK_K):
        factor = _load(a, ranks, start + tl.arange(0, BLOCK_K), rank, inputs, inputs, 1)
        total = tl.dot(factor, tl.trans(factor), total, input_precision="tf32x3")
    _store(grams + layer * rank * rank, ranks, ranks, rank, rank, rank, total)


@triton.jit
def _row_norms_kernel(
    table, factors, grams, norms, mag_scales, rank,
    KIND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """norm = sqrt(||w||^2 + (2 s W A^T + s^2 B (A A^T)) . b) per row, and m / norm: float32 (N,) of each layer.

    KIND: the weights' dtype; factors: s of each layer; SCALES: int8 weights with row scales. W has at most 11
    significant bits, so tf32 holds it exactly; A is split into a part that tf32 holds (`high`) and the rest.
    """
    layer = tl.program_id(1)
    row = table + layer * 9
    outputs = tl.load(row + 6).to(tl.int32)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if tl.program_id(0) * BLOCK_N < outputs:  # the grid is as wide as the widest layer
        weight = tl.load(row).to(tl.pointer_type(KIND))
        a = tl.load(row + 1).to(tl.pointer_type(tl.float32))
        b = tl.load(row + 2).to(tl.pointer_type(tl.float32))
        m = tl.load(row + 3).to(tl.pointer_type(tl.float32))
        base_square = tl.load(row + 4).to(tl.pointer_type(tl.float32))
        inputs = tl.load(row + 7).to(tl.int32)
        start_row = tl.load(row + 8)
        s = tl.load(factors + layer)
        ranks = tl.arange(0, BLOCK_R)
        inside = rows < outputs
        wa = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
        for start in range(0, inputs, BLOCK_K):
            columns = start + tl.arange(0, BLOCK_K)
            value = _load(weight, rows.to(tl.int64), columns, outputs, inputs, inputs, 1).to(tl.float32)
            factor = _load(a, columns, ranks, inputs, rank, 1, inputs)  # A^T
            # tf32 keeps 10 bits of float32's 23-bit mantissa: clear the other 13.
            high = (factor.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)
            wa = tl.dot(value, factor - high, wa, input_precision="tf32")
            wa = tl.dot(value, high, wa, input_precision="tf32")
        if SCALES:
            scales = tl.load(row + 5).to(tl.pointer_type(tl.float32))
            wa *= tl.load(scales + rows, mask=inside, other=0.0)[:, None] * (1.0 / 127.0)
        small = _load(b, rows, ranks, outputs, rank, rank, 1)
        gram = _load(grams + layer * rank * rank, ranks, ranks, rank, rank, rank, 1)
        change = (2.0 * s * wa + s * s * tl.dot(small, gram, input_precision="tf32x3")) * small
        base = tl.load(base_square + rows, mask=inside, other=1.0)
        # float32 resolves a sum down to 8 eps, 2^-20, of its terms. Its smallest normal number is 1.1755e-38.
        square = tl.maximum(base + tl.sum(change, axis=1), base * 9.5367431640625e-07)
        norm_rows = tl.sqrt(tl.maximum(square, 1.17549435e-38))
        mag_scale = tl.load(m + rows, mask=inside, other=0.0) / norm_rows
        tl.store(norms + start_row + rows, norm_rows, mask=inside)
        # A row of zeros has no direction: its output stays 0.
        tl.store(mag_scales + start_row + rows, tl.where(square > 1.17549435e-38, mag_scale, 0.0), mask=inside)


def row_norms(layers: list) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(norm, m / norm) of each layer, float32 (N,): norm = ||W + s B A|| per row, expanded as in dora.py.

    layers: kernels.NormInputs. The twin is dora.norm_and_scale. All layers share two launches, by a table of addresses,
    because one layer alone does not fill a GPU. Weights have one dtype, 16 bits or int8; a, b and m are float32 and
    contiguous, of one rank, at most LARGEST_RANK. tf32 matmuls keep float32's precision here: a weight has fewer bits
    than tf32, and the adapter is split into two terms. The norm is at least 1e-19 (m / norm is 0 there) and at least
    2^-10 of ||W||, since float32's terms resolve no smaller sum.
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
    block_r = padded_rank(rank)
    # BLOCK_K * BLOCK_R = 2048 float32 values of A at a time: 8 KiB.
    _grams_kernel[(len(layers),)](table, grams, rank, BLOCK_K=2048 // block_r, BLOCK_R=block_r, num_warps=4)
    kind = {torch.int8: tl.int8, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[first.weight.dtype]
    _row_norms_kernel[(triton.cdiv(max(sizes), 32), len(layers))](
        table, factors, grams, norms, mag_scales, rank,
        KIND=kind, BLOCK_N=32, BLOCK_K=128, BLOCK_R=block_r, SCALES=first.scales is not None, num_warps=4,
    )  # fmt: skip
    return list(zip(norms.split(sizes), mag_scales.split(sizes), strict=True))


# -- attention to shared prefixes --------------------------------------------------------------------------------------


@triton.jit
def _merge_attention_kernel(
    out, lse, part, part_lse, within, last, tokens, heads, width, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr
):
    """out = w out + (1 - w) part and lse = log(e^lse + e^part_lse), w = e^lse / (e^lse + e^part_lse), in place.

    out and part (T, H, D), lse and part_lse (H, T). One program per token; those outside of `within` do nothing.
    """
    token = tl.program_id(0).to(tl.int64)
    if (token >= tl.load(within)) & (token < tl.load(within + last)):
        head, column = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
        places = head * tokens.to(tl.int64) + token
        first = tl.load(lse + places, mask=head < heads, other=0.0)
        second = tl.load(part_lse + places, mask=head < heads, other=0.0)
        largest = tl.maximum(first, second)  # the exponentials' sum is then between 1 and 2
        first, second = tl.exp(first - largest), tl.exp(second - largest)
        total = first + second
        tl.debug_barrier()  # each warp loads all heads: none may store before the others have loaded
        tl.store(lse + places, largest + tl.log(total), mask=head < heads)
        rows = token * heads + head
        a = _load(out, rows, column, (token + 1) * heads, width, width, 1).to(tl.float32)
        b = _load(part, rows, column, (token + 1) * heads, width, width, 1).to(tl.float32)
        merged = a * (first / total)[:, None] + b * (second / total)[:, None]
        _store(out, rows, column, (token + 1) * heads, width, width, merged)


def merge_attention(
    out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor, within: torch.Tensor
) -> None:
    """kernels.merge_attention."""
    _refuse_strided(out, lse, part, part_lse)
    tokens, heads, width = out.shape
    _merge_attention_kernel[(tokens,)](
        out, lse, part, part_lse, within, len(within) - 1, tokens, heads, width,
        BLOCK_H=triton.next_power_of_2(heads), BLOCK_D=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip


def _refuse_strided(*tensors: torch.Tensor) -> None:
    """ValueError for tensors that a kernel writes in place, or would read at other places: no copy would do."""
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError("strides of a transposed tensor; call contiguous() before")


@triton.jit
def _add_rows_kernel(total, part, within, last, columns, BLOCK: tl.constexpr):
    """total += part, (T, columns), for the rows in `within`. One program per row and BLOCK columns."""
    row = tl.program_id(0).to(tl.int64)
    if (row >= tl.load(within)) & (row < tl.load(within + last)):
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        places, inside = row * columns + column, column < columns
        sums = tl.load(total + places, mask=inside).to(tl.float32) + tl.load(part + places, mask=inside).to(tl.float32)
        tl.store(total + places, sums.to(total.dtype.element_ty), mask=inside)


def add_rows(total: torch.Tensor, part: torch.Tensor, within: torch.Tensor) -> None:
    """kernels.add_rows."""
    _refuse_strided(total, part)
    tokens, columns = total.shape[0], total[0].numel()
    _add_rows_kernel[(tokens, triton.cdiv(columns, 1024))](
        total, part, within, len(within) - 1, columns, BLOCK=1024, num_warps=4
    )


@triton.jit
def _sum_copies_kernel(source, target, copies, key_edges, columns, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """sum = the gradient of a token's own key, and of its copies': (keys, columns) -> (T, columns).

    One program per token and BLOCK columns, which sums BLOCK_ROWS copies at a time.
    """
    token = tl.program_id(0).to(tl.int64)
    own, first = tl.load(copies + 4 * token).to(tl.int64), tl.load(copies + 4 * token + 1)
    count, place = tl.load(copies + 4 * token + 2), tl.load(copies + 4 * token + 3)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(source + own * columns + column, mask=column < columns, other=0.0).to(tl.float32)
    for start in range(0, count, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        rows = tl.load(key_edges + first + row, mask=row < count, other=0).to(tl.int64) + place
        inside = (row < count)[:, None] & (column < columns)[None, :]
        value = tl.load(source + rows[:, None] * columns + column[None, :], mask=inside, other=0.0)
        total += tl.sum(value.to(tl.float32), axis=0)
    tl.store(target + token * columns + column, total.to(target.dtype.element_ty), mask=column < columns)


def sum_copies(
    dk: torch.Tensor, dv: torch.Tensor, copies: torch.Tensor, key_edges: torch.Tensor, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """kernels.sum_copies."""
    sums = [x.new_empty(tokens, *x.shape[1:]) for x in (dk, dv)]
    for source, target in zip((dk, dv), sums, strict=True):
        columns = target[0].numel()
        _sum_copies_kernel[(tokens, triton.cdiv(columns, 512))](
            source.contiguous(), target, copies, key_edges, columns, BLOCK_ROWS=8, BLOCK=512, num_warps=4
        )
    return sums[0], sums[1]


# -- fp8 ---------------------------------------------------------------------------------------------------------------


@triton.jit
def _quantize_rows_kernel(x, factors, q, scales, columns, BLOCK: tl.constexpr, FACTORS: tl.constexpr):
    """q = x * factors / scale in e4m3, scale = max |x * factors| / 448 per row, 1 for a row of zeros.

    x and q (T, K), factors (K,), scales (T,). One program per row, which keeps it in registers from the search for its
    maximum to the division; BLOCK is K's next power of two.
    """
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    value = tl.load(x + row * columns + offsets, mask=offsets < columns, other=0.0).to(tl.float32)
    if FACTORS:
        value *= tl.load(factors + offsets, mask=offsets < columns, other=0.0)
    largest = tl.max(tl.abs(value), axis=0)
    scale = tl.where(largest == 0, 1.0, largest / 448.0)
    value = tl.minimum(tl.maximum(value / scale, -448.0), 448.0)
    tl.store(q + row * columns + offsets, value.to(q.dtype.element_ty), mask=offsets < columns)
    tl.store(scales + row, scale)


def quantize_rows(x: torch.Tensor, factors: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """kernels.quantize_rows."""
    x, (rows, columns) = x.contiguous(), x.shape
    q = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(columns)
    _quantize_rows_kernel[(rows,)](
        x, factors, q, scale, columns, BLOCK=block, FACTORS=factors is not None, num_warps=8 if block > 4096 else 4
    )
    return q, scale


@triton.jit
def _int8_to_fp8_kernel(weight, q, rows, columns, stride_n, stride_k, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """q = e4m3(weight): int8 (N, K) -> (N, K) by strides, which transpose it. One program per tile."""
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (n < rows)[:, None] & (k < columns)[None, :]
    value = _load(weight, n, k, rows, columns, columns, 1)
    value = value.to(tl.float32).to(q.dtype.element_ty)  # e4m3 casts are from floating-point numbers
    tl.store(q + n[:, None] * stride_n + k[None, :] * stride_k, value, mask=inside)


def int8_to_fp8(weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """kernels.int8_to_fp8."""
    weight, (rows, columns) = weight.contiguous(), weight.shape
    _int8_to_fp8_kernel[(triton.cdiv(rows, 64), triton.cdiv(columns, 128))](
        weight, out, rows, columns, *out.stride(), BLOCK_N=64, BLOCK_K=128, num_warps=4
    )
    return out
