"""The Triton kernels that fastdora/kernels.py launches; beside each launch is the same formula in torch.

Shapes: T tokens (`tokens`), K inputs, N outputs, R rank (at most BLOCK_R, padded with zeros). Matrices are row-major
unless strides are given, sums are float32. Arguments are pointers, sizes and constants, since a kernel takes nothing
else: hence the long lists. `parts` are partial sums, which the caller adds up in a fixed order (equal runs give equal
bits, which atomics would not). Offsets into the large operands are int64: T * K may exceed 2^31.
"""

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's builds for machines without a GPU may come without it
    triton = None

if triton is not None:

    @triton.jit
    def _keep(rows, columns, width, threshold, multiplier, offset):
        """Dropout's mask of a tile, as kernels.keep_mask: hash(index * multiplier + offset) >= threshold."""
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
        """t = scale * dropout(x) A^T: x (T, K), a (R, K) by strides -> t (T, R). One program per BLOCK_T rows."""
        if DROPOUT and READ:
            multiplier, offset = tl.load(seed).to(tl.uint32), tl.load(seed + 1).to(tl.uint32)
        rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
        ranks = tl.arange(0, BLOCK_R)
        row_starts = rows.to(tl.int64) * inputs
        total = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
        for start in range(0, inputs, BLOCK_K):
            columns = start + tl.arange(0, BLOCK_K)
            inside = (rows < tokens)[:, None] & (columns < inputs)[None, :]
            value = tl.load(x + row_starts[:, None] + columns[None, :], mask=inside, other=0.0)
            if DROPOUT:
                value = tl.where(_keep(rows, columns, inputs, threshold, multiplier, offset), value, 0.0)
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
        """parts[split] = scale * dt^T dropout(x), over `share` tokens; with INTO_X dx += dropout(dt A) * scale.

        dt (T, R), x and dx (T, K), a (R, K) by strides; parts (SPLITS, R, K) float32. scale is dropout's 1 / (1 - p).
        One program per BLOCK_K columns and split, so that x is read once for both results.
        """
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
            offsets = rows.to(tl.int64)[:, None] * inputs + columns[None, :]
            inside = (rows < end)[:, None] & (columns < inputs)[None, :]
            small = tl.load(
                dt + rows[:, None] * rank + ranks[None, :],
                mask=(rows < end)[:, None] & (ranks < rank)[None, :],
                other=0.0,
            )
            value = tl.load(x + offsets, mask=inside, other=0.0)
            if DROPOUT:
                keep = _keep(rows, columns, inputs, threshold, multiplier, offset)
                value = tl.where(keep, value, 0.0)
            total = tl.dot(tl.trans(small), value, total)
            if INTO_X:
                added = tl.dot(small, factor.to(small.dtype)) * scale
                if DROPOUT:
                    added = tl.where(keep, added, 0.0)
                before = tl.load(dx + offsets, mask=inside, other=0.0)
                tl.store(dx + offsets, (before + added).to(dx.dtype.element_ty), mask=inside)
        out = parts + (split * rank + ranks[:, None]) * inputs + columns[None, :]
        tl.store(out, total * scale, mask=within)

    @triton.jit
    def _epilogue_kernel(
        base, t, b, mag_scale, bias, y, tokens, outputs, rank, s,
        BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, DORA: tl.constexpr, BIAS: tl.constexpr,
    ):  # fmt: skip
        """y = mag_scale * (base + s t B^T) + bias: base and y (T, N), t (T, R), b (N, R), mag_scale and bias (N,).

        Without DORA mag_scale is not read and y may be base itself.
        """
        rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
        columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        ranks = tl.arange(0, BLOCK_R)
        inside = (rows < tokens)[:, None] & (columns < outputs)[None, :]
        offsets = rows.to(tl.int64)[:, None] * outputs + columns[None, :]
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
        value = tl.load(base + offsets, mask=inside, other=0.0) + s * tl.dot(small, factor.to(small.dtype))
        if DORA:
            value *= tl.load(mag_scale + columns, mask=columns < outputs, other=0.0).to(tl.float32)[None, :]
        if BIAS:
            value += tl.load(bias + columns, mask=columns < outputs, other=0.0).to(tl.float32)[None, :]
        tl.store(y + offsets, value.to(y.dtype.element_ty), mask=inside)

    @triton.jit
    def _epilogue_backward_kernel(
        dy, base, t, b, mag_scale, norm, dz, parts, tokens, outputs, rank, share, size, s,
        BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, DORA: tl.constexpr,
    ):  # fmt: skip
        """dz = mag_scale * dy, dB = s dz^T t and dm = sum_T(dy * z) / norm, with z = base + s t B^T.

        dy, base and dz (T, N), t (T, R), b (N, R), mag_scale and norm (N,); parts[split]: dB (N, R), then dm (N,), over
        `share` tokens. Without DORA dz is dy and only dB is computed. One program per BLOCK_N columns and split.
        """
        columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        split = tl.program_id(1)
        ranks = tl.arange(0, BLOCK_R)
        total = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
        if DORA:
            factor = tl.load(
                b + columns[None, :] * rank + ranks[:, None],
                mask=(ranks < rank)[:, None] & (columns < outputs)[None, :],
                other=0.0,
            )
            mag_scales = tl.load(mag_scale + columns, mask=columns < outputs, other=0.0).to(tl.float32)
            total_dm = tl.zeros((BLOCK_N,), dtype=tl.float32)
        end = tl.minimum((split + 1) * share, tokens)
        for start in range(split * share, end, BLOCK_T):
            rows = start + tl.arange(0, BLOCK_T)
            offsets = rows.to(tl.int64)[:, None] * outputs + columns[None, :]
            inside = (rows < end)[:, None] & (columns < outputs)[None, :]
            small = tl.load(
                t + rows[:, None] * rank + ranks[None, :],
                mask=(rows < end)[:, None] & (ranks < rank)[None, :],
                other=0.0,
            )
            value = tl.load(dy + offsets, mask=inside, other=0.0)
            if DORA:
                z = tl.load(base + offsets, mask=inside, other=0.0) + s * tl.dot(small, factor.to(small.dtype))
                total_dm += tl.sum(value.to(tl.float32) * z, axis=0)
                value = (value.to(tl.float32) * mag_scales[None, :]).to(dz.dtype.element_ty)
                tl.store(dz + offsets, value, mask=inside)
            total = tl.dot(tl.trans(value), small, total)
        own = parts + split * size
        tl.store(
            own + columns[:, None] * rank + ranks[None, :],
            total * s,
            mask=(columns < outputs)[:, None] & (ranks < rank)[None, :],
        )
        if DORA:
            norms = tl.load(norm + columns, mask=columns < outputs, other=1.0).to(tl.float32)
            tl.store(own + outputs * rank + columns, total_dm / norms, mask=columns < outputs)

    @triton.jit
    def _dequantize_int8_kernel(weight, scales, out, columns, BLOCK: tl.constexpr):
        """out[n, k] = weight[n, k] * scales[n] / 127: int8 (N, K), float32 (N,) -> (N, K)."""
        row = tl.program_id(0).to(tl.int64)
        offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(weight + row * columns + offsets, mask=offsets < columns, other=0)
        scale = tl.load(scales + row).to(tl.float32) * (1.0 / 127.0)
        tl.store(
            out + row * columns + offsets,
            (value.to(tl.float32) * scale).to(out.dtype.element_ty),
            mask=offsets < columns,
        )

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
        block = offsets * 2 // SIZE
        scale = tl.load(scales + block, mask=inside, other=0)
        if NESTED:
            scale2 = tl.load(scales2 + block // SIZE2, mask=inside, other=0.0)
            scale = tl.load(code2 + scale.to(tl.int32), mask=inside, other=0.0) * scale2 + tl.load(offset)
        high = tl.load(code + (byte >> 4), mask=inside, other=0.0) * scale
        low = tl.load(code + (byte & 15), mask=inside, other=0.0) * scale
        both = tl.program_id(0) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
        tl.store(out + both, tl.interleave(high, low).to(out.dtype.element_ty), mask=both < count)

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
        if tl.program_id(0) * BLOCK_N < outputs:
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
                # tf32 keeps 10 bits of float32's 23-bit mantissa: clear the other 13.
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
            # float32 resolves a sum down to 8 eps, 2^-20, of its terms. Its smallest normal number is 1.1755e-38.
            square = tl.maximum(base + tl.sum(change, axis=1), base * 9.5367431640625e-07)
            norm_rows = tl.sqrt(tl.maximum(square, 1.17549435e-38))
            mag_scale = tl.load(m + rows, mask=inside, other=0.0) / norm_rows
            tl.store(norms + start_row + rows, norm_rows, mask=inside)
            tl.store(mag_scales + start_row + rows, tl.where(square > 1.17549435e-38, mag_scale, 0.0), mask=inside)

    @triton.jit
    def _quantize_rows_kernel(x, factors, q, scales, columns, BLOCK: tl.constexpr, FACTORS: tl.constexpr):
        """q = x * factors / scale in e4m3, scale = max |x * factors| / 448 per row, 1 for a row of zeros.

        x and q (T, K), factors (K,), scales (T,). One program per row; BLOCK is K's next power of two.
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

    @triton.jit
    def _int8_to_fp8_kernel(weight, q, rows, columns, stride_n, stride_k, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
        """q = e4m3(weight): int8 (N, K) -> (N, K) by strides, which transpose it. One program per tile."""
        n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = (n < rows)[:, None] & (k < columns)[None, :]
        value = tl.load(weight + n[:, None] * columns + k[None, :], mask=inside, other=0)
        tl.store(
            q + n[:, None] * stride_n + k[None, :] * stride_k,
            value.to(tl.float32).to(q.dtype.element_ty),
            mask=inside,
        )
