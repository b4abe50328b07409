"""These recipes beside axolotl's own best settings, TRL with PEFT, Unsloth and FinLoRA's settings, on one card.

    python -m bench.peers --base <folder of the 8B shape> --data <folder of FinLoRA's files> [--runs TRL "ours bf16"]

All train r 8, alpha 16 on q, k and v, on the same real rows, without gradient checkpointing (but FinLoRA), each as its
documents and source say is fastest. One trains at a time, while the next imports what it needs; each row is written to
--out as it comes, with its error where a run fails. --sites names a folder whose folder `unsloth` has the packages that
Unsloth needs, and `axolotl` axolotl's fork of cut-cross-entropy; what is not there is imported from where Python finds
it. Runs already there for the same commit, card and packages are not run again.
"""

import argparse
import importlib.metadata
import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from bench.distributed import in_turn
from bench.rows import read_rows, write_rows
from bench.train_throughput import RUNS as THROUGHPUT
from bench.train_throughput import SKIP, STEPS, Run, start, start_run, tiny_base
from finlora.core.errors import UserError, run
from finlora.core.files import read_json, write_json
from finlora.core.machine import gpus
from finlora.core.paths import ROOT, shown
from finlora.core.provenance import git_state, versions

OUT = ROOT / "outputs" / "peers.json"
LORA = {16: "sentiment_bf16_r8_lora", 8: "sentiment_r8_lora", 4: "sentiment_4bit_r4_lora"}
BITS = {16: "bf16", 8: "8-bit", 4: "4-bit"}
METHODS = {True: "DoRA", False: "LoRA"}
PACK, LARGE = 4608, 9216  # tokens: 72 rows, about as many as a shared pack of 2,560 trains, and twice as many
# Padded runs, by method. Rows of a batch: with what PEFT's DoRA keeps, 72 of the longest (164 tokens) do not fit 80 GB,
# by an estimate. Transformers sorts by length within a quarter of the rows: of 20 batches, 5. As many steps are
# counted, or twice as many, so that a run's rows are as long as another's.
PADDED, PADDED_STEPS = {True: 48, False: 72}, {True: SKIP + 5, False: SKIP + 10}
ROWS = {"sentiment": None} | {f"sentiment_{20 * batch}": 20 * batch for batch in PADDED.values()}  # how many of them
SLOW = SKIP + 8  # steps of a run that spends seconds on each
OURS = ("layers", "fp8", "answers_only", "graphs", "shared_prefixes", "rows_per_prefix")
LIGER = "axolotl.integrations.liger.LigerPlugin"
CCE = "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"
PACKAGES = ("trl", "liger-kernel", "unsloth", "unsloth-zoo", "cut-cross-entropy")


def recipe(bits: int, dora: bool, **keys: Any) -> dict[str, Any]:
    """An entry as bench/train_throughput.yaml has them."""
    return {"recipe": LORA[bits], "rows": "sentiment", "set": {"lora_r": 8, "peft_use_dora": dora} | keys}


def axolotl(bits: int, dora: bool, kernels: bool, cce: bool, tokens: int = PACK, short: bool = False) -> dict[str, Any]:
    """axolotl's own: LoRA kernels (it refuses them at 8 bits), varlen attention in packs, Liger, cut cross entropy.

    cce: the loss at label positions alone, by axolotl's fork of cut-cross-entropy; else Liger's fused one. short:
    padded batches of rows in place of packs.
    Its kernels cache DoRA's norm by version counters that fused AdamW never moves, so that the norm would stay as at
    the first step; AdamW in separate operations moves them.
    """
    keys = {"plugins": [LIGER, CCE] if cce else [LIGER], "lora_qkv_kernel": kernels, "lora_dropout": 0.0}
    keys |= {"cut_cross_entropy" if cce else "liger_fused_linear_cross_entropy": True}
    keys |= {"optimizer": "adamw_torch" if dora else "adamw_torch_fused", "sequence_len": tokens}
    steps = SLOW if dora and not kernels else STEPS
    if short:
        keys |= {"sample_packing": False, "eval_sample_packing": False, "group_by_length": True}
        keys, steps = keys | {"micro_batch_size": PADDED[dora]}, PADDED_STEPS[dora]
    entry = recipe(bits, dora, **keys, drop=[f"fastdora_{key}" for key in OURS])
    return entry | {"steps": steps} | ({"rows": f"sentiment_{20 * PADDED[dora]}"} if short else {})


def padded(tool: str, bits: int, dora: bool) -> dict[str, Any]:
    """What bench/sft.py takes."""
    entry = {"tool": tool, "bits": bits, "dora": dora, "batch": PADDED[dora], "steps": PADDED_STEPS[dora]}
    return entry | {"rows": f"sentiment_{20 * PADDED[dora]}"}


def unsloth(bits: int, dora: bool, tokens: int = PACK) -> dict[str, Any]:
    entry = {"tool": "unsloth", "bits": bits, "dora": dora, "tokens": tokens, "rows": "sentiment"}
    return entry | {"steps": SLOW if dora or bits == 8 else STEPS}


def all_runs(cce: bool) -> dict[str, dict[str, Any]]:
    """The runs by name, the most telling first, in case the time is short."""
    whole = {"fastdora_shared_prefixes": False, "sequence_len": PACK}
    pairs = [(bits, dora, f"{name} {METHODS[dora]}") for bits, name in BITS.items() for dora in METHODS]
    runs = {"FinLoRA": yaml.safe_load(THROUGHPUT.read_text(encoding="utf-8"))["finlora"]}
    runs |= {f"ours {name}": recipe(bits, dora) for bits, dora, name in pairs}
    runs |= {f"axolotl {name}": axolotl(bits, dora, bits != 8, cce) for bits, dora, name in pairs}
    runs |= {f"Unsloth {name}": unsloth(bits, dora) for bits, dora, name in pairs if bits != 8}
    runs |= {f"TRL {name}": padded("trl", bits, dora) for bits, dora, name in pairs}
    runs |= {f"ours {name} whole": recipe(bits, dora, **whole) for bits, dora, name in pairs}
    for dora, method in METHODS.items():
        runs[f"axolotl bf16 {method} large"] = axolotl(16, dora, True, cce, tokens=LARGE)
    runs["Unsloth bf16 LoRA large"] = unsloth(16, False, tokens=LARGE)
    # PEFT's DoRA returns float32, which varlen attention does not take: in packs it may be slower than padded.
    runs |= {f"axolotl {BITS[bits]} DoRA padded": axolotl(bits, True, False, cce, short=True) for bits in (8, 4)}
    runs |= {f"Unsloth {BITS[bits]} DoRA padded": padded("unsloth", bits, True) for bits in (16, 4)}
    runs |= {f"Unsloth {name}": unsloth(bits, dora) for bits, dora, name in pairs if bits == 8}
    return runs


def site(options: argparse.Namespace, name: str) -> Path | None:
    """The folder of packages for a tool alone."""
    folder = options.sites and options.sites / name
    return folder if folder and folder.is_dir() else None


def begin(name: str, entry: dict[str, Any], folder: Path, options: argparse.Namespace) -> Run:
    tool = entry.get("tool", name.split()[0])
    paths = [str(path) for path in (site(options, tool), ROOT) if path] + os.environ.get("PYTHONPATH", "").split(":")
    # Nothing is fetched, reported, or kept for another run.
    env = {"PYTHONPATH": ":".join(paths), "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "datasets")}
    if "tool" not in entry:
        if options.tiny and LIGER in entry["set"].get("plugins", []):  # no kernel of its runs on a CPU
            keys = ("rope", "rms_norm", "glu_activation", "fused_linear_cross_entropy")
            small = dict.fromkeys(f"liger_{key}" for key in keys) | {"plugins": [], "cut_cross_entropy": None}
            entry = entry | {"set": entry["set"] | small | {"sequence_len": 256}}
        return start_run(name, entry, folder, options, **env)
    work = folder / name.replace(" ", "_")
    work.mkdir()
    rows = str(folder / entry["rows"] / "train.jsonl")
    settings = entry | {"base": options.base, "rows": rows, "output_dir": str(work / "out")}
    small = {"batch": 2} if "batch" in entry else {"tokens": 256}
    settings |= {"steps": options.steps or entry["steps"]} | (small if options.tiny else {})
    # Unsloth compiles in one thread where the driver's variable names a GPU, unless this is 0.
    env |= {"UNSLOTH_DISABLE_STATISTICS": "1", "UNSLOTH_FORCE_SINGLE_COMPILE_WORKER": "0"}
    env |= {"UNSLOTH_COMPILE_LOCATION": str(work / "compiled")}
    return start(settings, work, command=[sys.executable, "-m", "bench.sft"], **env)


def used(options: argparse.Namespace) -> dict[str, str]:
    """Versions, those of the tools' own folders included."""
    found = versions()
    paths = [str(path) for name in ("unsloth", "axolotl") if (path := site(options, name))]
    for each in importlib.metadata.distributions(path=paths + sys.path):
        name = each.name.lower().replace("_", "-")
        if name in PACKAGES:
            found.setdefault(name, each.version)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--base", help="a folder with the model and a tokenizer; with --tiny one is made")
    parser.add_argument("--data", type=Path, required=True, help="folder of FinLoRA's files (test/fpb_test.jsonl ...)")
    parser.add_argument("--runs", nargs="+", default=[""], metavar="NAME", help="names or beginnings of names")
    parser.add_argument("--list", action="store_true", help="the runs' names")
    parser.add_argument("--sites", type=Path, help="folder of packages for one tool alone: unsloth/, axolotl/")
    parser.add_argument("--steps", type=int, help=f"of a run, the first {SKIP} not counted")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the benchmark on a CPU")
    parser.add_argument("--timeout", type=float, default=150, help="seconds that one run may take")
    parser.add_argument("--seconds", type=float, default=560, help="no run is started after so many")
    parser.add_argument("--logs", type=Path, help="folder for the runs' output")
    parser.add_argument("--out", type=Path, default=OUT, help=shown(OUT))
    options = parser.parse_args()
    options.rows = options.profile = None  # start_run's
    options.end = time.monotonic() + options.seconds
    every, runs = all_runs(site(options, "axolotl") is not None), {}
    for word in options.runs:
        found = {word: every[word]} if word in every else {name: every[name] for name in every if name.startswith(word)}
        if not found:
            raise UserError(f"--runs {word!r}: no run begins so; --list names them")
        runs |= found
    if options.list:
        print("\n".join(runs))
        return
    if not options.base and not options.tiny:
        raise UserError("--base: name a folder with the model (python -m bench.random_base), or take --tiny")
    about = {"what": f"python -m bench.peers: {__doc__.splitlines()[0]}", "git": git_state()}
    about |= {"device": gpus()[0][0] if gpus() else "CPU", "versions": used(options)}
    before = read_json(options.out)
    rows = before["rows"] if before and all(before[key] == about[key] for key in ("git", "device", "versions")) else {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        options.base = options.base or tiny_base(folder)
        real = read_rows("sentiment", options.data)
        for kind, number in ROWS.items():
            write_rows(real[:number], folder / kind / "train.jsonl")
        left = [name for name in runs if "samples_s" not in rows.get(name, {})]
        starts = {name: partial(begin, name, runs[name], folder, options) for name in left}
        for name, running, failed in in_turn(options, starts, 1):
            row = {"failed": failed} if failed else read_json(running.work / "clock0")
            if not failed:
                row["tokens_row"] = round(row["tokens_s"] / row["samples_s"], 1)
            rows[name] = runs[name] | row
            print(json.dumps({"run": name} | row), flush=True)
            write_json(options.out, about | {"rows": rows})


if __name__ == "__main__":
    run(main)
