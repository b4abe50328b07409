"""An axolotl plugin for tests: several processes on a CPU, where accelerate, axolotl and DeepSpeed expect GPUs.

A recipe names it in `plugins:` beside fastdora's. It changes what joins the processes (gloo for nccl) and where the
model lies (the CPU), nothing of how it is trained. In a single process it does nothing.
"""

import os

import deepspeed.comm
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from axolotl.integrations.base import BasePlugin
from deepspeed.comm.torch import TorchBackend


def several() -> bool:
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


class CpuProcesses(BasePlugin):
    def register(self, cfg: dict) -> None:
        if several():
            # accelerate starts gloo only under the Trainer's `use_cpu`, which axolotl does not set.
            PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_CPU)
            # axolotl asks DeepSpeed for nccl by name.
            started = deepspeed.comm.init_distributed
            deepspeed.comm.init_distributed = lambda dist_backend=None, **options: started("gloo", **options)
            # torch gathers over gloo through views that autograd guards; over nccl it does not.
            TorchBackend.all_gather_into_tensor = torch.no_grad()(TorchBackend.all_gather_into_tensor)

    def load_datasets(self, cfg, preprocess: bool = False) -> None:
        if several():
            cfg.device_map = {"": "cpu"}  # axolotl's is the process's number, which means a GPU
