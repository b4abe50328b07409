"""What holds across all recipes: each key, and the comment on it, is decided by one part of the name."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from finlora.recipes.bases import load_bases
from finlora.recipes.names import DECIDED_BY, GRAMMAR, parse_name

# The demo's recipes adapt small models within minutes, so their sizes and learning rates are their own.
DEMO_OWN = [
    "base_model",
    "sequence_len",
    "num_epochs",
    "max_steps",
    "learning_rate",
    "warmup_steps",
    "logging_steps",
    "evals_per_epoch",
    "saves_per_epoch",
]


def factorise(recipes: dict[str, dict[str, Any]], what: str = "key") -> Iterator[str]:
    """One line for each key of a recipe that is not decided by its own part of the name.

    recipes: contents by name, or comments by name with what="comment on key". The value that most recipes with the
    same part of the name have counts as the right one; recipes/bases.yaml has those that a base decides, and the
    comment on such a key is the same for all bases.
    """
    part_of = {key: part for part, keys in DECIDED_BY.items() for key in keys}
    every_key = {key for recipe in recipes.values() for key in recipe}
    for key in sorted(every_key):
        part = part_of.get(key)
        groups: dict[Any, list[str]] = {}
        for name in recipes:
            parts = parse_name(name)
            if not parts:
                yield f"recipes/{name}.yaml: the name is not {GRAMMAR}"
            elif parts["task"] == "demo" and key in DEMO_OWN:
                continue
            elif part == "base" and what == "key":
                tag = parts["base"]
                here, right = _text(recipes[name].get(key)), _text(load_bases()[tag].recipe.keys.get(key))
                if here != right:
                    yield f"recipes/{name}.yaml: key '{key}' is {here}, for {tag} in recipes/bases.yaml it is {right}"
            elif part != "base" or key in recipes[name]:
                groups.setdefault(None if part == "base" else parts.get(part), []).append(name)
        for value, members in groups.items():
            texts = {name: _text(recipes[name].get(key), name if part == "name" else "") for name in members}
            usual = Counter(texts.values()).most_common(1)[0][0]
            where = f"recipes with {part} {value}" if value is not None else "recipes"
            for name, text in texts.items():
                if text != usual:
                    yield f"recipes/{name}.yaml: {what} '{key}' is {text}, in the other {where} it is {usual}"


def comments(text: str) -> dict[str, str]:
    """The comment on each top-level key of a recipe: the lines above it (a heading) and what follows on its own line.

    The lines before the first blank one are about the whole file (its batch and memory), and no key's.
    """
    of_key, above = {}, []
    for line in text.partition("\n\n")[2].splitlines():
        key = re.match(r"(\w+):", line)
        if line.startswith("#"):
            above.append(line)
        elif key:
            of_key[key[1]] = "\n".join([*above, line.partition(" #")[2]])
            above = []
        elif " #" in line:
            last = list(of_key)[-1]
            of_key[last] += "\n" + line.partition(" #")[2]
    return of_key


def _text(value: Any, name: str = "") -> str:
    text = json.dumps(value, sort_keys=True)
    return text.replace(name, "<name>") if name else text
