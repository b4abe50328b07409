"""`make merge`: what is written is DoRA's formula, held against the model as trained; no mistake is silent."""

import json
import re
import resource
import shutil
from dataclasses import replace

import pytest
import torch
from failures import refuses
from peft import PeftModel
from runs import RECIPES
from safetensors.torch import load_file, save_file
from test_eval_run import write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from finlora.export import merge, merged
from finlora.models import load as models
from finlora.models import trained as trained_models

pytestmark = pytest.mark.xdist_group("after")
TARGETS = ("q_proj", "k_proj", "v_proj")
MERGED = f"outputs/{RECIPES[16]}/merged"


def plan(recipe=None, adapter=None, model=None, bits=None):
    return trained_models.load_trained(recipe, adapter and str(adapter), model and str(model), bits, tiny=False)


def weights(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def merged_in_float64(weight, name, adapter, config):
    """m (W + s B A) / ||W + s B A|| (LoRA: W + s B A), and how far the same in float32 may lie from it, entry by entry.

    An entry is a sum of r + 1 terms, then divided by its row's norm and multiplied by m: each of these steps rounds by
    at most half of float32's epsilon of what has been summed up to there. That is |W| + s |B| |A|, not the result: the
    terms may cancel. A whole epsilon for each of r + 2 steps leaves the other half to the norm's own rounding.
    """
    a, b = (adapter[f"{name.removesuffix('.weight')}.lora_{part}.weight"].double() for part in "AB")
    s = config["lora_alpha"] / config["r"]
    value, terms = weight + s * b @ a, weight.abs() + s * b.abs() @ a.abs()
    if config["use_dora"]:
        m = adapter[f"{name.removesuffix('.weight')}.lora_magnitude_vector"].double()
        scale = (m / value.norm(dim=1))[:, None]
        value, terms = scale * value, scale.abs() * terms
    return value, torch.finfo(torch.float32).eps * (config["r"] + 2) * terms


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_the_merged_model_is_what_was_trained(runs, bits, tiny_base, tmp_path, monkeypatch, capsys):
    """Every tensor of every shard, in float64 from the formula; then the logits that plain PEFT gives."""
    monkeypatch.setattr(merge, "SHARD", "3MB")
    monkeypatch.setattr(merge, "RAW", tmp_path / "tests")
    write_rows(tmp_path / "tests", "fpb", 5)
    about_run = plan(RECIPES[bits])
    folder = merge.run(about_run, limit=3)
    assert folder == runs / RECIPES[bits] / "merged" and not list(folder.parent.glob(".merged-*"))
    about = json.loads((folder / "merge.json").read_text())
    into = "full" if bits == 16 else "dequantised"
    assert about["into"] == into and about["adapter_sha256"] == about_run.facts.sha256

    assert len(about["weights"]) > 2 and (folder / "model.safetensors.index.json").is_file()
    tensors, base = weights(folder), models.load_base(str(tiny_base), bits)
    adapter = load_file(runs / RECIPES[bits] / "adapter_model.safetensors")
    config = json.loads((runs / RECIPES[bits] / "adapter_config.json").read_text())
    assert set(tensors) == set(base.state_dict())
    for name, tensor in base.state_dict().items():
        expected, bound = tensor.double(), 0.0
        if name.split(".")[-2] in TARGETS:
            expected, bound = merged_in_float64(expected, f"base_model.model.{name}", adapter, config)
        # The nearest bfloat16 (8 digits) is at most half a unit of the last away: 2^e / 256 for 2^e <= |w| < 2^(e+1).
        half_unit = torch.ldexp(torch.ones_like(expected), torch.frexp(expected).exponent - 1) / 256
        assert tensors[name].dtype == torch.bfloat16
        assert ((tensors[name].double() - expected).abs() <= half_unit + bound).all(), name

    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "quantization_config" not in config
    ours, saved = (AutoTokenizer.from_pretrained(path) for path in (folder, runs / RECIPES[bits]))
    assert ours.chat_template == saved.chat_template and ours.eos_token == "<|eot_id|>"
    ids = torch.arange(3, 45).reshape(2, 21)
    with torch.inference_mode():
        served = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
        trained = PeftModel.from_pretrained(base, runs / RECIPES[bits]).eval()(ids).logits
    assert (served - trained).abs().mean() < merge.TOLERANCE["cpu"] * trained.std(-1).mean()
    assert about["verified"]["mean"] < merge.TOLERANCE["cpu"] * about["verified"]["spread"]

    if bits != 16:
        full, dequantised = about["from_trained"]["full"], about["from_trained"]["dequantised"]
        # int8 rounds by about as much as the bfloat16 that both are saved in, NF4 by a lot more.
        assert dequantised["mean"] * {8: 1.5, 4: 8}[bits] < full["mean"]
        assert full["asked"] == dequantised["asked"] == 3 and set(full["score"]) == set(about["trained_score"]) == {
            "fpb"
        }
        printed = capsys.readouterr().out
        assert re.search(r"taking +dequantised\b", printed) and len(re.findall(r"score fpb \d", printed)) == 2


def test_what_it_merges_into_can_be_chosen_and_is_kept(runs, capsys):
    base = plan(RECIPES[8])
    merge.run(base, into="full", limit=0)
    first = json.loads((base.merged / "merge.json").read_text())
    assert first["into"] == "full" and list(first["from_trained"]) == ["full"]
    merge.run(base, into="full", limit=0)
    assert re.search("merged.*FORCE=1", capsys.readouterr().out)
    left = base.folder / ".merged-killed"
    left.mkdir()
    merge.run(base, limit=0)
    second = json.loads((base.merged / "merge.json").read_text())
    assert second["into"] == "dequantised" and second["weights"] != first["weights"] and not left.exists()
    assert merged.need_merged(base) == base.merged


@pytest.mark.parametrize("tolerance", [0.01, 0])
@pytest.mark.parametrize("wrong", [None, 1.05, float("nan")])
def test_only_a_model_with_the_logits_of_base_and_adapter_is_called_done(runs, tolerance, wrong, monkeypatch):
    """Without a tolerance it is held against what a step of bfloat16 in every weight does, as where logits shake."""
    attach = models.attach

    def slightly_off(model, adapter):
        merged = attach(model, adapter)
        for name, tensor in merged.named_parameters():
            if "q_proj" in name:
                tensor.data *= wrong
        return merged

    if wrong:
        monkeypatch.setattr(models, "attach", slightly_off)
    monkeypatch.setattr(merge, "TOLERANCE", {"cpu": tolerance})
    trained = plan(RECIPES[16])
    shutil.rmtree(trained.merged, ignore_errors=True)
    if wrong:
        with refuses("logits", "base and adapter", "nothing was written", "report"):
            merge.run(trained, limit=0)
        assert not trained.merged.exists() and not list(trained.folder.glob(".merged-*"))
    else:
        verified = json.loads((merge.run(trained, limit=0) / "merge.json").read_text())["verified"]
        assert "of_a_step" not in verified if tolerance else verified["mean"] < verified["of_a_step"]


def test_what_is_merged_is_held_against_adapter_base_and_weights(runs, tiny_base):
    trained = plan(RECIPES[16])
    folder = merge.run(trained, limit=0)
    assert merged.need_merged(trained) == folder and merged.check_weights(folder) is None
    for key, other in {"base_model": "another/base", "bits": 8}.items():
        with refuses("this adapter", f"make merge RECIPE={RECIPES[16]}", file=MERGED):
            merged.need_merged(replace(trained, **{key: other}))
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-8] + b"spoiled!")
    for check in (lambda: merged.check_weights(folder), lambda: merge.run(trained, limit=0)):
        with refuses("verified", "FORCE=1", file=f"{MERGED}/model.safetensors"):
            check()
    path.unlink()
    with refuses("this adapter", f"make merge RECIPE={RECIPES[16]}", file=MERGED):
        merged.need_merged(trained)
    merge.run(trained, limit=0)
    assert path.read_bytes() == whole


def test_an_adapter_alone_names_its_base(runs, tiny_base, monkeypatch):
    trained = plan(adapter=runs / RECIPES[16])
    assert trained.base_model == str(tiny_base) and trained.bits == 16 and trained.name == RECIPES[16]
    config = runs / RECIPES[16] / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": None}))
    with refuses("base", "MODEL=", file=runs / RECIPES[16]):
        plan(adapter=runs / RECIPES[16])


def other_base(tiny_base, folder):
    shutil.copytree(tiny_base, folder)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 2}))
    return folder


def cut(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def change(folder):
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(path).items()}, path)


WEIGHTS, RUN = "adapter_model.safetensors", f"outputs/{RECIPES[16]}"
# How the run is spoilt, the file of it that is named, and words.
BAD = {
    "not trained": (lambda f: (f / "run.json").unlink(), "", ["train", f"make train RECIPE={RECIPES[16]}"]),
    "truncated": (cut, "", ["run.json", f"make train RECIPE={RECIPES[16]} FORCE=1"]),
    "another adapter": (change, "", ["run.json", f"make train RECIPE={RECIPES[16]} FORCE=1"]),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "", [WEIGHTS, "name the"]),
}


@pytest.mark.parametrize("case", BAD)
def test_an_adapter_that_is_not_whole_is_one_line(case, runs):
    spoil, name, words = BAD[case]
    spoil(runs / RECIPES[16])
    with refuses(*words) as error:
        plan(RECIPES[16])
    assert re.match(rf"\S*{RUN}{name and '/' + name}: ", str(error.value))
    assert not (runs / RECIPES[16] / "merged").exists()


def test_mistakes_are_one_line_and_leave_nothing(runs, tiny_base, tmp_path, monkeypatch):
    def fails(what, *words, file=None, **options):
        with refuses(*words, file=file):
            merge.run(what, limit=0, **options)
        assert not list(what.folder.glob("*merged*"))

    for options in ({}, {"recipe": RECIPES[8], "adapter": "x"}, {"recipe": RECIPES[8], "model": "x"}):
        with refuses("RECIPE=", "ADAPTER=", "MODEL="):
            plan(**options)
    other = other_base(tiny_base, tmp_path / "other")
    wrong = plan(adapter=runs / RECIPES[8], model=other)
    nowhere = plan(adapter=runs / RECIPES[8], model=".cache/nowhere")
    fails(wrong, str(tiny_base), "MODEL=", "FORCE=1", file=f"MODEL={other}")
    fails(wrong, "layers.2|layers.3", "no layer", str(other), str(tiny_base), force=True)
    fails(nowhere, "base", "MODEL=", ".cache/nowhere", "no folder", "fix", force=True)
    (runs / RECIPES[8] / "chat_template.jinja").unlink()
    fails(plan(adapter=runs / RECIPES[8]), "tokenizer", "chat template", "PROMPT=")
    assert not wrong.folder.exists() and not list(wrong.folder.parent.glob(".*"))  # no lock either
    fails(plan(RECIPES[16]), RECIPES[16], "16 bits|16-bit", file="INTO=dequantised", into="dequantised")

    monkeypatch.setattr(merge, "gpus", lambda: [("NVIDIA T4", 15.0, 0.001)])  # no GPU is here
    fails(plan(RECIPES[16]), "NVIDIA T4", "GiB", "free it", "CPU")
    monkeypatch.setattr(merge, "gpus", lambda: [])

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))  # no file above a MiB: the write itself fails
    try:
        fails(plan(RECIPES[16]), "written", "free", file=MERGED)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    full = shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6)
    with monkeypatch.context() as patch:
        patch.setattr(merge.shutil, "disk_usage", lambda path: full)
        fails(plan(RECIPES[16]), "merged", "0.0 GiB", "0.0 ", "free some")

    def slightly_off(model, adapter):
        adapted = PeftModel.from_pretrained(model, adapter)
        for name, tensor in adapted.named_parameters():
            if "magnitude" in name:
                tensor.data.fill_(1)
        return adapted.merge_and_unload()

    monkeypatch.setattr(models, "attach", slightly_off)
    fails(plan(RECIPES[16]), "logits", "base and adapter", "nothing was written", "report")


def test_files_of_somebody_else_are_kept(runs):
    trained = plan(RECIPES[16])
    trained.merged.mkdir()
    (trained.merged / "mine").touch()
    with refuses("files", "make merge", "FORCE=1", file=MERGED):
        merge.run(trained, limit=0)
    assert (trained.merged / "mine").exists()
    with refuses("not there|missing", f"make merge RECIPE={RECIPES[16]}", file=MERGED):
        merged.need_merged(trained)
    (trained.merged / "merge.json").write_text('{"adapter_sha256": "0"}')
    with refuses("this adapter", f"make merge RECIPE={RECIPES[16]}", file=MERGED):
        merged.need_merged(trained)


def test_an_adapter_of_the_same_name_elsewhere_replaces_no_merged_model(runs, tmp_path, capsys):
    first, second = tmp_path / "a" / "lora", tmp_path / "b" / "lora"
    for folder in (first, second):
        shutil.copytree(runs / RECIPES[16], folder)
    folder = merge.run(plan(adapter=first), limit=0)
    assert merge.run(plan(adapter=second), limit=0) == folder  # a copy of the adapter has the same merged model
    assert re.search("merged.*FORCE=1", capsys.readouterr().out)
    before = (folder / "merge.json").read_bytes()
    change(second)
    other = plan(adapter=second)
    with refuses("a/lora", "FORCE=1", "another name", file="outputs/adapters/lora/merged"):
        merge.run(other, limit=0)
    assert (folder / "merge.json").read_bytes() == before
    merge.run(other, limit=0, force=True)
    assert json.loads((folder / "merge.json").read_text())["adapter_sha256"] == other.facts.sha256
    change(second)  # trained again, in its place
    again = plan(adapter=second)
    merge.run(again, limit=0)
    assert json.loads((folder / "merge.json").read_text())["adapter_sha256"] == again.facts.sha256
