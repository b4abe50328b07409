"""Samples a second of `make eval` against FinLoRA's way of testing, in one run, on the same model, adapter and prompts.

    python -m bench.eval_throughput --model <folder of the 8B shape> --tests <folder> [--sets fpb,fiqa,tfns,nwgi]
    python -m bench.eval_throughput --model <folder of the 8B shape> --made finer_made,tags_made_20 [--made-rows 320]

FinLoRA's way: 8-bit weights, PEFT's DoRA unmerged, one prompt at a time, `generate` with up to 10 new tokens. It is
timed on rows drawn evenly from the same sets, since all of them would take hours. Ours: the runner itself
(finlora/evaluate/runner.py) on every row, merged and with --keep-quantised. The adapter is DoRA r8 on q, k, v with
random weights, so answers mean nothing and never end early.

The second compares prompts of bench/rows.py, shared prefixes computed once (finlora/models/shared.py), with padded
batches of similar length, which compute once what the whole batch begins with.
"""

import argparse
import gc
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from bench.rows import TESTS, read_rows
from fastdora.plugin import peft_int8
from finlora.core.errors import UserError, run
from finlora.core.files import write_json
from finlora.core.machine import gpus
from finlora.core.paths import ROOT
from finlora.core.provenance import git_state, versions
from finlora.data.test_sets import all_sets, read_set

NEW_TOKENS, SEED, WARM_UP = 10, 0, 2
DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"


def make_adapter(model: str, folder: Path) -> None:
    """A DoRA adapter that changes every layer: PEFT starts with B = 0 and m = ||W||, which would change none."""
    torch.manual_seed(SEED)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, device_map={"": DEVICE})
    targets = ["q_proj", "k_proj", "v_proj"]
    config = LoraConfig(r=8, lora_alpha=16, use_dora=True, target_modules=targets, task_type="CAUSAL_LM")
    adapted = get_peft_model(base, config)
    for name, tensor in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(tensor, std=0.01)
        elif "lora_magnitude" in name:
            tensor.data *= 1 + 0.05 * torch.randn_like(tensor)
    adapted.save_pretrained(folder)


def finloras_way(model: str, adapter: Path, contexts: list[str], longest: float) -> dict[str, float]:
    """Samples a second at batch 1, the first WARM_UP ones left out, for at most so many seconds."""
    if DEVICE == "cpu":
        peft_int8.patch()  # PEFT's own layers fail on a CPU, where this benchmark is only tried out
    tokenizer = AutoTokenizer.from_pretrained(model)
    dtype = torch.float32 if DEVICE == "cpu" else torch.float16
    config = BitsAndBytesConfig(load_in_8bit=True)
    base = AutoModelForCausalLM.from_pretrained(model, quantization_config=config, device_map={"": DEVICE}, dtype=dtype)
    adapted, seconds = PeftModel.from_pretrained(base, adapter).eval(), []
    pad = tokenizer.pad_token_id or 0
    for context in contexts:
        if sum(seconds) > longest:
            break
        inputs = tokenizer(context, return_tensors="pt").to(base.device)
        started = time.perf_counter()
        with torch.no_grad():
            ids = adapted.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=pad)
        ids.cpu()  # waits for the GPU
        seconds.append(time.perf_counter() - started)
    timed = seconds[WARM_UP:]
    rate = round(len(timed) / sum(timed), 4)
    return {"samples": len(timed), "seconds": round(sum(timed), 3), "samples_per_second": rate}


def ours(model: str, adapter: Path, tests: str, sets: str, *options: str) -> dict[str, float]:
    """The runner in a process of its own; seconds of asking, and of the whole command with loading."""
    gc.collect()
    if DEVICE != "cpu":
        torch.cuda.empty_cache()  # the runner sizes its batches by the memory that is free
    with tempfile.TemporaryDirectory() as results:
        started = time.perf_counter()
        command = ["-m", "finlora", "eval", "--bits", "8", "--prompt", "raw", "--tasks", sets, "--results", results]
        command += ["--model", model, "--adapter", str(adapter), "--tests", tests, *options]
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
        whole = time.perf_counter() - started
        records = [json.loads(path.read_text()) for path in Path(results).glob("*/*/set.json")]
    total = {key: sum(each[key] for each in records) for key in ("evaluated", "prompt_tokens", "answer_tokens")}
    seconds = sum(each["seconds"] for each in records)
    return {
        "samples": total.pop("evaluated"),
        **total,
        "seconds": round(seconds, 3),
        "seconds_with_loading": round(whole, 1),
        "samples_per_second": round(sum(each["evaluated"] for each in records) / seconds, 2),
    }


def shared_and_padded(lm, kind: str, count: int, longest: float) -> dict[str, Any]:
    """Both ways on the same prompts. longest: seconds that padded batches may take; they stop after one that passes."""
    from finlora.evaluate.harness import batch_size, batch_tokens
    from finlora.models.generate import padded
    from finlora.models.shared import supports

    model, tokenizer = lm.model, lm.tokenizer
    new = all_sets()[TESTS[re.sub(r"_\d+$", "", kind)]].max_new_tokens
    chats = [[{"role": "user", "content": context}] for context, _ in read_rows(kind, rows=count)]
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    prompts = dict(enumerate(tokenizer(texts, add_special_tokens=False)["input_ids"]))

    def by_prefix() -> Iterator[dict[int, Any]]:
        yield from lm.answers(prompts, {"max_gen_toks": new, "until": []})

    def by_length() -> Iterator[dict[int, Any]]:
        left = sorted(prompts, key=lambda index: -len(prompts[index]))
        budget = lm.batch_tokens or batch_tokens(model)
        while left:
            batch = left[: batch_size(budget, len(prompts[left[0]]) + new)]
            yield dict(zip(batch, padded(model, tokenizer, [prompts[index] for index in batch], new), strict=True))
            left = left[len(batch) :]

    row: dict[str, Any] = {"tokens_a_prompt": round(sum(map(len, prompts.values())) / len(prompts), 1)}
    row["supported"] = supports(model)  # else both ways are the same
    answered: dict[str, dict[int, Any]] = {}
    for name, way, limit in (("shared", by_prefix, float("inf")), ("padded", by_length, longest)):
        padded(model, tokenizer, [prompts[0][:64]], 4)  # kernels are loaded
        if DEVICE != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        started, answers = time.perf_counter(), {}
        for batch in way():
            answers |= batch
            seconds = time.perf_counter() - started
            if seconds > limit:
                break
        row[name] = {"samples": len(answers), "seconds": round(seconds, 3)}
        row[name]["samples_per_second"] = round(len(answers) / seconds, 3)
        if DEVICE != "cpu":
            row[name]["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        answered[name] = answers
    row["times_as_fast"] = round(row["shared"]["samples_per_second"] / row["padded"]["samples_per_second"], 2)
    row["equal_answers"] = sum(answered["shared"][index] == answer for index, answer in answered["padded"].items())
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, help="a folder with the model and a tokenizer")
    parser.add_argument("--tests", help="folder of the test files (test/fpb_test.jsonl ...)")
    parser.add_argument("--sets", default="fpb,fiqa,tfns,nwgi")
    parser.add_argument("--rows", type=int, default=32, help="rows that FinLoRA's way is timed on")
    parser.add_argument("--seconds", type=float, default=60, help="and the longest it, or padded batches, may take")
    parser.add_argument("--made", help=f"kinds of bench/rows.py: {', '.join(TESTS)}, with questions (tags_made_20)")
    parser.add_argument("--made-rows", type=int, default=320, help="of each kind")
    parser.add_argument("--batch-tokens", type=int, help="of --made; the free memory decides without")
    parser.add_argument("--quantised-rows", type=int, default=256, help="rows a set for --keep-quantised")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "eval_throughput.json")
    options = parser.parse_args()
    if bool(options.tests) == bool(options.made):
        raise UserError("give --tests <folder of the test files>, or --made finer_made,tags_made_20")
    record = {"what": f"python -m bench.eval_throughput: {__doc__.splitlines()[0]}"}
    record |= {"device": gpus()[0][0] if gpus() else "CPU", "versions": versions(), "git": git_state()}

    def note(key: str, value: Any) -> None:
        record[key] = value
        print(key, value, flush=True)
        # As each row comes: a run on a rented machine may be cut short.
        write_json(options.out, record)

    if options.made:
        from finlora.evaluate.harness import BatchedHFLM
        from finlora.models.load import load_base

        tokenizer = AutoTokenizer.from_pretrained(options.model)
        lm = BatchedHFLM(load_base(options.model, 16, fast=True), tokenizer, options.batch_tokens)
        for kind in options.made.split(","):
            note(kind, shared_and_padded(lm, kind, options.made_rows, options.seconds))
        return
    record["sets"] = options.sets
    contexts = [row.context for name in options.sets.split(",") for row in read_set(name, Path(options.tests)).rows]
    drawn = contexts[:: max(1, len(contexts) // options.rows)][: options.rows]
    adapter = ROOT / ".cache" / "bench-adapter"
    make_adapter(options.model, adapter)
    arguments = options.model, adapter, options.tests, options.sets
    note("ours", ours(*arguments))
    note("finlora", finloras_way(options.model, adapter, drawn, options.seconds))
    note("times_as_fast", round(record["ours"]["samples_per_second"] / record["finlora"]["samples_per_second"], 1))
    note("ours_keep_quantised", ours(*arguments, "--limit", str(options.quantised_rows), "--keep-quantised"))


if __name__ == "__main__":
    run(main)
