"""DoRA, LoRA and rsLoRA at the cost of one product, and an axolotl plugin for runs that can be trusted.

`accelerate(model)` gives a PEFT model its fast layers, `read_places(model, answers=True)` the loss on answers only. The
plugin, `plugins: [fastdora.FastDoraPlugin]`, does both. It also refuses recipe keys that axolotl would drop in silence,
makes runs repeatable, checks that every row trains and that the model is adapted and quantised as the recipe says,
mends PEFT's DoRA on 8-bit weights, and records what ran.
"""

from importlib import import_module

# Imported when asked for: the plugin imports axolotl (ten seconds), and checking a recipe's keys does not need it.
_MODULES = {"FastDoraPlugin": "plugin.plugin", "accelerate": "dora", "read_places": "packing"}


def __getattr__(name: str):
    if name in _MODULES:
        return getattr(import_module(f"fastdora.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'fastdora' has no attribute '{name}'")
