"""A run survives: kill -9, damaged checkpoints, a full disk; and never resumes as another run."""

import json
import os
import random
import shutil
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from failures import refuses, says
from kills import damage, digest, killed, recipe
from tqdm import tqdm

from fastdora.plugin import checkpoints
from finlora.core import provenance
from finlora.recipes import bases
from finlora.train import run as train_module
from finlora.train import runs as train_runs
from finlora.train.runs import Identity, RunFolder

pytestmark = pytest.mark.xdist_group("axolotl")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_base):
    """A folder with `whole/`, an uninterrupted run with all its checkpoints, and a function that writes recipes."""
    from forked import axolotl_command

    folder = tmp_path_factory.mktemp("resume")
    path = recipe(folder, "whole", tiny_base, save_total_limit=10)
    code, output = axolotl_command("train", str(path), "--launcher", "python")
    assert code == 0, output[-3000:]
    return folder, lambda name, **changes: recipe(folder, name, tiny_base, **changes)


def train(path: Path) -> str:
    from forked import axolotl_command

    code, output = axolotl_command("train", str(path), "--launcher", "python")
    assert code == 0, output[-3000:]
    return output


def error_of(output: str) -> str:
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")


def test_a_killed_child_takes_no_lock_with_it():
    """Of tqdm, whose lock is one of all forked processes: the next child shows a bar all the same."""
    from forked import finish, start

    tqdm.get_lock()  # as the first bar in this process makes it

    def hold():
        tqdm.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    assert finish(start([], main=hold))[0] == -signal.SIGKILL
    child = start([], main=lambda: print(sum(tqdm([1, 2]))))
    end = time.monotonic() + 20
    while not (done := os.waitpid(child[0], os.WNOHANG))[0] and time.monotonic() < end:
        time.sleep(0.05)
    if not done[0]:
        os.kill(child[0], signal.SIGKILL)
    code, output = finish(child, done[1] if done[0] else None)
    assert code == 0 and "3" in output.splitlines(), output


def test_killed_runs_end_with_the_same_adapter(runs):
    """kill -9 within a step's time, within a checkpoint, and between; tests/kills.py does it twenty times."""
    folder, write = runs
    out, path = folder / "killed", write("killed", save_total_limit=2)
    in_checkpoint = 0
    for delay in (None, 0.2):
        row = killed(path, out, delay)
        if row["ended"]:
            break
        in_checkpoint += row["in_checkpoint"]
    assert in_checkpoint
    train(path)
    assert digest(out) == digest(folder / "whole")
    left = checkpoints.numbered(out)
    assert [path.name for path in left] == ["checkpoint-12", "checkpoint-10"]  # rotated
    assert all(checkpoints.check(path) for path in left)
    assert list(out.glob("broken-checkpoint-*"))


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(runs):
    folder, write = runs
    out, path = folder / "damaged", write("damaged")
    out.mkdir()
    for step in (2, 4):
        shutil.copytree(folder / "whole" / f"checkpoint-{step}", out / f"checkpoint-{step}")
    name = damage(out / "checkpoint-4", "truncated", random.Random(1))
    output = " ".join(train(path).split())
    says(output, f"{out}/checkpoint-4 is broken ({name} ", "set aside as broken-checkpoint-4")
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["steps_this_run"] == 10 and digest(out) == digest(folder / "whole")


def test_another_run_does_not_resume_from_a_checkpoint(runs):
    from forked import axolotl_command

    folder, write = runs
    out = folder / "other"
    out.mkdir()
    shutil.copytree(folder / "whole" / "checkpoint-4", out / "checkpoint-4")
    path = write("other", learning_rate=0.002)
    code, output = axolotl_command("train", str(path), "--launcher", "python")
    assert code == 1
    change = "was 0.003 and is 0.002", "change them back"
    says(error_of(output), f"{out}/checkpoint-4 is of", *change, "output_dir", file=path, key="learning_rate")
    rows = folder / "train.jsonl"
    before = rows.read_bytes()
    rows.write_bytes(before.replace(b"company 3 ", b"company 33 "))
    try:
        code, output = axolotl_command("train", str(write("other")), "--launcher", "python")
    finally:
        rows.write_bytes(before)
    assert code == 1
    says(error_of(output), f"{out}/checkpoint-4 is of", "train.jsonl changed", "change them back", file=path)


LOADED = "8-bit DoRA"  # which layers the loaded model has


def test_a_checkpoint_elsewhere_is_checked_before_the_model_is_loaded(runs):
    """`resume_from_checkpoint`: an equal run's is resumed from, one of other keys or with a changed byte is not."""
    from axolotl.utils.dict import DictDefault
    from forked import axolotl_command

    from fastdora.plugin import resume
    from fastdora.plugin.keys import RecipeError

    folder, write = runs
    elsewhere = folder / "elsewhere" / "checkpoint-4"
    shutil.copytree(folder / "whole" / "checkpoint-4", elsewhere)
    explicit = {"resume_from_checkpoint": str(elsewhere), "auto_resume_from_checkpoints": False}
    assert LOADED in train(write("given", **explicit))
    metrics = json.loads((folder / "given" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["steps_this_run"] == 8 and digest(folder / "given") == digest(folder / "whole")
    path = write("given2", learning_rate=0.002, **explicit)
    code, output = axolotl_command("train", str(path), "--launcher", "python")
    assert code == 1 and LOADED not in output
    says(error_of(output), "was 0.003 and is 0.002", "remove resume_from", file=path, key="learning_rate")
    name = damage(elsewhere, "changed", random.Random(1))
    cfg = DictDefault(
        yaml.safe_load(write("given2", **explicit).read_text(encoding="utf-8")) | {"axolotl_config_path": path}
    )
    with refuses(
        f"{elsewhere} cannot", f"{name} has changed", error=RecipeError, file=path, key="resume_from_checkpoint"
    ):
        resume.check(cfg)


def rates(out: Path) -> dict[int, float]:
    """The learning rate of each step."""
    log = json.loads((out / "metrics.json").read_text(encoding="utf-8"))["log"]
    return {entry["step"]: entry["learning_rate"] for entry in log}


@pytest.mark.parametrize("scheduler, equal", [("cosine", False), ("constant", True)])
def test_more_epochs_go_on_as_a_run_of_so_many_from_its_start(scheduler, equal, runs):
    """After one epoch a second: the same rows, optimizer and rates, said where they jump; else one adapter."""
    folder, write = runs
    keys = {"max_steps": None, "lr_scheduler": scheduler, "save_steps": None, "saves_per_epoch": 1}
    for name, changes in (("one", {}), ("two", {"num_epochs": 2})):
        train(write(f"{scheduler}_{name}", **keys | {"num_epochs": 1} | changes))
    out, whole = folder / f"{scheduler}_one", folder / f"{scheduler}_two"
    (last, *_), before = checkpoints.numbered(out), rates(out)
    again = keys | {"num_epochs": 2, "resume_from_checkpoint": str(last)}
    output = train(write(out.name, **again))
    step, now = len(before), rates(out)
    assert list(now) == list(rates(whole)) and len(now) == 2 * step
    assert {at: now[at] for at in before} == before and [now[at] for at in now if at > step] == [
        rate for at, rate in rates(whole).items() if at > step
    ]
    assert (digest(out) == digest(whole)) == equal
    assert ("the learning rate goes from 0 to 0.00" in output) != equal
    if not equal:
        from forked import axolotl_command

        for words, changes in (("keeps the length", {"lr_scheduler": "rex"}), ("was 0.003", {"learning_rate": 0.1})):
            code, output = axolotl_command("train", str(write(out.name, **again | changes)), "--launcher", "python")
            assert code == 1 and words in error_of(output)


def test_a_run_starts_from_another_ones_adapter(runs):
    """`lora_model_dir`, which FROM= sets: its one step is the warmup's first, at a learning rate of zero."""
    folder, write = runs
    train(write("from", lora_model_dir=str(folder / "whole"), max_steps=1))
    assert rates(folder / "from") == {1: 0} and digest(folder / "from") == digest(folder / "whole")


def test_a_full_disk_costs_that_checkpoint_only(runs):
    """checkpoint-4's optimizer goes to /dev/full, where every write fails as on a full disk."""
    folder, write = runs
    out, path = folder / "full", write("full", save_total_limit=10)
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    path.write_text(yaml.safe_dump(config | {"plugins": [*config["plugins"], "full_disk.FullDisk"]}), encoding="utf-8")
    output = " ".join(train(path).split())
    says(output, f"{out}/checkpoint-4 could not be written", f"the last whole checkpoint is {out}/checkpoint-2")
    assert [int(path.name.split("-")[1]) for path in checkpoints.numbered(out)] == [12, 10, 8, 6, 2]
    assert digest(out) == digest(folder / "whole")


RECIPE = "learning_rate: 0.1\nauto_resume_from_checkpoints: true\n"
IDENTITY = Identity(RECIPE, [], {"train.jsonl": "1"}, {})


def test_make_train_claims_a_folder_again_however_early_it_was_killed(tmp_path, monkeypatch):
    """Killed after each of the files that claiming writes, and while one is written."""
    for module in provenance, bases, train_module, train_runs:
        monkeypatch.setattr(module, "ROOT", tmp_path)
    for number, files in enumerate([[], [".started.json.x1"], ["started.json"], ["started.json", ".recipe.yaml.x2"]]):
        out = tmp_path / str(number)
        out.mkdir()
        for name in files:
            (out / name).write_text(json.dumps(asdict(IDENTITY)) if name == "started.json" else "{", encoding="utf-8")
        assert RunFolder(out).claim(Path("a.yaml"), IDENTITY, force=False) == (None, [])
        assert json.loads((out / "started.json").read_text(encoding="utf-8")) == asdict(IDENTITY)
        assert (out / "recipe.yaml").read_text(encoding="utf-8") == RECIPE


def test_make_train_resumes_from_the_last_whole_checkpoint(tmp_path, monkeypatch, capsys):
    for module in provenance, bases, train_module, train_runs:
        monkeypatch.setattr(module, "ROOT", tmp_path)
    out = tmp_path / "out"
    for step in (2, 4):
        (out / f"checkpoint-{step}").mkdir(parents=True)
        (out / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"state")
        checkpoints.seal(out / f"checkpoint-{step}", {})
    (out / "started.json").write_text(json.dumps(asdict(IDENTITY)), encoding="utf-8")
    (out / "checkpoint-4" / "optimizer.pt").write_bytes(b"sta")
    assert RunFolder(out).claim(Path("a.yaml"), IDENTITY, force=False)[0] is None
    printed = capsys.readouterr()
    says(printed.out, "resuming from checkpoint-2", file="out")
    says(printed.err, "checkpoint-4 is broken", "optimizer.pt has 3 of 5", "set aside as broken-checkpoint-4")
    changed = replace(IDENTITY, data={"train.jsonl": "2"})
    with refuses("unfinished", "other data", "train.jsonl changed", "FORCE=1"):
        RunFolder(out).claim(Path("a.yaml"), changed, force=False)
    (out / "checkpoint-2" / checkpoints.SEAL).unlink()
    assert RunFolder(out).claim(Path("a.yaml"), IDENTITY, force=False)[0] is None
    says(capsys.readouterr().out, "no complete checkpoint", "first step", file="out")
