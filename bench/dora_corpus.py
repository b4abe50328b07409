"""What the study learns from: text for the base model, and a split of FinLoRA's sentiment rows without a leak.

`write` makes a folder of tokens.safetensors (uint16, one stream of documents that <|end_of_text|> ends), tokenizer/,
rows.json (see `Rows`) and sources.json (where the text is from, in characters and tokens, and the split). Nothing else
is needed to run the study, so this folder can be carried to a machine without a network.
"""

import ast
import gzip
import hashlib
import html
import importlib.util
import json
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from safetensors.numpy import save

from finlora.core.errors import UserError
from finlora.core.files import replacing, write_json
from finlora.core.paths import ROOT
from finlora.data.corrections import applies, corrected_target
from finlora.data.neardup import near_duplicate_groups
from finlora.data.rows import read_rows
from finlora.train.tiny import train_tokenizer

SETS = ("fpb", "fiqa", "tfns")
SPLITS = ("train", "validation", "test")
PROMPTS = ("llama3", "finlora_inst", "raw")
WORDS = 8  # a document that shares as many words in a row with a validation or test row is left out
PARAGRAPH = 160  # characters that a paragraph of prose has at least
END = "<|end_of_text|>"

_TAG = re.compile(r"(?s)<(script|style|head|pre)\b.*?</\1>|<[^>]+>")
_BLOCK = re.compile(r"(?i)</?(?:p|div|li|h[1-6]|td|tr|dd|dt|ul|ol|table|blockquote)\b[^>]*>")
_WORD = re.compile(r"\w+")
# A word and its polarity: a table with tabs (VADER) or Python assignments (FinVADER).
_POLARITY = re.compile(r"(?m)^(?:\s*\w+\[['\"])?([a-z][a-z -]+)(?:['\"]\]\s*=\s*|\t)(-?\d*\.?\d+)")


class Rows(TypedDict):
    """Rows of one split, lists of equal length: name of the set, target, and per prompt the prompt's tokens."""

    set: list[str]
    target: list[str]
    prompts: dict[str, list[list[int]]]


def write(study: dict[str, Any], data: Path, texts: Path, out: Path) -> dict[str, Any]:
    """Make the folder `out` from FinLoRA's files (data/test/fpb_test.jsonl ...) and `texts`; return sources.json.

    Deterministic for equal files and packages. Raises UserError where a file is missing or is not the published one.
    """
    parts = split(labelled(data), study["split"])
    held_out = {gram for name in ("validation", "test") for row in parts[name] for gram in grams(sentence(row[1]))}
    sources: dict[str, list[str]] = {}
    for name, documents in _documents(study["corpus"], texts):
        sources[name] = [text for text in documents if held_out.isdisjoint(grams(text))]
    contexts = [row[1] for row in parts["train"]]
    lessons = list(instructions(data))
    tokenizer = train_tokenizer([*(t for texts in sources.values() for t in texts), *contexts * 4], study["vocabulary"])
    if (size := len(tokenizer)) > 2**16:
        raise UserError(f"vocabulary: {size} tokens do not fit 16 bits; choose at most {2**16}")
    turns = {
        "prompts of the train rows, without answers": [_turn(context) for context in contexts],
        "FinLoRA's rows of other tasks, with answers": [
            _turn(context) + _answer(target) for context, target in lessons
        ],
    }
    times = dict(zip(turns, (study["corpus"]["finance"], study["corpus"]["instructions"]), strict=True))
    chats = {name: _ids(tokenizer, texts) for name, texts in turns.items()}
    room = study["corpus"]["largest"] - sum(times[name] * sum(map(len, ids)) for name, ids in chats.items())
    documents = {name: _ids(tokenizer, texts) for name, texts in sources.items()}
    every = [ids for texts in documents.values() for ids in texts]
    order = np.random.default_rng(0).permutation(len(every))
    every = [every[i] for i in order[np.cumsum([len(every[i]) for i in order]) <= room]]
    every += [ids for name, texts in chats.items() for ids in texts * times[name]]
    order = np.random.default_rng(1).permutation(len(every))
    stream = np.concatenate([np.array(every[i], np.uint16) for i in order])

    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out / "tokenizer")
    with replacing(out / "tokens.safetensors", "wb") as file:
        file.write(save({"tokens": stream}))
    with replacing(out / "rows.json") as file:
        json.dump({name: _rows(tokenizer, part) for name, part in parts.items()}, file)
    about = {
        "tokens": len(stream),
        "sha256": hashlib.sha256(stream.tobytes()).hexdigest(),
        "vocabulary": len(tokenizer),
        "sources": {
            name: {"documents": len(ids), "characters": sum(map(len, sources[name])), "tokens": sum(map(len, ids))}
            for name, ids in documents.items()
            if ids
        }
        | {
            name: {"documents": len(ids), "tokens": sum(map(len, ids)), "times": times[name]}
            for name, ids in chats.items()
        },
        "split": {
            name: {"rows": len(part)} | {s: sum(row[0] == s for row in part) for s in SETS}
            for name, part in parts.items()
        },
    }
    write_json(out / "sources.json", about)
    return about


def labelled(data: Path) -> list[tuple[str, str, str]]:
    """(set, context, corrected target) of the three sentiment test files, the only sentiment rows with sources' splits.

    Raises UserError where TFNS is not the published file, whose labels data/corrections.yaml knows to be swapped.
    """
    rows = []
    for name in SETS:
        file = f"test/{name}_test.jsonl"
        corrected = applies(file, data / file)
        if name == "tfns" and not corrected:
            raise UserError(f"{data / file}: is not the published file, so its labels are not known; run `make data`")
        for row in read_rows(data / file):
            rows.append((name, row.context, corrected_target(file, row) if corrected else row.target))
    return rows


def instructions(data: Path) -> Iterator[tuple[str, str]]:
    """(context, target) of the train files of other tasks, as far as they are there."""
    for name in ("formula", "xbrl_term", "financebench"):
        path = data / "train" / f"{name}_train.jsonl"
        if path.exists():
            yield from ((row.context, row.target) for row in read_rows(path))


def split(rows: list[tuple[str, str, str]], sizes: dict[str, int]) -> dict[str, list[tuple[str, str, str]]]:
    """The rows by SPLITS, shuffled by sizes["seed"]; near-duplicates are in one part, so parts may be a little larger.

    Raises UserError where no row is left for the test split.
    """
    groups: dict[int, list[tuple[str, str, str]]] = {}
    for row, group in zip(rows, near_duplicate_groups(sentence(row[1]) for row in rows), strict=True):
        groups.setdefault(group, []).append(row)
    members = list(groups.values())
    parts: dict[str, list[tuple[str, str, str]]] = {name: [] for name in SPLITS}
    for i in np.random.default_rng(sizes["seed"]).permutation(len(members)):
        name = next((name for name in SPLITS[:2] if len(parts[name]) < sizes[name]), "test")
        parts[name] += members[i]
    if not parts["test"]:
        raise UserError(f"split: {len(rows)} rows leave none to test on; lower train or validation")
    return parts


def sentence(context: str) -> str:
    """What a row says, without what every row asks."""
    match = re.search(r"(?s)\nInput: (.*)\nAnswer: ?$", context)
    return match[1] if match else context


def grams(text: str) -> set[int]:
    """Every WORDS words in a row of a text, hashed; a shorter text as a whole."""
    words = _WORD.findall(text.lower())
    return {hash(tuple(words[i : i + WORDS])) for i in range(max(1, len(words) - WORDS + 1))} if words else set()


def prompt_text(prompt: str, context: str) -> str:
    """The prompt up to where the answer begins, without the token that begins a text."""
    if prompt == "llama3":
        return _turn(context) + "<|start_header_id|>assistant<|end_header_id|>\n\n"
    return _template(prompt).render(bos_token="", eos_token="", messages=[{"role": "user", "content": context}])


def _template(prompt: str):
    from jinja2 import Environment

    return Environment().from_string((ROOT / "recipes" / "prompts" / f"{prompt}.jinja").read_text(encoding="utf-8"))


def _turn(context: str) -> str:
    return f"<|start_header_id|>user<|end_header_id|>\n\n{context.strip()}<|eot_id|>"


def _answer(target: str) -> str:
    return f"<|start_header_id|>assistant<|end_header_id|>\n\n{target}<|eot_id|>"


def _rows(tokenizer, part: list[tuple[str, str, str]]) -> Rows:
    prompts = {p: tokenizer([prompt_text(p, row[1]) for row in part])["input_ids"] for p in PROMPTS}
    return {"set": [row[0] for row in part], "target": [row[2] for row in part], "prompts": prompts}


def _ids(tokenizer, texts: list[str]) -> list[list[int]]:
    return tokenizer([text + END for text in texts])["input_ids"] if texts else []


def _documents(corpus: dict[str, Any], texts: Path) -> Iterator[tuple[str, list[str]]]:
    """(source, its distinct documents); a paragraph that stood in an earlier document is left out."""
    seen: set[int] = set()
    for pattern in corpus["files"]:
        files = sorted(path for path in texts.glob(pattern) if path.is_file())
        yield pattern.split("/")[0], _distinct(map(_read, files), seen)
    for pattern in corpus["lexicons"]:
        files = sorted(path for path in texts.glob(pattern) if path.is_file())
        yield pattern.split("/")[0] + "'s lexicon", _distinct(map(_polarities, files), seen)
    for name in corpus["docstrings"]:
        spec = importlib.util.find_spec(name)
        folders = spec.submodule_search_locations or [] if spec else []
        files = sorted(path for folder in folders for path in Path(folder).rglob("*.py"))
        yield f"docstrings of {name}", _distinct(map(_docstrings, files), seen)


def _distinct(documents: Iterable[list[str]], seen: set[int]) -> list[str]:
    result = []
    for paragraphs in documents:
        new = []
        for paragraph in paragraphs:
            key = int.from_bytes(hashlib.blake2b(paragraph.encode(), digest_size=8).digest(), "big")
            if key not in seen and _is_prose(paragraph):
                seen.add(key)
                new.append(paragraph)
        # A dictionary is one file of thousands of entries: cut into documents that can be shuffled.
        result += ["\n\n".join(new[i : i + 40]) for i in range(0, len(new), 40)]
    return result


def _is_prose(text: str) -> bool:
    plain = sum(letter.isalpha() or letter == " " for letter in text)
    return len(text) >= PARAGRAPH and plain >= 0.85 * len(text) and text.isascii()


def _read(path: Path) -> list[str]:
    raw = gzip.decompress(path.read_bytes()) if path.suffix in (".dz", ".gz") else path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    if path.name.startswith("data."):  # WordNet: the gloss stands behind a bar, one a line
        glosses = [line.split(" | ")[1].strip() for line in text.splitlines() if " | " in line]
        return [". ".join(glosses[i : i + 8]) for i in range(0, len(glosses), 8)]
    if path.suffix == ".html":
        text = html.unescape(_TAG.sub(" ", _BLOCK.sub("\n\n", text)))
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n|\n%\n", text)]


def _polarities(path: Path) -> list[str]:
    """The words of a sentiment lexicon in sentences, 12 a paragraph."""
    matches = _POLARITY.findall(path.read_text(encoding="utf-8"))
    order = np.random.default_rng(0).permutation(len(matches))
    sentences = [f"{matches[i][0]} is {'positive' if float(matches[i][1]) > 0 else 'negative'}." for i in order]
    return [" ".join(sentences[i : i + 12]) for i in range(0, len(sentences), 12)]


def _docstrings(path: Path) -> list[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
    return [" ".join(part.split()) for text in texts for part in re.split(r"\n\s*\n", text)]
