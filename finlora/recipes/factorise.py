"""What holds across all recipes: each key is decided by one part of the name."""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from finlora.recipes.names import DECIDED_BY, parse_name

# The demo recipe adapts a model of four million parameters, so its sizes and rates are its own.
DEMO_OWN = ["base_model", "learning_rate", "logging_steps", "evals_per_epoch", "saves_per_epoch"]


def factorise(recipes: dict[str, dict[str, Any]]) -> Iterator[str]:
    """One line for each key of a recipe that is not decided by its own part of the name.

    `recipes` maps names to contents. What most recipes with the same part have is taken as right.
    """
    part_of = {key: part for part, keys in DECIDED_BY.items() for key in keys}
    every_key = {key for recipe in recipes.values() for key in recipe}
    for key in sorted(every_key):
        part = part_of.get(key)
        groups: dict[Any, list[str]] = {}
        for name in recipes:
            parts = parse_name(name)
            if not parts:
                yield f"recipes/{name}.yaml: the name is not <task>[_4bit|_bf16]_r<rank>[_a<alpha>]_<lora|dora|rslora>"
            elif not (parts["task"] == "demo" and key in DEMO_OWN):
                groups.setdefault(parts.get(part), []).append(name)
        for value, members in groups.items():
            texts = {name: _text(recipes[name].get(key), name if part == "name" else "") for name in members}
            usual = Counter(texts.values()).most_common(1)[0][0]
            where = f"recipes with {part} {value}" if value is not None else "recipes"
            for name, text in texts.items():
                if text != usual:
                    yield f"recipes/{name}.yaml: key '{key}' is {text}, in the other {where} it is {usual}"


def _text(value: Any, name: str) -> str:
    text = json.dumps(value, sort_keys=True)
    return text.replace(name, "<name>") if name else text
