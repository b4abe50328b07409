"""The Triton kernels of fastdora/kernels.py, which has the same formulas in torch and launches these."""

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's builds for machines without a GPU may come without it
    triton = None

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
