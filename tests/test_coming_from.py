"""docs/coming_from.md: each command is one that make and finlora take, each key one that a recipe takes."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from finlora import cli
from finlora.recipes import load as recipes
from finlora.recipes import names

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "coming_from.md").read_text(encoding="utf-8")
COMMANDS = sorted({command for command in re.findall(r"`(make [^`]+=[^`]+)`", TEXT)})
HERE = [
    row.split(" | ")[1]
    for row in TEXT.partition("| key there | key here |")[2].partition("\n## ")[0].splitlines()[2:-1]
]
KEYS = [found[1] for cell in HERE if (found := re.match(r"`([^`]+)`", cell))]
DORA = yaml.safe_load((names.RECIPES / "sentiment_r8_dora.yaml").read_text(encoding="utf-8"))


def test_there_are_commands_and_keys():
    assert len(COMMANDS) > 20 and len(KEYS) > 18


@pytest.mark.parametrize("command", COMMANDS)
def test_make_and_finlora_take_the_command(command):
    done = subprocess.run(
        ["make", "-n", *shlex.split(command)[1:], f"VENV={sys.prefix}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    words = shlex.split(line)
    name, *args = words[words.index("finlora") + 1 :]
    args = args[: args.index("--")] if "--" in args else args
    for variable in re.findall(
        r"\b([A-Z_]+)=", command
    ):  # each has become an option, or RECIPE= and SWEEP= an argument
        option = "--" + variable.lower().replace("_", "-")
        value = re.search(rf"{variable}=(?:\"([^\"]*)\"|(\S+))", command)
        assert option in args or (value[1] or value[2]) in line, variable
    with typer.main.get_command(cli.app).make_context("finlora", [name, *args], resilient_parsing=True) as context:
        group = context.command
        group.get_command(context, name).make_context(name, args)  # raises click's error for what it does not take


@pytest.mark.parametrize("text", KEYS)
def test_a_recipe_takes_the_key(text, tmp_path):
    keys = yaml.safe_load(text)
    assert isinstance(keys, dict)
    changed = DORA | ({"lora_target_modules": None} if "lora_target_linear" in keys else {}) | keys
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({key: one for key, one in changed.items() if one is not None}), encoding="utf-8")
    loaded = recipes.load(path).keys
    assert {key: loaded[key] for key in keys} == keys
