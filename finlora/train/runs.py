"""Runs on disk: a run's folder, its lock, what makes it this run and no other, and what it trained."""

import datetime
import fcntl
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fastdora.plugin import checkpoints
from fastdora.plugin.checksums import changed_files, changed_weights, starting_files
from finlora.core.errors import UserError
from finlora.core.files import read_json, sha256, write_json, write_text
from finlora.core.paths import ROOT, shown
from finlora.data.neardup import normalise
from finlora.data.tasks import load_tasks
from finlora.data.test_sets import choose
from finlora.recipes import load as recipes
from finlora.recipes import names as recipe_names
from finlora.recipes.recipe import Recipe, output_folder

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

    def last_checkpoint(self) -> tuple[Path | None, list[str]]:
        """The last complete checkpoint, and a line on each broken one, which is set aside."""
        last, _, broken = checkpoints.last_whole(self.path)
        return last, broken

    @property
    def adapter_config(self) -> dict[str, Any]:
        return read_json(self.path / "adapter_config.json") or {}

    @property
    def adapter(self) -> dict[str, Any]:
        """The adapter's file, size in bytes and SHA-256."""
        file = self.path / "adapter_model.safetensors"
        return {"file": str(file.relative_to(ROOT)), "bytes": file.stat().st_size, "sha256": sha256(file)}


def identify(written: Recipe, as_run: Recipe, args: list[str]) -> dict[str, Any]:
    """What makes a run this one and no other: the recipe's text as run, axolotl's options, the files' SHA-256."""
    unchanged = as_run.keys == written.keys
    return {
        "recipe": written.path.read_text(encoding="utf-8") if unchanged else dump(written.path, as_run.keys),
        "args": args,
        "data": as_run.data_sha256,
        "start": starting_files(as_run.keys | option_values(args), ROOT),
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
        if same and record and not force:
            return record
        if not (same and not force and resumes(out, identity)):
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
        write_identity(out, identity)  # first: a folder with it is this run's, however early it ends
    write_text(config_file(out, rank), identity["recipe"])
    return None


def write_identity(out: Path, identity: dict[str, Any]) -> None:
    write_json(out / "started.json", identity)


def resumes(out: Path, identity: dict[str, Any]) -> bool:
    """Whether axolotl will resume from a checkpoint of the folder; broken ones are named and set aside."""
    keys = settings(identity)
    if not (keys.get("auto_resume_from_checkpoints") or keys.get("resume_from_checkpoint")):
        return False
    last, broken = RunFolder(out).last_checkpoint()
    for line in broken:
        print(f"warning: {line}", file=sys.stderr)
    if last:
        print(f"{out.relative_to(ROOT)}: resuming from {last.name}")
    elif broken:
        print(f"{out.relative_to(ROOT)}: no complete checkpoint is left; training from the first step")
    return bool(last)


def resume_options(path: Path, out: Path, identity: dict[str, Any], force: bool) -> list[str]:
    """Axolotl's option where `resume_from_checkpoint` names a checkpoint elsewhere and the run has one of its own.

    UserError where the one elsewhere, which the run begins with, is damaged or of a run with other settings.
    """
    name = settings(identity).get("resume_from_checkpoint")
    if not name or (folder := ROOT / name).resolve().parent == out.resolve():
        return []
    own = None if force else RunFolder(out).last_checkpoint()[0]
    if own:
        return ["--resume-from-checkpoint", str(own)]
    try:
        sealed = checkpoints.check(folder)
    except checkpoints.BrokenCheckpoint as error:
        raise UserError(f"{path}: {checkpoints.not_resumable(name, error)}") from error
    files = {key: identity[key] for key in ("data", "start")}
    before = RunFolder(folder.parent).identity
    if changed := (before and difference(before, identity)) or checkpoints.difference({**sealed, "recipe": {}}, files):
        raise UserError(
            f"{path}: key 'resume_from_checkpoint': {name} is of a run with {changed}; name a checkpoint of an equal "
            "run, or set lora_model_dir to start from an adapter"
        )
    return []


def settings(identity: dict[str, Any]) -> dict[str, Any]:
    """The recipe's keys with axolotl's options in their places."""
    return (yaml.safe_load(identity["recipe"]) or {}) | option_values(identity["args"])


def option_values(args: list[str]) -> dict[str, Any]:
    """The recipe keys that axolotl's options set: `--learning-rate 0.1`, `--seed=1`, `--tf32`, `--no-tf32`."""
    keys: dict[str, Any] = {}
    for arg, following in zip(args, [*args[1:], "--"], strict=False):
        if not arg.startswith("--"):
            continue
        name, equals, value = arg[2:].partition("=")
        name = name.replace("-", "_")
        if equals or not following.startswith("--"):
            keys[name] = _value(value if equals else following)
        else:
            keys[name.removeprefix("no_")] = not name.startswith("no_")
    return keys


def _value(text: str) -> Any:
    """The value of an option as axolotl (0.19.0) takes it: a number, true, false, null, else text, never a list."""
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    words = {"true": True, "yes": True, "false": False, "no": False, "null": None, "none": None, "~": None}
    return words.get(text.lower(), text)


def difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """What two runs' identities differ by, in a few words: settings, data files, or the files that they start from.

    None where they train the same: comments, the order of keys, and keys that say what is logged or saved do not count.
    The started.json of before 2026-11 names no files to start from.
    """
    old, new = settings(before), settings(now)
    keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    if keys := [key for key in keys if not checkpoints.MAY_CHANGE.fullmatch(key)]:
        return "other settings (" + ", ".join(f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys[:3]) + ")"
    names = sorted(before["data"].keys() | now["data"].keys())
    files = [name for name in names if before["data"].get(name) != now["data"].get(name)]
    if files:
        return f"other data ({', '.join(files)} changed)"
    files = changed_files(before.get("start", {}), now.get("start", {}))
    return f"another start ({', '.join(files)} changed)" if files else None


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
        raise UserError(f"{shown(str(out))}: another command is at work there; wait for it or end it") from None
    return lock


@dataclass(frozen=True)
class TrainedRecipe:
    """What a trained recipe says of itself; all of it is None without a recipe."""

    recipe: str | None = None  # its name
    subject: str | None = None  # the name of its results
    model: str | None = None  # the base: folder or hub id
    adapter: Path | None = None
    bits: int | None = None  # of the base's weights in training: 16, 8 or 4
    tiny: bool = False  # trained on a tiny base
    training: dict[str, Any] | None = None  # metrics, args, seconds, data_from and log
    trained_on: set[str] | None = None  # as of trained_contexts
    test_sets: list[str] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)  # run.json
    keys: dict[str, Any] = field(default_factory=dict)  # recipe.yaml, as it was trained


def of_recipe(name: str, tiny: bool) -> TrainedRecipe:
    """The trained recipe of this name. UserError where it is not trained, or what it was trained from has changed."""
    path = recipe_names.find(name)
    out = output_folder(recipes.load(path).keys, tiny)
    folder, as_run = RunFolder(out), config_file(out)
    record, again = folder.record, f"make train RECIPE={name}{' TINY=1' if tiny else ''}"
    if record is None or not as_run.is_file():
        state = "its training is unfinished" if any(out.glob("checkpoint-*")) else "is not trained"
        raise UserError(f"{out.relative_to(ROOT)}: {state}; run `{again}`" + ("" if tiny else ", or add TINY=1"))
    if (out / "adapter_model.safetensors").is_file() and folder.adapter["sha256"] != record["adapter"]["sha256"]:
        raise UserError(
            f"{out.relative_to(ROOT)}: the adapter is not the one that run.json records; run `{again} FORCE=1`"
        )
    check_start(out)
    keys = yaml.safe_load(as_run.read_text(encoding="utf-8"))
    parts = recipe_names.parse_name(path.stem) or {}
    base = record.get("base_model", keys["base_model"])
    return TrainedRecipe(
        recipe=path.stem,
        subject=path.stem + (".tiny" if tiny else ""),
        model=str(ROOT / base) if (ROOT / base).is_dir() else base,
        adapter=out,
        bits=8 if keys.get("load_in_8bit") else 4 if keys.get("load_in_4bit") else 16,
        tiny=tiny or keys["base_model"].startswith(".cache/tiny"),
        training={key: record[key] for key in ("metrics", "args", "seconds", "data_from") if key in record}
        | {"log": (folder.metrics or {}).get("log", [])},
        trained_on=trained_contexts(record),
        test_sets=choose([parts["task"] if parts.get("task") in load_tasks() else "sentiment"]),
        record=record,
        keys=keys,
    )


def check_start(out: Path, model: str | None = None) -> bool:
    """`check_base_weights`, and a warning where an adapter in `lora_model_dir` has changed since.

    It is no error: the trained adapter holds what it began with.
    """
    same = check_base_weights(out, model)
    record, keys = RunFolder(out).record or {}, _trained_keys(out)
    first = keys.get("lora_model_dir")
    before = {first: record.get("start", {}).get(first, {})}
    if first and (changed := changed_files(before, starting_files(keys, ROOT))):
        print(f"warning: {shown(str(out))}: {', '.join(changed)} changed since training began with it", file=sys.stderr)
    return same


def check_base_weights(out: Path, model: str | None = None) -> bool:
    """Whether the base's weights are those that the run in `out` recorded; UserError where they are others.

    model: the base that is asked for (default: the run's own), whatever its name. False where there is nothing to
    compare: an adapter from elsewhere, a run of before 2026-11, which has no checksums, or a base that is not here.
    """
    record, keys = RunFolder(out).record or {}, _trained_keys(out)
    if not keys:
        return False
    base = record["base_model"]
    changed = changed_weights(record["start"], keys["base_model"], model or base, ROOT)
    if not changed:
        return changed is not None
    files = ", ".join(changed[:3])
    if model and (ROOT / model).resolve() != (ROOT / base).resolve():
        raise UserError(
            f"MODEL={model}: holds other weights ({files}) than {base}, which the adapter was trained on; leave "
            f"MODEL= out, or set MODEL={base}"
        )
    raise UserError(
        f"{shown(str(out))}: its base model has changed since it was trained ({files}); restore it, or train again "
        "with FORCE=1"
    )


def _trained_keys(out: Path) -> dict[str, Any]:
    """The recipe's keys as the run in `out` had them; none where it recorded no checksums of what it started from."""
    record, file = RunFolder(out).record or {}, config_file(out)
    if not record.get("start") or not file.is_file():
        return {}
    return yaml.safe_load(file.read_text(encoding="utf-8")) | option_values(record["args"])


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
