"""What every command does first, whatever the machine's locale and home folder; and what it shows while it works."""

import fcntl
import io
import os
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from terminals import all_of

from finlora.core import progress as progress_module
from finlora.core import startup
from finlora.core.paths import ROOT
from finlora.core.progress import progress

CACHES = ("HF_HOME", "XDG_CACHE_HOME", "HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_TOKEN_PATH", "TRITON_CACHE_DIR")


def test_a_locale_of_another_encoding():
    """The process begins again in UTF-8 mode: an error's text is printed as it was given."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("LC_")}
    env |= {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "finlora", "recipes", "--task", "Ä„é"]
    done = subprocess.run([part.encode() for part in command], cwd=ROOT, env=env, capture_output=True)
    assert done.returncode == 1 and done.stderr.decode("utf-8").startswith("error: TASK=Ä„é: no such task")


@pytest.fixture
def home(monkeypatch, tmp_path):
    for name in CACHES:
        monkeypatch.delenv(name, raising=False)

    def use(folder: Path, **others: str) -> dict[str, str]:
        for name, value in ({"HOME": str(folder)} | others).items():
            monkeypatch.setenv(name, value)
        startup.use_writable_caches()
        return {name: os.environ[name] for name in CACHES if name in os.environ}

    return use


def test_a_home_that_can_be_written_keeps_its_caches(home, tmp_path, capsys):
    assert home(tmp_path) == {} and list(tmp_path.iterdir()) == [] and capsys.readouterr().err == ""


def test_a_home_that_cannot_be_written(home, capsys):
    """Not even root can write in /proc."""
    cache = str(ROOT / ".cache")
    caches = home(Path("/proc"))
    assert sorted(caches) == ["HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_TOKEN_PATH", "TRITON_CACHE_DIR"]
    assert all(folder.startswith(cache) for folder in caches.values())
    assert capsys.readouterr().err == "/proc: cannot be written; caches are in .cache\n"
    assert home(Path("/proc")) == caches and capsys.readouterr().err == ""  # said once, child processes included


def test_a_home_below_a_file(home, tmp_path, capsys):
    """Or one whose .cache is a link to nowhere: nothing can be made there, although the folder above can be written."""
    (tmp_path / "file").touch()
    caches = home(tmp_path / "file" / "x")
    assert sorted(caches) == ["HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_TOKEN_PATH", "TRITON_CACHE_DIR"]
    assert capsys.readouterr().err == f"{tmp_path}/file/x: cannot be written; caches are in .cache\n"
    for name in caches:
        del os.environ[name]
    (tmp_path / ".cache").symlink_to(tmp_path / "nowhere")
    assert sorted(home(tmp_path)) == ["HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_TOKEN_PATH"]


def test_caches_that_are_named_or_hold_models_stay(home, tmp_path):
    (tmp_path / "hub").mkdir()
    assert home(Path("/proc"), HF_HOME=str(tmp_path)).keys() == {"HF_HOME", "TRITON_CACHE_DIR"}


@pytest.mark.parametrize("value, verbose", [(None, False), ("", False), ("0", False), ("1", True)])
def test_what_libraries_print_is_shown_on_demand(value, verbose, monkeypatch):
    monkeypatch.delenv("VERBOSE", raising=False)
    if value is not None:
        monkeypatch.setenv("VERBOSE", value)
    assert startup.is_verbose() == verbose


LIBRARIES = """
import logging, sys, warnings
from pathlib import Path
from finlora.core import startup
startup.quiet()
logging.getLogger("torchao").warning("no kernel")
logging.getLogger("bitsandbytes.cextension").error("no library")
logging.getLogger("DeepSpeed").addHandler(logging.StreamHandler())
logging.getLogger("DeepSpeed").warning("no accelerator")
startup.log_to(Path(sys.argv[1]))
warnings.warn("set trust_remote_code")
logging.getLogger("transformers.models").warning("dequantized")
"""


@pytest.mark.parametrize("verbose", [False, True])
def test_what_libraries_say_goes_to_the_log_and_errors_to_the_screen_too(verbose, tmp_path):
    """What they said while they were imported, before the log had a name, included."""
    said = ["no kernel", "no library", "no accelerator", "set trust_remote_code", "dequantized"]
    log = tmp_path / "eval.log"
    env = {name: value for name, value in os.environ.items() if name not in ("VERBOSE", "TRANSFORMERS_VERBOSITY")}
    env |= {"PYTHONPATH": str(ROOT), "VERBOSE": "1" if verbose else ""}
    command = [sys.executable, "-c", LIBRARIES, str(log)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    if verbose:
        assert all(text in done.stderr for text in said) and not log.exists()
        return
    assert done.stdout == f"log       {log} (VERBOSE=1 shows it)\n" and done.stderr == "no library\n"
    text = log.read_text(encoding="utf-8")
    assert [line for line in said if line in text] == said and text.count("no kernel") == 1


def steps(seconds: float, clock: list[float]) -> None:
    with progress("training", "step") as show:
        for step in range(5, 101):
            clock[0] += seconds
            show(step, 100, f"loss {step}")


def test_in_a_pipe_progress_is_a_few_lines(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: clock[0])
    steps(0.1, clock)
    assert capsys.readouterr().err.splitlines() == []  # less than ten seconds in all
    steps(1.0, clock)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "training: 15 of 100 steps, loss 15, 1 min left" and len(lines) == 9
    assert lines[-1] == "training: 95 of 100 steps, loss 95, 5 s left"


def test_on_a_terminal_progress_is_one_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    steps(0, [0.0])
    text = screen.getvalue()
    assert "\n" not in text.rstrip("\n") and "100/100" in text and "loss 100" in text


def test_a_terminal_that_says_no_size_has_a_bar_as_well(monkeypatch):
    """As `docker run -t` and `script` make them; tqdm by itself would show nothing."""
    leader, follower = os.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 0, 0, 0, 0))
    with os.fdopen(follower, "w") as screen:
        monkeypatch.setattr(sys, "stderr", screen)
        with progress("training", "step") as show:
            for _ in range(3):
                show(1, 4, "loss 0.5")
    text = all_of(leader)
    assert "1/4" in text and text.count("loss 0.5") == 2  # drawn once, and when it ends
