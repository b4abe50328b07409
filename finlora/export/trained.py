"""A trained adapter, named by its recipe, folder or hub id: its base model, its files, and its merged model."""

import logging
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fastdora.plugin.checksums import weights_sha256
from finlora.core.compatible import make_compatible
from finlora.core.errors import UserError
from finlora.core.files import read_json, sha256
from finlora.core.paths import ROOT, shown, slug
from finlora.models.load import AdapterFacts, adapter_facts, resolve_adapter
from finlora.recipes.bases import fetch_base
from finlora.train.runs import OUTPUTS, check_base_weights, check_start, of_recipe


@dataclass(frozen=True)
class TrainedModel:
    """An adapter whose files are whole, and what is known of its training. No weights are loaded."""

    name: str
    options: str  # RECIPE=... or ADAPTER=...: how it was named, for `make` commands in hints
    base_model: str  # folder or hub id
    bits: int  # of the base's weights in training: 16, 8 or 4
    adapter: Path
    facts: AdapterFacts
    folder: Path  # what merge and publish write to
    same_weights: bool = False  # the base's weights are those that the adapter's run recorded
    # Known of a trained recipe alone, not of an adapter from elsewhere.
    recipe: str | None = None
    tiny: bool = False
    test_sets: list[str] = field(default_factory=list)
    run_record: dict[str, Any] | None = None  # run.json
    run_config: dict[str, Any] = field(default_factory=dict)  # recipe.yaml, as it was trained

    @property
    def merged(self) -> Path:
        """Where its merged model lies, or would lie."""
        return self.folder / "merged"


@dataclass(frozen=True, kw_only=True)
class MergeRecord:
    """merge.json of a merged model. A key that earlier versions did not write is None."""

    adapter: str  # its folder
    adapter_sha256: str
    base: str  # folder or hub id
    base_sha256: str | None
    method: str
    r: int
    alpha: int | float
    trained_bits: int
    asked_for: str | None  # INTO=
    into: str  # full or dequantised
    dialogues: int  # rows that logits were compared on
    from_trained: dict[str, dict]  # what each choice of weights differs by from the model as trained
    trained_score: dict[str, float]
    verified: dict[str, float]  # the distance of the saved model's logits from those of base and adapter
    template_sha256: str
    weights: dict[str, str]  # SHA-256 by file
    versions: dict[str, str]
    git: dict


def read_merge_record(folder: Path) -> MergeRecord | None:
    """None where merge.json is missing or is not one."""
    keys = read_json(folder / "merge.json")
    return MergeRecord(**{field.name: keys.get(field.name) for field in fields(MergeRecord)}) if keys else None


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
    return _of_recipe(recipe, tiny, options) if recipe else _of_adapter(adapter, model, bits, options)


def _of_recipe(recipe: str, tiny: bool, options: str) -> TrainedModel:
    run = of_recipe(recipe, tiny)
    return TrainedModel(
        name=run.recipe,
        options=options,
        base_model=run.model,
        bits=run.bits,
        adapter=run.adapter,
        facts=adapter_facts(run.adapter),
        folder=run.adapter,
        recipe=run.recipe,
        tiny=run.tiny,
        test_sets=run.test_sets,
        run_record=run.record,
        run_config=run.keys,
    )


def _of_adapter(adapter: str, model: str | None, bits: int | None, options: str) -> TrainedModel:
    folder = resolve_adapter(adapter)
    facts = adapter_facts(folder)
    if not (model or facts.base):
        raise UserError(f"{adapter}: does not say which base it was trained on; name it with MODEL=")
    same_weights = check_start(folder, model or facts.base)
    return TrainedModel(
        name=slug(adapter),
        options=options,
        base_model=model or facts.base,
        bits=bits or 16,
        adapter=folder,
        facts=facts,
        folder=OUTPUTS / "adapters" / slug(adapter),  # no recipe has this name
        same_weights=same_weights,
    )


def merged_folder(trained: TrainedModel) -> Path | None:
    """The folder with the merged model of this very adapter and base; None where it is missing or incomplete."""
    record = read_merge_record(trained.merged)
    expected = (trained.facts.sha256, shown(trained.base_model), trained.bits)
    if not record or (record.adapter_sha256, record.base, record.trained_bits) != expected:
        return None
    base = weights_sha256(trained.base_model, ROOT)  # None where it is gone: the merged model is whole without it
    if base and record.base_sha256 not in (None, base):
        return None
    return trained.merged if all((trained.merged / name).is_file() for name in record.weights) else None


def need_merged(trained: TrainedModel) -> Path:
    """`merged_folder`, or UserError that says what to run."""
    if folder := merged_folder(trained):
        make_compatible(folder)  # one that was merged before 2026-11
        return folder
    state = "does not hold this adapter's model" if (trained.merged / "merge.json").is_file() else "is not there"
    raise UserError(f"{shown(str(trained.merged))}: {state}; run `make merge {trained.options}`")


def check_weights(folder: Path) -> None:
    """UserError where a merged model's weights are not those that were verified."""
    for name, expected in read_merge_record(folder).weights.items():
        if sha256(folder / name) != expected:
            raise UserError(f"{shown(str(folder / name))}: is not what was verified; merge again with FORCE=1")


def fetch_base_model(trained: TrainedModel) -> None:
    """Bring the base into the cache, as safetensors and text, and turn the hub off from there on.

    UserError where what came is not what the adapter's run recorded.
    """
    option = "key 'base_model'" if trained.recipe else "the base, which MODEL= names"
    fetch_base(Path(trained.name), {"base_model": trained.base_model}, option)
    check_base_weights(trained.adapter, trained.base_model)
    disable_hub()


def disable_hub() -> None:
    """Call it before bitsandbytes is imported, which would fetch compiled kernels or wait for a missing network."""
    from huggingface_hub import constants  # late: naming a mistake in the options does not need it

    constants.HF_HUB_OFFLINE = True
    # bitsandbytes warns of its cast to float16 in each layer of each step.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
