"""DoRA, LoRA and rsLoRA layers for PEFT at the cost of one matmul, on 16-, 8- and 4-bit bases.

DoRA (arXiv 2402.09353, equation 5) trains a magnitude m (N,) beside LoRA's A (R, K) and B (N, R):

    y = m / ||W0 + s B A|| * (W0 x + s B A x) + bias,          s = alpha / r;  rsLoRA: s = alpha / sqrt(r)

The norm is taken per row of the weight as torch stores it (the paper's columns). Section 4.3 of the paper holds it
constant in back-propagation, so no gradient flows into it. For x (T, K), with t = dropout(x) A^T, z = x W0^T + s t B^T
and g = m / ||W0 + s B A|| (`mag_scale` in the code), forward and backward are

    y  = g z + bias
    dz = g dy      dm = sum_T(dy z) / ||W0 + s B A||      dt = s dz B      dA = dt^T dropout(x)      dB = s dz^T t
    dx = dz W0 + dropout(dt A)

Dropout is applied on the low-rank path only (PEFT's DoRA applies it before the matmul with W0 too). Layers that read
the same input, as q, k and v do, are computed together, with one dropout mask for all. Neither B A nor W0 + s B A is
built; with w_i and b_i row i of W0 and B, the norm is expanded into

    ||w_i + s b_i A||^2 = ||w_i||^2 + 2 s (W0 A^T)_i . b_i + s^2 b_i (A A^T) b_i^T      (float64; float32 on a GPU)

The first term is computed once and the others once per optimizer step. A cached norm is stale when the process's count
of optimizer steps has moved, which a hook that torch calls after every optimizer's step increments (bitsandbytes',
fused ones and DeepSpeed's inner ones included). Tensors' version counters alone are not enough: bitsandbytes, fused
optimizers and ZeRO write to weights without moving them.

    model = get_peft_model(...); fastdora.accelerate(model)
"""

import operator
import types
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version

import bitsandbytes as bnb
import torch
from peft.tuners import lora
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastdora import dropout, kernels, quantized

# 4-bit weights that may be dequantized at once for their norms: 512 MiB, a few of an 8B model's largest layers.
DEQUANTIZED_BYTES = 2**29

# Layers of a module that read the same input, and the sum of ranks up to which they are computed together: the kernels'
# tiles for more are small.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
JOINED_RANKS = 64

# Optimizer steps in this process. One counter for all models: another model's step recomputes some norms too often.
_steps = 0


def _count_step(*_) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


_as_cached = False


@contextmanager
def norms_as_cached() -> Iterator[None]:
    """Within it no cached norm is stale, whatever has become of the parameters: a CUDA graph reads it where it lies."""
    global _as_cached
    _as_cached = True
    try:
        yield
    finally:
        _as_cached = False


class Unsupported(Exception):
    """A layer or a library without a fast path. Its text is one line that names it and the remedy."""


@dataclass(frozen=True)
class _CachedNorm:
    key: tuple  # _cache_key at the time of computing
    tensors: tuple
    norm: torch.Tensor  # ||W0 + s B A||, (N,)
    mag_scale: torch.Tensor  # m / norm, (N,)


def norm_and_scale(
    layer: nn.Module, a: torch.Tensor, b: torch.Tensor, m: torch.Tensor, s: float, base_square: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """||W0 + s B A|| per row, and m over it: both (N,), float32 (float64 for a float64 adapter).

    a (R, K), b (N, R), m (N,); base_square: ||W0||^2 per row, (N,). Computed in float64, since the terms may be far
    larger than their sum. Where they cancel to less than the rounding error of base_square, the norm is set to that
    error (8 eps ||W0||^2). The norm is at least the smallest normal number. A row of zeros has no direction: m / norm
    is 0 there, so the output stays zero (PEFT divides by zero).
    """
    unresolved = base_square.double() * 8 * torch.finfo(base_square.dtype).eps
    dtype, a, b = kernels.sum_dtype(a.dtype), a.double(), b.double()
    # The header's expansion: 2 s (W0 A^T) . b + s^2 b (A A^T) b^T, with the common factor b taken out of both terms.
    wa = quantized.dequantize(layer, torch.float64) @ a.t()
    square = base_square.double() + ((2 * s * wa + s * s * (b @ (a @ a.t()))) * b).sum(1)
    norm = torch.maximum(square, unresolved).sqrt()
    mag_scale = torch.where(norm > 0, m.double() / norm, 0.0)
    return norm.to(dtype).clamp_min(torch.finfo(dtype).tiny), mag_scale.to(dtype)


class _AdaptedLinear(torch.autograd.Function):
    """The module docstring's formulas for x (T, K) -> y (T, N) of each of several layers with the same input.

    `parts`: for each layer in turn the layer, s, A, B, m, norm and mag_scale, the last three None for LoRA. An autograd
    Function sees only positional tensors, hence the flat list. The layers' W0 are one matrix, of one matmul forward and
    one backward (dx is then no sum of three); so are their A's, for which x is read once.
    """

    @staticmethod
    def forward(ctx, x, p, seed, fp8, *parts):
        layers, scales, a, b, m, norms, mag_scales = (parts[n::7] for n in range(7))
        ctx.dtypes = [[None if x is None else x.dtype for x in each] for each in (a, b, m)]
        ctx.ranks, ctx.widths = [len(each) for each in a], [len(each) for each in b]
        base = quantized.base_matmul(x, layers, fp8)
        a = quantized.joined(a).to(x.dtype)
        b = [each.to(x.dtype).contiguous() for each in b]
        t = kernels.low_rank(x, a, 1.0, p, seed)
        columns = _columns(base, ctx.widths), _columns(t, ctx.ranks)
        ys = tuple(
            kernels.epilogue(z, low, up, s, mag_scale, layer.bias)
            for z, low, up, s, mag_scale, layer in zip(*columns, b, scales, mag_scales, layers, strict=True)
        )
        # A and B as they were multiplied, 16 bits under autocast. z is neither written nor saved: the backward pass
        # computes it again from `base` and t.
        ctx.save_for_backward(x, a, t, None if not any(ctx.dtypes[2]) else base, *b, *norms, *mag_scales)
        ctx.layers, ctx.scales, ctx.p, ctx.seed, ctx.fp8 = layers, scales, p, seed, fp8
        return ys

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *dys):
        (x, a, t, base, *rest), count = ctx.saved_tensors, len(dys)
        b, norms, mag_scales = rest[:count], rest[count : 2 * count], rest[2 * count :]
        together = dys[0].new_empty(len(x), sum(ctx.widths)) if count > 1 else None
        bases, lows, dzs = _columns(base, ctx.widths), _columns(t, ctx.ranks), _columns(together, ctx.widths)
        # Contiguous: a gradient from expand() or a transposed view has strides that the kernels do not read.
        backward = [
            kernels.epilogue_backward(dy.contiguous(), *each)
            for dy, *each in zip(dys, bases, lows, b, ctx.scales, mag_scales, norms, dzs, strict=True)
        ]
        # s dz B is the same formula as t's, with B^T for A.
        dts = [
            kernels.low_rank(dz, up.t(), s, 0.0, ctx.seed)
            for (dz, _, _), up, s in zip(backward, b, ctx.scales, strict=True)
        ]
        dz, dt = backward[0][0] if together is None else together, quantized.joined(dts, 1)
        dx = quantized.base_matmul_backward(dz, ctx.layers, ctx.fp8) if ctx.needs_input_grad[0] else None
        da = kernels.low_rank_backward(dt, x, a, dx, ctx.p, ctx.seed)
        gradients = []
        for part, (_, dm, db), to in zip(da.split(ctx.ranks), backward, zip(*ctx.dtypes, strict=True), strict=True):
            own = [None if each is None else each.to(dtype) for each, dtype in zip((part, db, dm), to, strict=True)]
            # No gradient for the norm: the paper's section 4.3 treats it as a constant.
            gradients += [None, None, *own, None, None]
        return dx, None, None, None, *gradients


def _columns(matrix: torch.Tensor | None, sizes: list[int]) -> Sequence[torch.Tensor | None]:
    """A matrix in parts of so many columns each; Nones of a None."""
    if matrix is None or len(sizes) == 1:
        return [matrix] * len(sizes)
    return matrix.split(sizes, 1)


def _adapted_linear(*args) -> tuple[torch.Tensor, ...]:
    return _AdaptedLinear.apply(*args)


if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
    # Dynamo of torch 2.11 turns the Function into one whose gradients are all zero, without a word; 2.13 compiles it
    # rightly, and 2.12 was not tried. A compiled model runs it as it is.
    _adapted_linear = torch.compiler.disable(_adapted_linear)


def _outputs(x: torch.Tensor, layers: Sequence["Fast"], name: str, p: float) -> list[torch.Tensor]:
    """What layers with the same input x (..., K) return for it, with adapter `name` and dropout's probability p."""
    parts = []
    for layer in layers:
        m = norm = mag_scale = None
        if layer.use_dora[name]:
            m, cached = layer.lora_magnitude_vector[name].weight, layer.cached_norm(name)
            norm, mag_scale = cached.norm, cached.mag_scale
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        parts += [layer.base_layer, layer.scaling[name], a, b, m, norm, mag_scale]
    x = quantized.in_compute_dtype(x)
    # The kernels take one matrix of tokens, whatever the batch's shape.
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    # Without dropout none is read. One is drawn for each layer, together or not, as many as a CUDA graph has room for.
    seed = [dropout.draw_seed() for _ in layers][0] if p else (1, 0)
    ys = _adapted_linear(flat, p, seed, getattr(layers[0].base_layer, "fp8_matmul", False), *parts)
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in ys]


class Fast:
    """Mixed into PEFT's LoRA layers by `accelerate`. Merged, disabled or several adapters at once take PEFT's path."""

    # An input, and this layer's output for it, where a sibling has computed it already.
    _computed: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    _siblings: Sequence["Fast"] = ()  # other layers with the same input

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        (source, y), self._computed = self._computed, (None, None)
        if source is x:
            return y
        kind = self._kind()
        if kind is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        layers = [self, *(layer for layer in self._siblings if layer._kind() == kind)]
        name, p, here, *_ = kind
        if not here or torch.compiler.is_compiling() or sum(layer.r[name] for layer in layers) > JOINED_RANKS:
            layers = [self]
        y, *others = _outputs(x, layers, name, p)
        for layer, other in zip(layers[1:], others, strict=True):
            layer._computed = x, other
        return y

    def _kind(self) -> tuple | None:
        """The adapter's name, dropout, whether weights are here, and all else in which layers computed together agree.

        None: PEFT's path. ZeRO-3 gathers a layer's weights in that layer's own forward, so that they are never here for
        another one; FSDP2 gathers those of a block.
        """
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(names) != 1:
            return None
        layer, weights = self.base_layer, (self.base_layer.weight, self.lora_A[names[0]].weight)
        here = not any(hasattr(weight, "placements") or hasattr(weight, "ds_id") for weight in weights)
        like = type(layer), layer.in_features, layer.weight.device, getattr(layer, "fp8_matmul", False)
        return names[0], self.dropout_probability(names[0]), here, *like

    def dropout_probability(self, name: str) -> float:
        """The probability of dropout in the adapter's low-rank path; 0 in evaluation mode."""
        layer = self.lora_dropout[name]
        return layer.p if self.training and isinstance(layer, nn.Dropout) else 0.0

    @torch.compiler.disable  # otherwise torch.compile specialises on the step count and recompiles at each step
    def cached_norm(self, name: str) -> _CachedNorm:
        """Norm and magnitude scale of the current weights; recomputed only when one of them may have changed."""
        if not self._is_cached(name):
            device = self.lora_A[name].weight.device.type
            # Not in inference mode, even for an evaluation: training may use the tensors next and must save them.
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
                inputs = self._norm_inputs(name)
                if _fits_kernel(inputs) and _is_gathered(self, name):
                    _refresh_group(self._group, name, inputs)
                else:
                    pair = norm_and_scale(self.base_layer, inputs.a, inputs.b, inputs.m, inputs.s, inputs.base_square)
                    self._norm_cache[name] = _CachedNorm(*self._cache_key(name), *pair)
        return self._norm_cache[name]

    def _is_cached(self, name: str) -> bool:
        if (cached := self._norm_cache.get(name)) is None:
            return False
        if _as_cached:
            return True
        key, tensors = self._cache_key(name)
        return cached.key == key and all(map(operator.is_, cached.tensors, tensors))

    def _cache_key(self, name: str) -> tuple[tuple, tuple]:
        """What invalidates a norm when it changes: steps, scaling and version counters; and the tensors themselves."""
        tensors = self.lora_A[name].weight, self.lora_B[name].weight, self.lora_magnitude_vector[name].weight
        versions = (None if tensor.is_inference() else tensor._version for tensor in tensors)
        # Versions notice load_state_dict and copy_ between steps; torch keeps none for tensors of inference mode.
        return (_steps, self.scaling[name], *versions), tensors

    def _norm_inputs(self, name: str) -> kernels.NormInputs:
        layer, a = self.base_layer, self.lora_A[name].weight
        if self._base_square is None:
            weight = quantized.dequantize(layer, kernels.sum_dtype(a.dtype))
            square = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64).square()
            # Summed in float64, since the adapter's terms may cancel most of it; the kernel reads float32.
            self._base_square = square.float() if kernels.use_triton(layer.weight) else square
        # A 4-bit weight's scales are per block, not per row: the kernel takes it dequantized.
        if isinstance(layer.weight, bnb.nn.Params4bit) and a.is_cuda:
            weight, scales = quantized.dequantize(layer, torch.bfloat16), None
        else:
            weight, scales = layer.weight.data, quantized.int8_scales(layer) if quantized.is_int8(layer) else None
        m = self.lora_magnitude_vector[name].weight
        return kernels.NormInputs(weight, scales, a, self.lora_B[name].weight, m, self.scaling[name], self._base_square)

    def invalidate(self, *_) -> None:
        """Drop cached norms, and ||W0|| too: the next forward recomputes them."""
        self._norm_cache, self._base_square = {}, None

    def merge(self, *args, **kwargs) -> None:
        super().merge(*args, **kwargs)
        self.invalidate()  # merging writes into the base weight, whose version is not part of the key

    def unmerge(self) -> None:
        super().unmerge()
        self.invalidate()

    # PEFT calls it when an adapter is added to a layer that is already fast.
    def update_layer(self, adapter_name, r, lora_alpha, config, **kwargs) -> None:
        variant = self.resolve_lora_variant(config=config)
        _check_adapter(f"adapter '{adapter_name}'", adapter_name, variant, config.lora_bias, config.lora_dropout)
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)
        self.invalidate()

    def train(self, mode: bool = True):
        if mode != self.training:  # not at every call: transformers' Trainer calls train() at each micro-batch
            self.invalidate()
        return super().train(mode)

    def _apply(self, *args, **kwargs):  # nn.Module's hook that every cast and every move of a module passes
        self.invalidate()
        return super()._apply(*args, **kwargs)


def _fits_kernel(inputs: kernels.NormInputs) -> bool:
    small = [x for x in (inputs.a, inputs.b, inputs.m, inputs.base_square, inputs.scales) if x is not None]
    return (
        kernels.use_triton(inputs.weight)
        and inputs.weight.is_contiguous()
        and inputs.a.shape[0] <= kernels.triton_kernels.LARGEST_RANK
        and all(x.dtype == torch.float32 and x.is_contiguous() for x in small)
    )


def _is_gathered(module: "Fast", name: str) -> bool:
    """Whether all of a layer's tensors are here: ZeRO-3 and FSDP2 gather them only within the layer's own forward."""
    if name not in module.lora_A or not module.use_dora[name] or module.merged:
        return False
    tensors = (module.base_layer.weight, module.lora_A[name].weight, module.lora_magnitude_vector[name].weight)
    return all(x.numel() and not hasattr(x, "placements") for x in tensors)  # placements: a DTensor's


def _refresh_group(group: list["Fast"], name: str, like: kernels.NormInputs) -> None:
    """Recompute the stale norms of all layers in `group` whose dtype, rank, width and device are those of `like`.

    They share two kernel launches. 4-bit weights are dequantized for it, so those go DEQUANTIZED_BYTES at a time.
    """
    batch, dequantized = [], 0

    def flush() -> None:
        for (module, _), pair in zip(
            batch, kernels.triton_kernels.row_norms([inputs for _, inputs in batch]), strict=True
        ):
            module._norm_cache[name] = _CachedNorm(*module._cache_key(name), *pair)
        batch.clear()

    for module in group:
        if module._is_cached(name) or not _is_gathered(module, name):
            continue
        inputs = module._norm_inputs(name)
        alike = inputs.weight.dtype == like.weight.dtype and inputs.a.shape == (like.a.shape[0], inputs.weight.shape[1])
        if alike and inputs.a.device == like.a.device and _fits_kernel(inputs):
            batch.append((module, inputs))
            dequantized += inputs.weight.nbytes * (inputs.weight.data_ptr() != module.base_layer.weight.data_ptr())
        if dequantized > DEQUANTIZED_BYTES:
            flush()
            dequantized = 0
    if batch:
        flush()


class FastLinear(Fast, lora.Linear):
    """LoRA or DoRA on an nn.Linear."""


class FastLinear8bit(Fast, lora.Linear8bitLt):
    """LoRA or DoRA on bitsandbytes' Linear8bitLt."""


class FastLinear4bit(Fast, lora.Linear4bit):
    """LoRA or DoRA on bitsandbytes' Linear4bit."""


# Layers of other versions may differ in what `Fast` reads and overrides: PEFT's variants, bitsandbytes' quant_state.
SUPPORTED_VERSIONS = {"peft": "0.20", "bitsandbytes": "0.50"}
FAST_CLASSES = {lora.Linear: FastLinear, lora.Linear8bitLt: FastLinear8bit, lora.Linear4bit: FastLinear4bit}
PEFT_CLASSES = {nn.Linear: lora.Linear, bnb.nn.Linear8bitLt: lora.Linear8bitLt, bnb.nn.Linear4bit: lora.Linear4bit}
BASE_BITS = {nn.Linear: "16-bit", bnb.nn.Linear8bitLt: "8-bit", bnb.nn.Linear4bit: "4-bit"}


def check_versions() -> None:
    """Raise Unsupported for a PEFT or bitsandbytes whose layers this module has not been tested with."""
    for name, supported in SUPPORTED_VERSIONS.items():
        installed = version(name)
        if not installed.startswith(f"{supported}."):
            raise Unsupported(
                f"fastdora supports {name} {supported}, not {installed}; pip install '{name}=={supported}.*'"
            )


def accelerate(model: nn.Module, fp8: bool = False) -> str:
    """Switch every adapted or quantized linear layer of `model` to its fast path, in place; return a summary line.

    fp8: multiply 8-bit weights in e4m3. Raises Unsupported, before anything is changed, for an adapted layer or an
    installed library without a fast path, and for fp8 without 8-bit weights or on a GPU without e4m3. Adapter files
    stay PEFT's. Another call invalidates all norms and includes modules that a later adapter has added.
    """
    check_versions()
    group = check_layers(model)
    if fp8:
        _check_fp8(model)
    paths: Counter[str] = Counter()
    for module in group:
        module._group = group
        if type(module) in FAST_CLASSES:
            # The class alone is exchanged, as PEFT has no hook for it: parameters, names and adapter files stay.
            module.__class__ = FAST_CLASSES[type(module)]
            module.register_load_state_dict_post_hook(Fast.invalidate)
        module.invalidate()
        method = "DoRA" if any(module.use_dora.values()) else "LoRA"
        paths[f"{BASE_BITS[type(module.base_layer)]} {method}"] += 1
    bases = {id(module.base_layer) for module in group}
    for module in model.modules():
        for names in SIBLINGS:
            siblings = [layer for name in names if isinstance(layer := getattr(module, name, None), Fast)]
            for layer in siblings:
                layer._siblings = [other for other in siblings if other is not layer]
        if isinstance(module, bnb.nn.Linear8bitLt | bnb.nn.Linear4bit):
            module.forward = types.MethodType(quantized.frozen_forward, module)
            module.fp8_matmul = fp8 and isinstance(module, bnb.nn.Linear8bitLt)
            if id(module) not in bases:
                paths[f"{BASE_BITS[type(module)]} frozen"] += 1
    counts = ", ".join(f"{count} {path}" for path, count in sorted(paths.items()))
    return f"{counts} layers; {'fp8' if fp8 else '16-bit'} matmuls"


def check_layers(model: nn.Module) -> list[LoraLayer]:
    """The adapted layers of `model`. Raises Unsupported naming the first that has no fast path."""
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, module in adapted.items():
        kind = type(module.base_layer).__name__
        if type(module) not in FAST_CLASSES and not isinstance(module, Fast):
            raise Unsupported(f"{name}: {type(module).__name__} adapters have no fast path; target linear layers only")
        if type(module.base_layer) not in BASE_BITS:
            raise Unsupported(f"{name}: {kind} layers have no fast path; target linear layers only")
        if not isinstance(module, PEFT_CLASSES[type(module.base_layer)]):
            raise Unsupported(
                f"{name}: PEFT adapted {kind} as a layer of another number of bits; set the model's is_loaded_in_8bit "
                "or is_loaded_in_4bit before adding the adapter"
            )
        for adapter, layer in module.lora_dropout.items():
            probability = getattr(layer, "p", 0.0)  # an Identity where it is 0
            _check_adapter(name, adapter, module.lora_variant.get(adapter), module.lora_bias[adapter], probability)
        if module.base_layer.weight.requires_grad:
            raise Unsupported(f"{name}: a trainable base weight has no fast path; freeze it")
        if module.base_layer.bias is not None and module.base_layer.bias.requires_grad:
            raise Unsupported(f"{name}: a trainable bias has no fast path; set bias: none")
    return list(adapted.values())


def _check_adapter(where: str, adapter: str, variant, bias: bool, dropout: float) -> None:
    if variant is not None and not isinstance(variant, DoraLinearVariant):
        raise Unsupported(f"{where}: {type(variant).__name__} of adapter '{adapter}' has no fast path")
    if bias:
        raise Unsupported(f"{where}: a bias in lora_B has no fast path; leave lora_bias out")
    if dropout >= 1:
        raise Unsupported(
            f"{where}: lora_dropout {dropout} drops every input of adapter '{adapter}'; set it to less than 1"
        )


def _check_fp8(model: nn.Module) -> None:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear8bitLt)}
    if not layers:
        raise Unsupported("no layer has 8-bit weights, which fp8 matmuls need; leave fp8 out")
    for name, layer in layers.items():
        if layer.in_features % 16 or layer.out_features % 16:  # torch._scaled_mm takes no other sizes
            sizes = f"{layer.in_features} x {layer.out_features}"
            raise Unsupported(f"{name}: fp8 matmuls take multiples of 16, not {sizes}; leave fp8 out")
    for device in {layer.weight.device for layer in layers.values()}:
        if device.type == "cuda" and not quantized.has_fp8(device):
            raise Unsupported(f"{torch.cuda.get_device_name(device)} has no fp8 matmuls; leave fp8 out")
