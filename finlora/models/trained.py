"""A trained adapter, named by its recipe, folder or hub id: its base model and its files."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import yaml

from finlora.core.errors import UserError, first_line
from finlora.core.files import read_json, sha256, tensor_shapes
from finlora.core.paths import slug
from finlora.recipes.bases import fetch_base
from finlora.recipes.names import RECIPES
from finlora.train.runs import OUTPUTS, TrainedRecipe, check_base_weights, check_start, of_recipe

PROMPTS = RECIPES / "prompts"


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
    shapes: dict[str, list[int]]  # of each tensor of its weights


@dataclass(frozen=True)
class TrainedModel:
    """An adapter whose files are whole, and what is known of its training. No weights are loaded."""

    name: str
    options: str  # RECIPE=... or ADAPTER=...: how it was named, for `make` commands in hints
    base_model: str  # folder or hub id
    bits: int  # of the base's weights in training: 16, 8 or 4
    # None for a base alone, which only an evaluation takes.
    adapter: Path | None = None
    facts: AdapterFacts | None = None
    folder: Path | None = None  # what merge and publish write to
    run: TrainedRecipe = TrainedRecipe()  # what only a trained recipe has, not an adapter from elsewhere
    same_weights: bool = False  # the base's weights are those that the adapter's run recorded

    @property
    def eot_tokens(self) -> tuple[str, ...]:
        """Of the adapter's recipe. Its base is asked with the same tokenizer, template and ends."""
        return self.facts.eot_tokens if self.facts else ()

    @property
    def merged(self) -> Path:
        """Where its merged model lies, or would lie."""
        return self.folder / "merged"


def load_trained(
    recipe: str | None = None,
    adapter: str | None = None,
    model: str | None = None,
    bits: int | None = None,
    tiny: bool = False,
) -> TrainedModel:
    """A trained recipe, or an adapter by its folder or hub id.

    model: the adapter's base (default: the one that the adapter names). bits: of its base in training (default 16).
    Raises UserError where it is not trained, not whole, or not the adapter that run.json records.
    """
    if bool(recipe) == bool(adapter) or (recipe and (model or bits)):
        raise UserError("give RECIPE=<trained recipe>, or ADAPTER=<folder or hub id> with MODEL=<its base> and BITS=")
    options = f"RECIPE={recipe}{' TINY=1' if tiny else ''}" if recipe else f"ADAPTER={adapter}"
    options += (f" MODEL={model}" if model else "") + (f" BITS={bits}" if bits else "")
    run = of_recipe(recipe, tiny) if recipe else TrainedRecipe()
    path = run.adapter or resolve_adapter(adapter)
    facts = adapter_facts(path)
    if recipe:
        check_start(path)
        return TrainedModel(run.recipe, options, run.model, run.bits, path, facts, folder=path, run=run)
    base = model or facts.base
    if not base:
        raise UserError(f"{adapter}: does not say which base it was trained on; name it with MODEL=")
    folder = OUTPUTS / "adapters" / slug(adapter)  # no recipe has this name
    same_weights = check_start(path, base)
    return TrainedModel(slug(adapter), options, base, bits or 16, path, facts, folder, same_weights=same_weights)


def load_asked(
    recipe: str | None, adapter: str | None, model: str | None, bits: int | None, tiny: bool
) -> TrainedModel:
    """As `load_trained`, or a base alone, for an evaluation: bits may be others than those of training."""
    if not (recipe or adapter):
        return TrainedModel(slug(model), f"MODEL={model}", model, bits or 16)
    trained = load_trained(recipe, adapter, model, None, tiny)
    if adapter and not model:
        print(f"MODEL= is not given: taking the adapter's own base, {trained.base_model}")
    return replace(trained, bits=bits or trained.bits)


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
    shapes = tensor_shapes(weights)
    magnitudes = any(name.endswith(("lora_magnitude_vector", "lora_magnitude_vector.weight")) for name in shapes)
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
        shapes=shapes,
    )


def _eot_tokens(recipe: Path) -> tuple[str, ...]:
    try:
        keys = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):  # an adapter from elsewhere has no recipe of ours
        return ()
    return tuple(keys.get("eot_tokens") or ()) if isinstance(keys, dict) else ()


def resolve_adapter(adapter: str) -> Path:
    """The folder of an adapter that is given as a folder or as a hub id (configuration, weights and tokenizer only)."""
    if Path(adapter).exists() or adapter.count("/") != 1 or adapter.startswith((".", "/", "~")):
        return Path(adapter)
    from huggingface_hub import snapshot_download  # late: it takes a third of a second
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(adapter, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"ADAPTER={adapter}: is neither a folder nor to be had from the hub ({first_line(error)})"
        ) from error


def check_named_base(model: str, facts: AdapterFacts, force: bool = False) -> None:
    """UserError where MODEL= is not the base that the adapter names: one of equal shapes would be taken in silence.

    force: whether the command has FORCE=1, which takes it nevertheless.
    """
    if facts.base and model != facts.base and Path(model).resolve() != Path(facts.base).resolve():
        remedy = ", or add FORCE=1 where it is the same model in another place" if force else ""
        raise UserError(f"MODEL={model}: the adapter was trained on {facts.base}; leave MODEL= out{remedy}")


def fetch_base_model(trained: TrainedModel, force: bool | None = None) -> None:
    """Bring the base into the cache, as safetensors and text.

    UserError where it is not the base that the adapter names, or not what the adapter's run recorded. force: FORCE=1,
    which takes a base of another name; None for a command without it.
    """
    if trained.facts and not (trained.run.recipe or force or trained.same_weights):
        check_named_base(trained.base_model, trained.facts, force is not None)
    option = "key 'base_model'" if trained.run.recipe else "the base, which MODEL= names"
    fetch_base(Path(trained.name), {"base_model": trained.base_model}, option)
    if trained.adapter:
        check_base_weights(trained.adapter, trained.base_model)


def disable_hub() -> None:
    """Call it before bitsandbytes is imported, which would fetch compiled kernels or wait for a missing network."""
    from huggingface_hub import constants  # late: naming a mistake in the options does not need it

    constants.HF_HUB_OFFLINE = True
    # bitsandbytes warns of its cast to float16 in each layer of each step.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
