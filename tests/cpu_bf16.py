"""An axolotl plugin for tests: train in bf16 on a CPU, as GPUs do, which axolotl refuses.

A recipe names it in `plugins:` after fastdora's. The base model is then in bf16 and matmuls run under autocast.
"""

import os

import axolotl.cli.config
import axolotl.utils.trainer
import torch
import transformers.training_args
from axolotl.integrations.base import BasePlugin

from fastdora.plugin import plugin

_capabilities = axolotl.cli.config.gpu_capabilities


def _with_bf16():
    capabilities, environment = _capabilities()
    return capabilities | {"bf16": True}, environment


class Bf16(BasePlugin):
    def register(self, cfg: dict) -> None:
        cfg["bf16"] = True
        # The loader's threads would be the first to work in parallel in a forked process, where torch has no pool.
        os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
        axolotl.cli.config.gpu_capabilities = plugin.gpu_capabilities = _with_bf16
        transformers.training_args.is_torch_bf16_gpu_available = lambda: True
        axolotl.utils.trainer.is_torch_bf16_gpu_available = lambda: True

    def pre_model_load(self, cfg) -> None:
        cfg.torch_dtype = torch.bfloat16
