"""What `make train` checks: the device, the disk and the rows before a run, the adapter after it."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from data import rows
from tools import recipes
from tools.cli import ROOT, UserError

GIB = 2**30


def gpus() -> list[tuple[str, float, float]]:
    """(name, total GiB, free GiB) of each visible GPU; an empty list without one."""
    import pynvml

    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        wanted = [part.strip() for part in visible.split(",") if part.strip() and part.strip() != "-1"]
        if all(part.isdigit() for part in wanted):
            handles = [handles[int(part)] for part in wanted if int(part) < len(handles)]
    found = []
    for handle in handles:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        name = pynvml.nvmlDeviceGetName(handle)
        found.append((name if isinstance(name, str) else name.decode(), memory.total / GIB, memory.free / GIB))
    return found


def memory_estimate(recipe: dict[str, Any], shape: dict[str, Any]) -> float:
    """GiB that training takes on one GPU, with gradient checkpointing; within 5% of bench/train_h200.json.

    Weights at their bits, embeddings and head in 16 bits, adapter with gradients and two moments in float32, one
    layer's activations, a checkpoint a layer, the logits (16-bit, float32, and their gradient) and the packing mask.
    """
    hidden, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    linear = sum(i * o for i, o in recipes.linear_layers(shape).values()) * layers
    bits = 8 if recipe.get("load_in_8bit") else 4.5 if recipe.get("load_in_4bit") else 16
    tables = shape["vocab_size"] * hidden * (1 if shape.get("tie_word_embeddings") else 2)
    weights = linear * bits / 8 + tables * 2 + recipes.trainable_parameters(recipe, shape) * 16
    tokens = recipe["sequence_len"] * recipe["micro_batch_size"]
    one_layer = tokens * (10 * hidden + 3 * inner) * 2
    kept = tokens * hidden * 2 * layers if recipe.get("gradient_checkpointing") else one_layer * layers
    if bits == 8 and recipe.get("peft_use_dora"):
        kept += tokens * hidden * 19 * layers  # what PEFT's DoRA on 8-bit weights holds on to: measured, not derived
    logits = tokens * shape["vocab_size"] * 10
    mask = recipe["sequence_len"] ** 2 * 2 if recipe.get("attn_implementation") == "sdpa" else 0
    return (weights + one_layer + kept + logits + mask) / GIB


def check_device(path: Path, recipe: dict[str, Any], wanted: int = 0) -> bool:
    """Whether the recipe needs a GPU; UserError when it does and there is none, or none with enough memory.

    wanted: how many there must be whatever the model's size. Several processes, and DeepSpeed, need a GPU each: on a
    CPU accelerate would start every process for itself, without a word.
    """
    shape = recipes.shape(recipe["base_model"])
    if wanted > len(gpus()):
        raise UserError(f"GPUS={wanted}: several processes and DeepSpeed need a GPU each, and {len(gpus())} are here")
    if shape is None:
        return bool(gpus())
    if recipes.trainable_parameters(recipe, shape) < 1_000_000:
        return False
    need = memory_estimate(recipe, shape)
    found = gpus()
    if not found:
        raise UserError(
            f"{path.stem} needs a GPU with about {need:.0f} GiB and none is here; try `make demo`, or this recipe on a "
            f"tiny model: make train RECIPE={path.stem} TINY=1"
        )
    name, total, free = min(found[: wanted or 1], key=lambda gpu: gpu[2])
    if free < need:
        length, accumulation = recipe["sequence_len"] // 2, 2 * recipe["gradient_accumulation_steps"]
        raise UserError(
            f"{path}: needs about {need:.0f} GiB and {name} has {free:.0f} of {total:.0f} free; free the GPU, or set "
            f"sequence_len: {length} and gradient_accumulation_steps: {accumulation}"
        )
    return True


def check_disk(path: Path, recipe: dict[str, Any], out: Path, needs_gpu: bool) -> None:
    """UserError when tokens, checkpoints or the base model would not fit on the disk."""
    shape = recipes.shape(recipe["base_model"])
    adapter = 16 * recipes.trainable_parameters(recipe, shape) if shape else GIB
    tokens = 8 * sum((ROOT / name).stat().st_size for name in data_files(recipe))
    need = tokens + adapter * (recipe.get("save_total_limit", 4) + 2) + GIB // 4
    free = shutil.disk_usage(out).free
    if free < need:
        raise UserError(
            f"{out}: {need / GIB:.1f} GiB are needed for tokens and checkpoints and {free / GIB:.1f} are free"
        )
    if not needs_gpu or (ROOT / recipe["base_model"]).is_dir():
        return
    from huggingface_hub import constants, try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(recipe["base_model"], "config.json"), str):
        cache = Path(constants.HF_HUB_CACHE)
        existing = next(folder for folder in [cache, *cache.parents] if folder.is_dir())
        free = shutil.disk_usage(existing).free
        if free < 17 * GIB:
            raise UserError(f"{cache}: {recipe['base_model']} takes 17 GiB and {free / GIB:.1f} are free; set HF_HOME")


def check_messages(path: Path, file: Path) -> None:
    """Raise UserError for the first line of a chat file that would train nothing, or not what it says."""
    rows.check_regular_file(file)
    number = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{file.relative_to(ROOT) if file.is_relative_to(ROOT) else file}:{number}"
            try:
                messages = json.loads(line.decode("utf-8"))["messages"]
                turns = [(turn["role"], turn["content"]) for turn in messages]
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(
                    f'{where}: not a row of {{"messages": [{{"role", "content"}}, ...]}}; mend it'
                ) from error
            if not turns or turns[-1][0] != "assistant" or any(not isinstance(text, str) for _, text in turns):
                raise UserError(f"{where}: the last message must be the assistant's, and every content a string")
            if not turns[-1][1].strip():
                raise UserError(f"{where}: the answer is empty; fill it in or remove the row")
    if not number:
        raise UserError(f"{file}: holds no rows; recipe {path} has nothing to train on")


def check_adapter(recipe: dict[str, Any], out: Path, metrics: dict[str, Any]) -> dict[str, Any]:
    """Hold the saved adapter against the recipe; return its file, size and SHA-256. UserError names the key."""
    from safetensors import SafetensorError, safe_open

    config = read_json(out / "adapter_config.json") or {}
    expected = {
        "r": recipe["lora_r"],
        "lora_alpha": recipe["lora_alpha"],
        "lora_dropout": recipe["lora_dropout"],
        "use_dora": recipe["peft_use_dora"],
        "use_rslora": recipe["peft_use_rslora"],
        "target_modules": sorted(recipe["lora_target_modules"]),
    }
    for key, value in expected.items():
        found = config.get(key)
        found = sorted(found) if isinstance(found, list) else found
        if found != value:
            raise UserError(
                f"{out}/adapter_config.json: key '{key}' is {found}, the recipe says {value}; do not use it"
            )
    kind = "Linear8bitLt" if recipe["load_in_8bit"] else "Linear4bit" if recipe["load_in_4bit"] else "Linear"
    if set(metrics["base_layers"]) != {kind}:
        raise UserError(f"{out}: trained on {metrics['base_layers']}, the recipe says {kind}; do not use it")
    file = out / "adapter_model.safetensors"
    try:
        with safe_open(file, "pt") as tensors:
            names = list(tensors.keys())
            ranks = {tensors.get_slice(name).get_shape()[0] for name in names if name.endswith("lora_A.weight")}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read ({error}); train again with FORCE=1") from error
    dora = any(name.endswith("lora_magnitude_vector") for name in names)
    if ranks != {recipe["lora_r"]} or dora != recipe["peft_use_dora"]:
        raise UserError(f"{file}: ranks {sorted(ranks)}, magnitudes {dora}: not what the recipe says; do not use it")
    return {"file": str(file.relative_to(ROOT)), "bytes": file.stat().st_size, "sha256": sha256(file)}


def data_files(recipe: dict[str, Any]) -> list[str]:
    entries = [*recipe.get("datasets", []), *recipe.get("test_datasets", [])]
    return [entry["path"] for entry in entries]


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
