"""Runs on disk: a run's folder, its lock, what makes it this run and no other, and what it trained."""

import datetime
import fcntl
import hashlib
import json
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from fastdora.plugin import checkpoints
from fastdora.plugin.checksums import Digests, changed_files, changed_weights, starting_files
from finlora.core.errors import UserError
from finlora.core.files import read_json, sha256, write_json, write_text
from finlora.core.paths import ROOT, shown
from finlora.data.neardup import normalise
from finlora.data.tasks import load_tasks
from finlora.recipes import load as recipes
from finlora.recipes import names as recipe_names
from finlora.recipes.recipe import Recipe, output_folder, with_options

OUTPUTS = ROOT / "outputs"


@dataclass(frozen=True)
class Identity:
    """What makes a run this one and no other, as started.json has it."""

    recipe: str  # the text that axolotl reads
    args: Sequence[str]  # axolotl's own options
    data: dict[str, str]  # SHA-256 of each data file
    start: Digests = field(default_factory=dict)  # of what it starts from; runs of before 2026-11 do not say
    goes_on_from: dict[str, Any] | None = None  # of a run with more epochs: checkpoint, epochs, adapter, set_aside

    @classmethod
    def of(cls, recipe: Recipe) -> "Identity":
        return cls(recipe.as_run, list(recipe.args), recipe.data_sha256, recipe.starting_files)

    @property
    def sha256(self) -> str:
        parts = {name: part for name, part in asdict(self).items() if part is not None}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe's keys with axolotl's options in their places."""
        return with_options(yaml.safe_load(self.recipe) or {}, self.args)

    @property
    def epochs(self) -> float:
        return self.settings.get("num_epochs") or 0

    def difference(self, now: "Identity", but: Sequence[str] = ()) -> str | None:
        """What a later run's identity differs by, in a few words: settings, data files, or files that it starts from.

        None where both train the same: comments, the order of keys, and keys that say what is logged or saved do not
        count, nor those that `but` names.
        """
        old, new = self.settings, now.settings
        keys = [key for key in _changed(old, new) if key not in but and not checkpoints.MAY_CHANGE.fullmatch(key)]
        if keys:
            return "other settings (" + ", ".join(f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys[:3]) + ")"
        if files := _changed(self.data, now.data):
            return f"other data ({', '.join(files)} changed)"
        for model in sorted(self.start.keys() & now.start.keys()):
            if files := [f"{model}/{file}".rstrip("/") for file in _changed(self.start[model], now.start[model])]:
                return f"another start ({', '.join(files)} changed)"
        return None


def _changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]


@dataclass(frozen=True)
class RunFolder:
    """A run's files as they are now; None for one that is not there. rank: of a node; the first one owns the folder."""

    path: Path
    rank: int = 0

    @property
    def recipe_file(self) -> Path:
        """The recipe that axolotl reads: what is recorded is what is trained, whoever edits the recipe meanwhile.

        Nodes after the first have one each, hidden so that the first does not take it for another run's file.
        """
        return self.path / (f".recipe.node{self.rank}.yaml" if self.rank else "recipe.yaml")

    @property
    def identity(self) -> Identity | None:
        """As it was when the run began."""
        content = read_json(self.path / "started.json")
        return Identity(**content) if content else None

    @property
    def record(self) -> dict[str, Any] | None:
        """run.json, which a finished run has."""
        return read_json(self.path / "run.json")

    @property
    def metrics(self) -> dict[str, Any] | None:
        return read_json(self.path / "metrics.json")

    @property
    def adapter_config(self) -> Any:
        return read_json(self.path / "adapter_config.json")

    @property
    def adapter(self) -> dict[str, Any]:
        """The adapter's file, size in bytes and SHA-256."""
        file = self.path / "adapter_model.safetensors"
        return {"file": str(file.relative_to(ROOT)), "bytes": file.stat().st_size, "sha256": sha256(file)}

    @property
    def settings(self) -> dict[str, Any]:
        """What a finished run trained; nothing where it recorded no checksums of what it started from."""
        record = self.record or {}
        if not record.get("start") or not self.recipe_file.is_file():
            return {}
        return with_options(yaml.safe_load(self.recipe_file.read_text(encoding="utf-8")), record["args"])

    def is_of(self, recipe: Recipe) -> bool:
        """Whether the folder holds a run that trains what the recipe would train now."""
        before = self.identity
        return before is not None and not before.difference(Identity.of(recipe))

    def claim(
        self, recipe: Path, identity: Identity, force: bool, more_epochs: bool = False
    ) -> tuple[dict[str, Any] | None, list[str]]:
        """Make the folder this run's: (run.json of an equal finished run, axolotl's options to resume with).

        Broken checkpoints are named and set aside; the run resumes from the last complete one. more_epochs: a run that
        is in the folder and differs by fewer epochs alone goes on, see `go_on`. UserError before work is lost. Nodes
        after the first only write the recipe that they run.
        """
        record = None if force else self.record
        resume = [] if record else self.resume_options(recipe, identity, force)
        earlier = self.earlier_checkpoint(identity) if more_epochs and not force else None
        if earlier:
            resume = ["--resume-from-checkpoint", str(earlier)]
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.rank:
            before: Identity | None = self.identity
            changed = before.difference(identity) if before else None
            equal = before is not None and not changed
            if equal and record:
                print(f"{shown(self.path)} is already trained with this recipe and data; FORCE=1 trains again")
                return record, []
            by_epochs = (
                before is not None
                and before.epochs != identity.epochs
                and not before.difference(identity, but=checkpoints.BY_EPOCHS)
            )
            if by_epochs and more_epochs and not force and (record or earlier):
                identity = self.go_on(before, identity, earlier)
            elif force or not (equal and self.resumes(identity)):
                instead = (
                    f"EPOCHS={identity.epochs} goes on from it, "
                    if by_epochs and before.epochs < identity.epochs
                    else ""
                )
                self.clear(changed, replaceable=equal or force, instead=instead)
            else:
                identity = replace(identity, goes_on_from=before.goes_on_from)
            self.begin(identity)  # first: a folder with started.json is this run's, however early it ends
        write_text(self.recipe_file, identity.recipe)
        return None, resume

    def earlier_checkpoint(self, identity: Identity) -> Path | None:
        """The last complete checkpoint, where its run was to have fewer epochs than this one."""
        last, sealed, _ = checkpoints.last_whole(self.path)
        epochs = sealed.get("recipe", {}).get("num_epochs", math.inf)
        return last if epochs < identity.epochs else None

    def go_on(self, before: Identity, identity: Identity, checkpoint: Path | None) -> Identity:
        """Set the run before aside, all but its checkpoints, and return what goes on from the last one of them.

        Prints what then happens to the learning rate. UserError where the run before cannot go on.
        """
        old, new, keys = before.epochs, identity.epochs, identity.settings
        metrics, scheduler, here = self.metrics or {}, keys.get("lr_scheduler", "cosine"), self.path.relative_to(ROOT)
        if old > new:
            raise UserError(f"EPOCHS={new}: {here} has {old} epochs; give more, or FORCE=1 trains {new} anew")
        fault = None
        if scheduler in checkpoints.FIXED_LENGTH:
            fault = f"key 'lr_scheduler' is {scheduler}, which keeps the number of steps that it began with"
        elif not keys.get("auto_resume_from_checkpoints"):
            fault = "it needs auto_resume_from_checkpoints: true"
        elif metrics.get("stopped_early"):
            fault = f"it stopped early, at step {metrics['steps']}, so that more epochs would not lower its loss"
        elif not checkpoint:
            fault = "no complete checkpoint of it is left"
        elif not checkpoints.has_optimizer(checkpoint):
            fault = f"{checkpoint.name} has no optimizer's state"
        if fault:
            raise UserError(
                f"EPOCHS={new}: {here} cannot go on: {fault}; FORCE=1 trains {new} epochs anew, and "
                f"FROM={here} starts a recipe of another name from its adapter"
            )
        record = self.record or {}
        aside = self.set_aside_beside_checkpoints() if record else None
        print(
            f"{here}: going on from {checkpoint.name} ({old} epochs) to {new} epochs; the learning rate is "
            f"from there on that of a run of {new} epochs (lr_scheduler: {scheduler}), not what {old} epochs ended with"
        )
        adapter = record.get("adapter", {}).get("sha256")
        facts = {"checkpoint": checkpoint.name, "epochs": old, "adapter_sha256": adapter, "set_aside": aside}
        return replace(identity, goes_on_from=facts)

    def set_aside_beside_checkpoints(self) -> str:
        """Move a finished run's files beside the folder, all but its checkpoints; the name of their folder.

        run.json goes first and started.json stays, so that where this is killed an unfinished run is left.
        """
        aside = self.aside()
        aside.mkdir()
        shutil.copy2(self.path / "started.json", aside)
        (self.path / "run.json").rename(aside / "run.json")
        for path in self.path.iterdir():
            if path.name != "started.json" and checkpoints.PREFIX not in path.name:
                path.rename(aside / path.name)
        print(f"set aside: {aside.relative_to(ROOT)}")
        return str(aside.relative_to(ROOT))

    def aside(self) -> Path:
        """A folder beside this one that is not there yet."""
        return self.path.with_name(f"{self.path.name}.{datetime.datetime.now():%Y%m%d-%H%M%S}")

    def begin(self, identity: Identity) -> Identity:
        """Record what this run is; the first node does."""
        if not self.rank:
            write_json(self.path / "started.json", asdict(identity))
        return identity

    def resumes(self, identity: Identity) -> bool:
        """Whether axolotl will resume from a checkpoint of the folder; broken ones are named and set aside."""
        keys = identity.settings
        if not (keys.get("auto_resume_from_checkpoints") or keys.get("resume_from_checkpoint")):
            return False
        last, _, broken = checkpoints.last_whole(self.path)
        for line in broken:
            print(f"warning: {line}", file=sys.stderr)
        if last:
            print(f"{self.path.relative_to(ROOT)}: resuming from {last.name}")
        elif broken:
            print(f"{self.path.relative_to(ROOT)}: no complete checkpoint is left; training from the first step")
        return bool(last)

    def clear(self, changed: str | None, replaceable: bool, instead: str = "") -> None:
        """Set what the folder holds aside where it is worth keeping; UserError where it may not be replaced.

        instead: what the error offers beside FORCE=1.
        """
        # Files that begin with a dot are this command's own, left where it was killed.
        foreign = self.identity is None and any(not file.name.startswith(".") for file in self.path.iterdir())
        finished = (self.path / "run.json").is_file()
        if not (finished or foreign or any(self.path.glob("checkpoint-*"))):
            return
        if not replaceable:
            state = f"{'a finished' if finished else 'an unfinished'} run with {changed}"
            state = "files that this command did not write" if foreign else state
            raise UserError(
                f"{self.path.relative_to(ROOT)}: holds {state}; {instead}FORCE=1 sets it aside and trains anew"
            )
        self.path.rename(aside := self.aside())
        print(f"set aside: {aside.relative_to(ROOT)}")
        self.path.mkdir()

    def resume_options(self, recipe: Path, identity: Identity, force: bool) -> list[str]:
        """Axolotl's option where `resume_from_checkpoint` names a checkpoint elsewhere and the run has one of its own.

        UserError where the one elsewhere, which the run begins with, is damaged or of a run with other settings.
        """
        name = identity.settings.get("resume_from_checkpoint")
        if not name or (checkpoint := ROOT / name).resolve().parent == self.path.resolve():
            return []
        own = None if force else checkpoints.last_whole(self.path)[0]
        if own:
            return ["--resume-from-checkpoint", str(own)]
        try:
            sealed = checkpoints.check(checkpoint)
        except checkpoints.BrokenCheckpoint as error:
            raise UserError(f"{recipe}: {checkpoints.not_resumable(name, error)}") from error
        # The plugin compares all keys of the seal, which axolotl has filled up with its defaults.
        before = RunFolder(checkpoint.parent).identity or identity
        files = Identity(before.recipe, before.args, sealed.get("data", {}), sealed.get("start", {}))
        if changed := before.difference(identity) or files.difference(identity):
            raise UserError(
                f"{recipe}: key 'resume_from_checkpoint': {name} is of a run with {changed}; name a checkpoint of an "
                "equal run, or set lora_model_dir to start from an adapter"
            )
        return []


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
        raise UserError(f"{shown(out)}: another command is at work there; wait for it or end it") from None
    return lock


@dataclass(frozen=True)
class TrainedRecipe:
    """What a trained recipe says of itself; all of it is None without a recipe."""

    recipe: str | None = None  # its name
    results_name: str | None = None
    model: str | None = None  # the base: folder or hub id
    adapter: Path | None = None
    bits: int | None = None  # of the base's weights in training: 16, 8 or 4
    tiny: bool = False  # trained on a tiny base
    training: dict[str, Any] | None = None  # metrics, args, seconds, data_from and log
    trained_on: set[str] | None = None  # as of trained_contexts
    task: str | None = None  # whose test sets it is asked; sentiment where its name says none
    record: dict[str, Any] = field(default_factory=dict)  # run.json
    keys: dict[str, Any] = field(default_factory=dict)  # recipe.yaml, as it was trained


def of_recipe(name: str, tiny: bool) -> TrainedRecipe:
    """The trained recipe of this name. UserError where it is not trained, or its adapter is not what it recorded."""
    recipe = recipes.load(recipe_names.find(name))
    out = output_folder(recipe.keys, tiny)
    folder = RunFolder(out)
    record, again = folder.record, f"make train RECIPE={name}{' TINY=1' if tiny else ''}"
    if record is None or not folder.recipe_file.is_file():
        state = "its training is unfinished" if any(out.glob("checkpoint-*")) else "is not trained"
        raise UserError(f"{out.relative_to(ROOT)}: {state}; run `{again}`" + ("" if tiny else ", or add TINY=1"))
    if (out / "adapter_model.safetensors").is_file() and folder.adapter["sha256"] != record["adapter"]["sha256"]:
        raise UserError(
            f"{out.relative_to(ROOT)}: the adapter is not the one that run.json records; run `{again} FORCE=1`"
        )
    keys = yaml.safe_load(folder.recipe_file.read_text(encoding="utf-8"))
    task = (recipe.parts or {}).get("task")
    base = record.get("base_model", keys["base_model"])
    return TrainedRecipe(
        recipe=recipe.path.stem,
        results_name=recipe.path.stem + (".tiny" if tiny else ""),
        model=str(ROOT / base) if (ROOT / base).is_dir() else base,
        adapter=out,
        bits=recipe_names.bits_of(keys),
        tiny=tiny or keys["base_model"].startswith(".cache/tiny"),
        training={key: record[key] for key in ("metrics", "args", "seconds", "data_from") if key in record}
        | {"log": (folder.metrics or {}).get("log", [])},
        trained_on=trained_contexts(record),
        task=task if task in load_tasks() else "sentiment",
        record=record,
        keys=keys,
    )


def check_start(out: Path, model: str | None = None) -> bool:
    """`check_base_weights`, and a warning where an adapter in `lora_model_dir` has changed since.

    It is no error: the trained adapter holds what it began with.
    """
    same, run = check_base_weights(out, model), RunFolder(out)
    first = run.settings.get("lora_model_dir")
    if first:
        before = {first: run.record["start"].get(first, {})}
        if changed := changed_files(before, starting_files(run.settings, ROOT)):
            print(f"warning: {shown(out)}: {', '.join(changed)} changed since training began with it", file=sys.stderr)
    return same


def check_base_weights(out: Path, model: str | None = None) -> bool:
    """Whether the base's weights are those that the run in `out` recorded; UserError where they are others.

    model: the base that is asked for (default: the run's own), whatever its name. False where there is nothing to
    compare: an adapter from elsewhere, a run of before 2026-11, which has no checksums, or a base that is not here.
    """
    run = RunFolder(out)
    if not run.settings:
        return False
    base = run.record["base_model"]
    changed = changed_weights(run.record["start"], run.settings["base_model"], model or base, ROOT)
    if not changed:
        return changed is not None
    files = ", ".join(changed[:3])
    if model and (ROOT / model).resolve() != (ROOT / base).resolve():
        raise UserError(
            f"MODEL={model}: holds other weights ({files}) than {base}, which the adapter was trained on; leave "
            f"MODEL= out, or set MODEL={base}"
        )
    restore = "restore it, or train again with FORCE=1"
    raise UserError(f"{shown(out)}: its base model has changed since it was trained ({files}); {restore}")


def trained_contexts(record: dict[str, Any]) -> set[str] | None:
    """The normalised prompts that a run trained on; None where its data files are not as they were."""
    seen = set()
    for name, digest in record["data"].items():
        path = ROOT / name
        if not path.is_file() or sha256(path) != digest:
            return None
        if path.name != "validation.jsonl":
            with path.open(encoding="utf-8") as lines:
                seen |= {normalise(json.loads(line)["messages"][-2]["content"]) for line in lines}
    return seen
