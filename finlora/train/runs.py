"""Runs on disk: a run's folder, its lock, what makes it this run and no other, and what it trained."""

import datetime
import fcntl
import json
import shlex
import sys
from dataclasses import dataclass
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
from finlora.recipes.load import Recipe, output_folder

OUTPUTS = ROOT / "outputs"


@dataclass(frozen=True)
class RunFolder:
    """A run's files as they are now; None for one that is not there."""

    path: Path

    @property
    def identity(self) -> dict[str, Any] | None:
        """What `identify` returned when the run began."""
        return read_json(self.path / "started.json")

    @property
    def record(self) -> dict[str, Any] | None:
        """run.json, which a finished run has."""
        return read_json(self.path / "run.json")

    @property
    def metrics(self) -> dict[str, Any] | None:
        return read_json(self.path / "metrics.json")

    @property
    def adapter_config(self) -> dict[str, Any]:
        return read_json(self.path / "adapter_config.json") or {}

    @property
    def adapter(self) -> dict[str, Any]:
        """The adapter's file, size in bytes and SHA-256."""
        file = self.path / "adapter_model.safetensors"
        return {"file": str(file.relative_to(ROOT)), "bytes": file.stat().st_size, "sha256": sha256(file)}


def identify(written: Recipe, as_run: Recipe, args: list[str]) -> dict[str, Any]:
    """What makes a run this one and no other: the recipe's text as run, axolotl's options, the data's SHA-256."""
    unchanged = as_run.keys == written.keys
    return {
        "recipe": written.path.read_text(encoding="utf-8") if unchanged else dump(written.path, as_run.keys),
        "args": args,
        "data": as_run.data_sha256,
    }


def dump(path: Path, keys: dict[str, Any]) -> str:
    return f"# As run, from {path}\n" + yaml.safe_dump(keys, sort_keys=False, width=120)


def config_file(out: Path, rank: int = 0) -> Path:
    """The recipe that axolotl reads: what is recorded is what is trained, whoever edits the recipe meanwhile.

    Nodes after the first have one each, hidden so that the first does not take it for another run's file.
    """
    return out / (f".recipe.node{rank}.yaml" if rank else "recipe.yaml")


def claim_folder(path: Path, out: Path, identity: dict[str, Any], force: bool, rank: int = 0) -> dict[str, Any] | None:
    """Make the output folder this run's, or return run.json of an equal finished run. UserError before work is lost.

    Broken checkpoints are named and set aside; the run resumes from the last complete one. rank: of a node; those after
    the first only write the recipe that they run.
    """
    out.mkdir(parents=True, exist_ok=True)
    before, record = RunFolder(out).identity, RunFolder(out).record
    changed = difference(before, identity) if before else None
    same = bool(before) and not changed
    if not rank:
        if same and not force:
            if record:
                return record
            if resumes(out):
                return None
        # Files that begin with a dot are this command's own, left where it was killed.
        foreign = before is None and any(not file.name.startswith(".") for file in out.iterdir())
        done = (out / "run.json").is_file()
        precious = done or any(out.glob("checkpoint-*")) or foreign
        if precious and not same and not force:
            state = "a finished run" if done else "an unfinished run"
            state = f"{state} with {changed}" if before else "files that this command did not write"
            raise UserError(
                f"{out.relative_to(ROOT)}: holds {state}; FORCE=1 sets it aside and trains {path.stem} anew"
            )
        if precious:
            stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
            out.rename(aside := out.with_name(f"{out.name}.{stamp}"))
            print(f"set aside: {aside.relative_to(ROOT)}")
            out.mkdir()
        with replacing(out / "started.json") as file:  # first: a folder with it is this run's, however early it ends
            json.dump(identity, file, indent=1)
            file.write("\n")
    with replacing(config_file(out, rank)) as file:
        file.write(identity["recipe"])
    return None


def resumes(out: Path) -> bool:
    """Whether a complete checkpoint is left to resume from; broken ones are named and set aside."""
    last, _, broken = checkpoints.last_whole(out)
    for line in broken:
        print(f"warning: {line}", file=sys.stderr)
    if last:
        print(f"{out.relative_to(ROOT)}: resuming from {last.name}")
    elif broken:
        print(f"{out.relative_to(ROOT)}: no complete checkpoint is left; training from the first step")
    return bool(last)


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


def folder_lock(out: Path, rank: int = 0, make: bool = True):
    """A lock beside the output folder, held by this process and by axolotl below it: two runs never share a folder.

    rank: the nodes of one run may share the folder (a network folder); each has a lock of its own. make: make the
    folder, too. UserError where it cannot be written, or another command has the lock.
    """
    try:
        (out if make else out.parent).mkdir(parents=True, exist_ok=True)
        probe = (out if out.is_dir() else out.parent) / f".{out.name}.writable"
        probe.touch()
        probe.unlink()
        lock = (out.parent / f".{out.name}{f'.node{rank}' if rank else ''}.lock").open("w")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); fix its permissions") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"{out.relative_to(ROOT)}: another command is at work there; wait for it or end it") from None
    return lock


def of_recipe(name: str, tiny: bool) -> dict[str, Any]:
    """A trained recipe's model, adapter, bits, test sets and training. UserError where it is not trained."""
    path = recipe_names.find(name)
    out = output_folder(recipes.load(path).keys, tiny)
    folder, as_run = RunFolder(out), config_file(out)
    record = folder.record
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
        | {"log": (folder.metrics or {}).get("log", [])},
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
