"""Training on a CPU: how long it will take, and what is refused."""

import psutil

from finlora.core.errors import UserError
from finlora.core.machine import GIB
from finlora.core.paths import ROOT
from finlora.core.progress import duration
from finlora.data.tasks import load_tasks
from finlora.recipes.bases import linear_parameters
from finlora.recipes.names import option
from finlora.recipes.recipe import Recipe

LIMIT = 2 * 3600  # seconds: a longer run wants a word from the user (CPU=1)
# A step's time to that of its matmuls at the measured rate: 1.5 on an EPYC of Zen 3 (33 of 49 GFLOP/s a core), 2.1 to
# 3.4 on one with AMX (310 GFLOP/s in float32), with SmolLM2.
OVERHEAD = 2
FLOAT32 = 2  # bytes for one in 16 bits: a CPU's activations


def check_cpu(recipe: Recipe, anyway: bool) -> None:
    """Say how long the recipe will take on this CPU; UserError where that is past LIMIT (unless `anyway`, CPU=1).

    Also where it does not fit the memory.
    """
    name, need, free = option(recipe.path), recipe.memory, psutil.virtual_memory().available / GIB
    none = f"{name} needs a GPU with about {max(1, need):.0f} GiB and none is here"
    instead = f"try `make demo`, or this recipe on a tiny model: make train RECIPE={name} TINY=1"
    if need * FLOAT32 > free:
        raise UserError(f"{none}; a CPU needs {need * FLOAT32:.0f} GiB of memory and {free:.0f} are free; {instead}")
    seconds, rate = cpu_seconds(recipe)
    takes = f"about {duration(seconds)}, by its matmuls of {rate / 1e9:.0f} GFLOP/s"
    if seconds > LIMIT and not anyway:
        raise UserError(f"{none}; this CPU takes {takes}; CPU=1 lets it, or {instead}")
    print(f"CPU       {takes}", flush=True)


def cpu_seconds(recipe: Recipe) -> tuple[float, float]:
    """(seconds that training takes on this CPU, about; FLOP/s of its matmuls).

    A token costs 2 FLOP a weight forward and 2 for the gradient of the inputs: the weights are frozen.
    """
    from fastdora.plugin.cpu import best_dtype, matmul_rates  # late: they import axolotl

    keys, shape = recipe.settings, recipe.shape
    passes = 3 if keys.get("gradient_checkpointing") else 2
    tokens = train_tokens(recipe) * (keys.get("num_epochs") or 1)
    if (steps := keys.get("max_steps") or 0) > 0:
        tokens = steps * keys["sequence_len"] * keys["micro_batch_size"] * keys["gradient_accumulation_steps"]
    rate = matmul_rates()[best_dtype(shape["hidden_size"])]
    return OVERHEAD * 2 * passes * linear_parameters(shape) * tokens / rate, rate


def train_tokens(recipe: Recipe) -> float:
    """About: four bytes each of the files that are there; what data/tasks.yaml says of the others."""
    tokens, table, shared = 0.0, load_tasks(), bool(recipe.keys.get("fastdora_shared_prefixes"))
    for entry in recipe.keys.get("datasets") or []:
        file = ROOT / entry["path"]
        task = table.get(file.parent.name)
        parts = [table[name] for name in task.mixture_of or [file.parent.name]] if task else []
        if file.is_file():
            whole, packed = (sum(part.row_tokens(each) or 0 for part in parts) for each in (False, shared))
            tokens += file.stat().st_size / 4 * (packed / whole if whole else 1)
        else:
            tokens += sum((part.train_rows or part.train_rows_about) * part.row_tokens(shared) for part in parts)
    return tokens
