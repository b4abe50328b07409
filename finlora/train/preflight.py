"""What `make train` checks before a run: the device, the data files and their rows, the disk."""

import json
import shutil
from pathlib import Path

from finlora.core import machine
from finlora.core.errors import UserError
from finlora.core.machine import GIB
from finlora.core.paths import PREPARED, ROOT, SAMPLE
from finlora.data import prepare, rows
from finlora.data.tasks import load_tasks
from finlora.recipes.bases import parameters
from finlora.recipes.memory import what_fits
from finlora.recipes.names import option
from finlora.recipes.recipe import Recipe
from finlora.train.base_model import check_base
from finlora.train.distributed import Launch

BASE_SIZE = 17  # GiB, Llama-3.1-8B's files in 16 bits with a little to spare: for a base model of unknown sizes


def preflight(recipe: Recipe, launch: Launch, small: bool, trained: bool) -> tuple[bool, str]:
    """Everything that can be checked or prepared before axolotl starts: (whether the run needs a GPU, rows' origin).

    recipe: as run. trained: it is finished already, so that nothing will be written. The first node alone writes data.
    """
    # Ray's GPUs may be on other machines; it waits until it has them.
    needs_gpu = launch.ray or check_device(recipe, launch.gpus_needed)
    if not trained:
        check_base(recipe)
    origin = prepare_data(recipe, small)
    if not trained and not launch.rank:
        check_disk(recipe, needs_gpu and not any(recipe.base_folder.glob("*.safetensors")))
    return needs_gpu, origin


def check_device(recipe: Recipe, gpus_needed: int = 0) -> bool:
    """Whether the recipe needs a GPU; UserError when it does and there is none, or none with enough memory.

    gpus_needed: how many there must be whatever the model's size. On a CPU accelerate would start every process of a
    distributed run for itself, without a message.
    """
    gpus = machine.gpus()
    if gpus_needed > len(gpus):
        raise UserError(
            f"GPUS={gpus_needed}: several processes and DeepSpeed need a GPU each, and {len(gpus)} are here"
        )
    if recipe.shape is None:
        return bool(gpus)
    if recipe.on_cpu:
        return False
    need = recipe.memory
    if not gpus:
        name = option(recipe.path)
        raise UserError(
            f"{name} needs a GPU with about {need:.0f} GiB and none is here; try `make demo`, or this recipe on a "
            f"tiny model: make train RECIPE={name} TINY=1"
        )
    name, total, free = min(gpus[: gpus_needed or 1], key=lambda gpu: gpu[2])
    if free < need:
        raise UserError(
            f"{recipe.path}: needs about {need:.0f} GiB and {name} has {free:.0f} of {total:.0f} free; free the GPU, "
            f"or {what_fits(recipe.keys, recipe.shape, free)}"
        )
    return True


def check_disk(recipe: Recipe, fetches_base: bool) -> None:
    """UserError when tokens, checkpoints or a base model that is still to be fetched would not fit on the disk."""
    # 16 bytes a trained parameter: it, its gradient and two moments of the optimizer, in float32.
    checkpoint = 16 * recipe.trainable_parameters if recipe.shape else GIB
    # Eight bytes a byte of text: ids, labels, mask and positions of some four bytes of text each, in 64 bits.
    tokens = 8 * sum((ROOT / name).stat().st_size for name in recipe.data_files)
    # The checkpoints that are kept, one being written and the adapter; and a quarter of a GiB for logs and curves.
    need = tokens + checkpoint * (recipe.keys.get("save_total_limit", 4) + 2) + GIB // 4
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
    return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.is_dir())).free


def prepare_data(recipe: Recipe, small: bool) -> str:
    """Bring every data file of the recipe up to date; return where the rows come from: raw, sample or own.

    A TINY run on a task that is not fetched takes the sample rows, and points the recipe at them. Every line of files
    that are not ours is read before anything is loaded, so that a malformed one is named.
    """
    origin = "own"
    for kind in ("datasets", "test_datasets"):
        for entry in recipe.keys.get(kind, []):
            file = Path(entry["path"])
            if file.parts[:2] != ("data", "prepared") or file.parts[2] not in load_tasks():
                check_messages(recipe.path, ROOT / file)
                continue
            task, out = file.parts[2], ROOT / file.parent
            stale = prepare.why_stale(task, out=out)
            if small and stale:
                out = PREPARED / "sample" / task
                if prepare.why_stale(task, SAMPLE, out):
                    # Enough rows to fill one pack of the validation set, and no more: each validation reads them all.
                    share = 0.02 if "sentiment" in (load_tasks()[task].mixture_of or [task]) else 0.2
                    prepare.prepare(task, SAMPLE, out, prepare.Options(validation=share))
                entry["path"] = str((out / file.name).relative_to(ROOT))
                origin = "sample"
            else:
                if stale:
                    prepare.refresh(task, out=out)
                origin = "raw"
            if not (ROOT / entry["path"]).is_file():
                raise UserError(f"{recipe.path}: key '{kind}': {entry['path']} is missing; run `make data TASK={task}`")
    return origin


def check_messages(path: Path, file: Path) -> None:
    """Raise UserError for the first line of a chat file that would train nothing, or not what it says."""
    rows.check_regular_file(file)
    labels = {label for task in load_tasks().values() for label in task.labels or ()}
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
                    f'{where}: not a row of {{"messages": [{{"role", "content"}}, ...]}}; fix it'
                ) from error
            if not turns or turns[-1][0] != "assistant" or any(not isinstance(text, str) for _, text in turns):
                raise UserError(f"{where}: the last message must be the assistant's, and every content a string")
            if fault := rows.fault_of("answer", turns[-1][1], labels):
                raise UserError(f"{where}: {fault}; correct it or remove the row")
    if not number:
        raise UserError(f"{file}: there are no rows in it; recipe {path} has nothing to train on")
