"""`make doctor`: what it reports, and that each thing missing for training is told with its remedy."""

import re

import huggingface_hub
import pynvml
import pytest
import requests
from failures import refuses
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError

from finlora import cli
from finlora.core import machine
from finlora.recipes import load as recipes
from finlora.recipes import names
from finlora.train import doctor, preflight

SENTIMENT = names.RECIPES / "sentiment_r8_dora.yaml"
CARD = ("NVIDIA H100 80GB HBM3", 80.0, 79.0)


@pytest.fixture
def whole(monkeypatch, tmp_path):
    """A machine that has all that training the recipe needs."""
    closed = requests.Response()
    closed.status_code = 403
    monkeypatch.setattr(machine, "gpus", lambda: [CARD])
    monkeypatch.setattr(machine, "driver", lambda: "580.65.06")
    monkeypatch.setattr(machine, "torch_cuda", lambda: "13.0")
    monkeypatch.setattr(doctor, "free_space", lambda folder: 10**12)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    monkeypatch.setattr(huggingface_hub, "auth_check", lambda base: None)
    monkeypatch.setattr(requests, "head", lambda *_, **__: closed)
    return monkeypatch


def fail(error: Exception):
    def call(*_, **__):
        raise error

    return call


def test_a_machine_that_can_train_is_reported_without_its_token(whole, capsys):
    cli.call(["doctor"])
    report = capsys.readouterr().out
    said = dict(re.fullmatch(r"(\w+) +(.*)", line).groups() for line in report.splitlines())
    assert list(said) == [
        *("commit", "machine", "versions", "driver", "GPU", "disk", "cache", "token", "network", "base"),
    ]
    assert all(name in said["versions"] for name in ("python 3.", "axolotl 0.19.0", "torch 2."))
    assert "H100 80GB HBM3, 79 of 80 GiB" in said["GPU"] and "580.65.06" in said["driver"]
    assert "hf_secret" not in report and "remedy" not in report


GATED = GatedRepoError("gated", response=requests.Response())
# What is missing: the attribute that says so, its value, the line that tells it, words of the remedy.
MISSING = {
    "a GPU": (machine, "gpus", lambda: [], "GPU", ["none is here", "make demo", "TINY=1"]),
    "memory": (machine, "gpus", lambda: [(CARD[0], 80.0, 3.0)], "GPU", ["needs about 18 GiB", "free the GPU"]),
    "a new driver": (machine, "driver", lambda: "570.86.10", "GPU", ["570.86.10", "580", "TORCH=2.11.0"]),
    "torch for a GPU": (machine, "torch_cuda", lambda: None, "GPU", ["without CUDA", "make setup TORCH="]),
    "disk": (doctor, "free_space", lambda folder: 10**9, "disk", ["2 GiB", "free some"]),
    "room for the base": (doctor, "free_space", lambda folder: 5 * 10**9, "cache", ["GiB are needed", "HF_HOME"]),
    "the right to write": (doctor.os, "access", lambda *_: False, "cache", ["not writable", "HF_HOME"]),
    "network": (requests, "head", fail(requests.ConnectTimeout()), "network", ["not in the cache", "HTTPS_PROXY"]),
    "leave to fetch": (constants, "is_offline_mode", lambda: True, "network", ["unset HF_HUB_OFFLINE"]),
    "a licence": (huggingface_hub, "auth_check", fail(GATED), "base", ["accept its licence", "HF_TOKEN"]),
}


@pytest.mark.parametrize("case", MISSING)
def test_what_is_missing_is_told_with_its_remedy(case, whole, capsys):
    place, name, value, line, words = MISSING[case]
    whole.setattr(place, name, value)
    with refuses("cannot be trained", "remedies", file=SENTIMENT):
        doctor.run(recipes.load(SENTIMENT))
    lines = capsys.readouterr().out.splitlines()
    told = [lines[at + 1] for at, text in enumerate(lines) if text.startswith(line)]
    assert len(told) == 1 and "remedy: " in told[0] and all(word in told[0] for word in words), lines


def test_a_base_in_the_cache_needs_no_network(whole, capsys):
    whole.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: "config.json")
    whole.setattr(requests, "head", fail(requests.ConnectionError()))
    doctor.run(recipes.load(SENTIMENT))
    assert "cannot be reached" in capsys.readouterr().out


def test_drivers_and_builds_of_torch(monkeypatch):
    """(driver, CUDA of torch): words of the fault; none where it runs."""
    for driver, cuda, words in (
        (None, None, None),
        (None, "13.0", None),
        ("580.65.06", "13.0", None),
        ("525.60.13", "12.8", None),
        ("575.57", "13.0", ["575.57", "CUDA 13.0", "580", "update the driver", "TORCH=2.11.0"]),
        ("470.82", "12.8", ["470.82", "525", "update the driver", "no torch"]),
        ("580.65.06", None, ["580.65.06", "without CUDA", "TORCH=2.11.0"]),
    ):
        monkeypatch.setattr(machine, "driver", lambda driver=driver: driver)
        monkeypatch.setattr(machine, "torch_cuda", lambda cuda=cuda: cuda)
        fault = machine.driver_fault()
        assert (fault is None) == (words is None) and all(word in fault for word in words or []), fault


def test_the_driver_is_looked_at_before_training(whole):
    whole.setattr(machine, "driver", lambda: "550.54")
    with refuses("550.54", "580", "TORCH=2.11.0", file=SENTIMENT):
        preflight.check_device(recipes.load(SENTIMENT))


def test_torchs_cuda_is_what_torch_says():
    import torch

    assert machine.torch_cuda() == torch.version.cuda


@pytest.mark.skipif(bool(machine.gpus()), reason="this machine has a GPU")
def test_there_is_no_driver_where_there_is_none(monkeypatch):
    monkeypatch.setattr(pynvml, "nvmlInit", fail(pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)))
    assert machine.driver() is None
