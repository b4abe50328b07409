"""Base models at 16, 8 or 4 bits, and adapters that are checked against them and merged.

An adapter is merged into the base *as it was trained on*: 8- and 4-bit weights are quantised as in training,
dequantized to 16 bits, and DoRA's W' = m (W0 + s B A) / ||W0 + s B A|| (arXiv 2402.09353, eq. 5) is folded in float32,
a layer at a time. Generation then runs at the speed of the plain model. `keep_quantised` leaves 8- and 4-bit weights as
they are, for cards that 16 bits do not fit, and caches DoRA's norms instead.

torch, transformers and PEFT are imported within functions: naming a mistake in the options does not need them, and
bitsandbytes must not be imported before the hub is turned off (finlora.export.trained.disable_hub).
"""

import json
from pathlib import Path
from typing import NamedTuple

import yaml

from finlora.core.compatible import make_compatible
from finlora.core.errors import UserError, first_line
from finlora.core.files import read_json, sha256
from finlora.core.startup import is_verbose
from finlora.recipes import names as recipe_names

PROMPTS = recipe_names.RECIPES / "prompts"


def prompts() -> list[str]:
    """What PROMPT= may name: the template that is saved beside the adapter, and those of recipes/prompts."""
    return ["saved", *sorted(path.stem for path in PROMPTS.glob("*.jinja"))]


class AdapterFacts(NamedTuple):
    """What an adapter's folder says of itself."""

    base: str | None  # hub id or folder
    method: str  # lora, dora or rslora
    r: int
    alpha: int | float
    sha256: str  # of its weights
    eot_tokens: tuple[str, ...]  # of the recipe beside it: they end an answer, too


def adapter_facts(folder: Path) -> AdapterFacts:
    """UserError where it is not the folder of a whole adapter."""
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such adapter folder; train one, or name a PEFT folder or hub id with ADAPTER=")
    for path in (config, weights):
        if not path.is_file():
            bins = " (pickled weights are not loaded)" if (folder / "adapter_model.bin").is_file() else ""
            raise UserError(f"{folder}: holds no {path.name}{bins}; name the folder of a finished PEFT adapter")
    keys = read_json(config)
    if not isinstance(keys, dict) or keys.get("peft_type") != "LORA":
        raise UserError(f"{config}: is not the configuration of a LoRA or DoRA adapter; name a PEFT folder")
    magnitudes = any(
        name.endswith(("lora_magnitude_vector", "lora_magnitude_vector.weight")) for name in tensor_shapes(weights)
    )
    if bool(keys.get("use_dora")) != magnitudes:
        fault = "says use_dora: true and the weights hold no magnitudes" if not magnitudes else "does not say use_dora"
        raise UserError(f"{config}: {fault}; magnitudes would be lost in silence, so save the adapter again")
    return AdapterFacts(
        base=keys.get("base_model_name_or_path"),
        method="dora" if magnitudes else "rslora" if keys.get("use_rslora") else "lora",
        r=keys.get("r"),
        alpha=keys.get("lora_alpha"),
        sha256=sha256(weights),
        eot_tokens=_eot_tokens(folder / "recipe.yaml"),
    )


def check_named_base(model: str, facts: AdapterFacts, force: bool = False) -> None:
    """UserError where MODEL= is not the base that the adapter names: one of equal shapes would be taken in silence.

    force: whether the command has FORCE=1, which takes it nevertheless.
    """
    if facts.base and model != facts.base and Path(model).resolve() != Path(facts.base).resolve():
        remedy = ", or add FORCE=1 where it is the same model in another place" if force else ""
        raise UserError(f"MODEL={model}: the adapter was trained on {facts.base}; leave MODEL= out{remedy}")


def _eot_tokens(recipe: Path) -> tuple[str, ...]:
    try:
        keys = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):  # an adapter from elsewhere has no recipe of ours
        return ()
    return tuple(keys.get("eot_tokens") or ()) if isinstance(keys, dict) else ()


def tensor_shapes(weights: Path) -> dict[str, list[int]]:
    """The shape of each tensor of a safetensors file; UserError where it is cut short or is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, "pt") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{weights}: cannot be read ({error}); fetch or train the adapter again") from error


def check_fits(adapter: Path, model: str) -> None:
    """UserError that names the first tensor that does not fit, for another base's adapter. Loads no weights."""
    empty = skeleton(model)
    modules, parameters = dict(empty.named_modules()), dict(empty.named_parameters())
    for name, shape in tensor_shapes(adapter / "adapter_model.safetensors").items():
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
            base = adapter_facts(adapter).base or "another base"
            raise UserError(f"{adapter}: {name} {need}; it was trained on {base}: name both with ADAPTER= MODEL=")


def _times(shape: list[int]) -> str:
    return " x ".join(map(str, shape))


def skeleton(model: str):
    """The model without its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(load_config(model))


def load_config(model: str):
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{model}: cannot be loaded ({first_line(error)}); give a folder, or a hub id with HF_TOKEN set"
        ) from error


def load_tokenizer(model: str, adapter: Path | None, prompt: str):
    """The tokenizer saved beside the adapter, else the base's, with the chat template that `prompt` names."""
    from transformers import AutoTokenizer

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


def load_base(model: str, bits: int, keep_quantised: bool = False):
    """The base model in evaluation mode, on the GPU where there is one, in bfloat16 (float32 on a CPU).

    bits: 8 and 4 quantise the linear layers as the recipes do (LLM.int8 rows; NF4 with double quantisation).
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from fastdora import quantized
    from fastdora.plugin import peft_int8

    peft_int8.patch()
    if not is_verbose():
        logging.disable_progress_bar()  # one for each model that is loaded
    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if gpu else torch.float32
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            model,
            dtype=dtype,
            quantization_config=quantized.quantisation(bits, dtype),
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


def attach(model, adapter: Path):
    """The model with its adapter merged; on layers that are still quantised attached, with DoRA's norms cached.

    Raises UserError unless every tensor of the file, magnitudes included, is found in the model afterwards: adapters
    that are loaded another way lose them without a word.
    """
    import torch
    from peft import PeftModel
    from peft.helpers import DoraCaching
    from peft.tuners.lora import LoraLayer
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import load_file

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


def save(model, tokenizer, folder: Path, ends: list[int], shard_size: str = "5GB") -> None:
    """Write weights, tokenizer and configuration, for other versions too; answers are greedy and stop at `ends`."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder, max_shard_size=shard_size)
    tokenizer.save_pretrained(folder)
    make_compatible(folder)


def resolve_adapter(adapter: str) -> Path:
    """The folder of an adapter that is given as a folder or as a hub id (configuration, weights and tokenizer only)."""
    if Path(adapter).exists() or adapter.count("/") != 1 or adapter.startswith((".", "/", "~")):
        return Path(adapter)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(adapter, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"ADAPTER={adapter}: is neither a folder nor to be had from the hub ({first_line(error)})"
        ) from error


def template_sha256(tokenizer) -> str:
    import hashlib

    return hashlib.sha256(json.dumps(tokenizer.chat_template).encode()).hexdigest()
