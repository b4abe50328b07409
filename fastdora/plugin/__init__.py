"""The axolotl plugin; a recipe enables it by `plugins: [fastdora.FastDoraPlugin]`.

It switches the model to fastdora's layers, refuses recipe keys that axolotl would ignore, makes runs repeatable, checks
that every row trains and that the model is adapted and quantized as the recipe says, and records what ran.
"""
