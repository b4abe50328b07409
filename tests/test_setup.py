"""`make setup`: which build of torch a machine gets, what is refused at once, and that a broken set-up is finished.

Python, pip, uv, nvidia-smi and uname are stood in for; they write down what they are called with.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from failures import says

ROOT = Path(__file__).resolve().parent.parent
INDEX = "https://download.pytorch.org/whl"
# Python 3.11, which makes an environment of itself; the index of torch is reached where $REACHED says so.
PYTHON = """#!/bin/sh
echo "python $*" >>"$CALLS"
case "$*" in
  *urlopen*) [ -n "$REACHED" ] ;;
  *print*) echo "(3, 11)" ;;
  "-m venv"*) for folder; do :; done; mkdir -p "$folder/bin" "$folder/lib"; cp "$0" "$folder/bin/python" ;;
  *"config list"*) echo "$SETTINGS" ;;
  *"pip install"*) [ -z "$BROKEN" ] || { echo "ERROR: No matching distribution found for x"; exit 1; } ;;
esac
"""


@pytest.fixture
def setup(tmp_path):
    """A function that runs scripts/setup.sh on such a machine: its outcome, and pip's or uv's calls."""
    folder = tmp_path / "the house"
    shutil.copytree(ROOT / "constraints", folder / "constraints")
    tools = tmp_path / "tools"
    tools.mkdir()

    def stand_in(name: str, text: str) -> None:
        (tools / name).write_text(text, encoding="utf-8")
        (tools / name).chmod(0o755)

    def run(torch="2.13.0", driver="", system="Linux", processor="x86_64", uv=False, **env: str):
        stand_in("python3", PYTHON)
        stand_in("uname", f'#!/bin/sh\n[ "$1" = -s ] && echo {system} || echo {processor}\n')
        stand_in("nvidia-smi", f"#!/bin/sh\necho '{driver}'\n" if driver else "#!/bin/sh\nexit 9\n")
        if uv:
            stand_in("uv", '#!/bin/sh\necho "uv $*" >>"$CALLS"\n')
        calls = tmp_path / "calls"
        calls.write_text("", encoding="utf-8")
        whole = {"PATH": f"{tools}:/usr/bin:/bin", "CALLS": str(calls), "HOME": str(tmp_path)}
        whole |= {"REACHED": "", "SETTINGS": "", "BROKEN": ""} | env
        command = [ROOT / "scripts" / "setup.sh", torch, ".venv", ".venv/.ready-" + torch]
        done = subprocess.run(command, cwd=folder, env=whole, capture_output=True, text=True)
        lines = calls.read_text(encoding="utf-8").splitlines()
        return done, [line for line in lines if "pip install" in line], folder / ".venv"

    return run


# The machine, and what is installed for torch.
BUILDS = {
    "no driver": ({"REACHED": "1"}, f"--extra-index-url {INDEX}/cpu torch==2.13.0+cpu"),
    "no driver, and no way to torch's index": ({}, "torch==2.13.0"),
    "a new driver": ({"driver": "580.65.06, 9.0"}, "torch==2.13.0"),
    "a driver for CUDA 12": (
        {"driver": "550.54.15, 8.0", "REACHED": "1"},
        f"--extra-index-url {INDEX}/cu126 torch==2.13.0+cu126",
    ),
    "Blackwell with one for CUDA 12": (
        {"driver": "570.86.10, 12.0", "REACHED": "1", "torch": "2.11.0"},
        f"--extra-index-url {INDEX}/cu128 torch==2.11.0+cu128",
    ),
    "a build that is asked for": ({"TORCH_BUILD": "cuda", "REACHED": "1"}, "torch==2.13.0"),
    "the CPU on a machine with a GPU": (
        {"driver": "580.65.06, 9.0", "TORCH_BUILD": "cpu", "REACHED": "1"},
        f"--extra-index-url {INDEX}/cpu torch==2.13.0+cpu",
    ),
}


@pytest.mark.parametrize("case", BUILDS)
def test_the_build_of_torch_is_the_one_that_the_machine_runs(case, setup):
    machine, expected = BUILDS[case]
    done, calls, venv = setup(**machine)
    assert done.returncode == 0, done.stderr
    assert calls == [f"python -m pip install {what}" for what in ("pip", expected, "-e .[dev]")]
    assert [path.name for path in venv.glob(".ready-*")] == [f".ready-{machine.get('torch', '2.13.0')}"]
    pinned = (venv / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert any(line.startswith("cuda-bindings==") for line in pinned) == ("+" not in expected)
    assert any(line.startswith("nvidia-ml-py==") for line in pinned) and "pip==25.3" in pinned
    assert ("cannot be reached" in done.stderr) == (case == "no driver, and no way to torch's index")


def test_uv_installs_where_it_is_here_and_no_setting_of_pips_would_be_lost(setup):
    done, calls, venv = setup(uv=True, REACHED="1")
    installer = "uv pip install --python .venv/bin/python --constraint .venv/constraints.txt"
    whats = ("pip", "--torch-backend cpu torch==2.13.0", "-e .[dev]")
    assert done.returncode == 0 and calls == [f"{installer} {what}" for what in whats], done.stderr
    for setting in ("global.extra-index-url='https://mirror/simple'", ":env:.find-links='/wheels'"):
        done, calls, _ = setup(uv=True, SETTINGS=setting)
        assert done.returncode == 0 and all(call.startswith("python -m pip install") for call in calls) and calls


REFUSED = {
    "macOS": ({"system": "Darwin", "processor": "arm64"}, ["Darwin on arm64", "take Linux on x86-64", "not supported"]),
    "ARM": ({"processor": "aarch64"}, ["Linux on aarch64", "take Linux on x86-64"]),
    "Windows": ({"system": "MINGW64_NT-10.0"}, ["MINGW64", "WSL 2"]),
    "a driver of long ago": ({"driver": "470.82, 7.5"}, ["470.82", "update it to 580", "TORCH_BUILD=cpu"]),
    "Blackwell without CUDA 12.8": (
        {"driver": "570.86.10, 12.0", "REACHED": "1"},
        ["570.86.10", "update it", "make setup TORCH=2.11.0"],
    ),
    "CUDA 12 without torch's index": ({"driver": "550.54.15, 8.0"}, ["cu126", "cannot be reached", "TORCH_BUILD=cuda"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_machine_that_is_not_supported_is_told_at_once(case, setup):
    machine, words = REFUSED[case]
    done, calls, venv = setup(**machine)
    assert done.returncode == 1 and not calls and not venv.exists()
    says(done.stderr.rstrip("\n").removeprefix("error: "), *words)


def test_a_set_up_that_was_broken_off_is_finished_by_the_next_call(setup):
    done, calls, venv = setup(BROKEN="1")
    assert done.returncode == 1 and len(calls) == 1 and not list(venv.glob(".ready-*"))
    *_, why, last = done.stderr.splitlines()
    assert "No matching distribution" in why
    says(last.removeprefix("error: "), "set-up stopped", "setup.log", "same command")
    packages = venv / "lib" / "python3.11" / "site-packages"
    for name, whole in ("whole-1.0", True), ("half-1.0", False):
        (packages / f"{name}.dist-info").mkdir(parents=True)
        (packages / f"{name}.dist-info" / "METADATA").touch()
        if whole:
            (packages / f"{name}.dist-info" / "RECORD").touch()
    done, calls, _ = setup()
    assert done.returncode == 0 and (venv / ".ready-2.13.0").is_file() and len(calls) == 3
    assert [path.name for path in packages.iterdir()] == ["whole-1.0.dist-info"]


def test_an_environment_without_pip_or_of_another_python_is_made_anew(setup):
    _, _, venv = setup()
    assert os.access(venv / "bin" / "python", os.X_OK)
    for broken in ("#!/bin/sh\nexit 1\n", PYTHON.replace("(3, 11)", "(3, 10)")):
        (venv / "bin" / "python").write_text(broken, encoding="utf-8")
        done, _, _ = setup()
        assert done.returncode == 0 and (venv / "bin" / "python").read_text(encoding="utf-8") == PYTHON
