"""The study's work on one device: the base model from scratch, and one fine-tuning run with its scores.

Adapted models are PEFT's with fastdora's layers, as the recipes have them: base and activations in bf16 on a GPU,
adapters in float32. Full fine-tuning trains every weight in float32 under bf16 autocast. On a CPU all is float32.
"""

import copy
import functools
import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file
from torch import nn
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    get_cosine_schedule_with_warmup,
)

import fastdora
from fastdora.packing import ANSWERS, label_positions
from finlora.data.tasks import TestSet
from finlora.evaluate.scorers import finlora, strict
from finlora.models.load import quantisation

LABELS = ("negative", "neutral", "positive")
SPEC = TestSet.model_construct(metric="accuracy_f1", labels=list(LABELS))
TEST_BATCH = 256


class Kit(NamedTuple):
    """A folder that bench.dora_corpus wrote: its tokenizer and by split the rows (bench.dora_corpus.Rows)."""

    tokenizer: Any
    rows: dict[str, dict[str, Any]]


def read_kit(folder: Path) -> Kit:
    rows = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    return Kit(AutoTokenizer.from_pretrained(folder / "tokenizer"), rows)


def pretrain(study: dict[str, Any], kit: Path, out: Path, device: torch.device) -> dict[str, Any]:
    """Train the base model on the kit's tokens, then on the lessons, and save it in `out`; what it took and reached.

    The lessons are tried at several rates; the model with the best validation accuracy is taken.

    The last 1% of the stream is held out. The rate follows whichever of steps and seconds is nearer to its end, so a
    run that the clock ends is not repeatable to the bit; `base.json` has the weights' SHA-256.
    """
    pretraining = study["pretraining"]
    length, batch = pretraining["length"], pretraining["batch"]
    own = read_kit(kit)
    tokenizer = own.tokenizer
    stream = torch.from_numpy(load_file(kit / "tokens.safetensors")["tokens"].astype(np.int32)).to(device)
    held_out = min(len(stream) // 100, 64 * length)
    stream, last = stream[:-held_out], stream[-held_out:]
    torch.manual_seed(pretraining["seed"])
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=False, **study["model"], **ids)
    model = LlamaForCausalLM(config).to(device).train()
    rate = pretraining["learning_rate"]
    decayed = [p for p in model.parameters() if p.dim() > 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": [p for p in model.parameters() if p.dim() == 1]}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    offsets = torch.arange(length, device=device)
    started, step, progress = time.monotonic(), 0, 0.0
    while progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, progress / 0.03 + 0.01) * (0.55 + 0.45 * math.cos(math.pi * progress))
        starts = torch.randint(0, len(stream) - length, (batch, 1)).to(device, non_blocking=True)
        rows = stream[starts + offsets].long()
        with _bf16(device):
            loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 8 == 0 and device.type == "cuda":
            torch.cuda.synchronize()  # or the clock would only see launches
        progress = max(step / pretraining["steps"], (time.monotonic() - started) / pretraining["seconds"])
    seconds = time.monotonic() - started
    model.eval()
    with torch.no_grad(), _bf16(device):
        windows = last[: len(last) // length * length].long().view(-1, length).split(batch)
        losses = [model(input_ids=rows, labels=rows).loss.item() for rows in windows]
    new_tokens = study["training"]["new_tokens"]
    tried: dict[float, tuple[float, list[float], nn.Module]] = {}
    for lessons_rate in study["lessons"]["learning_rates"]:
        pupil = copy.deepcopy(model)
        losses_taught = _teach(pupil, study, lessons_rate, own, device)
        score = _scores(pupil.eval(), own, "validation", "llama3", new_tokens, device)["accuracy"]
        tried[lessons_rate] = score, losses_taught, pupil
    chosen = max(tried, key=lambda tried_rate: tried[tried_rate][0])
    _, taught, model = tried[chosen]
    model.save_pretrained(out)
    about = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": step,
        "tokens": step * batch * length,
        "seconds": round(seconds, 1),
        "loss": round(float(np.mean(losses)), 4),
        "tokens_s": round(step * batch * length / seconds),
        "lessons": [_rounded(float(np.mean(part))) for part in (taught[:10], taught[-10:])],
        "lessons_rate": chosen,
        "validation": {str(tried_rate): round(pair[0], 4) for tried_rate, pair in tried.items()},
        "accuracy": _scores(model, own, "test", "llama3", new_tokens, device)["accuracy"],
        "sha256": hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest(),
        "device": device_name(device),
    }
    (out / "base.json").write_text(json.dumps(about) + "\n", encoding="utf-8")
    return about


def _teach(model: nn.Module, study: dict[str, Any], rate: float, kit: Kit, device: torch.device) -> list[float]:
    """Train all weights on the first train rows, which no run sees again; the losses."""
    lessons = study["lessons"]
    hook = fastdora.read_label_positions(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, fused=True)
    prompts, answers = (part[: lessons["rows"]] for part in encoded(kit, "train", "llama3"))
    training = study["training"] | {"epochs": lessons["epochs"]}
    losses = _train(model.train(), optimizer, prompts, answers, training, kit, 0, device)
    hook.remove()
    return losses


def _load(folder: Path, bits: int, wide: bool, device: torch.device) -> LlamaForCausalLM:
    """The base model in float32 where `wide`, else in bf16; its linear layers in 8 or 4 bits where bits are."""
    dtype = torch.float32 if wide else torch.bfloat16
    quantised = quantisation(bits, dtype)
    options = {"quantization_config": quantised, "device_map": {"": str(device)}} if quantised else {}
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa", **options)
    return model if options else model.to(device)


@functools.lru_cache(maxsize=2)
def _kept(folder: Path, wide: bool, device: torch.device) -> LlamaForCausalLM:
    return _load(folder, 16, wide, device)


def build(settings: dict[str, Any], targets: list[str], base: Path, device: torch.device) -> nn.Module:
    """The model of these settings, ready to train; LoRA's A is drawn from settings["seed"]."""
    full, fp8 = settings["method"] == "full", settings["bits"] == "fp8"
    bits = 8 if fp8 else settings["bits"]
    wide = full or device.type == "cpu"
    model = _load(base, bits, wide, device) if bits != 16 else copy.deepcopy(_kept(base, wide, device))
    torch.manual_seed(settings["seed"])
    if not full:
        config = LoraConfig(
            r=settings["rank"],
            lora_alpha=settings["alpha"],
            lora_dropout=settings["dropout"],
            target_modules=targets,
            use_dora=settings["method"] == "dora",
            use_rslora=settings["method"] == "rslora",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, config)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
            if "lora_magnitude_vector" in name and settings["magnitude"] == 0:
                parameter.requires_grad_(False)
        fastdora.accelerate(model, fp8)
    fastdora.read_label_positions(model)
    return model


def optimizer_of(model: nn.Module, settings: dict[str, Any], device: torch.device) -> torch.optim.Optimizer:
    """AdamW without weight decay; magnitudes in a group of their own, at `magnitude` times the rate."""
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups["lora_magnitude_vector" in name].append(parameter)
    rate = settings["rate"]
    trained = [{"params": groups[False], "lr": rate}, {"params": groups[True], "lr": rate * settings["magnitude"]}]
    return torch.optim.AdamW([g for g in trained if g["params"]], weight_decay=0.0, fused=device.type == "cuda")


def fine_tune(
    settings: dict[str, Any], study: dict[str, Any], base: Path, kit: Kit, device: torch.device
) -> dict[str, Any]:
    """One run: train on the train rows, score on validation and test rows. The row without what identifies it.

    validation and test[prompt] have accuracy (strict, of greedy answers), finlora (by FinLoRA's scorer), and `right`,
    test rows' strict correctness as a bit string in hexadecimal, first row first.
    """
    started, training = time.monotonic(), study["training"]
    model = build(settings, training["targets"], base, device).train()
    optimizer = optimizer_of(model, settings, device)
    prompts, answers = (part[study["lessons"]["rows"] :] for part in encoded(kit, "train", settings["prompt"]))
    losses = _train(model, optimizer, prompts, answers, training, kit, settings["seed"], device)
    trained = time.monotonic() - started
    model.eval()
    row = {
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "steps": len(losses),
        "loss": [_rounded(float(np.mean(part))) for part in (losses[:10], losses[-10:])],
        "train_seconds": round(trained, 2),
        "validation": _scores(model, kit, "validation", settings["prompt"], training["new_tokens"], device)
        | {"loss": _rounded(_loss(model, kit, "validation", settings["prompt"], device))},
        "test": {
            prompt: _scores(model, kit, "test", prompt, training["new_tokens"], device)
            for prompt in study["tests"][settings["prompt"]]
        },
    }
    row["validation"].pop("right")
    return row | {"seconds": round(time.monotonic() - started, 2)}


def _train(model, optimizer, prompts, answers, training, kit: Kit, seed: int, device: torch.device) -> list[float]:
    """Train on rows shuffled by `seed`, without a last batch that is not full; the losses."""
    order, size = np.random.default_rng(seed), training["batch"]
    trainable = [p for p in model.parameters() if p.requires_grad]
    steps = training["epochs"] * (len(prompts) // size)
    schedule = get_cosine_schedule_with_warmup(optimizer, training["warmup"], steps)
    losses = []
    for _ in range(training["epochs"]):
        shuffled = order.permutation(len(prompts))
        for start in range(0, len(prompts) // size * size, size):
            chosen = shuffled[start : start + size]
            batch = collate([prompts[i] for i in chosen], [answers[i] for i in chosen], kit.tokenizer.pad_token_id)
            batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
            with _bf16(device):
                loss = model(**batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, training["clip"])
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    return torch.stack(losses).tolist()


def encoded(kit: Kit, part: str, prompt: str) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens of prompts and of answers. They are tokenised apart: a prompt is the same in training and testing."""
    rows = kit.rows[part]
    end = [kit.tokenizer.eos_token_id]
    answer = {label: kit.tokenizer(label, add_special_tokens=False)["input_ids"] + end for label in LABELS}
    return rows["prompts"][prompt], [answer[target] for target in rows["target"]]


def collate(prompts: list[list[int]], answers: list[list[int]], pad: int) -> dict[str, torch.Tensor]:
    """Padded on the right: causal attention then needs no mask, and no position is without one to attend to."""
    width = -(-max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True)) // 8) * 8
    ids, labels = torch.full((len(prompts), width), pad), torch.full((len(prompts), width), -100)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        ids[i, :end] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : end] = ids[i, len(prompt) : end]
    return {"input_ids": ids, "labels": labels, ANSWERS: label_positions(labels)}


def collate_prompts(prompts: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and attention mask, padded on the left: generation goes on in the last column."""
    width = max(map(len, prompts))
    ids, mask = torch.full((len(prompts), width), pad), torch.zeros((len(prompts), width), dtype=torch.long)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    return ids, mask


@torch.no_grad()
def _loss(model: nn.Module, kit: Kit, part: str, prompt: str, device: torch.device) -> float:
    prompts, answers = encoded(kit, part, prompt)
    total = 0.0
    for start in range(0, len(prompts), TEST_BATCH):
        chosen = slice(start, start + TEST_BATCH)
        batch = collate(prompts[chosen], answers[chosen], kit.tokenizer.pad_token_id)
        with _bf16(device):
            loss = model(**{name: value.to(device) for name, value in batch.items()}, use_cache=False).loss
        total += loss.item() * len(prompts[chosen])
    return total / len(prompts)


@torch.no_grad()
def _scores(
    model: nn.Module, kit: Kit, part: str, prompt: str, new_tokens: int, device: torch.device
) -> dict[str, Any]:
    prompts, _ = encoded(kit, part, prompt)
    targets, tokenizer = kit.rows[part]["target"], kit.tokenizer
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    for start in range(0, len(prompts), TEST_BATCH):
        chosen = by_length[start : start + TEST_BATCH]
        ids, mask = collate_prompts([prompts[i] for i in chosen], tokenizer.pad_token_id)
        ids, mask = ids.to(device), mask.to(device)
        with _bf16(device):
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            answers[i] = text
    right = strict(SPEC, answers, targets)["right"]
    return {
        "accuracy": float(np.mean(right)),
        "finlora": float(np.mean(finlora(SPEC, answers, targets)["right"])),
        "right": np.packbits(np.array(right, bool)).tobytes().hex(),
    }


def _rounded(loss: float) -> float | None:
    """None for a run that diverged: JSON has no NaN."""
    return round(loss, 4) if math.isfinite(loss) else None


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _bf16(device: torch.device):
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
