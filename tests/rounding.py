"""How far floating-point results may lie apart: what the reference does when its own input moves by one rounding.

Two ways to the same numbers take their sums in different orders, and how far that carries depends on the processor, the
library and the sizes, so a constant bound is right for one machine. A test therefore asks the reference again on inputs
of which every value is the next number above or below (`nudged`), and allows FACTOR times the difference.
"""

import copy
from collections.abc import Callable

import torch
from torch import nn

# Two ways are apart by up to twice what one is off, and the largest of NUDGES draws falls short of the largest of all.
FACTOR, NUDGES = 4, 3


def nudged(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    """A copy with every value moved to the next number of its dtype, up or down at random; zeros stay zeros."""
    up = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    to = torch.where(up, torch.inf, -torch.inf).to(tensor.dtype)
    return torch.where(tensor == 0, tensor, torch.nextafter(tensor, to))


def nudged_model(model: nn.Module, seed: int) -> nn.Module:
    """A copy of which every value of every floating-point weight is off by one rounding."""
    model = copy.deepcopy(model)
    for number, weight in enumerate(model.parameters()):
        if weight.is_floating_point():
            weight.data = nudged(weight.data, 1000 * seed + number)
    return model


def shaken(differences: Callable[[int], dict[str, float]], dtype: torch.dtype, terms: float = 1) -> dict[str, float]:
    """FACTOR times the largest of each of `differences(seed)`, of a reference from itself nudged, over NUDGES seeds.

    All relative to the largest value of what is compared. A draw may happen to change nothing, so each is at least
    FACTOR times what a sum of `terms` terms in `dtype` may be off by.
    """
    draws = [differences(seed) for seed in range(NUDGES)]
    least = terms * torch.finfo(dtype).eps
    return {name: FACTOR * max(least, *(draw[name] for draw in draws)) for name in draws[0]}


def apart(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """The largest difference in each entry, relative to that entry's largest value."""
    assert actual.keys() == expected.keys()
    return {
        name: (
            (value.double() - expected[name].double()).abs().max() / expected[name].abs().max().clamp_min(1e-30)
        ).item()
        for name, value in actual.items()
        if value.numel()
    }


def beyond(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bounds: dict[str, float]) -> dict:
    """The entries that differ by more than their bound, each with its difference and the bound."""
    wrong = apart(actual, expected)
    assert wrong.keys() == bounds.keys()
    return {name: (error, bounds[name]) for name, error in wrong.items() if not error <= bounds[name]}
