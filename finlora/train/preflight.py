"""What `make train` checks: the device, the disk and the rows before a run, the adapter after it."""

import json
import shutil
from pathlib import Path
from typing import Any

from finlora.core import machine
from finlora.core.errors import UserError
from finlora.core.files import read_json, sha256
from finlora.core.machine import GIB
from finlora.core.paths import PREPARED, RAW, ROOT
from finlora.data import rows
from finlora.recipes import bases
from finlora.recipes.memory import memory_estimate, on_cpu, what_fits


def check_device(path: Path, recipe: dict[str, Any], wanted: int = 0) -> bool:
    """Whether the recipe needs a GPU; UserError when it does and there is none, or none with enough memory.

    wanted: how many there must be whatever the model's size. Several processes, and DeepSpeed, need a GPU each: on a
    CPU accelerate would start every process for itself, without a word.
    """
    shape = bases.shape(recipe["base_model"])
    if wanted > len(machine.gpus()):
        raise UserError(
            f"GPUS={wanted}: several processes and DeepSpeed need a GPU each, and {len(machine.gpus())} are here"
        )
    if shape is None:
        return bool(machine.gpus())
    if on_cpu(shape):
        return False
    need = memory_estimate(recipe, shape)
    found = machine.gpus()
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
    shape = bases.shape(recipe["base_model"])
    adapter = 16 * bases.trainable_parameters(recipe, shape) if shape else GIB
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
            RAW,
            PREPARED,
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
