"""Training rates of the recipes as shipped, through `axolotl train`, beside FinLoRA's own settings in the same call.

    python -m bench.train_throughput --base <folder of the 8B shape> --data <folder of FinLoRA's files> [--runs a,b]

bench/train_throughput.yaml lists the runs. Sentiment rows: FPB, FiQA and TFNS test files. Long rows: FinanceBench
prompts joined up to 7,500 and 15,000 tokens. Each row is written to --out as it comes; runs already there for the same
commit are not run again, so that an interrupted benchmark goes on.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from finlora.core.errors import UserError, run
from finlora.core.files import read_json, replacing
from finlora.core.machine import gpus
from finlora.core.paths import ROOT
from finlora.core.provenance import git_state, versions

RUNS = ROOT / "bench" / "train_throughput.yaml"
STEPS = 22
LONG = {"8k": 7500, "16k": 15000}


def sentiment_rows(data: Path) -> list[tuple[str, str]]:
    """(context, target) of the three sentiment test files, in a fixed order that mixes them."""
    files = [data / "test" / f"{name}_test.jsonl" for name in ("fpb", "fiqa", "tfns")]
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [(row["context"], str(row["target"])) for row in sorted(rows, key=lambda row: hash_order(row["context"]))]


def long_rows(given: argparse.Namespace, kind: str) -> list[tuple[str, str]]:
    """32 rows of LONG[kind] tokens, made of FinanceBench prompts."""
    from transformers import AutoTokenizer

    tokenizer, tokens = AutoTokenizer.from_pretrained(given.base), LONG[kind]
    lines = (given.data / "train" / "financebench_train.jsonl").read_text(encoding="utf-8").splitlines()
    contexts = [json.loads(line)["context"] for line in lines]
    rows, start = [], 0
    while len(rows) < 32:
        text = ""
        while len(tokenizer(text)["input_ids"]) < tokens * 0.8:
            text, start = text + contexts[start % len(contexts)] + "\n", start + 1
        ids = tokenizer(text)["input_ids"][:tokens]
        rows.append((tokenizer.decode(ids, skip_special_tokens=True), "12.5"))
    return rows


def hash_order(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write_rows(rows: list[tuple[str, str]], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for context, target in rows:
            said = [{"role": "user", "content": context}, {"role": "assistant", "content": target}]
            file.write(json.dumps({"messages": said}) + "\n")


def recipe_of(wanted: dict[str, Any], base: str, rows: Path, work: Path) -> dict[str, Any]:
    """The run's recipe as shipped, with base, rows, steps and folders exchanged and no evaluation or checkpoint."""
    recipe = yaml.safe_load((ROOT / "recipes" / f"{wanted['recipe']}.yaml").read_text(encoding="utf-8"))
    changes = dict(wanted.get("set", {}))
    for key in changes.pop("drop", []):
        recipe.pop(key)
    recipe |= changes
    entry = recipe["datasets"][0] | {"path": str(rows)}
    for key in ("test_datasets", "evals_per_epoch", "saves_per_epoch", "eval_sample_packing", "save_total_limit"):
        recipe.pop(key, None)
    return recipe | {
        "base_model": base,
        "plugins": [*recipe["plugins"], "bench.clock.Clock"],
        "datasets": [entry],
        "val_set_size": 0,
        "max_steps": wanted.get("steps", STEPS),
        "num_epochs": 100,
        "save_strategy": "no",
        "auto_resume_from_checkpoints": False,
        "output_dir": str(work / "out"),
        "dataset_prepared_path": str(work / "tokenised"),
    }


# Axolotl's command line, which imports everything and then waits for its turn: a line on its standard input.
LATER = (
    "import sys, axolotl.train, axolotl.cli.train, axolotl.core.builders, "
    "fastdora.plugin.plugin; from axolotl.cli import main"
)
LATER += "; sys.stdin.readline() or sys.exit(1); main.main()"


def start(name: str, wanted: dict[str, Any], rows: Path, work: Path, given: argparse.Namespace) -> subprocess.Popen:
    """A process that will train this run once it is told to."""
    recipe = recipe_of(wanted, given.base, rows, work)
    if given.steps:
        recipe["max_steps"] = given.steps
    config = work / f"{name}.yaml"
    config.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    env = os.environ | {"CLOCK": str(work / "row.json"), "AXOLOTL_DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env["AXOLOTL_DATASET_NUM_PROC"] = "0"
    if given.profile:
        env["CLOCK_PROFILE"] = str(given.profile / f"{name}.txt")
    command = [sys.executable, "-c", LATER, "train", str(config), "--launcher", "python"]
    with (work / "log").open("wb") as log:
        return subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=log, stderr=log)


def finish(child: subprocess.Popen, work: Path, timeout: float) -> dict[str, Any]:
    """Let the process train; its row, or how it failed."""
    try:
        child.communicate(b"now\n", timeout)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
    row = read_json(work / "row.json")
    if row is None:
        said = [line for line in (work / "log").read_text(errors="replace").splitlines() if line.strip()]
        row = {"failed": child.returncode, "last": said[-1][-300:] if said else ""}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--base", required=True, help="a folder with the model and a tokenizer")
    parser.add_argument("--data", required=True, type=Path, help="folder of FinLoRA's files (test/fpb_test.jsonl ...)")
    parser.add_argument("--runs", help="names from bench/train_throughput.yaml; all without")
    parser.add_argument("--steps", type=int, help="for trying the benchmark itself out")
    parser.add_argument("--timeout", type=float, default=240, help="seconds that one run may take")
    parser.add_argument("--profile", type=Path, help="folder for profiles; rates then mean little")
    parser.add_argument("--logs", type=Path, help="folder for axolotl's output")
    parser.add_argument("--out", type=Path, default=ROOT / "finlora" / "plan" / "train_throughput.json")
    given = parser.parse_args()
    runs = yaml.safe_load(RUNS.read_text(encoding="utf-8"))
    names = given.runs.split(",") if given.runs else list(runs)
    if unknown := [name for name in names if name not in runs]:
        raise UserError(f"--runs {unknown[0]}: {RUNS.name} has {', '.join(runs)}")
    about = {"what": f"python -m bench.train_throughput: {__doc__.splitlines()[0]}", "git": git_state()}
    about |= {"device": gpus()[0][0] if gpus() else "CPU", "versions": versions()}
    before = read_json(given.out)
    rows = before["rows"] if before and all(before[key] == about[key] for key in ("git", "device", "versions")) else {}
    names = [name for name in names if "samples_s" not in rows.get(name, {})]
    with tempfile.TemporaryDirectory() as folder:
        files, children = {}, {}
        for name in names:
            kind, work = runs[name]["rows"], Path(folder) / name
            work.mkdir()
            if kind not in files:
                files[kind] = Path(folder) / f"{kind}.jsonl"
                write_rows(sentiment_rows(given.data) if kind == "sentiment" else long_rows(given, kind), files[kind])
            children[name] = start(name, runs[name], files[kind], work, given)
        try:
            for name, child in children.items():
                row = finish(child, Path(folder) / name, given.timeout)
                about_run = {key: runs[name].get(key, {}) for key in ("recipe", "set", "rows")}
                rows[name] = about_run | row
                print(name, json.dumps(row), flush=True)
                if given.logs:
                    given.logs.mkdir(parents=True, exist_ok=True)
                    shutil.copy(Path(folder) / name / "log", given.logs / f"{name}.log")
                with replacing(given.out) as file:
                    json.dump(about | {"rows": rows}, file, indent=1)
                    file.write("\n")
        finally:
            for child in children.values():
                child.kill()


if __name__ == "__main__":
    run(main)
