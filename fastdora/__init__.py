"""An axolotl plugin for DoRA runs that can be trusted: `plugins: [fastdora.FastDoraPlugin]`.

It refuses recipe keys that axolotl would drop in silence, makes runs repeatable, checks that every row trains and that
the model is adapted and quantised as the recipe says, mends PEFT's DoRA on 8-bit weights, and records what ran.
"""


def __getattr__(name: str):
    # Importing the plugin imports axolotl (ten seconds); checking a recipe's keys does not need it.
    if name == "FastDoraPlugin":
        from fastdora.plugin import FastDoraPlugin

        return FastDoraPlugin
    if name == "accelerate":
        from fastdora.dora import accelerate

        return accelerate
    raise AttributeError(f"module 'fastdora' has no attribute '{name}'")
