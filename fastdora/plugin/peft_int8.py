"""Fixes for PEFT's DoRA on bitsandbytes' 8- and 4-bit weights (peft 0.20.0, bitsandbytes 0.50.2).

Three faults. 8-bit on a CPU: dequantizing calls `.to("cpu")` on the weight and brings back its `CB` without `SCB`, so
the second forward fails. 8-bit on a GPU: the result is float32, which flash attention refuses and which slows down
all else. 4-bit on a CPU with AVX-512 BF16: the first forward in evaluation mode repacks the weights in place, and PEFT
reads them afterwards as if it had not: the norms, and with them the outputs, are wrong without an error.
"""

from functools import wraps

import bitsandbytes as bnb
import torch
from peft.tuners.lora import dora


def patch() -> None:
    """Replace the functions in place, before a model is loaded; calling it again changes nothing."""
    if getattr(dora.dequantize_module_weight, "patched", False):
        return
    bnb.nn.modules.has_avx512bf16 = lambda: False  # read when a layer is made: none is repacked
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

    dequantize.patched = True
    return dequantize


def _in_input_dtype(original):
    @wraps(original)
    def forward(self, x, **kwargs):
        return original(self, x, **kwargs).to(x.dtype)

    return forward
