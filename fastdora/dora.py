"""DoRA, LoRA and rsLoRA layers of PEFT at the speed of one product, on 16-, 8- and 4-bit bases.

DoRA (arXiv 2402.09353, equation 5): y = m / ||W0 + s B A|| * (W0 x + s B A x) + bias, the norm taken per row of the
weight as torch stores it and held constant in back-propagation (section 4.3); s = alpha / r, rsLoRA alpha / sqrt(r).
With g = m / ||.|| and z = x W0^T + s dropout(x) A^T B^T the layer is y = g z + bias, and its gradients are

    dz = g dy      dm = sum_T(dy z) / ||.||      dt = s dz B      dA = dt^T dropout(x)      dB = s dz^T t
    dx = dz W0 + dropout(dt A)                   where t = dropout(x) A^T

Dropout touches the low-rank path only (PEFT lets it into the product with W0 too). Neither B A nor W0 + s B A is built:

    ||w_i + s b_i A||^2 = ||w_i||^2 + 2 s (W0 A^T)_i . b_i + s^2 b_i (A A^T) b_i^T      (float64; float32 in kernels.py)

The first term is computed once, the others once per optimizer step: every step of any torch optimizer in the process
(bitsandbytes', fused and DeepSpeed's inner ones among them) moves a counter of ours that stale norms are told by.
Tensors' version counters, which tell of other edits, are not enough: bitsandbytes, fused optimizers and ZeRO write
without moving them.

    model = get_peft_model(...); fastdora.accelerate(model)
"""

import operator
import types
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version

import bitsandbytes as bnb
import torch
from peft.tuners import lora
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastdora import kernels, quantized

WIDENED = 2**29  # bytes of 4-bit weights that may be widened at once for their norms

_steps = 0  # optimizer steps in this process


def _count_step(*_) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


class Unsupported(Exception):
    """A layer or a library without a fast path. Its text is one line that names it and what to do."""


@dataclass
class _Known:
    numbers: tuple  # _state when it was computed
    parts: tuple
    norm: torch.Tensor  # ||W0 + s B A||, (N,)
    gain: torch.Tensor  # m / norm, (N,)


def norm_and_gain(
    layer: nn.Module, a: torch.Tensor, b: torch.Tensor, m: torch.Tensor, s: float, base_square: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """||W0 + s B A|| per row, at least the smallest normal number, and m over it; both (N,), in a's wide dtype.

    a (R, K), b (N, R), m (N,); base_square: ||W0||^2 per row, (N,). In float64, since the terms may be far larger than
    their sum; where they cancel to what base_square's rounding leaves, the norm is taken as that large. A row of zeros
    has no direction: its gain is 0, so it stays zero (PEFT divides by zero there).
    """
    unresolved = base_square.double() * 8 * torch.finfo(base_square.dtype).eps
    dtype, a, b = kernels.wide(a.dtype), a.double(), b.double()
    wa = quantized.widen(layer, torch.float64) @ a.t()
    square = base_square.double() + ((2 * s * wa + s * s * (b @ (a @ a.t()))) * b).sum(1)
    norm = torch.maximum(square, unresolved).sqrt()
    gain = torch.where(norm > 0, m.double() / norm, 0.0)
    return norm.to(dtype).clamp_min(torch.finfo(dtype).tiny), gain.to(dtype)


class _Adapted(torch.autograd.Function):
    """The formulas above for x (T, K); `m`, `norm` and `gain` are None for LoRA."""

    @staticmethod
    def forward(ctx, x, a, b, m, norm, gain, layer, s, p, seed, fp8):
        base = quantized.forward_product(x, layer, fp8)
        a16, b16 = a.to(x.dtype), b.to(x.dtype).contiguous()
        t = kernels.low_rank(x, a16, 1.0, p, seed)
        y = kernels.combine(base, t, b16, s, gain, layer.bias)
        ctx.save_for_backward(x, a16, b16, norm, gain, t, None if m is None else base)
        ctx.layer, ctx.s, ctx.p, ctx.seed, ctx.fp8 = layer, s, p, seed, fp8
        ctx.dtypes = a.dtype, b.dtype, None if m is None else m.dtype
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, a, b, norm, gain, t, base = ctx.saved_tensors
        s, p, seed = ctx.s, ctx.p, ctx.seed
        a_dtype, b_dtype, m_dtype = ctx.dtypes
        dz, dm, db = kernels.combine_backward(dy.contiguous(), base, t, b, s, gain, norm)
        dt = kernels.low_rank(dz, b.t(), s, 0.0, seed)
        dx = quantized.backward_product(dz, ctx.layer, ctx.fp8) if ctx.needs_input_grad[0] else None
        da = kernels.low_rank_backward(dt, x, a, dx, p, seed)
        dm = None if dm is None else dm.to(m_dtype)
        return dx, da.to(a_dtype), db.to(b_dtype), dm, None, None, None, None, None, None, None


class Fast:
    """Mixed into PEFT's LoRA layers by `accelerate`: the forward above, for one active adapter that is not merged."""

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(names) != 1 or args or kwargs:
            return super().forward(x, *args, **kwargs)
        name = names[0]
        s, layer = self.scaling[name], self.base_layer
        p = self.dropout_of(name)
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        m = norm = gain = None
        if self.use_dora[name]:
            m, known = self.lora_magnitude_vector[name].weight, self.known(name)
            norm, gain = known.norm, known.gain
        x = quantized.in_compute_dtype(x)
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        seed = kernels.draw_seed() if p else (1, 0)
        y = _Adapted.apply(flat, a, b, m, norm, gain, layer, s, p, seed, getattr(layer, "fp8_product", False))
        return y.view(*x.shape[:-1], y.shape[-1])

    def dropout_of(self, name: str) -> float:
        """The share of inputs that the low-rank path drops at this moment."""
        dropout = self.lora_dropout[name]
        return dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0

    @torch.compiler.disable  # else it is compiled anew for each step's count
    def known(self, name: str) -> _Known:
        """Norm and gain of this moment's weights; computed anew only when one of them may have changed."""
        if not self._is_known(name):
            kind = self.lora_A[name].weight.device.type
            # Not in inference mode: training may be what uses them next, and could not save them.
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(kind, enabled=False):
                own = self._parts(name)
                if _fits_kernel(own) and _is_whole(self, name):
                    _refresh(self._group, name, own)
                else:
                    found = norm_and_gain(self.base_layer, own.a, own.b, own.m, own.s, own.base_square)
                    self._known[name] = _Known(*self._state(name), *found)
        return self._known[name]

    def _is_known(self, name: str) -> bool:
        if (known := self._known.get(name)) is None:
            return False
        numbers, parts = self._state(name)
        return known.numbers == numbers and all(map(operator.is_, known.parts, parts))

    def _state(self, name: str) -> tuple[tuple, tuple]:
        """What norms are told stale by: steps, scale and edits that torch has seen; and the tensors themselves."""
        parts = self.lora_A[name].weight, self.lora_B[name].weight, self.lora_magnitude_vector[name].weight
        versions = (None if part.is_inference() else part._version for part in parts)
        return (_steps, self.scaling[name], *versions), parts

    def _parts(self, name: str) -> kernels.Adapted:
        layer, a = self.base_layer, self.lora_A[name].weight
        if self._base_square is None:
            weight = quantized.widen(layer, kernels.wide(a.dtype))
            square = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64).square()
            self._base_square = square.float() if kernels.fused(layer.weight) else square
        if isinstance(layer.weight, bnb.nn.Params4bit) and a.is_cuda:
            weight, scales = quantized.widen(layer, torch.bfloat16), None
        else:
            weight, scales = layer.weight.data, quantized.int8_scales(layer) if quantized.is_int8(layer) else None
        m = self.lora_magnitude_vector[name].weight
        return kernels.Adapted(weight, scales, a, self.lora_B[name].weight, m, self.scaling[name], self._base_square)

    def forget(self, *_) -> None:
        """Compute norms anew at the next forward."""
        self._known, self._base_square = {}, None

    def merge(self, *args, **kwargs) -> None:
        super().merge(*args, **kwargs)
        self.forget()

    def unmerge(self) -> None:
        super().unmerge()
        self.forget()

    def update_layer(self, adapter_name, r, lora_alpha, config, **kwargs) -> None:
        variant = self.resolve_lora_variant(config=config)
        _check_adapter(f"adapter '{adapter_name}'", adapter_name, variant, config.lora_bias, config.lora_dropout)
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)
        self.forget()

    def train(self, mode: bool = True):
        if mode != self.training:  # the Trainer calls it at each micro-batch
            self.forget()
        return super().train(mode)

    def _apply(self, *args, **kwargs):  # every cast and every move of a module comes through here
        self.forget()
        return super()._apply(*args, **kwargs)


def _fits_kernel(parts: kernels.Adapted) -> bool:
    small = [x for x in (parts.a, parts.b, parts.m, parts.base_square, parts.scales) if x is not None]
    return (
        kernels.fused(parts.weight)
        and parts.weight.is_contiguous()
        and parts.a.shape[0] <= kernels.LARGEST_RANK
        and all(x.dtype == torch.float32 and x.is_contiguous() for x in small)
    )


def _is_whole(module: "Fast", name: str) -> bool:
    """Whether a layer's tensors are all here: ZeRO-3 and FSDP gather them in the layer's own forward alone."""
    if name not in module.lora_A or not module.use_dora[name] or module.merged:
        return False
    tensors = (module.base_layer.weight, module.lora_A[name].weight, module.lora_magnitude_vector[name].weight)
    return all(x.numel() and not hasattr(x, "placements") for x in tensors)


def _refresh(group: list["Fast"], name: str, own: kernels.Adapted) -> None:
    """Norms and gains of all layers of a group that are stale and like `own` in kind, together.

    Weights of 4 bits are widened for it, so those go a few at a time.
    """
    found, widened = [], 0

    def finish() -> None:
        for (module, _), pair in zip(found, kernels.row_norms([parts for _, parts in found]), strict=True):
            module._known[name] = _Known(*module._state(name), *pair)
        found.clear()

    for module in group:
        if module._is_known(name) or not _is_whole(module, name):
            continue
        parts = module._parts(name)
        alike = parts.weight.dtype == own.weight.dtype and parts.a.shape == (own.a.shape[0], parts.weight.shape[1])
        if alike and parts.a.device == own.a.device and _fits_kernel(parts):
            found.append((module, parts))
            widened += parts.weight.nbytes * (parts.weight.data_ptr() != module.base_layer.weight.data_ptr())
        if widened > WIDENED:
            finish()
            widened = 0
    if found:
        finish()


class FastLinear(Fast, lora.Linear):
    """LoRA or DoRA on an nn.Linear."""


class FastLinear8bit(Fast, lora.Linear8bitLt):
    """LoRA or DoRA on bitsandbytes' Linear8bitLt."""


class FastLinear4bit(Fast, lora.Linear4bit):
    """LoRA or DoRA on bitsandbytes' Linear4bit."""


KNOWN = {"peft": "0.20", "bitsandbytes": "0.50"}
FAST = {lora.Linear: FastLinear, lora.Linear8bitLt: FastLinear8bit, lora.Linear4bit: FastLinear4bit}
PEFTS = {nn.Linear: lora.Linear, bnb.nn.Linear8bitLt: lora.Linear8bitLt, bnb.nn.Linear4bit: lora.Linear4bit}
BASES = {nn.Linear: "16-bit", bnb.nn.Linear8bitLt: "8-bit", bnb.nn.Linear4bit: "4-bit"}


def check_versions() -> None:
    """Raise Unsupported for a PEFT or bitsandbytes whose layers this module has not been held against."""
    for name, known in KNOWN.items():
        found = version(name)
        if not found.startswith(f"{known}."):
            raise Unsupported(f"fastdora knows {name} {known}, not {found}; run pip install '{name}=={known}.*'")


def accelerate(model: nn.Module, fp8: bool = False) -> str:
    """Give every adapted or quantised linear layer of `model` its fast path, in place; return a line that says which.

    fp8: products with 8-bit weights in e4m3. Raises Unsupported, before anything is changed, for an adapted layer or an
    installed library that has no fast path, and for fp8 without 8-bit weights or a GPU that has it. Adapter files stay
    PEFT's. Called again it takes all norms anew, and sees to modules that an adapter added since has made.
    """
    check_versions()
    group = check_layers(model)
    if fp8:
        _check_fp8(model)
    paths: Counter[str] = Counter()
    for module in group:
        module._group = group
        if type(module) in FAST:
            module.__class__ = FAST[type(module)]
            module.register_load_state_dict_post_hook(Fast.forget)
        module.forget()
        method = "DoRA" if any(module.use_dora.values()) else "LoRA"
        paths[f"{BASES[type(module.base_layer)]} {method}"] += 1
    bases = {id(module.base_layer) for module in group}
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear8bitLt | bnb.nn.Linear4bit):
            module.forward = types.MethodType(quantized.frozen_forward, module)
            module.fp8_product = fp8 and isinstance(module, bnb.nn.Linear8bitLt)
            if id(module) not in bases:
                paths[f"{BASES[type(module)]} frozen"] += 1
    product = "fp8" if fp8 else "16-bit"
    return f"{', '.join(f'{count} {kind}' for kind, count in sorted(paths.items()))} layers; {product} products"


def check_layers(model: nn.Module) -> list[LoraLayer]:
    """The adapted layers of `model`. Raises Unsupported naming the first that has no fast path."""
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, module in adapted.items():
        kind = type(module.base_layer).__name__
        if type(module) not in FAST and not isinstance(module, Fast):
            raise Unsupported(f"{name}: {type(module).__name__} adapters have no fast path; target linear layers only")
        if type(module.base_layer) not in BASES:
            raise Unsupported(f"{name}: {kind} layers have no fast path; target linear layers only")
        if not isinstance(module, PEFTS[type(module.base_layer)]):
            raise Unsupported(
                f"{name}: PEFT took {kind} for another number of bits; set the model's is_loaded_in_8bit or "
                "is_loaded_in_4bit before its adapter is made"
            )
        for adapter, dropout in module.lora_dropout.items():
            share = getattr(dropout, "p", 0.0)
            _check_adapter(name, adapter, module.lora_variant.get(adapter), module.lora_bias[adapter], share)
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
        raise Unsupported(f"{where}: lora_dropout {dropout} leaves nothing of adapter '{adapter}'; give less than 1")


def _check_fp8(model: nn.Module) -> None:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear8bitLt)}
    if not layers:
        raise Unsupported("no layer has 8-bit weights, which fp8 products need; leave fp8 out")
    for name, layer in layers.items():
        if layer.in_features % 16 or layer.out_features % 16:
            sizes = f"{layer.in_features} x {layer.out_features}"
            raise Unsupported(f"{name}: fp8 products take multiples of 16, not {sizes}; leave fp8 out")
    for device in {layer.weight.device for layer in layers.values()}:
        if device.type == "cuda" and not quantized.has_fp8(device):
            raise Unsupported(f"{torch.cuda.get_device_name(device)} has no fp8 products; leave fp8 out")
