"""The merged model of a trained adapter on disk: its record, merge.json, and whether it is whole."""

from dataclasses import dataclass, field, fields
from pathlib import Path

from fastdora.plugin.checksums import cached_sha256, weights_sha256
from finlora.core.compatible import make_compatible
from finlora.core.errors import UserError
from finlora.core.files import read_json
from finlora.core.paths import ROOT, shown
from finlora.models.trained import TrainedModel


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
    template_sha256: str
    versions: dict[str, str]
    git: dict
    # What merging finds.
    into: str = "full"  # or dequantised
    from_trained: dict[str, dict] = field(default_factory=dict)  # how each choice of weights differs from the trained
    trained_score: dict[str, float] = field(default_factory=dict)
    dialogues: int = 0  # rows that logits were compared on
    verified: dict[str, float] = field(default_factory=dict)  # saved logits against those of base and adapter
    weights: dict[str, str] = field(default_factory=dict)  # SHA-256 by file


def read_merge_record(folder: Path) -> MergeRecord | None:
    """None where merge.json is missing or is not one."""
    keys = read_json(folder / "merge.json")
    return MergeRecord(**{field.name: keys.get(field.name) for field in fields(MergeRecord)}) if keys else None


def is_merged(trained: TrainedModel, into: str | None) -> bool:
    """Whether its folder holds the model that merging would make. UserError where merging would replace files that it
    did not write, or the model of an adapter from elsewhere.
    """
    folder, record = shown(trained.merged), read_merge_record(trained.merged)
    if record is None and trained.merged.exists():
        raise UserError(f"{folder}: holds files that `make merge` did not write; FORCE=1 replaces them")
    if record and record.adapter_sha256 != trained.facts.sha256 and record.adapter != shown(trained.adapter):
        raise UserError(
            f"{folder}: holds the model merged from {record.adapter}; FORCE=1 replaces it, and an adapter folder of "
            "another name keeps both"
        )
    return bool(merged_folder(trained)) and into in (record.asked_for, record.into)


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
    raise UserError(f"{shown(trained.merged)}: {state}; run `make merge {trained.options}`")


def check_weights(folder: Path) -> None:
    """UserError where a merged model's weights are not those that were verified."""
    for name, expected in read_merge_record(folder).weights.items():
        if cached_sha256(folder / name, ROOT) != expected:
            raise UserError(f"{shown(folder / name)}: is not what was verified; merge again with FORCE=1")
