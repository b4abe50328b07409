"""`make sweep`: the points of a file, what each is called, that they run, fail and go on alone, what is told then."""

import fcntl
import importlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from failures import failed, refuses, says
from hypothesis import given
from hypothesis import strategies as st
from made import answered, label_rows, subject

from finlora.core import machine
from finlora.core.errors import UserError
from finlora.core.paths import SAMPLE
from finlora.data.test_sets import read_set
from finlora.evaluate.evaluation import Request
from finlora.recipes import bases, recipe, rules
from finlora.recipes import load as recipes
from finlora.recipes import memory as recipes_memory
from finlora.recipes import names as recipe_names
from finlora.sweep import points as sweep_points
from finlora.sweep import report as sweep_report
from finlora.sweep import run as sweep
from finlora.sweep.points import SweepPoint
from finlora.sweep.report import Outcome
from finlora.sweep.run import Job, Options
from finlora.sweep.seeds import mean_score, paired_over_seeds
from finlora.train import launch, runs
from finlora.train import run as train

ROOT = Path(__file__).resolve().parent.parent
RECIPE = recipe_names.RECIPES / "sentiment_r8_dora.yaml"
SHIPPED = sorted(path.stem for path in sweep_points.SWEEPS.glob("*.yaml"))
README = (sweep_points.SWEEPS / "README.md").read_text(encoding="utf-8")


def points(folder: Path, text: str, recipe: Path = RECIPE) -> list[SweepPoint]:
    (folder / "mine.yaml").write_text(text, encoding="utf-8")
    return sweep_points.plan(recipe, folder / "mine.yaml")


def axolotls_own(content: dict) -> list[dict]:
    """What axolotl's --sweep makes of a file, from its source: importing axolotl takes ten seconds."""
    package = Path(importlib.util.find_spec("axolotl").origin).parent
    spec = importlib.util.spec_from_file_location("sweeps", package / "cli" / "utils" / "sweeps.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.generate_sweep_configs({}, content)


values = st.lists(st.one_of(st.integers(1, 9), st.booleans(), st.text("abc", min_size=1)), min_size=1, max_size=3)
keys = st.sampled_from(["lora_r", "seed", "optimizer", "num_epochs", "warmup_steps"])
paired = st.lists(
    st.dictionaries(st.sampled_from(["lora_alpha", "adapter"]), st.integers(1, 9), min_size=1), max_size=3
)


@given(st.dictionaries(keys, values, min_size=1, max_size=3), paired)
def test_a_sweep_file_means_what_it_means_to_axolotl(tmp_path_factory, content, pairs):
    file = tmp_path_factory.mktemp("sweep") / "any.yaml"
    whole = content | ({"_": pairs} if pairs else {})
    file.write_text(yaml.safe_dump(whole, sort_keys=False), encoding="utf-8")
    ours = sweep_points.read(file)
    assert sorted(map(repr, ours)) == sorted(map(repr, axolotls_own(whole)))
    first = next(iter(content))  # unshuffled: the first key changes last
    each = len(ours) // len(content[first])
    assert [point[first] for point in ours] == [value for value in content[first] for _ in range(each)]


@pytest.mark.parametrize("name", SHIPPED)
def test_each_shipped_sweep_has_points_that_are_recipes(name):
    planned = sweep_points.plan(RECIPE, sweep_points.find(name))
    assert len(planned) >= 3 and len({point.name for point in planned}) == len(planned)
    assert [point for point in planned if point.name == RECIPE.stem], "the recipe itself is a point to compare with"
    for point in planned:
        out = f"outputs/sweeps/sentiment_r8_dora.{name}/{point.name}"
        assert point.recipe["output_dir"] == out and point.path == ROOT / f"{out}.yaml"
        rules.check_name(recipes.Recipe(point.path, point.recipe))


NAMES = {
    "lora_r: [4]": "sentiment_r4_dora",
    "_: [{lora_r: 16, lora_alpha: 32}]": "sentiment_r16_a32_dora",
    "_: [{load_in_8bit: false, load_in_4bit: true, adapter: qlora}]": "sentiment_4bit_r8_dora",
    "_: [{peft_use_dora: false, peft_use_rslora: true}]": "sentiment_r8_rslora",
    "learning_rate: [2e-4]": "sentiment_r8_dora.learning_rate-0.0002",
    "_: [{lora_r: 4, seed: 7, bf16: true}]": "sentiment_r4_dora.bf16-true.seed-7",
    "lora_target_modules: [[q_proj, v_proj]]": "sentiment_r8_dora.lora_target_modules-q_proj-v_proj",
    "lr_groups: [[{name: m, modules: [lora_magnitude_vector], lr: 1e-3}]]": "sentiment_r8_dora.lr_groups-m-0.001",
    "num_epochs: [4.0]": "sentiment_r8_dora",
}


@pytest.mark.parametrize("text", NAMES)
def test_a_points_name_says_what_differs(text, tmp_path):
    assert [point.name for point in points(tmp_path, text)] == [NAMES[text]]


def test_other_values_and_other_recipes_have_names_too(tmp_path):
    (point,) = points(tmp_path, "chat_template_kwargs: [{thinking: 'no / never'}]")
    assert re.fullmatch(r"sentiment_r8_dora\.chat_template_kwargs-[0-9a-f]{8}", point.name)
    own = tmp_path / "our own.yaml"
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8")) | {"output_dir": "outputs/own"}
    own.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert points(tmp_path, "lora_r: [4]", own)[0].name == "our own.lora_r-4"


def test_a_points_text_does_not_follow_the_order_of_the_sweep_file(tmp_path):
    texts = []
    for text in (
        "_: [{seed: 7, lr_scheduler: linear, relora: null}]",
        "lora_r: [8]\n_: [{lr_scheduler: linear, seed: 7}]",
    ):
        (point,) = points(tmp_path, text)
        point = replace(point, path=tmp_path / "point.yaml")
        point.write(RECIPE)
        texts.append(point.path.read_text(encoding="utf-8"))
    assert texts[0] == texts[1]
    assert texts[0].startswith('# recipes/sentiment_r8_dora.yaml with lr_scheduler: "linear", seed: 7\nbase_model: ')


# A sweep file, the key that is named, and words for the fault and the remedy; BAD_LINES: the line where one is named.
BAD = {
    "unknown key": ("lora_rr: [4]", "lora_rr", ["unknown", "lora_r'?"]),
    "unknown nested key": (
        "lr_groups: [[{name: a, modules: [b], lr: 1, rate: 1}]]",
        "lr_groups.0.rate",
        ["unknown"],
    ),
    "wrong type": ("lora_r: [eight]", "lora_r", ["'eight'", "integer"]),
    "empty list": ("lora_r: []", "lora_r", ["empty", "values", "remove"]),
    "empty pairs": ("_: []", "_", ["empty", "values", "remove"]),
    "empty pair": ("_: [{}]", "_", ["entry 1", "keys with their values"]),
    "no list": ("lora_r: 4", "lora_r", ["4", "list"]),
    "text, which axolotl takes for letters": ("lr_scheduler: linear", "lr_scheduler", ["linear", "list"]),
    "nothing": ("", None, ["no keys|empty"]),
    "twice": ("lora_r: [4]\nlora_r: [8]", "lora_r", ["twice|duplicate", "keep one|remove one"]),
    "in a pair too": ("lora_r: [4]\n_: [{lora_r: 8}]", "lora_r", ["keep one|remove one"]),
    "equal points": ("lora_r: [4, 8, 4]", None, ["points 1 and 3", "lora_r: 4", "remove one|keep one"]),
    "equal in effect": (
        "learning_rate: [1e-4, 0.0001]",
        None,
        ["points 1 and 2", "learning_rate: 0.0001", "remove one|keep one"],
    ),
    "equal in another order": (
        "lora_target_modules: [[q_proj, v_proj], [v_proj, q_proj]]",
        None,
        ["points 1 and 2", 'lora_target_modules: ["v_proj", "q_proj"]', "remove one|keep one"],
    ),
    "words that were meant as one value": (
        "lora_target_modules: [q_proj, v_proj]",
        "lora_target_modules",
        ["point 1", "list", "[q_proj, v_proj]"],
    ),
    "a target that is no layer": (
        "lora_target_modules: [[q_proj], [q_proj, w9]]",
        "lora_target_modules",
        ["point 2", "w9", "q_proj, k_proj, "],
    ),
    "an optimizer that nobody has": ("optimizer: [sgd, nonsense]", "optimizer", ["nonsense", "adamw"]),
    "equal names": (
        "lr_groups: [[{name: a, modules: [q_proj], lr: 1}], [{name: a, modules: [k_proj], lr: 1}]]",
        None,
        ["points 1 and 2", "sentiment_r8_dora.lr_groups-a-1", "rename"],
    ),
    "the sweep's own": ("output_dir: [outputs/a]", "output_dir", ["remove"]),
    "half of 4 bits": (
        "load_in_4bit: [true]",
        "load_in_4bit",
        ["point 1", "is true", "load_in_8bit", "keep one"],
    ),
    "not YAML": ("lora_r: [4", None, ["YAML"]),
    "a number for a key": ("8: [4]\nlora_r: [4]", "8", ["unknown", "remove"]),
    "what a run is held against, left out": ("lora_dropout: [null]", "lora_dropout", ["point 1", "missing"]),
    "a limit on prefixes that are not shared": (
        "fastdora_shared_prefixes: [false]\nfastdora_rows_per_prefix: [4]",
        "fastdora_rows_per_prefix",
        ["point 1", "fastdora_shared_prefixes: true"],
    ),
    "a secret": ("wandb_project: [hf_abcdefghijklmnopqrstuvwx]", "wandb_project", ["secret", "remove", "set"]),
}
BAD_LINES = {"twice": 2, "not YAML": 1}


@pytest.mark.parametrize("case", BAD)
def test_a_sweep_file_that_is_wrong_is_named_in_one_line(case, tmp_path):
    text, key, words = BAD[case]
    with refuses(*words, file=tmp_path / "mine.yaml", line=BAD_LINES.get(case), key=key) as error:
        points(tmp_path, text)
    assert "hf_" not in str(error.value)


texts = st.text(st.characters(categories=["L", "N", "P", "S"]), max_size=5)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.dates() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts | st.integers(), inner, max_size=2),
    max_leaves=6,
)
some_key = st.sampled_from(["lora_r", "lr_groups", "_", "datasets", "special_tokens", "peft_use_dora", "plugins"])


@given(st.dictionaries(some_key | st.integers() | st.none() | texts, anything | st.lists(anything), max_size=3))
def test_any_other_file_ends_in_points_or_in_one_line(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("sweep")
    try:
        assert points(folder, yaml.safe_dump(content, allow_unicode=True))
    except UserError as error:
        assert "mine.yaml: " in str(error) and "\n" not in str(error)


def test_what_is_not_there_is_said_with_what_is(tmp_path):
    with refuses("rank?", ", ".join(SHIPPED), "YAML file", file="SWEEP=rnak"):
        sweep_points.find("rnak")
    for name in ("", str(tmp_path / "other.yaml"), "../rank"):
        with refuses(", ".join(SHIPPED), "YAML file", file=f"SWEEP={name}"):
            sweep_points.find(name)
    with refuses("sentiment_r8_dora", file="RECIPE=sentiment_r9_dora"):
        recipe_names.find("sentiment_r9_dora")
    magnitude = sweep_points.find("magnitude")
    with refuses("point 2", "LoRA", "lora_magnitude_vector", "recipe", key="lr_groups"):
        sweep_points.plan(recipe_names.find("sentiment_r8_lora"), magnitude)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder in the checkout's place, so that a sweep's points and locks stay out of the real outputs."""
    for module in (sweep, sweep_points, runs, rules, recipe):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    return tmp_path


def test_options_that_the_points_differ_by_and_points_that_are_not_there(tmp_path, checkout):
    (tmp_path / "mine.yaml").write_text("learning_rate: [0.1, 0.2]", encoding="utf-8")
    for args, key in ((["--learning-rate", "0.3"], "learning_rate"), (["--lora-r=4"], "lora_r")):
        with refuses("change", str(tmp_path / "mine.yaml"), key=key, file=f"ARGS={' '.join(args)}"):
            sweep.sweep(RECIPE, tmp_path / "mine.yaml", Options(args=args))
    with refuses("mine.yaml", "1 to 2", "LIST=1", file="POINT=3"):
        sweep.sweep(RECIPE, tmp_path / "mine.yaml", Options(point=3))
    with refuses("'fbp'", "fpb", file="TASKS=fbp"):
        sweep.sweep(RECIPE, tmp_path / "mine.yaml", Options(evaluate={"tasks": "fbp"}))


def test_gpus_are_shared_out_and_missed(tmp_path, monkeypatch):
    (point,) = points(tmp_path, "lora_r: [4]")
    monkeypatch.setattr(machine, "gpus", lambda: [("NVIDIA A100", 80, 79)] * 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert sweep.slots(Options(), point) == [None]
    assert sweep.slots(Options(gpus=2), point) == ["0", "1"]
    assert sweep.slots(Options(gpus=3, tiny=True), point) == ["0", "1", "2"]
    assert sweep.slots(Options(points_per_gpu=3), point) == [None] * 3
    assert sorted(sweep.slots(Options(gpus=2, points_per_gpu=2), point)) == ["0", "0", "1", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7f")
    assert sweep.slots(Options(gpus=2), point) == ["5", "GPU-7f"]
    with refuses("CUDA_VISIBLE_DEVICES=5,GPU-7f", "name 3", "GPUS=1", file="GPUS=3"):
        sweep.slots(Options(gpus=3, tiny=True), point)
    with refuses("GPU", "2 ", "TINY=1", file="GPUS=4"):
        sweep.slots(Options(gpus=4), point)
    monkeypatch.setattr(machine, "gpus", list)
    with refuses("GPU", "none|no ", "TINY=1", file="GPUS=1"):
        sweep.slots(Options(), point)


def test_without_a_gpu_the_table_of_what_is_trained_is_written_all_the_same(ranks, checkout, monkeypatch):
    """As on a login node, after an array of which one task failed. A sweep that was refused lets go of its folder."""
    done = {outcome.point.name: outcome.run for outcome in ranks[:3]}
    folder = checkout / "outputs" / "sweeps" / "sentiment_r8_dora.mine"
    folder.mkdir(parents=True)
    (folder / "sentiment_r16_dora.log").write_text("error: out of memory\n", encoding="utf-8")
    monkeypatch.setattr(machine, "gpus", list)
    monkeypatch.setattr(train, "finished_run", lambda path, *options: done.get(path.stem))
    with pytest.raises(UserError) as refused:  # its traceback stays alive until the test ends
        sweep.sweep(RECIPE, checkout / "mine.yaml", Options())
    says(str(refused.value), "GPU", "none|no ", "TINY=1", file="GPUS=1")
    table = (folder / "table.md").read_text(encoding="utf-8")
    assert re.search(r"^\| 1 \| sentiment_r2_dora \|", table, re.M) and "out of memory |" in table
    done[ranks[3].point.name] = ranks[3].run
    shown = sweep.sweep(RECIPE, checkout / "mine.yaml", Options())
    assert [line[1] for line in shown.table.texts()[1:]] == list(done) and "note" not in shown.table.heads


def test_sweeps_of_equal_names_do_not_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "gpus", list)
    monkeypatch.setattr(
        sweep, "output_folder", lambda recipe, small: tmp_path / "out" / Path(recipe["output_dir"]).name
    )
    monkeypatch.setattr(train, "finished_run", lambda path, *options: None)
    monkeypatch.setattr(SweepPoint, "write", lambda *point: None)
    first, second = (tmp_path / name / "mine.yaml" for name in "ab")
    own = tmp_path / "a" / RECIPE.name
    for file in (first, second):
        file.parent.mkdir()
        file.write_text("lora_r: [2]", encoding="utf-8")
    shutil.copy(RECIPE, own)

    def refused(recipe, file):
        with pytest.raises(UserError) as error:
            sweep.sweep(recipe, file, Options(point=1))
        return str(error.value)

    out, no_gpu = tmp_path / "out", "GPUS=1: "
    assert refused(RECIPE, first).startswith(no_gpu)  # the folder is its own from here on
    says(refused(RECIPE, second), str(first), str(second), "another name|rename", file=out)
    says(refused(own, first), "recipes/sentiment_r8_dora.yaml", str(own), "another name|rename", file=out)
    assert refused(RECIPE, tmp_path / "b" / ".." / "a" / "mine.yaml").startswith(no_gpu)
    first.unlink()  # moved: nothing else would be lost
    assert refused(RECIPE, second).startswith(no_gpu)
    assert json.loads((out / "sweep.json").read_text())["sweep"] == str(second)
    for text in ('{"x": 1}', "[]", "{"):  # by another hand
        (out / "sweep.json").write_text(text)
        assert refused(RECIPE, second).startswith(no_gpu)


def test_only_what_is_new_is_run(ranks, tmp_path, monkeypatch):
    evaluate(tmp_path, {"sentiment_r2_dora": 0.5})
    point, run, done = ranks[0].point, ranks[0].run, True
    monkeypatch.setattr(train, "finished_run", lambda *point: run)
    monkeypatch.setattr(sweep, "answered", lambda request: done)

    def commands(evaluate=True, **options) -> list[str]:
        options |= {"evaluate": {"limit": 9} if evaluate else None, "args": ["--max-steps", "9"]}
        lines = [" ".join(command) for command in sweep.commands_of(point, tmp_path, Options(**options))]
        return [text.replace(str(point.path), "P").replace(str(tmp_path), "F") for text in lines]

    ask = "eval --recipe P --results F/results --limit 9"
    assert commands() == commands(evaluate=False) == []
    assert commands(force=True) == ["train P --force -- --max-steps 9", f"{ask} --force"]
    done = False
    assert commands() == [ask] and commands(evaluate=False) == []
    run = run | {"adapter": {"sha256": "of another training"}}
    assert commands() == [f"{ask} --force"]  # those answers are another adapter's: set aside
    run = None
    few_shot = sweep.commands_of(point, tmp_path, Options(evaluate={"shots": 3}))[-1]
    assert few_shot[-2:] == ["--shots", "3"]  # answers of another name, so none to set aside
    assert commands(track="wandb") == ["train P --track wandb -- --max-steps 9", f"{ask} --force"]
    point = ranks[1].point
    assert commands() == ["train P -- --max-steps 9", ask]


def test_the_answers_after_examples_are_those_of_a_sweep_with_shots(ranks, tmp_path):
    evaluate(tmp_path, {"sentiment_r2_dora": 0.5, "sentiment_r4_dora-3shot": 0.75})
    for shots, point in (0, "sentiment_r2_dora"), (3, "sentiment_r4_dora"):
        outcomes, sets, _ = sweep_report.evaluated([replace(one, shots=shots) for one in ranks], tmp_path / "results")
        assert [one.point.name for one in outcomes if one.model] == [point]
        (line,) = (
            text
            for text in sweep_report.notes(sweep_report.settings_of(outcomes), sets, [])
            if text.startswith("Score")
        )
        assert line.startswith("Score (3-shot): " if shots else "Score: ")


def test_a_point_is_evaluated_again_where_rows_are_missing_or_answers_were_cut(tmp_path):
    request = Request(model="some/model", tasks="fpb", tests=str(SAMPLE), results=tmp_path, endpoint="http://a")
    sample = read_set("fpb", SAMPLE)
    rows = [{"target": row.target, "answer": row.target} for row in sample.rows]
    folder = answered(subject(tmp_path, "model"), "fpb", rows, sha256=sample.sha256, lengths="whole")
    assert sweep.answered(request)
    about = json.loads((folder / "set.json").read_text())
    (folder / "set.json").write_text(json.dumps(about | {"evaluated": len(rows) - 1}))
    assert not sweep.answered(request)


@given(
    bits=st.sampled_from([16, 8, 4]),
    rank=st.integers(1, 512),
    alpha=st.integers(1, 512),
    method=st.sampled_from(["lora", "dora", "rslora"]),
    task=st.sampled_from(["sentiment", "xbrl_term", "general_multi"]),
    base=st.sampled_from(list(bases.load_bases())),
)
def test_a_recipes_name_is_made_and_read_by_one_grammar(bits, rank, alpha, method, task, base):
    recipe = {"load_in_8bit": bits == 8, "load_in_4bit": bits == 4, "lora_r": rank, "lora_alpha": alpha}
    recipe |= {"peft_use_dora": method == "dora", "peft_use_rslora": method == "rslora"}
    parts = {"task": task, "base": base, "bits": bits, "r": rank, "alpha": alpha, "method": method}
    name = recipe_names.compose_name({"task": task, "base": base} | recipe_names.parts_of(recipe))
    assert recipe_names.parse_name(name) == parts and recipe_names.fault_of(name) is None


def test_the_base_models_size_says_whether_a_cpu_will_do(tiny_base):
    """Not the adapter's: of rank 1 the 8B model trains less than a million parameters."""
    assert not recipes_memory.on_cpu(bases.shape("meta-llama/Llama-3.1-8B-Instruct"))
    assert recipes_memory.on_cpu(bases.shape(str(tiny_base)))


# What a point's process does here, in place of training: it notes where and when it ran, and ends as it is told.
STAND_IN = """
import json, os, signal, sys, time
name, ends, *more = sys.argv[1:]
note = {"name": name, "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "began": time.monotonic()}
note["threads"] = os.environ.get("OMP_NUM_THREADS")
note["tokenizing"] = os.environ.get("AXOLOTL_DATASET_NUM_PROC")
note["share"] = os.environ.get("FINLORA_POINTS_PER_GPU")
time.sleep(0.15)
with open(os.path.join(os.path.dirname(__file__), "notes.jsonl"), "a") as file:
    file.write(json.dumps(note | {"ended": time.monotonic()}) + "\\n")
print("the output of", name, flush=True)
if ends == "interrupt":
    signal.signal(signal.SIGTERM, lambda *_: (print("a checkpoint is saved", flush=True), sys.exit(143)))
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(60)
if ends == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
print(*more, sep="\\n", file=sys.stderr)
sys.exit(int(ends))
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A function that makes a point of its name and how its processes end, and one that reads what they noted."""
    (tmp_path / "stand_in.py").write_text(STAND_IN, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(sweep, "FINLORA", (sys.executable, "-m"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def point(name: str, *processes: tuple) -> Job:
        commands = [["stand_in", name, *map(str, ends)] for ends in processes or [(0,)]]
        return Job(name, tmp_path / f"{name}.log", commands)

    point.notes = lambda: [json.loads(line) for line in (tmp_path / "notes.jsonl").read_text().splitlines()]
    return point


def test_points_run_one_after_another_and_each_fails_alone(stand_in, tmp_path, capfd):
    oom = "run.yaml: out of memory on NVIDIA A100: a step needs more than 44.0 of 40.0 GiB; set sequence_len: 128"
    todo = [
        stand_in("good"),
        stand_in("memory", (1, "  12%|#2   | step", f"error: {sweep.ROOT}/{oom}")),
        stand_in("killed", ("kill",)),
        stand_in("raised", (1, "warning: a", "error: axolotl train point.yaml failed: the driver is gone", "last")),
        stand_in("silent", (3,)),
        stand_in("asked", (0,), (0,)),
    ]
    failed_points = sweep.work(todo, [None], None)
    assert re.search("signal 9", failed_points["killed"])
    assert failed_points == {
        "memory": oom,
        "killed": failed_points["killed"],
        "raised": "axolotl train point.yaml failed: the driver is gone",
        "silent": failed_points["silent"],
    }
    assert re.search(rf"\b3\b.*{tmp_path / 'silent.log'}", failed_points["silent"])
    assert [note["name"] for note in stand_in.notes()] == "good memory killed raised silent asked asked".split()
    assert all(note["gpu"] is None for note in stand_in.notes())
    output = capfd.readouterr().out
    assert "[6/6] asked: " in output and output.count("the output of asked\n") == 2  # shown, and kept
    assert (tmp_path / "asked.log").read_text() == "the output of asked\n\n" * 2
    assert re.search(rf"\bmemory: .*{re.escape(oom)}", output)


def test_points_that_share_a_gpu_share_the_cores(stand_in, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert sweep.work([stand_in(f"p{number}") for number in range(4)], [None] * 4, None) == {}
    assert {(note["threads"], note["tokenizing"]) for note in stand_in.notes()} == {("2", "0")}
    assert sweep.work([stand_in("p4"), stand_in("p5")], [None, None], None) == {}
    assert {(note["threads"], note["tokenizing"]) for note in stand_in.notes()[4:]} == {("4", "4")}
    assert [note["share"] for note in stand_in.notes()] == ["4"] * 4 + ["2"] * 2
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert sweep.work([stand_in("own")], [None, None], None) == {} and stand_in.notes()[-1]["threads"] == "3"


def test_each_gpu_has_one_point_at_a_time(stand_in, capfd):
    todo = [stand_in(f"p{number}", *[(0,)] * (1 + number % 2)) for number in range(7)]
    assert sweep.work(todo, ["3", "5"], None) == {}
    notes = sorted(stand_in.notes(), key=lambda note: note["began"])
    assert len(notes) == 10 and {note["gpu"] for note in notes} == {"3", "5"}
    for gpu in ("3", "5"):
        mine = [note for note in notes if note["gpu"] == gpu]
        assert all(one["ended"] <= other["began"] for one, other in zip(mine, mine[1:], strict=False))
    assert any(one["ended"] > other["began"] for one, other in zip(notes, notes[1:], strict=False)), "never two at once"
    for name in ("p1", "p3", "p5"):
        assert len({note["gpu"] for note in notes if note["name"] == name}) == 1
    assert "the output of" not in capfd.readouterr().out  # two at once would be mixed


def test_an_interrupted_sweep_lets_its_points_save(stand_in, tmp_path, capfd):
    with pytest.raises(KeyboardInterrupt):
        sweep.work([stand_in("first", ("interrupt",)), stand_in("second")], [None], None)
    assert (tmp_path / "first.log").read_text().endswith("a checkpoint is saved\n")
    assert [note["name"] for note in stand_in.notes()] == ["first"]
    assert re.search("interrupted.*same command", capfd.readouterr().err)


SHA = "bf3aa00778540de5d89cbd18164a2a1c35a96d7dd079a6931ea57d0948acb754"  # made.subject's


def trained(point: SweepPoint, **metrics) -> Outcome:
    """The point with run.json of a finished run on a GPU."""
    rank = point.recipe["lora_r"]
    figures = {"steps": 400, "steps_this_run": 400, "seconds": 200.0 + rank, "samples_per_second": 160.0 - rank}
    figures |= {"final_eval_loss": 0.21 + rank / 1000, "peak_memory_gib": 26 + rank / 10}
    run = {"base_model": point.recipe["base_model"], "metrics": figures | metrics, "adapter": {"sha256": SHA}}
    return Outcome(point, run | {"device": "NVIDIA H100", "tiny": False}, None)


def evaluate(folder: Path, shares: dict[str, float]) -> None:
    """results/<point> on two sets, with about these shares of right answers; the same questions for all."""
    for seed, (name, share) in enumerate(shares.items()):
        out = subject(folder / "results", name)
        for test, rows in (("fpb", 300), ("tfns", 200)):
            answered(out, test, label_rows(rows, share, seed=seed))


@pytest.fixture
def ranks(tmp_path):
    return [trained(point) for point in points(tmp_path, "lora_r: [2, 4, 8, 16]")]


def test_the_best_point_is_named_only_where_it_is_distinguishable(ranks, tmp_path, capsys):
    evaluate(tmp_path, {"sentiment_r2_dora": 0.5, "sentiment_r4_dora": 0.65, "sentiment_r8_dora": 0.9})
    shown = sweep_report.report(RECIPE, tmp_path / "mine.yaml", ranks, tmp_path)
    verdict = r"Best: sentiment_r8_dora, \d\d\.\d\d, .*\b500 .*fpb, tfns.* 95% .*\b2 .*sentiment_r16_dora\."
    assert re.fullmatch(verdict, shown.verdict)
    heads, *lines = shown.table.texts()
    assert heads == (
        ["", "point", "rank", "score", "vs best", "fpb", "tfns", "validation loss", "trainable parameters"]
        + ["seconds", "samples/s", "peak GiB"]
    )
    by_rank = {line[2]: dict(zip(heads, line, strict=True)) for line in lines}
    assert list(by_rank) == ["2", "4", "8", "16"] and by_rank["16"]["score"] == by_rank["8"]["vs best"] == ""
    assert by_rank["4"]["vs best"].startswith("−") and "≈" not in by_rank["4"]["vs best"]
    expected = {"validation loss": "0.218", "seconds": "208.0", "samples/s": "152.0", "peak GiB": "26.8"}
    assert expected.items() <= by_rank["8"].items()
    assert by_rank["8"]["trainable parameters"] == "4,915,200"
    assert (tmp_path / "table.md").read_text(encoding="utf-8") in capsys.readouterr().out
    (score, time_, memory) = [panel.series[0].points for panel in shown.plot.panels]
    assert [len(points) for points in (score, time_, memory)] == [3, 4, 4]
    assert all(point.low < point.y < point.high for point in score)
    places = [shown.plot.axis.share(point.x) for point in time_]
    assert places == pytest.approx([0, 1 / 3, 2 / 3, 1]) and shown.plot.title == "rank, log scale"
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert page.count("<circle") == 11 and shown.verdict in page and "http" not in page


def test_no_point_is_named_best_by_luck_or_by_a_loss(ranks, tmp_path):
    shown = sweep_report.report(RECIPE, tmp_path / "mine.yaml", ranks, tmp_path)
    assert not shown.verdict.startswith("Best") and "0.212 (sentiment_r2_dora)" in shown.verdict
    assert [panel.title for panel in shown.plot.panels] == [
        "validation loss",
        "training, s",
        "peak memory, GiB",
    ]
    evaluate(tmp_path, {"sentiment_r2_dora": 0.84, "sentiment_r4_dora": 0.8, "sentiment_r8_dora": 0.4})
    shown = sweep_report.report(RECIPE, tmp_path / "mine.yaml", ranks, tmp_path)
    assert not shown.verdict.startswith("Best")
    assert re.findall(r"sentiment_r[248]_dora", shown.verdict.split("(paired")[0]) in (
        ["sentiment_r2_dora", "sentiment_r4_dora"],
        ["sentiment_r4_dora", "sentiment_r2_dora"],
    )


def test_points_that_differ_in_their_seed_are_one_line_with_intervals_over_seeds(tmp_path):
    planned = points(tmp_path, "lora_r: [2, 8]\nseed: [1, 2, 3]")
    outcomes = [trained(point, final_eval_loss=0.2 + point.recipe["seed"] / 100) for point in planned]
    shares = {"sentiment_r2_dora": 0.5, "sentiment_r8_dora": 0.9}
    evaluate(tmp_path, {point.name: shares[point.name.partition(".")[0]] for point in planned})
    outcomes[0] = Outcome(planned[0], None, "out of memory")
    shown = sweep_report.report(RECIPE, tmp_path / "mine.yaml", outcomes, tmp_path)
    assert (
        shown.verdict.startswith("Best: sentiment_r8_dora, ") and "rows" in shown.verdict and "seeds" in shown.verdict
    )
    heads, low, high = shown.table.texts()
    low, high = (dict(zip(heads, line, strict=True)) for line in (low, high))
    assert (low["point"], low[""], low["seeds"]) == ("sentiment_r2_dora", "1 to 3", "2")
    assert low["note"] == "seed 1 failed: out of memory" and high["seeds"] == "3" and high["validation loss"] == "0.22"
    one = [outcomes[i] for i in (1, 2)]
    (a, b) = sweep_report.evaluated(one, tmp_path / "results")[0]
    means = [sweep_report.Setting((outcome,)).score.accuracy for outcome in (a, b)]
    both = sweep_report.Setting((a, b)).score
    assert both.accuracy == pytest.approx(sum(means) / 2) and low["score"].startswith(f"{100 * both.accuracy:.2f}")
    assert both.low < min(means) and max(means) < both.high  # two seeds say little


def test_settings_without_a_seed_in_common_are_not_compared(tmp_path):
    planned = points(tmp_path, "_: [{lora_r: 2, seed: 1}, {lora_r: 2, seed: 2}, {lora_r: 8, seed: 3}]")
    evaluate(tmp_path, {point.name: 0.5 for point in planned})
    shown = sweep_report.report(RECIPE, tmp_path / "mine.yaml", [trained(point) for point in planned], tmp_path)
    assert shown.verdict.startswith("No point is named best") and any("seed in common" in note for note in shown.notes)


@pytest.mark.parametrize("seeds", [2, 5])
def test_intervals_over_seeds_hold_for_other_seeds_and_rows(seeds):
    """Runs of two equal settings, whose scores move with the seed, with the row, and with both together."""
    drawn = np.random.default_rng(seeds)
    groups = np.repeat(np.arange(150), 2)
    trials, covered, different = 400, 0, 0
    for _ in range(trials):
        row = drawn.normal(0, 1, 150)[groups]
        runs = []
        for _setting in "ab":
            chance = 1 / (
                1 + np.exp(-(0.8 + row + drawn.normal(0, 0.2, (seeds, 1)) + drawn.normal(0, 0.5, (seeds, 300))))
            )
            right = drawn.random((seeds, 300)) < chance
            runs.append(
                [{"row": list(range(300)), "group": groups.tolist(), "right": list(map(float, one))} for one in right]
            )
        score = mean_score(runs[0])
        covered += score.low <= TRUTH <= score.high
        different += paired_over_seeds(*runs)["distinguishable"]
    # 0.93 and 0.06 as for single runs (bench/intervals.py), give or take two standard errors of such a share.
    assert covered / trials > 0.93 - 2 * (0.93 * 0.07 / trials) ** 0.5
    assert different / trials < 0.06 + 2 * (0.06 * 0.94 / trials) ** 0.5


def expected_share() -> float:
    """The mean of 1 / (1 + exp(-x)) for x normal with the simulation's mean and variance."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    spread = (1 + 0.2**2 + 0.5**2) ** 0.5
    return float(weights @ (1 / (1 + np.exp(-(0.8 + spread * nodes)))) / weights.sum())


TRUTH = expected_share()


def test_what_failed_is_unfinished_or_went_on_stands_in_the_table(ranks, tmp_path):
    ranks[0] = Outcome(ranks[0].point, None, "out of memory | on NVIDIA T4")
    ranks[1] = Outcome(ranks[1].point, None, None)
    ranks[2] = trained(ranks[2].point, steps_this_run=100, seconds=50.0)
    heads, *lines = sweep_report.report(RECIPE, tmp_path / "mine.yaml", ranks, tmp_path).table.texts()
    assert re.search(r"fail.*out of memory \| on NVIDIA T4$", lines[0][-1]) and re.search("finished", lines[1][-1])
    assert re.search("interrupt|resum", lines[2][-1]) and lines[2][heads.index("seconds")] == "200.0"
    assert "out of memory \\| on" in (tmp_path / "table.md").read_text(encoding="utf-8")


def test_answers_that_cannot_be_compared_name_no_best_point(ranks, tmp_path):
    evaluate(tmp_path, {"sentiment_r2_dora": 0.5, "sentiment_r4_dora": 0.9})
    about = tmp_path / "results" / "sentiment_r2_dora" / "fpb" / "set.json"
    about.write_text(about.read_text().replace("0123456789abcdef", "f" * 16), encoding="utf-8")
    shown = sweep_report.report(RECIPE, tmp_path / "mine.yaml", ranks, tmp_path)
    assert not shown.verdict.startswith("Best") and "compare" in shown.verdict
    assert any(re.search("sentiment_r[24]_dora.*SHA-256", note) for note in shown.notes)
    ranks[0].run["adapter"] = {"sha256": "of another training"}
    shown = sweep_report.report(RECIPE, tmp_path / "mine.yaml", ranks, tmp_path)
    assert not shown.verdict.startswith("Best")
    assert re.findall(r"sentiment_r\d_dora", shown.verdict) == ["sentiment_r4_dora"]
    assert any(re.match("sentiment_r2_dora: .*another adapter", note) for note in shown.notes)


AXES = {
    "_: [{peft_use_dora: true}, {peft_use_dora: false, peft_use_rslora: true}]": ("method", ["dora", "rslora"], []),
    "lora_r: [4, 8]\nlearning_rate: [1e-4, 2e-4]": (
        "rank",
        ["4", "8"],
        ["learning_rate 0.0001", "learning_rate 0.0002"],
    ),
    "_: [{lora_r: 1, lora_alpha: 2}, {lora_r: 8, lora_alpha: 16}]": ("rank, log scale", ["1", "8"], []),
    "lr_groups: [null, [{name: m, modules: [lora_magnitude_vector], lr: 0.01}]]": (
        "lr_groups, log scale",
        ["0.0001", "0.01"],
        [],
    ),
    "lora_target_modules: [[q_proj], [q_proj, k_proj, v_proj]]": (
        "lora_target_modules (numbers as in the table)",
        ["#1", "#2"],
        [],
    ),
    "lora_r: [4]": ("point", [""], []),
}


@pytest.mark.parametrize("text", AXES)
def test_the_axis_is_what_varies_first(text, tmp_path):
    done = [trained(point) for point in points(tmp_path, text)]
    plot = sweep_report.report(RECIPE, tmp_path / "mine.yaml", done, tmp_path).plot
    names = [name for name in plot.names if name]
    assert (plot.title, [text for _, text in plot.axis.labels], names) == AXES[text]
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    circles = re.findall(r'<circle cx="(\S+)%" cy="(\S+)%"', page)
    assert len(circles) == 3 * len(done) and all(0 <= float(x) <= 100 and 0 <= float(y) <= 100 for x, y in circles)


def test_the_slurm_file_runs_one_point_a_task(tmp_path):
    """With sbatch's variables set as Slurm sets them, and srun and make stood in for."""
    for name, text in {"srun": 'exec "$@"', "make": 'printf "%s|" "$@"'}.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT)}
    command = ["bash", str(ROOT / "cluster" / "sweep.sbatch"), "RECIPE=a", "SWEEP=rank", "EVAL=1"]
    alone = subprocess.run(command, env=env, capture_output=True, text=True)
    assert alone.returncode and "--array=1-" in alone.stderr
    done = subprocess.run(command, env=env | {"SLURM_ARRAY_TASK_ID": "3"}, capture_output=True, text=True)
    assert done.stdout == "sweep|POINT=3|RECIPE=a|SWEEP=rank|EVAL=1|", done.stderr


class Forked:
    """What `sweep.start` starts, in a forked child: axolotl's import is paid once for all points."""

    def __init__(self, argv, gpu, log, lock, threads):
        from forked import start

        def main() -> None:
            os.setsid()
            with log.open("ab") as file:
                for stream in (1, 2):
                    os.dup2(file.fileno(), stream)
            print("CUDA_VISIBLE_DEVICES", gpu, flush=True)
            importlib.import_module("finlora.train.launch").axolotl = axolotl  # the house's
            cli = importlib.import_module("finlora.cli")
            cli.main(list(argv))

        self.pid, self.code = start([], main=main)[0], None

    def poll(self):
        if self.code is None and (done := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.code = os.waitstatus_to_exitcode(done[1])
        return self.code


def axolotl(command, config, args, local, lock) -> None:
    """finlora.train.launch.axolotl in a forked child."""
    from forked import axolotl_command

    code, output = axolotl_command(command, str(config), *args)
    print(output, flush=True)
    if code:
        sys.exit(f"error: {launch.why(output, f'axolotl {command} {config}', code)}")


def swept(house: Path, *argv: str) -> tuple[int, object]:
    """Fork `finlora sweep ARGV...` in the copy of the house; its pid and output, for forked.finish."""
    from forked import start

    def main() -> None:
        os.chdir(house)
        sys.path.insert(0, str(house))
        for name in [name for name in sys.modules if name.partition(".")[0] in ("finlora", "eval")]:
            del sys.modules[name]  # they know the folder that they were imported from
        sweeping = importlib.import_module("finlora.sweep.run")
        assert sweeping.ROOT == house
        sweeping.start = Forked
        importlib.import_module("finlora.cli").main(["sweep", *argv])

    return start([], main=main)


@pytest.mark.xdist_group("axolotl")
@pytest.mark.parametrize("options", [["--tiny"], pytest.param([], marks=pytest.mark.slow)])
def test_a_sweep_at_work_keeps_the_recipes_that_it_still_has_to_train(house, command, options):
    folder = house / "outputs" / "sweeps" / "sentiment_bf16_r8_dora.rank"
    folder.mkdir(parents=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = command("finlora", "sweep", "sentiment_bf16_r8_dora", "rank", *options)
    failed(done, "another command", "wait", file=folder.relative_to(house))
    assert not list(folder.iterdir())


def real_sweep(house: Path, command, ranks: str) -> Path:
    """own/sentiment_bf16_r8_dora.yaml, with a card that is too small for rank 8, and ranks.yaml; their folder."""
    recipe = yaml.safe_load((recipe_names.RECIPES / "sentiment_bf16_r8_dora.yaml").read_text(encoding="utf-8"))
    recipe["plugins"].insert(0, "faults.OutOfMemoryFromRank8")
    recipe |= {"num_epochs": 1, "saves_per_epoch": 2, "evals_per_epoch": 2}
    (house / "own").mkdir()
    (house / "own" / "sentiment_bf16_r8_dora.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    (house / "ranks.yaml").write_text(f"lora_r: {ranks}", encoding="utf-8")
    # In another process: near-duplicates are looked for by threads, which a fork of this process may lack.
    prepared = (
        "from dataclasses import replace; from pathlib import Path; from finlora.recipes import load as recipes; "
        f"from finlora.train import preflight; path = Path({OWN[0]!r}); "
        "preflight.prepare_data(replace(recipes.load(path), tiny=True))"
    )
    done = command("-c", prepared, env={"PYTHONPATH": os.pathsep.join([str(house), str(ROOT / "tests")])})
    assert done.returncode == 0, done.stderr
    return house / "outputs" / "tiny" / "sweeps" / "sentiment_bf16_r8_dora.ranks"


OWN = ("own/sentiment_bf16_r8_dora.yaml", "ranks.yaml", "--tiny")


@pytest.mark.xdist_group("axolotl")
def test_a_real_sweep_trains_what_it_can_and_is_done_once(house, command):
    """On the tiny model, through axolotl: one of two points fails alone, and without it nothing is left to run."""
    from forked import finish

    folder = real_sweep(house, command, "[4, 8]")
    code, output = finish(swept(house, *OWN, "--gpus", "2", "--", "--max-steps", "4"))
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert code == 1
    says(line.removeprefix("error: "), "out of memory", "NVIDIA A100", file="sentiment_bf16_r8_dora")
    run = folder / "sentiment_bf16_r4_dora" / "run.json"
    first = run.read_bytes()
    assert json.loads(first)["metrics"]["steps"] == 4
    assert "CUDA_VISIBLE_DEVICES 1\n" in (folder / "sentiment_bf16_r8_dora.log").read_text(encoding="utf-8")
    assert "\n| 2 | sentiment_bf16_r8_dora | 8 |" in (folder / "table.md").read_text(encoding="utf-8")
    (house / "ranks.yaml").write_text("lora_r: [4]", encoding="utf-8")
    code, output = finish(swept(house, *OWN, "--", "--max-steps", "4"))
    assert code == 0 and run.read_bytes() == first, output


@pytest.mark.slow
@pytest.mark.xdist_group("axolotl")
def test_a_real_sweep_is_killed_goes_on_fails_in_part_and_grows(house, command):
    """On the tiny model, through axolotl: kill -9, a card that is too small for rank 8, a point more in the file."""
    import psutil
    from forked import finish

    folder, ranks = real_sweep(house, command, "[2, 4, 8]"), house / "ranks.yaml"
    options = ("--", "--max-steps", "8", "--learning-rate", "0.001")
    two, four, eight, one = (folder / f"sentiment_bf16_r{rank}_dora" for rank in (2, 4, 8, 1))

    killed = swept(house, *OWN, *options)
    deadline = time.monotonic() + 100
    while not any(four.glob("checkpoint-*/seal.json")):
        ended = os.waitpid(killed[0], os.WNOHANG)
        assert ended == (0, 0) and time.monotonic() < deadline, finish(killed, ended[1])
        time.sleep(0.02)
    family = [psutil.Process(killed[0]), *psutil.Process(killed[0]).children(recursive=True)]
    for process in family:
        process.send_signal(signal.SIGKILL)
    code, output = finish(killed)
    assert code == -signal.SIGKILL and not (four / "run.json").exists(), output
    psutil.wait_procs(family, timeout=10)
    first = (two / "run.json").read_bytes()

    code, output = finish(swept(house, *OWN, "--gpus", "2", *options))
    assert code == 1 and re.search(r"sentiment_bf16_r8_dora.*\b3 .*\b2 ", output), output
    assert (two / "run.json").read_bytes() == first
    log = four.with_suffix(".log").read_text(encoding="utf-8")
    assert "CUDA_VISIBLE_DEVICES 0\n" in log and "checkpoint-" in log
    assert "CUDA_VISIBLE_DEVICES 1\n" in eight.with_suffix(".log").read_text(encoding="utf-8")
    record = json.loads((four / "run.json").read_text(encoding="utf-8"))
    assert record["metrics"]["steps"] == 8 and record["metrics"]["steps_this_run"] == 4
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    says(line.removeprefix("error: "), "out of memory", "NVIDIA A100", file="sentiment_bf16_r8_dora")
    assert "\n| 3 | sentiment_bf16_r8_dora | 8 |" in (folder / "table.md").read_text(encoding="utf-8")

    ranks.write_text("lora_r: [1, 2, 4]", encoding="utf-8")
    code, output = finish(swept(house, *OWN, "--point", "1", "--eval", "--limit", "4", *options))
    assert code == 0 and re.search(r"\b3 points.*\b1 ", output), output
    assert re.search(r"^(?!Best).*best.* sentiment_bf16_r1_dora\b", output, re.M)
    assert (two / "run.json").read_bytes() == first and (one / "run.json").exists()
    table = (folder / "table.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \d \| sentiment_bf16_r(\d)_dora \|", table, re.M) == ["1", "2", "4"]
    assert re.search("interrupt|resum", table) and "tiny" in table
    losses = {json.loads((out / "run.json").read_text())["metrics"]["final_eval_loss"] for out in (one, two, four)}
    assert len(losses) == 3 and None not in losses
    assert (folder / "index.html").read_text(encoding="utf-8").count("<circle") == 4


COMMANDS = [line.split("#")[0].split() for line in README.splitlines() if line.startswith("make sweep ")]


@pytest.mark.parametrize("commands", [COMMANDS[:1], pytest.param(COMMANDS[2::2], marks=pytest.mark.slow)], ids=len)
def test_the_readmes_commands_run(house, commands):
    """With LIST=1, through make: target, variables and points are as it says. One of them trains in the test above."""
    assert len(COMMANDS) >= 4
    venv = f"VENV={ROOT / '.venv'}" if (ROOT / ".venv/bin/axolotl").exists() else "T="
    for command in commands:
        done = subprocess.run([*command, "LIST=1", venv], cwd=house, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert re.findall(r"^ +\d +(\w+)", done.stdout, re.M) == [f"sentiment_r{2**n}_dora" for n in range(7)]
    assert "--array=1-7 " in README and not (house / "outputs").exists()
    listed = re.findall(r"^\| \[(\w+)\.yaml\]", README, re.M)
    assert sorted(listed) == SHIPPED
