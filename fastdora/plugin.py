"""The plugin's hooks, in the order in which axolotl calls them. Each hands over to a module with one job."""

import copy
import gc
import logging
import sys
from contextlib import contextmanager

import torch
from axolotl.cli.config import gpu_capabilities
from axolotl.integrations.base import BasePlugin
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.config import AxolotlInputConfig
from pydantic import ValidationError
from transformers import set_seed

from fastdora import adapted, epochs, metrics, peft_int8, rows, zero3
from fastdora.keys import RecipeError, check_keys, read_recipe, strict_schema


class FastDoraPlugin(BasePlugin):
    """See the package's docstring. A user's mistake ends the run with one line and exit code 1, before any loading."""

    def register(self, cfg: dict) -> None:
        source = str(cfg.get("axolotl_config_path"))
        with one_line_errors():
            check_keys(read_recipe(source), source, strict_schema(AxolotlInputConfig))
            _validate(cfg, source)
        if cfg.get("bf16") == "auto" and not torch.cuda.is_available():
            # axolotl's `auto` means float16 on a CPU: slow there, and without loss scaling.
            cfg["bf16"] = cfg["fp16"] = False

        # Axolotl collects garbage at each packing and evaluation: over all imported modules that takes a second a time.
        gc.freeze()
        # bitsandbytes warns of its cast to float16 in each layer of each step: thousands of lines.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)

    def load_datasets(self, cfg, preprocess: bool = False):
        with one_line_errors():
            return rows.load(cfg)

    def pre_model_load(self, cfg) -> None:
        # axolotl's `seed` comes after LoRA's A was drawn; without this two runs differ.
        set_seed(cfg.seed if cfg.seed is not None else 42)
        if not torch.cuda.is_available():
            cfg.torch_dtype = torch.float32
        peft_int8.mend()
        epochs.mend()
        with one_line_errors():
            zero3.prepare(cfg)

    def post_model_load(self, cfg, model) -> None:
        with one_line_errors():
            adapted.check_model(cfg, model)

    def post_trainer_create(self, cfg, trainer) -> None:
        metrics.record(cfg, trainer)


def _validate(cfg, source: str) -> None:
    # Axolotl validates once more by itself; its complaint would stand below a traceback.
    capabilities, env_capabilities = gpu_capabilities()
    try:
        validate_config(DictDefault(copy.deepcopy(cfg.to_dict())), capabilities, env_capabilities)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        message = " ".join(first["msg"].removeprefix("Value error, ").split())
        raise RecipeError(f"{source}: {where + ': ' if where else ''}{message}") from error


@contextmanager
def one_line_errors():
    """Turn a RecipeError into `error: ...` on stderr and exit code 1: axolotl itself would print a traceback."""
    try:
        yield
    except RecipeError as error:
        sys.exit(f"\nerror: {error}")  # on a line of its own, below a progress bar
