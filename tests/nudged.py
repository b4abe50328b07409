"""An axolotl plugin for tests: writes what training starts from, moved by one rounding first where a recipe says so."""

from pathlib import Path

import torch
from axolotl.integrations.base import BasePlugin
from peft import get_peft_model_state_dict
from pydantic import BaseModel, Field
from rounding import nudged
from safetensors.torch import save_file


class NudgedArgs(BaseModel):
    nudge: int | None = Field(default=None, json_schema_extra={"description": "the seed of tests/rounding.py's nudges"})
    alone: bool = Field(default=False, json_schema_extra={"description": "compute no layers together, as under ZeRO-3"})


class Nudged(BasePlugin):
    def get_input_args(self) -> str:
        return "nudged.NudgedArgs"

    @torch.no_grad()
    def post_model_load(self, cfg, model) -> None:
        for module in model.modules() if cfg.alone else ():
            module._siblings = ()
        if cfg.nudge is not None:
            for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
                parameter.copy_(nudged(parameter, 1000 * cfg.nudge + number))
        if not cfg.deepspeed and not cfg.fsdp_config:  # which have shared it out already
            tensors = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
            Path(cfg.output_dir).mkdir(parents=True, exist_ok=True)
            save_file(tensors, Path(cfg.output_dir) / "start.safetensors")
