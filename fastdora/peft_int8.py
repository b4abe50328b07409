"""PEFT's DoRA on a bitsandbytes 8-bit base, mended (peft 0.20.0).

Two faults: on a CPU, dequantising calls `.to("cpu")` on the weight, which brings back its `CB` without `SCB`, so the
second forward fails; on a GPU the result is float32, which flash attention refuses and everything else pays for.
"""

from functools import wraps

import bitsandbytes as bnb
import torch
from peft.tuners.lora import dora


def mend() -> None:
    """Replace PEFT's two functions in place; calling it again changes nothing."""
    if getattr(dora.dequantize_module_weight, "mended", False):
        return
    dora.dequantize_module_weight = _dequantize(dora.dequantize_module_weight)
    dora.DoraLinearLayer.forward = _in_input_dtype(dora.DoraLinearLayer.forward)


def _dequantize(original):
    @wraps(original)
    def dequantize(module: torch.nn.Module) -> torch.Tensor:
        weight = module.weight
        if not isinstance(weight, bnb.nn.Int8Params):
            return original(module)
        # The scales move from the weight to the layer's state at the first forward.
        scales = module.state.SCB if module.state.SCB is not None else weight.SCB
        return bnb.functional.int8_vectorwise_dequant(weight.data, scales.to(weight.device))

    dequantize.mended = True
    return dequantize


def _in_input_dtype(original):
    @wraps(original)
    def forward(self, x, **kwargs):
        return original(self, x, **kwargs).to(x.dtype)

    return forward
