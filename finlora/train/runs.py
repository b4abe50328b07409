"""Runs on disk: a run's folder, its lock, what makes it this run and no other, and what it trained."""

import datetime
import fcntl
import hashlib
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml

from fastdora.plugin import checkpoints
from finlora.core.errors import UserError
from finlora.core.files import read_json, replacing, sha256
from finlora.core.paths import ROOT
from finlora.data.neardup import normalise
from finlora.data.tasks import load_tasks
from finlora.data.test_sets import choose
from finlora.recipes import load as recipes
from finlora.recipes import names as recipe_names
from finlora.train.preflight import data_files

OUTPUTS = ROOT / "outputs"


def identify(path: Path, recipe: dict[str, Any], run_recipe: dict[str, Any], args: list[str]) -> dict[str, Any]:
    """What makes a run this one and no other: the recipe's text as run, axolotl's options, the data's SHA-256."""
    return {
        "recipe": path.read_text(encoding="utf-8") if run_recipe == recipe else dump(path, run_recipe),
        "args": args,
        "data": {name: sha256(ROOT / name) for name in data_files(run_recipe)},
    }


def output_folder(recipe: dict[str, Any], small: bool) -> Path:
    """Where a recipe's run lies; TINY=1 has the same folders below outputs/tiny."""
    out = ROOT / recipe["output_dir"]
    return OUTPUTS / "tiny" / os.path.relpath(out, OUTPUTS) if small else out


def dump(path: Path, recipe: dict[str, Any]) -> str:
    return f"# As run, from {path}\n" + yaml.safe_dump(recipe, sort_keys=False, width=120)


def base_model(recipe: dict[str, Any]) -> str:
    """The hub id, or the folder behind the link that the recipe names: `.cache/tiny` may point elsewhere later."""
    folder = ROOT / recipe["base_model"]
    return os.path.relpath(folder.resolve(), ROOT) if folder.is_dir() else recipe["base_model"]


def claim_folder(path: Path, out: Path, identity: dict[str, Any], force: bool) -> dict[str, Any] | None:
    """Make the output folder this run's, or return run.json of an equal finished run. UserError before work is lost.

    Broken checkpoints are named and set aside; the run resumes from the last complete one.
    """
    mark, done = out / "started.json", out / "run.json"
    before = read_json(mark)
    changed = difference(before, identity) if before else None
    if before and not changed:
        if done.is_file():
            if not force:
                return read_json(done)
        elif not force:
            last, _, broken = checkpoints.last_whole(out)
            for line in broken:
                print(f"warning: {line}", file=sys.stderr)
            if last:
                print(f"{out.relative_to(ROOT)}: resuming from {last.name}")
                return None
            if broken:
                print(f"{out.relative_to(ROOT)}: no complete checkpoint is left; training from the first step")
    # Files that begin with a dot are this command's own, left where it was killed.
    foreign = before is None and any(not path.name.startswith(".") for path in out.iterdir())
    precious = done.is_file() or any(out.glob("checkpoint-*")) or foreign
    if precious and not force:
        state = "a finished run" if done.is_file() else "an unfinished run"
        state = f"{state} with {changed}" if before else "files that this command did not write"
        raise UserError(f"{out.relative_to(ROOT)}: holds {state}; FORCE=1 sets it aside and trains {path.stem} anew")
    if precious:
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        out.rename(aside := out.with_name(f"{out.name}.{stamp}"))
        print(f"set aside: {aside.relative_to(ROOT)}")
        out.mkdir()
    with replacing(mark) as file:  # first: a folder with it is this run's, however early it is killed
        json.dump(identity, file, indent=1)
        file.write("\n")
    with replacing(out / "recipe.yaml") as file:
        file.write(identity["recipe"])
    return None


def difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """What two runs' identities differ by, in a few words: recipe keys, data files or axolotl's options.

    None where they are the same run: comments, and the order of keys, train nothing.
    """
    old, new = yaml.safe_load(before["recipe"]) or {}, yaml.safe_load(now["recipe"]) or {}
    keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    if keys:
        return "another recipe (" + ", ".join(f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys[:3]) + ")"
    names = sorted(before["data"].keys() | now["data"].keys())
    files = [name for name in names if before["data"].get(name) != now["data"].get(name)]
    if files:
        return f"other data ({', '.join(files)} changed)"
    if before["args"] != now["args"]:
        return f"other options ({shlex.join(before['args']) or 'none'} -> {shlex.join(now['args']) or 'none'})"
    return None


def folder_lock(out: Path, rank: int = 0):
    """A lock beside the output folder, held by this process and by axolotl below it: two runs never share a folder.

    The nodes of one run may share it (a network folder): each has a lock of its own.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
        lock = (out.parent / f".{out.name}{f'.node{rank}' if rank else ''}.lock").open("w")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); mend its permissions") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"{out.relative_to(ROOT)}: another command is at work there; wait for it or end it") from None
    return lock


def identity_digest(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def of_recipe(name: str, tiny: bool) -> dict[str, Any]:
    """A trained recipe's model, adapter, bits, test sets and training. UserError where it is not trained."""
    path = recipe_names.find(name)
    out = output_folder(recipes.load(path), tiny)
    record, as_run = read_json(out / "run.json"), out / "recipe.yaml"
    if record is None or not as_run.is_file():
        again = f"make train RECIPE={name}{' TINY=1' if tiny else ''}"
        state = "its training is unfinished" if any(out.glob("checkpoint-*")) else "is not trained"
        raise UserError(f"{out.relative_to(ROOT)}: {state}; run `{again}`" + ("" if tiny else ", or add TINY=1"))
    recipe = yaml.safe_load(as_run.read_text(encoding="utf-8"))
    parts = recipe_names.parse_name(path.stem) or {}
    small = tiny or recipe["base_model"].startswith(".cache/")
    base = record.get("base_model", recipe["base_model"])
    return {
        "recipe": path.stem,
        "subject": path.stem + (".tiny" if tiny else ""),
        "model": str(ROOT / base) if (ROOT / base).is_dir() else base,
        "adapter": out,
        "bits": 8 if recipe.get("load_in_8bit") else 4 if recipe.get("load_in_4bit") else 16,
        "tiny": small,
        "training": {key: record[key] for key in ("metrics", "args", "seconds", "data_from") if key in record}
        | {"log": (read_json(out / "metrics.json") or {}).get("log", [])},
        "trained_on": trained_contexts(record),
        "default_sets": choose([parts["task"] if parts.get("task") in load_tasks() else "sentiment"]),
    }


def trained_contexts(record: dict[str, Any]) -> set[str] | None:
    """The normalised prompts that a run trained on; None where its data files are not as they were."""
    seen = set()
    for name, digest in record["data"].items():
        path = ROOT / name
        if not path.is_file() or sha256(path) != digest:
            return None
        if path.name != "validation.jsonl":
            with path.open(encoding="utf-8") as lines:
                seen |= {normalise(json.loads(line)["messages"][0]["content"]) for line in lines}
    return seen
