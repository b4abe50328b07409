"""`make train`: what it checks first, what it leaves behind, and that no mistake or interruption loses anything."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from failures import refuses

from fastdora.plugin import checkpoints
from finlora.core import machine
from finlora.core.errors import UserError
from finlora.core.files import sha256
from finlora.data.tasks import load_tasks
from finlora.recipes import bases, memory
from finlora.recipes import load as recipes
from finlora.recipes import names as recipe_names
from finlora.train import distributed, preflight, run, runs
from finlora.train.runs import Identity, RunFolder

ROW = '{"context": "Instruction: Say it.\\nInput: sales rose\\nAnswer: ", "target": "positive"}\n'


def failure(done: subprocess.CompletedProcess) -> str:
    """The one line of an expected failure."""
    assert done.returncode not in (0, None), done.stdout
    assert "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def raw(house: Path, text: bytes | str, task_file: str = "finlora_sentiment_train.jsonl") -> None:
    folder = house / "data" / "raw" / "train"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / task_file).write_bytes(text if isinstance(text, bytes) else text.encode())


def test_unknown_recipe(command):
    done = command("finlora", "train", "sentment_r8_dora")
    line = failure(done)
    assert "RECIPE=sentment_r8_dora" in line and "sentiment_r8_dora" in line.partition("sentment_r8_dora")[2]


@pytest.mark.parametrize("args", [["--lora-r", "16"], ["--lora-r=16"], ["--no-load-in-8bit"], ["--output-dir", "x"]])
def test_args_cannot_change_what_the_name_says(command, args):
    line = failure(command("finlora", "train", "sentiment_r8_dora", "--tiny", "--", *args))
    assert f"ARGS={' '.join(args)}: " in line and "sentiment_r8_dora.yaml" in line and "copy" in line


def test_a_recipe_with_an_unknown_key_stops_before_the_gpu_is_looked_for(command, house):
    path = house / "recipes" / "ner_r8_dora.yaml"
    path.write_text(path.read_text(encoding="utf-8") + "lora_dropuot: 0.1\n", encoding="utf-8")
    line = failure(command("finlora", "train", "ner_r8_dora"))
    assert str(path) in line and "'lora_dropuot'" in line and "'lora_dropout'" in line


@pytest.mark.parametrize("base, target", [("meta-llama/Llama-3.1-8B-Instruct", "w9"), ("other/model", "c_attn")])
def test_a_target_that_is_no_layer_is_named_before_a_folder_is_made(command, house, base, target):
    """The other model's layers are not known here; those of the tiny one, which TINY=1 puts in its place, are."""
    text = (house / "recipes" / "ner_r8_dora.yaml").read_text(encoding="utf-8")
    assert "  - k_proj\n" in text
    changed = yaml.safe_load(text.replace("  - k_proj\n", f"  - {target}\n")) | {"base_model": base}
    (house / "ner_r8_dora.yaml").write_text(yaml.safe_dump(changed), encoding="utf-8")
    line = failure(command("finlora", "train", "ner_r8_dora.yaml", "--tiny"))
    assert "ner_r8_dora.yaml" in line and "'lora_target_modules'" in line and target in line and "q_proj" in line
    tiny = house / "outputs" / "tiny"
    assert [path.name for path in tiny.glob("*")] in ([], [".ner_r8_dora.lock"])


@pytest.mark.skipif(bool(machine.gpus()), reason="this machine has a GPU")
def test_without_a_gpu_one_line_names_the_demo_and_tiny(command):
    line = failure(command("finlora", "train", "sentiment_r8_dora"))
    assert re.search(r"sentiment_r8_dora\b.* \d+ GiB\b", line), line
    assert "make demo" in line and "make train RECIPE=sentiment_r8_dora TINY=1" in line


def test_memory_estimate_orders_as_it_must():
    shape = bases.shape("meta-llama/Llama-3.1-8B-Instruct")

    def need(name: str, **changes) -> float:
        return memory.memory_estimate(recipes.load(recipe_names.RECIPES / f"{name}.yaml").keys | changes, shape)

    assert need("sentiment_4bit_r4_lora") < need("sentiment_r8_lora") < need("sentiment_bf16_r8_lora")
    assert need("sentiment_r8_dora", sequence_len=16384) > need("sentiment_r8_dora") > 8.03e9 / 2**30
    assert need("sentiment_r8_dora", gradient_checkpointing=True) < need("sentiment_r8_dora")
    assert need("sentiment_r8_dora", fastdora_answers_only=False) > need("sentiment_r8_dora")


def test_memory_estimate_is_near_what_was_measured():
    """Each benchmark run with the fast layers: 16, 8 and 4 bits, short and long, with gradient checkpointing."""
    measured = json.loads(
        (recipes.ROOT / "finlora" / "plan" / "train_throughput_h200.json").read_text(encoding="utf-8")
    )["rows"]
    shape = bases.shape("meta-llama/Llama-3.1-8B-Instruct")
    fast = {name: row for name, row in measured.items() if name != "finlora" and "peak_gib" in row}
    assert len(fast) >= 9
    for name, row in fast.items():
        path = recipe_names.RECIPES / f"{row['recipe']}.yaml"
        estimate = memory.memory_estimate(recipes.load(path).keys | row["set"], shape)
        assert estimate == pytest.approx(row["peak_gib"], rel=0.05), name


@pytest.mark.parametrize("tiny", [True, False])
def test_the_next_command_names_a_recipe_of_ones_own_by_its_path(tiny, tmp_path, monkeypatch):
    """RECIPE=save is no recipe of the repository; one of recipes/ goes by its name."""
    metrics = dict.fromkeys(("steps", "seconds", "samples_per_second", "tokens_per_second"), 1)
    metrics |= {"final_loss": 1.0, "final_eval_loss": None}
    record = {"adapter": {"file": "outputs/x", "bytes": 1}, "metrics": metrics, "seconds": 1, "tiny": tiny}
    for path, option in ("own/save.yaml", "own/save.yaml"), (recipe_names.RECIPES / "ner_r8_dora.yaml", "ner_r8_dora"):
        assert f"RECIPE={option} " in run.summary(Path(path), record).partition("\nnext ")[2] + " "
    own = tmp_path / "save.yaml"
    monkeypatch.setattr(machine, "gpus", lambda: [])
    with refuses("needs a GPU", f"RECIPE={own} TINY=1"):
        preflight.check_device(recipes.Recipe(own, recipes.load(recipe_names.RECIPES / "sentiment_r8_dora.yaml").keys))


def test_a_gpu_that_is_too_small_names_the_keys_to_change(monkeypatch):
    # No GPU is here; everything around its three figures is real.
    monkeypatch.setattr(machine, "gpus", lambda: [("NVIDIA T4", 15.0, 14.5)])
    path = recipe_names.RECIPES / "analysis_multi_r8_dora.yaml"
    with pytest.raises(UserError) as error:
        preflight.check_device(recipes.load(path))
    line = str(error.value)
    assert "analysis_multi_r8_dora.yaml" in line and "NVIDIA T4" in line
    assert re.findall(r"\d+", line.partition("yaml")[2].partition("set ")[0])[-2:] == ["14", "15"], line  # GiB free
    for change in "gradient_checkpointing: true", "sequence_len: 8192", "gradient_accumulation_steps: 2":
        assert change in line


def test_a_model_too_large_for_one_gpu_trains_where_several_share_its_weights(monkeypatch):
    monkeypatch.setattr(machine, "gpus", lambda: [("NVIDIA H100 80GB HBM3", 80.0, 79.0)] * 4)
    loaded = recipes.load(recipe_names.RECIPES / "sentiment_bf16_r8_dora.yaml")
    large = replace(loaded, keys=loaded.keys | {"base_model": "meta-llama/Llama-3.3-70B-Instruct"})

    def needs_gpu(**way) -> bool:
        launch = distributed.Launch(4, **way)
        return preflight.check_device(distributed.distribute(large, launch).recipe, 4, processes=launch.processes)

    assert needs_gpu(fsdp=2) and needs_gpu(zero=3)
    with refuses("GiB", "FSDP=2"):
        needs_gpu()


def test_a_full_disk_is_seen_before_training(tmp_path, monkeypatch):
    (tmp_path / "train.jsonl").write_text("x" * 100, encoding="utf-8")
    recipe = recipes.load(recipe_names.RECIPES / "demo_r8_dora.yaml")
    own = {"datasets": [], "test_datasets": [], "output_dir": str(tmp_path)}
    full = shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: full)  # a disk cannot be filled here
    with pytest.raises(UserError, match=r"0\.\d GiB .*\b0\.0\b.* free"):
        preflight.check_disk(recipes.Recipe(recipe.path, recipe.keys | own), fetches_base=False)
    some = shutil._ntuple_diskusage(10**12, 10**12, 15 * 2**30)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: some)
    recipe = recipes.load(recipe_names.RECIPES / "sentiment_r8_dora.yaml")
    with pytest.raises(UserError, match=r"Llama-3.1-8B-Instruct takes 16 GiB and 15\.0 are free; set HF_HOME"):
        preflight.check_disk(recipes.Recipe(recipe.path, recipe.keys | own), fetches_base=True)


BAD_DATA = {
    "missing": (None, "data/raw/train/finlora_sentiment_train.jsonl: .*make data TASK=sentiment"),
    "empty": (b"", "finlora_sentiment_train.jsonl: "),
    "malformed line": (ROW.encode() + b'{"context": "a", "target"\n', "finlora_sentiment_train.jsonl:2: "),
    "not UTF-8": (ROW.encode() + ROW.replace("rose", "r\xfcse").encode("latin-1"), "finlora_sentiment_train.jsonl:2: "),
    "missing target": (ROW.encode() + b'{"context": "a"}\n', "finlora_sentiment_train.jsonl:2: "),
    "array for a string": (ROW.encode() + b'{"context": ["a"], "target": "b"}\n', "finlora_sentiment_train.jsonl:2: "),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_named_before_anything_loads(case, command, house):
    content, expected = BAD_DATA[case]
    if content is not None:
        raw(house, content)
    code = (
        "from finlora.train import preflight; from finlora.recipes import load as recipes\n"
        "from finlora.core.errors import run\n"
        "from finlora.recipes.names import find; path = find('sentiment_r8_dora')\n"
        "run(lambda: print(preflight.prepare_data(recipes.load(path))))"
    )
    assert re.search(expected, failure(command("-c", code)))


BAD_MESSAGES = {
    "empty file": ("", ": .*no rows.* mine.yaml"),
    "not JSON": ("{\n", ':1: .*{"messages": '),
    "FinLoRA's schema": (ROW, ':1: .*{"messages": '),
    "numeric answer": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": 0}]}\n',
        ":1: .*assistant.* content .*string",
    ),
    "empty answer": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}\n',
        ":1: .*empty answer.*remove",
    ),
    "missing answer": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "nan"}]}\n',
        ":1: .*missing answer .*nan.*remove",
    ),
    "no answer": (
        '{"messages": [{"role": "user", "content": "a"}]}\n',
        ":1: .*last message.* assistant",
    ),
}


@pytest.mark.parametrize("case", BAD_MESSAGES)
def test_bad_chat_rows_of_ones_own_are_named(case, tmp_path):
    text, expected = BAD_MESSAGES[case]
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        preflight.check_messages(Path("mine.yaml"), tmp_path / "rows.jsonl")
    assert re.search(f"rows.jsonl{expected}", str(error.value)) and "\n" not in str(error.value)


def test_a_label_that_is_spelt_as_a_missing_value_may_be_trained_on(tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "NA"}]}\n')
    with refuses("missing", "remove", file=file, line=1, key="answer"):
        preflight.check_messages(Path("mine.yaml"), file)
    task = load_tasks()["sentiment"].model_copy(update={"labels": ["yes", "NA"]})
    monkeypatch.setattr(preflight, "load_tasks", lambda: {"sentiment": task})
    preflight.check_messages(Path("mine.yaml"), file)


def test_no_write_permission(command, house):
    (house / "outputs").write_text("in the way", encoding="utf-8")
    line = failure(command("finlora", "train", "sentiment_r8_dora", "--tiny"))
    assert re.search(r"outputs/tiny/sentiment_r8_dora: .*\(.+\).* permissions", line)


# Training reads the rows by itself where nothing has: one import of axolotl less.
NO_PREPROCESS = """
from finlora import cli
from finlora.train import launch

axolotl = launch.axolotl
launch.axolotl = lambda command, *rest: axolotl(command, *rest) if command == "train" else None
cli.main()
"""


def start(house: Path, *args: str) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(house)}
    return subprocess.Popen(
        [sys.executable, "-c", NO_PREPROCESS, "train", *args],
        cwd=house,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


@pytest.mark.long
def test_a_run_from_start_to_finish_and_everything_that_may_happen_to_it(house, command):
    """One real run is interrupted, met by a second one, resumed, finished, repeated, changed and set aside."""
    out = house / "outputs" / "tiny" / "sentiment_bf16_r8_dora"
    long = ("sentiment_bf16_r8_dora", "--tiny", "--", "--max-steps", "24")
    first = start(house, *long)
    wait_for(lambda: (out / "stepping").exists() or first.poll() is not None, 600)
    assert first.poll() is None, first.stderr.read()[-3000:]

    second = command("finlora", "train", *long)
    assert re.search("outputs/tiny/sentiment_bf16_r8_dora: another command .* wait", failure(second))

    wait_for(lambda: any(out.glob("checkpoint-*/trainer_state.json")), 300)
    first.send_signal(signal.SIGINT)
    output, errors = first.communicate(timeout=300)
    assert first.returncode == 130 and "Traceback" not in errors, errors[-3000:]
    last = errors.rstrip().splitlines()[-1]
    assert re.search(r"^interrupted; .* resumes from checkpoint-\d+ of outputs/tiny/sentiment_bf16_r8_dora$", last), (
        last
    )
    assert not (out / "adapter_model.safetensors").exists() and not (out / "run.json").exists()
    steps = max(int(path.name.split("-")[1]) for path in out.glob("checkpoint-*"))
    assert 1 <= steps < 24 and (out / f"checkpoint-{steps}" / "optimizer.pt").exists()

    changed = command("finlora", "train", *long, "--learning-rate", "0.01")
    assert re.search("unfinished run .*learning_rate: .* -> 0.01", failure(changed))

    done = command("finlora", "train", *long)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"resuming from checkpoint-{steps}" in done.stdout
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert record["metrics"]["steps"] == 24 and record["metrics"]["steps_this_run"] == 24 - steps
    assert set(record) >= {"recipe", "args", "adapter", "data", "metrics", "versions", "git", "device"}
    assert record["versions"]["axolotl"] == "0.19.0" and len(record["data"]) == 2
    tail = done.stdout.rstrip().splitlines()[-5:]
    assert [line.split()[0] for line in tail] == ["adapter", "time", "speed", "loss", "next"]
    template = (out / "chat_template.jinja").read_text(encoding="utf-8")
    assert "<|start_header_id|>" in template
    assert yaml.safe_load((out / "recipe.yaml").read_text(encoding="utf-8"))["lora_r"] == 8

    again = command("finlora", "train", *long)
    assert again.returncode == 0 and "already trained" in again.stdout and "FORCE=1" in again.stdout

    path = house / "recipes" / "sentiment_bf16_r8_dora.yaml"
    path.write_text(path.read_text(encoding="utf-8").replace("0.0001", "0.0002"), encoding="utf-8")
    other = command("finlora", "train", *long)
    line = failure(other)
    assert "outputs/tiny/sentiment_bf16_r8_dora: " in line and " finished run" in line and "FORCE=1" in line
    assert "learning_rate: 0.0001 -> 0.0002" in line
    adapter = (out / "adapter_model.safetensors").read_bytes()
    forced = command("finlora", "train", "sentiment_bf16_r8_dora", "--tiny", "--force")
    assert forced.returncode == 0, forced.stderr[-3000:]
    aside = next(path for path in out.parent.glob("sentiment_bf16_r8_dora.*") if path.is_dir())
    assert (aside / "adapter_model.safetensors").read_bytes() == adapter
    assert (out / "adapter_model.safetensors").read_bytes() != adapter


def test_a_folder_with_other_files_is_left_alone(command, house):
    out = house / "outputs" / "tiny" / "ner_r8_lora"
    out.mkdir(parents=True)
    (out / "thesis.tex").write_text("precious", encoding="utf-8")
    line = failure(command("finlora", "train", "ner_r8_lora", "--tiny"))
    assert re.search("outputs/tiny/ner_r8_lora: .*files.* FORCE=1 ", line)
    assert (out / "thesis.tex").read_text(encoding="utf-8") == "precious"


def identity(text: str, **others) -> Identity:
    parts = {"args": [], "data": {"data/own.jsonl": "0" * 64}, "start": {"base": {"a": "0"}}} | others
    return Identity(text, **parts)


def test_a_run_is_told_by_keys_and_values_not_by_comments(tmp_path, monkeypatch):
    """A finished and an unfinished run of a recipe that has since been commented and reordered are still its runs.

    So are those of a recipe that logs or saves more often, whether the recipe says so or an option does.
    """
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    out, path = tmp_path / "outputs" / "own", tmp_path / "own.yaml"
    out.mkdir(parents=True)
    old, new = identity("lora_r: 8\nseed: 42\n"), identity("# Model\nseed: 42\nlora_r: 8  # the rank\n")
    assert RunFolder(out).claim(path, old, force=False)[0] is None
    assert RunFolder(out).claim(path, new, force=False)[0] is None and not list(out.parent.glob("own.*"))
    (out / "run.json").write_text('{"recipe": "own"}', encoding="utf-8")
    before_2026_11 = replace(new, start={})
    for equal in (
        new,
        before_2026_11,
        identity(new.recipe + "logging_steps: 5\nsave_total_limit: 1\noutput_dir: elsewhere\n"),
        identity("seed: 7\nlora_r: 8\n", args=["--seed", "42", "--logging-steps=5", "--no-use-tensorboard"]),
        identity(new.recipe, start={"base": {"a": "0"}, "fetched/since": {"b": "1"}}),
    ):
        assert RunFolder(out).claim(path, equal, force=False)[0] == {"recipe": "own"}
    for changed, words in (
        (identity("lora_r: 8\nseed: 43\n"), ["seed: 42 -> 43"]),
        (identity(new.recipe, args=["--max-steps", "3"]), ["max_steps: None -> 3"]),
        (identity(new.recipe, args=["--learning-rate=1e-4"]), ["learning_rate: None -> 0.0001"]),
        (identity(new.recipe, args=["--no-sample-packing"]), ["sample_packing: None -> False"]),
        (identity(new.recipe, data={"data/own.jsonl": "1" * 64}), ["other data", "data/own.jsonl"]),
        (identity(new.recipe, data={}), ["other data", "data/own.jsonl"]),
        (identity(new.recipe, start={"base": {"a": "1"}}), ["start", "base/a"]),
        (identity(new.recipe, start={"base": {"a": "0", "b": "0"}}), ["start", "base/b"]),
    ):
        with refuses("finished run", *words, "FORCE=1", file="outputs/own"):
            RunFolder(out).claim(path, changed, force=False)


def checkpoint(folder: Path, run: dict) -> Path:
    folder.mkdir(parents=True)
    (folder / "optimizer.pt").write_bytes(b"state")
    checkpoints.seal(folder, run)
    return folder


AUTO = "auto_resume_from_checkpoints: true\n"


def test_a_run_that_goes_on_is_recorded_as_it_now_is(tmp_path, monkeypatch):
    """Its recipe.yaml and started.json follow a changed comment and logging_steps: axolotl reads the former."""
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    out, new = tmp_path / "outputs" / "own", identity(AUTO + "lora_r: 8  # the rank\nlogging_steps: 1\n")
    assert RunFolder(out).claim(tmp_path / "own.yaml", identity(AUTO + "lora_r: 8\n"), force=False)[0] is None
    checkpoint(out / "checkpoint-2", {})
    assert RunFolder(out).claim(tmp_path / "own.yaml", new, force=False)[0] is None
    assert (out / "recipe.yaml").read_text(encoding="utf-8") == new.recipe
    assert RunFolder(out).identity == new and (out / "checkpoint-2").is_dir()


def test_a_run_that_does_not_resume_is_set_aside(tmp_path, monkeypatch, capsys):
    """Rotation would delete its new checkpoints, which have smaller numbers than those of the run before."""
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    out, own = tmp_path / "outputs" / "own", identity("lora_r: 8\nauto_resume_from_checkpoints: false\n")
    assert RunFolder(out).claim(tmp_path / "own.yaml", own, force=False)[0] is None
    checkpoint(out / "checkpoint-2", {})
    assert RunFolder(out).claim(tmp_path / "own.yaml", own, force=False)[0] is None
    assert not (out / "checkpoint-2").exists() and list(out.parent.glob("own.*/checkpoint-2"))
    assert "resuming" not in capsys.readouterr().out


def test_a_checkpoint_of_another_run_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    """`resume_from_checkpoint` in a recipe or among axolotl's options; the plugin compares all keys once more."""
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    recipe, out = "lora_r: 8\nseed: 42\n", tmp_path / "outputs" / "own"
    data, start = identity("").data, identity("").start
    equal = checkpoint(tmp_path / "equal" / "checkpoint-2", {"data": data, "start": start})
    data_changed = checkpoint(tmp_path / "data" / "checkpoint-2", {"data": {"data/own.jsonl": "1" * 64}})
    base_changed = checkpoint(tmp_path / "base" / "checkpoint-2", {"data": data, "start": {"base": {"a": "1"}}})
    seed_changed = checkpoint(tmp_path / "seed" / "checkpoint-2", {"data": data})
    RunFolder(seed_changed.parent).begin(identity("lora_r: 8\nseed: 43\n"))
    damaged = checkpoint(tmp_path / "damaged" / "checkpoint-2", {"data": data})
    (damaged / "optimizer.pt").write_bytes(b"stale")
    unsealed = checkpoint(tmp_path / "unsealed" / "checkpoint-2", {"data": data})
    (unsealed / checkpoints.SEAL).unlink()

    def options(folder: Path, force: bool = False) -> list[str]:
        own = identity(recipe, args=["--resume-from-checkpoint", str(folder.relative_to(tmp_path))])
        return RunFolder(out).resume_options(Path("own.yaml"), own, force)

    assert options(equal) == []
    for folder, *words in (
        (data_changed, "data/own.jsonl changed", "equal"),
        (base_changed, "base/a changed", "equal"),
        (seed_changed, "seed: 43 -> 42", "equal"),
        (damaged, "optimizer.pt has changed", "name a complete"),
        (unsealed, "seal.json", "name a complete"),
        (tmp_path / "nowhere", "no such folder", "name a complete"),
    ):
        with refuses(*words, "lora_model_dir", file="own.yaml", key="resume_from_checkpoint"):
            options(folder)
    own = checkpoint(out / "checkpoint-4", {})
    assert options(equal) == ["--resume-from-checkpoint", str(own)]  # interrupted, the run resumes from its own
    assert options(own) == [] and options(equal, force=True) == []
    assert RunFolder(out).resume_options(Path("own.yaml"), identity(recipe), False) == []


EPOCHS = AUTO + "lora_r: 8\nlr_scheduler: cosine\nnum_epochs: 4\nevals_per_epoch: 1\n"


@pytest.fixture
def after_four(tmp_path, monkeypatch):
    """The folder of a finished run of 4 epochs with a checkpoint, and a function that claims it for EPOCHS=."""
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    out = tmp_path / "outputs" / "own"

    def claim(text: str = EPOCHS, epochs: int = 6, rank: int = 0, **options) -> tuple:
        own = identity(text, args=["--num-epochs", str(epochs)])
        options = {"force": False, "more_epochs": True} | options
        return RunFolder(out, rank).claim(tmp_path / "own.yaml", own, **options)

    claim(epochs=4)
    # The plugin's identity has what axolotl derives from the epochs, too.
    checkpoint(out / "checkpoint-40", {"recipe": {"lora_r": 8, "num_epochs": 4.0, "eval_steps": 0.25}})
    (out / "run.json").write_text('{"adapter": {"sha256": "5e"}}', encoding="utf-8")
    (out / "adapter_model.safetensors").write_bytes(b"of four epochs")
    return out, claim


def test_more_epochs_go_on_from_the_last_checkpoint(after_four, capsys):
    out, claim = after_four
    option = ["--resume-from-checkpoint", str(out / "checkpoint-40")]
    assert claim(rank=1)[1] == option  # another node may be first, or last
    assert claim() == (None, option)
    (aside,) = (path for path in out.parent.glob("own.*") if path.is_dir())
    assert (aside / "adapter_model.safetensors").read_bytes() == b"of four epochs" and (aside / "run.json").is_file()
    assert RunFolder(aside).identity.epochs == 4 and not list(aside.glob("checkpoint-*"))
    assert sorted(path.name for path in out.glob("*")) == ["checkpoint-40", "recipe.yaml", "started.json"]
    facts = {"checkpoint": "checkpoint-40", "epochs": 4, "adapter_sha256": "5e", "set_aside": f"outputs/{aside.name}"}
    assert RunFolder(out).identity.goes_on_from == facts
    assert f"set aside: outputs/{aside.name}\n" in (text := capsys.readouterr().out)
    assert re.search("going on from checkpoint-40 .*6 epochs.* learning rate .*cosine", text), text
    assert claim(rank=1)[1] == option
    assert claim() == (None, option) and RunFolder(out).identity.goes_on_from == facts  # killed before its first one
    checkpoint(out / "checkpoint-50", {"recipe": {"lora_r": 8, "num_epochs": 6.0}})
    assert claim() == (None, []) and RunFolder(out).identity.goes_on_from == facts  # the plugin finds it by itself
    (out / "run.json").write_text('{"recipe": "own"}', encoding="utf-8")
    assert claim() == ({"recipe": "own"}, []) and [path for path in out.parent.glob("own.*") if path.is_dir()] == [
        aside
    ]


def test_an_unfinished_run_goes_on_as_well(after_four):
    """As one whose files were being set aside when it was killed."""
    out, claim = after_four
    (out / "run.json").unlink()
    assert claim()[1] == ["--resume-from-checkpoint", str(out / "checkpoint-40")]
    assert RunFolder(out).identity.goes_on_from["set_aside"] is None
    assert not [path for path in out.parent.glob("own.*") if path.is_dir()]


@pytest.mark.parametrize(
    "text, options, metrics, words",
    [
        (EPOCHS, {"epochs": 3}, {}, ["EPOCHS=3", "has 4", "FORCE=1"]),
        (EPOCHS, {"more_epochs": False}, {}, ["num_epochs: 4 -> 6", "EPOCHS=6 goes on", "FORCE=1"]),
        (EPOCHS.replace("r: 8", "r: 16"), {}, {}, ["lora_r: 8 -> 16", "num_epochs: 4 -> 6", "FORCE=1"]),
        (EPOCHS, {}, {"stopped_early": True, "steps": 31}, ["EPOCHS=6", "stopped early", "31", "FROM=outputs/own"]),
        (EPOCHS, {}, None, ["EPOCHS=6", "checkpoint-40 has no optimizer", "FORCE=1", "FROM=outputs/own"]),
    ],
    ids=["fewer", "not asked for", "another recipe", "stopped early", "no optimizer"],
)
def test_more_epochs_are_refused_where_they_cannot_be_right(text, options, metrics, words, after_four):
    out, claim = after_four
    if metrics is None:
        (out / "checkpoint-40" / "optimizer.pt").rename(out / "checkpoint-40" / "model.safetensors")
        checkpoints.seal(out / "checkpoint-40", {"recipe": {"num_epochs": 4.0}})
    (out / "metrics.json").write_text(json.dumps(metrics or {}), encoding="utf-8")
    before = sorted(out.rglob("*"))
    with refuses(*words):
        claim(text, **options)
    assert sorted(out.rglob("*")) == before and RunFolder(out).identity.epochs == 4


@pytest.mark.parametrize(
    "change, words",
    [
        (("cosine", "rex"), ["'lr_scheduler' is rex"]),
        (("checkpoints: true", "checkpoints: false"), ["auto_resume_from_checkpoints: true"]),
        (None, ["no complete checkpoint"]),
    ],
    ids=["fixed schedule", "does not resume", "no checkpoint"],
)
def test_a_run_that_cannot_resume_has_no_more_epochs(change, words, after_four):
    out, claim = after_four
    text = EPOCHS.replace(*change) if change else EPOCHS
    if not change:
        shutil.rmtree(out / "checkpoint-40")
    RunFolder(out).begin(identity(text, args=["--num-epochs", "4"]))
    with refuses("EPOCHS=6", *words, "FORCE=1", "FROM=outputs/own"):
        claim(text)


def test_more_epochs_than_max_steps_allows_are_refused(command, house):
    line = failure(command("finlora", "train", "sentiment_r8_dora", "--tiny", "--epochs", "6"))
    assert "EPOCHS=6: TINY=1 trains 2 steps" in line and "leave" in line
    own = house / "own.yaml"
    recipe = yaml.safe_load((house / "recipes" / "sentiment_r8_dora.yaml").read_text(encoding="utf-8"))
    own.write_text(yaml.safe_dump(recipe | {"max_steps": 5}), encoding="utf-8")
    line = failure(command("finlora", "train", "own.yaml", "--epochs", "6"))
    assert "EPOCHS=6" in line and "own.yaml: key 'max_steps'" in line and "leave" in line


def test_the_adapter_to_start_from_is_a_folder_or_a_trained_recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "ROOT", tmp_path)
    folder = tmp_path / "outputs" / "adapter"
    folder.mkdir(parents=True)
    assert run.adapter_folder("outputs/adapter", small=False) == run.adapter_folder(str(folder), small=False) == folder
    with refuses("FROM=sentment_r8_lora", "no folder", "no trained recipe", "sentiment_r8_lora"):
        run.adapter_folder("sentment_r8_lora", small=False)
    with refuses("FROM=sentiment_r8_lora", "is not trained", "make train RECIPE=sentiment_r8_lora"):
        run.adapter_folder("sentiment_r8_lora", small=True)


ADAPTER_FAULTS = {
    "rank": ({"r": 4}, "'r' .*4.* 8"),
    "no DoRA": ({"use_dora": False}, "'use_dora' .*False.* True"),
    "targets": ({"target_modules": ["q_proj"]}, r"'target_modules' .*\['q_proj'\]"),
}


@pytest.mark.parametrize("case", ADAPTER_FAULTS)
def test_an_adapter_that_is_not_what_the_recipe_says(case, tmp_path):
    change, expected = ADAPTER_FAULTS[case]
    recipe = recipes.load(recipe_names.RECIPES / "sentiment_r8_dora.yaml")
    config = {
        "r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "use_dora": True,
        "use_rslora": False,
        "target_modules": ["v_proj", "q_proj", "k_proj"],
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change), encoding="utf-8")
    with pytest.raises(UserError, match=expected):
        run.check_adapter(recipe, RunFolder(tmp_path), {"Linear8bitLt": 96})
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match="{'Linear': 96}.* Linear8bitLt"):
        run.check_adapter(recipe, RunFolder(tmp_path), {"Linear": 96})
    (tmp_path / "adapter_model.safetensors").write_bytes(b"cut short")
    with pytest.raises(UserError, match="adapter_model.safetensors: .*read"):
        run.check_adapter(recipe, RunFolder(tmp_path), {"Linear8bitLt": 96})


def test_an_adapter_is_held_against_what_the_options_set(tmp_path):
    keys = {"lora_r": 8, "lora_dropout": 0.05, "lora_target_modules": ["q_proj"]}
    recipe = recipes.Recipe(Path("own.yaml"), keys, ("--lora-dropout", "0.1"))
    for dropout, words in (0.05, "'lora_dropout' is 0.05.* 0.1"), (0.1, "trained on"):
        config = {"r": 8, "lora_dropout": dropout, "target_modules": ["q_proj"]}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(UserError, match=words):
            run.check_adapter(recipe, RunFolder(tmp_path), {"Linear8bitLt": 96})


def test_what_is_recorded_is_what_is_trained(command, house, tiny_base):
    """A recipe that is edited once its run has begun, and before axolotl reads it."""
    rows = house / "rows.jsonl"
    turns = [{"role": "user", "content": "Shares rose."}, {"role": "assistant", "content": "up"}]
    rows.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(9)), encoding="utf-8")
    recipe = yaml.safe_load((house / "recipes" / "sentiment_bf16_r8_dora.yaml").read_text(encoding="utf-8"))
    data = recipe["datasets"][0] | {"path": str(rows)}
    recipe |= {"base_model": str(tiny_base), "datasets": [data], "test_datasets": [data], "output_dir": "outputs/own"}
    (house / "own.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    edit = (
        "from pathlib import Path; from finlora.recipes import recipe; from finlora.train import launch, run as train\n"
        "own = Path('own.yaml'); text = own.read_text()\n"
    )
    edit += "fetch = recipe.fetch_base\n"
    edit += (
        "recipe.fetch_base = lambda *args, **kwargs: own.write_text(text + 'seed: 77\\n') and fetch(*args, **kwargs)\n"
    )
    edit += "launch.axolotl = lambda command, config, *rest: print(command, config, 'seed: 77' in config.read_text())\n"
    edit += "train.train(own)"
    done = command("-c", edit)
    flags = [line.split()[-1] for line in done.stdout.splitlines() if line.startswith(("preprocess ", "train "))]
    assert flags == ["False", "False"], done.stdout + done.stderr


def test_a_finished_run_needs_its_base_model_no_more(command, house):
    """Its folder is gone, and what the run's options would be checked against with it."""
    rows, own = house / "rows.jsonl", house / "own.yaml"
    turns = [{"role": "user", "content": "Shares rose."}, {"role": "assistant", "content": "up"}]
    rows.write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    recipe = yaml.safe_load((house / "recipes" / "sentiment_bf16_r8_dora.yaml").read_text(encoding="utf-8"))
    data = recipe["datasets"][0] | {"path": "rows.jsonl"}
    recipe |= {"base_model": "models/gone", "datasets": [data], "test_datasets": [data], "output_dir": "outputs/own"}
    own.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    args = ["--learning-rate", "0.0002"]
    out = house / "outputs" / "own"
    out.mkdir(parents=True)
    start = {"models/gone": {"model.safetensors": "0"}}
    before = identity(own.read_text(encoding="utf-8"), args=args, data={"rows.jsonl": sha256(rows)}, start=start)
    (out / "started.json").write_text(json.dumps(asdict(before)), encoding="utf-8")
    metrics = dict.fromkeys(("steps", "seconds", "samples_per_second", "tokens_per_second"), 1)
    metrics |= {"final_loss": 1.0, "final_eval_loss": None}
    record = {
        "adapter": {"file": "outputs/own/adapter_model.safetensors", "bytes": 1},
        "metrics": metrics,
        "seconds": 1,
    }
    (out / "run.json").write_text(json.dumps(record), encoding="utf-8")
    done = command("finlora", "train", "own.yaml", "--", *args)
    assert done.returncode == 0 and "already trained" in done.stdout, done.stderr
    assert "models/gone" in failure(command("finlora", "train", "own.yaml", "--force", "--", *args))
