"""An axolotl plugin for tests: in every forward of every DoRA layer, the norm in use against the norm built in full.

Ends the run where they differ by more than $NORM_TOLERANCE. The first process writes how many it compared, by how much
they differed at most, and by how much norms moved, to norms.json.
"""

import json
import os
from pathlib import Path

import torch
from axolotl.integrations.base import BasePlugin
from rounding import FACTOR

from fastdora import dora, quantized

# Relative: a norm is computed in float64 on a CPU, of weights rounded to float32, and rounded itself.
TOLERANCE = float(os.environ.get("NORM_TOLERANCE", FACTOR * torch.finfo(torch.float32).eps))


class NormCheck(BasePlugin):
    def post_model_load(self, cfg, model) -> None:
        first, found = {}, {"compared": 0, "moved": 0.0, "worst": 0.0}

        @torch.no_grad()
        def compare(module, args, output):
            used = module._norm_cache["default"].norm.double()
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            weight = quantized.dequantize(module.base_layer, torch.float64)
            exact = (weight + module.scaling["default"] * b.double() @ a.double()).norm(dim=1)
            worst = ((used - exact) / exact).abs().max().item()
            assert worst < TOLERANCE, f"a norm in use is off by {worst}"
            start = first.setdefault(id(module), exact)
            found["compared"] += 1
            found["worst"] = max(found["worst"], worst)
            found["moved"] = max(found["moved"], ((exact - start) / start).abs().max().item())
            if os.environ.get("RANK", "0") == "0":
                (Path(cfg.output_dir) / "norms.json").write_text(json.dumps(found))

        for module in model.modules():
            if isinstance(module, dora.Fast) and module.use_dora["default"]:
                module.register_forward_hook(compare)
