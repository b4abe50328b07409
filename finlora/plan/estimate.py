"""What a run will take, before it begins: parameters, memory, samples, tokens, steps, time and cost (`make plan`).

    finlora plan sentiment_r8_dora [--gpu a100-80g] [--gpus 4] [--price 2.50]

Parameters are counted on the model itself, built without memory. Memory is finlora/recipes/memory.py's estimate. Time
is work over rates: products, attention and memory traffic, each over the GPU's own rate (finlora/plan/gpus.yaml), and
the launches of each layer, times four factors that are fitted to the records finlora/plan/train_throughput*.json
whenever this runs.
"""

import bisect
import difflib
import json
import logging
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastdora.plugin.keys import RecipeError, read_recipe
from finlora.core import machine
from finlora.core.errors import UserError
from finlora.core.paths import ROOT
from finlora.data.audit import tokenizer_of
from finlora.data.tasks import load_tasks
from finlora.recipes import bases
from finlora.recipes import load as recipes
from finlora.recipes import memory as recipes_memory
from finlora.recipes import names as recipe_names
from finlora.train import distributed

GPUS = Path(__file__).with_name("gpus.yaml")
MEASURED = sorted(Path(__file__).parent.glob("train_throughput*.json"))  # one machine each
FIGURES = ("step_s", "peak_gib", "tokens_s", "slots_s", "samples_s")  # of a recorded run
SAMPLE = 2000  # rows whose tokens are counted
SPARE = 0.93  # of a card's memory: the driver, the libraries and fragments take the rest
# Seconds for a second of work at the data sheet's rates (products, attention, traffic), and milliseconds for a layer's
# launches: about what a profile of one step on an H100 showed. A factor of twice that weighs as much as a recorded run
# whose time is off by FIRM, so that a few runs cannot pull the factors to where no GPU is.
EXPECTED, FIRM = np.array([1.33, 3.0, 1.3, 0.3]), 0.1


class Rows(NamedTuple):
    """A recipe's rows: how many train and how many validate, tokens of some or all of them, and where that is from."""

    train: int
    validation: int
    tokens: list[int]
    source: str


class Measured(NamedTuple):
    """A recorded run: its name in bench/train_throughput.yaml, GPU as the driver says it, recipe, and recorded row."""

    name: str
    device: str
    recipe: dict[str, Any]
    row: dict[str, Any]


class Rates(NamedTuple):
    """The factors of `work`, the GPUs and the runs they are from, and the largest relative errors on those.

    error: of a run's time when the factors are fitted without it, on whichever machine. memory_error: of its peak.
    """

    factors: np.ndarray
    gpus: list[str]
    runs: int
    error: float
    memory_error: float


def known_gpus() -> dict[str, dict[str, Any]]:
    """finlora/plan/gpus.yaml; UserError that names the GPU and the key where it has been edited to what a plan cannot
    use."""
    try:
        table = {str(name): entry for name, entry in read_recipe(GPUS).items()}
    except RecipeError as error:
        raise UserError(str(error)) from error
    for name, entry in table.items():
        for key, (wanted, fits) in OF_A_GPU.items():
            value = entry.get(key) if isinstance(entry, dict) else None
            if not fits(value):
                raise UserError(f"{GPUS}: {name}: key '{key}' is {json.dumps(value, default=str)}; write {wanted}")
    return table


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


OF_A_GPU = {
    **{key: ("a number above 0", _is_rate) for key in ("memory", "tflops", "bandwidth")},
    "fp8": ("true or false", lambda value: isinstance(value, bool)),
    "names": (
        "a list, as the driver says them",
        lambda value: isinstance(value, list) and value and all(isinstance(name, str) for name in value),
    ),
}


def find_gpu(name: str | None) -> tuple[str, dict[str, Any]]:
    """A GPU of the table by its short name or the driver's; without one the GPU that is here, else the measured one."""
    table, here = known_gpus(), machine.gpus()
    wanted = name or (here[0][0] if here else measured_device())
    for key, entry in table.items():
        if wanted.lower() in (key, *(other.lower() for other in entry["names"])):
            return key, entry
    begins = [key for key in table if wanted and key.startswith(wanted.lower())]
    near = begins or difflib.get_close_matches(wanted.lower(), table, 1)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UserError(f"GPU={wanted}: {hint}finlora/plan/gpus.yaml has {', '.join(table)}; add a line for another")


def measured_device() -> str:
    return measured_runs()[0].device


def is_modelled(recipe: dict[str, Any]) -> bool:
    """Whether the factors are meant for such a recipe: one with the fast layers."""
    return recipe.get("fastdora_layers") == "fast"


def measured_runs() -> list[Measured]:
    """The recorded runs that `is_modelled`, of all machines. UserError where a record is damaged, or none is there."""
    runs = []
    for record in MEASURED:
        try:
            found = json.loads(record.read_text(encoding="utf-8"))
            for name, row in found["rows"].items():
                recipe = read_recipe(recipe_names.RECIPES / f"{row['recipe']}.yaml") | row["set"]
                for key in recipe.pop("drop", []):
                    recipe.pop(key, None)
                if "step_s" in row and is_modelled(recipe):
                    if not all(row[figure] > 0 for figure in FIGURES):
                        raise ValueError(f"{name}: a figure is 0")
                    runs.append(Measured(name, found["device"], recipe, row))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecipeError) as error:
            raise UserError(f"{record}: is not a recorded result ({error!r}); restore it from git") from error
    if len({run.name for run in runs}) < 2:
        raise UserError(
            "finlora/plan/train_throughput*.json: hold no runs to take a plan's rates from; restore them from git"
        )
    return runs


def work(
    recipe: dict[str, Any], shape: dict[str, Any], gpu: dict[str, Any], length: float, fill: float, train: bool = True
) -> np.ndarray:
    """Seconds of one step at a GPU's data-sheet rates: products, attention and memory traffic; and launches in ms.

    length: tokens that a token's row has, on average. fill: the share of a pack that is not padding. train=False: one
    forward pass instead of a step. A step is gradient_accumulation_steps micro-batches.
    """
    linears, layers = bases.linear_layers(shape), shape["num_hidden_layers"]
    hidden, inner, kv = shape["hidden_size"], shape["intermediate_size"], linears["k_proj"][1]
    matrices = sum(inputs * outputs for inputs, outputs in linears.values()) * layers
    again = bool(recipe.get("gradient_checkpointing"))
    forwards, backwards = (1 + again, 1) if train else (1, 0)
    passes = forwards + backwards  # frozen weights: backward is one product as well
    slots = recipe["sequence_len"] * recipe["micro_batch_size"]
    answers = slots / 32 if recipe.get("fastdora_answers_only") else slots
    fp8 = bool(recipe.get("fastdora_fp8"))  # at twice the rate; the head stays in 16 bits
    products = 2 * matrices * slots * passes / (1 + fp8)
    products += 2 * answers * hidden * shape["vocab_size"] * (1 + backwards)
    attention = 2 * slots * fill * length * hidden * layers * (forwards + 2.5 * backwards)
    # What a token reads and writes outside the products, in numbers of 16 bits: norms, residual sums, rotary positions,
    # attention's own, the MLP's gate; then the adapted layers.
    forward = 12 * hidden + 4 * kv + 3 * inner
    backward = 21 * hidden + 6 * kv + 5 * inner
    dora = bool(recipe.get("peft_use_dora"))
    for name in recipe["lora_target_modules"]:
        inputs, outputs = linears[name]
        forward += inputs + 2 * outputs
        backward += 3 * inputs + (2 + 2 * dora) * outputs
    traffic = 2 * slots * layers * (forward * forwards + backward * backwards)
    # Widened weights are read and written: 8 bits to 16, 4 bits to 16. DoRA's norms read theirs once a step.
    widening = 3 if recipe.get("load_in_8bit") else 2.5 if recipe.get("load_in_4bit") else 0
    traffic += widening * matrices * passes
    # Two CUDA graphs launch all layers at once.
    launches = 0 if recipe.get("fastdora_graphs") and train and not again else layers * passes
    micro_batches = recipe["gradient_accumulation_steps"] if train else 1
    rates = np.array([gpu["tflops"] * 1e12, gpu["tflops"] * 1e12, gpu["bandwidth"] * 1e9, 1e3])
    return micro_batches * np.array([products, attention, traffic, launches]) / rates


def fit(rows: list[np.ndarray], seconds: list[float]) -> np.ndarray:
    """The factors that make `work` the measured seconds, relative errors squared, drawn to EXPECTED by FIRM."""
    shares = np.array(rows) / np.array(seconds)[:, None]
    left = np.vstack([shares, np.diag(FIRM / EXPECTED)])
    right = np.concatenate([np.ones(len(shares)), np.full(len(EXPECTED), FIRM)])
    return np.linalg.lstsq(left, right, rcond=None)[0].clip(min=0)


def measured_rates() -> Rates:
    """Factors from the recorded runs, all of the 8B shape."""
    runs, rows, memory_errors, keys = measured_runs(), [], [], []
    for _, device, recipe, row in runs:
        key, gpu = find_gpu(device)
        shape = bases.shape(recipe["base_model"])
        rows.append(work(recipe, shape, gpu, row["tokens_s"] / row["samples_s"], row["tokens_s"] / row["slots_s"]))
        memory_errors.append(abs(recipes_memory.memory_estimate(recipe, shape) / row["peak_gib"] - 1))
        keys.append(key)
    seconds = [run.row["step_s"] for run in runs]
    errors = []
    for left_out, row, measured in zip(runs, rows, seconds, strict=True):
        others = [number for number, other in enumerate(runs) if other.name != left_out.name]
        factors = fit([rows[number] for number in others], [seconds[number] for number in others])
        errors.append(abs(float(row @ factors) / measured - 1))
    return Rates(fit(rows, seconds), sorted(set(keys)), len(rows), max(errors), max(memory_errors))


def parameters(recipe: dict[str, Any], shape: dict[str, Any]) -> dict[str, tuple[int, int, int]]:
    """Trainable parameters by target module: (layers, in A and B, in DoRA's magnitudes), counted on PEFT's own model.

    The model is built on torch's meta device: shapes without memory.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # bitsandbytes, which PEFT imports, would look for kernels there
    logging.disable(logging.WARNING)  # and says that it found none
    try:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoConfig, AutoModelForCausalLM
    finally:
        logging.disable(logging.NOTSET)
    adapter = LoraConfig(
        r=recipe["lora_r"],
        lora_alpha=recipe["lora_alpha"],
        target_modules=recipe["lora_target_modules"],
        use_dora=bool(recipe.get("peft_use_dora")),
        use_rslora=bool(recipe.get("peft_use_rslora")),
        task_type="CAUSAL_LM",
    )
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{"model_type": "llama"} | shape))
        model = get_peft_model(base, adapter)
    found = {name: [0, 0, 0] for name in recipe["lora_target_modules"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            target, kind = name.split(".")[-4:-2]  # q_proj.lora_A.default.weight
            found[target][0] += kind == "lora_A"
            found[target][2 if kind == "lora_magnitude_vector" else 1] += parameter.numel()
    return {target: tuple(counts) for target, counts in found.items()}


def rows_of(path: Path, recipe: dict[str, Any]) -> Rows:
    """The recipe's rows from its prepared files where they are there, else from data/tasks.yaml's figures.

    UserError names what is missing for a recipe on rows that are in neither.
    """
    files = {kind: [ROOT / entry["path"] for entry in recipe.get(kind) or []] for kind in ("datasets", "test_datasets")}
    if not all(file.is_file() for file in files["datasets"]):
        return rows_of_task(path, files["datasets"])
    counts = {
        kind: [sum(1 for _ in file.open("rb")) for file in found if file.is_file()] for kind, found in files.items()
    }
    train, validation = sum(counts["datasets"]), sum(counts["test_datasets"])
    if not train:
        raise UserError(f"{path}: key 'datasets': its files hold no rows")
    lines = [line for file in files["datasets"] for line in lines_of(file, -(-train // SAMPLE))]
    texts = []
    for number, line in enumerate(lines, 1):
        try:
            turns = json.loads(line)["messages"]
            texts.append(
                "".join(
                    f"<|start_header_id|>{t['role']}<|end_header_id|>\n\n{t['content'].strip()}<|eot_id|>"
                    for t in turns
                )
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: key 'datasets': row {number} is not one of messages; `make train` says which"
            ) from error
    folder = tokenizer_of(recipe["base_model"])
    names = ", ".join(os.path.relpath(file, ROOT) for file in files["datasets"])
    if folder:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json" if folder.is_dir() else folder))
        tokens = [len(encoding.ids) + 1 for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        how = f"{len(tokens):,} rows counted by the base model's tokenizer"
    else:
        tokens = [math.ceil(len(text) / 4) for text in texts]
        how = "a token taken as 4 characters, since the base model's tokenizer is not here"
    return Rows(train, validation, tokens, f"{names}; {how}")


def lines_of(file: Path, step: int) -> list[bytes]:
    """Each `step`th line, from the first on."""
    with file.open("rb") as lines:
        return [line for number, line in enumerate(lines) if number % step == 0]


def rows_of_task(path: Path, files: list[Path]) -> Rows:
    """What data/tasks.yaml says of a task's rows; a mixture as `make data` builds it from its tasks."""
    table = load_tasks()
    missing = next(file for file in files if not file.is_file())
    task = missing.parent.name
    if missing.parent.parent != ROOT / "data" / "prepared" or task not in table:
        raise UserError(
            f"{path}: key 'datasets': {missing} is missing, and its rows are needed to plan; bring it there"
        )
    parts = [table[name] for name in table[task].mixture_of or [task]]
    largest = max(part.train_rows or part.train_rows_about for part in parts)
    rows = largest * len(parts)  # smaller tasks are repeated
    validation = round(rows * 0.02 / len(parts))
    tokens = [part.tokens_about for part in parts] * (SAMPLE // len(parts))
    return Rows(
        rows - validation, validation, tokens, f"data/tasks.yaml, about; `make data TASK={task}` brings the rows"
    )


def packs(tokens: list[int], length: int) -> int:
    """How many packs of `length` tokens hold these rows: the longest first, each where it leaves least room."""
    room: list[int] = []  # of the packs so far, in order
    for row in sorted((min(row, length) for row in tokens), reverse=True):
        place = bisect.bisect_left(room, row)
        left = room.pop(place) - row if place < len(room) else length - row
        bisect.insort(room, left)
    return len(room)


def course(
    recipe: dict[str, Any], shape: dict[str, Any], gpu: dict[str, Any], gpus: int, rows: Rows, factors: np.ndarray
) -> dict[str, Any]:
    """Samples, steps, and the seconds of one, of all validation and of the run; recipe: as `several.spread` has it.

    Without packing a batch is padded to its longest row; that this makes a third of it padding is a guess.
    """
    mean, micro, length = sum(rows.tokens) / len(rows.tokens), recipe["micro_batch_size"], recipe["sequence_len"]
    if recipe.get("sample_packing"):
        fill = sum(rows.tokens) / (packs(rows.tokens, length) * length)
        batches = rows.train * mean / (length * fill) / micro
    else:
        fill, batches, length = 2 / 3, rows.train / micro, math.ceil(mean * 1.5)
    each = recipe["gradient_accumulation_steps"] * gpus
    steps = whole = math.ceil(recipe["num_epochs"] * math.ceil(math.ceil(batches) / each))
    if (recipe.get("max_steps") or 0) > 0:  # then it is what is trained, of whatever number of epochs; -1 is none
        steps = recipe["max_steps"]
    epochs = recipe["num_epochs"] * steps / whole
    looks = (recipe.get("evals_per_epoch") or 0) * epochs
    if every := recipe.get("eval_steps"):
        looks = 1 / every if every < 1 else steps / every
    looks *= bool(recipe.get("test_datasets"))
    beside = sum(row * row for row in rows.tokens) / sum(rows.tokens)  # tokens in the row of a token
    own = recipe | {"sequence_len": length}
    if gpus > 1:
        own["fastdora_graphs"] = False  # as fastdora's plugin does
    step = float(work(own, shape, gpu, beside, fill) @ factors)
    forward = float(work(own, shape, gpu, beside, fill, train=False) @ factors)
    looking = looks * rows.validation * mean / (length * fill * micro * gpus) * forward
    return {
        "samples": round(rows.train * epochs),
        "steps": steps,
        "step_tokens": each * micro * length,
        "step": step,
        "looking": looking,
        "seconds": steps * step + looking,
    }


def make_plan(
    path: Path, recipe: dict[str, Any], gpu_name: str | None = None, gpus: int = 1, price: float | None = None
) -> dict[str, Any]:
    """Everything that `show` prints. UserError where the recipe cannot be planned, or GPUs cannot share its batch."""
    for key in ("adapter", "lora_r", "lora_target_modules"):
        if not recipe.get(key):
            raise UserError(f"{path}: key '{key}' is missing: plans are for recipes that train an adapter")
    shape = bases.shape(recipe["base_model"])
    if not shape:
        raise UserError(
            f"{path}: key 'base_model': the sizes of {recipe['base_model']} are not known here; add them to "
            "finlora/recipes/base_models.yaml, or run `make demo` for .cache/tiny"
        )
    recipes.check_targets(str(path), recipes.Recipe(path, recipe))
    key, gpu = find_gpu(gpu_name)
    if recipe.get("fastdora_fp8") and not gpu["fp8"]:
        raise UserError(
            f"{path}: key 'fastdora_fp8': {key} has no fp8 products; set it to false, or plan for another GPU"
        )
    for uncounted in ("lora_modules_to_save", "peft_layers_to_transform"):
        if recipe.get(uncounted):
            raise UserError(f"{path}: key '{uncounted}' is not planned for; remove it to plan without")
    shared, say = distributed.share_batch(path, recipe, gpus, 1)
    rows = rows_of(path, shared)
    rates = measured_rates()
    counted = parameters(recipe, shape)
    total = sum(own + magnitude for _, own, magnitude in counted.values())
    if total != bases.trainable_parameters(recipe, shape):
        raise UserError(
            f"{path}: key 'base_model': PEFT would train {total:,} parameters, finlora/recipes/load.py counts others"
        )
    warnings = []
    if max(rows.tokens) > shared["sequence_len"]:
        warnings = [
            f"           one of {max(rows.tokens):,} is longer than sequence_len {shared['sequence_len']:,}: refused"
        ]
    memory = recipes_memory.memory_parts(shared, shape)
    room = gpu["memory"] * SPARE
    return {
        "recipe": path.stem,
        "gpu": key,
        "names": gpu["names"],
        "gpus": gpus,
        "shared": say,
        "parameters": counted,
        "memory": memory,
        "card": gpu["memory"],
        "fits": sum(memory.values()) <= room,
        "change": recipes_memory.what_fits(shared, shape, room, recipe, max(rows.tokens)),
        "rows": rows,
        "mean": sum(rows.tokens) / len(rows.tokens),
        "warnings": warnings,
        **course(shared, shape, gpu, gpus, rows, rates.factors),
        "modelled": is_modelled(recipe),
        "rates": rates,
        "price": price,
    }


def show(plan: dict[str, Any]) -> str:
    lines = [f"{plan['recipe']} on {plan['gpus']} x {plan['gpu']} ({plan['names'][0]}, {plan['card']} GiB)"]
    if plan["shared"]:
        lines.append(plan["shared"])
    lines.append(f"\n{'trainable parameters':<24}{'layers':>8}{'A and B':>14}{'magnitude':>12}{'together':>14}")
    counted = plan["parameters"]
    for name, (layers, own, magnitude) in counted.items():
        lines.append(f"  {name:<22}{layers:>8}{own:>14,}{magnitude:>12,}{own + magnitude:>14,}")
    own, magnitude = (sum(counts[column] for counts in counted.values()) for column in (1, 2))
    lines.append(f"  {'all':<30}{own:>14,}{magnitude:>12,}{own + magnitude:>14,}")
    memory, rows, rates = plan["memory"], plan["rows"], plan["rates"]
    peak = sum(memory.values())
    fits = "fits" if plan["fits"] else f"does not fit: {plan['change']}"
    lines += [
        "\nmemory on each GPU, GiB",
        f"  weights {memory['weights']:.1f}, adapter with gradients and optimizer {memory['adapter']:.2f}, activations "
        f"{memory['activations']:.1f}, logits {memory['logits']:.1f}",
        f"  peak {peak:.1f} of {plan['card']}: {fits}",
        "\nrun",
        f"  rows     {rows.train:,} to train on, {rows.validation:,} to validate, {plan['mean']:.0f} tokens each",
        f"           ({rows.source})",
        *plan["warnings"],
        f"  samples  {plan['samples']:,} ({plan['samples'] * plan['mean'] / 1e6:.3g} million tokens)",
        f"  steps    {plan['steps']:,} of {plan['step_tokens']:,} tokens, {plan['step']:.3g} s each",
        f"  time     {duration(plan['seconds'])}, validation {duration(plan['looking'])} of it; loading not counted",
    ]
    hours = plan["seconds"] / 3600 * plan["gpus"]
    if plan["price"] is None:
        lines.append(f"  cost     {hours:.2f} GPU-hours; PRICE=<of one> says what they cost")
    else:
        lines.append(f"  cost     {hours * plan['price']:.2f} for {hours:.2f} GPU-hours at {plan['price']:g}")
    basis = f"\nHeld against {rates.runs} runs measured on {' and '.join(rates.gpus)}: memory within "
    basis += f"{rates.memory_error:.0%}, time within {rates.error:.0%} of each when the rates are taken from the others"
    if plan["gpu"] not in rates.gpus:
        basis += f"; on {plan['gpu']} time is scaled by the data sheets' rates, a guess"
    if plan["gpus"] > 1:
        basis += "; that GPUs do not wait for each other is a guess"
    if not plan["modelled"]:
        basis += "; all of them with fastdora_layers: fast, so this recipe takes several times as long, and its memory "
        basis += "is a guess"
    return "\n".join([*lines, basis + "."])


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def run(recipe: str, gpu: str | None, gpus: str, price_text: str | None) -> None:
    """Print the plan of a recipe."""
    if not gpus.isdecimal() or not 0 < int(gpus) <= 4096:
        raise UserError(f"GPUS={gpus}: give a number from 1 to 4096")
    path = recipe_names.find(recipe)
    print(show(make_plan(path, recipes.load(path).keys, gpu, int(gpus), price(price_text))))


def price(text: str | None) -> float | None:
    try:
        value = None if text is None else float(text)
    except ValueError:
        value = math.nan
    if value is not None and not 0 <= value < math.inf:
        raise UserError(f"PRICE={text}: give a number, as in PRICE=2.50, the price of one GPU for an hour")
    return value
