"""What a trained adapter started from is compared before it is evaluated, merged, chatted with or served."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from failures import refuses, says
from runs import RECIPES

from fastdora.plugin.checksums import starting_files, weights_sha256
from finlora.core.paths import shown
from finlora.evaluate.evaluation import Request, resolve
from finlora.evaluate.runner import prepare_folder
from finlora.export.trained import load_trained, merged_folder
from finlora.train.runs import check_start

pytestmark = pytest.mark.xdist_group("after")
NAME = RECIPES[8]


def record(out: Path, changed: str = "") -> None:
    """Give the run the checksums that training records; another one for the file whose name begins so."""
    keys = yaml.safe_load((out / "recipe.yaml").read_text(encoding="utf-8"))
    start = {
        model: {name: "0" * 64 if changed and name.startswith(changed) else digest for name, digest in files.items()}
        for model, files in starting_files(keys).items()
    }
    run = json.loads((out / "run.json").read_text(encoding="utf-8")) | {"start": start}
    (out / "run.json").write_text(json.dumps(run), encoding="utf-8")


USES = {
    "merge, chat, serve, publish": lambda out: load_trained(NAME),
    "merge, chat, serve by the adapter's folder": lambda out: load_trained(adapter=str(out)),
    "eval": lambda out: resolve(Request(recipe=NAME, tasks="fpb")),
    "eval by the adapter's folder": lambda out: resolve(Request(adapter=str(out), tasks="fpb")),
}


@pytest.mark.parametrize("use", USES)
def test_a_base_whose_weights_were_replaced_is_refused(use, runs):
    out = runs / NAME
    record(out)
    USES[use](out)
    record(out, "model.safetensors")
    with refuses("base model has changed", "model.safetensors", "restore", "FORCE=1", file=f"outputs/{NAME}"):
        USES[use](out)


def test_another_base_that_is_asked_for_is_not_the_one_it_was_trained_on(runs):
    """MODEL= with another folder is judged by its shapes and by the adapter's own words, as before."""
    record(runs / NAME, "model.safetensors")
    check_start(runs / NAME, model=str(runs))
    base = json.loads((runs / NAME / "run.json").read_text(encoding="utf-8"))["base_model"]
    with refuses("base model has changed"):
        check_start(runs / NAME, model=base)


def test_an_adapter_that_was_trained_anew_since_is_told(runs, capsys):
    """The run's own adapter holds what it began with: it stays usable, and the reader knows."""
    out, first = runs / NAME, str(runs / RECIPES[16])
    keys = yaml.safe_load((out / "recipe.yaml").read_text(encoding="utf-8"))
    (out / "recipe.yaml").write_text(yaml.safe_dump(keys | {"lora_model_dir": first}), encoding="utf-8")
    record(out)
    load_trained(NAME)
    assert capsys.readouterr().err == ""
    record(out, "adapter_model")
    load_trained(NAME)
    says(capsys.readouterr().err.rstrip("\n").removeprefix("warning: "), f"{first}/adapter_model", "changed since")


def test_runs_of_before_have_no_checksums_and_stay_usable(runs):
    assert "start" not in json.loads((runs / NAME / "run.json").read_text(encoding="utf-8"))
    load_trained(NAME)


def test_a_merge_into_weights_that_were_replaced_since_is_none(runs):
    trained = load_trained(NAME)
    about = {"adapter_sha256": trained.facts.sha256, "base": shown(trained.base_model), "trained_bits": 8}
    for digest, usable in ((None, True), (weights_sha256(trained.base_model), True), ("0" * 64, False)):
        trained.merged.mkdir(exist_ok=True)
        about |= {"base_sha256": digest, "weights": {}}
        (trained.merged / "merge.json").write_text(json.dumps(about), encoding="utf-8")
        assert bool(merged_folder(trained)) == usable


def test_kept_answers_of_a_base_whose_weights_were_replaced_are_another_models(runs, tmp_path):
    evaluation = resolve(Request(recipe=NAME, tasks="fpb", base=True, results=tmp_path / "results"))
    base, adapter = evaluation.runs(None)
    assert base.base_sha256 == adapter.base_sha256 == weights_sha256(evaluation.model)
    prepare_folder(base, evaluation, {})
    assert prepare_folder(base, evaluation, {}) == ["fpb"]
    with refuses("another model", "base_sha256", "FORCE=1"):
        prepare_folder(replace(base, base_sha256="0" * 64), evaluation, {})
    record = tmp_path / "results" / base.subject / "run.json"
    kept = json.loads(record.read_text(encoding="utf-8"))
    del kept["base_sha256"]  # of before 2026-11
    record.write_text(json.dumps(kept), encoding="utf-8")
    assert prepare_folder(base, evaluation, {}) == ["fpb"]
