"""Base models at 16, 8 or 4 bits, and adapters that are checked against them and merged.

An adapter is merged into the base *as it was trained on*: 8- and 4-bit weights are quantised as in training,
dequantized to 16 bits, and DoRA's W' = m (W0 + s B A) / ||W0 + s B A|| (arXiv 2402.09353, eq. 5) is folded in float32,
a layer at a time. Generation then runs at the speed of the plain model. `keep_quantised` leaves 8- and 4-bit weights as
they are, for cards that 16 bits do not fit, and caches DoRA's norms instead.

PEFT and fastdora are imported within functions: they import bitsandbytes, which must wait until the hub is turned off
(finlora.models.trained.disable_hub).
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig
from transformers.utils import logging

from fastdora.plugin.prompts import end_of_turn_tokens
from finlora.core.compatible import make_compatible
from finlora.core.errors import UserError, first_line
from finlora.core.startup import is_verbose
from finlora.models.trained import PROMPTS, AdapterFacts, TrainedModel, prompts

POSITIONS = 8  # logits are compared at this many of each row's last tokens


def check_fits(adapter: Path, facts: AdapterFacts, model: str) -> int:
    """The number of the base's parameters; UserError that names the first tensor that does not fit, for another base's
    adapter. Loads no weights.
    """
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(load_config(model))
    modules, parameters = dict(empty.named_modules()), dict(empty.named_parameters())
    for name, shape in facts.shapes.items():
        layer, _, part = name.removeprefix("base_model.model.").partition(".lora_")
        if not part:
            expected = list(parameters[layer].shape) if layer in parameters else None
        elif layer not in modules or not hasattr(modules[layer], "in_features"):
            expected = None
        else:
            wide, long, r = modules[layer].in_features, modules[layer].out_features, min(shape)
            expected = {"A": [r, wide], "B": [long, r], "m": [long]}.get(part[0], shape)
        if expected != shape:
            need = (
                f"is {_times(shape)} where {model} takes {_times(expected)}" if expected else f"is no layer of {model}"
            )
            base = facts.base or "another base"
            raise UserError(f"{adapter}: {name} {need}; it was trained on {base}: name both with ADAPTER= MODEL=")
    return sum(parameter.numel() for parameter in parameters.values())


def _times(shape: list[int]) -> str:
    return " x ".join(map(str, shape))


def load_config(model: str):
    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{model}: cannot be loaded ({first_line(error)}); give a folder, or a hub id with HF_TOKEN set"
        ) from error


def load_tokenizer(model: str, adapter: Path | None, prompt: str):
    """The tokenizer saved beside the adapter, else the base's, with the chat template that `prompt` names."""
    beside = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    source = str(adapter) if beside else model
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # every file format has errors of its own
        raise UserError(f"{source}: its tokenizer cannot be loaded ({first_line(error)})") from error
    if prompt not in prompts():
        raise UserError(f"PROMPT={prompt}: there are {', '.join(prompts())}")
    if prompt != "saved":
        tokenizer.chat_template = (PROMPTS / f"{prompt}.jinja").read_text(encoding="utf-8")
    if not tokenizer.chat_template:
        raise UserError(f"{source}: its tokenizer has no chat template; choose a prompt: PROMPT={prompts()[1]} or raw")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(model: str, bits: int, keep_quantised: bool = False, fast: bool = False):
    """The base model in evaluation mode, on the GPU where there is one, in bfloat16 (float32 on a CPU).

    bits: 8 and 4 quantise the linear layers as the recipes do (LLM.int8 rows; NF4 with double quantisation). fast: on
    a CPU in bfloat16 too, where that is faster: for answers, not for merging, whose tolerance is float32's.
    """
    from fastdora.plugin import cpu, peft_int8

    peft_int8.patch()
    if not is_verbose():
        logging.disable_progress_bar()  # one for each model that is loaded
    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if gpu else torch.float32
    if fast and not gpu:
        dtype = cpu.best_dtype(getattr(load_config(model), "hidden_size", 0))
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            model,
            dtype=dtype,
            quantization_config=quantisation(bits, dtype),
            device_map={"": "cuda:0" if gpu else "cpu"},
            attn_implementation="sdpa",
            trust_remote_code=False,
            use_safetensors=True,
        )
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{model}: does not fit on the GPU; free it, or leave the weights quantised (make eval and make "
            "chat: KEEP_QUANTISED=1)"
        ) from error
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{model}: cannot be loaded ({first_line(error)}); fetch it again") from error
    if bits != 16 and not keep_quantised:
        loaded = loaded.dequantize(dtype=dtype)
    return loaded.eval()


def quantisation(bits: int, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """How the recipes quantize a base: 8 bits by rows (LLM.int8()), 4 bits as NF4 with double quantization; 16: None.

    dtype: the compute dtype of 4-bit layers.
    """
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    if bits == 4:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return None


def as_trained(trained: TrainedModel):
    """The quantised base with the adapter unmerged, its matmuls those of training: fastdora's, or PEFT's own."""
    import fastdora

    model = attach(load_base(trained.base_model, trained.bits, keep_quantised=True), trained.adapter)
    if trained.run.keys.get("fastdora_layers", "peft") == "fast":
        fastdora.accelerate(model, fp8=bool(trained.run.keys.get("fastdora_fp8")))
    return model


def attach(model, adapter: Path):
    """The model with its adapter merged; on layers that are still quantised attached, with DoRA's norms cached.

    Raises UserError unless every tensor of the file, magnitudes included, is found in the model afterwards: adapters
    that are loaded another way lose them without a word.
    """
    from peft import PeftModel
    from peft.helpers import DoraCaching
    from peft.tuners.lora import LoraLayer
    from peft.utils import get_peft_model_state_dict

    adapted = PeftModel.from_pretrained(model, adapter).eval()
    loaded = get_peft_model_state_dict(adapted)
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        if name not in loaded or not torch.equal(loaded[name].cpu(), tensor.to(loaded[name].dtype)):
            raise UserError(f"{adapter}: {name} did not reach the model; it would be scored without it")
    layers = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
    if any(not layer.get_base_layer().weight.is_floating_point() for layer in layers):
        DoraCaching()(enabled=True)
        return adapted
    for layer in layers:
        weight = layer.get_base_layer().weight
        dtype = weight.dtype
        weight.data = weight.data.float()
        layer.merge()
        weight.data = weight.data.to(dtype)
    return adapted.unload()


def logits(model, rows: list[list[int]]) -> torch.Tensor:
    """Logits (positions, vocabulary) of the last POSITIONS tokens of each row, float32, on the CPU."""
    last = []
    with torch.inference_mode():
        for ids in rows:
            out = model(torch.tensor([ids], device=model.device), logits_to_keep=POSITIONS)
            last.append(out.logits[0].float().cpu())
    return torch.cat(last)


def end_tokens(model, tokenizer, eot_tokens: Sequence[str] = ()) -> list[int]:
    """The token ids that end an answer: those of template, tokenizer and recipe, and the model's configuration's.

    Llama 3's generation_config.json lists more than one, and what is saved beside an adapter may end answers with a
    token that its base's configuration does not list.
    """
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return sorted({*end_of_turn_tokens(tokenizer, eot_tokens), *configured} - {None})


def save(model, tokenizer, folder: Path, eot_tokens: Sequence[str] = (), shard_size: str = "5GB") -> None:
    """Write weights, tokenizer and configuration, for other versions too; answers are greedy, up to `end_tokens`."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end_tokens(model, tokenizer, eot_tokens),
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder, max_shard_size=shard_size)
    tokenizer.save_pretrained(folder)
    make_compatible(folder)


def template_sha256(tokenizer) -> str:

    return hashlib.sha256(json.dumps(tokenizer.chat_template).encode()).hexdigest()
