"""What the tests need of the machine, and what they leave on it: a folder of this run's own, which ends empty.

python tests/surroundings.py says in one line what the machine lacks: on a full disk pytest itself cannot say it.
"""

import contextlib
import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDED = 2 * 10**9  # bytes of temporary files at a time
# Caches, which every run may fill and the next one uses; all are in .gitignore.
CACHES = {".git", ".venv", ".venv-vllm", "__pycache__", ".cache"}
CACHES |= {".pytest_cache", ".ruff_cache", ".hypothesis", ".benchmarks"}
# Where libraries keep what they have made ready, by default below HOME: new in each run, and its own.
THEIR_CACHES = {"HF_DATASETS_CACHE": "c-datasets", "TRITON_CACHE_DIR": "c-triton", "TORCHINDUCTOR_CACHE_DIR": "c-torch"}


class Unfit(Exception):
    """The machine cannot run the tests. Its text is one line: the folder, what it lacks and what to do."""


def check() -> None:
    try:
        place = Path(tempfile.gettempdir())
    except FileNotFoundError as error:  # every folder that could be it is full or read-only
        raise Unfit("no folder for temporary files can be written; free some space or set TMPDIR") from error
    free = shutil.disk_usage(place).free
    if free < NEEDED:
        need = f"{free / 1e9:.1f} GB are free and the tests need {NEEDED / 1e9:.0f}"
        raise Unfit(f"{place}: {need}; free some space or set TMPDIR")
    remedies = {place: "set TMPDIR to a folder that can be", ROOT: "change its permissions or test a copy of it"}
    remedies |= {ROOT / ".cache": remedies[ROOT], Path.home(): "set HOME to a folder that can be"}
    for folder, remedy in remedies.items():
        if folder.exists() and (reason := unwritable(folder)):
            raise Unfit(f"{folder}: cannot be written ({reason}); {remedy}")


def prepare() -> Path:
    """Make the run's folder and point all temporary files and caches there; Unfit where that cannot be done."""
    check()
    for old in Path(tempfile.gettempdir()).glob("finlora-tests-*"):  # of runs that failed or were killed
        with contextlib.suppress(FileNotFoundError):  # it has just ended
            if old.stat().st_uid == os.getuid() and _locked(old):
                shutil.rmtree(old, ignore_errors=True)
    run = Path(tempfile.mkdtemp(prefix="finlora-tests-"))
    _locked(run)
    os.environ["TMPDIR"] = tempfile.tempdir = str(run)
    for name, folder in THEIR_CACHES.items():
        os.environ[name] = str(run / folder)
    return run


def _locked(run: Path) -> bool:
    """Lock a run's folder for as long as this process lives; False where the run has not ended."""
    folder = os.open(run, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        os.close(folder)
        return False


def unwritable(folder: Path) -> str | None:
    """Why nothing can be written there, or None."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0" * 4096)
    except OSError as error:
        return error.strerror
    return None


def files(folder: Path = ROOT) -> Iterator[str]:
    """All files and folders of the checkout but the caches; in .cache, what no command keeps there for the next."""
    for entry in os.scandir(folder):
        if entry.name not in CACHES and not entry.name.endswith(".egg-info"):
            yield entry.path
            if entry.is_dir(follow_symlinks=False):
                yield from files(Path(entry.path))
    if folder == ROOT and (ROOT / ".cache").is_dir():
        for path in (ROOT / ".cache").iterdir():
            if not path.name.startswith(("tiny", "axolotl-schema-", "transformers-4")):
                yield str(path)


def left(run: Path, before: set[str]) -> list[str]:
    """What the tests left in the run's folder and in the checkout. What failed tests made is pytest's to keep."""
    # torch 2.13 puts a part of inductor's cache at its default place whatever TORCHINDUCTOR_CACHE_DIR says
    # (torch/_inductor/cache.py, default_cache_dir).
    theirs = (*THEIR_CACHES.values(), "pytest-of-", "torchinductor_")
    ours = [str(path) for path in run.iterdir() if not path.name.startswith(theirs)]
    return sorted(ours + [path for path in files() if path not in before])


def clear(run: Path) -> Path | None:
    """Remove the run's folder; what failed tests made stays, and the folder with it is returned."""
    for path in run.iterdir():
        if not path.name.startswith("pytest-of-"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    kept = [path for path in run.glob("pytest-of-*/pytest-[0-9]*") if any(path.iterdir())]
    if kept:
        return kept[0]
    shutil.rmtree(run)
    return None


if __name__ == "__main__":
    try:
        check()
    except Unfit as error:
        sys.exit(f"error: {error}")
