"""What a trained adapter started from is compared before it is evaluated, merged, chatted with or served."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from failures import refuses, says
from runs import RECIPES

from fastdora.plugin.checksums import starting_files, weights_sha256
from finlora.core.paths import SAMPLE, shown
from finlora.evaluate.evaluation import Request, resolve
from finlora.evaluate.results import prepare_folder
from finlora.export import chat
from finlora.export.merged import merged_folder
from finlora.models import trained as trained_models
from finlora.models.trained import load_trained

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
    "eval": lambda out: resolve(Request(recipe=NAME, tasks="fpb", tests=str(SAMPLE))),
    "eval by the adapter's folder": lambda out: resolve(Request(adapter=str(out), tasks="fpb", tests=str(SAMPLE))),
}


@pytest.mark.parametrize("use", USES)
def test_a_base_whose_weights_were_replaced_is_refused(use, runs):
    out = runs / NAME
    record(out)
    USES[use](out)
    record(out, "model.safetensors")
    with refuses("base model has changed", "model.safetensors", "restore", "FORCE=1", file=f"outputs/{NAME}"):
        USES[use](out)


WITH_MODEL = {
    "merge, chat, serve": lambda out, model: load_trained(adapter=str(out), model=str(model)),
    "eval": lambda out, model: resolve(Request(adapter=str(out), model=str(model), tasks="fpb", tests=str(SAMPLE))),
    "eval FORCE=1": lambda out, model: resolve(
        Request(adapter=str(out), model=str(model), tasks="fpb", tests=str(SAMPLE), force=True)
    ),
}


@pytest.mark.parametrize("use", WITH_MODEL)
def test_a_model_that_is_named_is_told_by_its_weights(use, runs, tiny_base, tmp_path):
    """The same weights may be anywhere; others are refused, whatever FORCE=1 says of names."""
    out, other = runs / NAME, tmp_path / "other"
    record(out)
    shutil.copytree(tiny_base, other)
    WITH_MODEL[use](out, other)
    (other / "model.safetensors").write_bytes(b"other")
    with refuses("other weights", "other/model.safetensors", "leave MODEL= out", file=f"MODEL={other}"):
        WITH_MODEL[use](out, other)
    WITH_MODEL[use](out, tiny_base)


def test_a_model_is_told_by_its_name_where_no_weights_are_recorded(runs, tiny_base, tmp_path):
    out, other = runs / NAME, tmp_path / "other"
    shutil.copytree(tiny_base, other)
    for use in WITH_MODEL.values():
        use(out, tiny_base)
    with refuses("leave MODEL= out", "FORCE=1", str(tiny_base), file=f"MODEL={other}"):
        WITH_MODEL["eval"](out, other)
    WITH_MODEL["eval FORCE=1"](out, other)
    with refuses("leave MODEL= out", str(tiny_base), file=f"MODEL={other}") as error:
        chat.load(load_trained(adapter=str(out), model=str(other)), "saved", keep_quantised=False)
    assert "FORCE" not in str(error.value)  # chat has none


def test_a_model_is_compared_once_it_is_fetched(runs, tmp_path, monkeypatch):
    """In place of the hub's cache, a folder that comes between."""
    out = runs / NAME
    record(out)
    trained = load_trained(adapter=str(out), model="me/other")
    request = Request(adapter=str(out), model="me/other", tasks="fpb", tests=str(SAMPLE), force=True)

    def fetch(*_):
        (tmp_path / "me" / "other").mkdir(parents=True, exist_ok=True)
        (tmp_path / "me" / "other" / "model.safetensors").write_bytes(b"other")

    monkeypatch.setattr(trained_models, "fetch_base", fetch)
    for use in lambda: resolve(request), lambda: trained_models.fetch_base_model(trained, force=True):
        with refuses("other weights", "leave MODEL= out", file="MODEL=me/other"):
            use()
        shutil.rmtree(tmp_path / "me")


def test_a_model_that_is_nowhere_is_refused_before_anything_is_loaded(runs):
    request = Request(model="bases/nope", tasks="fpb", tests=str(SAMPLE))
    with refuses("MODEL=", "bases/nope is no folder here", "fix the name", file="nope"):
        resolve(request)


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
    evaluation = resolve(Request(recipe=NAME, tasks="fpb", tests=str(SAMPLE), base=True, results=tmp_path / "results"))
    base, adapter = evaluation.runs
    assert base.base_sha256 == adapter.base_sha256 == weights_sha256(evaluation.trained.base_model)

    def left(run):
        folder = evaluation.results / run.subject
        return [one.name for one in prepare_folder(folder, run, evaluation.questions, evaluation.encoder)]

    left(base)
    assert left(base) == ["fpb"]
    with refuses("another model", "base_sha256", "FORCE=1"):
        left(replace(base, base_sha256="0" * 64))
    record = tmp_path / "results" / base.subject / "run.json"
    kept = json.loads(record.read_text(encoding="utf-8"))
    del kept["base_sha256"]  # of before 2026-11
    record.write_text(json.dumps(kept), encoding="utf-8")
    assert left(base) == ["fpb"]
