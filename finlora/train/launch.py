"""Axolotl's commands as child processes: what they print goes to a log, their progress to the screen."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

from fastdora.plugin import checkpoints
from finlora.core.errors import UserError
from finlora.core.files import read_json
from finlora.core.paths import ROOT
from finlora.core.progress import progress
from finlora.core.startup import is_verbose
from finlora.recipes.recipe import Recipe
from finlora.train.runs import RunFolder

# Lines of the log that a person must know: fastdora's warnings, and which rows train. `train` reads the rows again.
WARNING = r"\[(?:WARNING|ERROR)\] \[axolotl\.fastdora[\w.]*\] (?P<warning>.*)"
ROWS = r"\[INFO\] \[axolotl\.fastdora\.rows\] (?P<rows>.*)"
TELLING = {"train": re.compile(WARNING), "preprocess": re.compile(f"{WARNING}|{ROWS}")}
EXCEPTION = re.compile(r"(?:\[rank\d+\]: ?)?((?:[\w.]+\.)?\w*(?:Error|Exception): .+)")
ERROR = re.compile(r"^error: (?P<error>.*)", re.MULTILINE)  # the plugin's own
IDLE = re.compile(r"\[(INFO|DEBUG)\]|\d%\||Traceback|^\W*$")  # lines that say nothing of a failure
LAST_LINES, WIDTH = 8, 160  # of a log, shown after a failure that nobody foresaw
POLL = 0.2  # seconds


def preprocess_and_train(recipe: Recipe, folder: RunFolder, options: list[str], local: bool, lock: IO) -> None:
    """Tokenize the rows, which the first node does for all, and train. options: axolotl's, of training.

    The plugin's errors name the recipe that was written, not its copy in the run's folder.
    """
    config = folder.recipe_file
    print(f"log       {log_file(config).relative_to(ROOT)} (VERBOSE=1 shows it)", flush=True)
    try:
        if not folder.rank:
            for name in ("metrics.json", "stepping"):  # an earlier attempt's
                (folder.path / name).unlink(missing_ok=True)
            axolotl("preprocess", config, list(recipe.args), local, lock)
        axolotl("train", config, options, local, lock)
    except UserError as error:
        copy, colon, rest = str(error).partition(": ")
        raise (UserError(f"{recipe.path}{colon}{rest}") if copy == str(config) else error) from error.__cause__


def axolotl(command: str, config: Path, args: list[str], local: bool, lock: IO) -> None:
    """Run one axolotl command; UserError with its reason when it fails; Ctrl-C leaves a complete checkpoint.

    local: the base model is small, so nothing is spread over processes. The hub is never asked: `fetch_base` has.
    """
    log = log_file(config)
    with log.open("ab") as output:
        start = output.tell()
        # Its own process group: Ctrl-C reaches it from here alone, and once. The lock goes with it.
        child = subprocess.Popen(
            [sys.executable, "-m", "axolotl.cli.main", command, str(config), *args],
            cwd=ROOT,
            env=environment(command, local),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[lock.fileno()],
        )
    try:
        code = watch(child, log, start, TELLING[command])
    except (KeyboardInterrupt, SystemExit):
        interrupt(child, config.parent)
        raise
    if code:
        with log.open("rb") as file:
            file.seek(start)
            text = file.read().decode("utf-8", errors="replace")
        if not (ERROR.search(text) or is_verbose()):
            print("".join(f"  | {line}\n" for line in last_lines(text)), end="", file=sys.stderr, flush=True)
        raise UserError(f"{why(text, f'axolotl {command} {config}', code)} (log: {log.relative_to(ROOT)})")


def log_file(config: Path) -> Path:
    """What preprocess and train print; nodes after the first have one each, as their recipes are."""
    return config.with_name("train.log" if config.name == "recipe.yaml" else f"{config.stem}.log")


def environment(command: str, local: bool) -> dict[str, str]:
    env = os.environ | {
        "AXOLOTL_DO_NOT_TRACK": os.environ.get("AXOLOTL_DO_NOT_TRACK", "1"),
        "AXOLOTL_TEE_STDOUT": "0",  # its debug.log would hold our log once more
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONUTF8": "1",  # torch reads its own sources in the locale's encoding
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a recipe's paths are this repository's
        "RAY_USAGE_STATS_ENABLED": os.environ.get("RAY_USAGE_STATS_ENABLED", "0"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600",  # torchrun would kill a checkpoint under way after 30 s
    }
    if command == "train" or local:
        # 0: none but this one. Tokens are ready by then, and others would only start anew, axolotl's imports included.
        env["AXOLOTL_DATASET_NUM_PROC"] = "0"
    return env


def watch(child: subprocess.Popen, log: Path, start: int, telling: re.Pattern) -> int:
    """Show what a person must know of the log from byte `start` on, and the steps, until the process ends; its code."""
    told: set[str] = set()
    stepping, rest, state = log.with_name("stepping"), "", None
    with log.open(encoding="utf-8", errors="replace", newline="") as file, progress("training", "step") as show:
        file.seek(start)
        while True:
            code = child.poll()  # before the log is read: nothing comes after its end
            lines, newline, rest = (rest + file.read()).rpartition("\n")
            tell(lines + newline, telling, told)
            if now := read_json(stepping):
                state = now
                show(state["step"], state["max_steps"], note(state))
            if code is not None:
                tell(rest, telling, told)
                if state and not code and (metrics := read_json(log.with_name("metrics.json"))):
                    show(metrics["steps"], state["max_steps"], note(state))
                return code
            time.sleep(POLL)


def tell(text: str, telling: re.Pattern, told: set[str]) -> None:
    """Print lines of the log: all of them with VERBOSE=1, else those that are telling, each once."""
    if is_verbose():
        print(text, end="", file=sys.stderr, flush=True)
        return
    for match in telling.finditer(text):
        line = f"warning: {match['warning']}" if match["warning"] else match["rows"]
        if line not in told:
            print(line, file=sys.stderr, flush=True)
        told.add(line)


def note(state: dict[str, Any]) -> str:
    """What the plugin knew when it last logged."""
    parts = {"loss": "loss {:.3f}", "samples_per_second": "{:.1f} samples/s"}
    return ", ".join(text.format(state[key]) for key, text in parts.items() if state.get(key) is not None)


def why(text: str, what: str, code: int) -> str:
    """The reason of a failure in what the process printed: the plugin's line, else the last exception."""
    if known := ERROR.search(text):
        return known["error"]
    if code < 0:
        hint = "; the machine may be out of memory" if -code == signal.SIGKILL else ""
        return f"{what} was ended by {signal.Signals(-code).name}{hint}"
    exceptions = [match[1] for match in map(EXCEPTION.match, text.splitlines()) if match]
    reason = f": {exceptions[-1][:300]}" if exceptions else "; VERBOSE=1 shows what it prints"
    return f"{what} failed with exit code {code}{reason}"


def last_lines(text: str) -> list[str]:
    """The last lines that matter: no progress bars, nor what is said when all is well."""
    return [line.rstrip()[:WIDTH] for line in text.splitlines() if not IDLE.search(line)][-LAST_LINES:]


def interrupt(child: subprocess.Popen, out: Path) -> None:
    """End a command on Ctrl-C or SIGTERM, and say where the same command will begin.

    During preprocessing and loading nothing is worth keeping; while steps run the plugin answers with a checkpoint.
    """
    stepping = (out / "stepping").exists()
    os.killpg(child.pid, signal.SIGINT if stepping else signal.SIGTERM)
    if stepping:
        print("\ninterrupted: finishing the step under way and saving a checkpoint", file=sys.stderr, flush=True)
    try:
        child.wait()
    except KeyboardInterrupt:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    partial = out / "adapter_model.safetensors"
    if partial.exists():
        partial.rename(out / "interrupted_adapter_model.safetensors")
    last = checkpoints.last_whole(out)[0]
    if last:
        print(f"interrupted; the same command resumes from {last.name} of {out.relative_to(ROOT)}", file=sys.stderr)
    else:
        print("interrupted; no checkpoint was written, the same command begins anew", file=sys.stderr)
