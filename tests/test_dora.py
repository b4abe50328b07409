"""fastdora's layers against PEFT's own, the explicit formula, and themselves after every kind of change."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes as bnb
import peft
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from rounding import FACTOR, apart, beyond, nudged, nudged_model, shaken
from torch import nn

from fastdora import dora, dropout, kernels, quantized
from fastdora.plugin import peft_int8

peft_int8.patch()
ROOT = Path(__file__).resolve().parent.parent


class Net(nn.Module):
    def __init__(self, inputs: int, outputs: int, bias: bool):
        super().__init__()
        self.one = nn.Linear(inputs, outputs, bias=bias)

    def forward(self, x):
        return self.one(x)


def quantised(net: Net, bits: int) -> Net:
    if bits == 8:
        layer = bnb.nn.Linear8bitLt(net.one.in_features, net.one.out_features, net.one.bias is not None, False)
    elif bits == 4:
        layer = bnb.nn.Linear4bit(net.one.in_features, net.one.out_features, net.one.bias is not None, torch.float32)
    if bits != 16:
        layer.load_state_dict(net.one.state_dict())
        net.one = layer.to("cpu")
    net.is_loaded_in_8bit, net.is_loaded_in_4bit = bits == 8, bits == 4
    return net


def adapted(net: nn.Module, *, r=8, alpha=16, dora=True, rslora=False, dropout=0.0, spread=0.3, seed=0) -> PeftModel:
    """The net with an adapter whose B and m have moved away from where they start."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=r, lora_alpha=alpha, use_dora=dora, use_rslora=rslora, lora_dropout=dropout, target_modules=["one"]
    )
    model = get_peft_model(net, config, autocast_adapter_dtype=False)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=spread)
        elif "magnitude" in name:
            weight.data *= 1 + 0.1 * torch.randn_like(weight)
    return model


def fast(model: PeftModel) -> PeftModel:
    model = copy.deepcopy(model)
    dora.accelerate(model)
    return model


def layer(model: PeftModel):
    return next(module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer))


def run(model: nn.Module, x: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and every gradient of sum(output * weights)."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    (y * weights).sum().backward()
    actual = {"y": y.detach(), "x": x.grad}
    return actual | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def worst(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest difference of any entry, relative to that entry's largest value."""
    return max(apart(actual, expected).values(), default=0.0)


def norms_condition(model: nn.Module) -> float:
    """How much a float64 norm magnifies rounding: the terms of its sum of squares against the sum, in the worst row."""
    module = next((module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)), None)
    if module is None or not module.use_dora[module.active_adapters[0]]:
        return 1.0
    name = module.active_adapters[0]
    base = quantized.dequantize(module.base_layer, torch.float64).detach()
    adapter = (
        module.scaling[name] * (module.lora_B[name].weight.double() @ module.lora_A[name].weight.double()).detach()
    )
    terms, sums = base.norm(dim=1) + adapter.norm(dim=1), (base + adapter).norm(dim=1)
    return max(1.0, *((terms / sums)[sums > 0] ** 2).tolist())


def by_rounding(
    model: nn.Module, x: torch.Tensor, weights: torch.Tensor, exactly: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """What `run` of this model gives (in float64 if `exactly`), and how far another way in its dtype may be off."""

    def reference(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
        if exactly:
            return run(copy.deepcopy(model).double(), x.double(), weights.double())
        return run(model, x, weights)

    expected = reference(model, x)
    terms = max(x[..., 0].numel(), *(size for weight in model.parameters() for size in weight.shape))
    terms *= 1 if exactly else norms_condition(model)
    differences = lambda seed: apart(reference(nudged_model(model, seed), nudged(x, seed)), expected)  # noqa: E731
    return expected, shaken(differences, x.dtype, terms)


def beyond_rounding(model: nn.Module, reference: nn.Module, x: torch.Tensor) -> dict:
    """Outputs of the model that are further from the reference's than rounding explains."""
    with torch.no_grad():
        expected = {"y": reference(x)}
        differences = lambda seed: apart({"y": nudged_model(reference, seed)(nudged(x, seed))}, expected)  # noqa: E731
        return beyond({"y": model(x)}, expected, shaken(differences, x.dtype, x.shape[-1] * norms_condition(reference)))


def explicit_norm(module, name="default") -> torch.Tensor:
    """||W0 + s B A|| per row in float64, built in full."""
    base = quantized.dequantize(module.base_layer, torch.float64)
    a, b = module.lora_A[name].weight.double(), module.lora_B[name].weight.double()
    return (base + module.scaling[name] * b @ a).norm(dim=1)


@given(
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    r=st.sampled_from([1, 2, 8, 33, 256]),
    alpha=st.sampled_from([1, 16, 512]),
    method=st.sampled_from(["dora", "lora", "rslora"]),
    bias=st.booleans(),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    shape=st.sampled_from([(3,), (2, 5), (1, 1), (0, 4), (2, 2, 3)]),
    strided=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_float64_equals_peft(sizes, r, alpha, method, bias, scale, shape, strided, seed):
    torch.manual_seed(seed)
    net = Net(*sizes, bias).double()
    for weight in net.parameters():  # the bias too: PEFT subtracts it from the output, losing what is far smaller
        weight.data *= scale
    model = adapted(net, r=r, alpha=alpha, dora=method == "dora", rslora=method == "rslora", seed=seed)
    layer(model).lora_B["default"].weight.data *= scale  # else one of the two terms says nothing
    x = torch.randn(*shape, sizes[0], dtype=torch.float64)
    if strided:
        x = torch.randn(*shape, 2 * sizes[0], dtype=torch.float64)[..., ::2]
    weights = torch.randn(*shape, sizes[1], dtype=torch.float64)
    assert not beyond(run(fast(model), x, weights), *by_rounding(model, x, weights))


SETTINGS = dict(
    r=st.sampled_from([1, 2, 8, 33, 256]),
    alpha=st.sampled_from([1, 16, 512]),
    method=st.sampled_from(["dora", "lora", "rslora"]),
    scale=st.sampled_from([1e-6, 1e-2, 1.0, 1e6]),
    sizes=st.tuples(st.integers(8, 160), st.integers(8, 160)),
    seed=st.integers(0, 2**16),
)


def in_proportion(r: int, alpha: int, method: str, scale: float, sizes: tuple[int, int], seed: int) -> PeftModel:
    """A layer of weights of this scale, and an adapter half as large: neither hides the other's rounding."""
    torch.manual_seed(seed)
    net = Net(*sizes, True)
    for weight in net.parameters():
        weight.data *= scale
    model = adapted(net, r=r, alpha=alpha, dora=method == "dora", rslora=method == "rslora", seed=seed)
    module = layer(model)
    a, b = module.lora_A["default"].weight.data, module.lora_B["default"].weight.data
    b *= 0.5 * module.base_layer.weight.norm() / (module.scaling["default"] * b @ a).norm()
    return model


@given(**SETTINGS)
@settings(max_examples=10)
def test_float32_is_within_rounding(r, alpha, method, scale, sizes, seed):
    model = in_proportion(r, alpha, method, scale, sizes, seed)
    x, weights = torch.randn(64, sizes[0]), torch.randn(64, sizes[1])
    assert not beyond(run(fast(model), x, weights), *by_rounding(model, x, weights, exactly=True))


@given(**SETTINGS | dict(sizes=st.tuples(st.integers(64, 160), st.integers(64, 160))), mixed=st.booleans())
@settings(max_examples=4)
def test_bfloat16_is_no_worse_than_pefts(r, alpha, method, scale, sizes, seed, mixed):
    """The same weights and inputs in bfloat16, both against float64: ten draws, and three times their standard error.

    mixed: adapters in float32 and autocast, as in training; else adapters in bfloat16 too.
    """
    theirs, ours = [], []
    for draw in range(10):
        model = in_proportion(r, alpha, method, scale, sizes, seed + draw)
        (layer(model).base_layer if mixed else model).bfloat16()
        x, weights = torch.randn(64, sizes[0]).bfloat16(), torch.randn(64, sizes[1]).bfloat16()
        exact = run(copy.deepcopy(model).double(), x.double(), weights.double())
        with torch.autocast("cpu", torch.bfloat16, mixed):
            actual, peft_found = run(fast(model), x, weights), run(model, x, weights)
        rms = lambda a, e: ((a.double() - e).norm() / e.norm()).item()  # noqa: E731
        ours.append([rms(actual[key], exact[key]) for key in exact])
        theirs.append([rms(peft_found[key], exact[key]) for key in exact])
    worse = torch.tensor(ours) / torch.tensor(theirs)
    assert (worse.mean(0) <= 1.02 + 3 * worse.std(0) / 10**0.5).all()


def test_autocast_keeps_activations_in_16_bits():
    model = fast(adapted(Net(32, 32, True)))
    kinds = []
    layer(model).register_forward_hook(lambda module, args, out: kinds.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(4, 32)).sum()
    loss.backward()
    assert kinds == [torch.bfloat16]
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(grads) == 3 and all(grad.dtype == torch.float32 and grad.abs().max() > 0 for grad in grads)


SHAPES = st.sampled_from([(10,), (2, 5), (1, 1), (0, 4), (2, 2, 3)])


def drawn(shape: tuple[int, ...], width: int, strided: bool) -> torch.Tensor:
    return torch.randn(*shape, 2 * width)[..., ::2] if strided else torch.randn(*shape, width)


@given(
    bits=st.sampled_from([8, 4]),
    method=st.sampled_from(["dora", "lora", "rslora"]),
    r=st.sampled_from([1, 8, 256]),
    alpha=st.sampled_from([1, 16, 512]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    bias=st.booleans(),
    shape=SHAPES,
    strided=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=10)
def test_quantised_bases_are_their_dequantized_weight(bits, method, r, alpha, scale, bias, shape, strided, seed):
    """Against PEFT in float64 on a plain layer with the dequantized weight: forward, and backward through it."""
    torch.manual_seed(seed)
    net = Net(64, 48, bias)
    for weight in net.parameters():
        weight.data *= scale
    how = dict(r=r, alpha=alpha, dora=method == "dora", rslora=method == "rslora")
    model = adapted(quantised(net, bits), spread=0.1 * scale, **how)
    module = layer(model)
    plain = Net(64, 48, bias)
    plain.one.weight.data = quantized.dequantize(module.base_layer, torch.float32)
    if bias:
        plain.one.bias.data = module.base_layer.bias.data
    exact = adapted(plain, **how)
    exact.load_state_dict({k: v for k, v in model.state_dict().items() if "lora" in k}, strict=False)
    x, weights = drawn(shape, 64, strided), drawn(shape, 48, strided)
    assert not beyond(run(fast(model), x, weights), *by_rounding(exact, x, weights, exactly=True))


@given(bits=st.sampled_from([8, 4]), bias=st.booleans(), shape=SHAPES, strided=st.booleans())
def test_a_frozen_quantised_layer_multiplies_its_dequantized_weight(bits, bias, shape, strided):
    torch.manual_seed(0)
    net = quantised(Net(64, 48, bias), bits)
    dora.accelerate(net)
    x, weights = drawn(shape, 64, strided), drawn(shape, 48, strided)
    exact = Net(64, 48, bias)
    exact.one.weight.data = quantized.dequantize(net.one, torch.float32)
    if bias:
        exact.one.bias.data = net.one.bias.data
    exact.requires_grad_(False)
    for parameter in net.parameters():
        parameter.requires_grad = False
    assert not beyond(run(net, x, weights), *by_rounding(exact, x, weights, exactly=True))


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("magnitude", [0.0, 1.0])
def test_a_zero_row_stays_finite(bits, magnitude):
    """PEFT divides by a norm of zero there; elsewhere both agree."""
    net = Net(64, 6, True)
    net.one.weight.data[2] = 0
    model = adapted(quantised(net, bits))
    layer(model).lora_B["default"].weight.data[2] = 0
    layer(model).lora_magnitude_vector["default"].weight.data[2] = magnitude
    x, weights = torch.randn(4, 64), torch.randn(4, 6)
    actual = run(fast(model), x, weights)
    assert all(value.isfinite().all() and value.abs().max() < 1e4 for value in actual.values())
    assert torch.equal(actual["y"][:, 2], layer(model).base_layer.bias[2].expand(4))
    with torch.autocast("cpu", torch.float16):
        assert fast(model)(x).isfinite().all()
    others = [0, 1, 3, 4, 5]

    def explicit(model, x):
        module, x = layer(model), x.double()
        a, b = (getattr(module, f"lora_{part}")["default"].weight.double() for part in "AB")
        z = (
            x @ quantized.dequantize(module.base_layer, torch.float64).t()
            + module.scaling["default"] * (x @ a.t()) @ b.t()
        )
        m = module.lora_magnitude_vector["default"].weight.double()
        y = m[others] / explicit_norm(module)[others] * z[:, others] + module.base_layer.bias[others].double()
        return {"y": y.detach()}

    expected = explicit(model, x)
    bounds = shaken(lambda seed: apart(explicit(nudged_model(model, seed), nudged(x, seed)), expected), x.dtype, 64)
    assert not beyond({"y": actual["y"][:, others]}, expected, bounds)


@pytest.mark.parametrize("left", [1e-1, 1e-2, 1e-3, 1e-5])
def test_a_norm_that_nearly_cancels_is_within_rounding(left):
    """W0 + s B A is `left` of W0: the terms of the factored norm are far larger than their sum."""
    model = adapted(Net(32, 16, False), r=4, alpha=8)
    module = layer(model)
    torch.manual_seed(8)
    u, s, v = torch.linalg.svd(torch.randn(16, 4) @ torch.randn(4, 32), full_matrices=False)
    module.base_layer.weight.data = u[:, :4] * s[:4] @ v[:4]
    module.lora_A["default"].weight.data = v[:4].contiguous()
    module.lora_B["default"].weight.data = (left - 1) * u[:, :4] * s[:4] / module.scaling["default"]
    x, weights = torch.randn(8, 32), torch.randn(8, 16)
    assert not beyond(run(fast(model), x, weights), *by_rounding(model, x, weights, exactly=True))


@pytest.mark.parametrize("scale", [1e-25, 1e-20, 1e-10, 1e10, 1e18])
def test_tiny_and_huge_weights_in_float32(scale):
    model = adapted(Net(24, 12, False))
    magnitude = layer(model).lora_magnitude_vector["default"].weight  # far from ||W0||, PEFT itself cancels
    for weight in (layer(model).base_layer.weight, layer(model).lora_B["default"].weight, magnitude):
        weight.data *= scale
    x, weights = torch.randn(6, 24), torch.randn(6, 12)
    assert not beyond(run(fast(model), x, weights), *by_rounding(model, x, weights, exactly=True))


def test_a_weight_that_its_adapter_takes_away_stays_bounded():
    """W0 + s B A is zero but for rounding: no direction is left, and nothing may explode."""
    model = adapted(Net(8, 8, False), r=8, alpha=8)
    module = layer(model)
    module.lora_A["default"].weight.data = torch.eye(8)
    module.lora_B["default"].weight.data = -module.base_layer.weight.data.clone()
    for dtype in (torch.float32, torch.float64):
        actual = run(fast(model).to(dtype), torch.randn(4, 8, dtype=dtype), torch.randn(4, 8, dtype=dtype))
        assert all(value.isfinite().all() and value.abs().max() < 1e9 for value in actual.values())


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01),
    "AdamW fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
    "SGD": lambda p: torch.optim.SGD(p, 0.05),
    "bitsandbytes AdamW8bit": lambda p: bnb.optim.AdamW8bit(p, 0.01, min_8bit_size=1),
    "bitsandbytes PagedAdamW8bit": lambda p: bnb.optim.PagedAdamW8bit(p, 0.01, min_8bit_size=1),
}


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_norm_in_use_is_the_norm_of_this_moment(name, bits):
    """At each of 20 steps, under each optimizer: some of them change weights without moving a version counter."""
    torch.manual_seed(1)
    model = fast(adapted(quantised(Net(64, 32, False), bits), spread=0.05))
    optimizer = OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad])
    x, target = torch.randn(16, 64), torch.randn(16, 32)
    first = last = None
    for _ in range(20):
        ((model(x) - target) ** 2).mean().backward()
        used = layer(model).cached_norm("default")
        exact = explicit_norm(layer(model))
        mag_scale = layer(model).lora_magnitude_vector["default"].weight / exact
        for value, reference in (
            (used.norm, exact),
            (used.mag_scale, mag_scale),
        ):  # from float64, of weights rounded at most once
            assert ((value - reference).abs() / reference).max() < FACTOR * torch.finfo(torch.float32).eps
        first, last = used.norm if first is None else first, used.norm
        optimizer.step()
        optimizer.zero_grad()
    assert ((last - first).abs() / first).max() > 1e-3  # and it did move


@given(**SETTINGS | dict(sizes=st.tuples(st.integers(8, 32), st.integers(1, 32))), zero=st.booleans())
@settings(max_examples=6)
@example(r=8, alpha=16, method="dora", scale=1.0, sizes=(24, 16), seed=0, zero=False)
@example(r=1, alpha=1, method="dora", scale=1e6, sizes=(8, 1), seed=1, zero=False)
@example(r=1, alpha=1, method="dora", scale=1e6, sizes=(8, 1), seed=19, zero=False)
@example(r=2, alpha=1, method="dora", scale=1e6, sizes=(9, 2), seed=30546, zero=False)
def test_many_steps_keep_to_peft(r, alpha, method, scale, sizes, seed, zero):
    """100 steps of AdamW in float64 from the same start: outputs and adapters stay as near as PEFT's own do, nudged.

    Nudged at the start and, in its inputs, at each step, since each step rounds anew.

    AdamW divides a gradient by its own size, so where one is all but zero (with a single output row, say) rounding
    decides which way a weight goes, and PEFT leaves itself by 1e-8 in the second example, where most draws keep to
    1e-15. zero: a row of the base is zeros, and its adapter is not.
    """
    base = in_proportion(r, alpha, method, scale, sizes, seed).double()
    if zero:
        layer(base).base_layer.weight.data[0] = 0
    x = torch.randn(32, sizes[0], dtype=torch.float64)
    target = scale * torch.randn(32, sizes[1], dtype=torch.float64)

    conditions = [norms_condition(base)]

    def trained(model, nudge=None):
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], 0.01 * min(scale, 1), eps=1e-30
        )
        for step in range(100):
            optimizer.zero_grad()
            moved = x if nudge is None else nudged(x, 1000 * nudge + step)
            (((model(moved) - target) / scale) ** 2).mean().backward()
            optimizer.step()
            conditions.append(1.0 if nudge is None else norms_condition(model))
        return {"y": model(x).detach(), **{name: p.detach() for name, p in model.named_parameters()}}

    expected = trained(copy.deepcopy(base))
    differences = lambda seed: apart(trained(nudged_model(base, seed), seed), expected)  # noqa: E731
    bounds = shaken(differences, x.dtype)
    # What the layers' way of taking a norm may lose, in the step in which the adapter takes most of a row away.
    least = FACTOR * max(32, r) * max(conditions) * torch.finfo(x.dtype).eps
    bounds = {name: max(bound, least) for name, bound in bounds.items()}
    assert not beyond(trained(fast(base)), expected, bounds)
    start = dict(base.named_parameters())
    assert any(worst({name: expected[name]}, {name: p}) > 1e-3 for name, p in start.items() if "lora" in name)


def test_norms_are_computed_once_a_step(monkeypatch):
    """Not once a micro-batch, and not again under gradient checkpointing."""
    model = fast(adapted(Net(16, 16, False)))
    model.train()
    calls = []
    original = dora.norm_and_scale
    monkeypatch.setattr(dora, "norm_and_scale", lambda *args: calls.append(1) or original(*args))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01, fused=True)
    for _ in range(3):
        for _ in range(4):
            model.train()  # as transformers' Trainer does
            x = torch.randn(8, 16, requires_grad=True)
            torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).sum().backward()
        optimizer.step()
    assert len(calls) == 3


def changed_adapter(model, factor):
    return {key: value * factor for key, value in model.state_dict().items() if "lora_" in key}


CHANGES = {
    "load": lambda m: m.load_state_dict(changed_adapter(m, 1.5), strict=False),
    "resume": lambda m: peft.set_peft_model_state_dict(
        m, {k: v * 1.5 for k, v in peft.get_peft_model_state_dict(m).items()}
    ),
    "scale": lambda m: layer(m).set_scale("default", 3.0),
    "cast": lambda m: m.float(),
    "cast and back": lambda m: m.bfloat16().double(),
    "merge and unmerge": lambda m: (m.merge_adapter(), m.unmerge_adapter()),
    "another adapter": lambda m: (
        m.add_adapter("second", LoraConfig(r=4, lora_alpha=4, use_dora=True, target_modules=["one"])),
        nn.init.normal_(layer(m).lora_B["second"].weight),
        m.set_adapter("second"),
        m.double(),
    ),
    "there and back": lambda m: (
        m.add_adapter("second", LoraConfig(r=4, lora_alpha=4, use_dora=True, target_modules=["one"])),
        m.set_adapter("second"),
        m.double(),
        m(torch.randn(2, 12, dtype=torch.float64)),
        m.set_adapter("default"),
    ),
    "the same name anew": lambda m: (
        m.delete_adapter("default"),
        m.add_adapter("default", LoraConfig(r=4, lora_alpha=4, use_dora=True, target_modules=["one"])),
        m.set_adapter("default"),
        nn.init.normal_(layer(m).lora_B["default"].weight),
        m.double(),
    ),
    "evaluation after an edit by hand": lambda m: (
        layer(m).lora_B["default"].weight.data.mul_(2),
        m.train(not m.training),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_norms_follow_every_change(change):
    base = adapted(Net(12, 6, True).double())
    model = fast(base)
    x = torch.randn(4, 12, dtype=torch.float64)
    before = model(x)
    for each in (base, model):
        torch.manual_seed(7)
        CHANGES[change](each)
    x = x.to(layer(model).lora_A[model.active_adapter].weight.dtype)
    assert not beyond_rounding(model, base, x)
    if change not in ("cast", "merge and unmerge", "there and back"):
        assert not torch.allclose(model(x).double(), before, atol=1e-4)


def test_merged_disabled_and_several_adapters_are_pefts():
    base = adapted(Net(12, 6, True).double())
    model = fast(base)
    x = torch.randn(4, 12, dtype=torch.float64)
    with model.disable_adapter(), base.disable_adapter():
        assert torch.equal(model(x), base(x))
    unmerged = model(x)
    merged = copy.deepcopy(model)
    merged.merge_adapter()
    assert not beyond_rounding(merged, base, x)
    model.merge_adapter()
    model.unmerge_adapter()
    assert not beyond_rounding(model, base, x)
    for each in (base, model):
        torch.manual_seed(2)
        each.add_adapter("second", LoraConfig(r=4, use_dora=True, target_modules=["one"]))
        nn.init.normal_(layer(each).lora_B["second"].weight)
        each.double()
        each.base_model.set_adapter(["default", "second"])
    assert not beyond_rounding(model, base, x)
    assert not torch.allclose(model(x), unmerged, atol=1e-3)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_merging_equals_the_unmerged_layer(bits):
    """On quantised bases PEFT quantises what it merges, so the bound is that of the base's own rounding."""
    torch.manual_seed(5)
    peft_model = adapted(quantised(Net(64, 48, False), bits), spread=0.1)
    model, x = fast(peft_model), torch.randn(16, 64)
    unmerged = model(x).detach()
    module = layer(model)
    m = module.lora_magnitude_vector["default"].weight.detach().double()
    a, b = (getattr(module, f"lora_{part}")["default"].weight.detach().double() for part in "AB")
    weight = quantized.dequantize(module.base_layer, torch.float64) + module.scaling["default"] * b @ a
    weight *= (m / weight.norm(dim=1)).unsqueeze(1)
    model.merge_adapter()
    if bits == 16:
        plain = Net(64, 48, False)
        plain.one.weight.data = weight.float()
        assert not beyond_rounding(model, plain, x)
        assert not beyond_rounding(fast(peft_model), plain, x)
        return
    rounded = Net(64, 48, False)
    rounded.one.weight.data = weight.float()
    rounded = quantized.dequantize(quantised(rounded, bits).one, torch.float64)
    loss = (x.double() @ (rounded - weight).t()).norm()
    assert 0 < (model(x).double() - unmerged).norm() < 1.5 * loss < 0.3 * unmerged.norm()


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_adapters_are_plain_peft_files(bits, tmp_path):
    """Saved here and loaded in PEFT without us, and the reverse: equal outputs."""
    torch.manual_seed(4)
    base = Net(64, 48, True)
    model = fast(adapted(quantised(copy.deepcopy(base), bits)))
    model.save_pretrained(tmp_path / "ours")
    x = torch.randn(8, 64)
    plain = PeftModel.from_pretrained(quantised(copy.deepcopy(base), bits), tmp_path / "ours").eval()
    exact = fast(plain).eval()(x).detach()
    assert torch.equal(model.eval()(x), exact)
    if bits == 8:
        # bitsandbytes rounds each row of x to 8 bits too, and its sums saturate on processors without VNNI: PEFT's
        # output is as far off as its own base layer's.
        frozen = layer(plain).base_layer
        matmul = x.double() @ quantized.dequantize(frozen, torch.float64).t() + frozen.bias.double()
        lost = (frozen(x) - matmul).norm() / matmul.norm()
        assert (plain(x) - exact).norm() / exact.norm() < FACTOR * lost
    else:
        assert not beyond_rounding(fast(plain), plain, x)
    assert type(layer(plain)) in dora.FAST_CLASSES
    plain.save_pretrained(tmp_path / "theirs")
    back = fast(PeftModel.from_pretrained(quantised(copy.deepcopy(base), bits), tmp_path / "theirs")).eval()
    assert torch.equal(back(x), exact)


@given(p=st.floats(0.01, 0.9), seed=st.integers(0, 2**31), shape=st.tuples(st.integers(1, 40), st.integers(1, 60)))
def test_dropout_touches_the_low_rank_path_only(p, seed, shape):
    """With its mask known, the layer is the formula of the module's docstring, in value and gradient."""
    model = fast(adapted(Net(shape[1], 7, True).double(), dropout=p)).train()
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(seed)
    y = model(x)
    torch.manual_seed(seed)
    mask = dropout.keep_mask(dropout.draw_seed(), shape, p, x.device)
    weights = torch.randn_like(y)

    def inputs(model, x):
        module = layer(model)
        magnitude = module.lora_magnitude_vector["default"].weight
        return {"x": x, "A": module.lora_A["default"].weight, "B": module.lora_B["default"].weight, "m": magnitude}

    def gradients(y, inputs):
        actual = torch.autograd.grad((y * weights).sum(), list(inputs.values()))
        return {"y": y.detach(), **dict(zip(inputs, actual, strict=True))}

    def explicit(model, x):
        leaves, module = inputs(model, x), layer(model)
        mag_scale = leaves["m"] / explicit_norm(module).detach()
        low = ((x * mask / (1 - p)) @ leaves["A"].t()) @ leaves["B"].t()
        z = x @ module.base_layer.weight.t() + module.scaling["default"] * low
        return gradients(mag_scale * z + module.base_layer.bias, leaves)

    expected = explicit(model, x)
    moved = lambda seed: explicit(nudged_model(model, seed), nudged(x.detach(), seed).requires_grad_())  # noqa: E731
    bounds = shaken(lambda seed: apart(moved(seed), expected), x.dtype, max(shape) * norms_condition(model))
    assert not beyond(gradients(y, inputs(model, x)), expected, bounds)


def test_dropout_masks_are_fair_and_differ():
    """Its rate, its independence of place and of the call's seed: a chi-squared over bytes of the mask."""
    torch.manual_seed(0)
    first, second = (dropout.keep_mask(dropout.draw_seed(), (512, 4096), 0.05, torch.device("cpu")) for _ in range(2))
    for mask in (first, second):
        assert abs((~mask).float().mean() - 0.05) < 4 * (0.05 * 0.95 / mask.numel()) ** 0.5
        assert (~mask).float().mean(0).std() < 1.15 * (0.05 * 0.95 / 512) ** 0.5
        assert (~mask).float().mean(1).std() < 1.15 * (0.05 * 0.95 / 4096) ** 0.5
        neighbours = (~mask[:, 1:] & ~mask[:, :-1]).float().mean()
        assert abs(neighbours - 0.05**2) < 2e-4
    together = (~first & ~second).float().mean()
    assert abs(together - 0.05**2) < 2e-4


def test_gradient_checkpointing_draws_the_same_dropout():
    model = fast(adapted(Net(16, 16, False).double(), dropout=0.5)).train()
    x = torch.randn(8, 16, dtype=torch.float64, requires_grad=True)
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(11)
        call = (lambda m, v: torch.utils.checkpoint.checkpoint(m, v, use_reentrant=False)) if checkpointed else None
        y = call(model, x) if call else model(x)
        grads.append(torch.autograd.grad(y.sum(), [x, layer(model).lora_A["default"].weight]))
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


@pytest.mark.parametrize(
    "build, text",
    [
        (
            lambda: get_peft_model(
                nn.Sequential(nn.Embedding(5, 4)), LoraConfig(r=2, use_dora=True, target_modules=["0"])
            ),
            "base_model.model.0: .*Embedding.*linear",
        ),
        (
            lambda: get_peft_model(Net(4, 4, True), LoraConfig(r=2, lora_bias=True, target_modules=["one"])),
            "base_model.model.one: .*lora_bias",
        ),
        (
            lambda: get_peft_model(Net(4, 4, True), LoraConfig(r=2, bias="all", target_modules=["one"])),
            "base_model.model.one: .*bias: none",
        ),
        (
            lambda: with_trainable_weight(),
            "base_model.model.one: .*freeze",
        ),
        (
            lambda: with_another_bases_adapter(),
            "base_model.model.one: .*Linear8bitLt.*is_loaded_in_8bit",
        ),
        (
            lambda: get_peft_model(Net(4, 4, True), LoraConfig(r=2, lora_dropout=1.0, target_modules=["one"])),
            "base_model.model.one: lora_dropout .*'default'.*less than 1",
        ),
    ],
)
def test_what_has_no_fast_path_is_named(build, text):
    model = build()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(dora.Unsupported, match=f"^{text}"):
        dora.accelerate(model)
    assert [type(module) for module in model.modules()] == kinds  # and nothing is changed


def with_another_bases_adapter() -> PeftModel:
    net = quantised(Net(64, 48, True), 8)
    net.is_loaded_in_8bit = False
    return adapted(net)


def test_fp8_products_name_a_layer_that_does_not_fit_them():
    model = adapted(quantised(Net(40, 48, True), 8))
    with pytest.raises(dora.Unsupported, match="one.*: .*multiples of 16.*40 x 48.*leave fp8 out"):
        dora.accelerate(model, fp8=True)


def edited_by_a_child(module):
    module.lora_B["default"].load_state_dict({"weight": 2 * module.lora_B["default"].weight})


def edited_in_place(module):
    with torch.no_grad():
        module.lora_A["default"].weight.mul_(3)
        module.lora_magnitude_vector["default"].weight.add_(1)


@pytest.mark.parametrize("edit", [edited_by_a_child, edited_in_place])
def test_edits_that_torch_sees_are_seen(edit):
    base = adapted(Net(12, 6, True).double())
    model, x = fast(base), torch.randn(4, 12, dtype=torch.float64)
    before = model(x)
    for each in (base, model):
        edit(layer(each))
    assert not beyond_rounding(model, base, x) and not torch.allclose(model(x), before, atol=1e-3)


def test_tensors_in_place_of_parameters_have_norms_of_their_own():
    base = adapted(Net(12, 6, True).double())
    model, x = fast(base), torch.randn(4, 12, dtype=torch.float64)
    before = model(x)
    for factor in (2.0, 3.0):
        changed = {name: p * factor for name, p in model.named_parameters() if "lora_B" in name}
        other = copy.deepcopy(base)
        other.load_state_dict(changed, strict=False)
        assert not beyond_rounding(lambda x: torch.func.functional_call(model, changed, (x,)), other, x)  # noqa: B023
        assert torch.equal(model(x), before)


def test_steps_do_not_compile_a_layer_anew():
    from torch._dynamo.testing import CompileCounter

    counter, model = CompileCounter(), fast(adapted(Net(16, 8, True)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.05)
    call, counts = torch.compile(model, backend=counter), []
    for _ in range(5):
        call(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1, counts


class Attention(nn.Module):
    """q, k and v of one input, and a layer of another."""

    def __init__(self, bits: int, widths=(48, 16, 16)):
        super().__init__()
        for name, width in zip(("q_proj", "k_proj", "v_proj"), widths, strict=True):
            setattr(self, name, quantised(Net(64, width, name == "k_proj"), bits).one)
        self.is_loaded_in_8bit, self.is_loaded_in_4bit = bits == 8, bits == 4
        self.reentrant: bool | None = None

    def forward(self, x):
        if self.reentrant is not None:
            return torch.utils.checkpoint.checkpoint(self.attend, x, use_reentrant=self.reentrant)
        return self.attend(x)

    def attend(self, x):
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


def attention_adapter(bits: int, dtype=torch.float32, targets=("q_proj", "k_proj", "v_proj"), **how) -> PeftModel:
    torch.manual_seed(2)
    how = dict(r=4, use_dora=True, init_lora_weights=False, lora_dropout=0.0, target_modules=list(targets)) | how
    return get_peft_model(Attention(bits).to(dtype), LoraConfig(**how), autocast_adapter_dtype=False)


def apart_as_well(model: PeftModel, fp8: bool = False) -> tuple[PeftModel, PeftModel]:
    """The model with layers that are computed together, and one with each by itself."""
    together, single = copy.deepcopy(model), copy.deepcopy(model)
    for each in (together, single):
        dora.accelerate(each, fp8)
    for module in single.modules():
        module._siblings = ()
    return together, single


HOW = [{}, {"use_dora": False}, {"lora_dropout": 0.3}, {"r": 20, "rank_pattern": {"k_proj": 3}, "use_rslora": True}]
HOW += [{"targets": ("q_proj", "v_proj")}, {"r": 30}]


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("checkpointed", [None, True, False])
def test_layers_of_one_input_are_computed_together_as_each_by_itself(monkeypatch, bits, how, checkpointed):
    """One matmul, one pass over the input each way; with dropout the mask is the same here, by the same seed."""
    monkeypatch.setattr(dropout, "draw_seed", lambda: (2**30 + 1, 77))
    calls, matmul = [], quantized.base_matmul
    monkeypatch.setattr(
        quantized, "base_matmul", lambda x, layers, fp8: calls.append(len(layers)) or matmul(x, layers, fp8)
    )
    together, single = apart_as_well(attention_adapter(bits, torch.float64 if bits == 16 else torch.float32, **how))
    dtype = torch.float64 if bits == 16 else torch.float32
    x, weights = torch.randn(2, 5, 64, dtype=dtype), torch.randn(2, 5, 80, dtype=dtype)
    for model in (together, single):
        model.base_model.model.reentrant = checkpointed
    actual = run(together.train(), x, weights)
    adapters = len(how.get("targets", "qkv"))
    assert {*calls} - {1} == (set() if how.get("r") == 30 else {adapters}), "30 * 3 ranks are too many for the kernels"
    calls.clear()
    expected = run(single.train(), x, weights)
    assert {*calls} == {1}
    differences = lambda seed: apart(run(nudged_model(single, seed), nudged(x, seed), weights), expected)  # noqa: E731
    assert not beyond(actual, expected, shaken(differences, dtype, 80))


def test_layers_in_e4m3_are_computed_together_too():
    together, single = apart_as_well(attention_adapter(8), fp8=True)
    exact = copy.deepcopy(single)
    dora.accelerate(exact)
    for module in exact.modules():
        module._siblings = ()
    x, weights = torch.randn(64, 64), torch.randn(64, 80)
    expected = run(exact, x, weights)
    off = [{k: (got[k] - expected[k]).norm() / expected[k].norm() for k in got} for got in
           (run(together, x, weights), run(single, x, weights))]  # fmt: skip
    assert all(off[0][name] < 1.2 * off[1][name] + 1e-6 for name in expected)


def test_layers_whose_weights_may_be_elsewhere_or_that_differ_are_computed_alone(monkeypatch):
    calls, matmul = [], quantized.base_matmul
    monkeypatch.setattr(
        quantized, "base_matmul", lambda x, layers, fp8: calls.append(len(layers)) or matmul(x, layers, fp8)
    )
    (model, _), x = apart_as_well(attention_adapter(16)), torch.randn(3, 64)
    expected = model(x)
    assert calls == [3]
    attention = model.base_model.model
    attention.k_proj.base_layer.weight.ds_id = 7  # as DeepSpeed numbers parameters that it gathers
    assert torch.allclose(model(x), expected, atol=1e-5) and calls == [3, 2, 1]
    attention.v_proj.merge()
    assert torch.allclose(model(x), expected, atol=1e-5) and calls == [3, 2, 1, 1, 1]
    attention.v_proj.unmerge()
    # Another input than the first layer's: what was computed for that one is not taken.
    attention.q_proj(x)
    assert torch.allclose(attention.v_proj(x + 1), attention.v_proj(x.clone() + 1), atol=1e-5)
    with model.disable_adapter():
        assert torch.allclose(model(x), torch.cat([getattr(attention, f"{n}_proj").base_layer(x) for n in "qkv"], -1))


def with_trainable_weight() -> PeftModel:
    model = adapted(Net(4, 4, True))
    layer(model).base_layer.weight.requires_grad_()
    return model


@pytest.mark.parametrize(
    "config, text",
    [
        (dict(lora_bias=True), "lora_bias"),
        (dict(lora_dropout=1.0), "lora_dropout .*less than 1"),
        (dict(init_lora_weights="mica"), "MiCALinearVariant"),
    ],
)
def test_an_adapter_added_later_is_checked_too(config, text):
    model = fast(adapted(Net(12, 6, True)))
    with pytest.raises(dora.Unsupported, match=f"^adapter 'second': .*{text}"):
        model.add_adapter("second", LoraConfig(r=2, target_modules=["one"], **config))


def test_modules_that_a_later_adapter_adds_get_their_fast_path_by_another_call():
    net = Net(12, 6, True)
    net.two = nn.Linear(12, 6)
    model = fast(adapted(net))
    model.add_adapter("second", LoraConfig(r=2, use_dora=True, target_modules=["two"]))
    assert type(model.base_model.model.two) is peft.tuners.lora.Linear
    assert dora.accelerate(model).startswith("2 16-bit DoRA layers")
    assert type(model.base_model.model.two) is dora.FastLinear


def test_fp8_products_without_weights_that_take_them_are_refused(monkeypatch):
    with pytest.raises(dora.Unsupported, match="8-bit.*leave fp8 out"):
        dora.accelerate(adapted(Net(64, 48, True)), fp8=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))  # no GPU is here
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    model = adapted(quantised(Net(64, 48, True), 8))
    here = SimpleNamespace(device=torch.device("cuda", 0), requires_grad=False)
    monkeypatch.setattr(bnb.nn.Linear8bitLt, "weight", here, raising=False)
    monkeypatch.delitem(layer(model).base_layer._parameters, "weight")
    with pytest.raises(dora.Unsupported, match="NVIDIA A100.*leave fp8 out"):
        dora.accelerate(model, fp8=True)
    assert type(layer(model)) in dora.FAST_CLASSES  # and nothing is changed


@pytest.mark.parametrize("training", [True, False])
def test_norms_first_taken_in_inference_mode_serve_training(training):
    model = fast(adapted(Net(12, 6, True), dropout=0.0)).train(training)
    x = torch.randn(4, 12)
    with torch.inference_mode():
        first = model(x)
    actual = model(x)
    actual.sum().backward()
    assert torch.equal(first, actual) and layer(model).lora_B["default"].weight.grad.any()
    assert not layer(model).cached_norm("default").norm.requires_grad


def test_a_library_that_it_does_not_know_is_named(monkeypatch):
    monkeypatch.setattr(dora, "version", lambda name: {"peft": "0.21.0"}.get(name, "0.50.2"))
    with pytest.raises(dora.Unsupported, match=r"0\.21\.0.*pip install 'peft=="):
        dora.accelerate(Net(4, 4, True))


def test_the_line_says_which_path_each_kind_takes():
    model = adapted(quantised(Net(64, 48, True), 8))
    model.other = quantised(Net(64, 64, True), 4)
    assert dora.accelerate(model) == "1 4-bit frozen, 1 8-bit DoRA layers; 16-bit matmuls"
    assert dora.accelerate(model, fp8=True) == "1 4-bit frozen, 1 8-bit DoRA layers; fp8 matmuls"


@pytest.mark.parametrize("how", [dict(), dict(dora=False, r=64, alpha=4), dict(rslora=True, r=1, alpha=128)])
@pytest.mark.parametrize("strided", [False, True])
def test_fp8_costs_what_its_bits_cost(how, strided):
    """e4m3 keeps 4 significant bits: a matmul of random terms is off by about 2^-5, in value and in gradient."""
    torch.manual_seed(6)
    model = adapted(quantised(Net(256, 192, False), 8), spread=0.02, **how)
    exact, rough = copy.deepcopy(model), copy.deepcopy(model)
    dora.accelerate(exact)
    dora.accelerate(rough, fp8=True)
    x, weights = drawn((64,), 256, strided), drawn((64,), 192, strided)
    x[:, 3] *= 100  # an outlier channel, as real activations have
    x[5] = 0
    actual, expected = run(rough, x, weights), run(exact, x, weights)
    for key in expected:
        error = ((actual[key] - expected[key]).norm() / expected[key].norm()).item()
        assert error < 0.05, (key, error)
    assert any(not torch.equal(actual[key], expected[key]) for key in expected)
    empty = run(rough, x[:0], weights[:0])
    assert empty["y"].shape == (0, 192) and not any(value.any() for value in empty.values())


@pytest.mark.long
def test_the_triton_kernels_compute_the_same_formulas():
    """In Triton's interpreter, in a process of its own; bench/gpu_check.py does the same on a GPU."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "interpreted.py"], env=env, capture_output=True, text=True, check=True
    )
    rows = json.loads(done.stdout.splitlines()[-1])
    assert len(rows) > 30
    # Sums of up to 192 terms in float32, whose roundings add up as a random walk; or their result rounded to float16.
    single, half = FACTOR * 192**0.5 * torch.finfo(torch.float32).eps, FACTOR * torch.finfo(torch.float16).eps
    for name, error in rows.items():
        assert error < (single if "norms" in name or "lora" in name or "Liger" in name else half), name


def test_the_tuner_tries_the_tiles_in_use_first():
    pytest.importorskip("triton")
    from bench import tune_kernels

    for name in tune_kernels.GRID:
        tiles = tune_kernels.candidates(name)
        launched = kernels.triton_kernels.tiles_of(name, tune_kernels.R)
        assert launched == tiles[0] | {"BLOCK_R": tune_kernels.RANK} and len(tiles) > 10
        assert all(
            kernels.triton_kernels.tiles_of(name, tune_kernels.R, each).keys() == launched.keys() for each in tiles
        )


F, INT, P, H = "fp32", "i32", "*fp32", "*bf16"
DROPOUT = dict(
    tokens=INT,
    inputs=INT,
    rank=INT,
    stride_r=INT,
    stride_k=INT,
    scale=F,
    threshold=INT,
    multiplier=INT,
    offset=INT,
    seed="*i64",
)


def kernel_signatures(block_r: int, read: bool):
    """(kernel, types of its arguments, its constants), as triton_kernels.py launches them. read: seeds of graphs."""
    tiles = {name: kernels.triton_kernels.tiles_of(name, block_r) for name in kernels.triton_kernels.TILES}
    for name in tiles:
        tiles[name].pop("SPLITS", None)
    combined = dict(
        dy=H,
        base=H,
        t=H,
        b=H,
        mag_scale=P,
        norm=P,
        dz=H,
        parts=P,
        tokens=INT,
        outputs=INT,
        rank=INT,
        stride=INT,
        stride_t=INT,
        share=INT,
        size=INT,
    )
    yield "_low_rank", dict(x=H, a=H, t=H, stride=INT, **DROPOUT), dict(DROPOUT=True, READ=read, **tiles["low_rank"])
    yield (
        "_low_rank_backward",
        dict(dt=H, x=H, a=H, dx=H, parts=P, share=INT, **DROPOUT),
        dict(DROPOUT=True, READ=read, INTO_X=True, **tiles["low_rank_backward"]),
    )
    yield (
        "_epilogue",
        dict(
            base=H, t=H, b=H, mag_scale=P, bias=H, y=H, tokens=INT, outputs=INT, rank=INT, stride=INT, stride_t=INT, s=F
        ),
        dict(DORA=True, BIAS=True, **tiles["epilogue"]),
    )
    yield "_epilogue_backward", dict(s=F, **combined), dict(DORA=True, **tiles["epilogue_backward"])
    if block_r > 64:
        return
    table = dict(table="*i64", factors=P, grams=P, norms=P, mag_scales=P, rank=INT)
    yield "_grams", dict(table="*i64", grams=P, rank=INT), dict(BLOCK_K=2048 // block_r, BLOCK_R=block_r)
    for kind in ("int8", "bfloat16"):
        yield "_row_norms", table, dict(KIND=kind, BLOCK_N=32, BLOCK_K=128, BLOCK_R=block_r, SCALES=kind == "int8")
    nested = dict(packed="*u8", code=P, scales="*u8", code2=P, scales2=P, offset=P, out=H, count=INT)
    yield "_dequantize_4bit", nested, dict(NESTED=True, SIZE=64, SIZE2=256, BLOCK=1024)
    merged = dict(out=H, lse=P, part=H, part_lse=P, within="*i32", last=INT, tokens=INT, heads=INT, width=INT)
    yield "_merge_attention", merged, dict(BLOCK_H=32, BLOCK_D=128)
    yield "_add_rows", dict(total=H, part=H, within="*i32", last=INT, columns=INT), dict(BLOCK=1024)
    copies = dict(source=H, target=H, copies="*i32", key_edges="*i32", columns=INT)
    yield "_sum_copies", copies, dict(BLOCK_ROWS=8, BLOCK=512)
    yield "_dequantize_int8", dict(weight="*i8", scales=P, out=H, columns=INT), dict(BLOCK=4096)


CARDS = [(80, 256), (90, 32)]
OTHER_CARDS = [(80, 16), (80, 32), (80, 64), (90, 16), (90, 64), (90, 256)]


@pytest.mark.parametrize(
    "capability, block_r", [*CARDS, *(pytest.param(*card, marks=pytest.mark.slow) for card in OTHER_CARDS)]
)
def test_the_triton_kernels_compile_for_cards_that_are_not_here(capability, block_r):
    """For an A100 (sm_80) and an H100, within the shared memory of the 24 GB cards (99 KiB a block)."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    cases = list(kernel_signatures(block_r, read=capability == 90))
    if capability == 90 and block_r == 16:  # e4m3 begins with sm_89
        cases.append(
            (
                "_quantize_rows",
                dict(x=H, factors=P, q="*fp8e4nv", scales=P, columns=INT),
                dict(BLOCK=16384, FACTORS=True),
            )
        )
        cases.append(
            (
                "_int8_to_fp8",
                dict(weight="*i8", q="*fp8e4nv", rows=INT, columns=INT, stride_n=INT, stride_k=INT),
                dict(BLOCK_N=64, BLOCK_K=128),
            )
        )
    for name, types, constants in cases:
        kernel = getattr(kernels.triton_kernels, f"{name}_kernel")
        if "KIND" in constants:
            constants["KIND"] = getattr(triton.language, constants["KIND"])
        options = {key: constants.pop(key) for key in ("num_warps", "num_stages") if key in constants}
        assert set(kernel.arg_names) == set(types) | set(constants), name
        source = ASTSource(
            fn=kernel,
            signature={arg: "constexpr" if arg in constants else types[arg] for arg in kernel.arg_names},
            constexprs={(kernel.arg_names.index(arg),): value for arg, value in constants.items()},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4} | options)
        assert compiled.metadata.shared <= 99 * 1024, name
