"""Do several processes train what one trains, and how much faster? Needs two GPUs or more, or --cpu 2 (gloo).

    python -m bench.distributed [--base <folder of the 8B shape> --data <folder of FinLoRA's files>] [--rows PATTERN ..]

First the tiny model: four Adam steps in one process, in one again (what the GPU itself varies by), and in all, for each
strategy and every kind of base; then the 8B shape's rate and memory, recipes as shipped, on one GPU and on all; offload
last, because DeepSpeed compiles its Adam. Every row is written to --out as it comes; those already there for the same
commit are not run again. A run that --seconds left no time for has `failed` instead of figures. --list names the rows.
"""

import argparse
import fnmatch
import itertools
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bench.rows import read_rows, write_rows
from bench.train_throughput import STEPS as RATE_STEPS
from bench.train_throughput import Run, finish, keep_logs, shipped_recipe, start, stop
from fastdora.plugin.keys import GRAPHS_UNDER_DDP
from finlora.core.errors import UserError, run
from finlora.core.files import read_json, write_json
from finlora.core.machine import gpus
from finlora.core.paths import ROOT
from finlora.core.provenance import git_state, versions
from finlora.train import distributed, tiny

LEARNING_RATE, STEPS, PACK = 0.001, 4, 128
STRATEGIES = (
    "again", "ddp", "ddp with graphs", "zero1", "zero2", "zero3", "fsdp2",
    "zero2_offload", "zero3_offload", "fsdp2_offload",
)  # fmt: skip
METHODS = {
    "dora": {"peft_use_dora": True},
    "lora": {"peft_use_dora": False},
    "peft": {"peft_use_dora": True, "fastdora_layers": "peft"},
}


class Tiny(NamedTuple):
    bits: int
    method: str
    strategy: str


class Rate(NamedTuple):
    """A recipe's rate. grows: whether every process takes the recipe's batch, or they share it."""

    kind: str
    recipe: str
    set: dict[str, Any]
    processes: int  # 0: all
    strategy: str = "ddp"
    grows: bool = True


TINY = {
    f"{bits}-bit {method}, {strategy}": Tiny(bits, method, strategy)
    for method, strategy, bits in itertools.product(METHODS, STRATEGIES, (16, 8, 4))
}
KINDS = {
    "8bit_dora": ("sentiment_r8_dora", {}),
    "bf16_dora": ("sentiment_bf16_r8_dora", {}),
    "4bit_dora": ("sentiment_4bit_r4_lora", {"peft_use_dora": True, "lora_r": 8}),
}


def all_rates() -> dict[str, Rate]:
    """By name: each kind on one GPU and on all by DDP; what may not fit one GPU shared out too."""
    rates = {}
    for kind, (recipe, changes) in KINDS.items():
        ways = {"1 GPU": (1,), "ddp, batch kept": (0, "ddp", False), "ddp, batch times GPUs": (0,)}
        if kind == "8bit_dora":
            plain = {"fastdora_graphs": False}
            rates |= {
                f"{kind} ddp without graphs, {name.partition(', ')[2]}": Rate(kind, recipe, changes | plain, *way)
                for name, way in ways.items()
                if name != "1 GPU"
            }
        else:
            ways |= {f"{strategy}, batch times GPUs": (0, strategy) for strategy in ("zero3", "fsdp2")}
        rates |= {f"{kind} {name}": Rate(kind, recipe, changes, *way) for name, way in ways.items()}
    return rates


RATES = all_rates()
AS_RUN = ("sequence_len", "gradient_accumulation_steps", "deepspeed", "fsdp_version", "fsdp_config")
Rows = Iterator[tuple[str, dict[str, Any]]]


def sharded(name: str, recipe: dict[str, Any], strategy: str, processes: int) -> dict[str, Any]:
    """The recipe with the keys that `make train` sets for this strategy."""
    stage, _, offload = strategy.partition("_")
    zero, fsdp = (int(stage[4:]), None) if stage.startswith("zero") else (None, 2 if stage == "fsdp2" else None)
    return distributed.shard(Path(name), recipe, zero, bool(offload), fsdp, processes)


def tiny_recipe(options, work: Path, processes: int, row: Tiny) -> dict[str, Any]:
    """The sentiment recipe on the tiny model; as many packs a step as there are processes, whoever trains them."""
    rows = [(f"Shares of company {i} moved.", "up" if i % 2 else "down") for i in range(24 * options.processes)]
    recipe = shipped_recipe(
        "sentiment_r8_dora",
        options.tiny,
        write_rows(rows, work / "train.jsonl"),
        work,
        **METHODS[row.method],
        load_in_8bit=row.bits == 8,
        load_in_4bit=row.bits == 4,
        adapter="qlora" if row.bits == 4 else "lora",
        lora_dropout=0.0,  # each process draws its own
        sequence_len=PACK,
        gradient_accumulation_steps=options.processes // processes,
        learning_rate=LEARNING_RATE,
        max_steps=STEPS,
        warmup_steps=0,
        logging_steps=1,
    )
    strategy, _, graphs = row.strategy.partition(" with ")
    recipe["fastdora_graphs"] = bool(graphs)
    # What NormCheck reads in every forward pass, a recording of one could not wait for.
    recipe["plugins"] += ["bench.plugins.Replays" if graphs else "bench.plugins.NormCheck"]
    recipe["plugins"] += ["bench.plugins.CpuProcesses"] * bool(options.cpu)
    return sharded("tiny", recipe, strategy if processes > 1 else "ddp", processes)


def rate_recipe(options, work: Path, processes: int, row: Rate) -> dict[str, Any]:
    rows = write_rows(read_rows("sentiment", options.data), work / "train.jsonl")
    recipe = shipped_recipe(row.recipe, options.base, rows, work, max_steps=options.steps, **row.set)
    recipe["plugins"] += ["bench.plugins.Clock"] + ["bench.plugins.CpuProcesses"] * bool(options.cpu)
    if not row.grows:
        recipe = distributed.share_batch(Path(row.recipe), recipe, processes, 1)[0]
    return sharded(row.recipe, recipe, row.strategy, processes)


def start_one(options, folder: Path, name: str, processes: int, recipe_for: Callable[..., dict], *args) -> Run:
    """Start the run whose recipe is recipe_for(options, its folder, processes, *args)."""
    work = folder / name.replace(" ", "_").replace(",", "")
    work.mkdir()
    env = {"CUDA_VISIBLE_DEVICES": "0"} if processes == 1 else {GRAPHS_UNDER_DDP: "1"}
    return start(recipe_for(options, work, processes, *args), work, processes, OMP_NUM_THREADS="1", **env)


def in_turn(
    options, starts: dict[str, Callable[[], Run]], parallel: int
) -> Iterator[tuple[str, Run | None, str | None]]:
    """(name, run, how it failed) of each, `parallel` training at a time while as many others import what they need."""
    turn = threading.Semaphore(parallel)

    def one(entry: tuple[str, Callable[[], Run]]) -> tuple[str, Run | None, str | None]:
        name, begin = entry
        if time.monotonic() > options.end:
            return name, None, "no time was left for it"
        running = begin()
        with turn:
            failed = finish(running, options.timeout)
        keep_logs(running, name, options.logs)
        return name, running, failed

    with ThreadPoolExecutor(2 * parallel) as pool:
        yield from pool.map(one, starts.items())


def tiny_rows(options, folder: Path, asked: list[str], ones: dict[tuple[int, str], Any]) -> Rows:
    """The asked rows of TINY. ones: what one process trained, by bits and method; those that lack are trained first."""
    rows = {}
    for name in asked:
        bits, method, _ = TINY[name]
        if (bits, method) not in ones:
            rows.setdefault(f"{bits}-bit {method}, one", Tiny(bits, method, "one"))
    rows |= {name: TINY[name] for name in asked}
    starts = {}
    for name, row in rows.items():
        processes = 1 if row.strategy in ("one", "again") else options.processes
        starts[name] = partial(start_one, options, folder, name, processes, tiny_recipe, row)
    for name, running, failed in in_turn(options, starts, options.parallel):
        bits, method, strategy = rows[name]
        if failed:
            yield name, {"failed": failed}
        elif strategy == "one":
            ones[bits, method] = trained(running.work)
        elif (bits, method) in ones:
            yield name, {"processes": len(running.children)} | compared(running.work, ones[bits, method])


def trained(work: Path) -> tuple[dict[str, Any], list[float]]:
    """The adapter and the loss at each step."""
    from safetensors.torch import load_file

    log = json.loads((work / "out" / "metrics.json").read_text(encoding="utf-8"))["log"]
    return load_file(work / "out" / "adapter_model.safetensors"), [entry["loss"] for entry in log]


def compared(work: Path, one: tuple[dict[str, Any], list[float]]) -> dict[str, Any]:
    """The largest differences from one process's adapter and losses, and of norms in use from those built in full."""
    (adapter, losses), (other, other_losses) = one, trained(work)
    row = {"steps": len(losses), "loss": other_losses[-1], "same_tensors": adapter.keys() == other.keys()}
    row["adapter_difference"] = max((adapter[key].float() - other[key].float()).abs().max().item() for key in adapter)
    row["loss_difference"] = max(abs(a - b) for a, b in zip(losses, other_losses, strict=True))
    if norms := [json.loads(path.read_text(encoding="utf-8")) for path in (work / "out").glob("norms-*.json")]:
        row["norms_compared"] = sum(each["compared"] for each in norms)
        row["norm_difference"] = max(each["worst"] for each in norms)
    if replays := [read_json(path) for path in sorted((work / "out").glob("replays-*.json"))]:
        row["replays"] = replays
    return row


def rate_rows(options, runs: dict[str, Run], before: dict[str, dict[str, Any]]) -> Rows:
    """All processes' samples and tokens a second, each counting its own; the slowest step, the largest memory.

    before: rows that are there already. times: the samples a second of one GPU.
    """
    rates = dict(before)
    for name, running in runs.items():
        late = time.monotonic() > options.end
        failed = "no time was left for it" if late else finish(running, options.timeout)
        keep_logs(running, name, options.logs)
        entry, processes = RATES[name], len(running.children)
        recipe = yaml.safe_load((running.work / "recipe.yaml").read_text(encoding="utf-8"))
        row = {"recipe": entry.recipe, "processes": processes, "strategy": entry.strategy}
        row["set"] = entry.set | {key: recipe[key] for key in AS_RUN if key in recipe}
        if not failed:
            clocks = [read_json(running.work / f"clock{rank}") for rank in range(processes)]
            row |= {key: round(sum(clock[key] for clock in clocks), 2) for key in ("samples_s", "tokens_s", "slots_s")}
            row |= {key: max(clock[key] for clock in clocks) for key in ("steps", "step_s", "peak_gib")}
            if one := rates.get(f"{entry.kind} 1 GPU", {}).get("samples_s"):
                row["times"] = round(row["samples_s"] / one, 3)
        rates[name] = row | ({"failed": failed} if failed else {})
        yield name, rates[name]


def for_plan(record: dict[str, Any]) -> dict[str, Any]:
    """Rates on several GPUs as finlora/plan/train_throughput*.json have a run: what one of the GPUs did."""
    rows = {}
    for name, row in record["rates"].items():
        if "step_s" in row and (count := row["processes"]) > 1:
            own = {key: round(row[key] / count, 2) for key in ("samples_s", "tokens_s", "slots_s")}
            rows[name] = {"rows": "sentiment"} | row | own
    device = record["device"].partition(" x ")[2]
    return {key: record[key] for key in ("what", "git", "versions")} | {"device": device, "rows": rows}


def asked_rows(patterns: list[str]) -> list[str]:
    """The names of rows that match, in the order in which they run; without patterns all but those of PEFT's layers."""
    order = [*(name for name in TINY if not TINY[name].strategy.endswith("offload")), *RATES]
    order += [name for name in TINY if name not in order]
    if not patterns:
        return [name for name in order if "-bit peft" not in name]
    for pattern in patterns:
        if not fnmatch.filter(order, pattern):
            raise UserError(f"--rows {pattern!r}: no row is called so; --list names them, and * stands for any letters")
    return [name for name in order if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--base", help="a folder with the 8B shape (bench/random_base.py); without it no rates")
    parser.add_argument("--data", type=Path, help="folder of FinLoRA's files (test/fpb_test.jsonl ...), with --base")
    parser.add_argument("--rows", nargs="+", default=[], metavar="PATTERN", help="'8bit_dora*' '*, ddp with graphs'")
    parser.add_argument("--list", action="store_true", help="the names of the rows")
    parser.add_argument("--steps", type=int, default=RATE_STEPS, help="of a rate's run, the first six not counted")
    parser.add_argument("--seconds", type=float, default=300, help="no run is started after so many")
    parser.add_argument("--timeout", type=float, default=120, help="seconds that one run may take")
    parser.add_argument("--parallel", type=int, default=2, help="tiny runs at a time")
    parser.add_argument("--cpu", type=int, default=0, help="so many CPU processes in place of the GPUs")
    parser.add_argument("--logs", type=Path, help="folder for axolotl's output")
    parser.add_argument(
        "--plan", type=Path, help="file of finlora/plan, train_throughput_*.json, to write the rates to"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "distributed.json")
    options = parser.parse_args()
    asked = asked_rows(options.rows)
    if options.list:
        print("\n".join(asked))
        return
    devices = gpus()
    options.processes = options.cpu or len(devices)
    if options.processes < 2:
        raise UserError(f"this compares one GPU with several, and {len(devices)} are here; --cpu 2 tries it without")
    if bool(options.base) != bool(options.data):
        raise UserError("--base and --data go together")
    options.tiny, began = tiny.build(tiny.sample_texts()), time.monotonic()
    options.end = began + options.seconds
    about = {"what": f"python -m bench.distributed: {__doc__.splitlines()[0]}", "git": git_state()}
    device = f"{options.processes} x {'CPU' if options.cpu else devices[0][0]}"
    about |= {"device": device, "versions": versions(), "learning_rate": LEARNING_RATE}
    before = read_json(options.out)
    same = before is not None and all(before[key] == about[key] for key in ("git", "device", "versions"))
    record = about | {kind: before[kind] if same else {} for kind in ("tiny", "rates")}
    done = {name for kind in ("tiny", "rates") for name, row in record[kind].items() if "failed" not in row}
    left = [name for name in asked if name not in done and (name in TINY or options.base)]

    def note(kind: str, rows: Rows) -> None:
        for name, row in rows:
            record[kind][name] = row
            print(f"{time.monotonic() - began:5.0f} s  {name:36}", json.dumps(row), flush=True)
            write_json(options.out, record)
            if options.plan:
                write_json(options.plan, for_plan(record))

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder, waiting, ones = Path(temporary), {}, {}
        try:
            # Started now, so that their imports do not compete with a run that is timed.
            for name in (name for name in left if name in RATES):
                number = RATES[name].processes or options.processes
                waiting[name] = start_one(options, folder, name, number, rate_recipe, RATES[name])
            small = [name for name in left if name in TINY]
            offload = [name for name in small if TINY[name].strategy.endswith("offload")]
            note("tiny", tiny_rows(options, folder, [name for name in small if name not in offload], ones))
            note("rates", rate_rows(options, waiting, record["rates"]))
            note("tiny", tiny_rows(options, folder, offload, ones))
        finally:
            for running in waiting.values():
                stop(running)


if __name__ == "__main__":
    run(main)
