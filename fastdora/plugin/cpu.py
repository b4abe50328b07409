"""What a CPU computes in: bfloat16 where its matmuls are much faster (AMX, AVX-512 BF16), else float32.

Processors without such instructions multiply bfloat16 a hundred times slower than float32, so it is measured.
"""

import time
from functools import cache

import torch

SECONDS = 0.1  # of each measurement; more where a single matmul takes longer
# bfloat16 must be this much faster: the choice is then the same in every run, and worth its rounding.
FASTER = 2
SMALLEST = 512  # hidden size: what surrounds the matmuls of a smaller model takes longer than they do


@cache
def matmul_rates() -> dict[torch.dtype, float]:
    """FLOP/s of this process's threads in a matmul as a small model has them: the best of a few."""
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(512, 512, dtype=dtype), torch.ones(512, 1024, dtype=dtype)
        times, began = [], None
        while began is None or time.perf_counter() - began < SECONDS:
            start = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - start)
            began = began or time.perf_counter()  # the first one starts the threads
        rates[dtype] = 2 * 512 * 512 * 1024 / min(times)
    return rates


def best_dtype(hidden_size: int) -> torch.dtype:
    """For a model of this width."""
    if hidden_size < SMALLEST:
        return torch.float32
    rates = matmul_rates()
    return torch.bfloat16 if rates[torch.bfloat16] >= FASTER * rates[torch.float32] else torch.float32
