"""What a recipe may not contain: remote code, secrets, pickled weights."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastdora.plugin.keys import RecipeError

# Each runs code of a hub's repository, Python or compiled.
CODE = {"trust_remote_code", "use_kernels"}
# Names of keys; pad_token and its like are text and do not match.
SECRET = re.compile(
    r"^token$|(^|_)((auth|access|api|hub|hf|bearer)_token|api_?key|secret(_\w+)?|password|passwd|credentials?)$", re.I
)
# Tokens of Hugging Face, OpenAI and its like, GitHub and AWS.
SECRET_VALUE = re.compile(r"hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16}")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


def check(recipe: dict[str, Any], source: str) -> None:
    """Raise RecipeError for a key, at any depth, that runs remote code or holds a secret, and for pickled weights."""
    for where, key, value in _entries(recipe):
        if key in CODE and value:
            raise RecipeError(f"{source}: key '{where}': runs code from the hub; remove it")
        if isinstance(value, str) and (SECRET.search(key) or SECRET_VALUE.search(value)):
            raise RecipeError(f"{source}: key '{where}' holds a secret; remove it and set it in the environment")
    base = Path(str(recipe.get("base_model", "")))
    if base.is_dir() and not any(base.glob("*.safetensors")) and any(any(base.glob(kind)) for kind in PICKLES):
        raise RecipeError(f"{source}: key 'base_model': {base} holds pickles, not safetensors; convert it first")


def _entries(node: Any, where: str = "") -> Iterator[tuple[str, str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            inner = f"{where}.{key}" if where else str(key)
            yield inner, str(key), value
            yield from _entries(value, inner)
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _entries(value, f"{where}.{number}")
