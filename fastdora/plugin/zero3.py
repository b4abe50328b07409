"""DeepSpeed 0.18.9 with adapters under axolotl 0.19.0: refused recipes and a patch for ZeRO-3, one for all stages."""

import functools
import json
import os
from pathlib import Path
from typing import Any

import axolotl.loaders.model
import torch

from fastdora.plugin.keys import RecipeError


def prepare(cfg) -> None:
    """Call before the model is loaded. Does nothing unless axolotl has set up ZeRO stage 3.

    Raises RecipeError for a recipe that would fail in its first step. Keeps DeepSpeed's configuration alive:
    transformers holds it by a weak reference, and axolotl drops it when the base model is built. From then on
    `is_deepspeed_zero3_enabled()` is false in PEFT, which therefore does not gather the partitioned base weight, and
    DoRA's magnitude is taken from a weight of size 0 ("The size of tensor a (0) must match the size of tensor b").
    Also sets bf16 where the recipe does: "auto" is resolved when training begins, and until then `zero.Init` would
    build a 16-bit base in float32.
    """
    if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") != "3":
        return
    check(cfg, cfg.axolotl_config_path)
    original = axolotl.loaders.model.HfTrainerDeepSpeedConfig
    if getattr(original, "kept", None) is None:
        kept = []

        def made(config):
            kept.append(original(config))
            kept[-1].config["bf16"] = {"enabled": bool(cfg.bf16)}
            return kept[-1]

        made.kept = kept
        axolotl.loaders.model.HfTrainerDeepSpeedConfig = made


def check(recipe: dict[str, Any], source: str) -> None:
    """Raise RecipeError where a recipe whose `deepspeed:` is a file of stage 3 cannot train an adapter.

    Checkpointing that is not re-entrant compares the tensors it recomputes with those it saved; DeepSpeed has released
    the frozen weights among them by then (torch.utils.checkpoint keeps tensors without gradient undetached, and
    DeepSpeed empties `param.data`), so the first backward ends in a CheckpointError. Parameters below the persistence
    threshold are gathered into one buffer of one dtype after each step (`_allgather_params_coalesced`), which norms,
    adapters and 8- or 4-bit weights do not share.
    """
    if recipe.get("gradient_checkpointing"):
        kwargs = recipe.get("gradient_checkpointing_kwargs") or {}
        if not kwargs.get("use_reentrant", True):
            raise RecipeError(f"{source}: key 'gradient_checkpointing_kwargs': ZeRO-3 needs use_reentrant: true")
    config = recipe["deepspeed"]
    if not isinstance(config, dict):
        config = json.loads(Path(config).read_text(encoding="utf-8"))
    threshold = config["zero_optimization"].get("stage3_param_persistence_threshold")
    if threshold != 0:
        key = "zero_optimization.stage3_param_persistence_threshold"
        raise RecipeError(f"{source}: key 'deepspeed': ZeRO-3 with an adapter needs {key}: 0")


def restore_frequencies(model) -> None:
    """Rotary frequencies in float32 again: within `zero.Init` every new tensor takes the weights' dtype.

    In bf16 they are off by up to 0.4%, so that positions of a few hundred tokens are off by radians.
    """
    for module in model.modules():
        old = module._buffers.get("inv_freq")
        if old is not None and old.dtype != torch.float32:
            for name, buffer in type(module)(module.config).named_buffers():
                module.register_buffer(name, buffer.to(old.device), persistent=False)


def keep_dtypes(trainer) -> None:
    """Train under bf16 as without DeepSpeed: A, B, magnitude and their gradients in float32, matmuls under autocast.

    DeepSpeed's own bf16 casts the whole model (`_configure_distributed_model`), so that a magnitude of 1 moves in steps
    of 1/128, and sums gradients in bf16; accelerate leaves autocast to it. With bf16 disabled the engine keeps every
    parameter's dtype.
    """
    if trainer.is_deepspeed_enabled and trainer.args.bf16:
        trainer.accelerator.state.deepspeed_plugin.deepspeed_config["bf16"] = {"enabled": False}
        kind = trainer.args.device.type
        trainer.compute_loss_context_manager = functools.partial(torch.autocast, kind, torch.bfloat16)
