"""The benchmarks' own parts: the recipes that they run, and how they start, end and report processes."""

import json

import pytest
import torch
import yaml
from safetensors.torch import save_file

from bench import distributed, train_throughput
from fastdora.plugin.keys import check_keys, kept_schema
from finlora.core.paths import ROOT
from finlora.train.tiny import CACHE

pytestmark = pytest.mark.xdist_group("axolotl")

RUNS = yaml.safe_load(train_throughput.RUNS.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", RUNS)
def test_a_measured_recipe_has_keys_that_axolotl_knows(name, tmp_path):
    changes = dict(RUNS[name].get("set", {}))
    changes |= dict.fromkeys(changes.pop("drop", []))
    shipped = yaml.safe_load((ROOT / "recipes" / f"{RUNS[name]['recipe']}.yaml").read_text(encoding="utf-8"))
    recipe = train_throughput.shipped_recipe(RUNS[name]["recipe"], "base", tmp_path / "rows", tmp_path, **changes)
    assert {key: recipe.get(key) for key in changes} == changes
    check_keys(recipe, name, kept_schema(shipped["plugins"], CACHE))
    assert recipe["output_dir"].startswith(str(tmp_path)) and "test_datasets" not in recipe


PROGRAM = "import os, sys, time; sys.stdin.readline(); print('rank', os.environ.get('RANK'), flush=True); {}"


@pytest.mark.parametrize(
    "end, timeout, result",
    [
        ("open(os.environ['CLOCK'], 'w').close()", 60, None),
        ("sys.exit(3) if os.environ['RANK'] == '1' else time.sleep(60)", 60, "rank 1"),
        ("time.sleep(60)", 2, "not done after 2 s"),
    ],
)
def test_processes_end_together(end, timeout, result, tmp_path, monkeypatch):
    """All of them when one fails, and when the time is up; the last line of the one that failed says why."""
    monkeypatch.setattr(train_throughput, "LATER", PROGRAM.format(end))
    running = train_throughput.start({"base_model": "x"}, tmp_path, 2)
    try:
        assert train_throughput.finish(running, timeout) == result
        assert all(child.poll() is not None for child in running.children)
    finally:
        train_throughput.stop(running)
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text()) == {"base_model": "x"}
    assert result or sorted(path.name for path in tmp_path.glob("clock*")) == ["clock0", "clock1"]


def test_two_runs_are_compared_by_their_largest_differences(tmp_path):
    runs = []
    for number in range(2):
        out = tmp_path / str(number) / "out"
        out.mkdir(parents=True)
        save_file({"a": torch.tensor([1.0, 2.0 + number])}, out / "adapter_model.safetensors")
        log = [{"loss": 3.0}, {"loss": 2.0 - number / 4}]
        (out / "metrics.json").write_text(json.dumps({"log": log}))
        for rank in range(2):
            norms = {"compared": 5, "moved": 1.0, "worst": rank / 8}
            (out / f"norms-{rank}.json").write_text(json.dumps(norms))
        runs.append(out.parent)
    row = distributed.compared(runs[1], distributed.trained(runs[0]))
    assert row == {
        "steps": 2,
        "loss": 1.75,
        "same_tensors": True,
        "adapter_difference": 1.0,
        "loss_difference": 0.25,
        "norms_compared": 10,
        "norm_difference": 0.125,
    }
