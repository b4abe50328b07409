"""The package by itself: it installs alone, its README's Python example runs, its recipe keys are the plugin's."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "fastdora" / "README.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    return re.search(rf"```{language}\n(.*?)```", README, re.S)[1]


def test_the_example_runs(command, house):
    done = command("-c", block("python"), env={"ACCELERATE_USE_CPU": "true"})
    assert done.returncode == 0, done.stderr[-3000:]
    expected = re.search(r"accelerate\(model\)\)\s+# (.*)", README)[1]
    assert done.stdout.splitlines()[0] == expected
    assert (house / "outputs" / "plain" / "adapter_model.safetensors").is_file()


def test_the_keys_are_the_plugins_with_their_defaults():
    from fastdora.plugin.args import FastDoraArgs

    shown = yaml.safe_load(block("yaml"))
    assert shown.pop("plugins") == ["fastdora.FastDoraPlugin"]
    assert shown == FastDoraArgs().model_dump()


def test_the_figures_with_shared_prefixes_are_the_recorded_ones():
    record = json.loads((ROOT / "finlora" / "plan" / "train_throughput_shared.json").read_text(encoding="utf-8"))
    rows, shown = record["rows"], README.partition("### With shared prefixes")[2].partition("**Do they cost score?")[0]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines() if line.startswith("| ")]
    tabled = {line[0].split()[0]: line[1:] for line in lines[2:]}
    assert tabled.keys() == {name for name in rows if not name.endswith("_whole")}
    for name, (a_step, rate, whole, peak, whole_peak) in tabled.items():
        row, other = rows[name], rows.get(f"{name}_whole")
        assert a_step == f"{row['samples_s'] * row['step_s']:.0f}" and peak == f"{row['peak_gib']:.1f}"
        assert rate.split()[0] == f"{row['samples_s']:.3g}"
        assert bool(whole) == bool(other) == ("times" in rate)
        if other:
            assert whole == f"{other['samples_s']:.3g}" and whole_peak == f"{other['peak_gib']:.1f}"
            assert f"({row['samples_s'] / other['samples_s']:.2f} times)" in rate


def test_the_front_page_has_the_recorded_gains():
    record = json.loads((ROOT / "finlora" / "plan" / "train_throughput_shared.json").read_text(encoding="utf-8"))
    front = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    rows = record["rows"]
    times = {
        name: rows[name]["samples_s"] / rows[f"{name}_whole"]["samples_s"] for name in ("8bit_dora", "finer", "tags")
    }
    assert (
        f"adds {times['8bit_dora']:.2f} times for `sentiment_r8_dora` ({rows['8bit_dora']['samples_s']:.0f} real"
        in front
    )
    assert f"{times['finer']:.1f} for FiNER, {times['tags']:.1f} for XBRL tags" in front


def test_the_figures_are_the_recorded_ones():
    lines = README.partition("### With shared prefixes")[0].splitlines()
    lines = [line.split("|")[2:5] for line in lines if line.startswith("| ") and "GiB" not in line]
    shown = [cells for cells in lines if cells[0].strip()[0].isdigit()]
    for column, record in enumerate(("train_throughput.json", "train_throughput_h200.json")):
        rows = json.loads((ROOT / "finlora" / "plan" / record).read_text(encoding="utf-8"))["rows"]
        measured = {name: row for name, row in rows.items() if "samples_s" in row}
        assert len(shown) == len(measured) >= 10
        for name, row in measured.items():
            near = [float(cells[column].split()[0]) for cells in shown if abs(float(cells[2]) - row["peak_gib"]) < 0.06]
            assert any(abs(rate - row["samples_s"]) <= max(0.006 * rate, 0.05) for rate in near), (record, name)
        times = re.findall(r"\((\d+\.\d) times\)", " ".join(cells[column] for cells in shown))
        for name, text in zip(("8bit_dora", "8bit_dora_fp8"), times, strict=True):
            assert abs(float(text) - rows[name]["samples_s"] / rows["finlora"]["samples_s"]) < 0.06
    rows = json.loads((ROOT / "finlora" / "plan" / "train_throughput_h200_second.json").read_text(encoding="utf-8"))[
        "rows"
    ]
    text = re.search(r"did (\d\.\d\d) samples/s and ours (\d+) and (\d+)", " ".join(README.split())).groups()
    assert [float(one) for one in text] == [
        rows["finlora"]["samples_s"],
        round(rows["8bit_dora"]["samples_s"]),
        round(rows["bf16_dora"]["samples_s"]),
    ]


def test_the_shares_of_the_matrix_rate_follow_from_the_records():
    rows, matmuls = (
        json.loads((ROOT / f"{name}.json").read_text(encoding="utf-8"))["rows"]
        for name in ("finlora/plan/train_throughput_h200", "bench/gpu_check")
    )
    weights = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336)  # of Llama-3.1-8B's layers
    shares = []
    for name in "8bit_dora bf16_dora 4bit_dora 8bit_dora_24gb 8bit_dora_all_linear 8bit_dora_8k 8bit_dora_16k".split():
        flop = 6 if rows[name]["set"].get("gradient_checkpointing") else 4
        rate = rows[name]["slots_s"] * weights * flop / 1e12
        shares.append(100 * rate / matmuls["bf16 5120x4096x4096"]["tflop_s"])
    fp8 = rows["8bit_dora_fp8"]["slots_s"] * weights * 4 / 1e12
    shares.append(100 * fp8 / matmuls["fp8 5120x4096x4096"]["tflop_s"])
    text = " ".join(README.split()).split("On the H200 the step")[1].split("A profile of it")[0]
    assert [int(one) for one in re.findall(r"(\d+)%", text)] == [round(share) for share in shares]
    assert f"the {matmuls['bf16 5120x4096x4096']['tflop_s']} that" in text
    assert f"the {matmuls['fp8 5120x4096x4096']['tflop_s']:,} of" in text


@pytest.mark.slow  # ten seconds of installing and importing; `make lint` checks the imports
def test_it_installs_and_works_alone(tmp_path):
    """From its own pyproject.toml, without finlora and without axolotl, which its layers do not need."""
    source, site = tmp_path / "fastdora", tmp_path / "site"
    shutil.copytree(ROOT / "fastdora", source, ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--no-compile", "--target", site]
    done = subprocess.run([sys.executable, "-m", "pip", "install", *options, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    kept = {path.relative_to(ROOT) for path in (ROOT / "fastdora").rglob("*") if path.suffix in (".py", ".json")}
    assert kept <= {path.relative_to(site) for path in site.rglob("*")}
    code = """
import sys
sys.modules["finlora"] = sys.modules["axolotl"] = None  # importing them fails
import torch, fastdora
from fastdora import attention, graphs
from peft import LoraConfig, get_peft_model
net = torch.nn.Sequential(torch.nn.Linear(8, 8))
model = get_peft_model(net, LoraConfig(r=2, use_dora=True, target_modules=["0"], init_lora_weights=False))
expected = model(torch.ones(1, 8))
print(fastdora.accelerate(model), torch.allclose(model(torch.ones(1, 8)), expected, atol=1e-5), fastdora.__file__)
"""
    env = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], cwd=site, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == f"1 16-bit DoRA layers; 16-bit matmuls True {site}/fastdora/__init__.py"
