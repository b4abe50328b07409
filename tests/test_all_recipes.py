"""Every recipe trains two steps on a tiny model, through the real axolotl; and axolotl's own loader takes every one.

`make test` trains a cover: every task, and whatever bits, rank, alpha and method stand together in a name.
"""

import json
import os
from collections import Counter

import pytest
from safetensors import safe_open

from finlora.recipes import names as recipe_names

# The demo has a test of its own.
NAMES = [name for name in recipe_names.names() if recipe_names.parse_name(name)["task"] != "demo"]


def values(name: str) -> set:
    """The values of a name's parts, and which of them stand together."""
    parts = recipe_names.parse_name(name)
    kind = tuple(parts[key] for key in ("bits", "r", "alpha", "method"))
    return {("task", parts["task"]), ("kind", kind), *zip(("bits", "r", "alpha", "method"), kind, strict=True)}


def cover() -> list[str]:
    """Recipes that hold all values there are, chosen greedily; of equal ones, that whose values were chosen least."""
    of = {name: values(name) for name in NAMES}
    missing, chosen, times = set().union(*of.values()), [], Counter()
    while missing:
        chosen.append(max(of, key=lambda name: (len(of[name] & missing), -sum(times[value] for value in of[name]))))
        missing -= of[chosen[-1]]
        times.update(of[chosen[-1]])
    return chosen


COVER = cover()
REST = [name for name in NAMES if name not in COVER]
PARTS = [COVER[0::2], COVER[1::2]]
SLOW = [pytest.param(REST[part::4], marks=pytest.mark.slow) for part in range(4)]


@pytest.mark.long
@pytest.mark.parametrize("recipes", [*PARTS, *SLOW], ids=lambda names: f"{names[0]}-and-{len(names) - 1}")
def test_recipes_train(recipes, house, command):
    places = os.pathsep.join([str(house), str(house / "tests")])
    done = command("train_all", *recipes, env={"PYTHONPATH": places})
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"recipe"')]  # axolotl logs there too
    rows = {row["recipe"]: row for row in map(json.loads, lines)}
    assert list(rows) == recipes, done.stderr[-3000:]
    for name, row in rows.items():
        assert "error" not in row, (name, row.get("error"))
        parts, run, out = recipe_names.parse_name(name), row["run"], house / "outputs" / "tiny" / name
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
