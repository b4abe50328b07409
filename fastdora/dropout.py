"""Dropout whose mask is a hash of the element's index and of two numbers a call: nothing is stored.

The backward pass, gradient checkpointing, every device, torch and Triton draw the same mask. The mixing is the 32-bit
finalizer "lowbias32" of Chris Wellons' hash prospector (shifts 16, 15, 16).
"""

import torch

Seed = tuple[int, int] | torch.Tensor  # int64 (2,) on the GPU where a CUDA graph reads them


def keep_mask(seed: Seed, shape: tuple[int, int], p: float, device: torch.device) -> torch.Tensor:
    """The elements that dropout keeps, bool (T, K): the i-th where hash(i * seed[0] + seed[1]) >= p * 2^31."""
    low = 0xFFFFFFFF  # int64 arithmetic kept to 32 bits: torch has no uint32 multiplication on every device
    value = torch.arange(shape[0] * shape[1], dtype=torch.int64, device=device)
    value = (value * seed[0] + seed[1]) & low
    value = ((value ^ (value >> 16)) * 0x7FEB352D) & low
    value = ((value ^ (value >> 15)) * 0x846CA68B) & low
    value = (value ^ (value >> 16)) >> 1  # 31 bits: a threshold then fits Triton's signed int32 arguments
    return (value >= threshold(p)).view(shape)


def threshold(p: float) -> int:
    """The 31-bit hash from which on an element is kept."""
    return min(int(p * 2**31), 2**31 - 1)


def apply(x: torch.Tensor, p: float, seed: Seed) -> torch.Tensor:
    """x (T, K) with dropped elements 0 and kept ones divided by 1 - p."""
    return x * keep_mask(seed, x.shape, p, x.device) / (1 - p) if p else x


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
    # The multiplier is odd, so that it maps 2^32 consecutive indices to 2^32 different numbers.
    return first | 1, second
