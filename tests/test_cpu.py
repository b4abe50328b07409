"""Training on a CPU: which dtype it takes, how long it says that it will take, and what it refuses."""

import re

import pytest
import torch
from failures import refuses

from fastdora.plugin import cpu
from finlora.core import machine
from finlora.recipes import load as recipes
from finlora.recipes import names as recipe_names
from finlora.train import cpu as cpu_training
from finlora.train import preflight

DEMO = recipe_names.RECIPES / "demo_smollm2_bf16_r8_dora.yaml"
EIGHT_BILLION = recipe_names.RECIPES / "sentiment_r8_dora.yaml"


@pytest.fixture
def rates(monkeypatch):
    """Sets this machine's FLOP/s in float32 and bfloat16; no GPU is here."""
    monkeypatch.setattr(machine, "gpus", lambda: [])

    def put(float32: float, bfloat16: float) -> None:
        monkeypatch.setattr(cpu, "matmul_rates", lambda: {torch.float32: float32, torch.bfloat16: bfloat16})

    return put


def test_matmuls_are_measured():
    cpu.matmul_rates.cache_clear()
    rates = cpu.matmul_rates()
    assert set(rates) == {torch.float32, torch.bfloat16} and min(rates.values()) > 1e6


def test_bfloat16_where_it_is_clearly_faster_and_the_model_large_enough(rates):
    rates(310e9, 1700e9)  # with AMX
    assert cpu.best_dtype(576) == torch.bfloat16 and cpu.best_dtype(256) == torch.float32
    rates(310e9, 400e9)
    assert cpu.best_dtype(576) == torch.float32
    rates(98e9, 1e9)  # without AVX-512
    assert cpu.best_dtype(576) == torch.float32


def test_the_time_on_a_cpu_is_said_and_limited(rates, capsys):
    """16 steps of 1,024 tokens through 106 million weights, 4 FLOP each and as much again for all else."""
    recipe = recipes.load(DEMO)
    rates(100e9, 1e9)
    assert cpu_training.cpu_seconds(recipe)[0] == pytest.approx(16 * 1024 * 106.2e6 * 4 * 2 / 100e9, rel=0.01)
    assert preflight.check_device(recipe) is False
    assert re.search(r"about 2 min, .* 100 GFLOP/s", capsys.readouterr().out)
    rates(1e9, 0.1e9)
    with refuses("demo_smollm2_bf16_r8_dora", "3.9 h", "CPU=1", "TINY=1"):
        preflight.check_device(recipe)
    assert preflight.check_device(recipe, cpu=True) is False
    assert "3.9 h" in capsys.readouterr().out


def test_what_does_not_fit_the_memory_is_refused_whatever_is_said(rates, monkeypatch):
    rates(1e18, 1e18)
    monkeypatch.setattr(cpu_training, "GIB", 2**50)  # of which none is free
    with refuses("sentiment_r8_dora", "GiB of memory", "TINY=1"):
        preflight.check_device(recipes.load(EIGHT_BILLION), cpu=True)
