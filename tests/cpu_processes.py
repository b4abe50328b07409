"""An axolotl plugin for tests: several processes on a CPU, where accelerate, axolotl and DeepSpeed expect GPUs.

A recipe names it in `plugins:` beside fastdora's. It changes what joins the processes (gloo for nccl) and where the
model lies (the CPU), nothing of how it is trained. In a single process it does nothing.
"""

import os

import axolotl.utils.trainer
import deepspeed.comm
import deepspeed.comm.torch
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType, ParallelismConfig
from axolotl.integrations.base import BasePlugin
from axolotl.loaders import ModelLoader
from deepspeed.comm.torch import TorchBackend


def several() -> bool:
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


class CpuProcesses(BasePlugin):
    def register(self, cfg: dict) -> None:
        if several():
            # accelerate starts gloo only under the Trainer's `use_cpu`, which axolotl does not set; FSDP on GPUs only.
            kind = DistributedType.MULTI_GPU if cfg.get("fsdp_config") else DistributedType.MULTI_CPU
            PartialState._prepare_backend = lambda self, *args: ("gloo", kind)
            PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
            # axolotl builds FSDP2's mesh of CUDA devices.
            mesh = ParallelismConfig.build_device_mesh
            ParallelismConfig.build_device_mesh = lambda self, device: mesh(self, "cpu")
            # axolotl asks CUDA whether GPUs reach each other; a CUDA build of torch raises there in a forked process.
            axolotl.utils.trainer.check_cuda_p2p_ib_support = lambda: True
            # And it places models on the process's number, which means a GPU.
            place = ModelLoader._set_device_map_config
            ModelLoader._set_device_map_config = lambda self: place(self) or on_the_cpu(self.model_kwargs)
            # axolotl asks DeepSpeed for nccl by name.
            started = deepspeed.comm.init_distributed
            deepspeed.comm.init_distributed = lambda dist_backend=None, **options: started("gloo", **options)
            # DeepSpeed would compile a way through shared memory, half a minute's work, at each change of folders.
            deepspeed.comm.torch.build_shm_op = lambda: None
            # torch gathers over gloo through views that autograd guards; over nccl it does not.
            TorchBackend.all_gather_into_tensor = torch.no_grad()(TorchBackend.all_gather_into_tensor)


def on_the_cpu(options: dict) -> None:
    if "device_map" in options:
        options["device_map"] = {"": "cpu"}
