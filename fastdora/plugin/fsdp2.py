"""FSDP2 (torch's `fully_shard` under axolotl 0.19.0, accelerate 1.13) with adapters: refused recipes, two patches."""

import os
from pathlib import Path
from typing import Any

import axolotl.monkeypatch.accelerate.fsdp2
from axolotl.integrations.expert_parallel.shard import save_fsdp2_lora_adapter

from fastdora.plugin.keys import RecipeError


def prepare(cfg) -> None:
    """Call before the model is loaded. Does nothing unless the recipe has an `fsdp_config:`.

    Raises RecipeError for a recipe that would fail, or train something else. Keeps A, B and magnitude in the group of
    their decoder layer: axolotl gives each a group of its own (`_process_lora_module_for_fsdp`), which is gathered only
    while that small module's own forward runs, and neither fastdora's layers nor DoRA's norm call it.
    """
    if not cfg.fsdp_config:
        return
    check(cfg, cfg.axolotl_config_path)
    axolotl.monkeypatch.accelerate.fsdp2._process_lora_module_for_fsdp = lambda module, options: False


def check(recipe: dict[str, Any], source: str) -> None:
    """Raise RecipeError where a recipe with an `fsdp_config:` cannot train an adapter, or not the same one.

    - bitsandbytes' optimizers have no rule for sharded tensors ("does not have a sharding strategy registered").
    - accelerate's FULL_STATE_DICT writes the first process's part of an adapter (`_get_model_state_dict` gathers no
      adapter) and restores nothing elsewhere: a resumed run trains another adapter without an error.
    - FSDP's own checkpointing wraps modules, and the adapter's tensors are saved under the wrappers' names.
    - 8- and 4-bit weights lose their class on the way to the meta device, which loading on one process alone takes.
    """
    config = recipe["fsdp_config"]

    def refuse(key: str, why: str) -> None:
        raise RecipeError(f"{source}: key '{key}': {why}")

    if str(recipe.get("fsdp_version") or config.get("fsdp_version")) != "2":
        refuse("fsdp_version", "FSDP1 has not been tested against one process; set it to 2")
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        refuse("fsdp_config", "one process has nothing to shard; use several GPUs (GPUS=2) or remove it")
    optimizer = str(recipe.get("optimizer"))
    if "bnb" in optimizer or ("8bit" in optimizer and not optimizer.startswith("adamw_torch")):
        refuse("optimizer", f"{optimizer} cannot update FSDP2's sharded tensors; use adamw_torch_fused")
    if config.get("state_dict_type") not in (None, "SHARDED_STATE_DICT"):
        refuse(
            "fsdp_config.state_dict_type", "checkpoints would hold only a part of the adapter; use SHARDED_STATE_DICT"
        )
    if config.get("activation_checkpointing"):
        refuse("fsdp_config.activation_checkpointing", "it renames the adapter; use gradient_checkpointing: true")
    if config.get("mixed_precision_policy"):
        refuse("fsdp_config.mixed_precision_policy", "parameters keep their dtypes and matmuls follow bf16; remove it")
    if config.get("cpu_ram_efficient_loading") and (recipe.get("load_in_8bit") or recipe.get("load_in_4bit")):
        refuse(
            "fsdp_config.cpu_ram_efficient_loading", "8- and 4-bit weights are loaded on each process; set it to false"
        )


def keep_dtypes(trainer) -> None:
    """Keep parameters in their dtypes and run matmuls under autocast, as without FSDP.

    accelerate gives FSDP2 a policy that casts every gathered parameter to bf16 in place of autocast (`_prepare_fsdp2`
    skips `prepare_model` and its autocast): a magnitude would be off by up to 1 in 512, more than most train by.
    """
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = None
        trainer.compute_loss_context_manager = trainer.accelerator.autocast


def save_adapter(trainer, folder: Path) -> None:
    """Save the whole adapter, as PEFT's files, beside the shards of FSDP2's checkpoint. Call it on each process."""
    if trainer.is_fsdp_enabled:
        save_fsdp2_lora_adapter(trainer.model, str(folder))
