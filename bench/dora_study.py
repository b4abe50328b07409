"""DoRA, LoRA, rsLoRA and full fine-tuning compared under equal conditions; docs/dora.md is made of it.

    python -m bench.dora_study --corpus KIT --data FOLDER --texts FOLDER     # text and split (bench/dora_corpus.py)
    python -m bench.dora_study --kit KIT --out OUT --seconds 330             # base model and runs, on all GPUs
    python -m bench.dora_page OUT/rows.jsonl                                 # the record, docs/dora.md and plots
    python -m bench.dora_page                                                # the page again, from the recorded file

--toy takes the small sizes of bench/dora_study.yaml. The second command continues where it ended: runs whose rows are
in OUT/rows.jsonl are not run again, nor is a base model that is whole; --seconds counts from its start, and no run
begins that could not end by then.

OUT/rows.jsonl has a line for each run: settings (all that a run depends on beside base and kit; two questions that ask
for the same settings share the run), parameters, steps, loss (mean of the first and last ten steps), validation and
test scores (bench/dora_runs.py: fine_tune), seconds, device. A run that failed has settings and `failed` instead.

bench/dora_study.json, the recorded result:

    about       what ran: base model, sources, split, versions, devices, settings that all runs share, and of the test
                rows `sets` (f FPB, q FiQA, t TFNS) and `targets` (n negative, u neutral, p positive), a letter a row
    runs        the rows, sorted by settings
    questions   name -> list of {label, changes, method, prompt (of the test), rate, seeds, scores (strict accuracy by
                seed), mean, low, high (95% interval over seeds and test rows), finlora (mean by FinLoRA's scorer),
                validation (mean accuracy), best_rate (whether the rate is the method's best of the grid), parameters,
                seconds (median, to train)}
    comparisons name -> list of {a, b (labels), seeds, difference (b - a), low, high, p, p_holm, distinguishable}
"""

import argparse
import itertools
import json
import math
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import yaml

from finlora.core.errors import UserError, run
from finlora.core.paths import ROOT

STUDY = ROOT / "bench" / "dora_study.yaml"
RECORD = ROOT / "bench" / "dora_study.json"
PAGE = ROOT / "docs" / "dora.md"


def read_study(toy: bool = False) -> dict[str, Any]:
    study = yaml.safe_load(STUDY.read_text(encoding="utf-8"))
    small = study.pop("toy")
    if toy:
        study |= small | {"corpus": study["corpus"] | small.get("corpus", {})}
    return study


def variants(study: dict[str, Any], question: str) -> list[dict[str, Any]]:
    """What each setting of a question changes from the defaults, without seeds."""
    asked = {key: value for key, value in study["questions"][question].items() if key != "seeds"}
    lists = [value if isinstance(value, list) else [value] for value in asked.values()]
    return [dict(zip(asked, values, strict=True)) for values in itertools.product(*lists)]


def planned(study: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings of every run in the order they run, each once. rate is "best" where the grid decides it."""
    plan: dict[str, dict[str, Any]] = {}
    for question, asked in study["questions"].items():
        for seed in range(1, asked["seeds"] + 1):
            for change in variants(study, question):
                settings = study["defaults"] | change | {"seed": seed}
                plan.setdefault(identity(settings), settings)
    return list(plan.values())


def planned_count(study: dict[str, Any], rows: dict[str, dict[str, Any]]) -> int:
    """How many runs are planned; a best rate makes some of them one, once the grid has found it."""
    return len({identity(resolved(study, settings, rows) or settings) for settings in planned(study)})


def identity(settings: dict[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def best_rate(study: dict[str, Any], method: str, rows: dict[str, dict[str, Any]]) -> float | None:
    """The method's rate by the grid's validation rows; None until all of the grid's runs have ended.

    Of the rates whose mean accuracy over the seeds is within one standard error (of a share of the validation rows) of
    the best, the one with the lowest mean loss: a few rows' answers decide between near rates, their loss says more.
    Rates of which a run failed or diverged do not count.
    """
    tried = []
    for change in variants(study, "grid"):
        if change["method"] != method:
            continue
        runs = [
            rows.get(identity(study["defaults"] | change | {"seed": seed + 1})) for seed in range(grid_seeds(study))
        ]
        if any(row is None for row in runs):
            return None
        scores = [row["validation"] for row in runs if "validation" in row]
        if len(scores) == len(runs) and all(score["loss"] is not None for score in scores):
            means = [sum(score[key] for score in scores) / len(scores) for key in ("accuracy", "loss")]
            tried.append((*means, change["rate"]))
    if not tried:
        return None
    most = max(accuracy for accuracy, _, _ in tried)
    error = math.sqrt(most * (1 - most) / study["split"]["validation"])
    return min((loss, rate) for accuracy, loss, rate in tried if accuracy >= most - error)[1]


def grid_seeds(study: dict[str, Any]) -> int:
    return study["questions"]["grid"]["seeds"]


def resolved(study: dict[str, Any], settings: dict[str, Any], rows: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Settings with the rate as a number; None while the grid has not decided it."""
    if settings["rate"] != "best":
        return settings
    rate = best_rate(study, settings["method"], rows)
    return settings | {"rate": rate} if rate is not None else None


def read_rows(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Rows by identity; a row that succeeded wins over one that failed. A line cut short is left out."""
    rows: dict[str, dict[str, Any]] = {}
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            key = identity(row["settings"])
            if key not in rows or "failed" in rows[key]:
                rows[key] = row
    return rows


def conduct(study: dict[str, Any], kit: Path, out: Path, seconds: float, workers: int, gpus: int) -> None:
    """Run what is planned and not yet in out/rows.jsonl, until it is done or `seconds` have passed.

    `workers` processes a GPU, or on the CPU where there is no GPU.
    """
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    file = out / "rows.jsonl"
    rows = {key: row for key, row in read_rows([file]).items() if "failed" not in row}
    # Spawned, not forked: a child that was forked after CUDA was looked at cannot use it.
    context = multiprocessing.get_context("spawn")
    devices = [i for _ in range(workers) for i in range(gpus)] if gpus else [None] * workers
    free: dict[Connection, multiprocessing.Process] = {}
    for device in devices:
        ours, theirs = context.Pipe()
        child = context.Process(target=work, args=(theirs, study, kit, out, device), daemon=True)
        child.start()
        theirs.close()
        free[ours] = child
    everyone = dict(free)
    busy: dict[Connection, dict[str, Any] | None] = {}
    took: list[float] = []  # of the last runs; the first ones also compile kernels
    try:
        first = next(iter(free))
        busy[first] = None
        del free[first]
        first.send("base")
        based = False
        with file.open("a", encoding="utf-8") as lines:
            while True:
                left = seconds - (time.monotonic() - started)
                if based and left > 1.2 * max(took[-2 * len(everyone) :], default=0.0):
                    running = {identity(settings) for settings in busy.values() if settings}
                    for settings in itertools.islice(waiting(study, rows, running), len(free)):
                        connection = next(iter(free))
                        del free[connection]
                        try:
                            connection.send(settings)
                        except OSError:
                            _say("an idle process had ended")
                        else:
                            busy[connection] = settings
                if not busy:
                    break
                ready = wait(list(busy), timeout=max(0.0, left))
                if not ready:
                    _say(f"{len(busy)} runs were still going when the time was up")
                    break
                for connection in ready:
                    settings = busy.pop(connection)
                    try:
                        row = connection.recv()
                    except EOFError:
                        row = {"settings": settings, "failed": "the process ended"}
                    else:
                        free[connection] = everyone[connection]
                    if settings is None:
                        if "failed" in row:
                            raise UserError(f"the base model could not be trained: {row['failed']}")
                        based = True
                        _say(f"{time.monotonic() - started:.0f} s: base model {json.dumps(row)}")
                        continue
                    rows[identity(settings)] = row
                    lines.write(json.dumps(row) + "\n")
                    lines.flush()
                    took.append(row.get("seconds", 0.0))
                    score = {prompt: round(test["accuracy"], 4) for prompt, test in row.get("test", {}).items()}
                    shown = {key: settings[key] for key in ("method", "rate", "rank", "magnitude", "bits", "seed")}
                    _say(f"{time.monotonic() - started:.0f} s: {shown} {row.get('failed') or score}")
    finally:
        for child in everyone.values():
            child.terminate()
        for child in everyone.values():
            child.join(10)
    done = sum("failed" not in row for row in rows.values())
    _say(f"{time.monotonic() - started:.0f} s: {done} of {planned_count(study, rows)} planned runs are in {file}")


def waiting(study: dict[str, Any], rows: dict[str, Any], running: set[str]) -> Iterator[dict[str, Any]]:
    """The runs that can begin now, most important first."""
    for settings in planned(study):
        settings = resolved(study, settings, rows)
        if settings and identity(settings) not in rows and identity(settings) not in running:
            running = running | {identity(settings)}
            yield settings


def work(connection: Connection, study: dict[str, Any], kit: Path, out: Path, gpu: int | None) -> None:
    """A worker: import once, then train the base model or a run for each message."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    from transformers.utils import logging

    from bench import dora_runs

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    device = torch.device("cpu") if gpu is None else torch.device("cuda", gpu)
    if gpu is not None:
        torch.cuda.set_device(device)
    own = None
    while True:
        try:
            asked = connection.recv()
        except EOFError:
            return
        try:
            if asked == "base":
                connection.send(base_of(study, kit, out, device))
                continue
            own = own or dora_runs.read_kit(kit)
            row = dora_runs.fine_tune(asked, study, out / "base", own, device)
            connection.send({"settings": asked} | row | {"device": dora_runs.device_name(device)})
        except Exception as error:
            traceback.print_exc()
            connection.send(
                {"settings": asked, "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            )


def base_of(study: dict[str, Any], kit: Path, out: Path, device) -> dict[str, Any]:
    """The base model's figures; it is trained unless out/base is whole. Settings that would not fit it are refused."""
    from bench import dora_runs

    about, asked = (
        out / "about.json",
        {key: study[key] for key in ("model", "pretraining", "lessons", "training", "tests")},
    )
    if (out / "base" / "base.json").exists() and about.exists():
        known = json.loads(about.read_text(encoding="utf-8"))
        if known["study"] != asked:
            raise UserError(f"{out}: its base model has other settings than {STUDY.name}; choose an empty folder")
        return known["base"]
    base = dora_runs.pretrain(study, kit, out / "base", device)
    rows = json.loads((kit / "rows.json").read_text(encoding="utf-8"))["test"]
    letters = {"fpb": "f", "fiqa": "q", "tfns": "t"}, {"negative": "n", "neutral": "u", "positive": "p"}
    written = {
        "study": asked,
        "base": base,
        "kit": json.loads((kit / "sources.json").read_text(encoding="utf-8")),
        "sets": "".join(letters[0][name] for name in rows["set"]),
        "targets": "".join(letters[1][target] for target in rows["target"]),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
    }
    about.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    return base


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--corpus", type=Path, metavar="KIT", help="write text and split into this folder")
    parser.add_argument(
        "--data", type=Path, default=ROOT / "data" / "raw", help="FinLoRA's files (test/fpb_test.jsonl)"
    )
    parser.add_argument(
        "--texts", type=Path, default=ROOT / ".cache" / "texts", help="unpacked packages with English text"
    )
    parser.add_argument("--kit", type=Path, help="the folder that --corpus wrote")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "outputs" / "dora_study", help="folder for base model and rows"
    )
    parser.add_argument("--seconds", type=float, default=86400.0, help="end by then")
    parser.add_argument("--workers", type=int, default=0, help="processes a GPU (8) or on the CPU (1)")
    parser.add_argument("--toy", action="store_true", help="small sizes, for a CPU")
    options = parser.parse_args()
    study = read_study(options.toy)
    if options.corpus:
        from bench import dora_corpus

        about = dora_corpus.write(study, options.data, options.texts, options.corpus)
        print(f"{options.corpus}: {about['tokens']:,} tokens; {json.dumps(about['split'])}")
    if options.kit:
        if not (options.kit / "rows.json").exists():
            raise UserError(f"{options.kit}: has no rows.json; make it with --corpus {options.kit}")
        import torch

        count = torch.cuda.device_count()
        conduct(study, options.kit, options.out, options.seconds, options.workers or (8 if count else 1), count)
    if not options.corpus and not options.kit:
        parser.error("give --corpus or --kit")


if __name__ == "__main__":
    run(main)
