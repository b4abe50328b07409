"""Checks that the model which axolotl built is the one in the recipe; axolotl and PEFT do not report a difference."""

import bitsandbytes as bnb
from axolotl.loaders.utils import load_model_config
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from torch import nn

from fastdora.plugin.keys import RecipeError


def check_vocabulary(cfg, tokenizer) -> None:
    """Raise RecipeError for tokens without an embedding in the base: axolotl would add one, which is not trained."""
    size = getattr(load_model_config(cfg), "vocab_size", None)
    if size and len(tokenizer) > size:
        last = tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)
        raise RecipeError(
            f"{cfg.axolotl_config_path}: key 'special_tokens': {last} is no token of {cfg.base_model}; take one that is"
        )


def check_model(cfg, model: nn.Module) -> None:
    """Compare the adapted layers with the recipe: targets, rank, alpha, DoRA, rsLoRA and the base's bits.

    Raises RecipeError naming the key. Catches an `adapter:` that is missing (the whole model would train),
    `load_in_4bit` with `adapter: lora` (trains unquantised), and a misspelt target beside a right one.
    """
    source = cfg.axolotl_config_path
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if not layers:
        raise RecipeError(f"{source}: key 'adapter': no layer is adapted; set `adapter: lora` (or qlora for 4-bit)")
    for target in cfg.lora_target_modules or []:
        if not any(name.split(".")[-1] == target for name in layers):
            raise RecipeError(f"{source}: key 'lora_target_modules': '{target}' is not a layer of {cfg.base_model}")
    patterns = {
        "lora_rank_pattern": (cfg.lora_rank_pattern or {}, cfg.lora_r),
        "lora_alpha_pattern": (cfg.lora_alpha_pattern or {}, cfg.lora_alpha),
    }
    for key, (pattern, _) in patterns.items():
        for part in pattern:
            if not any(_of_layer(name, {part: True}, None) for name in layers):
                raise RecipeError(
                    f"{source}: key '{key}': {part} is no adapted layer of {cfg.base_model}; fix the name"
                )
    bits, kind = _expected_base(cfg)
    for name, layer in layers.items():
        if type(layer.base_layer) is not kind:
            key = f"load_in_{bits}bit" if bits != 16 else "adapter"
            actual = type(layer.base_layer).__name__
            raise RecipeError(
                f"{source}: key '{key}': {name} is {actual}, not {kind.__name__}; the recipe says {bits}-bit"
            )
        rank, alpha = (_of_layer(name, *keys) for keys in patterns.values())
        if layer.r["default"] != rank:
            raise RecipeError(f"{source}: key 'lora_r': {name} has rank {layer.r['default']}, not {rank}")
        if layer.use_dora["default"] != bool(cfg.peft_use_dora):
            raise RecipeError(f"{source}: key 'peft_use_dora': {name} has use_dora={layer.use_dora['default']}")
        root = rank**0.5 if cfg.peft_use_rslora else rank
        if abs(layer.scaling["default"] - alpha / root) > 1e-9:
            raise RecipeError(f"{source}: key 'lora_alpha': {name} scales by {layer.scaling['default']}")


def _of_layer(name: str, pattern: dict, otherwise):
    """A layer's value by a pattern as PEFT reads it."""
    name = name.removeprefix("base_model.model.")
    return pattern.get(get_pattern_key(pattern.keys(), name), otherwise)


def _expected_base(cfg) -> tuple[int, type]:
    if cfg.load_in_8bit:
        return 8, bnb.nn.Linear8bitLt
    if cfg.load_in_4bit:
        return 4, bnb.nn.Linear4bit
    return 16, nn.Linear
