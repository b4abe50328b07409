"""What a run will take, before it begins: parameters, memory, samples, tokens, steps, time and cost (`make plan`).

    finlora plan sentiment_r8_dora [--gpu a100-80g] [--gpus 4] [--price 2.50]

Parameters are counted by finlora/recipes/bases.py, memory by finlora/recipes/memory.py. A step's time is its work at a
GPU's data-sheet figures (finlora/plan/gpus.yaml), times four factors that were fitted to the recorded runs
train_throughput*.json beside this file and are committed in step_time.yaml. `python -m finlora.plan.estimate` fits them
again after new runs are recorded; a test holds the table to the records.
"""

import bisect
import difflib
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from fastdora.plugin.keys import RecipeError, read_recipe
from finlora.core import machine
from finlora.core.errors import UserError
from finlora.core.files import replacing
from finlora.core.paths import ROOT
from finlora.data import tokens as data_tokens
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
STEP_TIME = Path(__file__).with_name("step_time.yaml")

# The model of a step's work. Traffic is what a token reads and writes outside the matmuls, in numbers of 16 bits.
ATTENTION_BACKWARD = 2.5  # flash attention's backward pass has five matmuls where the forward pass has two
LABEL_SHARE = 1 / 32  # of the positions have a label, and with fastdora_answers_only these alone meet the head
FP8_SPEEDUP = 2  # of a matmul, by the data sheets
DEQUANTIZE_BYTES = {8: 1 + 2, 4: 0.5 + 2, 16: 0}  # read and written for a weight, by its bits


class Traffic(NamedTuple):
    """Multiples of a layer's widths: norms, residual sums and rotary positions (hidden), attention's keys and values
    (kv), the MLP's gate (inner); and of each adapted matrix's inputs and outputs."""

    hidden: int
    kv: int
    inner: int
    adapted_inputs: int
    adapted_outputs: int


FORWARD, BACKWARD = Traffic(12, 4, 3, 1, 2), Traffic(21, 6, 5, 3, 2)
DORA_BACKWARD = 2  # more of an adapted matrix's outputs: they are read again for the magnitude's gradient


class Work(NamedTuple):
    """A step's work: seconds at the data sheet's figures of matmuls, attention and memory traffic, and thousands of
    layers launched. As factors: seconds for one of each."""

    matmul: float
    attention: float
    traffic: float
    launches: float

    def seconds(self, factors: "Work") -> float:
        return sum(one * factor for one, factor in zip(self, factors, strict=True))


# About what a profile of one step on an H100 showed. A factor of twice that weighs as much in the fit as a recorded run
# whose time is off by FIRM, so that a few runs cannot pull the factors to where no GPU is.
EXPECTED, FIRM = Work(matmul=1.33, attention=3.0, traffic=1.3, launches=0.3), 0.1


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


class Fit(NamedTuple):
    """Factors, the GPUs and the number of runs that they were fitted to, and the largest relative errors on those.

    time_error: of a run's time when the factors are fitted without it, on whichever machine. memory_error: of its peak.
    """

    factors: Work
    gpus: list[str]
    runs: int
    time_error: float
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
        raise UserError("finlora/plan/train_throughput*.json: hold no runs to fit a plan to; restore them from git")
    return runs


def work(
    recipe: dict[str, Any], shape: dict[str, Any], gpu: dict[str, Any], length: float, fill: float, train: bool = True
) -> Work:
    """A step's work, or that of one forward pass (train=False). A step is gradient_accumulation_steps micro-batches.

    length: tokens that a token's row has, on average. fill: the share of a pack that is not padding.
    """
    linears, layers, hidden = bases.linear_layers(shape), shape["num_hidden_layers"], shape["hidden_size"]
    weights = sum(inputs * outputs for inputs, outputs in linears.values()) * layers
    checkpointing = bool(recipe.get("gradient_checkpointing"))
    forwards, backwards = (1 + checkpointing, 1) if train else (1, 0)
    passes = forwards + backwards  # frozen weights have no gradient: a backward pass is one matmul as well
    tokens = recipe["sequence_len"] * recipe["micro_batch_size"]
    labels = tokens * (LABEL_SHARE if recipe.get("fastdora_answers_only") else 1)
    # Two operations for each weight and token; the head stays in 16 bits.
    matmul = 2 * weights * tokens * passes / (FP8_SPEEDUP if recipe.get("fastdora_fp8") else 1)
    matmul += 2 * labels * hidden * shape["vocab_size"] * (1 + backwards)
    attention = 2 * tokens * fill * length * hidden * layers * (forwards + ATTENTION_BACKWARD * backwards)
    forward, backward = (traffic_of(recipe, shape, way) for way in (FORWARD, BACKWARD))
    traffic = 2 * tokens * layers * (forward * forwards + backward * backwards)  # two bytes a number
    bits = 8 if recipe.get("load_in_8bit") else 4 if recipe.get("load_in_4bit") else 16
    traffic += DEQUANTIZE_BYTES[bits] * weights * passes
    # Two CUDA graphs launch all layers at once.
    launches = 0 if recipe.get("fastdora_graphs") and train and not checkpointing else layers * passes
    micro_batches = recipe["gradient_accumulation_steps"] if train else 1
    flops, bandwidth = gpu["tflops"] * 1e12, gpu["bandwidth"] * 1e9
    once = (matmul / flops, attention / flops, traffic / bandwidth, launches / 1e3)
    return Work(*(micro_batches * part for part in once))


def traffic_of(recipe: dict[str, Any], shape: dict[str, Any], way: Traffic) -> int:
    """Numbers of 16 bits that a token reads and writes in one layer outside the matmuls, forward or backward."""
    linears = bases.linear_layers(shape)
    numbers = way.hidden * shape["hidden_size"] + way.kv * linears["k_proj"][1] + way.inner * shape["intermediate_size"]
    dora = DORA_BACKWARD if way is BACKWARD and recipe.get("peft_use_dora") else 0
    for name in recipe["lora_target_modules"]:
        inputs, outputs = linears[name]
        numbers += way.adapted_inputs * inputs + (way.adapted_outputs + dora) * outputs
    return numbers


def fit(rows: list[Work], seconds: list[float]) -> Work:
    """The factors that make `work` the measured seconds, relative errors squared, drawn to EXPECTED by FIRM."""
    shares = np.array(rows) / np.array(seconds)[:, None]
    left = np.vstack([shares, np.diag(FIRM / np.array(EXPECTED))])
    right = np.concatenate([np.ones(len(shares)), np.full(len(EXPECTED), FIRM)])
    return Work(*map(float, np.linalg.lstsq(left, right, rcond=None)[0].clip(min=0)))


def fit_records() -> Fit:
    """Factors fitted to the recorded runs, all of the 8B shape. UserError where a record is damaged or missing."""
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
        errors.append(abs(row.seconds(factors) / measured - 1))
    return Fit(fit(rows, seconds), sorted(set(keys)), len(rows), max(errors), max(memory_errors))


def committed_fit() -> Fit:
    """The fit in step_time.yaml. UserError where the table is damaged."""
    try:
        table = read_recipe(STEP_TIME)
        found = Fit(Work(**table.pop("factors")), **table)
        if not all(_is_rate(value) for value in (*found.factors, found.runs, found.time_error, found.memory_error)):
            raise ValueError("a figure is not a number above 0")
    except (RecipeError, TypeError, KeyError, AttributeError, ValueError) as error:
        raise UserError(f"{STEP_TIME}: is not a fit ({error!r}); restore it from git") from error
    return found


def write_fit() -> None:
    """Fit the factors to the recorded runs and write step_time.yaml."""
    found = fit_records()
    table = {"factors": {name: round(value, 4) for name, value in found.factors._asdict().items()}}
    table |= {"gpus": found.gpus, "runs": found.runs}
    table |= {"time_error": round(found.time_error, 4), "memory_error": round(found.memory_error, 4)}
    with replacing(STEP_TIME) as file:
        file.write(
            "# Seconds for a second of work at the data sheet's figures (launches: for a thousand layers), fitted\n"
        )
        file.write("# to the runs in train_throughput*.json by `python -m finlora.plan.estimate`. The errors are the\n")
        file.write("# largest: of a run's time when it is left out of the fit, and of its peak memory.\n")
        yaml.safe_dump(table, file, sort_keys=False, default_flow_style=None, width=120)


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
    tokenizer = data_tokens.tokenizer_of(recipe["base_model"])
    names = ", ".join(os.path.relpath(file, ROOT) for file in files["datasets"])
    if tokenizer:
        tokens = [count + 1 for count in data_tokens.counter(tokenizer)(texts)]
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


def schedule(
    recipe: dict[str, Any], shape: dict[str, Any], gpu: dict[str, Any], gpus: int, rows: Rows, factors: Work
) -> dict[str, Any]:
    """Samples, steps, and the seconds of one, of all validation and of the run.

    recipe: as distributed.share_batch returns it.
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
    evaluations = (recipe.get("evals_per_epoch") or 0) * epochs
    if every := recipe.get("eval_steps"):
        evaluations = 1 / every if every < 1 else steps / every
    evaluations *= bool(recipe.get("test_datasets"))
    beside = sum(row * row for row in rows.tokens) / sum(rows.tokens)  # tokens in the row of a token
    own = recipe | {"sequence_len": length}
    if gpus > 1:
        own["fastdora_graphs"] = False  # as fastdora's plugin does
    step = work(own, shape, gpu, beside, fill).seconds(factors)
    forward = work(own, shape, gpu, beside, fill, train=False).seconds(factors)
    validation = evaluations * rows.validation * mean / (length * fill * micro * gpus) * forward
    return {
        "samples": round(rows.train * epochs),
        "steps": steps,
        "step_tokens": each * micro * length,
        "step": step,
        "validation": validation,
        "seconds": steps * step + validation,
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
            "recipes/bases.yaml, or run `make demo` for .cache/tiny"
        )
    key, gpu = find_gpu(gpu_name)
    if recipe.get("fastdora_fp8") and not gpu["fp8"]:
        raise UserError(
            f"{path}: key 'fastdora_fp8': {key} has no fp8 matmuls; set it to false, or plan for another GPU"
        )
    for uncounted in ("lora_modules_to_save", "peft_layers_to_transform"):
        if recipe.get(uncounted):
            raise UserError(f"{path}: key '{uncounted}' is not planned for; remove it to plan without")
    shared, say = distributed.share_batch(path, recipe, gpus, 1)
    rows = rows_of(path, shared)
    warnings = []
    if max(rows.tokens) > shared["sequence_len"]:
        warnings = [
            f"           one of {max(rows.tokens):,} is longer than sequence_len {shared['sequence_len']:,}: refused"
        ]
    memory = recipes_memory.memory_parts(shared, shape)
    room, fitted = gpu["memory"] * SPARE, committed_fit()
    return {
        "recipe": path.stem,
        "gpu": key,
        "names": gpu["names"],
        "gpus": gpus,
        "shared": say,
        "parameters": bases.adapter_parameters(recipe, shape),
        "memory": memory,
        "card": gpu["memory"],
        "fits": sum(memory.values()) <= room,
        "change": recipes_memory.what_fits(shared, shape, room, recipe, max(rows.tokens)),
        "rows": rows,
        "mean": sum(rows.tokens) / len(rows.tokens),
        "warnings": warnings,
        **schedule(shared, shape, gpu, gpus, rows, fitted.factors),
        "modelled": is_modelled(recipe),
        "fit": fitted,
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
    memory, rows, fitted = plan["memory"], plan["rows"], plan["fit"]
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
        f"  time     {duration(plan['seconds'])}, validation {duration(plan['validation'])} of it; loading not counted",
    ]
    hours = plan["seconds"] / 3600 * plan["gpus"]
    if plan["price"] is None:
        lines.append(f"  cost     {hours:.2f} GPU-hours; PRICE=<of one> says what they cost")
    else:
        lines.append(f"  cost     {hours * plan['price']:.2f} for {hours:.2f} GPU-hours at {plan['price']:g}")
    basis = f"\nCompared with {fitted.runs} runs measured on {' and '.join(fitted.gpus)}: memory within "
    basis += f"{fitted.memory_error:.0%}, time within {fitted.time_error:.0%} of each "
    basis += "when the factors are fitted to the others"
    if plan["gpu"] not in fitted.gpus:
        basis += f"; on {plan['gpu']} time is scaled by the data sheets' figures, a guess"
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


if __name__ == "__main__":
    write_fit()
