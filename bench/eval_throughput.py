"""Samples a second of `make eval` against FinLoRA's way of testing, in one run, on the same model, adapter and prompts.

    python -m bench.eval_throughput --model <folder of the 8B shape> --tests <folder> [--sets fpb,fiqa,tfns,nwgi]

FinLoRA's way: 8-bit weights, PEFT's DoRA unmerged, one prompt at a time, `generate` with up to 10 new tokens. It is
timed on rows drawn evenly from the same sets, since all of them would take hours. Ours: the runner itself
(finlora/evaluate/runner.py) on every row, merged and with --keep-quantised. The adapter is DoRA r8 on q, k, v with
random weights, so answers mean nothing and never end early.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fastdora.plugin import peft_int8
from finlora.core.errors import run
from finlora.core.files import replacing
from finlora.core.machine import gpus
from finlora.core.paths import ROOT
from finlora.core.provenance import git_state, versions
from finlora.data.test_sets import read_set

NEW_TOKENS, SEED = 10, 0


def make_adapter(model: str, folder: Path) -> None:
    """A DoRA adapter that changes every layer: PEFT starts with B = 0 and m = ||W||, which would change none."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(SEED)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, device_map={"": gpu_or_cpu()})
    config = LoraConfig(
        r=8, lora_alpha=16, use_dora=True, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(base, config)
    for name, tensor in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(tensor, std=0.01)
        elif "lora_magnitude" in name:
            tensor.data *= 1 + 0.05 * torch.randn_like(tensor)
    adapted.save_pretrained(folder)


def gpu_or_cpu() -> str:
    import torch

    return "cuda:0" if torch.cuda.is_available() else "cpu"


def finloras_way(model: str, adapter: Path, contexts: list[str], most: float, warm: int = 2) -> dict[str, float]:
    """Samples a second at batch 1, the first `warm` ones left out, for at most so many seconds."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    if not torch.cuda.is_available():
        peft_int8.patch()  # PEFT's own way fails on a CPU, where this benchmark is only tried out
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(
        model,
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        device_map={"": gpu_or_cpu()},
        dtype=torch.float16 if torch.cuda.is_available() else torch.float32,
    )
    adapted = PeftModel.from_pretrained(base, adapter).eval()
    seconds = []
    for context in contexts:
        if sum(seconds) > most:
            break
        inputs = tokenizer(context, return_tensors="pt").to(base.device)
        started = time.perf_counter()
        with torch.no_grad():
            adapted.generate(
                **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id or 0
            )
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    kept = seconds[warm:]
    return {"samples": len(kept), "seconds": round(sum(kept), 3), "samples_per_second": round(len(kept) / sum(kept), 4)}


def ours(model: str, adapter: Path, tests: str, sets: str, *options: str) -> dict[str, float]:
    """The runner in a process of its own; seconds of asking, and of the whole command with loading."""
    with tempfile.TemporaryDirectory() as results:
        started = time.perf_counter()
        command = [
            "finlora",
            "eval",
            "--model",
            model,
            "--adapter",
            str(adapter),
            "--bits",
            "8",
            "--tasks",
            sets,
        ]
        command += ["--tests", tests, "--prompt", "raw", "--results", results, *options]
        subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=True)
        whole = time.perf_counter() - started
        found = [json.loads(path.read_text()) for path in Path(results).glob("*/*/set.json")]
    samples, seconds = sum(about["evaluated"] for about in found), sum(about["seconds"] for about in found)
    return {
        "samples": samples,
        "prompt_tokens": sum(about["prompt_tokens"] for about in found),
        "answer_tokens": sum(about["answer_tokens"] for about in found),
        "seconds": round(seconds, 3),
        "seconds_with_loading": round(whole, 1),
        "samples_per_second": round(samples / seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, help="a folder with the model and a tokenizer")
    parser.add_argument("--tests", required=True, help="folder of the test files (test/fpb_test.jsonl ...)")
    parser.add_argument("--sets", default="fpb,fiqa,tfns,nwgi")
    parser.add_argument("--rows", type=int, default=32, help="rows that FinLoRA's way is timed on")
    parser.add_argument("--seconds", type=float, default=60, help="and the longest it may take")
    parser.add_argument("--quantised-rows", type=int, default=256, help="rows a set for --keep-quantised")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "eval_throughput.json")
    given = parser.parse_args()
    contexts = [row.context for name in given.sets.split(",") for row in read_set(name, Path(given.tests)).rows]
    drawn = contexts[:: max(1, len(contexts) // given.rows)][: given.rows]
    adapter = ROOT / ".cache" / "bench-adapter"
    make_adapter(given.model, adapter)
    free_gpu()
    record = {
        "what": f"python -m bench.eval_throughput: {__doc__.splitlines()[0]}",
        "sets": given.sets,
        "device": gpus()[0][0] if gpus() else "CPU",
        "versions": versions(),
        "git": git_state(),
    }

    def note(key: str, value: Any) -> None:
        record[key] = value
        print(key, value, flush=True)
        with replacing(given.out) as file:  # as each row comes: a run on a rented machine may be cut short
            json.dump(record, file, indent=1)
            file.write("\n")

    limit = ("--limit", str(given.quantised_rows), "--keep-quantised")
    note("ours", ours(given.model, adapter, given.tests, given.sets))
    note("finlora", finloras_way(given.model, adapter, drawn, given.seconds))
    note("times_as_fast", round(record["ours"]["samples_per_second"] / record["finlora"]["samples_per_second"], 1))
    free_gpu()
    note("ours_keep_quantised", ours(given.model, adapter, given.tests, given.sets, *limit))


def free_gpu() -> None:
    """The runner is a process of its own and sizes its batches by what is free."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    run(main)
