"""`make plan`: exact parameters, memory and time near what was measured, and one line for each mistake."""

import json
import math
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools import checks, plan, recipes
from tools.cli import UserError

pytestmark = pytest.mark.xdist_group("axolotl")  # whose tests import PEFT too
SHAPE = recipes.shape("meta-llama/Llama-3.1-8B-Instruct")
RUNS = plan.measured_runs()
ALL = list(recipes.linear_layers(SHAPE))


def recipe(name: str = "sentiment_r8_dora", **changes):
    return recipes.read_recipe(recipes.RECIPES / f"{name}.yaml") | changes


def planned(name: str = "sentiment_r8_dora", gpu="h100-80g", gpus=1, price=None, **changes):
    return plan.make_plan(recipes.RECIPES / f"{name}.yaml", recipe(name, **changes), gpu, gpus, price)


def test_the_recorded_runs_are_of_every_kind():
    """16, 8 and 4 bits, DoRA and LoRA, short and long packs, with recomputation and without; at least six."""
    kinds = [run.recipe for run in RUNS if run.device == "NVIDIA H200"]
    assert len(kinds) >= 6
    for kind in ("load_in_8bit", "load_in_4bit", "peft_use_dora", "gradient_checkpointing"):
        assert {bool(found.get(kind)) for found in kinds} == {True, False}, kind
    assert any(not found["load_in_8bit"] and not found["load_in_4bit"] for found in kinds)
    lengths = [found["sequence_len"] for found in kinds]
    assert min(lengths) <= 5120 and max(lengths) >= 16384


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.name}, {run.device}")
def test_a_plan_is_near_what_was_measured(run):
    """Within 20% of the time and 10% of the peak memory of each recorded run."""
    name, device, found, row = run
    _, gpu = plan.find_gpu(device)
    length, fill = row["tokens_s"] / row["samples_s"], row["tokens_s"] / row["slots_s"]
    step = plan.work(found, SHAPE, gpu, length, fill) @ plan.measured_rates().factors
    assert step == pytest.approx(row["step_s"], rel=0.2), f"{name}: a step takes {row['step_s']} s, planned {step:.3f}"
    peak = checks.memory_estimate(found, SHAPE)
    assert peak == pytest.approx(row["peak_gib"], rel=0.1), f"{name}: {row['peak_gib']} GiB at the peak, planned {peak}"


def test_the_rates_make_sense_and_are_not_fitted_to_noise():
    rates = plan.measured_rates()
    products, attention, traffic, launches = rates.factors
    assert 1 < products < 3 and 1 < attention < 8 and 0.3 < traffic < 6 and 0 <= launches < 2
    assert rates.error < 0.3  # each run, from the others


@pytest.mark.parametrize(
    "changes",
    [{}, {"peft_use_dora": False}, {"lora_r": 4, "lora_target_modules": ALL}],
    ids=["DoRA", "LoRA", "every linear layer"],
)
def test_parameters_are_those_that_peft_trains(changes):
    """On the 8B shape, without its memory: r (in + out) for A and B, one magnitude for each output."""
    found = recipe(**changes)
    counted = plan.parameters(found, SHAPE)
    for name, (layers, own, magnitude) in counted.items():
        inputs, outputs = recipes.linear_layers(SHAPE)[name]
        assert layers == 32 and own == 32 * found["lora_r"] * (inputs + outputs)
        assert magnitude == (32 * outputs if found["peft_use_dora"] else 0)
    total = sum(own + magnitude for _, own, magnitude in counted.values())
    assert list(counted) == found["lora_target_modules"] and total == recipes.trainable_parameters(found, SHAPE)


def test_what_it_says(monkeypatch, capsys):
    monkeypatch.setattr(checks, "gpus", lambda: [])
    argv = ["plan", "sentiment_llama_3_1_8b_8bits_r8_dora", "--gpu", "a100-80g", "--gpus", "4", "--price", "2.50"]
    monkeypatch.setattr(sys, "argv", argv)
    plan.main()
    said = capsys.readouterr().out
    for line in (
        r"sentiment_r8_dora on 4 x a100-80g \(NVIDIA A100-SXM4-80GB, 80 GiB\)",
        r"global batch kept: 4 processes x 1 packs of 1,280 tokens a step, as the recipe's 1 of 5,120 on one",
        r"  q_proj +32 +2,097,152 +131,072 +2,228,224",
        r"  all +4,718,592 +196,608 +4,915,200",
        r"  weights 8\.5, adapter with gradients and optimizer 0\.07, activations \d\.\d, logits 0\.\d",
        r"  peak \d+\.\d of 80: fits",
        r"  rows     71,442 to train on, 1,458 to validate, 85 tokens each",
        r"           \(data/tasks.yaml, about; `make data TASK=sentiment` brings the rows\)",
        r"  samples  285,768 \(24\.3 million tokens\)",
        r"  steps    \d,\d\d\d of 5,120 tokens, 0\.\d+ s each",
        r"  time     \d+ min, validation \d+ (s|min) of it; loading not counted",
        r"  cost     \d+\.\d\d for \d+\.\d\d GPU-hours at 2\.5",
        r"Held against \d+ runs measured on h100-80g and h200: memory within \d+%, time within \d+% .*; on a100-80g .*",
    ):
        assert re.search(f"^{line}$", said, re.M), (line, said)


def test_a_plan_that_does_not_fit_names_the_keys(monkeypatch):
    monkeypatch.setattr(plan, "parameters", lambda found, shape: {"q_proj": (32, 4_915_200, 0)})
    said = plan.show(planned("xbrl_extract_r8_dora", "l4"))
    assert "of 24: does not fit: set gradient_checkpointing: true" in said
    assert "GPU-hours; PRICE=<of one> says what they cost" in said


def test_the_keys_to_change_keep_a_steps_tokens_on_several_gpus(monkeypatch):
    """They are written into the recipe, which several GPUs then share."""
    monkeypatch.setattr(plan, "parameters", lambda found, shape: {"q_proj": (32, total(found), 0)})

    def total(found):
        return recipes.trainable_parameters(found, SHAPE)

    name, gpus = "xbrl_extract_bf16_r8_dora", 3
    before = recipe(name)
    said = planned(name, "l4", gpus)["change"]
    found = re.fullmatch(r"set (?:gradient_checkpointing: true and )?sequence_len: (\d+) and .*steps: (\d+)", said)
    length, accumulation = map(int, found.groups())
    assert length * accumulation == before["sequence_len"] * before["gradient_accumulation_steps"]
    after = {"sequence_len": length, "gradient_accumulation_steps": accumulation, "gradient_checkpointing": True}
    assert planned(name, "l4", gpus, **after)["fits"]


def test_the_keys_to_change_leave_room_for_the_longest_row(tmp_path, monkeypatch):
    """A pack shorter than a row of the data would be refused by the next command."""
    monkeypatch.setattr(plan, "parameters", lambda found, shape: {"q_proj": (32, 4_915_200, 0)})
    for words, expected in ((1000, "sequence_len: 8192"), (9000, "take a recipe of fewer bits")):
        file = rows_file(tmp_path, ["Shares rose.", "long " * words])
        found = planned("xbrl_extract_bf16_r8_dora", "l4", datasets=[{"path": file}], test_datasets=[])
        assert expected in found["change"] and (max(found["rows"].tokens) > 8192) == (words == 9000)


def test_plans_differ_as_they_must(monkeypatch):
    monkeypatch.setattr(plan, "parameters", lambda found, shape: {"q_proj": (32, total(found), 0)})

    def total(found):
        return recipes.trainable_parameters(found, SHAPE)

    one, four = planned(), planned(gpus=4)
    assert one["seconds"] > four["seconds"] > one["seconds"] / 4 and one["samples"] == four["samples"]
    assert one["step_tokens"] == four["step_tokens"] and one["steps"] == pytest.approx(four["steps"], rel=0.1)
    assert planned(gradient_checkpointing=True)["step"] > 1.3 * one["step"]
    assert planned(gpu="a100-80g")["step"] > 2 * one["step"] > 2 * planned(gpu="b200")["step"]
    assert planned(sequence_len=16384)["step"] > 2.5 * one["step"]
    assert planned(max_steps=7)["steps"] == 7 and planned(test_datasets=[])["looking"] == 0
    assert planned(max_steps=-1)["steps"] == planned(max_steps=0)["steps"] == one["steps"]  # neither is a limit
    for count in (100, 2 * one["steps"]):
        given, share = planned(max_steps=count), count / one["steps"]
        assert given["steps"] == count and given["samples"] == round(one["samples"] * share)
        assert given["looking"] == pytest.approx(one["looking"] * share)
    half = planned(num_epochs=0.5)
    assert half["steps"] == math.ceil(one["steps"] / 8) and half["samples"] == round(one["samples"] / 8)
    assert re.search(r"^  samples  \d+,\d{3} .*\n  steps    \d+ of ", plan.show(half), re.M)
    assert planned(evals_per_epoch=None, eval_steps=0.0625)["looking"] == pytest.approx(one["looking"])
    assert planned(fastdora_fp8=True)["step"] < 0.8 * one["step"]
    other = planned(fastdora_layers="peft")
    assert "all of them with fastdora_layers: fast, so this recipe takes several times as long" in plan.show(other)
    assert planned("general_multi_r8_dora")["rows"].train == pytest.approx(3 * 82200, rel=0.02)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=200), st.integers(100, 2000))
def test_packs_hold_all_rows(tokens, length):
    cut = [min(row, length) for row in tokens]
    found = plan.packs(tokens, length)
    assert -(-sum(cut) // length) <= found <= len(tokens)
    assert found == 1 or sum(cut) > found * length / 2 - length  # no two of them fit in one


def rows_file(folder, lines) -> str:
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": "up"}] for text in lines]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns), encoding="utf-8")
    return str(path)


def test_rows_that_are_here_are_counted(tmp_path, tiny_base):
    file = rows_file(tmp_path, ["Shares rose."] * 4999 + ["Shares fell. " * 300])
    wanted = recipe(datasets=[{"path": file}], test_datasets=[], base_model=".cache/tiny")
    rows = plan.rows_of(tmp_path / "r.yaml", wanted)
    assert (rows.train, rows.validation) == (5000, 0) and 1000 <= len(rows.tokens) <= plan.SAMPLE
    assert "counted by the base model's tokenizer" in rows.source
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    chat = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nShares rose.<|eot_id|>"
    chat += "<|start_header_id|>assistant<|end_header_id|>\n\nup<|eot_id|>"
    assert rows.tokens[0] == len(tokenizer(chat, add_special_tokens=False)["input_ids"])
    unknown = plan.rows_of(tmp_path / "r.yaml", wanted | {"base_model": "nobody/nothing"})
    assert "4 characters" in unknown.source and unknown.train == 5000


def test_a_row_that_is_too_long_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "parameters", lambda found, shape: {"q_proj": (32, 4_915_200, 0)})
    file = rows_file(tmp_path, ["long " * 9000])
    said = plan.show(planned(datasets=[{"path": file}]))
    assert re.search(r"one of [\d,]+ is longer than sequence_len 5,120: refused", said)


BAD = {
    "unknown GPU": (
        {"gpu": "h100-90g"},
        r"GPU=h100-90g: did you mean h100-80g\? tools/gpus.yaml has a100-40g, a100-80g, .*",
    ),
    "a GPU of two sizes": ({"gpu": "a100"}, r"GPU=a100: did you mean a100-40g or a100-80g\? tools/gpus.yaml has .*"),
    "no near GPU": ({"gpu": "tpu"}, r"GPU=tpu: tools/gpus.yaml has a100-40g, .*; add a line for another"),
    "a batch that GPUs cannot share": (
        {"gpus": 3, "sample_packing": False, "micro_batch_size": 4},
        r"GPUS=3: sentiment_r8_dora trains 4 rows a step, which 3 processes cannot share; use 1, 2, 4, or set .*",
    ),
    "too many GPUs": ({"gpus": 4096}, r"GPUS=4096: sentiment_r8_dora trains .* too few for 4096 processes; use fewer"),
    "fp8 on a GPU without": (
        {"gpu": "a5000", "fastdora_fp8": True},
        r".*: key 'fastdora_fp8': a5000 has no fp8 products; set it to false, or plan for another GPU",
    ),
    "no adapter": ({"adapter": None}, r".*: key 'adapter' is missing: plans are for recipes that train an adapter"),
    "an unknown base": ({"base_model": "a/b"}, r".*: key 'base_model': the sizes of a/b are not known here; .*"),
    "an unknown layer": (
        {"lora_target_modules": ["q_proj", "w1"]},
        r".*: key 'lora_target_modules': w1 is none of q_proj, k_proj, .*",
    ),
    "rows that are not here": (
        {"datasets": [{"path": "data/mine.jsonl"}]},
        r".*: key 'datasets': .*data/mine.jsonl is missing, and its rows are needed to plan; bring it there",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_plans(case):
    changes, expected = BAD[case]
    with pytest.raises(UserError) as error:
        planned(**changes)
    assert re.fullmatch(expected, str(error.value)), error.value


RECORD = '{"device": "NVIDIA H200", "rows": %s}'
RECORDS = {
    "none": ([], "bench/train_throughput[*].json: hold no runs to take a plan's rates from; restore them from git"),
    "no runs": ([RECORD % "{}"], "bench/train_throughput[*].json: hold no runs .*"),
    "cut short": (["{"], ".*/0.json: is not a recorded result .JSONDecodeError.*; restore it from git"),
    "a list": (["[]"], ".*/0.json: is not a recorded result .TypeError.*; restore it from git"),
    "no recipe": ([RECORD % '{"a": {"recipe": "nobodys", "set": {}}}'], ".*/0.json: .*nobodys.yaml.*; restore it .*"),
    "a figure of nothing": (
        [RECORD % json.dumps({"a": dict.fromkeys(plan.FIGURES, 0) | {"recipe": "sentiment_r8_dora", "set": {}}})],
        ".*/0.json: is not a recorded result .ValueError.'a: a figure is 0'.*; restore it from git",
    ),
    "no figures": (
        [RECORD % '{"a": {"recipe": "sentiment_r8_dora", "set": {}, "step_s": 1.0}}'],
        ".*/0.json: is not a recorded result .KeyError.*; restore it from git",
    ),
}


@pytest.mark.parametrize("case", RECORDS)
def test_records_that_are_missing_or_damaged(case, tmp_path, monkeypatch):
    texts, expected = RECORDS[case]
    files = [tmp_path / f"{number}.json" for number in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text, encoding="utf-8")
    monkeypatch.setattr(plan, "MEASURED", files)
    monkeypatch.setattr(checks, "gpus", lambda: [])
    for gpu in ("h200", None):
        with pytest.raises(UserError) as error:
            planned(gpu=gpu)
        assert re.fullmatch(expected, str(error.value)), error.value


EDITS = {
    "a word for a number": ("tflops: 989", "tflops: fast", "h200: key 'tflops' is \"fast\"; write a number above 0"),
    "no number": ("memory: 141", "memory: 0", "h200: key 'memory' is 0; write a number above 0"),
    "a mistyped key": ("bandwidth: 4800", "bandwith: 4800", "h200: key 'bandwidth' is null; write a number above 0"),
    "a number for yes or no": ("fp8: true", "fp8: 1", "h200: key 'fp8' is 1; write true or false"),
    "one name": ("[NVIDIA H200]", "NVIDIA H200", "h200: key 'names' is \"NVIDIA H200\"; write a list, as the driver"),
    "no entry": ("h200: {", "h300: 1\nh200: {", "h300: key 'memory' is null; write a number above 0"),
    "an entry twice": ("h200: {", "l4: {}\nh200: {", "line [0-9]+: key 'l4' stands twice; keep one"),
    "not YAML": ("h200: {", "h200: {{", "line [0-9]+: not valid YAML "),
}


@pytest.mark.parametrize("case", EDITS)
def test_a_table_of_gpus_that_was_edited_wrongly(case, tmp_path, monkeypatch):
    before, after, expected = EDITS[case]
    (line,) = [line for line in plan.GPUS.read_text(encoding="utf-8").splitlines() if line.startswith("h200:")]
    assert before in line
    text = plan.GPUS.read_text(encoding="utf-8").replace(line, line.replace(before, after))
    monkeypatch.setattr(plan, "GPUS", tmp_path / "gpus.yaml")
    plan.GPUS.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        plan.find_gpu("a100-80g")
    assert re.match(f"{plan.GPUS}: {expected}", str(error.value)) and "\n" not in str(error.value)


def test_rows_that_cannot_be_read(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"context": "a"}\n', encoding="utf-8")
    wanted = recipe(datasets=[{"path": str(tmp_path / "rows.jsonl")}])
    with pytest.raises(UserError, match="key 'datasets': row 1 is not one of messages; `make train` says which"):
        plan.rows_of(tmp_path / "r.yaml", wanted)
    (tmp_path / "rows.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="key 'datasets': its files hold no rows"):
        plan.rows_of(tmp_path / "r.yaml", wanted)


@pytest.mark.parametrize("text", ["abc", "", "-1", "nan", "inf", "2,50"])
def test_a_bad_price(text):
    with pytest.raises(UserError) as error:
        plan.price(text)
    assert str(error.value) == f"PRICE={text}: give a number, as in PRICE=2.50, the price of one GPU for an hour"
    assert plan.price("0") == 0 and plan.price(None) is None


def test_a_mistake_is_one_line(command):
    done = command("tools.plan", "sentment_r8_dora", "--gpus", "4")
    assert done.returncode == 1 and not done.stdout and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: RECIPE=sentment_r8_dora: no such recipe; did you mean sentiment_r8_dora,")


@pytest.mark.parametrize("text", ["none", "0", "-2", "1.5", "9999"])
def test_a_bad_number_of_gpus(text, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plan", "ner_r8_dora", "--gpus", text])
    with pytest.raises(UserError, match=f"GPUS={text}: give a number from 1 to 4096"):
        plan.main()


def test_the_gpu_that_is_here_is_the_default(monkeypatch):
    monkeypatch.setattr(checks, "gpus", lambda: [("NVIDIA GeForce RTX 4090", 24.0, 23.0)])
    assert plan.find_gpu(None)[0] == "rtx4090" and plan.find_gpu("H200")[0] == "h200"
    monkeypatch.setattr(checks, "gpus", lambda: [])
    assert plan.measured_device() in plan.find_gpu(None)[1]["names"]
    for entry in plan.known_gpus().values():
        assert set(entry) == {"memory", "tflops", "bandwidth", "fp8", "names"} and entry["names"]
        assert all(math.isfinite(entry[key]) and entry[key] > 0 for key in ("memory", "tflops", "bandwidth"))
