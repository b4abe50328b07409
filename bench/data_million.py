"""Prepare and audit one million generated rows; print seconds and the largest resident memory of each.

    python -m bench.data_million [--rows 1000000] [--folder DIR]

The rows stand for FinLoRA's sentiment train file: its instructions, 15 to 60 words each, a tenth of them copied from
another row and a twentieth copied with a word changed; 10,000 of them reappear in the test sets.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from string import ascii_lowercase

import numpy as np

from finlora.core.errors import run
from finlora.core.paths import ROOT
from finlora.data.tasks import task

TASK = "sentiment"
INSTRUCTION = "Instruction: What is the sentiment of this %s? Please choose an answer from {%s}.\nInput: %s\nAnswer: "
LABELS = ["negative", "neutral", "positive"]


def generate(raw: Path, rows: int, seed: int = 0) -> int:
    """Write the train file and the test sets of the task under `raw`; return the bytes of the train file."""
    draw, numbers = random.Random(seed), np.random.default_rng(seed)
    words = ["".join(draw.choices(ascii_lowercase, k=draw.randint(2, 10))) for _ in range(30_000)]
    # As in a language few words are frequent: the share of a word falls with its rank.
    edges = np.cumsum(1 / (np.arange(len(words)) + 10))
    recent: collections.deque[str] = collections.deque(maxlen=5000)
    train, tests = raw / task(TASK).train, [raw / test.file for test in task(TASK).tests.values()]
    for path in train, *tests:
        path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as files:
        file, *handles = (files.enter_context(path.open("w", encoding="utf-8")) for path in (train, *tests))
        for number in range(rows):
            kind = draw.random()
            if recent and kind < 0.15:
                text = draw.choice(recent) + (f" {draw.choice(words)}" if kind < 0.05 else "")
            else:
                chosen = np.searchsorted(edges, numbers.random(draw.randint(15, 60)) * edges[-1])
                text = " ".join(words[index] for index in chosen.tolist())
                recent.append(text)
            context = INSTRUCTION % (draw.choice(["news", "tweet"]), "/".join(LABELS), text)
            line = json.dumps({"context": context, "target": draw.choice(LABELS)}) + "\n"
            file.write(line)
            if number % max(1, rows // 10_000) == 0:
                draw.choice(handles).write(line)
    return train.stat().st_size


def measure(command: str, *arguments: object) -> tuple[float, float, float, int]:
    """Run `finlora command`; its seconds, those of the CPU, its largest resident memory in MiB, its exit code."""
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "finlora", command, *map(str, arguments)], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    cpu = usage.ru_utime + usage.ru_stime
    return time.monotonic() - started, cpu, usage.ru_maxrss / 1024, os.waitstatus_to_exitcode(status)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where the files go and stay (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        size = generate(folder / "raw", options.rows)
        print(f"{options.rows} rows, {size / 2**20:.0f} MiB, {os.cpu_count()} cores")
        commands = {
            "prepare": (TASK, "--raw", folder / "raw", "--out", folder / "prepared"),
            "audit": (TASK, "--raw", folder / "raw", "--json", folder / "audit", "--no-tokens"),
        }
        total = 0.0
        for command, arguments in commands.items():
            seconds, cpu, memory, code = measure(command, *arguments)
            total += seconds
            print(
                f"{command:<14}{seconds:7.1f} s, {cpu:.1f} of CPU {memory:7.0f} MiB at most, exit code {code}",
                flush=True,
            )
        print(f"{'together':<14}{total:7.1f} s")


if __name__ == "__main__":
    run(main)
