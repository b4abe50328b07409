"""Do several processes train what one trains, and how much faster? Needs two GPUs or more, or --cpu 2 (gloo).

    python -m bench.distributed [--base <folder of the 8B shape> --data <folder of FinLoRA's files>]

First the tiny model: four Adam steps of DoRA in one process, in one again (what the GPU itself varies by), and in all,
for each strategy and every kind of base; then the throughput of the 8B shape; then the other methods; offload last,
because DeepSpeed compiles its Adam. Rows are written to --out as they come; a run that --seconds left no time for has
`failed` instead of figures.
"""

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from bench.rows import read_rows, write_rows
from bench.train_throughput import Run, finish, keep_logs, shipped_recipe, start, stop
from finlora.core.errors import UserError, run
from finlora.core.files import read_json, write_json
from finlora.core.machine import gpus
from finlora.core.paths import ROOT
from finlora.core.provenance import git_state, versions
from finlora.train import distributed, tiny

LEARNING_RATE, STEPS, PACK = 0.001, 4, 128
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2", "zero2_offload", "zero3_offload", "fsdp2_offload")
METHODS = {
    "dora": {"peft_use_dora": True},
    "lora": {"peft_use_dora": False},
    "peft": {"peft_use_dora": True, "fastdora_layers": "peft"},
}
# name: (recipe, processes or 0 for all, strategy, whether the global batch grows with the processes)
THROUGHPUT = {
    "8bit_dora 1 GPU": ("sentiment_r8_dora", 1, "ddp", False),
    "8bit_dora ddp, batch times GPUs": ("sentiment_r8_dora", 0, "ddp", True),
    "8bit_dora ddp, batch kept": ("sentiment_r8_dora", 0, "ddp", False),
    "bf16_dora 1 GPU": ("sentiment_bf16_r8_dora", 1, "ddp", False),
    "bf16_dora fsdp2, batch times GPUs": ("sentiment_bf16_r8_dora", 0, "fsdp2", True),
    "bf16_dora zero3, batch times GPUs": ("sentiment_bf16_r8_dora", 0, "zero3", True),
}
Rows = Iterator[tuple[str, dict[str, Any]]]


def sharded(name: str, recipe: dict[str, Any], strategy: str, processes: int) -> dict[str, Any]:
    """The recipe with the keys that `make train` sets for this strategy."""
    stage, _, offload = strategy.partition("_")
    zero, fsdp = (int(stage[4:]), None) if stage.startswith("zero") else (None, 2 if stage == "fsdp2" else None)
    return distributed.shard(Path(name), recipe, zero, bool(offload), fsdp, processes)


def tiny_recipe(options, work: Path, processes: int, strategy: str, bits: int, method: str) -> dict[str, Any]:
    """The sentiment recipe on the tiny model; as many packs a step as there are processes, whoever trains them."""
    rows = [(f"Shares of company {i} moved.", "up" if i % 2 else "down") for i in range(24 * options.processes)]
    recipe = shipped_recipe(
        "sentiment_r8_dora",
        options.tiny,
        write_rows(rows, work / "train.jsonl"),
        work,
        **METHODS[method],
        load_in_8bit=bits == 8,
        load_in_4bit=bits == 4,
        adapter="qlora" if bits == 4 else "lora",
        lora_dropout=0.0,  # each process draws its own
        sequence_len=PACK,
        gradient_accumulation_steps=options.processes // processes,
        learning_rate=LEARNING_RATE,
        max_steps=STEPS,
        warmup_steps=0,
        logging_steps=1,
        fastdora_graphs=False,  # NormCheck reads every forward
    )
    recipe["plugins"] += ["bench.plugins.NormCheck"] + ["bench.plugins.CpuProcesses"] * bool(options.cpu)
    return sharded("tiny", recipe, strategy, processes)


def throughput_recipe(options, work: Path, processes: int, name: str, strategy: str, grows: bool) -> dict[str, Any]:
    rows = write_rows(read_rows("sentiment", options.data), work / "train.jsonl")
    recipe = shipped_recipe(name, options.base, rows, work, max_steps=options.steps)
    recipe["plugins"] += ["bench.plugins.Clock"]
    if not grows:
        recipe = distributed.share_batch(Path(name), recipe, processes, 1)[0]
    return sharded(name, recipe, strategy, processes)


def start_one(options, folder: Path, name: str, processes: int, recipe_for: Callable[..., dict], *args) -> Run:
    """Start the run whose recipe is recipe_for(options, its folder, processes, *args)."""
    work = folder / name.replace(" ", "_")
    work.mkdir()
    env = {"CUDA_VISIBLE_DEVICES": "0"} if processes == 1 else {}
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


def tiny_rows(options, folder: Path, method: str, strategies: Iterable[str], ones: dict) -> Rows:
    """A row for each strategy and kind of base. ones: what one process trained, filled by the strategy "one"."""
    starts, kinds = {}, {}
    for strategy, bits in ((strategy, bits) for strategy in strategies for bits in options.bits):
        name, processes = f"{bits}-bit {method}, {strategy}", 1 if strategy in ("one", "again") else options.processes
        kinds[name] = strategy, (bits, method)
        args = strategy if processes > 1 else "ddp", bits, method
        starts[name] = partial(start_one, options, folder, name, processes, tiny_recipe, *args)
    for name, running, failed in in_turn(options, starts, options.parallel):
        strategy, kind = kinds[name]
        if failed:
            yield name, {"failed": failed}
        elif strategy == "one":
            ones[kind] = trained(running.work)
        elif kind in ones:
            yield name, {"processes": len(running.children)} | compared(running.work, ones[kind])


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
    return row


def throughput_rows(options, runs: dict[str, Run]) -> Rows:
    """All processes' samples and tokens a second, each counting its own; the slowest step, the largest memory."""
    for name, running, failed in in_turn(options, {name: partial(lambda it: it, it) for name, it in runs.items()}, 1):
        row = {"recipe": THROUGHPUT[name][0], "processes": len(runs[name].children)}
        if not failed:
            clocks = [read_json(running.work / f"clock{rank}") for rank in range(row["processes"])]
            row |= {key: round(sum(clock[key] for clock in clocks), 2) for key in ("samples_s", "tokens_s", "slots_s")}
            row |= {key: max(clock[key] for clock in clocks) for key in ("steps", "step_s", "peak_gib")}
        yield name, row | ({"failed": failed} if failed else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--base", help="a folder with the 8B shape (bench/random_base.py); without it no throughput")
    parser.add_argument("--data", type=Path, help="folder of FinLoRA's files (test/fpb_test.jsonl ...), with --base")
    parser.add_argument("--steps", type=int, default=16, help="of a throughput run, the first six not counted")
    parser.add_argument("--seconds", type=float, default=300, help="no run is started after so many")
    parser.add_argument("--timeout", type=float, default=120, help="seconds that one run may take")
    parser.add_argument("--parallel", type=int, default=2, help="tiny runs at a time")
    parser.add_argument("--bits", type=int, nargs="+", choices=(16, 8, 4), default=[16, 8, 4])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["dora", "lora"], help="peft: PEFT's DoRA")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    parser.add_argument("--cpu", type=int, default=0, help="so many CPU processes in place of the GPUs")
    parser.add_argument("--logs", type=Path, help="folder for axolotl's output")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "distributed.json")
    options = parser.parse_args()
    devices = gpus()
    options.processes = options.cpu or len(devices)
    if options.processes < 2:
        raise UserError(f"this compares one GPU with several, and {len(devices)} are here; --cpu 2 tries it without")
    if bool(options.base) != bool(options.data):
        raise UserError("--base and --data go together")
    options.tiny, began = tiny.build(tiny.sample_texts()), time.monotonic()
    options.end = began + options.seconds
    record = {"what": f"python -m bench.distributed: {__doc__.splitlines()[0]}", "git": git_state()}
    device = f"{options.processes} x {'CPU' if options.cpu else devices[0][0]}"
    record |= {"device": device, "versions": versions(), "learning_rate": LEARNING_RATE, "tiny": {}, "rates": {}}

    def note(kind: str, rows: Rows) -> None:
        for name, row in rows:
            record[kind][name] = row
            print(f"{time.monotonic() - began:5.0f} s  {name:36}", json.dumps(row), flush=True)
            write_json(options.out, record)

    offload = [strategy for strategy in options.strategies if strategy.endswith("offload")]
    first, ones = ["one", "again", *(strategy for strategy in options.strategies if strategy not in offload)], {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder, waiting = Path(temporary), {}
        try:
            # Started now, so that their imports do not compete with a run that is timed.
            for name, (recipe, number, strategy, grows) in THROUGHPUT.items() if options.base else ():
                args = number or options.processes, throughput_recipe, recipe, strategy, grows
                waiting[name] = start_one(options, folder, name, *args)
            note("tiny", tiny_rows(options, folder, options.methods[0], first, ones))
            note("rates", throughput_rows(options, waiting))
            for method in options.methods[1:]:
                note("tiny", tiny_rows(options, folder, method, first, ones))
            for method in options.methods:
                note("tiny", tiny_rows(options, folder, method, offload, ones))
        finally:
            for running in waiting.values():
                stop(running)


if __name__ == "__main__":
    run(main)
