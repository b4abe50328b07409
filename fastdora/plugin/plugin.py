"""The plugin's hooks, in the order in which axolotl calls them; each calls a module with one job."""

import copy
import gc
import logging
import os
import sys
from contextlib import contextmanager

import axolotl.cli.config
import axolotl.utils.trainer
import torch
import transformers.training_args
from axolotl.cli.config import gpu_capabilities
from axolotl.integrations.base import BasePlugin
from axolotl.loaders.tokenizer import load_tokenizer
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from pydantic import ValidationError
from transformers import AutoConfig, set_seed

from fastdora import attention, dora, graphs, packing, quantized
from fastdora.plugin import (
    adapted,
    cpu,
    curves,
    epochs,
    fsdp2,
    metrics,
    peft_int8,
    prompts,
    resume,
    rows,
    safety,
    sharing,
    watchdog,
    zero3,
)
from fastdora.plugin.keys import (
    GRAPHS_UNDER_DDP,
    WITHOUT_GRAPHS,
    RecipeError,
    check_keys,
    input_schema,
    layout_fault,
    read_recipe,
)

LOG = get_logger("axolotl.fastdora")
LIGER = [f"liger_{part}" for part in ("rope", "rms_norm", "glu_activation", "fused_linear_cross_entropy")]


class FastDoraPlugin(BasePlugin):
    """See the package's docstring. A recipe's error ends the run with one line and exit code 1, before any loading."""

    def get_input_args(self) -> str:
        return "fastdora.plugin.args.FastDoraArgs"

    def register(self, cfg: dict) -> None:
        source = str(cfg.get("axolotl_config_path"))
        with one_line_errors():
            recipe = read_recipe(source)
            safety.check(recipe, source)
            check_keys(recipe, source, input_schema(tuple(recipe.get("plugins") or ())))
            if fault := layout_fault(cfg):
                raise RecipeError("{}: key '{}': {}".format(source, *fault))
            _validate(cfg, source)
            _check_fp8(cfg, source)
            if cfg.get("fastdora_layers") != "peft":
                dora.check_versions()
        if not torch.cuda.is_available():
            if cfg.get("bf16") == "auto":
                # axolotl's `auto` means float16 on a CPU: slow there, and without loss scaling.
                cfg["bf16"], cfg["fp16"] = _bf16_on_cpu(cfg["base_model"]), False
            if cfg.get("dataloader_num_workers") is None:
                # axolotl's data loader is a process that takes a core from the training. It is forked from one with
                # threads, and in one of some thousand runs never went on (Python 3.10, torch 2.13).
                cfg["dataloader_num_workers"] = 0
            if enabled := [key for key in LIGER if cfg.get(key)]:
                cfg.update(dict.fromkeys(enabled, False))
                LOG.info(f"fastdora: off without a GPU: {', '.join(enabled)}")

        gc.freeze()  # as in post_trainer_create
        # bitsandbytes warns of its cast to float16 in each layer of each step: thousands of lines.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)

    def load_datasets(self, cfg, preprocess: bool = False):
        with one_line_errors():
            tokenizer = load_tokenizer(cfg)
            adapted.check_vocabulary(cfg, tokenizer)
            prompts.check(cfg, tokenizer, cfg.axolotl_config_path)
            return sharing.find(cfg, rows.load(cfg))

    def pre_model_load(self, cfg) -> None:
        # axolotl's `seed` comes after LoRA's A was drawn; without this two runs differ.
        set_seed(cfg.seed if cfg.seed is not None else 42)
        if not torch.cuda.is_available():
            cfg.torch_dtype = torch.bfloat16 if cfg.bf16 else torch.float32
        peft_int8.patch()
        epochs.patch()
        with one_line_errors():
            resume.check(cfg)
            zero3.prepare(cfg)
            fsdp2.prepare(cfg)

    def post_model_load(self, cfg, model) -> None:
        _check_layers(cfg, model)
        with one_line_errors():
            adapted.check_model(cfg, model)
        zero3.restore_frequencies(model)
        if not (cfg.gradient_checkpointing or cfg.deepspeed or cfg.fsdp_config):
            # axolotl turns it on for every adapter: the first layer would compute an input gradient that nobody reads.
            model.get_base_model().disable_input_require_grads()
        if cfg.fastdora_layers == "fast":
            LOG.info(f"fastdora: {dora.accelerate(model, cfg.fastdora_fp8)}")
        if cfg.sample_packing and cfg.attn_implementation == "sdpa":
            with one_line_errors():
                try:
                    attention.install(model)
                except dora.Unsupported as error:
                    raise RecipeError(
                        f"{cfg.axolotl_config_path}: key 'attn_implementation': {error}; set sample_packing: false, or "
                        "flash_attention_2 where flash-attn is installed"
                    ) from error
            LOG.info(f"fastdora: attention within packed samples is {attention.NAME}")
        if cfg.fastdora_graphs:
            reason = _why_no_graphs(cfg)
            if not reason:
                graphs.install(model)
            LOG.info(f"fastdora: CUDA graphs {f'off: {reason}' if reason else 'on'}")

    def post_trainer_create(self, cfg, trainer) -> None:
        # Axolotl collects garbage at each packing and evaluation: over all modules and the model, a second a time.
        gc.freeze()
        _check_layers(cfg, trainer.model)  # `unfrozen_parameters` came after the model was loaded
        if not any(parameter.requires_grad for parameter in trainer.model.parameters()):
            with one_line_errors():
                raise RecipeError(
                    f"{cfg.axolotl_config_path}: key 'unfrozen_parameters': nothing is left to train; remove it"
                )
        fsdp2.keep_dtypes(trainer)
        zero3.keep_dtypes(trainer)
        metrics.record(cfg, trainer)
        watchdog.guard(cfg, trainer)
        curves.guard(trainer)
        with one_line_errors():
            resume.guard(cfg, trainer)
        packing.install(
            trainer,
            packed=trainer.model.config._attn_implementation == attention.NAME,
            answers=cfg.fastdora_answers_only
            and trainer.compute_metrics is None,  # metrics want every position's logits
            copy=sharing.install(cfg, trainer),
        )
        # Each of these would make the GPU wait at every batch, and the first one hides a loss that is not a number.
        trainer.args.logging_nan_inf_filter = False
        trainer.accelerator.dataloader_config.non_blocking = trainer.args.dataloader_pin_memory


def _check_layers(cfg, model) -> None:
    if cfg.fastdora_layers != "fast":
        return
    with one_line_errors():
        try:
            dora.check_layers(model)
        except dora.Unsupported as error:
            raise RecipeError(f"{cfg.axolotl_config_path}: {error}; or set fastdora_layers: peft") from error


def _bf16_on_cpu(base_model: str) -> bool:
    """Whether this CPU trains the model in bfloat16; axolotl and transformers are then told that it can."""
    try:
        width = getattr(AutoConfig.from_pretrained(base_model), "hidden_size", 0)
    except (OSError, ValueError):  # axolotl says what is wrong with it
        return False
    if cpu.best_dtype(width) != torch.bfloat16:
        return False
    allow_bf16_on_cpu()
    return True


def allow_bf16_on_cpu() -> None:
    """axolotl 0.19.0 and transformers 5.16.1 look for bfloat16 on GPUs alone."""
    capabilities, environment = gpu_capabilities()
    axolotl.cli.config.gpu_capabilities = lambda: (capabilities | {"bf16": True}, environment)
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    axolotl.utils.trainer.is_torch_bf16_gpu_available = lambda: True


def _validate(cfg, source: str) -> None:
    # axolotl validates again later, where an error would be a traceback.
    capabilities, env_capabilities = gpu_capabilities()
    try:
        validate_config(DictDefault(copy.deepcopy(cfg.to_dict())), capabilities, env_capabilities)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        message = " ".join(first["msg"].removeprefix("Value error, ").split())
        raise RecipeError(f"{source}: {where + ': ' if where else ''}{message}") from error


def _why_no_graphs(cfg) -> str | None:
    if not torch.cuda.is_available():
        return "no GPU"
    if cfg.fastdora_layers != "fast":
        return "fastdora_layers: peft"
    if not cfg.sample_packing or cfg.attn_implementation != "sdpa":
        return "without sample_packing and attn_implementation: sdpa"
    if key := next((key for key in WITHOUT_GRAPHS if cfg.get(key)), None):
        return key
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not os.environ.get(GRAPHS_UNDER_DDP):
        return f"several processes, under which they were tried on CPUs alone; {GRAPHS_UNDER_DDP}=1 records them"
    return None


def _check_fp8(cfg, source: str) -> None:
    if not cfg.get("fastdora_fp8"):
        return
    if not cfg.get("load_in_8bit") or cfg.get("fastdora_layers") == "peft":
        raise RecipeError(f"{source}: key 'fastdora_fp8': needs load_in_8bit: true and fastdora_layers: fast")
    if torch.cuda.is_available() and not quantized.has_fp8():
        name = torch.cuda.get_device_name()
        raise RecipeError(f"{source}: key 'fastdora_fp8': {name} has no fp8 matmuls; set it to false")


@contextmanager
def one_line_errors():
    """Turn a RecipeError into `error: ...` on stderr and exit code 1; axolotl itself would print a traceback."""
    try:
        yield
    except (RecipeError, dora.Unsupported) as error:
        sys.exit(f"\nerror: {error}")  # on a line of its own, below a progress bar
