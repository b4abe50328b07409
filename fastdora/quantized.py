"""Matmuls with frozen 16-, 8- and 4-bit weights: the weight is dequantized to the activations' dtype, then multiplied.

Unlike in LLM.int8() no activation is quantized and no outlier column is kept apart, forward or backward (fp8 matmuls,
where enabled, do quantize activations). A dequantized weight lives for one matmul. Dequantizing int8 runs at the memory
bandwidth and takes 14 of the 286 ms of a step with 5,120 tokens (H100): a kernel that dequantizes inside the matmul
would have to reach 93% of the library matmul's throughput to win, and was not tried.
"""

import functools
from collections.abc import Sequence

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from torch import nn

from fastdora import kernels


def int8_scales(layer: nn.Module) -> torch.Tensor:
    """The row scales (N,) of an int8 weight: bitsandbytes moves them to the layer's state at its own first forward."""
    # bitsandbytes 0.50: Linear8bitLt.forward moves SCB from the weight to `state`; here that forward never runs, but a
    # layer may have run before `accelerate`.
    scales = layer.weight.SCB if getattr(layer.weight, "SCB", None) is not None else layer.state.SCB
    return scales.to(layer.weight.device)


def has_fp8(device: torch.device | None = None) -> bool:
    """Whether a GPU (the current one without `device`) multiplies in e4m3: from Ada (compute capability 8.9) on."""
    return torch.cuda.get_device_capability(device) >= (8, 9)


def is_int8(layer: nn.Module) -> bool:
    return isinstance(layer.weight, bnb.nn.Int8Params) and layer.weight.dtype == torch.int8


def quantization_tensors(layer: nn.Module) -> list[torch.Tensor]:
    """The scales and code books that a matmul reads beside a quantized weight; none for 16 bits."""
    if is_int8(layer):
        return [_fp8_scales(layer) if getattr(layer, "fp8_matmul", False) else int8_scales(layer)]
    if isinstance(layer.weight, bnb.nn.Params4bit):
        state = layer.weight.quant_state
        nested = [state.state2.code, state.state2.absmax, state.offset] if state.nested else []
        return [state.code, state.absmax, *nested]
    return []


def dequantize(layer: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """The weight (N, K) of an nn.Linear, Linear8bitLt or Linear4bit in `dtype`; not copied where it has it."""
    return _weights([layer], dtype) if is_quantized(layer) else layer.weight.detach().to(dtype)


def is_quantized(layer: nn.Module) -> bool:
    return is_int8(layer) or isinstance(layer.weight, bnb.nn.Params4bit)


def _weights(layers: Sequence[nn.Module], dtype: torch.dtype) -> torch.Tensor:
    """The weights of quantized layers one below the other, dequantized."""
    sizes = [layer.out_features for layer in layers]
    weights = torch.empty(sum(sizes), layers[0].in_features, dtype=dtype, device=layers[0].weight.device)
    for layer, out in zip(layers, weights.split(sizes), strict=True):
        if is_int8(layer):
            kernels.dequantize_int8(layer.weight.data, int8_scales(layer), out)
        else:
            kernels.dequantize_4bit(layer.weight.data, layer.weight.quant_state, out)
    return weights


def base_matmul(x: torch.Tensor, layers: Sequence[nn.Module], fp8: bool = False) -> torch.Tensor:
    """x W^T, W being the weights of layers of one kind one below the other; x (T, K) -> (T, N) in x's dtype.

    fp8: int8 layers in e4m3, with one scale per row of x and of W.
    """
    if fp8 and is_int8(layers[0]) and x.numel():  # torch._scaled_mm refuses empty matrices
        scales, weights = _fp8_weights(layers)
        return _scaled_matmul(*kernels.quantize_rows(x), weights, scales.view(1, -1), x.dtype)
    if is_quantized(layers[0]):
        return F.linear(x, _weights(layers, x.dtype))
    if len(layers) == 1:
        return F.linear(x, dequantize(layers[0], x.dtype))
    sizes = [layer.out_features for layer in layers]
    y = x.new_empty(len(x), sum(sizes))
    for layer, part in zip(layers, y.split(sizes, 1), strict=True):  # copying 16-bit weights would cost more
        torch.mm(x, dequantize(layer, x.dtype).t(), out=part)
    return y


def base_matmul_backward(dy: torch.Tensor, layers: Sequence[nn.Module], fp8: bool = False) -> torch.Tensor:
    """dy W; dy (T, N) -> (T, K) in dy's dtype. fp8: W's row scales are multiplied into dy before it is quantized."""
    if fp8 and is_int8(layers[0]) and dy.numel():
        scales, weights = _fp8_weights(layers, transpose=True)
        return _scaled_matmul(*kernels.quantize_rows(dy, scales), weights, _ones(len(weights), dy.device), dy.dtype)
    if is_quantized(layers[0]):
        return dy @ _weights(layers, dy.dtype)
    first, *others = zip(dy.split([layer.out_features for layer in layers], 1), layers, strict=True)
    dx = first[0] @ dequantize(first[1], dy.dtype)
    for part, layer in others:
        dx.addmm_(part, dequantize(layer, dy.dtype))
    return dx


def _fp8_weights(layers: Sequence[nn.Module], transpose: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The row scales (N,) of int8 layers, and their weights one below the other in e4m3: (N, K), or (K, N)."""
    sizes, inputs = [layer.out_features for layer in layers], layers[0].in_features
    # Transposed, since torch._scaled_mm takes its second operand in column-major order only.
    shape = (inputs, sum(sizes)) if transpose else (sum(sizes), inputs)
    weights = torch.empty(shape, dtype=kernels.FP8, device=layers[0].weight.device)
    for layer, out in zip(layers, (weights.t() if transpose else weights).split(sizes), strict=True):
        kernels.int8_to_fp8(layer.weight.data, out)
    return joined([_fp8_scales(layer) for layer in layers]), weights


def joined(tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """The tensors as one; not copied where there is one."""
    return torch.cat(list(tensors), dim) if len(tensors) > 1 else tensors[0]


def _fp8_scales(layer: nn.Module) -> torch.Tensor:
    # Cached with the weight and the scales that they belong to: merging replaces both.
    cached, scales = getattr(layer, "fp8_scales", None), int8_scales(layer)
    if cached is None or cached[0] is not layer.weight or cached[1] is not scales:
        layer.fp8_scales = cached = (layer.weight, scales, scales.float() / 127)
    return cached[2]


@functools.cache
def _ones(count: int, device: torch.device) -> torch.Tensor:
    return torch.ones(1, count, device=device)


def _scaled_matmul(
    x: torch.Tensor, x_scale: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """(x * x_scale) (w^T * w_scale); x (T, K) and w (N, K) in e4m3, scales (T, 1) and (1, N) -> (T, N)."""
    if x.is_cuda:
        # Fast accumulation rounds sums to fewer bits than float32; e4m3's four significant bits cost far more.
        return torch._scaled_mm(x, w.t(), scale_a=x_scale, scale_b=w_scale, out_dtype=dtype, use_fast_accum=True)
    return ((x.float() @ w.float().t()) * x_scale * w_scale).to(dtype)


class _FrozenMatmul(torch.autograd.Function):
    """y = x W^T and dx = dy W; W has no gradient and is dequantized anew in the backward pass, not saved."""

    @staticmethod
    def forward(ctx, x, layer, fp8):
        ctx.layer, ctx.fp8 = layer, fp8
        return base_matmul(x, [layer], fp8)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        return base_matmul_backward(dy.contiguous(), [ctx.layer], ctx.fp8), None, None


def frozen_forward(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The forward of a quantised layer without an adapter: x W^T + bias; x (..., K) -> (..., N)."""
    x = in_compute_dtype(x)
    # In place of bitsandbytes' forward, which for int8 would quantize the activations too.
    y = _FrozenMatmul.apply(x.reshape(-1, x.shape[-1]), layer, getattr(layer, "fp8_matmul", False))
    y = y.view(*x.shape[:-1], y.shape[-1])
    return y if layer.bias is None else y + layer.bias.to(y.dtype)


def in_compute_dtype(x: torch.Tensor) -> torch.Tensor:
    """x in autocast's dtype where autocast is on."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
