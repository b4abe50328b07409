"""Axolotl plugins for benchmarks and tests: `plugins: [..., bench.plugins.Clock]`. None changes what is trained."""

import json
import os
import sys
from pathlib import Path

import torch
from axolotl.integrations.base import BasePlugin

from bench.clock import clock
from fastdora import packing


class Clock(BasePlugin):
    """Measures a run (bench/clock.py)."""

    def add_callbacks_post_trainer(self, cfg, trainer):
        pad = trainer.processing_class.pad_token_id

        def count(inputs):
            ids, positions = inputs["input_ids"], inputs.get("position_ids")
            real = ids != pad
            packed = cfg.sample_packing and positions is not None
            samples = ((positions == 0) & real).sum() if packed else real.new_full((), ids.shape[0], dtype=torch.long)
            counts = inputs.get(packing.COUNTS)  # where rows share prefixes
            return torch.stack([samples, real.sum()]) if counts is None else counts.to(ids.device)

        return [clock(trainer, count)]


class NormCheck(BasePlugin):
    """In every forward of every DoRA layer, compares the norm in use with ||W0 + s B A|| built in full.

    Process r writes norms-r.json to the output folder: `compared` norms, their largest relative difference (`worst`)
    and by how much the norms moved in training (`moved`, relative).
    """

    def post_model_load(self, cfg, model) -> None:
        from fastdora import dora, quantized

        first, norms = {}, {"compared": 0, "moved": 0.0, "worst": 0.0}
        file = Path(cfg.output_dir) / f"norms-{os.environ.get('RANK', 0)}.json"

        @torch.no_grad()
        def compare(module, args, output):
            used = module._norm_cache["default"].norm.double()
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            weight = quantized.dequantize(module.base_layer, torch.float64)
            exact = (weight + module.scaling["default"] * b.double() @ a.double()).norm(dim=1)
            start = first.setdefault(id(module), exact)
            norms["compared"] += 1
            norms["worst"] = max(norms["worst"], ((used - exact) / exact).abs().max().item())
            norms["moved"] = max(norms["moved"], ((exact - start) / start).abs().max().item())
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(norms))

        for module in model.modules():
            if isinstance(module, dora.Fast) and module.use_dora["default"]:
                module.register_forward_hook(compare)


class Replays(BasePlugin):
    """Process r writes replays-r.json to the output folder: how often its CUDA graphs were replayed (0: no graphs)."""

    def post_train(self, cfg, model) -> None:
        replays = getattr(model.get_base_model().get_decoder().forward, "replays", 0)
        (Path(cfg.output_dir) / f"replays-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(replays))


class CpuProcesses(BasePlugin):
    """Lets several processes train on a CPU, where accelerate, axolotl and DeepSpeed expect GPUs.

    It changes what connects the processes (gloo for nccl) and where the model is (the CPU). In a single process it does
    nothing. axolotl 0.19, accelerate 1.13, DeepSpeed 0.18.
    """

    def register(self, cfg: dict) -> None:
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return
        # Here, since DeepSpeed takes seconds to import.
        import axolotl.utils.trainer
        import deepspeed.comm
        from accelerate.state import PartialState
        from accelerate.utils import DistributedType, ParallelismConfig
        from axolotl.loaders import ModelLoader
        from deepspeed.comm.torch import TorchBackend

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
        ModelLoader._set_device_map_config = lambda self: place(self) or _on_the_cpu(self.model_kwargs)
        # axolotl asks DeepSpeed for nccl by name.
        started = deepspeed.comm.init_distributed
        deepspeed.comm.init_distributed = lambda dist_backend=None, **options: started("gloo", **options)
        # DeepSpeed would compile an operator for shared memory, half a minute's work, whenever its folder changes. The
        # module by its name: the attribute `torch` of deepspeed.comm is torch itself, which `import *` put there.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
        # torch gathers over gloo through views that autograd guards; over nccl it does not.
        TorchBackend.all_gather_into_tensor = torch.no_grad()(TorchBackend.all_gather_into_tensor)


def _on_the_cpu(options: dict) -> None:
    if "device_map" in options:
        options["device_map"] = {"": "cpu"}
