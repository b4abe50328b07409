"""The time of a training step: its work at a GPU's data-sheet figures, times four factors.

The factors were fitted to the recorded runs train_throughput*.json beside this file and are committed in
step_time.yaml. `python -m finlora.plan.step_time` fits them again after new runs are recorded; a test compares the
table with the records.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from fastdora.plugin.keys import WITHOUT_GRAPHS, RecipeError, read_recipe
from finlora.core.errors import UserError
from finlora.core.files import write_text
from finlora.plan.gpus import Gpu, find_gpu
from finlora.recipes import bases, memory
from finlora.recipes.names import RECIPES, bits_of
from finlora.train import distributed

MEASURED = sorted(Path(__file__).parent.glob("train_throughput*.json"))  # one machine each
FIGURES = ("step_s", "peak_gib", "tokens_s", "slots_s", "samples_s")  # of a recorded run
TABLE = Path(__file__).with_name("step_time.yaml")
HEADER = """\
# Seconds for a second of work at the data sheet's figures (launches: for a thousand layers), fitted to the runs in
# train_throughput*.json by `python -m finlora.plan.step_time`. The errors are the largest: of a run's time when it is
# left out of the fit, and of its peak memory.
"""

# The model of a step's work. Traffic is what a token reads and writes outside the matmuls, in numbers of 16 bits.
ROUNDS = 20  # of a fit, at most
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

    def numbers(self, recipe: dict[str, Any], shape: dict[str, Any]) -> int:
        """Numbers of 16 bits that a token reads and writes in one layer outside the matmuls."""
        linears = bases.linear_layers(shape)
        layer = self.hidden * shape["hidden_size"] + self.kv * bases.attention_widths(shape)[1]
        layer += self.inner * shape["intermediate_size"]
        adapted = [linears[name] for name in bases.targets(recipe, shape)]
        return layer + sum(self.adapted_inputs * i + self.adapted_outputs * o for i, o in adapted)


FORWARD, BACKWARD = Traffic(12, 4, 3, 1, 2), Traffic(21, 6, 5, 3, 2)
DORA_BACKWARD = BACKWARD._replace(adapted_outputs=4)  # they are read again for the magnitude's gradient


class Work(NamedTuple):
    """A step's work: seconds at the data sheet's figures of matmuls, attention, memory traffic and of weights that come
    from other GPUs, and thousands of layers launched. As factors: seconds for one of each."""

    matmul: float
    attention: float
    traffic: float
    launches: float
    exchange: float

    def seconds(self, factors: "Work") -> float:
        return sum(one * factor for one, factor in zip(self.limiting(factors), factors, strict=True))

    def limiting(self, factors: "Work") -> "Work":
        """Without what runs beside the rest and is done before it: the GPU's work, or the CPU's launches."""
        on_gpu = self._replace(launches=0.0)
        cpu = self.launches * factors.launches
        if cpu > sum(one * factor for one, factor in zip(on_gpu[:3], factors[:3], strict=True)):
            return Work(0.0, 0.0, 0.0, self.launches, self.exchange)
        return on_gpu


# About what a profile of one step on an H100 showed (launches: of two processes without graphs). A factor of twice that
# weighs as much in the fit as a recorded run whose time is off by FIRM, so that a few runs cannot pull the factors to
# where no GPU is. No record has weights that come from other GPUs: half of that time beside the rest is a guess.
EXPECTED, FIRM = Work(matmul=1.33, attention=3.0, traffic=1.3, launches=3.0, exchange=0.5), 0.1


class Measured(NamedTuple):
    """A recorded run: its name in bench/train_throughput.yaml, GPU as the driver says it, recipe, and recorded row."""

    name: str
    device: str
    recipe: dict[str, Any]
    row: dict[str, Any]

    @property
    def share(self) -> float:
        """Of the base's weights, what the GPU kept."""
        return distributed.weight_share(
            RECIPES / f"{self.row['recipe']}.yaml", self.recipe, self.row.get("processes", 1)
        )

    def work(self, shape: dict[str, Any], gpu: Gpu) -> Work:
        """Its work. Where rows share prefixes they have more tokens than their packs, which have no padding then."""
        fill = min(1.0, self.row["tokens_s"] / self.row["slots_s"])
        return work(self.recipe, shape, gpu, self.row["tokens_s"] / self.row["samples_s"], fill, share=self.share)


class Fit(NamedTuple):
    """Factors, the GPUs and the number of runs that they were fitted to, and the largest relative errors on those.

    time_error: of a run's time when the factors are fitted without it, on whichever machine. memory_error: of its peak.
    """

    factors: Work
    gpus: list[str]
    runs: int
    time_error: float
    memory_error: float


def is_modelled(recipe: dict[str, Any]) -> bool:
    """Whether the factors are meant for such a recipe: one with the fast layers."""
    return recipe.get("fastdora_layers") == "fast"


def work(
    recipe: dict[str, Any],
    shape: dict[str, Any],
    gpu: Gpu,
    length: float,
    fill: float,
    train: bool = True,
    share: float = 1.0,
) -> Work:
    """A step's work, or that of one forward pass (train=False). A step is gradient_accumulation_steps micro-batches.

    length: tokens that a token's row has, on average. fill: the share of a pack that is not padding. share: of the
    weights that the GPU keeps; the rest comes in each direction of a step.
    """
    layers, hidden = shape["num_hidden_layers"], shape["hidden_size"]
    weights = bases.linear_parameters(shape)
    checkpointing = bool(recipe.get("gradient_checkpointing"))
    forwards, backwards = (1 + checkpointing, 1) if train else (1, 0)
    passes = forwards + backwards  # frozen weights have no gradient: a backward pass is one matmul as well
    tokens = recipe["sequence_len"] * recipe["micro_batch_size"]
    labels = tokens * (LABEL_SHARE if recipe.get("fastdora_answers_only") else 1)
    # Two operations for each weight and token; the head stays in 16 bits.
    matmul = 2 * weights * tokens * passes / (FP8_SPEEDUP if recipe.get("fastdora_fp8") else 1)
    matmul += 2 * labels * hidden * shape["vocab_size"] * (1 + backwards)
    query, _ = bases.attention_widths(shape)
    attention = 2 * tokens * fill * length * query * layers * (forwards + ATTENTION_BACKWARD * backwards)
    backward = DORA_BACKWARD if recipe.get("peft_use_dora") else BACKWARD
    numbers = FORWARD.numbers(recipe, shape) * forwards + backward.numbers(recipe, shape) * backwards
    traffic = 2 * tokens * layers * numbers + DEQUANTIZE_BYTES[bits_of(recipe)] * weights * passes  # bytes
    # Two CUDA graphs launch all layers at once.
    has_graphs = recipe.get("fastdora_graphs") and train and not any(recipe.get(key) for key in WITHOUT_GRAPHS)
    launches = 0 if has_graphs else layers * (forwards + 2 * backwards)  # a backward pass has about twice as many
    exchange = sum(memory.weight_bytes(recipe, shape)) * (1 - share) * (1 + backwards)
    micro_batches = recipe["gradient_accumulation_steps"] if train else 1
    flops, bandwidth, link = gpu.tflops * 1e12, gpu.bandwidth * 1e9, gpu.link * 1e9
    once = (matmul / flops, attention / flops, traffic / bandwidth, launches / 1e3, exchange / link)
    return Work(*(micro_batches * part for part in once))


def measured_runs() -> list[Measured]:
    """The recorded runs that `is_modelled`, of all machines. UserError where a record is damaged, or none is there."""
    runs = []
    for path in MEASURED:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            for name, row in record["rows"].items():
                recipe = read_recipe(RECIPES / f"{row['recipe']}.yaml") | row["set"]
                for key in recipe.pop("drop", []):
                    recipe.pop(key, None)
                if "step_s" in row and is_modelled(recipe):
                    if not all(row[figure] > 0 for figure in FIGURES):
                        raise ValueError(f"{name}: a figure is 0")
                    runs.append(Measured(name, record["device"], recipe, row))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecipeError) as error:
            raise UserError(f"{path}: is not a recorded result ({error!r}); restore it from git") from error
    if len({run.name for run in runs}) < 2:
        raise UserError("finlora/plan/train_throughput*.json: have no runs to fit a plan to; restore them from git")
    return runs


def fit(rows: list[Work], seconds: list[float]) -> Work:
    """The factors that make `work` the measured seconds, relative errors squared, drawn to EXPECTED by FIRM.

    What limits a run depends on the factors, so they are fitted again until none changes sides, or ROUNDS times.
    """
    factors, before = EXPECTED, None
    for _ in range(ROUNDS):
        limiting = [row.limiting(factors) for row in rows]
        if limiting == before:
            break
        shares, before = np.array(limiting) / np.array(seconds)[:, None], limiting
        left = np.vstack([shares, np.diag(FIRM / np.array(EXPECTED))])
        right = np.concatenate([np.ones(len(shares)), np.full(len(EXPECTED), FIRM)])
        factors = Work(*map(float, np.linalg.lstsq(left, right, rcond=None)[0].clip(min=0)))
    return factors


def fit_records() -> Fit:
    """Factors fitted to the recorded runs, all of the 8B shape. UserError where a record is damaged or missing."""
    runs, rows, memory_errors, keys = measured_runs(), [], [], []
    for run in runs:
        key, gpu = find_gpu(run.device)
        shape = bases.shape(run.recipe["base_model"])
        rows.append(run.work(shape, gpu))
        memory_errors.append(abs(memory.memory_estimate(run.recipe, shape, run.share) / run.row["peak_gib"] - 1))
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
        table = read_recipe(TABLE)
        committed = Fit(Work(**table.pop("factors")), **table)
        if not all(0 < value < math.inf for value in (*committed.factors, *committed[2:])):
            raise ValueError("a figure is not a number above 0")
    except (RecipeError, TypeError, KeyError, AttributeError, ValueError) as error:
        raise UserError(f"{TABLE}: is not a fit ({error!r}); restore it from git") from error
    return committed


def write_fit() -> None:
    """Fit the factors to the recorded runs and write step_time.yaml."""
    table = fit_records()._asdict()
    table["factors"] = {name: round(value, 4) for name, value in table["factors"]._asdict().items()}
    table |= {name: round(table[name], 4) for name in ("time_error", "memory_error")}
    write_text(TABLE, HEADER + yaml.safe_dump(table, sort_keys=False, default_flow_style=None, width=120))


if __name__ == "__main__":
    write_fit()
