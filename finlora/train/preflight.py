"""What `make train` checks before a run: the device, the data files and their rows, the disk, the base model.

What a recipe asks of its base model is told from configuration and tokenizer, before any weights are fetched.
"""

import difflib
import json
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from fastdora.plugin.checksums import WEIGHTS, model_files
from finlora.core import machine
from finlora.core.errors import UserError
from finlora.core.machine import GIB
from finlora.core.paths import PREPARED, ROOT, SAMPLE, existing, shown
from finlora.data import prepare, rows
from finlora.data.readers import check_regular_file
from finlora.data.tasks import load_tasks
from finlora.recipes.bases import EMBEDDINGS, layers_of, modules_of, parameters
from finlora.recipes.memory import memory_estimate, what_fits
from finlora.recipes.recipe import Recipe
from finlora.recipes.rules import ROWS
from finlora.train.cpu import check_cpu
from finlora.train.distributed import Launch, weight_share
from finlora.train.runs import RunFolder

BASE_SIZE = 17  # GiB, Llama-3.1-8B's files in 16 bits with a little to spare: for a base model of unknown sizes
# adapter_config.json's name of a recipe's key: what an adapter that is trained on must have, because PEFT takes them
# from it and ignores the recipe.
ADAPTER_KEYS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "peft_use_dora": "use_dora",
    "peft_use_rslora": "use_rslora",
    "lora_modules_to_save": "modules_to_save",
    "lora_rank_pattern": "rank_pattern",
    "lora_alpha_pattern": "alpha_pattern",
    "peft_layers_to_transform": "layers_to_transform",
    "peft_trainable_token_indices": "trainable_token_indices",
}


def preflight(recipe: Recipe, launch: Launch, trained: bool) -> tuple[Recipe, bool, str]:
    """Check and prepare all that can be before axolotl starts: (recipe with its data, whether it needs a GPU, origin).

    recipe: as run. trained: it is finished already, so that nothing will be written. The first node alone writes data.
    origin: of the rows, as `prepare_data` says.
    """
    # Ray's GPUs may be on other machines; it waits until it has them.
    needs_gpu = launch.ray or check_device(recipe, launch.gpus_needed, launch.cpu, launch.processes)
    if not trained:
        check_base(recipe)
    recipe, origin = prepare_data(recipe)
    if not trained and not launch.rank:
        check_disk(recipe, needs_gpu and not any(recipe.base_folder.glob("*.safetensors")))
    return recipe, needs_gpu, origin


def check_device(recipe: Recipe, gpus_needed: int = 0, cpu: bool = False, processes: int = 1) -> bool:
    """Whether the recipe takes a GPU; UserError where there is none with enough memory, or a CPU would take too long.

    gpus_needed: how many there must be whatever the model's size. On a CPU accelerate would start every process of a
    distributed run for itself, without a message. cpu: it may take as long as it takes. processes: on all nodes, among
    which ZeRO-3 and FSDP2 share out the weights.
    """
    gpus = machine.gpus()
    if gpus_needed > len(gpus):
        raise UserError(
            f"GPUS={gpus_needed}: several processes and DeepSpeed need a GPU each, and {len(gpus)} are here"
        )
    if recipe.shape and recipe.on_cpu:
        return False
    if gpus and (fault := machine.driver_fault()):
        raise UserError(f"{recipe.path}: {fault}")
    if recipe.shape is None:
        return bool(gpus)
    if not gpus:
        check_cpu(recipe, cpu)
        return False
    share = weight_share(recipe.path, recipe.settings, processes)
    need = memory_estimate(recipe.settings, recipe.shape, share)
    name, total, free = min(gpus[: gpus_needed or 1], key=lambda gpu: gpu[2])
    if free < need:
        raise UserError(
            f"{recipe.path}: needs about {need:.0f} GiB and {name} has {free:.0f} of {total:.0f} free; free the GPU, "
            f"or {what_fits(recipe.settings, recipe.shape, free, share=share)}"
        )
    return True


def check_disk(recipe: Recipe, fetches_base: bool) -> None:
    """UserError when tokens, checkpoints or a base model that is still to be fetched would not fit on the disk."""
    # 16 bytes a trained parameter: it, its gradient and two moments of the optimizer, in float32.
    checkpoint = 16 * recipe.trainable_parameters if recipe.shape else GIB
    # Eight bytes a byte of text: ids, labels, mask and positions of some four bytes of text each, in 64 bits.
    tokens = 8 * sum((ROOT / name).stat().st_size for name in recipe.data_files)
    # The checkpoints that are kept, one being written and the adapter; and a quarter of a GiB for logs and curves.
    need = tokens + checkpoint * (recipe.settings.get("save_total_limit", 4) + 2) + GIB // 4
    if (free := free_space(recipe.output_folder)) < need:
        raise UserError(
            f"{recipe.output_folder}: {need / GIB:.1f} GiB are needed for tokens and checkpoints and {free / GIB:.1f} "
            "are free"
        )
    if fetches_base:
        from huggingface_hub import constants  # a second of start-up that most runs spare

        cache = Path(constants.HF_HUB_CACHE)
        size = 2.2 * parameters(recipe.shape) / GIB if recipe.shape else BASE_SIZE  # 16 bits and a tenth to spare
        if (free := free_space(cache) / GIB) < size:
            base = recipe.keys["base_model"]
            raise UserError(f"{cache}: {base} takes {size:.0f} GiB and {free:.1f} are free; set HF_HOME")


def free_space(folder: Path) -> int:
    """Bytes free where the folder is or would be."""
    return shutil.disk_usage(existing(folder)).free


def prepare_data(recipe: Recipe) -> tuple[Recipe, str]:
    """Bring every data file of the recipe up to date: (the recipe with its files, where rows come from).

    A TINY run on a task that is not fetched takes the sample rows, and the recipe then names those. The rows are of
    FinLoRA's files (raw), of the sample, or own; every line of own files is read before anything is loaded, so that a
    malformed one is named.
    """
    keys, origins = deepcopy(recipe.keys), {"own"}
    for kind in ROWS:
        for entry in keys.get(kind) or []:
            file = Path(entry["path"])
            if file.parts[:2] != ("data", "prepared") or file.parts[2] not in load_tasks():
                check_messages(recipe.path, ROOT / file)
                continue
            folder, origin = prepare_task(file.parts[2], ROOT / file.parent, recipe.tiny)
            origins.add(origin)
            if origin == "sample":
                entry["path"] = str((folder / file.name).relative_to(ROOT))
            if not (ROOT / entry["path"]).is_file():
                task = file.parts[2]
                raise UserError(f"{recipe.where(kind)}: {entry['path']} is missing; run `make data TASK={task}`")
    return replace(recipe, keys=keys), next(origin for origin in ("sample", "raw", "own") if origin in origins)


def prepare_task(task: str, folder: Path, tiny: bool) -> tuple[Path, str]:
    """(the folder with the task's up-to-date rows, raw or sample)."""
    stale = prepare.why_stale(task, out=folder)
    if not (tiny and stale) or load_tasks()[task].own:
        if stale:
            prepare.refresh(task, out=folder)
        return folder, "raw"
    folder = PREPARED / "sample" / task
    if prepare.why_stale(task, SAMPLE, folder):
        # Enough rows to fill one pack of the validation set, and no more: each validation reads them all.
        share = 0.02 if "sentiment" in (load_tasks()[task].mixture_of or [task]) else 0.2
        prepare.prepare(task, SAMPLE, folder, prepare.Options(validation=share))
    return folder, "sample"


def check_messages(path: Path, file: Path) -> None:
    """Raise UserError for the first line of a chat file that would train nothing, or not what it says."""
    check_regular_file(file)
    labels = {label for task in load_tasks().values() for label in task.labels or ()}
    number = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{shown(file)}:{number}"
            try:
                turns = [(turn["role"], turn["content"]) for turn in json.loads(line.decode("utf-8"))["messages"]]
                right = turns[-1][0] == "assistant" and all(isinstance(text, str) for _, text in turns)
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error
            except (ValueError, LookupError, TypeError, RecursionError):
                right = False
            if not right:
                form = """{"messages": [{"role", "content"}, ...]} whose last message is the assistant's"""
                raise UserError(f"{where}: not a row of {form}, and every content a string; fix it")
            if fault := rows.fault_of("answer", turns[-1][1], labels):
                raise UserError(f"{where}: {fault}; correct it or remove the row")
    if not number:
        raise UserError(f"{file}: there are no rows in it; recipe {path} has nothing to train on")


def check_base(recipe: Recipe) -> None:
    """Raise UserError where the base model or the first adapter cannot be trained as the recipe says."""
    check_config(recipe)
    check_vocabulary(recipe)
    if recipe.settings.get("lora_model_dir"):
        check_first_adapter(recipe)


def check_config(recipe: Recipe) -> None:
    """UserError where a language model of config.json's kind and size is not what the recipe trains."""
    keys, config = recipe.settings, recipe.base_config
    base = f"{recipe.where('base_model')}: {keys['base_model']}"
    if kinds := [kind for kind in config.get("architectures") or [] if not kind.endswith("ForCausalLM")]:
        raise UserError(f"{base} is a {kinds[0]}; take a model for causal language modelling")
    if config.get("quantization_config"):
        raise UserError(f"{base} is quantized already; take the 16-bit model, and load_in_8bit or load_in_4bit")
    if saved := keys.get("lora_modules_to_save"):
        check_saved(recipe.where("lora_modules_to_save"), saved, modules_of(base, config), config)
    longest = config.get("max_position_embeddings")
    if longest and not keys.get("sample_packing") and keys["sequence_len"] > longest:  # of a pack each row counts alone
        raise UserError(
            f"{recipe.where('sequence_len')} is {keys['sequence_len']}, and {keys['base_model']} has {longest} "
            f"positions; set it to {longest} or less"
        )
    layers = [] if keys.get("lora_target_linear") else recipe.layers or layers_of(base, config)
    for target in layers and keys["lora_target_modules"]:
        if target not in layers:
            raise UserError(f"{recipe.where('lora_target_modules')}: {target} is none of {', '.join(layers)}")


def check_saved(where: str, saved: list[str], modules: dict[str, Any], config: dict[str, Any]) -> None:
    """UserError for a name that PEFT would find in no module, or in embeddings that the base ties to its head."""
    for name in saved:
        named = [module for module in modules if module.endswith(name)]  # as PEFT (0.20.0) does
        if not named:
            parts = sorted({part for module in modules for part in (module, module.rpartition(".")[2])})
            near = difflib.get_close_matches(name, parts, 1) or sorted(EMBEDDINGS)
            raise UserError(f"{where}: {name} is no module of the base model; take one that is, {' or '.join(near)}")
        embeddings = [module for module in modules if module.rpartition(".")[2] in EMBEDDINGS]
        tied = [module for module in embeddings if any(f"{module}.".startswith(f"{part}.") for part in named)]
        if tied and config.get("tie_word_embeddings"):
            raise UserError(
                f"{where}: {name} is or contains {tied[0]}, and the base model ties its embeddings to its head: a "
                "merged model would lose one of them; remove it"
            )


def check_vocabulary(recipe: Recipe) -> None:
    """UserError for a token that the tokenizer does not have: axolotl would add it, and grow the embeddings."""
    file = recipe.base_folder / "tokenizer.json"
    if not file.is_file():  # a tokenizer of another format; axolotl's own checks come later
        return
    tokenizer, keys, base = Tokenizer.from_file(str(file)), recipe.settings, recipe.settings["base_model"]
    special = {f"special_tokens.{key}": value for key, value in (keys.get("special_tokens") or {}).items()}
    renamed = (keys.get("added_tokens_overrides") or {}).values()  # reserved tokens under other names
    for key, value in (special | {"eot_tokens": keys.get("eot_tokens")}).items():
        for token in value if isinstance(value, list) else [value]:
            if token is not None and token not in renamed and tokenizer.token_to_id(token) is None:
                added = [entry.content for entry in tokenizer.get_added_tokens_decoder().values()]
                near = difflib.get_close_matches(token, added, 1) or added[:3]
                raise UserError(
                    f"{recipe.where(key)}: {token} is no token of {base}; take one that is, {' or '.join(near)}"
                )
    size, count = recipe.base_config.get("vocab_size"), tokenizer.get_vocab_size()
    if size and count > size:
        raise UserError(
            f"{recipe.where('base_model')}: {base} has {count} tokens and embeddings for {size}, which training would "
            "not keep; take a model that has one for each"
        )


def check_first_adapter(recipe: Recipe) -> None:
    """UserError where `lora_model_dir` is no adapter folder, or its adapter is not what the recipe's keys say."""
    name, where = recipe.settings["lora_model_dir"], recipe.where("lora_model_dir")
    folder = RunFolder(ROOT / name)
    if folder.path.resolve().is_relative_to(recipe.output_folder.resolve()):
        raise UserError(
            f"{where}: {name} is the run's own folder; EPOCHS= goes on from a finished run, or copy the recipe under "
            "another name"
        )
    config = folder.adapter_config
    if not isinstance(config, dict) or not (folder.path / "adapter_model.safetensors").is_file():
        raise UserError(
            f"{where}: {name} has no adapter_config.json and adapter_model.safetensors; name an adapter's folder"
        )
    if differs := adapter_difference(recipe, config):
        key, named, expected, saved = differs
        raise UserError(
            f"{where}: {name} has {named} {saved}, and key '{key}' is {expected}; make them equal or name another "
            "adapter"
        )
    check_first_base(recipe, folder, config.get("base_model_name_or_path"))


def adapter_difference(recipe: Recipe, config: dict[str, Any]) -> tuple[str, str, Any, Any] | None:
    """The first of ADAPTER_KEYS whose value the adapter_config.json does not have: both names, both values."""
    keys = recipe.settings | {"lora_target_modules": recipe.targets}
    for key, name in ADAPTER_KEYS.items():
        values = keys.get(key), config.get(name)  # left out, they are as 0, false or empty
        expected, saved = ((sorted(it) if isinstance(it, list) else it) or None for it in values)
        if expected != saved:
            return key, name, *values
    return None


def check_first_base(recipe: Recipe, first: RunFolder, trained_on: str | None) -> None:
    """UserError where the first adapter was trained on another base: equal shapes load in silence.

    trained_on: the base in its adapter_config.json, whose weights are known by the checksums in its run.json, or lie
    here; equal ones may have another name. Of a hub's model that is still to be fetched, the name alone counts.
    """
    name, base = recipe.settings["lora_model_dir"], recipe.keys["base_model"]
    if not trained_on:
        return
    weights = (first.record or {}).get("start", {}).get(trained_on) or model_files(trained_on, WEIGHTS, ROOT)
    base_weights = model_files(base, WEIGHTS, ROOT)
    both = sorted(weights.keys() & base_weights.keys())
    changed = [file for file in both if weights[file] != base_weights[file]]
    same_name = trained_on == base or (ROOT / trained_on).resolve() == (ROOT / base).resolve()
    if changed or not (same_name or any(file.endswith(".safetensors") for file in both)):
        other = f", whose {', '.join(changed[:3])} differ" if changed else ""
        raise UserError(
            f"{recipe.where('lora_model_dir')}: {name} was trained on {trained_on}, and key 'base_model' is {base}"
            f"{other}; set base_model to the model that it was trained on, or name another adapter"
        )
