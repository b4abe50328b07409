"""The tests leave nothing behind, and say in one line what a machine lacks on which they cannot run."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import surroundings

LEAVES = """
import tempfile
from pathlib import Path

def test_leaves():
    {what}
"""


def outcome(house: Path, tmp_path: Path, what: str) -> tuple[int, list[str], list[Path]]:
    """Run a test that does this, in the copy of the house: exit code, what is called left, what is there after it."""
    (house / "tests" / "test_leaves.py").write_text(LEAVES.format(what=what), encoding="utf-8")
    place = tmp_path / "t"
    place.mkdir()
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TMP"))}
    env |= {"TMPDIR": str(place), "PYTHONPATH": str(house)}
    command = [sys.executable, "-m", "pytest", "-n", "1", "tests/test_leaves.py"]
    done = subprocess.run(command, cwd=house, env=env, capture_output=True, text=True, timeout=120)
    named = [line.partition(": ")[2] for line in done.stdout.splitlines() if line.startswith("left behind")]
    return done.returncode, named, list(place.iterdir())


def test_what_tests_leave_behind_fails_the_run(house, tmp_path):
    code, named, there = outcome(house, tmp_path, "Path(tempfile.mkdtemp(prefix='mine-')), Path('mine.txt').touch()")
    assert code == 1 and there == []
    assert len(named) == 2 and str(house / "mine.txt") in named and "/mine-" in named[0] + named[1], named


def test_a_run_that_tidies_up_passes(house, tmp_path):
    code, named, there = outcome(house, tmp_path, "tempfile.TemporaryDirectory(), Path('.cache/tiny-1').mkdir()")
    assert (code, named, there) == (0, [], [])


def test_what_a_failed_test_made_stays_and_its_place_is_said(house, tmp_path):
    code, named, there = outcome(house, tmp_path, "tempfile.mkdtemp(prefix='mine-'); assert False")
    assert code == 1 and len(named) == 1 and there == []


def test_what_a_killed_run_left_goes_with_the_next_run(tmp_path, monkeypatch):
    for name in ("TMPDIR", *surroundings.THEIR_CACHES):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "finlora-tests-killed" / "rows").mkdir(parents=True)
    going_on = surroundings.prepare()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mine = surroundings.prepare()
    assert sorted(tmp_path.iterdir()) == sorted([going_on, mine])


def test_a_full_disk_is_named(monkeypatch):
    usage = surroundings.shutil._ntuple_diskusage
    monkeypatch.setattr(surroundings.shutil, "disk_usage", lambda _: usage(10**12, 10**12 - 10**9, 10**9))
    with pytest.raises(surroundings.Unfit, match=rf"^{tempfile.gettempdir()}: 1.0 GB .*TMPDIR"):
        surroundings.check()


def test_folders_that_cannot_be_written_are_named(monkeypatch):
    monkeypatch.setattr(surroundings, "ROOT", Path("/proc"))  # where not even root can
    with pytest.raises(surroundings.Unfit, match="^/proc: .*permissions"):
        surroundings.check()
    monkeypatch.setattr(tempfile, "tempdir", "/proc")
    with pytest.raises(surroundings.Unfit, match="^/proc: .*TMPDIR"):
        surroundings.prepare()


def test_where_no_temporary_file_can_be_made(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc"])
    with pytest.raises(surroundings.Unfit, match="TMPDIR"):
        surroundings.check()


def test_a_home_that_cannot_be_written_is_told_before_any_test(monkeypatch):
    monkeypatch.setenv("HOME", "/proc")
    with pytest.raises(surroundings.Unfit, match="^/proc: .*HOME"):
        surroundings.check()
