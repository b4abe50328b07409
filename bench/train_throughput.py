"""Throughput of the recipes as shipped, through `axolotl train`, beside FinLoRA's own settings in the same call.

    python -m bench.train_throughput --base <folder of the 8B shape> --data <folder of FinLoRA's files> [--runs a,b]
    python -m bench.train_throughput --base ... --data ... --recipes sentiment_r8_dora,finer_r8_dora@finer_made \
        --set finlora --set fastdora_shared_prefixes=false --set fastdora_shared_prefixes=true sequence_len=2560

The first measures the runs of bench/train_throughput.yaml, the second each recipe with the keys of each --set, on rows
of its task or of another kind (bench/rows.py); 8k and 16k are FinanceBench prompts joined up to 7,500 and 15,000
tokens. Each row is printed, and written to --out, as it comes, with its error where a run fails. Runs already there for
the same commit are not run again, so that an interrupted benchmark continues.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bench.rows import Row, read_rows, write_rows
from finlora.core.errors import UserError, did_you_mean, run
from finlora.core.files import read_json, write_json
from finlora.core.machine import gpus
from finlora.core.paths import ROOT, shown
from finlora.core.provenance import git_state, versions

RUNS = ROOT / "bench" / "train_throughput.yaml"
RECORD = ROOT / "finlora" / "plan" / "train_throughput.json"  # what plans are fitted to
TRIED = ROOT / "outputs" / "train_throughput.json"
STEPS, SKIP = 22, 6  # of a run; those in which kernels are compiled and memory is allocated are not counted
LONG = {"8k": 7500, "16k": 15000}  # tokens, within packs of 8,192 and 16,384
# Axolotl's command line, which imports everything and then waits for its turn: a line on its standard input.
LATER = (
    "import sys, axolotl.train, axolotl.cli.train, axolotl.core.builders, fastdora.plugin.plugin; "
    "from axolotl.cli import main; sys.stdin.readline() or sys.exit(1); main.main()"
)


def long_rows(base: str, data: Path, tokens: int) -> list[Row]:
    """32 rows of so many tokens, made of FinanceBench prompts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    contexts = [context for context, _ in read_rows("financebench", data)]
    rows, start = [], 0
    while len(rows) < 32:
        text = ""
        while len(tokenizer(text)["input_ids"]) < tokens * 0.8:
            text, start = text + contexts[start % len(contexts)] + "\n", start + 1
        ids = tokenizer(text)["input_ids"][:tokens]
        rows.append((tokenizer.decode(ids, skip_special_tokens=True), "12.5"))
    return rows


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


def start(recipe: dict[str, Any], work: Path, processes: int = 1, command: list[str] | None = None, **env: str) -> Run:
    """Start `axolotl train` in so many processes, with the environment that torchrun would give them.

    command: another program that takes recipe.yaml as its last argument, and waits as LATER does.
    """
    path = work / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    env = os.environ | {"AXOLOTL_DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1", "AXOLOTL_DATASET_NUM_PROC": "0"} | env
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        env |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    children = []
    axolotl = [sys.executable, "-c", LATER, "train", str(path), "--launcher", "python"]
    for rank in range(processes):
        own = {"CLOCK": str(work / f"clock{rank}")}
        own |= {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        program = [*command, str(path)] if command else axolotl
        with (work / f"log{rank}").open("wb") as log:
            # In ROOT, where Python imports `bench` from.
            child = subprocess.Popen(program, cwd=ROOT, env=env | own, stdin=subprocess.PIPE, stdout=log, stderr=log)
        children.append(child)
    return Run(work, children)


def finish(running: Run, timeout: float) -> str | None:
    """Let the processes train; None, or why there is no result: the error of the one that failed first."""
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
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Exit)\b", line)]  # a bar may follow it
    return (errors or lines)[-1][-400:] if lines else f"exit code {children[failed].returncode}"


def stop(running: Run) -> None:
    for child in running.children:
        child.kill()
        child.wait()


def keep_logs(running: Run, name: str, folder: Path | None) -> None:
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        for log in running.work.glob("log*"):
            shutil.copy(log, folder / f"{name.replace(' ', '_')}.{log.name}")


def runs_of(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The runs asked for, by name: those of bench/train_throughput.yaml, or each of --recipes with each --set."""
    known = yaml.safe_load(RUNS.read_text(encoding="utf-8"))
    if not options.recipes:
        names = options.runs.split(",") if options.runs else list(known)
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"--runs {unknown[0]}: {RUNS.name} has {', '.join(known)}")
        return {name: known[name] for name in names}
    runs = {}
    for recipe in options.recipes.split(","):
        recipe, _, rows = recipe.partition("@")
        path = ROOT / "recipes" / f"{recipe}.yaml"
        if not path.is_file():
            near = did_you_mean(recipe, [path.stem for path in path.parent.glob("*_*.yaml")], 3)
            raise UserError(f"--recipes {recipe}: is no recipe; {near}see recipes/")
        rows = rows or task_of(path)
        for words in options.set or [[]]:
            run = {"recipe": recipe, "rows": rows, "set": {}}
            for word in words:
                key, equals, value = word.partition("=")
                if not equals and key not in known:
                    raise UserError(f"--set {word}: is neither key=value nor a run of {RUNS.name}, whose keys it takes")
                run["set"] |= {key: yaml.safe_load(value)} if equals else known[key].get("set", {})
            runs[" ".join([recipe + f"@{rows}" * (rows != task_of(path)), *words])] = run
    return runs


def task_of(recipe: Path) -> str:
    """The task whose prepared rows a recipe trains on."""
    return Path(yaml.safe_load(recipe.read_text(encoding="utf-8"))["datasets"][0]["path"]).parent.name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--base", help="a folder with the model and a tokenizer; with --tiny one is made")
    parser.add_argument("--data", type=Path, help="folder of FinLoRA's files (test/fpb_test.jsonl ...)")
    parser.add_argument("--rows", type=Path, help="folder of <task>/train.jsonl, as prepared or by bench.rows")
    parser.add_argument("--runs", help="names from bench/train_throughput.yaml; all without")
    parser.add_argument("--recipes", help="recipes in place of --runs; recipe@kind takes other rows (bench/rows.py)")
    parser.add_argument(
        "--set",
        nargs="*",
        action="append",
        help="key=value ... of one variant of --recipes, or a run's name for its keys",
    )
    parser.add_argument("--steps", type=int, help=f"of a run, the first {SKIP} not counted ({STEPS})")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the benchmark on a CPU")
    parser.add_argument("--timeout", type=float, default=240, help="seconds that one run may take")
    parser.add_argument("--profile", type=Path, help="folder for profiles; the throughput then means little")
    parser.add_argument("--logs", type=Path, help="folder for axolotl's output")
    parser.add_argument("--out", type=Path, help=f"{shown(RECORD)}; with --recipes or --tiny {shown(TRIED)}")
    options = parser.parse_args()
    runs = runs_of(options)
    if not options.base and not options.tiny:
        raise UserError("--base: name a folder with the model (python -m bench.random_base), or take --tiny")
    if options.steps and options.steps <= SKIP:
        raise UserError(f"--steps {options.steps}: the first {SKIP} are not counted; take more")
    options.out = options.out or (TRIED if options.recipes or options.tiny else RECORD)
    about = {"what": f"python -m bench.train_throughput: {__doc__.splitlines()[0]}", "git": git_state()}
    about |= {"device": gpus()[0][0] if gpus() else "CPU", "versions": versions()}
    before = read_json(options.out)
    rows = before["rows"] if before and all(before[key] == about[key] for key in ("git", "device", "versions")) else {}
    left = [name for name in runs if "samples_s" not in rows.get(name, {})]
    started: dict[str, Run] = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        options.base = options.base or tiny_base(Path(folder))
        try:
            # All but tiny ones now, so that no import competes with a run that is timed.
            for name in () if options.tiny else left:
                started[name] = start_run(name, runs[name], Path(folder), options)
            for name in left:
                running = started.get(name) or start_run(name, runs[name], Path(folder), options)
                started[name] = running
                failed = finish(running, options.timeout)
                row = {"failed": failed} if failed else read_json(running.work / "clock0")
                if not failed:
                    row["tokens_row"] = round(row["tokens_s"] / row["samples_s"], 1)
                rows[name] = {key: runs[name].get(key, {}) for key in ("recipe", "set", "rows")} | row
                machine = {key: about[key] for key in ("device", "git", "versions")}
                print(json.dumps({"run": name} | rows[name] | machine), flush=True)
                keep_logs(running, name, options.logs)
                write_json(options.out, about | {"rows": rows})
        finally:
            for running in started.values():
                stop(running)


def tiny_base(folder: Path) -> str:
    """A model for a CPU with Llama-3's tokenizer, in the folder `base`."""
    from bench.random_base import make_base  # late: it imports torch

    make_base("llama-3", folder / "base", tiny=True)
    return str(folder / "base")


def start_run(name: str, entry: dict[str, Any], folder: Path, options: argparse.Namespace, **env: str) -> Run:
    """Start a run; `folder` gets its rows, at first use, and its work."""
    kind = entry["rows"]
    work = folder / hashlib.sha256(name.encode()).hexdigest()[:12]
    work.mkdir()
    rows = (options.rows or folder) / kind / "train.jsonl"
    if options.rows and not rows.is_file():
        raise UserError(f"{rows}: is missing; `python -m bench.rows {options.rows} --kinds {kind}` writes it")
    if not rows.exists():
        of_length = long_rows(options.base, options.data, LONG[kind]) if kind in LONG else None
        write_rows(of_length or read_rows(kind, options.data), rows)
    changes = dict(entry.get("set", {}))
    changes |= dict.fromkeys(changes.pop("drop", [])) | {"max_steps": options.steps or entry.get("steps", STEPS)}
    if options.tiny:
        changes |= {"max_steps": options.steps or SKIP + 2, "gradient_accumulation_steps": 1}
    recipe = shipped_recipe(entry["recipe"], options.base, rows, work, **changes)
    recipe["plugins"] = [*recipe["plugins"], "bench.plugins.Clock"]
    profile = {"CLOCK_PROFILE": str(options.profile / f"{name}.txt")} if options.profile else {}
    return start(recipe, work, **profile | env)


if __name__ == "__main__":
    run(main)
