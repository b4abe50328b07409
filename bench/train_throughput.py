"""Throughput of the recipes as shipped, through `axolotl train`, beside FinLoRA's own settings in the same call.

    python -m bench.train_throughput --base <folder of the 8B shape> --data <folder of FinLoRA's files> [--runs a,b]

bench/train_throughput.yaml lists the runs. Sentiment rows: FPB, FiQA and TFNS test files. Long rows: FinanceBench
prompts joined up to 7,500 and 15,000 tokens. Each row is written to --out as it comes; runs already there for the same
commit are not run again, so that an interrupted benchmark continues.
"""

import argparse
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from finlora.core.errors import UserError, run
from finlora.core.files import read_json, write_json
from finlora.core.machine import gpus
from finlora.core.paths import ROOT
from finlora.core.provenance import git_state, versions

RUNS = ROOT / "bench" / "train_throughput.yaml"
STEPS = 22
LONG = {"8k": 7500, "16k": 15000}  # tokens, within packs of 8,192 and 16,384
# Axolotl's command line, which imports everything and then waits for its turn: a line on its standard input.
LATER = (
    "import sys, axolotl.train, axolotl.cli.train, axolotl.core.builders, fastdora.plugin.plugin; "
    "from axolotl.cli import main; sys.stdin.readline() or sys.exit(1); main.main()"
)


def sentiment_rows(data: Path) -> list[tuple[str, str]]:
    """(context, target) of the three sentiment test files, in a fixed order that mixes them."""
    files = [data / "test" / f"{name}_test.jsonl" for name in ("fpb", "fiqa", "tfns")]
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    pairs = [(row["context"], str(row["target"])) for row in rows]
    return sorted(pairs, key=lambda pair: hashlib.sha256(pair[0].encode()).hexdigest())


def long_rows(base: str, data: Path, tokens: int) -> list[tuple[str, str]]:
    """32 rows of so many tokens, made of FinanceBench prompts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    lines = (data / "train" / "financebench_train.jsonl").read_text(encoding="utf-8").splitlines()
    contexts = [json.loads(line)["context"] for line in lines]
    rows, start = [], 0
    while len(rows) < 32:
        text = ""
        while len(tokenizer(text)["input_ids"]) < tokens * 0.8:
            text, start = text + contexts[start % len(contexts)] + "\n", start + 1
        ids = tokenizer(text)["input_ids"][:tokens]
        rows.append((tokenizer.decode(ids, skip_special_tokens=True), "12.5"))
    return rows


def write_rows(rows: list[tuple[str, str]], path: Path) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for context, target in rows:
            turns = [{"role": "user", "content": context}, {"role": "assistant", "content": target}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def shipped_recipe(name: str, base: str, rows: Path, work: Path, **changes: Any) -> dict[str, Any]:
    """A recipe as shipped, with base, rows and folders exchanged, and no evaluation or checkpoint. None drops a key."""
    recipe = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"))
    exchanged = {
        "base_model": str(base),
        "datasets": [recipe["datasets"][0] | {"path": str(rows)}],
        "val_set_size": 0,
        "num_epochs": 100,
        "save_strategy": "no",
        "auto_resume_from_checkpoints": False,
        "output_dir": str(work / "out"),
        "dataset_prepared_path": str(work / "tokenised"),
    }
    dropped = ("test_datasets", "evals_per_epoch", "saves_per_epoch", "eval_sample_packing", "save_total_limit")
    recipe |= dict.fromkeys(dropped) | exchanged | changes
    return {key: value for key, value in recipe.items() if value is not None}


class Run(NamedTuple):
    """Processes of axolotl that have imported everything and wait for a line on their standard input.

    The folder `work` has recipe.yaml, out/, and of process r log<r> and what bench.plugins.Clock measured, clock<r>.
    """

    work: Path
    children: list[subprocess.Popen]


def start(recipe: dict[str, Any], work: Path, processes: int = 1, **env: str) -> Run:
    """Start `axolotl train` in so many processes, with the environment that torchrun would give them."""
    path = work / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    env = os.environ | {"AXOLOTL_DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1", "AXOLOTL_DATASET_NUM_PROC": "0"} | env
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        env |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    children = []
    for rank in range(processes):
        own = {"CLOCK": str(work / f"clock{rank}")}
        own |= {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        command = [sys.executable, "-c", LATER, "train", str(path), "--launcher", "python"]
        with (work / f"log{rank}").open("wb") as log:
            # In ROOT, where Python imports `bench` from.
            child = subprocess.Popen(command, cwd=ROOT, env=env | own, stdin=subprocess.PIPE, stdout=log, stderr=log)
        children.append(child)
    return Run(work, children)


def finish(running: Run, timeout: float) -> str | None:
    """Let the processes train; None, or why there is no result: the last line of the one that failed first."""
    work, children = running
    for child in children:
        child.stdin.write(b"now\n")
        child.stdin.close()
    end = time.monotonic() + timeout
    while any(child.poll() is None for child in children) and not any(child.poll() for child in children):
        if time.monotonic() > end:
            stop(running)
            return f"not done after {timeout:.0f} s"
        time.sleep(0.05)
    failed = next((rank for rank, child in enumerate(children) if child.poll()), None)
    stop(running)  # the others of a failed one would wait for it
    if failed is None:
        return None
    lines = [line for line in (work / f"log{failed}").read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][-400:] if lines else f"exit code {children[failed].returncode}"


def stop(running: Run) -> None:
    for child in running.children:
        child.kill()
        child.wait()


def keep_logs(running: Run, name: str, folder: Path | None) -> None:
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        for log in running.work.glob("log*"):
            shutil.copy(log, folder / f"{name.replace(' ', '_')}.{log.name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--base", required=True, help="a folder with the model and a tokenizer")
    parser.add_argument("--data", required=True, type=Path, help="folder of FinLoRA's files (test/fpb_test.jsonl ...)")
    parser.add_argument("--runs", help="names from bench/train_throughput.yaml; all without")
    parser.add_argument("--steps", type=int, help="for trying the benchmark itself out")
    parser.add_argument("--timeout", type=float, default=240, help="seconds that one run may take")
    parser.add_argument("--profile", type=Path, help="folder for profiles; the throughput then means little")
    parser.add_argument("--logs", type=Path, help="folder for axolotl's output")
    parser.add_argument("--out", type=Path, default=ROOT / "finlora" / "plan" / "train_throughput.json")
    options = parser.parse_args()
    runs = yaml.safe_load(RUNS.read_text(encoding="utf-8"))
    names = options.runs.split(",") if options.runs else list(runs)
    if unknown := [name for name in names if name not in runs]:
        raise UserError(f"--runs {unknown[0]}: {RUNS.name} has {', '.join(runs)}")
    about = {"what": f"python -m bench.train_throughput: {__doc__.splitlines()[0]}", "git": git_state()}
    about |= {"device": gpus()[0][0] if gpus() else "CPU", "versions": versions()}
    before = read_json(options.out)
    rows = before["rows"] if before and all(before[key] == about[key] for key in ("git", "device", "versions")) else {}
    started: dict[str, Run] = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            for name in names:
                if "samples_s" not in rows.get(name, {}):
                    started[name] = start_named(name, runs[name], Path(folder), options)
            for name, running in started.items():
                failed = finish(running, options.timeout)
                row = {"failed": failed} if failed else read_json(running.work / "clock0")
                rows[name] = {key: runs[name].get(key, {}) for key in ("recipe", "set", "rows")} | row
                print(name, json.dumps(row), flush=True)
                keep_logs(running, name, options.logs)
                write_json(options.out, about | {"rows": rows})
        finally:
            for running in started.values():
                stop(running)


def start_named(name: str, entry: dict[str, Any], folder: Path, options: argparse.Namespace) -> Run:
    """Start a run of bench/train_throughput.yaml; `folder` has its rows, written at first use, and its work."""
    kind, work = entry["rows"], folder / name
    work.mkdir()
    rows = folder / f"{kind}.jsonl"
    if not rows.exists():
        contexts = sentiment_rows(options.data) if kind == "sentiment" else None
        write_rows(contexts or long_rows(options.base, options.data, LONG[kind]), rows)
    changes = dict(entry.get("set", {}))
    changes |= dict.fromkeys(changes.pop("drop", [])) | {"max_steps": options.steps or entry.get("steps", STEPS)}
    recipe = shipped_recipe(entry["recipe"], options.base, rows, work, **changes)
    recipe["plugins"] = [*recipe["plugins"], "bench.plugins.Clock"]
    profile = {"CLOCK_PROFILE": str(options.profile / f"{name}.txt")} if options.profile else {}
    return start(recipe, work, **profile)


if __name__ == "__main__":
    run(main)
