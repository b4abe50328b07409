"""Axolotl's commands as child processes: what of their output is shown, kept and given as the reason of a failure."""

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from failures import refuses, says

from fastdora.plugin import checkpoints
from finlora.train import launch


@pytest.fixture
def child(tmp_path, monkeypatch):
    """A function that runs an axolotl command with a program in axolotl's place; its config, lock and log are real."""
    package = tmp_path / "modules" / "axolotl" / "cli"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    out = tmp_path / "outputs" / "own"
    out.mkdir(parents=True)
    monkeypatch.setattr(launch, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    monkeypatch.delenv("VERBOSE", raising=False)

    def call(program: str, verbose: bool = False, command: str = "preprocess") -> Path:
        (package / "main.py").write_text(f"import sys, os, time\nout = {str(out)!r}\n{program}", encoding="utf-8")
        if verbose:
            monkeypatch.setenv("VERBOSE", "1")
        with (tmp_path / "lock").open("w") as lock:
            launch.axolotl(command, out / "recipe.yaml", ["--launcher", "python"], True, lock)
        return out / "train.log"

    return call


CHATTER = """
print("config: {")
print("[2026-11-27 02:58:50,955] [INFO] [axolotl.fastdora.rows] train: 9 rows, 99 tokens, 18 of them answers")
print("[2026-11-27 02:58:50,955] [WARNING] [torchao] Failed to load a library")
print("[2026-11-27 02:58:50,955] [WARNING] [axolotl.fastdora] checkpoint-4 is broken", flush=True)
time.sleep(0.3)
print("[2026-11-27 02:58:50,955] [INFO] [axolotl.fastdora.rows] train: 9 rows, 99 tokens, 18 of them answers")
print("last", sys.argv, os.environ["PYTHONUTF8"], os.environ["HF_HUB_OFFLINE"], file=sys.stderr)
"""


def test_what_a_person_must_know_is_shown_once_and_the_rest_is_in_the_log(child, capfd):
    log = child(CHATTER)
    shown = capfd.readouterr()
    lines = ["train: 9 rows, 99 tokens, 18 of them answers", "warning: checkpoint-4 is broken"]
    assert shown.out == "" and shown.err.splitlines() == lines
    child(CHATTER, command="train")
    assert capfd.readouterr().err.splitlines() == lines[1:]  # its rows were told before
    log.unlink()
    child(CHATTER)
    text = log.read_text(encoding="utf-8")
    assert "torchao" in text and "'--launcher', 'python'] 1 1" in text
    child("print('the next command')")
    assert log.read_text(encoding="utf-8") == text + "the next command\n"  # preprocess and train share it


def test_verbose_shows_it_all(child, capfd):
    log = child(CHATTER, verbose=True)
    assert capfd.readouterr().err == log.read_text(encoding="utf-8")


def test_steps_are_shown_as_the_plugin_writes_them(child, capfd, monkeypatch):
    seen = []
    monkeypatch.setattr(launch, "note", lambda state: seen.append(state) or "")
    steps = {"step": 3, "max_steps": 9, "loss": 0.5}
    child(f"file = open(out + '/stepping', 'w'); time.sleep(0.5); file.write('{json.dumps(steps)}')")
    assert seen and seen[-1] == steps


def test_the_note_beside_the_steps():
    assert launch.note({"step": 1, "max_steps": 2}) == ""
    assert launch.note({"loss": 0.51249, "samples_per_second": 181.04}) == "loss 0.512, 181.0 samples/s"


FAILURES = {
    "the plugin's own line": ("sys.exit('\\nerror: own.yaml: key x is wrong')", ["own.yaml: key x is wrong"]),
    "an exception": (
        "raise ValueError('first')",
        ["axolotl preprocess", "recipe.yaml failed with exit code 1", "ValueError: first"],
    ),
    "the last of several": ("try: 1 / 0\nexcept ZeroDivisionError: raise OSError('then')", ["OSError: then"]),
    "of one process": (
        "print('[rank1]: torch.OutOfMemoryError: CUDA'); sys.exit(3)",
        ["exit code 3", "torch.OutOfMemory"],
    ),
    "nothing said": ("sys.exit(7)", ["failed with exit code 7", "VERBOSE=1"]),
    "killed": ("os.kill(os.getpid(), 9)", ["ended by SIGKILL", "out of memory"]),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_is_one_line_with_its_reason_and_the_log(case, child, capfd):
    program, words = FAILURES[case]
    with refuses(*words, "log: outputs/own/train.log"):
        child(program)
    assert ("  | " in capfd.readouterr().err) == (case not in ("the plugin's own line", "nothing said", "killed"))


def test_the_last_lines_of_a_failure_that_nobody_foresaw_are_shown(child, capfd):
    program = "for step in range(20): print('line', step)\n"
    program += (
        "print('[2026-11-27] [INFO] [axolotl] as usual', '\\n\\n 50%|###  | 1/2\\r100%|#####| 2/2', flush=True)\n"
    )
    with refuses("RuntimeError: no such kernel", "log: outputs/own/train.log"):
        child(f"{program}raise RuntimeError('no such kernel')")
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == launch.LAST_LINES and lines[-1] == "  | RuntimeError: no such kernel"
    assert "  | line 19" in lines and not any("Traceback" in line or "INFO" in line or "%|" in line for line in lines)
    with refuses("RuntimeError: no such kernel"):
        child("raise RuntimeError('no such kernel')", verbose=True)
    assert "  | " not in capfd.readouterr().err  # all of it is on the screen


def test_the_last_step_is_shown_whenever_the_plugin_last_wrote(child, monkeypatch):
    """It writes at most twice a second, and a run's end takes its file away."""
    seen = []
    monkeypatch.setattr(launch, "progress", lambda *_: contextlib.nullcontext(lambda *shown: seen.append(shown[:2])))
    program = "open(out + '/stepping', 'w').write('{\"step\": 7, \"max_steps\": 9}'); time.sleep(0.5)\n"
    program += "os.remove(out + '/stepping'); open(out + '/metrics.json', 'w').write('{\"steps\": 9}')"
    child(program)
    assert seen[0] == (7, 9) and seen[-1] == (9, 9)


@pytest.mark.parametrize(
    "stepping, words", [(True, ["resumes from checkpoint-7 of outputs/own"]), (False, ["no checkpoint", "begins anew"])]
)
def test_an_interrupt_says_where_the_same_command_begins(stepping, words, tmp_path, monkeypatch, capsys):
    """While steps run the process gets Ctrl-C and writes a checkpoint; before, it is ended."""
    monkeypatch.setattr(launch, "ROOT", tmp_path)
    out = tmp_path / "outputs" / "own"
    (out / "checkpoint-7").mkdir(parents=True)
    program = "import signal, time; signal.signal(signal.SIGINT, lambda *_: exit(0)); print(flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True)
    child.stdout.readline()
    if stepping:
        (out / "stepping").touch()
        (out / "checkpoint-7" / "optimizer.pt").write_bytes(b"state")
        checkpoints.seal(out / "checkpoint-7", {})
    (out / "adapter_model.safetensors").write_bytes(b"half-trained")
    launch.interrupt(child, out)
    assert child.returncode == (0 if stepping else -signal.SIGTERM)
    says(capsys.readouterr().err.splitlines()[-1], "interrupted", *words)
    assert not (out / "adapter_model.safetensors").exists()
