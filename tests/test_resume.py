"""A run survives: kill -9, damaged checkpoints, a full disk; and never goes on as another run."""

import json
import random
import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from bench.kills import DAMAGES, damage, digest, killed, recipe
from fastdora import checkpoints
from tools import train as train_module
from tools.cli import UserError

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


def test_killed_runs_end_with_the_same_adapter(runs):
    """kill -9 within a step's time, within a checkpoint, and between; bench/kills.py does it twenty times."""
    from forked import finish, start

    folder, write = runs
    out, path = folder / "killed", write("killed", save_total_limit=2)
    in_checkpoint = 0
    for delay in (None, 0.2):
        row = killed(start, finish, path, out, delay)
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
    output = train(path)
    assert f"{out}/checkpoint-4 is broken ({name} has " in output and "set aside as broken-checkpoint-4" in output
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["steps_this_run"] == 10 and digest(out) == digest(folder / "whole")


def test_another_run_does_not_go_on_from_a_checkpoint(runs):
    from forked import axolotl_command

    folder, write = runs
    out = folder / "other"
    out.mkdir()
    shutil.copytree(folder / "whole" / "checkpoint-4", out / "checkpoint-4")
    code, output = axolotl_command("train", str(write("other", learning_rate=0.002)), "--launcher", "python")
    line = next(line for line in output.splitlines() if line.startswith("error: "))
    assert (
        code == 1 and f"{out}/checkpoint-4 is of a run with other settings (key 'learning_rate' was 0.003 and " in line
    )
    rows = folder / "train.jsonl"
    before = rows.read_bytes()
    rows.write_bytes(before.replace(b"company 3 ", b"company 33 "))
    try:
        code, output = axolotl_command("train", str(write("other")), "--launcher", "python")
    finally:
        rows.write_bytes(before)
    line = next(line for line in output.splitlines() if line.startswith("error: "))
    assert code == 1 and f"with other settings ({rows} changed); change them back" in line


def test_a_full_disk_costs_that_checkpoint_only(runs):
    """checkpoint-4's optimizer goes to /dev/full, where every write fails as on a full disk."""
    folder, write = runs
    out, path = folder / "full", write("full", save_total_limit=10)
    wanted = yaml.safe_load(path.read_text(encoding="utf-8"))
    path.write_text(yaml.safe_dump(wanted | {"plugins": [*wanted["plugins"], "full_disk.FullDisk"]}), encoding="utf-8")
    output = " ".join(train(path).split())
    assert f"{out}/checkpoint-4 could not be written (" in output
    assert f"going on, the last whole checkpoint is {out}/checkpoint-2" in output
    assert [int(path.name.split("-")[1]) for path in checkpoints.numbered(out)] == [12, 10, 8, 6, 2]
    assert digest(out) == digest(folder / "whole")


NAMES = st.from_regex(r"[a-z]{1,8}\.(bin|json)", fullmatch=True)


@given(
    files=st.dictionaries(NAMES, st.binary(min_size=1, max_size=200), min_size=1, max_size=4),
    kind=st.sampled_from(DAMAGES),
    seed=st.integers(0, 1000),
)
def test_any_damage_is_noticed(files, kind, seed, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    for step in (3, 20, 100):
        folder = out / f"checkpoint-{step}"
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        checkpoints.seal(folder, {"recipe": {"step": step}})
    (out / "checkpoint-final").mkdir()
    assert checkpoints.last_whole(out) == (out / "checkpoint-100", {"recipe": {"step": 100}}, [])
    name = damage(out / "checkpoint-100", kind, random.Random(seed))
    folder, run, lines = checkpoints.last_whole(out)
    assert folder == out / "checkpoint-20" and run == {"recipe": {"step": 20}}
    assert len(lines) == 1 and f"checkpoint-100 is broken ({name} " in lines[0]
    assert (out / "broken-checkpoint-100").is_dir() and not (out / "checkpoint-100").exists()
    (out / "checkpoint-20" / checkpoints.SEAL).unlink()
    folder, _, lines = checkpoints.last_whole(out)
    assert folder == out / "checkpoint-3" and "the run was ended while it was written" in lines[0]


IDENTITY = {"recipe": "learning_rate: 0.1\n", "args": [], "data": {"train.jsonl": "1"}}


def test_make_train_claims_a_folder_again_however_early_it_was_killed(tmp_path, monkeypatch):
    """Killed after each of the files that claiming writes, and while one is written."""
    monkeypatch.setattr(train_module, "ROOT", tmp_path)
    for number, files in enumerate([[], [".started.json.x1"], ["started.json"], ["started.json", ".recipe.yaml.x2"]]):
        out = tmp_path / str(number)
        out.mkdir()
        for name in files:
            (out / name).write_text(json.dumps(IDENTITY) if name == "started.json" else "{", encoding="utf-8")
        assert train_module.claim_folder(Path("a.yaml"), out, IDENTITY, force=False) is None
        assert json.loads((out / "started.json").read_text(encoding="utf-8")) == IDENTITY
        assert (out / "recipe.yaml").read_text(encoding="utf-8") == IDENTITY["recipe"]


def test_make_train_goes_on_from_the_last_whole_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_module, "ROOT", tmp_path)
    out = tmp_path / "out"
    for step in (2, 4):
        (out / f"checkpoint-{step}").mkdir(parents=True)
        (out / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"state")
        checkpoints.seal(out / f"checkpoint-{step}", {})
    (out / "started.json").write_text(json.dumps(IDENTITY), encoding="utf-8")
    (out / "checkpoint-4" / "optimizer.pt").write_bytes(b"sta")
    assert train_module.claim_folder(Path("a.yaml"), out, IDENTITY, force=False) is None
    said = capsys.readouterr()
    assert said.out == "out: going on from checkpoint-2\n"
    assert said.err.endswith(
        "checkpoint-4 is broken (optimizer.pt has 3 of 5 bytes); set aside as broken-checkpoint-4\n"
    )
    changed = IDENTITY | {"data": {"train.jsonl": "2"}}
    with pytest.raises(UserError, match=r"an unfinished run with other data \(train.jsonl changed\); FORCE=1"):
        train_module.claim_folder(Path("a.yaml"), out, changed, force=False)
    (out / "checkpoint-2" / checkpoints.SEAL).unlink()
    assert train_module.claim_folder(Path("a.yaml"), out, IDENTITY, force=False) is None
    assert capsys.readouterr().out == "out: no whole checkpoint is left; beginning anew\n"
