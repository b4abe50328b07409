"""An axolotl plugin for tests: train in bf16 on a CPU, whatever the CPU is faster in.

A recipe names it in `plugins:` after fastdora's. The base model is then in bf16 and matmuls run under autocast.
"""

import os

from axolotl.integrations.base import BasePlugin

from fastdora.plugin import plugin


class Bf16(BasePlugin):
    def register(self, cfg: dict) -> None:
        cfg["bf16"] = True
        # The loader's threads would be the first to work in parallel in a forked process, where torch has no pool.
        os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
        plugin.allow_bf16_on_cpu()
