"""The GPUs that a plan knows: finlora/plan/gpus.yaml, from their makers' data sheets."""

import difflib
from pathlib import Path
from typing import Annotated

from pydantic import Field

from fastdora.plugin.keys import RecipeError, read_recipe
from finlora.core.errors import UserError
from finlora.core.tables import Record, expecting, read_entry

GPUS = Path(__file__).with_name("gpus.yaml")
Positive = Annotated[Annotated[float, Field(gt=0, allow_inf_nan=False)], expecting("a number above 0")]


class Gpu(Record):
    """memory in GiB, tflops of dense bfloat16 matmuls, bandwidth of the memory and link to each other in GB/s."""

    memory: Positive
    tflops: Positive
    bandwidth: Positive
    link: Positive
    fp8: Annotated[bool, expecting("true or false")]  # whether its matmuls run in 8 bits, twice as fast
    names: Annotated[Annotated[list[str], Field(min_length=1)], expecting("a list, as the driver says them")]
    usual_of: str | None = None


def known_gpus() -> dict[str, Gpu]:
    """The table; UserError that names the GPU and the key where it has been edited to what a plan cannot use."""
    try:
        table = read_recipe(GPUS)
    except RecipeError as error:
        raise UserError(str(error)) from error
    return {str(name): read_entry(GPUS, str(name), entry, Gpu) for name, entry in table.items()}


def find_gpu(name: str) -> tuple[str, Gpu]:
    """A GPU of the table by its short name or the driver's, or the usual one of a kind."""
    table = known_gpus()
    for key, gpu in table.items():
        if name.lower() in (key, gpu.usual_of, *(other.lower() for other in gpu.names)):
            return key, gpu
    near = [key for key in table if key.startswith(name.lower())] if name else []
    near = near or difflib.get_close_matches(name.lower(), table, 1)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UserError(f"GPU={name}: {hint}finlora/plan/gpus.yaml has {', '.join(table)}; add a line for another")
