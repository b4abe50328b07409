"""The README's examples run, and what it names is there."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from tools import recipes

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.split("#")[0].strip() for line in README.splitlines() if re.match(r"^make [a-z]+", line)]


def make(*args: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(["make", *args], cwd=cwd, capture_output=True, text=True, timeout=900)


def test_demo(command, house):
    """`make demo`: DoRA through axolotl on the sample rows, clearly better than the base and than the usual answer."""
    assert "make demo" in COMMANDS
    done = command("tools.demo", timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    table = done.stdout[done.stdout.index("200 held-out rows of data/sample/test/fpb_test.jsonl\n") :]
    base, usual, adapter = (float(share) for share in re.findall(r"([\d.]+)%$", table, re.M))
    assert adapter > max(base, usual) + 20, table
    for file in ("adapter_model.safetensors", "merged/model.safetensors", "merged/chat_template.jinja", "run.json"):
        assert (house / "outputs" / "demo_r8_dora" / file).is_file(), file


def test_the_demos_held_out_rows_are_not_trained_on():
    def contexts(path):
        return {json.loads(line)["context"] for line in path.read_text(encoding="utf-8").splitlines()}

    train = contexts(ROOT / "data/sample/train/finlora_sentiment_train.jsonl")
    test = contexts(ROOT / "data/sample/test/fpb_test.jsonl")
    assert len(train) == 640 and len(test) == 200 and not train & test


def test_make_train_runs_as_the_readme_says(house):
    """TINY=1 with ARGS through make itself, in a copy of the house."""
    assert "make train RECIPE=sentiment_r8_dora TINY=1" in COMMANDS
    run = ("train", "RECIPE=sentiment_llama_3_1_8b_8bits_r8_dora", "TINY=1", "ARGS=--learning-rate 0.0002")
    venv = f"VENV={ROOT / '.venv'}" if (ROOT / ".venv/bin/axolotl").exists() else "T="
    done = make(*run, venv, cwd=house)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((house / "outputs/tiny/sentiment_r8_dora/run.json").read_text(encoding="utf-8"))
    assert record["args"] == ["--learning-rate", "0.0002"] and record["data_from"] == "sample"
    metrics = json.loads((house / "outputs/tiny/sentiment_r8_dora/metrics.json").read_text(encoding="utf-8"))
    assert metrics["steps"] == 2
    # What was trained is evaluated, reported and compared by the next commands that the README names.
    tiny = ("RECIPE=sentiment_r8_dora", "TINY=1", "BASE=1", "LIMIT=9")
    base = f"base-{(ROOT / '.cache' / 'tiny').resolve().name}-8bit"
    for command in ("eval", *tiny), ("report",), ("compare", f"A={base}", "B=sentiment_r8_dora.tiny"):
        assert any(line.startswith(f"make {command[0]}") for line in COMMANDS)
        done = make(*command, venv, cwd=house)
        assert done.returncode == 0, done.stderr[-3000:]
    assert "A and B cannot be told apart on these 9 rows" in done.stdout
    for command in ("merge", *tiny[:2], "LIMIT=2"), ("publish", *tiny[:2], "REPO=someone/Llama-tiny"):  # docs/use.md
        done = make(*command, venv, cwd=house)
        assert done.returncode == 0, done.stderr[-3000:]
    assert (house / "outputs/tiny/sentiment_r8_dora/merged/merge.json").is_file()
    card = (house / "outputs/tiny/sentiment_r8_dora/publish/README.md").read_text(encoding="utf-8")
    assert "of a spread of" not in card and "| fpb | published | 9 |" in card and "synthetic sample rows" in card
    page = (house / "results/index.html").read_text(encoding="utf-8")
    assert "sentiment_r8_dora.tiny" in page and base in page and "Training curves" in page


def test_make_alone_prints_what_it_can_do():
    done = make()
    assert done.returncode == 0
    for command in COMMANDS:
        assert f"make {command.split()[1]} " in done.stdout, command
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert targets == re.findall(r"^  make ([a-z-]+) ", done.stdout, re.M)


def test_a_typo_ends_make_with_one_line_and_a_hint():
    done = make("train", "RECIPE=sentment_r8_dora")
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert done.returncode != 0 and len(lines) == 1 and "did you mean sentiment_r8_dora" in lines[0]


def test_ci_runs_the_readmes_test_command():
    assert "make test" in COMMANDS
    script = [line for line in (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines() if line[0] != "#"]
    assert script[-1] == "make test"
    assert "run: .ci/run" in (ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "file",
    ["README.md", "recipes/README.md", "recipes/sweeps/README.md", "data/README.md", "eval/README.md", "docs/use.md"],
)
def test_links_and_folders_exist(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", text):
        assert (ROOT / file).parent.joinpath(target).exists(), (file, target)
    for recipe in re.findall(r"RECIPE=(\w+)", text):
        assert recipes.find(recipe).is_file()
