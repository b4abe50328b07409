"""Merge a trained adapter into its base: 16-bit safetensors with tokenizer and chat template (`make merge`).

finlora merge --recipe sentiment_r8_dora [--tiny] [--into full] [--limit 100] [--force]
finlora merge --adapter <folder or hub id> [--model <base>] [--bits 8]

Loading, holding the adapter against the base and folding DoRA are evaluation's (finlora/models/load.py), so what is
merged is what `make eval` scores. axolotl's merge-lora folds with PEFT's layers too, but cannot merge into 8-bit
weights as they were trained on, rounds embeddings and head to 4 bits with the rest, writes in place and compares
nothing.

An adapter of 8 or 4 bits learned to correct rounded weights. It can be merged into the base as published ("full") or
into the weights that it saw ("dequantised"): both are held against the model as trained, the closer one is taken.
"""

import gc
import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

from finlora.core.errors import UserError
from finlora.core.files import read_json, sha256
from finlora.core.machine import GIB, gpus
from finlora.core.paths import ROOT, shown
from finlora.core.provenance import git_state, versions
from finlora.data.test_sets import RAW, SAMPLE, all_sets
from finlora.export.subject import check_base, check_weights, fetch_model, merged_folder
from finlora.models.load import check_fits, load_config, load_tokenizer, template_sha256
from finlora.train.runs import folder_lock

SHARD = "5GB"
DIALOGUES, POSITIONS = 16, 8  # whose logits are compared: so many rows, so many of each one's last tokens
# Of the logits' spread: weights rounded to bfloat16 move them by less, a GPU's 16-bit activations by more; `verify`
# looks closer where it is passed.
TOLERANCE = {"cpu": 0.01, "cuda": 0.05}
ON_CPU = "merge on the CPU: CUDA_VISIBLE_DEVICES= make merge ..."
SAMPLE_ROWS = SAMPLE / "test" / "fpb_test.jsonl"


def merge(
    plan: dict[str, Any], into: str | None = None, limit: int = 100, prompt: str = "saved", force: bool = False
) -> Path:
    """Merge, hold the saved model against base and adapter, and return its folder; merge.json there says it all.

    into: "full" or "dequantised"; without it the one closer to the model as trained. limit: rows of each test set that
    is at hand that both are asked, 0 for none. Nothing is left behind where it fails: the folder is written beside
    and renamed. Raises UserError.
    """
    if into == "dequantised" and plan["bits"] == 16:
        raise UserError(f"INTO=dequantised: {plan['name']} was trained on 16 bits; there is nothing to dequantise")
    if not force:
        check_base(plan)
    out = plan["merged"]
    before = read_json(out / "merge.json")
    kept = bool(merged_folder(plan)) and into in (before["asked_for"], before["into"]) and not force
    if not kept:  # before the folder is made: a refused merge leaves none
        check_replaced(plan, before, force)
        fetch_model(plan)
        check_fits(plan["adapter"], plan["model"])
        check_room(plan)
        tokenizer = load_tokenizer(plan["model"], plan["adapter"], prompt)
    with folder_lock(plan["folder"]):
        if kept:
            check_weights(out)
            print(f"{shown(str(out))} is already merged from this adapter; FORCE=1 merges again")
            return out
        for left in plan["folder"].glob(".merged-*"):  # of a run that was killed
            shutil.rmtree(left)
        with tempfile.TemporaryDirectory(dir=plan["folder"], prefix=".merged-") as beside:
            whole = Path(beside) / "merged"
            try:
                about = write(plan, into, limit, tokenizer, whole)
            except Exception as error:
                if type(error).__name__ != "OutOfMemoryError":
                    raise
                raise UserError(f"{plan['name']}: the GPU is out of memory; free it, or {ON_CPU}") from error
            whole.chmod(0o755)
            if out.exists():
                out.rename(Path(beside) / "before")
            whole.rename(out)
    weights = list(out.glob("*.safetensors"))
    print(
        f"verified  logits of the saved model: {off(about['verified'])} from base and adapter\n"
        f"merged    {shown(str(out))} ({sum(path.stat().st_size for path in weights) / 1e9:.2f} GB in {len(weights)} "
        f"file{'s' * (len(weights) > 1)})"
    )
    return out


def check_replaced(plan: dict[str, Any], before: dict[str, Any] | None, force: bool) -> None:
    """UserError where merging would replace files of somebody else, or the model of an adapter from elsewhere.

    before: merge.json of what is there.
    """
    out = shown(str(plan["merged"]))
    if before is None and plan["merged"].exists() and not force:
        raise UserError(f"{out}: holds files that `make merge` did not write; FORCE=1 replaces them")
    other = before and before["adapter_sha256"] != plan["facts"]["sha256"]
    if other and before["adapter"] != shown(str(plan["adapter"])) and not force:
        raise UserError(
            f"{out}: holds the model merged from {before['adapter']}; FORCE=1 replaces it, and an adapter folder of "
            "another name keeps both"
        )


def write(plan: dict[str, Any], into: str | None, limit: int, tokenizer, folder: Path) -> dict[str, Any]:
    """Choose what to merge into, write the merged model into `folder`, verify it; return what merge.json holds."""
    from finlora.models import load as models

    rows = dialogues(plan, tokenizer)
    choices = ["full"] if plan["bits"] == 16 else [into] if into else ["full", "dequantised"]
    print(
        f"merging   {plan['name']}: {plan['facts']['method']}, r {plan['facts']['r']}, trained on {plan['bits']} bits"
    )
    trained = None
    if plan["bits"] != 16:
        trained = ask(as_trained(plan), tokenizer, rows, plan, limit)
        free()
    merged, found = None, {}
    for choice in choices:
        merged = None  # before the next one is loaded
        free()
        merged, expected = fold(plan, choice, rows)
        if trained:
            found[choice] = compare(ask(merged, tokenizer, rows, plan, limit), trained)
            print(f"{choice:<12}{said(found[choice])}", flush=True)
    chosen = min(found, key=lambda choice: found[choice]["mean"], default="full")
    if chosen != choices[-1]:
        merged = None
        free()
        merged, expected = fold(plan, chosen, rows)
    if len(choices) > 1:
        print(f"taking    {chosen}, the closer to the model as trained; INTO= takes the other")
    try:
        save(merged, tokenizer, folder)
        merged = None
        free()
        saved = models.load_base(str(folder), 16)
        verified = verify(saved, rows, expected)
        if "of_a_step" in verified and not verified["mean"] <= verified["of_a_step"]:  # nor where they are no numbers
            raise UserError(
                f"{plan['adapter']}: merged, its logits are {off(verified)} from those of base and adapter, more than "
                f"the {verified['of_a_step']:.2g} of a rounding of its weights; nothing was written, please report this"
            )
        about = {
            "adapter": shown(str(plan["adapter"])),
            "adapter_sha256": plan["facts"]["sha256"],
            "base": shown(plan["model"]),
            **{key: plan["facts"][key] for key in ("method", "r", "alpha")},
            "trained_bits": plan["bits"],
            "into": chosen,
            "asked_for": into,
            "dialogues": len(rows),
            "from_trained": found,
            "trained_score": trained["score"] if trained else {},
            "verified": verified,
            "template_sha256": template_sha256(tokenizer),
            "weights": {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))},
            "versions": versions(),
            "git": git_state(),
        }
        (folder / "merge.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    except Exception as error:
        if not is_disk(error):
            raise
        raise UserError(
            f"{shown(str(plan['merged']))}: cannot be written ({' '.join(str(error).split())[:120]}); free some space"
        ) from error
    return about


def verify(saved, rows: list[list[int]], expected) -> dict[str, float]:
    """`distance` of a saved model's logits from those expected.

    Where it is over TOLERANCE, `of_a_step` too: how far the logits go when every weight of `saved` goes one step of
    bfloat16 up or down at random, which is done in place. Some models shake that much.
    """
    import torch

    found = logits(saved, rows)
    verified = distance(found, expected)
    if verified["mean"] <= TOLERANCE[saved.device.type] * verified["spread"]:
        return verified
    for tensor in saved.parameters():
        rounded = tensor.data.to(torch.bfloat16)
        towards = torch.where(torch.rand_like(tensor.data, dtype=torch.float32) < 0.5, math.inf, -math.inf)
        tensor.data = torch.nextafter(rounded, towards.to(torch.bfloat16)).to(tensor.dtype)
    return verified | {"of_a_step": distance(logits(saved, rows), found)["mean"]}


def check_room(plan: dict[str, Any]) -> None:
    """UserError where the merged model does not fit on the disk, or the base in 16 bits (32 on a CPU) in memory."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(load_config(plan["model"]))
    size = 2 * sum(tensor.numel() for tensor in skeleton.parameters()) / GIB
    existing = next(folder for folder in (plan["folder"], *plan["folder"].parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free / GIB
    if free < size * 1.05:
        raise UserError(f"{plan['folder']}: the merged model takes {size:.1f} GiB and {free:.1f} are free; free some")
    if found := gpus():
        name, _, free = found[0]
        if free < size * 1.15:
            raise UserError(
                f"merging takes {size * 1.15:.0f} GiB of GPU memory, {name} has {free:.0f} free; free it, or {ON_CPU}"
            )
        return
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20
    if free < size * 2.15:
        raise UserError(f"merging takes {size * 2.15:.0f} GiB of memory and {free:.0f} are free; take a larger machine")


def dialogues(plan: dict[str, Any], tokenizer) -> list[list[int]]:
    """Tokens of the shortest of the recipe's own validation rows, or of the sample's where those are not at hand."""
    own = [ROOT / entry["path"] for entry in plan["run"].get("test_datasets") or []]
    path = next((path for path in own if path.is_file() and path.stat().st_size), SAMPLE_ROWS)
    turns = []
    with path.open(encoding="utf-8") as lines:
        for line, _ in zip(lines, range(16 * DIALOGUES), strict=False):
            row = json.loads(line)
            turns.append(
                row.get("messages")
                or [{"role": "user", "content": row["context"]}, {"role": "assistant", "content": str(row["target"])}]
            )
    tokens = [tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"] for messages in turns]
    return sorted(tokens, key=len)[:DIALOGUES]


def as_trained(plan: dict[str, Any]):
    """The quantised base with the adapter unmerged, its products those of training: fastdora's, or PEFT's own."""
    import fastdora
    from finlora.models import load as models

    model = models.attach(models.load_base(plan["model"], plan["bits"], keep_quantised=True), plan["adapter"])
    if plan["run"].get("fastdora_layers", "peft") == "fast":
        fastdora.accelerate(model, fp8=bool(plan["run"].get("fastdora_fp8")))
    return model


def fold(plan: dict[str, Any], into: str, rows: list[list[int]]):
    """The base with the adapter merged, its weights rounded to bfloat16, and the logits before: base and adapter."""
    import torch
    from peft import PeftModel

    from finlora.models import load as models

    base = models.load_base(plan["model"], 16 if into == "full" else plan["bits"])
    unmerged = PeftModel.from_pretrained(base, plan["adapter"]).eval()
    expected = logits(unmerged, rows)
    merged = models.attach(unmerged.unload(), plan["adapter"])
    for tensor in merged.parameters():  # not .to(): buffers (rotary frequencies) stay float32
        tensor.data = tensor.data.to(torch.bfloat16).to(tensor.dtype)
    return merged, expected


def save(merged, tokenizer, folder: Path) -> None:
    """Weights in bfloat16, in shards; answers end where the chat template's do and are greedy, as in evaluation."""
    import torch
    from transformers import GenerationConfig

    from finlora.models.generate import end_tokens

    for tensor in merged.parameters():
        tensor.data = tensor.data.to(torch.bfloat16)
    merged.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end_tokens(merged, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    merged.save_pretrained(folder, max_shard_size=SHARD)
    tokenizer.save_pretrained(folder)


def logits(model, rows: list[list[int]]):
    """Logits (positions, vocabulary) of the last tokens of each row, float32, on the CPU."""
    import torch

    found = []
    with torch.inference_mode():
        for ids in rows:
            out = model(torch.tensor([ids], device=model.device), logits_to_keep=POSITIONS)
            found.append(out.logits[0].float().cpu())
    return torch.cat(found)


def ask(model, tokenizer, rows: list[list[int]], plan: dict[str, Any], limit: int) -> dict[str, Any]:
    """Logits, and what the model answers to the first `limit` rows of each test set that is at hand, with its score."""
    found: dict[str, Any] = {"logits": logits(model, rows), "answers": {}, "score": {}}
    folder = (
        RAW if not plan["tiny"] or any((RAW / all_sets()[name]["file"]).is_file() for name in plan["sets"]) else SAMPLE
    )
    sets = [name for name in plan["sets"] if (folder / all_sets()[name]["file"]).is_file()]
    if not limit or not sets:
        return found
    from finlora.evaluate import harness, runner
    from finlora.evaluate.scorers import scorings, summary

    lm = harness.BatchedHFLM(model, tokenizer)
    for name in sets:
        wanted = runner.Request(labels="corrected", limit=limit)
        _, given = runner.answers(lm, name, {"folder": folder}, wanted, None)
        found["answers"][name] = [row["answer"] for row in given]
        if ways := scorings(name, all_sets()[name]):
            score = next(iter(ways.values()))(found["answers"][name], [row["corrected"] for row in given])
            found["score"][name] = summary(score)["accuracy"]
    return found


def distance(found, expected) -> dict[str, float]:
    """How far logits (positions, vocabulary) are from those expected; the spread is the latter's own deviation."""
    apart = (found - expected).abs()
    return {
        "mean": apart.mean().item(),
        "largest": apart.max().item(),
        "spread": expected.std(-1).mean().item(),
        "same_next_token": (found.argmax(-1) == expected.argmax(-1)).double().mean().item(),
    }


def compare(found: dict[str, Any], trained: dict[str, Any]) -> dict[str, Any]:
    """`distance`, and the share of answers that are the trained model's, and each test set's score."""
    pairs = [
        one == other
        for name in trained["answers"]
        for one, other in zip(found["answers"][name], trained["answers"][name], strict=True)
    ]
    return distance(found["logits"], trained["logits"]) | {
        "asked": len(pairs),
        "same_answers": sum(pairs) / len(pairs) if pairs else None,
        "score": found["score"],
        "score_difference": {name: found["score"][name] - trained["score"][name] for name in trained["score"]},
    }


def off(found: dict[str, Any]) -> str:
    return f"{found['mean']:.2g} on average ({found['largest']:.2g} at most, of a spread of {found['spread']:.2g})"


def said(found: dict[str, Any]) -> str:
    text = f"logits {off(found)} from the trained model"
    if found["asked"]:
        text += f", {found['same_answers']:.1%} of {found['asked']} answers the same"
    scores = [
        f"{name} {found['score'][name]:.1%} ({change:+.1%})" for name, change in found["score_difference"].items()
    ]
    return text + (f"; score {', '.join(scores)}" if scores else "")


def is_disk(error: Exception) -> bool:
    """Whether it is the disk's: safetensors wraps the operating system's error in one of its own."""
    return isinstance(error, OSError) or (type(error).__name__ == "SafetensorError" and "os error" in str(error))


def free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
