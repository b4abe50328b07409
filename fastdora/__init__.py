"""DoRA, LoRA and rsLoRA layers for PEFT at the cost of one matmul, and an axolotl plugin around them.

`accelerate(model)` switches a PEFT model to the fast layers; `read_label_positions(model, answers=True)` applies head
and loss only where a label is. The plugin, `plugins: [fastdora.FastDoraPlugin]`, does both. It also refuses recipe keys
that axolotl would ignore, makes runs repeatable, checks that every row trains and that the model is adapted and
quantized as the recipe says, fixes PEFT's DoRA on 8-bit weights, and records what ran.
"""

from importlib import import_module

# Imported on first use: the plugin imports axolotl (ten seconds), which checking a recipe's keys does not need.
_MODULES = {"FastDoraPlugin": "plugin.plugin", "accelerate": "dora", "read_label_positions": "packing"}


def __getattr__(name: str):
    if name in _MODULES:
        return getattr(import_module(f"fastdora.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'fastdora' has no attribute '{name}'")
