"""Checkpoints: what a seal contains, which damage is noticed, which one is resumed from, and how two runs differ."""

import hashlib
import json
import os
import random
from pathlib import Path

import pytest
from failures import refuses, says
from hypothesis import given
from hypothesis import strategies as st
from kills import DAMAGES, damage

from fastdora.plugin import checkpoints
from fastdora.plugin.checkpoints import SEAL, BrokenCheckpoint

RUN = {"recipe": {"lora_r": 8}, "data": {"train.jsonl": "1"}}
BLOCK = 1 << 20  # more than what is hashed at a time


def checkpoint(out: Path, step: int, files: dict[str, bytes] | None = None, run: dict = RUN) -> Path:
    """A sealed checkpoint."""
    folder = out / f"checkpoint-{step}"
    for name, content in (files or {"model.bin": b"weights", "state/rng.pt": b"state"}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    checkpoints.seal(folder, run)
    return folder


def test_a_seal_holds_the_size_and_digest_of_every_file_and_the_run(tmp_path):
    big = b"0" * BLOCK + b"1"
    folder = checkpoint(tmp_path, 2, {"model.bin": big, "state/rng.pt": b"state", "empty": b""})
    checkpoints.seal(folder, RUN)  # the seal itself is not in it, nor its own temporary file
    assert json.loads((folder / SEAL).read_text(encoding="utf-8")) == {
        "files": {
            "empty": {"bytes": 0, "sha256": hashlib.sha256().hexdigest()},
            "model.bin": {"bytes": BLOCK + 1, "sha256": hashlib.sha256(big).hexdigest()},
            "state/rng.pt": {"bytes": 5, "sha256": hashlib.sha256(b"state").hexdigest()},
        },
        "run": RUN,
    }
    assert sorted(path.name for path in folder.iterdir()) == ["empty", "model.bin", SEAL, "state"]
    assert checkpoints.check(folder) == RUN


def test_a_seal_killed_while_it_was_written_is_no_file_of_the_next(tmp_path):
    folder = checkpoint(tmp_path, 2)
    (folder / SEAL).rename(folder / f".{SEAL}")
    checkpoints.seal(folder, RUN)
    assert checkpoints.check(folder) == RUN


def test_a_seal_is_on_the_disk_before_it_is_in_its_place(tmp_path, monkeypatch):
    """After a power cut the name must not be there with less than the whole content."""
    folder, synced = tmp_path / "checkpoint-2", []
    folder.mkdir()

    def fsync(number: int) -> None:
        beside = folder / f".{SEAL}"
        assert os.path.samestat(os.fstat(number), beside.stat()) and not (folder / SEAL).exists()
        synced.append(beside.read_bytes())

    monkeypatch.setattr(os, "fsync", fsync)
    checkpoints.seal(folder, RUN)
    assert synced == [(folder / SEAL).read_bytes()]


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b'{"files": {}, "run": ',
        b"\xff",
        b"[]",
        b"null",
        b'{"run": {}}',
        b'{"files": {}}',
        b'{"files": [], "run": {}}',
        b'{"files": {"model.bin": 7}, "run": {}}',
        b'{"files": {"model.bin": {"sha256": ""}}, "run": {}}',
        b'{"files": {"model.bin": {"bytes": 7}}, "run": {}}',
    ],
)
def test_a_seal_that_is_none_is_a_broken_checkpoint(text, tmp_path):
    folder = checkpoint(tmp_path, 2)
    (folder / SEAL).write_bytes(text)
    with refuses(SEAL, "cannot be read", error=BrokenCheckpoint):
        checkpoints.check(folder)


def test_a_seal_that_cannot_be_opened_is_not_one_that_was_never_written(tmp_path):
    folder = checkpoint(tmp_path, 2)
    (folder / SEAL).unlink()
    with refuses("ended while", "written", error=BrokenCheckpoint):
        checkpoints.check(folder)
    (folder / SEAL).mkdir()
    with refuses(SEAL, "cannot be read", error=BrokenCheckpoint):
        checkpoints.check(folder)


@pytest.mark.parametrize(
    "content, words",
    [(None, ["missing"]), (b"weight", ["has 6 of 7"]), (b"weights.", ["has 8 of 7"]), (b"weighty", ["changed"])],
)
def test_a_file_that_is_not_as_it_was_sealed_is_named(content, words, tmp_path):
    folder = checkpoint(tmp_path, 2)
    (folder / "model.bin").unlink()
    if content is None:
        (folder / "model.bin").mkdir()
    else:
        (folder / "model.bin").write_bytes(content)
    with refuses("model.bin", *words, error=BrokenCheckpoint):
        checkpoints.check(folder)


def test_files_beside_the_sealed_ones_do_not_break_a_checkpoint(tmp_path):
    """As a note, or what a viewer leaves there."""
    folder = checkpoint(tmp_path, 2)
    (folder / "notes.txt").write_bytes(b"")
    assert checkpoints.check(folder) == RUN


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    made = [tmp_path / f"checkpoint-{step}" for step in (100, 20, 3)]
    others = ["checkpoint-", "checkpoint-final", "checkpoint-3.old", "broken-checkpoint-200", "other"]
    for folder in [*made, *(tmp_path / name for name in others)]:
        folder.mkdir()
    (tmp_path / "checkpoint-300").write_bytes(b"no folder")
    assert checkpoints.numbered(tmp_path) == made
    assert checkpoints.numbered(tmp_path / "nowhere") == []


NAMES = st.from_regex(r"[a-z]{1,8}\.(bin|json)", fullmatch=True)


@given(
    files=st.dictionaries(NAMES, st.binary(min_size=1, max_size=200), min_size=1, max_size=4),
    kind=st.sampled_from(DAMAGES),
    seed=st.integers(0, 1000),
)
def test_any_damage_is_noticed_and_the_one_before_is_used(files, kind, seed, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    for step in (3, 20, 100):
        checkpoint(out, step, files, {"recipe": {"step": step}})
    assert checkpoints.last_whole(out) == (out / "checkpoint-100", {"recipe": {"step": 100}}, [])
    name = damage(out / "checkpoint-100", kind, random.Random(seed))
    folder, run, lines = checkpoints.last_whole(out)
    assert folder == out / "checkpoint-20" and run == {"recipe": {"step": 20}}
    says(*lines, "checkpoint-100 is broken", name, "set aside as broken-checkpoint-100")
    assert (out / "broken-checkpoint-100").is_dir() and not (out / "checkpoint-100").exists()
    (out / "checkpoint-20" / SEAL).unlink()
    folder, _, lines = checkpoints.last_whole(out)
    assert folder == out / "checkpoint-3"
    says(*lines, "checkpoint-20 is broken", "ended while")


def test_broken_checkpoints_of_the_same_step_are_all_kept(tmp_path):
    for number in range(4):
        folder = checkpoint(tmp_path, 5)
        (folder / SEAL).unlink()
        (folder / "number").write_text(str(number), encoding="utf-8")
        assert checkpoints.last_whole(tmp_path)[:2] == (None, {})
    kept = {path.name: (path / "number").read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert kept == {f"broken-checkpoint-5{end}": str(number) for number, end in enumerate(("", ".2", ".3", ".4"))}


def test_every_checkpoint_may_be_broken(tmp_path):
    for step in (5, 10):
        (checkpoint(tmp_path, step) / SEAL).unlink()
    folder, run, lines = checkpoints.last_whole(tmp_path)
    assert (folder, run) == (None, {}) and len(lines) == 2
    says(lines[0], "checkpoint-10 is broken")
    says(lines[1], "checkpoint-5 is broken")


def test_a_run_is_compared_as_its_seal_holds_it(tmp_path):
    run = {"recipe": {"betas": (0.9, 0.95), "output_dir": Path("out"), "steps": {1: 0.5}}}
    assert checkpoints.plain(run) == {"recipe": {"betas": [0.9, 0.95], "output_dir": "out", "steps": {"1": 0.5}}}
    folder = checkpoint(tmp_path, 2, run=checkpoints.plain(run))
    assert checkpoints.difference(checkpoints.check(folder), checkpoints.plain(run)) is None


def changed(recipe: dict | None = None, data: dict | None = None) -> str | None:
    """What a run of these keys and files, beside RUN's own, differs by from RUN."""
    return checkpoints.difference(RUN, {"recipe": RUN["recipe"] | (recipe or {}), "data": RUN["data"] | (data or {})})


def test_keys_that_differ_are_named_with_both_values():
    assert changed() is None
    says(changed({"lora_r": 16}), "was 8", "is 16", key="lora_r")
    says(changed({"seed": 1}), "was None", "is 1", key="seed")
    estimated = ({"recipe": {"sample_packing_eff_est": each}} for each in (0.94, 0.95))
    assert checkpoints.difference(*estimated) is None, "axolotl estimates it anew at each start"
    says(checkpoints.difference({"recipe": {"seed": 1}}, {"recipe": {}}), "was 1", "is None", key="seed")
    says(checkpoints.difference({}, {"recipe": {"seed": 1}}), "was None", "is 1", key="seed")
    says(checkpoints.difference({"recipe": {"seed": 1}}, {}), "was 1", "is None", key="seed")


def test_keys_that_may_differ_and_seals_of_before_do_not_end_a_run():
    """Seals of before 2026-11 have `include_tkps` and `ddp_timeout`, and no files that a run starts from."""
    before = {"recipe": RUN["recipe"] | {"include_tkps": False, "logging_steps": 1}, "data": RUN["data"]}
    assert checkpoints.difference(before, RUN | {"start": {"base": {"model.safetensors": "1"}}}) is None
    start = {"start": {"base": {"model.safetensors": "0"}, "fetched/since": {"model.safetensors": "2"}}}
    says(checkpoints.difference(RUN | {"start": {"base": {"model.safetensors": "1"}}}, RUN | start), "base/model.safe")


def test_of_many_keys_that_differ_the_first_three_are_named():
    line = says(changed(dict.fromkeys("dbca", 1)), "key 'a' was None and is 1, key 'b' was", "key 'c'")
    assert "'d'" not in line


def test_data_files_that_differ_are_named():
    says(changed(data={"train.jsonl": "2"}), "train.jsonl", "changed")
    says(changed(data={"train.jsonl": "2", "new.jsonl": "3"}), "train.jsonl, new.jsonl", "changed")
    says(checkpoints.difference({}, {"data": {"train.jsonl": "1"}}), "train.jsonl", "changed")
    assert checkpoints.difference({"data": {"train.jsonl": "1"}}, {}) is None  # it trains on no file that changed
    line = says(changed({"lora_r": 16}, {"train.jsonl": "2"}), "was 8", key="lora_r")
    assert "train.jsonl" not in line  # a key explains it


def test_a_checkpoint_that_is_named_says_why_it_cannot_be_resumed_from(tmp_path):
    with refuses("no such folder", error=BrokenCheckpoint):
        checkpoints.check(tmp_path / "gone")
    (tmp_path / "checkpoint-4").mkdir()
    with refuses("no completed.json|it has no", error=BrokenCheckpoint):
        checkpoints.check(tmp_path / "checkpoint-4")
    text = checkpoints.not_resumable(tmp_path / "checkpoint-4", BrokenCheckpoint("it is broken"))
    says(text, "checkpoint-4", "it is broken", key="resume_from_checkpoint")
    says(text, "lora_model_dir to start")


@pytest.mark.parametrize(
    "before, now, others",
    [
        ({"num_epochs": 3, "eval_steps": 0.25}, {"num_epochs": 4, "eval_steps": 0.2}, True),
        ({"num_epochs": 3, "eval_steps": 0.25}, {"num_epochs": 3, "eval_steps": 0.2}, False),
        ({"num_epochs": 3, "eval_steps": 0.25}, {"num_epochs": 2, "eval_steps": 0.2}, False),
        ({"eval_steps": 0.25}, {"num_epochs": 4, "eval_steps": 0.2}, False),  # of so many steps instead
        ({"num_epochs": 0.5}, {"eval_steps": 0.2}, False),
        ({"num_epochs": 3, "eval_steps": 0.25}, {"num_epochs": 4}, True),
    ],
)
def test_more_epochs_take_the_keys_that_follow_from_them(before, now, others):
    expected = {"num_epochs": now.get("num_epochs"), "eval_steps": now.get("eval_steps")} if others else before
    assert checkpoints.for_more_epochs(before | {"lora_r": 8}, now | {"lora_r": 4}) == {"lora_r": 8} | expected


@pytest.mark.parametrize("name, has", [("optimizer.pt", True), ("global_step8", True), ("model.safetensors", False)])
def test_a_checkpoint_without_an_optimizer_is_known(tmp_path, name, has):
    assert not checkpoints.has_optimizer(tmp_path)
    (tmp_path / name).touch()
    assert checkpoints.has_optimizer(tmp_path) is has
