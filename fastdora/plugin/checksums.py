"""SHA-256 of files, and of all that a run starts from: its base model, its first adapter, its template."""

import hashlib
import json
import os
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

WEIGHTS = ("*.safetensors", "config.json")
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "*.jinja")
ADAPTER = ("adapter_config.json", "adapter_model.*")
# Where axolotl is started; the checksums of large files are kept there if the folder exists, as in this repository.
CACHE = Path(".cache") / "checksums.json"
LARGE = 64 * 2**20  # bytes; a smaller file is hashed in a tenth of a second

Digests = dict[str, dict[str, str]]  # a model or file as the recipe names it -> name of a file in it -> SHA-256


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal digits; OSError where it cannot be read."""
    return add_content(hashlib.sha256(), path).hexdigest()


def add_content(digest: Any, path: Path) -> Any:
    """The digest after the file's bytes, a mebibyte at a time. hashlib.file_digest needs Python 3.11."""
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest


def starting_files(recipe: dict[str, Any], root: Path = Path()) -> Digests:
    """The files of `base_model` and `lora_model_dir`, a template in a file of its own, and DeepSpeed's configuration.

    root: the folder that the recipe's paths are relative to. What is not there is left out, as a hub's model before it
    is fetched.
    """
    base, adapter = recipe["base_model"], recipe.get("lora_model_dir")
    digests = {base: model_files(base, (*WEIGHTS, *TOKENIZER), root, recipe.get("revision_of_model"))}
    if adapter:
        digests[adapter] = model_files(adapter, ADAPTER, root)
    return {name: files for name, files in digests.items() if files} | _named_files(recipe, root)


def text_files(recipe: dict[str, Any]) -> Digests:
    """Those of them that decide how text becomes tokens."""
    base = recipe["base_model"]
    return {base: model_files(base, TOKENIZER, revision=recipe.get("revision_of_model"))} | _named_files(recipe)


def model_files(name: str, patterns: tuple[str, ...], root: Path = Path(), revision: str | None = None) -> dict:
    """The digest of each file of a model that matches a pattern; the model is a folder, or in the hub's cache."""
    folder = root / name
    if not folder.is_dir():
        folder = _hub_folder(name, revision)
    if folder is None:
        return {}
    paths = {path.name: path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {name: cached_sha256(paths[name], root) for name in sorted(paths)}


def _named_files(recipe: dict[str, Any], root: Path = Path()) -> Digests:
    entries = [recipe, *(recipe.get("datasets") or []), *(recipe.get("test_datasets") or [])]
    names = [entry.get("chat_template_jinja") for entry in entries]
    names.append(recipe.get("deepspeed"))
    files = [name for name in names if isinstance(name, str) and os.path.isfile(root / name)]  # else: a template's text
    return {name: {"": cached_sha256(root / name, root)} for name in files}


def weights_sha256(name: str, root: Path = Path()) -> str | None:
    """One digest of a model's weights, a folder's or those in the hub's cache; None where it is not there."""
    files = model_files(name, WEIGHTS, root)
    return hashlib.sha256(json.dumps(files).encode()).hexdigest() if files else None


def changed_files(before: Digests, now: Digests) -> list[str]:
    """The files, as folder/name, that differ among the models and files which both have."""
    return [
        f"{folder}/{name}".rstrip("/")
        for folder in sorted(before.keys() & now.keys())
        for name in sorted(before[folder].keys() | now[folder].keys())
        if before[folder].get(name) != now[folder].get(name)
    ]


def changed_weights(before: Digests, recorded: str, name: str, root: Path) -> list[str] | None:
    """The weights of the model `name` that are not those which `before` has of `recorded`; None where one is not there.

    The two names differ where a recipe's path is a link.
    """
    weights = {file: digest for file, digest in before.get(recorded, {}).items() if _is_weight(file)}
    now = model_files(name, WEIGHTS, root)
    return changed_files({name: weights}, {name: now}) if weights and now else None


def _is_weight(file: str) -> bool:
    return any(fnmatch(file, pattern) for pattern in WEIGHTS)


def cached_sha256(path: Path, root: Path = Path()) -> str:
    """The file's SHA-256. That of a large file is kept in root/.cache, by size, times of change and inode.

    Weights of the hub's cache are not read: the file that a snapshot links to is named by their SHA-256.
    """
    path = path.resolve()
    if path.parent.name == "blobs" and len(path.name) == 64:
        return path.name
    state = path.stat()
    if state.st_size < LARGE:
        return sha256(path)
    # The inode's own time of change cannot be set: a file that is replaced or written anew with equal size and date has
    # another one.
    key = [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]
    cache = root / CACHE
    known = _read(cache)
    if str(path) in known and known[str(path)][:-1] == key:
        return known[str(path)][-1]
    digest = sha256(path)
    _write(cache, _read(cache) | {str(path): [*key, digest]})
    return digest


def _hub_folder(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache  # late: it takes a third of a second
    from huggingface_hub.errors import HFValidationError

    for file in ("config.json", "adapter_config.json"):
        try:
            path = try_to_load_from_cache(name, file, revision=revision)
        except HFValidationError:  # a path, not a hub id
            return None
        if isinstance(path, str):
            return Path(path).parent
    return None


def _read(cache: Path) -> dict[str, list]:
    try:
        return json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _write(cache: Path, known: dict[str, list]) -> None:
    """Replace the cache; a folder that is missing or cannot be written costs the next run its time, not this one."""
    try:
        handle, beside = tempfile.mkstemp(dir=cache.parent, prefix=f".{cache.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({path: entry for path, entry in known.items() if os.path.exists(path)}, file)
        os.replace(beside, cache)
    except OSError:
        pass
