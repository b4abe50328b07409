"""Every recipe trains two steps on a tiny model, through the real axolotl; and axolotl's own loader takes every one."""

import json
import os
import subprocess
import sys

import pytest
from safetensors import safe_open

from tools import recipes

NAMES = [name for name in recipes.names() if name != "demo_r8_dora"]  # the demo has a test of its own


@pytest.mark.parametrize("part", [0, 1, 2, 3])
def test_every_recipe_trains(part, house):
    wanted = NAMES[part::4]
    env = {**os.environ, "PYTHONPATH": str(house)}
    done = subprocess.run(
        [sys.executable, "tests/train_all.py", *wanted], cwd=house, env=env, capture_output=True, text=True, timeout=900
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"recipe"')]  # axolotl logs there too
    rows = {row["recipe"]: row for row in map(json.loads, lines)}
    assert list(rows) == wanted, done.stderr[-3000:]
    for name, row in rows.items():
        assert "error" not in row, (name, row.get("error"))
        parts, run, out = recipes.parse_name(name), row["run"], house / "outputs" / "tiny" / name
        kind = {16: "Linear", 8: "Linear8bitLt", 4: "Linear4bit"}[parts["bits"]]
        assert run["metrics"]["base_layers"] == {kind: 12} and run["metrics"]["steps"] == 2, name
        config = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
        assert (config["r"], config["lora_alpha"]) == (parts["r"], parts["alpha"]), name
        assert (config["use_dora"], config["use_rslora"]) == (parts["method"] == "dora", parts["method"] == "rslora")
        with safe_open(out / "adapter_model.safetensors", "np") as tensors:
            trained = [key for key in tensors.keys() if "lora_B" in key and abs(tensors.get_tensor(key)).max() > 0]
            magnitudes = [key for key in tensors.keys() if key.endswith("lora_magnitude_vector")]
        assert len(trained) == 12, f"{name}: B never left zero in {12 - len(trained)} layers"
        assert len(magnitudes) == (12 if parts["method"] == "dora" else 0), name
        for file in ("recipe.yaml", "run.json", "chat_template.jinja", "tokenizer.json", "README.md"):
            assert (out / file).is_file(), (name, file)
