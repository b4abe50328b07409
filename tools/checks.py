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


def memory_parts(recipe: dict[str, Any], shape: dict[str, Any]) -> dict[str, float]:
    """GiB that training takes on one GPU at its peak, by what takes them; their sum is `memory_estimate`.

    weights: at their bits, embeddings and head in 16 bits. adapter: with gradients and two moments in float32.
    activations: in 16 bits what each layer keeps for the backward pass (or its input alone, with gradient
    checkpointing, and one layer in full), and what one layer's backward pass needs besides. logits: of answers, taken
    as one token in 32.
    """
    hidden, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    linears = recipes.linear_layers(shape)
    bits = 8 if recipe.get("load_in_8bit") else 4.13 if recipe.get("load_in_4bit") else 16
    tables = shape["vocab_size"] * hidden * (1 if shape.get("tie_word_embeddings") else 2)
    linear = sum(i * o for i, o in linears.values()) * layers
    tokens = recipe["sequence_len"] * recipe["micro_batch_size"]
    targets = recipe["lora_target_modules"]
    # Kept: two norms' inputs, the first one's output, q, k, v, the attention's output, gate and up; by adapters the
    # inputs that nothing else keeps, and under DoRA each product before it is scaled.
    one_layer = 5 * hidden + 2 * linears["k_proj"][1] + 2 * inner
    one_layer += hidden * bool({"gate_proj", "up_proj"} & set(targets)) + inner * ("down_proj" in targets)
    if recipe.get("peft_use_dora"):
        one_layer += sum(linears[name][1] for name in targets)
    kept = one_layer + hidden * layers if recipe.get("gradient_checkpointing") else one_layer * layers
    positions = tokens / 32 if recipe.get("fastdora_answers_only") else tokens
    parts = {
        "weights": linear * bits / 8 + tables * 2,
        "adapter": recipes.trainable_parameters(recipe, shape) * 16,
        "activations": tokens * (kept + 3 * inner) * 2,
        "logits": positions * shape["vocab_size"] * 10,
    }
    return {name: size / GIB for name, size in parts.items()}


def memory_estimate(recipe: dict[str, Any], shape: dict[str, Any]) -> float:
    """GiB that training takes on one GPU at its peak; within 5% of bench/train_throughput.json."""
    return sum(memory_parts(recipe, shape).values())


def what_fits(
    recipe: dict[str, Any],
    shape: dict[str, Any],
    free: float,
    written: dict[str, Any] | None = None,
    longest: int = 0,
) -> str:
    """The keys to set so that the recipe takes at most `free` GiB: recomputation, then shorter packs, more a step.

    written: the recipe as its file has it, where `recipe` is what several GPUs make of it; a step keeps its tokens.
    longest: the longest row's tokens, where they are known; a shorter pack would be refused it.
    """
    changes: dict[str, Any] = {"gradient_checkpointing": True}
    length, written = recipe["sequence_len"], written or recipe
    a_step = written["sequence_len"] * written["gradient_accumulation_steps"]
    while memory_estimate(recipe | changes, shape) > free and length // 2 >= max(512, longest):
        length //= 2
        changes |= {"sequence_len": length, "gradient_accumulation_steps": a_step // length}
    new = {key: value for key, value in changes.items() if written.get(key) != value}
    if memory_estimate(recipe | changes, shape) > free:
        return "take a recipe of fewer bits"
    return "set " + " and ".join(f"{key}: {str(value).lower()}" for key, value in new.items())


def on_cpu(shape: dict[str, Any]) -> bool:
    """Whether a base model of this shape is small enough to train on a CPU."""
    matrices = sum(inputs * outputs for inputs, outputs in recipes.linear_layers(shape).values())
    return matrices * shape["num_hidden_layers"] < 100_000_000


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
    if on_cpu(shape):
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
        raise UserError(
            f"{path}: needs about {need:.0f} GiB and {name} has {free:.0f} of {total:.0f} free; free the GPU, or "
            f"{what_fits(recipe, shape, free)}"
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


def check_places(path: Path, recipe: dict[str, Any]) -> None:
    """UserError for a path of the recipe that leads out of this repository, through `..`, a link, or from the root.

    What is written lies in outputs/. A base model may lie anywhere: it is read alone, and as safetensors.
    """
    for key in ("output_dir", "dataset_prepared_path"):
        if not (ROOT / recipe[key]).resolve().is_relative_to((ROOT / "outputs").resolve()):
            raise UserError(f"{path}: key '{key}': {recipe[key]} is not in outputs/; name a folder there")
    read = [(kind, name) for kind in ("datasets", "test_datasets") for name in data_files({kind: recipe.get(kind, [])})]
    read += [(key, recipe[key]) for key in ("chat_template_jinja", "deepspeed") if isinstance(recipe.get(key), str)]
    for key, name in read:
        if key == "chat_template_jinja" and not name.endswith((".jinja", ".jinja2", ".j2")):
            continue  # the template itself
        places = (
            ROOT,
            ROOT / "data",
            ROOT / "data" / "raw",
            ROOT / "data" / "prepared",
        )  # each may be a link or a mount
        if not any((ROOT / name).resolve().is_relative_to(place.resolve()) for place in places):
            raise UserError(f"{path}: key '{key}': {name} leads out of the repository; copy it to data/")


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
