"""Shared by the tests: a copy of the house to run commands in, and the real FinLoRA rows where they are at hand."""

import bisect
import contextlib
import fcntl
import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import commands
import hypothesis
import pytest
import surroundings

# Property-based tests draw the same examples on every machine and in every run. `make test-all` draws more of them, and
# `make fuzz` new ones. How long an example may take is nobody's promise on a busy machine: no deadline.
hypothesis.settings.register_profile("test", derandomize=True, database=None, deadline=None, max_examples=25)
hypothesis.settings.register_profile("all", hypothesis.settings.get_profile("test"), max_examples=200)
hypothesis.settings.register_profile(
    "fuzz", hypothesis.settings.get_profile("test"), derandomize=False, max_examples=200
)
hypothesis.settings.load_profile("test")  # --hypothesis-profile=NAME takes another

# The tests run on both cores already: torch's own threads only wait for each other there, up to minutes a run.
os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in ("ARGS", "VENV", "MAKEFLAGS", "MAKELEVEL"):  # of `make test ARGS=...`: the tests run make too
    os.environ.pop(name, None)
# The tests train on the CPU; bench/ has the checks of a GPU. Asked through NVML, torch does not start CUDA in this
# process, after which a forked one could not use it.
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = Path(__file__).resolve().parent.parent
BEFORE = pytest.StashKey[tuple]()  # the run's folder, and the checkout's files before the tests
FOLDERS = ("recipes", "finlora", "data", "fastdora", "eval", "bench", "tests")
FILES = ("Makefile", "pyproject.toml", "README.md")

# A shell starts what it puts in the background with Ctrl-C ignored, and every child inherits that: tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


WORKER = "PYTEST_XDIST_WORKER" in os.environ  # of pytest-xdist, which the controller started
SESSION = os.getppid() if WORKER else os.getpid()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    from finlora.data import tasks  # here: what is above sets the environment that libraries are imported in

    tasks.OWN_TABLE = ROOT / "data" / "none.yaml"  # the tests are about this repository's own tasks
    if not WORKER:
        try:
            config.stash[BEFORE] = surroundings.prepare(), set(surroundings.files())
        except surroundings.Unfit as error:
            raise pytest.UsageError(str(error)) from error


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Leave most short tests to the end: whichever worker is done with the others takes the next of them."""
    items.sort(key=start_order)
    ranks = [start_order(item) for item in items]
    begin, end = bisect.bisect_left(ranks, SHORT) + SHORT_FIRST, bisect.bisect_right(ranks, SHORT)
    items.extend(items[begin:end])
    del items[begin:end]


SHORT, SHORT_FIRST = 1, 500  # so many short tests take as long as the tiny base model, which the others wait for


def start_order(item: pytest.Item) -> int:
    """First what does not wait for the tiny base model, of that and of the rest what takes long; then groups."""
    long, grouped = item.get_closest_marker("long"), item.get_closest_marker("xdist_group")
    if not grouped and "tiny_base" not in item.fixturenames:
        return 0 if long else SHORT
    return 2 if long else 3 if grouped else 4


def pytest_collection_finish(session):
    """Start in the background what many tests wait for: the tiny base model, and the process that runs commands."""
    fixtures = {name for item in session.items for name in getattr(item, "fixturenames", ())}
    if "tiny_base" in fixtures:
        begin_tiny_base()
    if "command" in fixtures:
        commands.begin(SESSION)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session):
    """After all else has ended: nothing may be left of this run but what failed tests made."""
    result = yield
    if not WORKER and BEFORE in session.config.stash:
        commands.end()
        tiny_base_lock().unlink(missing_ok=True)
        weakref.finalize._exitfunc()  # of temporary folders: without xdist the tests' modules are in this process
        if "forked" in sys.modules:
            sys.modules["forked"].clear_up()
        say = session.config.get_terminal_writer().line
        run, before = session.config.stash[BEFORE]
        del session.config.stash[BEFORE]
        for path in surroundings.left(run, before):
            say(f"left behind by the tests: {path}")
            session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED
        if kept := surroundings.clear(run):
            say(f"what the failed tests made is in {kept}")
    return result


def pytest_unconfigure(config):
    if BEFORE in config.stash:  # no session, as with --help
        shutil.rmtree(config.stash[BEFORE][0], ignore_errors=True)


TINY = [sys.executable, "-m", "finlora.train.tiny"]


def tiny_base_lock() -> Path:
    return Path(tempfile.gettempdir()) / "tiny_base.lock"


def begin_tiny_base() -> None:
    """Build it unless another worker has begun to; the child keeps the lock until it ends."""
    with tiny_base_lock().open("w") as lock, contextlib.suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        quiet = subprocess.DEVNULL
        subprocess.Popen(TINY, cwd=ROOT, stdin=quiet, stdout=quiet, stderr=quiet, pass_fds=[lock.fileno()])


@pytest.fixture(scope="session")
def tiny_base() -> Path:
    """The tiny base model that TINY=1 and the demo share, built once for all workers."""
    with tiny_base_lock().open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run(TINY, cwd=ROOT, check=True, capture_output=True)  # done already, or it says why it failed
    return (ROOT / ".cache" / "tiny").resolve()


@pytest.fixture
def house(tmp_path: Path, tiny_base: Path) -> Path:
    """A copy of the repository without its outputs and fetched data; the tiny base model is linked in."""
    root = tmp_path / "the house"  # whose path has a space, as a folder of anybody's may
    for folder in FOLDERS:
        if (ROOT / folder).is_dir():
            skip = shutil.ignore_patterns("__pycache__", "raw", "prepared", "audit")
            shutil.copytree(ROOT / folder, root / folder, ignore=skip)
    for file in FILES:
        if (ROOT / file).exists():
            shutil.copy(ROOT / file, root / file)
    (root / ".cache").mkdir()
    for path in (ROOT / ".cache").iterdir():
        if not path.name.startswith("."):
            (root / ".cache" / path.name).symlink_to(path.resolve())
    return root


@pytest.fixture
def command(house: Path):
    """Run `python -m MODULE ARGS...`, or `-c` and code, in the copy of the house (tests/commands.py).

    training: axolotl runs in a forked child too, not in the process that `make train` starts.
    """
    commands.begin(SESSION)

    def run(*args: str, env: dict[str, str] | None = None, training: bool = True) -> subprocess.CompletedProcess:
        env = {**os.environ, "PYTHONPATH": str(house)} | (env or {})
        return commands.run(*args, cwd=house, env=env, timeout=900, training=training)

    return run


@pytest.fixture
def shared() -> Path:
    """The real FinLoRA rows beside the project."""
    folder = ROOT.parent / "shared" / "finlora" / "data"
    if not folder.is_dir():
        pytest.skip("../shared/finlora/data is not here: the real FinLoRA rows were not tested")
    return folder


@pytest.fixture(scope="session")
def finished_runs(tiny_base: Path, tmp_path_factory) -> Path:
    """outputs/ with a finished run on 16, 8 and 4 bits, on the tiny base (tests/runs.py); do not write there."""
    from runs import RECIPES, finished_run

    outputs = tmp_path_factory.mktemp("runs") / "outputs"
    for name in RECIPES.values():
        finished_run(outputs, name, tiny_base)
    gc.freeze()  # merging collects garbage after each model: over all modules, half a second each time
    return outputs


@pytest.fixture
def runs(finished_runs: Path, tmp_path: Path, monkeypatch) -> Path:
    """A copy of them in a place of its own, which merge, serve, chat and publish take for the repository."""
    from finlora.core import paths, provenance
    from finlora.export import merge, publish
    from finlora.models import trained as trained_models
    from finlora.recipes import bases, recipe
    from finlora.train import run as train
    from finlora.train import runs as train_runs

    shutil.copytree(finished_runs, tmp_path / "outputs")
    for module in paths, train_runs, provenance, bases, recipe, train, merge, publish:
        monkeypatch.setattr(module, "ROOT", tmp_path)
    for module in train_runs, trained_models:
        monkeypatch.setattr(module, "OUTPUTS", tmp_path / "outputs")
    return tmp_path / "outputs"
