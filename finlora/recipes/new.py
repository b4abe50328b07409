"""Write a recipe by its name from the nearest one: each key by its part of the name, comments kept (`make new`)."""

import re
import tempfile
from pathlib import Path
from typing import Any

import yaml

from finlora.core.errors import UserError
from finlora.core.files import write_text
from finlora.recipes import load as recipes
from finlora.recipes.bases import load_bases
from finlora.recipes.memory import memory_line
from finlora.recipes.names import DECIDED_BY, RECIPES, decided, fault_of, names, parse_name

COMMENTS_AT = 38  # the column of a comment after a value that ends before it


def new(name: str) -> Path:
    """The file of a new recipe of this name; UserError where the name is none, or the recipe is there already."""
    name = name.removesuffix(".yaml")
    path = RECIPES / f"{name}.yaml"
    if fault := fault_of(name):
        raise UserError(f"RECIPE={name}: {fault}")
    if path.exists():
        raise UserError(f"RECIPE={name}: recipes/{name}.yaml is there already; edit it, or give another name")
    like, text = draft(name)
    with tempfile.TemporaryDirectory() as folder:
        beside = Path(folder) / path.name
        write_text(beside, text)
        own = [problem for problem in recipes.problems([beside]) if problem.startswith(f"recipes/{name}.yaml")]
    if own:
        raise UserError("\nerror: ".join(own))
    write_text(path, text)
    print(f"written   recipes/{name}.yaml, from {like}\nnext      make plan RECIPE={name}, or make train RECIPE={name}")
    return path


def draft(name: str) -> tuple[str, str]:
    """The nearest recipe, and the text of the one with this name."""
    parts, like = parse_name(name), nearest(name)
    text = (RECIPES / f"{like}.yaml").read_text(encoding="utf-8")
    base = load_bases()[parts["base"]]
    values = {key: base.recipe.keys.get(key) for key in DECIDED_BY["base"]} | decided(parts, Path("outputs") / name)
    for key, value in values.items():
        text = with_value(text, key, value)
    batch, _, rest = text.partition("\n")
    memory = memory_line(yaml.safe_load(text), base.config)
    return like, f"{batch}\n{memory}\n\n{rest.partition(chr(10) * 2)[2]}"


def nearest(name: str) -> str:
    """Another recipe of the same task that shares most parts of its name with this one."""
    parts = parse_name(name)
    others = {other: theirs for other in names() if other != name and (theirs := parse_name(other))}
    same = {other: theirs for other, theirs in others.items() if theirs["task"] == parts["task"]}
    return max(same, key=lambda other: sum(same[other][part] == value for part, value in parts.items()))


def with_value(text: str, key: str, value: Any) -> str:
    """A recipe's text with another value of a key, its comment in its column; None removes the key.

    A key that the text does not have comes after special_tokens.
    """
    block = find_block(text, key)
    if block is None:
        end = find_block(text, "special_tokens").end()
        return text if value is None else f"{text[:end]}{written(key, value)}\n{text[end:]}"
    head, *body = written(key, value).splitlines() if value is not None else [""]
    if comment := re.match(r".*\s(# .*)", block[0]):
        head = f"{head:<{COMMENTS_AT - 2}}  {comment[1]}"
    new = "" if value is None else "\n".join([head, *body, ""])
    return text[: block.start()] + new + text[block.end() :]


def find_block(text: str, key: str) -> re.Match | None:
    """The lines of a top-level key."""
    return re.search(rf"^{key}:.*\n(?:[ -].*\n)*", text, re.MULTILINE)


def written(key: str, value: Any) -> str:
    return yaml.safe_dump({key: value}, width=1000, sort_keys=False).rstrip("\n")
