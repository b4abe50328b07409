"""Counting tokens as the model's own tokenizer does, without a model and without a network.

Llama-3's tokenizer is gated on the Hub. PyPI's llama-models, of the dev extra, carries the same one (Llama's licence).
"""

import importlib.util
import os
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import try_to_load_from_cache

from finlora.core.errors import UserError
from finlora.core.paths import ROOT

TINY = ROOT / ".cache" / "tiny"
LLAMA = "meta-llama/Llama-3.1-8B-Instruct"
# How Llama-3 cuts text before byte-pair encoding, and the 256 special tokens that follow the 128,000 merges in order
# (llama_models/llama3/tokenizer.py); tokenizer.model holds the merges alone.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = (
    "<|begin_of_text|> <|end_of_text|> <|reserved_special_token_0|> <|reserved_special_token_1|> "
    "<|finetune_right_pad_id|> <|step_id|> <|start_header_id|> <|end_header_id|> <|eom_id|> <|eot_id|> <|python_tag|>"
).split() + [f"<|reserved_special_token_{number}|>" for number in range(2, 247)]

Count = Callable[[list[str]], list[int]]  # the tokens of each text, special tokens recognised and none added


class Measure(NamedTuple):
    """What tokens are counted with. stand_in: the tiny tokenizer, which needs more tokens than the base model's."""

    tokenizer: str
    stand_in: bool
    count: Count


def chat(turns: Iterable[tuple[str, str]]) -> str:
    """A row's turns (role, text) as they are trained on: Llama-3's plain chat template, which trims the texts."""
    parts = (f"<|start_header_id|>{role}<|end_header_id|>\n\n{text.strip()}<|eot_id|>" for role, text in turns)
    return "<|begin_of_text|>" + "".join(parts)


def find_measure(base: str | None, tokenizer: Path | None = None) -> Measure | None:
    """The tokenizer that is named, else the base model's, else the tiny one; None where there is none.

    tokenizer: a folder with tokenizer.json, or a tokenizer.json or tokenizer.model. Raises UserError where it is none.
    """
    if tokenizer:
        path = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
        if not path.is_file():
            raise UserError(f"{tokenizer}: holds no tokenizer.json; name a model's folder or its tokenizer.json")
        return Measure("the tokenizer given", False, counter(path))
    own = tokenizer_of(base)
    if own:
        return Measure(f"{base}'s tokenizer", False, counter(own))
    if (TINY / "tokenizer.json").is_file():
        return Measure("the tiny tokenizer", True, counter(TINY / "tokenizer.json"))
    return None


def tokenizer_of(base: str | None) -> Path | None:
    """The tokenizer file of a base model: in its folder, as downloaded before, or for Llama 3 as llama-models has it.

    Nothing is fetched.
    """
    if not base:
        return None
    if (ROOT / base).is_dir():
        path = ROOT / base / "tokenizer.json"
        return path if path.is_file() else None
    cached = try_to_load_from_cache(base, "tokenizer.json") if base.count("/") == 1 else None
    if isinstance(cached, str):
        return Path(cached)
    package = importlib.util.find_spec("llama_models") if "llama-3" in base.lower() else None
    path = Path(package.origin).parent / "llama3" / "tokenizer.model" if package and package.origin else None
    return path if path and path.is_file() else None


def counter(path: Path) -> Count:
    """What counts tokens by a tokenizer.json, or by Llama-3's tokenizer.model; UserError where it is neither."""
    tokenizer = read_tokenizer(path)
    return lambda texts: [
        len(encoding.ids) for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    ]


def read_tokenizer(path: Path) -> Any:
    """The `tokenizers.Tokenizer` of a tokenizer.json or of Llama-3's tokenizer.model; UserError where it is neither."""
    from tokenizers import Tokenizer  # takes a second to import, and is not needed without a tokenizer

    try:
        if path.suffix == ".model":
            return _llama_tokenizer(path, path.stat().st_mtime_ns)
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the libraries raise plain Exception and ValueError
        raise UserError(f"{path}: is not a tokenizer ({error}); name a model's folder or its tokenizer.json") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@lru_cache(maxsize=1)  # a second, and an audit asks for each task
def _llama_tokenizer(path: Path, _: int) -> Any:
    from transformers.convert_slow_tokenizer import TikTokenConverter

    os.environ["TIKTOKEN_CACHE_DIR"] = ""  # no copy by the file's name, which would hide another content
    return TikTokenConverter(str(path), pattern=WORDS, extra_special_tokens=SPECIAL).converted()
