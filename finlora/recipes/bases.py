"""Base models: their sizes, their layers, and their files from the Hub."""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from finlora.core.errors import UserError, first_line
from finlora.core.paths import ROOT
from finlora.recipes.names import BASES

# Whose blocks have the layers of `linear_layers`. Phi-3 has a Llama's sizes, and one layer for q, k and v.
LLAMA_BLOCKS = ("llama", "mistral", "qwen2", "qwen3")


def shape(base_model: str) -> dict[str, Any] | None:
    """The sizes of a base model: from a local folder's config.json, else from recipes/bases.yaml.

    None where they are not known or its blocks are not a Llama's. Raises UserError where the folder's lack a size.
    """
    config = ROOT / base_model / "config.json"
    if config.is_file():
        try:
            sizes = json.loads(config.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            sizes = None
        needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        if not isinstance(sizes, dict) or not all(isinstance(sizes.get(key), int) for key in needed):
            raise UserError(f"{config}: lacks one of {', '.join(needed)}; take a model of Llama's kind")
        return sizes if sizes.get("model_type", "llama") in LLAMA_BLOCKS else None
    return yaml.safe_load(BASES.read_text(encoding="utf-8")).get(base_model)


def linear_layers(shape: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each linear layer of one Llama block."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    kv = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    return {
        "q_proj": (hidden, hidden),
        "k_proj": (hidden, kv),
        "v_proj": (hidden, kv),
        "o_proj": (hidden, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }


def linear_parameters(shape: dict[str, Any]) -> int:
    """The weights of the linear layers of all blocks."""
    return sum(inputs * outputs for inputs, outputs in linear_layers(shape).values()) * shape["num_hidden_layers"]


class Adapted(NamedTuple):
    """Trainable parameters of one target module over all layers: in A and B, and in DoRA's magnitudes."""

    layers: int
    a_and_b: int
    magnitude: int


def adapter_parameters(recipe: dict[str, Any], shape: dict[str, Any]) -> dict[str, Adapted]:
    """By target module: r (in + out) for A and B, and with DoRA a magnitude for each output (arXiv 2402.09353)."""
    linears, layers, counted = linear_layers(shape), shape["num_hidden_layers"], {}
    for target in recipe["lora_target_modules"]:
        inputs, outputs = linears[target]
        magnitude = layers * outputs if recipe.get("peft_use_dora") else 0
        counted[target] = Adapted(layers, layers * recipe["lora_r"] * (inputs + outputs), magnitude)
    return counted


def trainable_parameters(recipe: dict[str, Any], shape: dict[str, Any]) -> int:
    return sum(one.a_and_b + one.magnitude for one in adapter_parameters(recipe, shape).values())


TEXT_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]  # configuration and tokenizer
BASE_FILES = ["*.safetensors", *TEXT_FILES]


def fetch_base(
    path: Path, recipe: dict[str, Any], called: str = "key 'base_model'", files: list[str] = BASE_FILES
) -> Path:
    """The folder of a base model; one of the hub is brought into the cache: weights as safetensors, no code, no pickle.

    What follows runs without the hub, so that neither transformers nor bitsandbytes fetches anything of its own.
    path, called: what an error begins with, and what names the model there. files: patterns of what is fetched.
    """
    name = recipe["base_model"]
    if (ROOT / name).is_dir():
        return ROOT / name
    import huggingface_hub  # a second of start-up, which a local base model spares
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    if "*.safetensors" in files:  # minutes, without a bar where the output is a pipe
        print(f"base      {name}: from the hub, unless it is in its cache", file=sys.stderr, flush=True)
    try:
        folder = huggingface_hub.snapshot_download(name, allow_patterns=files, ignore_patterns=["*/*"])
    except GatedRepoError as error:
        raise UserError(f"{name} is gated: accept its licence on its page and set HF_TOKEN") from error
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise UserError(f"{path}: {called}: {name} is no folder here and no model of the hub; fix the name") from error
    except OSError as error:  # the hub's other errors among them
        reason = first_line(error).partition(". ")[0]
        raise UserError(
            f"{path}: {called}: {name} is no folder here and cannot be fetched ({reason}); fix the name or the network"
        ) from error
    if "*.safetensors" in files and not any(Path(folder).glob("*.safetensors")):
        raise UserError(f"{path}: {called}: {name} has no safetensors; choose a model that has")
    return Path(folder)
