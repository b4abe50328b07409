"""The axolotl plugin. `plugins: [fastdora.FastDoraPlugin]` names it in a recipe.

It also refuses recipe keys that axolotl would drop in silence, makes runs repeatable, checks that every row trains
and that the model is adapted and quantised as the recipe says, and records what ran.
"""
