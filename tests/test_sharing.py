"""Shared prefixes under axolotl: the same training, every row once an epoch, and refusals."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import Dataset
from rounding import FACTOR
from safetensors.torch import load_file
from test_plugin import axolotl, recipe, refused, train, write_rows  # noqa: F401 (fixtures)

from fastdora.packing import GROUP, PREFIX
from fastdora.plugin.sharing import Packs

pytestmark = pytest.mark.xdist_group("axolotl")
# All rows in one pack: a step is then the same with and without sharing.
EXACT = {"fastdora_shared_prefixes": False, "lora_dropout": 0.0, "bf16": False, "sequence_len": 1536, "num_epochs": 3}
EXACT |= {"evals_per_epoch": 1, "eval_strategy": None}


def trained(axolotl, recipe, tmp_path, **changes) -> tuple[dict, dict, str]:  # noqa: F811
    code, output = train(axolotl, recipe(max_steps=None, **changes))
    assert code == 0, output[-3000:]
    out = tmp_path / "out"
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    weights = load_file(out / "adapter_model.safetensors")
    out.rename(tmp_path / f"out-{len(list(tmp_path.glob('out-*')))}")
    return metrics, weights, output


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"load_in_8bit": False, "peft_use_dora": False}, marks=pytest.mark.slow),
        pytest.param({"gradient_checkpointing": True, "peft_use_rslora": True}, marks=pytest.mark.slow),
        pytest.param({"load_in_8bit": False, "load_in_4bit": True, "adapter": "qlora"}, marks=pytest.mark.slow),
    ],
)
def test_training_is_the_same(axolotl, recipe, tmp_path, changes):  # noqa: F811
    """In float32 without dropout, all rows in each step: the adapter moves as without sharing, validation too.

    Adam divides by the gradient's size, so a rounding may turn a step around where that is near zero. The bound is what
    one rounding of the start changes.
    """
    plugins = [*yaml.safe_load(open(recipe(), encoding="utf-8"))["plugins"], "nudged.Nudged"]
    changes = EXACT | {"eval_sample_packing": True, "seed": 7, "plugins": plugins} | changes
    plain, expected, _ = trained(axolotl, recipe, tmp_path, **changes)
    shared, actual, output = trained(axolotl, recipe, tmp_path, **changes | {"fastdora_shared_prefixes": True})
    nudged, other, _ = trained(axolotl, recipe, tmp_path, nudge=1, **changes)
    assert "train: 40 of 40 rows share" in output and "validation: 12 of 12 rows share" in output
    for metrics in (plain, shared):
        assert [metrics[key] for key in ("samples", "tokens", "steps")] == [120, plain["tokens"], 3]
    start = load_file(tmp_path / "out-0" / "start.safetensors")

    def apart(adapter: dict[str, torch.Tensor], from_adapter: dict[str, torch.Tensor]) -> float:
        return torch.cat([(adapter[name] - from_adapter[name]).flatten() for name in expected]).norm().item()

    moved = apart(expected, start)
    least = torch.finfo(torch.float32).eps * torch.cat([one.flatten() for one in expected.values()]).norm().item()
    bound = FACTOR * max(apart(other, expected), least)
    assert apart(actual, expected) <= bound < 0.1 * moved
    for key in ("final_loss", "final_eval_loss"):
        terms = plain["tokens"] / 3 * torch.finfo(torch.float32).eps  # a mean over so many tokens, each rounded
        assert abs(shared[key] - plain[key]) <= FACTOR * max(abs(nudged[key] - plain[key]), terms * plain[key])


def config(**changes):
    base = dict(
        sequence_len=64, micro_batch_size=1, gradient_accumulation_steps=1, fastdora_rows_per_prefix=None,
        sample_packing_bin_size=None, seed=3, num_epochs=5, max_steps=None, axolotl_config_path="r.yaml",
    )  # fmt: skip
    return SimpleNamespace(**base | changes)


def dataset(rows: int) -> Dataset:
    lengths = [20 + n % 7 for n in range(rows)]
    shared = {GROUP: [n % 3 if n % 4 else -1 for n in range(rows)], PREFIX: [9 if n % 4 else 0 for n in range(rows)]}
    return Dataset.from_dict({"input_ids": [[1] * size for size in lengths], "length": lengths, **shared})


@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("together", [None, 3])
def test_each_epoch_has_every_row_once_in_as_many_packs(monkeypatch, world, together):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    keys = config(fastdora_rows_per_prefix=together, gradient_accumulation_steps=12 // world)
    packs = Packs(keys, dataset(101))
    epochs = []
    for epoch in range(5):
        packs.set_epoch(epoch)
        batches = list(packs)
        assert len(batches) == len(packs) and len(packs) % 12 == 0 and all(len(batch) == 1 for batch in batches)
        assert sorted(row for (pack,) in batches for row in pack) == list(range(101))
        epochs.append(batches)
    assert all(epochs[0] != other for other in epochs[1:])
    again = Packs(keys, dataset(101))
    again.set_epoch(4)
    assert list(again) == epochs[4], "drawn from the seed and the epoch alone, as after a resume"
    longer = Packs(SimpleNamespace(**vars(keys) | {"num_epochs": 60}), dataset(101))
    assert len(longer) == len(packs)
    for epoch in range(60):
        longer.set_epoch(epoch)
        assert sorted(row for (pack,) in longer for row in pack) == list(range(101))
        assert len(list(longer)) == len(longer)
    kept = Packs(keys, dataset(101), shuffled=False)
    assert list(kept) == list(kept) and len(kept) % world == 0
    few = Packs(keys, dataset(5))
    assert len(few) % world == 0 and sorted(row for (pack,) in few for row in pack) == list(range(5))


def test_fewer_rows_than_processes_is_an_error(monkeypatch):
    from fastdora.plugin.keys import RecipeError

    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(RecipeError, match="r.yaml.*datasets"):
        Packs(config(), dataset(3))


@pytest.mark.parametrize(
    "changes, key",
    [
        ({"sample_packing": False}, "sample_packing"),
        ({"attn_implementation": "eager"}, "attn_implementation"),
        ({"curriculum_sampling": True}, "curriculum_sampling"),
        ({"streaming": True}, "streaming"),
        ({"fastdora_rows_per_prefix": 0}, "fastdora_rows_per_prefix"),
        ({"fastdora_rows_per_prefix": 4, "fastdora_shared_prefixes": False}, "fastdora_rows_per_prefix"),
    ],
)
def test_what_cannot_share_is_refused_by_its_key(axolotl, recipe, changes, key):  # noqa: F811
    path = recipe(**{"fastdora_shared_prefixes": True} | changes)
    code, output = train(axolotl, path)
    assert code == 1
    refused(output, "fastdora_shared_prefixes", file=path, key=key)


def test_rows_without_a_common_beginning_train_as_they_are(axolotl, recipe, tmp_path):  # noqa: F811
    path = recipe(fastdora_shared_prefixes=True, max_steps=2)
    write_rows(tmp_path / "train.jsonl", 1)
    code, output = train(axolotl, path)
    assert code == 0 and "train: 0 of 1 rows share 0 prefixes" in output, output[-3000:]
