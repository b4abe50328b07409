"""What a run will take, before it begins: parameters, memory, samples, tokens, steps, time and cost (`make plan`).

    finlora plan sentiment_r8_dora [--gpu a100-80g] [--gpus 4 --fsdp 2] [--price 2.50]

Parameters are counted by finlora/recipes/bases.py, memory by finlora/recipes/memory.py, time by
finlora/plan/step_time.py.
"""

import bisect
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError

from fastdora.plugin.keys import GRAPHS_UNDER_DDP
from finlora.core import machine
from finlora.core.errors import UserError
from finlora.core.files import read_json
from finlora.core.html import render
from finlora.core.paths import ROOT
from finlora.core.progress import duration
from finlora.data import tokens as data_tokens
from finlora.data.tasks import load_tasks
from finlora.plan.gpus import Gpu, find_gpu, known_gpus
from finlora.plan.step_time import Fit, Work, committed_fit, is_modelled, measured_runs, work
from finlora.recipes import bases, memory
from finlora.recipes import load as recipes
from finlora.recipes import names as recipe_names
from finlora.recipes.recipe import Recipe
from finlora.train import distributed
from finlora.train.cpu import cpu_seconds

SAMPLE = 2000  # rows whose tokens are counted
UNPACKED_FILL = 2 / 3  # of a padded batch, where packing is off: a guess


class Rows(NamedTuple):
    """A recipe's rows: how many train and how many validate, tokens of some or all of them, and where that is from.

    share: of a row's tokens, what it adds to a pack, where rows share prefixes; else 1.
    """

    train: int
    validation: int
    tokens: list[int]
    source: str
    share: float = 1.0

    @property
    def mean(self) -> float:
        return sum(self.tokens) / len(self.tokens)

    @property
    def longest(self) -> int:
        return max(self.tokens)


class Schedule(NamedTuple):
    """Samples and steps of a run; the seconds of one step, of all validation and of the run."""

    samples: int
    steps: int
    step_tokens: int
    step: float
    validation: float

    @property
    def seconds(self) -> float:
        return self.steps * self.step + self.validation


@dataclass(frozen=True)
class Plan:
    recipe: str
    key: str  # of the GPU in gpus.yaml
    gpu: Gpu
    gpus: int
    shared: str | None  # how GPUs share the batch
    share: float  # of the base's weights, what each GPU keeps
    parameters: dict[str, bases.Adapted]
    memory: dict[str, float]  # GiB by what takes them
    change: str  # what to set so that it fits
    rows: Rows
    length: int  # sequence_len as run
    schedule: Schedule
    whole: tuple[int, Schedule] | None  # accumulation steps with which no pack is shortened, and the run with them
    modelled: bool
    fit: Fit
    price: float | None

    @property
    def peak(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.peak <= self.gpu.memory * memory.SPARE

    @property
    def hours(self) -> float:
        return self.schedule.seconds / 3600 * self.gpus


def rows_of(path: Path, recipe: dict[str, Any]) -> Rows:
    """The recipe's rows from its prepared files where they are there, else from data/tasks.yaml's figures.

    UserError names what is missing for a recipe on rows that are in neither.
    """
    files, held_out = (
        [ROOT / entry["path"] for entry in recipe.get(kind) or []] for kind in ("datasets", "test_datasets")
    )
    if missing := [file for file in files if not file.is_file()]:
        return rows_of_task(path, missing[0], recipe)
    train, validation = (
        sum(1 for file in kind if file.is_file() for _ in file.open("rb")) for kind in (files, held_out)
    )
    if not train:
        raise UserError(f"{path}: key 'datasets': its files have no rows")
    own = data_tokens.tokenizer_of(recipe["base_model"])
    tokenizer = own or data_tokens.tokenizer_of(data_tokens.LLAMA)
    as_text = template(recipe, own)
    texts = [chat(path, line, as_text) for file in files for line in lines_of(file, -(-train // SAMPLE))]
    if tokenizer:
        tokens = data_tokens.counter(tokenizer)(texts)
        whose = "the base model's tokenizer" if own else "Llama-3's tokenizer, since the base model's is not here"
        how = f"{len(tokens):,} rows counted by {whose}"
    else:
        tokens = [math.ceil(len(text) / 4) for text in texts]
        how = "a token taken as 4 characters, since the base model's tokenizer is not here"
    named = ", ".join(os.path.relpath(file, ROOT) for file in files)
    return Rows(train, validation, tokens, f"{named}; {how}", packed_share(recipe, files[0].parent.name))


def lines_of(file: Path, step: int) -> list[tuple[int, bytes]]:
    """Each `step`th line with its number, from the first on."""
    with file.open("rb") as lines:
        return [(number, line) for number, line in enumerate(lines, 1) if (number - 1) % step == 0]


def template(recipe: dict[str, Any], tokenizer: Path | None) -> Callable[[list[dict[str, str]]], str]:
    """What writes a conversation as the recipe's chat template does. tokenizer: the base model's, where it is here."""
    # Both without axolotl and torch, whose imports take many seconds.
    from transformers.utils.chat_template_utils import render_jinja_template

    name, folder = recipe.get("chat_template"), tokenizer.parent if tokenizer else None
    own = folder / "chat_template.jinja" if folder else None
    if name == "jinja":
        given = recipe["chat_template_jinja"]
        source = given if "{" in given else (ROOT / given).read_text(encoding="utf-8")
    elif name == "tokenizer_default" and own and own.is_file():
        source = own.read_text(encoding="utf-8")
    else:
        axolotl = Path(find_spec("axolotl").submodule_search_locations[0]) / "utils/chat_templates/templates"
        file = axolotl / f"{name}.jinja"
        source = (file if file.is_file() else axolotl / "chatml.jinja").read_text(encoding="utf-8")
    config = (read_json(folder / "tokenizer_config.json") if folder else None) or {}
    if tokenizer and tokenizer.suffix == ".model":  # Llama-3's, which has no configuration beside it
        config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    named = {key: config.get(key) or "" for key in ("bos_token", "eos_token")}
    marks = {key: value["content"] if isinstance(value, dict) else value for key, value in named.items()}
    return lambda turns: render_jinja_template([turns], chat_template=source, **marks)[0][0]


def chat(path: Path, numbered: tuple[int, bytes], as_text: Callable[[list[dict[str, str]]], str]) -> str:
    """A prepared row as the chat template writes it."""
    number, line = numbered
    try:
        return as_text([{"role": turn["role"], "content": turn["content"]} for turn in json.loads(line)["messages"]])
    except (ValueError, KeyError, TypeError, AttributeError, TemplateError) as error:
        text = f"{path}: key 'datasets': row {number} is not one of messages; `make train` says which"
        raise UserError(text) from error


def packed_share(recipe: dict[str, Any], task: str) -> float:
    """What share of its tokens a row adds to a pack, by data/tasks.yaml; 1 where that does not have the task."""
    table = load_tasks()
    parts = [table[name] for name in table[task].mixture_of or [task]] if task in table else []
    whole, packed = (sum(part.row_tokens(shared) or 0 for part in parts) for shared in (False, True))
    return packed / whole if recipe.get("fastdora_shared_prefixes") and whole else 1.0


def rows_of_task(path: Path, missing: Path, recipe: dict[str, Any]) -> Rows:
    """What data/tasks.yaml says of a task's rows; a mixture as `make data` builds it from its tasks."""
    table, task = load_tasks(), missing.parent.name
    if missing.parent.parent != ROOT / "data" / "prepared" or task not in table:
        text = f"{path}: key 'datasets': {missing} is missing, and its rows are needed to plan; bring it there"
        raise UserError(text)
    parts = [table[name] for name in table[task].mixture_of or [task]]
    rows = max(part.train_rows or part.train_rows_about for part in parts) * len(parts)  # smaller tasks are repeated
    validation = round(rows * 0.02 / len(parts))
    tokens = [part.tokens_about for part in parts] * (SAMPLE // len(parts))
    source = f"data/tasks.yaml, about; `make data TASK={task}` brings the rows"
    return Rows(rows - validation, validation, tokens, source, packed_share(recipe, task))


def packs(tokens: list[int], length: int) -> int:
    """How many packs of `length` tokens these rows fill: the longest first, each where it leaves least room."""
    room: list[int] = []  # of the packs so far, in order
    for row in sorted((min(row, length) for row in tokens), reverse=True):
        place = bisect.bisect_left(room, row)
        left = room.pop(place) - row if place < len(room) else length - row
        bisect.insort(room, left)
    return len(room)


def schedule(
    recipe: dict[str, Any], shape: dict[str, Any], gpu: Gpu, gpus: int, rows: Rows, factors: Work, share: float = 1.0
) -> Schedule:
    """recipe: as distributed.distribute returns it. Without packing a batch is padded to its longest row."""
    mean, micro, length = rows.mean * rows.share, recipe["micro_batch_size"], recipe["sequence_len"]
    if recipe.get("sample_packing"):
        packed = [max(1, round(row * rows.share)) for row in rows.tokens]
        fill = sum(packed) / (packs(packed, length) * length)
        batches = rows.train * mean / (length * fill) / micro
    else:
        fill, batches, length = UNPACKED_FILL, rows.train / micro, math.ceil(mean / UNPACKED_FILL)
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
    as_run = recipe | {"sequence_len": length}
    if gpus > 1 and not os.environ.get(GRAPHS_UNDER_DDP):
        as_run["fastdora_graphs"] = False  # as fastdora's plugin does
    forward = work(as_run, shape, gpu, beside, fill, train=False, share=share).seconds(factors)
    return Schedule(
        samples=round(rows.train * epochs),
        steps=steps,
        step_tokens=each * micro * length,
        step=work(as_run, shape, gpu, beside, fill, share=share).seconds(factors),
        validation=evaluations * rows.validation * mean / (length * fill * micro * gpus) * forward,
    )


def make_plan(
    path: Path,
    recipe: dict[str, Any],
    gpu_name: str | None = None,
    launch: distributed.Launch = distributed.ONE_PROCESS,
    price: float | None = None,
) -> Plan:
    """UserError where the recipe cannot be planned, or not trained by these GPUs together."""
    for key in ("adapter", "lora_r", "lora_target_modules"):
        if not (recipe.get(key) or key == "lora_target_modules" and recipe.get("lora_target_linear")):
            raise UserError(f"{path}: key '{key}' is missing: plans are for recipes that train an adapter")
    shape = bases.shape(recipe["base_model"])
    if not shape:
        raise UserError(
            f"{path}: key 'base_model': the sizes of {recipe['base_model']} are not known here; add them to "
            "recipes/bases.yaml, or run `make demo` for .cache/tiny"
        )
    key, gpu = find_gpu(gpu_name or default_gpu())
    if recipe.get("fastdora_fp8") and not gpu.fp8:
        raise UserError(
            f"{path}: key 'fastdora_fp8': {key} has no fp8 matmuls; set it to false, or plan for another GPU"
        )
    if recipe.get("peft_layers_to_transform"):
        raise UserError(f"{path}: key 'peft_layers_to_transform' is not planned for; remove it to plan without")
    gpus, written = launch.gpus, Recipe(path, recipe)
    run = distributed.distribute(written, launch)
    shared, share = run.recipe.keys, distributed.weight_share(path, run.recipe.keys, gpus)
    rows, fit, whole = rows_of(path, shared), committed_fit(), None
    if more := distributed.whole_packs(recipe, gpus):
        larger = replace(written, keys=recipe | {"gradient_accumulation_steps": more})
        keys = distributed.distribute(larger, launch).recipe.keys
        if memory.memory_estimate(keys, shape, share) <= gpu.memory * memory.SPARE:
            whole = more, schedule(keys, shape, gpu, gpus, rows, fit.factors, share)
    return Plan(
        recipe=path.stem,
        key=key,
        gpu=gpu,
        gpus=gpus,
        shared=run.batch_kept,
        share=share,
        parameters=bases.adapter_parameters(recipe, shape),
        memory=memory.memory_parts(shared, shape, share),
        change=memory.what_fits(shared, shape, gpu.memory * memory.SPARE, recipe, rows.longest, share),
        rows=rows,
        length=shared["sequence_len"],
        whole=whole,
        schedule=schedule(shared, shape, gpu, gpus, rows, fit.factors, share),
        modelled=is_modelled(recipe),
        fit=fit,
        price=price,
    )


def default_gpu() -> str:
    """The GPU that is here, else the measured one."""
    here = machine.gpus()
    return here[0][0] if here else measured_runs()[0].device


def show(plan: Plan) -> str:
    counts = list(plan.parameters.values())
    own, magnitude, together = (
        sum(getattr(one, key) for one in counts) for key in ("a_and_b", "magnitude", "together")
    )
    text = render("plan/plan.md.jinja", plan=plan, own=own, magnitude=magnitude, together=together, duration=duration)
    return text.strip("\n")


def run(recipe: str, gpu: str | None, launch: distributed.Launch, price: float | None) -> None:
    """Print the plan of a recipe."""
    path = recipe_names.find(recipe)
    loaded = recipes.load(path)
    plan = make_plan(path, loaded.keys, gpu, launch, price)
    if gpu and gpu.lower() == plan.gpu.usual_of:
        others = [key for key in known_gpus() if key.startswith(gpu.lower()) and key != plan.key]
        print(f"GPU={gpu} is taken as {plan.key}, the usual one; there is {', '.join(others)}\n")
    print(show(plan))
    if not gpu and not machine.gpus():
        seconds, rate = cpu_seconds(loaded)
        print(f"\nOn this machine's CPU about {duration(seconds)}; its matmuls do {rate / 1e9:.0f} GFLOP/s.")
