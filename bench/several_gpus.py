"""Several real GPUs: do they train what one trains, and how much faster? Needs two GPUs or more.

    PYTHONPATH=.:tests python -m bench.several_gpus [--base <folder of the 8B shape> --data <folder of FinLoRA's files>]

First the tiny model: four Adam steps on one GPU, on one GPU again (what the GPU itself varies by), and on all of them,
for each way to share and every kind of base; then rates of the 8B shape; then LoRA; offload last, because DeepSpeed
compiles its Adam. Rows are written to --out as they come; what --seconds left no time for is not in it. `--cpu 2` does
the same on two CPU processes, with gloo.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bench.kills import WORDS, recipe
from bench.train_throughput import LATER, recipe_of, sentiment_rows, write_rows
from finlora.core.errors import UserError, run
from finlora.core.files import read_json, replacing
from finlora.core.machine import gpus
from finlora.core.paths import ROOT
from finlora.core.provenance import git_state, versions
from finlora.train import distributed, tiny

RATE, STEPS, PACK = 0.001, 4, 128
WAYS = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
OFFLOAD = ("zero2_offload", "zero3_offload", "fsdp2_offload")
# name: (recipe, GPUS=1 or all, how they share, whether the global batch grows with the GPUs)
RATES = {
    "8bit_dora 1 GPU": ("sentiment_r8_dora", 1, "ddp", False),
    "8bit_dora ddp, batch times GPUs": ("sentiment_r8_dora", 0, "ddp", True),
    "8bit_dora ddp, batch kept": ("sentiment_r8_dora", 0, "ddp", False),
    "bf16_dora 1 GPU": ("sentiment_bf16_r8_dora", 1, "ddp", False),
    "bf16_dora fsdp2, batch times GPUs": ("sentiment_bf16_r8_dora", 0, "fsdp2", True),
    "bf16_dora zero3, batch times GPUs": ("sentiment_bf16_r8_dora", 0, "zero3", True),
}


class Run(NamedTuple):
    """Processes of axolotl that wait for a line on their standard input."""

    work: Path
    children: list[subprocess.Popen]


def shared(name: str, recipe: dict[str, Any], way: str, processes: int) -> dict[str, Any]:
    """The recipe with the keys that `make train` sets for this way to share."""
    stage, _, offload = way.partition("_")
    zero, fsdp = (int(stage[4:]), None) if stage.startswith("zero") else (None, 2 if stage == "fsdp2" else None)
    return distributed.shard(Path(name), recipe, zero, bool(offload), fsdp, processes)


def tiny_recipe(given, work: Path, processes: int, way: str, bits: int, dora: bool) -> dict[str, Any]:
    """bench/kills.py's recipe, without dropout; as many packs a step as there are GPUs, whoever trains them."""
    number = given.processes
    rows = [(f"Shares of company {i} {WORDS[i % 8]}.", "up" if i % 2 else "down") for i in range(24 * number)]
    write_rows(rows, work / "train.jsonl")
    changes = {
        "load_in_8bit": bits == 8,
        "load_in_4bit": bits == 4,
        "adapter": "qlora" if bits == 4 else "lora",
        "peft_use_dora": dora,
        "lora_dropout": 0.0,  # each process draws its own
        "sequence_len": PACK,
        "gradient_accumulation_steps": number // processes,
        "learning_rate": RATE,
        "max_steps": STEPS,
        "warmup_steps": 0,
        "save_steps": None,
        "save_strategy": "no",
        "auto_resume_from_checkpoints": False,
        "fastdora_graphs": False,  # norm_check looks into every forward
    }
    found = yaml.safe_load(recipe(work, "out", given.tiny, **changes).read_text(encoding="utf-8"))
    return shared("tiny", found | {"plugins": [*found["plugins"], "norm_check.NormCheck"]}, way, processes)


def rate_recipe(given, work: Path, processes: int, name: str, way: str, grows: bool) -> dict[str, Any]:
    write_rows(sentiment_rows(given.data), work / "train.jsonl")
    found = recipe_of({"recipe": name, "steps": given.steps}, given.base, work / "train.jsonl", work)
    if not grows:
        found = distributed.share_batch(Path(name), found, processes, 1)[0]
    return shared(name, found, way, processes)


def start(given, work: Path, processes: int, config: dict[str, Any]) -> Run:
    if given.cpu:
        config |= {"plugins": [*config["plugins"], "cpu_processes.CpuProcesses"]}
    path = work / "recipe.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]
    env = os.environ | {"AXOLOTL_DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1", "AXOLOTL_DATASET_NUM_PROC": "0"}
    env |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "NORM_TOLERANCE": "inf", "OMP_NUM_THREADS": "1"}
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        env |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    else:
        env["CUDA_VISIBLE_DEVICES"] = "0"
    children = []
    for rank in range(processes):
        own = {"CLOCK": str(work / f"clock{rank}.json")}
        own |= {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        with (work / f"log{rank}").open("wb") as log:
            command = [sys.executable, "-c", LATER, "train", str(path), "--launcher", "python"]
            options = {"env": env | own, "stdin": subprocess.PIPE, "stdout": log, "stderr": log}
            children.append(subprocess.Popen(command, **options))
    given.started += children
    return Run(work, children)


def finish(given, running: Run) -> str | None:
    """Let the processes train; None, or why there is no result: the last line of the one that failed first."""
    work, children = running
    if time.monotonic() > given.end:
        stop(children)
        return "no time was left for it"
    for child in children:
        child.stdin.write(b"now\n")
        child.stdin.close()
    end = time.monotonic() + given.timeout
    while any(child.poll() is None for child in children) and not any(child.poll() for child in children):
        if time.monotonic() > end:
            stop(children)
            return f"not done after {given.timeout:.0f} s"
        time.sleep(0.05)
    failed = next((rank for rank, child in enumerate(children) if child.poll()), None)
    stop(children)
    if failed is None:
        return None
    said = [line for line in (work / f"log{failed}").read_text(errors="replace").splitlines() if line.strip()]
    return said[-1][-400:] if said else f"exit code {children[failed].returncode}"


def stop(children: Iterable[subprocess.Popen]) -> None:
    for child in children:
        child.kill()
        child.wait()


def trained(work: Path) -> tuple[dict[str, Any], list[float]]:
    from safetensors.torch import load_file

    log = json.loads((work / "out" / "metrics.json").read_text(encoding="utf-8"))["log"]
    return load_file(work / "out" / "adapter_model.safetensors"), [entry["loss"] for entry in log]


def compared(work: Path, one) -> dict[str, Any]:
    """The largest differences from one GPU's adapter and losses; and of the norms in use from those built in full."""
    (adapter, losses), (other, found) = one, trained(work)
    row = {"steps": len(found), "loss": found[-1], "same_tensors": adapter.keys() == other.keys()}
    row["adapter_difference"] = max((adapter[key].float() - other[key].float()).abs().max().item() for key in adapter)
    row["loss_difference"] = max(abs(a - b) for a, b in zip(losses, found, strict=True))
    norms = read_json(work / "out" / "norms.json")
    return row | ({"norms_compared": norms["compared"], "norm_difference": norms["worst"]} if norms else {})


def rated(work: Path, processes: int) -> dict[str, Any]:
    """All processes' samples and tokens a second, each counting its own; the slowest step, the largest memory."""
    clocks = [json.loads((work / f"clock{rank}.json").read_text(encoding="utf-8")) for rank in range(processes)]
    row = {key: round(sum(clock[key] for clock in clocks), 2) for key in ("samples_s", "tokens_s", "slots_s")}
    return row | {key: max(clock[key] for clock in clocks) for key in ("steps", "step_s", "peak_gib")}


def tiny_rows(given, folder: Path, ways: Iterable[str], dora: bool, ones: dict) -> Iterator[tuple[str, dict[str, Any]]]:
    """A row for each way and kind of base, --parallel runs at a time. ones: what one GPU trained, filled by "one"."""
    plan = {}
    for way, bits in ((way, bits) for way in ways for bits in map(int, given.bits.split(","))):
        name, alone = f"{bits}-bit {'dora' if dora else 'lora'}, {way}", way in ("one", "again")
        work, processes = folder / name.replace(" ", "_"), 1 if alone else given.processes
        work.mkdir()
        config = tiny_recipe(given, work, processes, "ddp" if alone else way, bits, dora)
        plan[name] = way, (bits, dora), start(given, work, processes, config)
    with ThreadPoolExecutor(given.parallel) as pool:
        ends = pool.map(lambda entry: finish(given, entry[2]), plan.values())
        for (name, (way, kind, running)), failed in zip(plan.items(), ends, strict=True):
            if failed:
                yield name, {"failed": failed}
            elif way == "one":
                ones[kind] = trained(running.work)
            elif kind in ones:
                yield name, {"processes": len(running.children)} | compared(running.work, ones[kind])
            keep_logs(given, name, running.work)


def start_rates(given, folder: Path) -> dict[str, Run]:
    """The processes of RATES, so that they have imported everything when their turn comes."""
    plan = {}
    for name, (wanted, number, way, grows) in RATES.items():
        work, processes = folder / name.replace(" ", "_"), number or given.processes
        work.mkdir()
        plan[name] = start(given, work, processes, rate_recipe(given, work, processes, wanted, way, grows))
    return plan


def rate_rows(given, plan: dict[str, Run]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, running in plan.items():
        failed, processes = finish(given, running), len(running.children)
        about = {"recipe": RATES[name][0], "processes": processes}
        yield name, about | ({"failed": failed} if failed else rated(running.work, processes))
        keep_logs(given, name, running.work)


def keep_logs(given, name: str, work: Path) -> None:
    if given.logs:
        given.logs.mkdir(parents=True, exist_ok=True)
        for log in work.glob("log*"):
            shutil.copy(log, given.logs / f"{name.replace(' ', '_')}.{log.name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--base", help="a folder with the 8B shape (bench/random_base.py); without it no rates")
    parser.add_argument("--data", type=Path, help="folder of FinLoRA's files (test/fpb_test.jsonl ...), for the rates")
    parser.add_argument("--steps", type=int, default=16, help="steps of a rate's run, the first six not counted")
    parser.add_argument("--seconds", type=float, default=300, help="no run is started after so many")
    parser.add_argument("--timeout", type=float, default=120, help="seconds that one run may take")
    parser.add_argument("--parallel", type=int, default=2, help="tiny runs at a time")
    parser.add_argument("--bits", default="16,8,4", help="of the tiny runs")
    parser.add_argument("--ways", default=",".join(WAYS + OFFLOAD), help="to share the tiny runs")
    parser.add_argument("--cpu", type=int, default=0, help="so many CPU processes in place of the GPUs")
    parser.add_argument("--logs", type=Path, help="folder for axolotl's output")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "several_gpus.json")
    given = parser.parse_args()
    found = gpus()
    given.processes = given.cpu or len(found)
    if given.processes < 2:
        raise UserError(f"this compares one GPU with several, and {len(found)} are here; --cpu 2 tries it without")
    if bool(given.base) != bool(given.data):
        raise UserError("--base and --data go together")
    began = time.monotonic()
    given.end, given.tiny, given.started = began + given.seconds, tiny.build(tiny.sample_texts()), []
    record = {"what": f"python -m bench.several_gpus: {__doc__.splitlines()[0]}", "git": git_state()}
    device = f"{given.processes} x {'CPU' if given.cpu else found[0][0]}"
    record |= {"device": device, "versions": versions(), "learning_rate": RATE, "tiny": {}, "rates": {}}

    def note(kind: str, rows: Iterable[tuple[str, dict[str, Any]]]) -> None:
        for name, row in rows:
            record[kind][name] = row
            print(f"{time.monotonic() - began:5.0f} s  {name:36}", json.dumps(row), flush=True)
            with replacing(given.out) as file:
                json.dump(record, file, indent=1)
                file.write("\n")

    ways, ones = [way for way in given.ways.split(",") if way not in OFFLOAD], {}
    last = [way for way in given.ways.split(",") if way in OFFLOAD]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            rates = start_rates(given, Path(folder)) if given.base else {}
            note("tiny", tiny_rows(given, Path(folder), ["one", "again", *ways], True, ones))
            note("rates", rate_rows(given, rates))
            note("tiny", tiny_rows(given, Path(folder), ["one", *ways], False, ones))
            note("tiny", tiny_rows(given, Path(folder), last, True, ones))
        finally:
            stop(given.started)


if __name__ == "__main__":
    run(main)
