"""`make plan`: exact parameters, memory and time near what was measured, and one line for each mistake."""

import json
import math
import re
import sys

import click
import pytest
from failures import failed, refuses
from hypothesis import given
from hypothesis import strategies as st

from fastdora.plugin.keys import read_recipe
from finlora import cli
from finlora.core import machine
from finlora.data import tokens as data_tokens
from finlora.plan import estimate as plan
from finlora.plan import gpus, step_time
from finlora.recipes import bases, memory
from finlora.recipes import names as recipe_names
from finlora.train.distributed import Launch

pytestmark = pytest.mark.xdist_group("axolotl")  # whose tests import PEFT too
SHAPE = bases.shape("meta-llama/Llama-3.1-8B-Instruct")
RUNS = step_time.measured_runs()
ALL = list(bases.linear_layers(SHAPE))


def recipe(name: str = "sentiment_r8_dora", **changes):
    return read_recipe(recipe_names.RECIPES / f"{name}.yaml") | changes


def planned(name: str = "sentiment_r8_dora", gpu="h100-80g", gpus=1, price=None, zero=None, fsdp=None, **changes):
    launch = Launch(gpus, zero=zero, fsdp=fsdp)
    return plan.make_plan(recipe_names.RECIPES / f"{name}.yaml", recipe(name, **changes), gpu, launch, price)


def test_the_recorded_runs_are_of_every_kind():
    """16, 8 and 4 bits, DoRA and LoRA, short and long packs, with gradient checkpointing and without; at least six."""
    kinds = [run.recipe for run in RUNS if run.device == "NVIDIA H200"]
    assert len(kinds) >= 6
    for kind in ("load_in_8bit", "load_in_4bit", "peft_use_dora", "gradient_checkpointing"):
        assert {bool(keys.get(kind)) for keys in kinds} == {True, False}, kind
    assert any(not keys["load_in_8bit"] and not keys["load_in_4bit"] for keys in kinds)
    lengths = [keys["sequence_len"] for keys in kinds]
    assert min(lengths) <= 5120 and max(lengths) >= 16384


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.name}, {run.device}")
def test_a_plan_is_near_what_was_measured(run):
    """Within 20% of the time and 10% of the peak memory of each recorded run."""
    name, device, keys, row = run
    _, gpu = gpus.find_gpu(device)
    step = run.work(SHAPE, gpu).seconds(step_time.committed_fit().factors)
    assert step == pytest.approx(row["step_s"], rel=0.2), f"{name}: a step takes {row['step_s']} s, planned {step:.3f}"
    peak = memory.memory_estimate(keys, SHAPE, run.share)
    assert peak == pytest.approx(row["peak_gib"], rel=0.1), f"{name}: {row['peak_gib']} GiB at the peak, planned {peak}"


def test_the_committed_factors_are_those_of_the_records_and_make_sense():
    """After new records: python -m finlora.plan.step_time."""
    committed, fitted = step_time.committed_fit(), step_time.fit_records()
    assert committed.factors == pytest.approx(fitted.factors, rel=0.01, abs=1e-3)
    assert committed[1:3] == fitted[1:3] and committed[3:] == pytest.approx(fitted[3:], abs=1e-3)
    assert 1 < fitted.factors.matmul < 3 and 1 < fitted.factors.attention < 8
    assert 0.3 < fitted.factors.traffic < 6 and 1 < fitted.factors.launches < 6
    assert 0 <= fitted.factors.exchange < 2
    assert fitted.time_error < 0.3  # each run, from the others


@pytest.mark.parametrize(
    "change", [("factors:", "factor:"), ("matmul: ", "matmul: -"), ("runs: ", "runs: many"), ("[", "{")]
)
def test_a_damaged_fit_is_refused(change, tmp_path, monkeypatch):
    text = step_time.TABLE.read_text(encoding="utf-8")
    assert change[0] in text
    monkeypatch.setattr(step_time, "TABLE", tmp_path / "step_time.yaml")
    step_time.TABLE.write_text(text.replace(*change), encoding="utf-8")
    with refuses("git", file=step_time.TABLE):
        planned()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"peft_use_dora": False, "lora_modules_to_save": ["lm_head"]},
        {
            "lora_target_linear": True,
            "lora_target_modules": None,
            "lora_rank_pattern": {r"layers\.[0-3]\..*proj": 2, "down_proj": 16, "o": 99},
        },
    ],
    ids=["DoRA", "LoRA and the head", "every linear layer, ranks by module"],
)
def test_parameters_are_those_that_peft_trains(changes):
    """On the 8B shape, without its memory: torch's meta device has shapes alone."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    keys = recipe(**changes)
    saved = keys.get("lora_modules_to_save")
    adapter = LoraConfig(
        r=keys["lora_r"],
        target_modules=keys["lora_target_modules"] or "all-linear",
        use_dora=keys["peft_use_dora"],
        rank_pattern=keys.get("lora_rank_pattern", {}),
        modules_to_save=saved,
        task_type="CAUSAL_LM",
    )
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{"model_type": "llama"} | SHAPE))
        model = get_peft_model(base, adapter)
    counted = {name: [0, 0, 0, 0] for name in [*(keys["lora_target_modules"] or ALL), *(saved or [])]}
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name:
            counted[name.split(".")[-4]] = [1, 0, 0, parameter.numel()]
        elif parameter.requires_grad:
            target, kind = name.split(".")[-4:-2]  # q_proj.lora_A.default.weight
            counted[target][0] += kind == "lora_A"
            counted[target][2 if kind == "lora_magnitude_vector" else 1] += parameter.numel()
    assert bases.adapter_parameters(keys, SHAPE) == {name: tuple(counts) for name, counts in counted.items()}


@pytest.mark.parametrize("gpu, key, other", [("h100", "h100-80g", "h100-pcie"), ("A100", "a100-80g", "a100-40g")])
def test_a_kind_of_gpu_is_taken_as_the_usual_one_and_it_says_so(gpu, key, other, monkeypatch, capsys):
    monkeypatch.setattr(machine, "gpus", lambda: [])
    plan.run("sentiment_r8_dora", gpu, Launch(), None)
    first, _, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith(f"GPU={gpu} is taken as {key}") and other in first and f" {key} " in second


def test_what_it_says(monkeypatch, capsys):
    monkeypatch.setattr(machine, "gpus", lambda: [])
    argv = ["plan", "sentiment_llama_3_1_8b_8bits_r8_dora", "--gpu", "a100-80g", "--gpus", "4", "--price", "2.50"]
    monkeypatch.setattr(sys, "argv", argv)
    cli.call(sys.argv)
    text = capsys.readouterr().out
    for line in (
        r"sentiment_r8_dora .*\b4\b.* a100-80g .*NVIDIA A100-SXM4-80GB, 80 GiB.*",
        r".*\b4 processes .*\b1 .*\b640 .*\b1 .*\b2,560 .*",
        r"  q_proj +32 +2,097,152 +131,072 +2,228,224",
        r"  all +4,718,592 +196,608 +4,915,200",
        r"  weights 8\.5, .* 0\.07, .* \d\.\d, .* 0\.\d",
        r"  peak \d+\.\d of 80\b.*",
        r"  rows +71,442 .* 1,458 .* 70 .*",
        r" +.*data/tasks.yaml.*`make data TASK=sentiment`.*",
        r" +39 .*share prefixes.*",
        r"  samples +285,768 .*\b20\b.*",
        r"  steps +\d,\d\d\d of 2,560 .*0\.\d+ s .*",
        r"  time +\d+ min, .*\d+ (s|min) .*",
        r"  cost +\d+\.\d\d .*\d+\.\d\d GPU-hours .*2\.5",
        r".*\d+ runs .*h100-80g and h200\b.* \d+%.* \d+%.*a100-80g .*",
    ):
        assert re.search(f"^{line}$", text, re.M), (line, text)


def test_a_plan_that_does_not_fit_names_the_keys(monkeypatch):
    text = plan.show(planned("xbrl_extract_r8_dora", "l4"))
    assert re.search(r"^  peak \d+\.\d of 24\b.*set gradient_checkpointing: true", text, re.M)
    assert re.search(r"GPU-hours.*PRICE=", text)


def test_the_keys_to_change_keep_a_steps_tokens_on_several_gpus(monkeypatch):
    """They are written into the recipe, which several GPUs then share."""

    name, count = "xbrl_extract_bf16_r8_dora", 3
    whole = {"sequence_len": 16384, "gradient_accumulation_steps": 9, "fastdora_shared_prefixes": False}
    before = recipe(name, **whole)
    text = planned(name, "l4", count, **whole).change
    match = re.fullmatch(r"set (?:gradient_checkpointing: true and )?sequence_len: (\d+) and .*steps: (\d+)", text)
    length, accumulation = map(int, match.groups())
    assert length * accumulation == before["sequence_len"] * before["gradient_accumulation_steps"]
    after = {"sequence_len": length, "gradient_accumulation_steps": accumulation, "gradient_checkpointing": True}
    assert planned(name, "l4", count, **whole | after).fits


def test_a_plan_for_several_gpus_has_the_time_of_whole_packs_beside_that_of_shortened_ones():
    kept = planned(gpus=2)
    steps, whole = kept.whole
    assert steps == 2 and whole == planned(gpus=2, gradient_accumulation_steps=2).schedule
    assert whole.seconds < kept.schedule.seconds and whole.step_tokens == 2 * kept.schedule.step_tokens
    assert re.search(r"^  faster +\d+ .*gradient_accumulation_steps: 2 in the recipe", plan.show(kept), re.M)
    assert planned().whole is None and planned(gpus=2, gradient_accumulation_steps=4).whole is None
    large = planned("xbrl_extract_bf16_r8_dora", "l4", 2, gradient_accumulation_steps=1, sequence_len=16384)
    assert large.whole is None  # it would not fit


def test_weights_that_gpus_share_take_a_part_of_the_memory_and_are_exchanged():
    name, large = "sentiment_bf16_r8_dora", {"base_model": "meta-llama/Llama-3.3-70B-Instruct"}
    one, zero, fsdp = (planned(name, gpus=2, **way) for way in ({}, {"zero": 3}, {"fsdp": 2}))
    weights = one.memory["weights"]
    for shared in (zero, fsdp):
        assert weights / 2 < shared.memory["weights"] < 0.75 * weights and "loading" not in shared.memory
        assert shared.schedule.step > one.schedule.step and "shared weights" in plan.show(shared)
    assert "shared weights" not in plan.show(one) and planned(name, gpus=2, zero=2).memory == one.memory
    assert not planned(name, gpus=4, **large).fits and "FSDP=2" in planned(name, gpus=4, **large).change
    assert planned(name, gpus=4, fsdp=2, **large).fits


def test_quantized_weights_are_whole_on_each_gpu_while_they_load():
    large = {"base_model": "meta-llama/Llama-3.3-70B-Instruct"}
    eight, four = (planned(name, gpus=8, fsdp=2, **large) for name in ("sentiment_r8_dora", "sentiment_4bit_r4_lora"))
    assert eight.peak == pytest.approx(planned(gpus=8, **large).memory["weights"])
    assert re.search(r"loading \d+\.\d\n +peak", plan.show(eight)) and four.peak < 0.6 * eight.peak


def test_the_cpus_launches_limit_a_step_of_little_work_without_graphs(monkeypatch):
    """So a pack that two GPUs share is no faster than one GPU's, as was measured; with graphs it is."""
    one, shared, whole = planned(), planned(gpus=2), planned(gpus=2, gradient_accumulation_steps=2)
    assert shared.schedule.step > one.schedule.step and whole.schedule.seconds < 0.6 * shared.schedule.seconds
    monkeypatch.setenv("FASTDORA_DDP_GRAPHS", "1")
    assert planned(gpus=2).schedule.step < 0.65 * one.schedule.step


def test_the_keys_to_change_leave_room_for_the_longest_row(tmp_path, monkeypatch):
    """A pack shorter than a row of the data would be refused by the next command."""
    for words, expected in ((1000, "sequence_len: 8192"), (9000, "fewer bits")):
        file = rows_file(tmp_path, ["Shares rose.", "long " * words])
        keys = {"sequence_len": 16384, "datasets": [{"path": file}], "test_datasets": []}
        estimate = planned("xbrl_extract_bf16_r8_dora", "l4", **keys)
        assert expected in estimate.change and (estimate.rows.longest > 8192) == (words == 9000)


def test_plans_differ_as_they_must(monkeypatch):

    def scheduled(name="sentiment_r8_dora", **changes) -> plan.Schedule:
        return planned(name, **changes).schedule

    monkeypatch.setenv("FASTDORA_DDP_GRAPHS", "1")
    one, four = scheduled(), scheduled(gpus=4)
    assert one.seconds > four.seconds > one.seconds / 4 and one.samples == four.samples
    assert one.step_tokens == four.step_tokens and one.steps == pytest.approx(four.steps, rel=0.1)
    assert scheduled(gradient_checkpointing=True).step > 1.3 * one.step
    assert scheduled(gpu="a100-80g").step > 2 * one.step > 2 * scheduled(gpu="b200").step
    assert scheduled(sequence_len=16384).step > 2.5 * one.step
    assert scheduled(max_steps=7).steps == 7 and scheduled(test_datasets=[]).validation == 0
    assert scheduled(max_steps=-1).steps == scheduled(max_steps=0).steps == one.steps  # neither is a limit
    for count in (100, 2 * one.steps):
        limited, share = scheduled(max_steps=count), count / one.steps
        assert limited.steps == count and limited.samples == round(one.samples * share)
        assert limited.validation == pytest.approx(one.validation * share)
    half = scheduled(num_epochs=0.5)
    assert half.steps == math.ceil(one.steps / 8) and half.samples == round(one.samples / 8)
    text = plan.show(planned(num_epochs=0.5))
    assert re.search(r"^  samples  \d+,\d{3} .*\n  steps    \d+ of ", text, re.M)
    assert scheduled(evals_per_epoch=None, eval_steps=0.0625).validation == pytest.approx(one.validation)
    assert scheduled(fastdora_fp8=True).step < 0.8 * one.step
    assert "fastdora_layers: fast" in plan.show(planned(fastdora_layers="peft"))
    assert "fastdora_layers" not in plan.show(planned())
    assert planned("general_multi_r8_dora").rows.train == pytest.approx(3 * 82200, rel=0.02)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=200), st.integers(100, 2000))
def test_packs_hold_all_rows(tokens, length):
    cut = [min(row, length) for row in tokens]
    count = plan.packs(tokens, length)
    assert -(-sum(cut) // length) <= count <= len(tokens)
    assert count == 1 or sum(cut) > count * length / 2 - length  # no two of them fit in one


def rows_file(folder, lines) -> str:
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": "up"}] for text in lines]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns), encoding="utf-8")
    return str(path)


def test_rows_that_are_here_are_counted(tmp_path, tiny_base, monkeypatch):
    file = rows_file(tmp_path, ["Shares rose."] * 4999 + ["Shares fell. " * 300])
    keys = recipe(datasets=[{"path": file}], test_datasets=[], base_model=".cache/tiny")
    rows = plan.rows_of(tmp_path / "r.yaml", keys)
    assert (rows.train, rows.validation) == (5000, 0) and 1000 <= len(rows.tokens) <= plan.SAMPLE
    assert "tokenizer" in rows.source
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    chat = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nShares rose.<|eot_id|>"
    chat += "<|start_header_id|>assistant<|end_header_id|>\n\nup<|eot_id|>"
    assert rows.tokens[0] == len(tokenizer(chat, add_special_tokens=False)["input_ids"])
    llama = plan.rows_of(tmp_path / "r.yaml", keys | {"base_model": data_tokens.LLAMA})
    other = plan.rows_of(tmp_path / "r.yaml", keys | {"base_model": "nobody/nothing", "chat_template": "llama3"})
    assert llama.tokens[0] == 15 and "base model's tokenizer" in llama.source
    assert "Llama-3's tokenizer" in other.source and other.tokens[0] == 14  # its template has no token to begin with
    monkeypatch.setattr(data_tokens, "tokenizer_of", lambda base: None)
    unknown = plan.rows_of(tmp_path / "r.yaml", keys | {"base_model": "nobody/nothing"})
    assert "4 characters" in unknown.source and "4 characters" not in rows.source and unknown.train == 5000


def test_a_row_that_is_too_long_is_said(tmp_path, monkeypatch):
    file = rows_file(tmp_path, ["long " * 9000])
    text = plan.show(planned(datasets=[{"path": file}]))
    assert re.search(r"longer .*sequence_len 2,560\b", text)


OWN_PATH = recipe_names.RECIPES / "sentiment_r8_dora.yaml"
# What is asked, and of the error: what it begins with, the key, and words for the fault and the remedy.
BAD = {
    "unknown GPU": (
        {"gpu": "h100-90g"},
        "GPU=h100-90g",
        None,
        ["h100-80g?", "finlora/plan/gpus.yaml", "a100-40g, a100-80g, "],
    ),
    "a GPU of several kinds": ({"gpu": "rtx"}, "GPU=rtx", None, ["rtx6000-ada or rtx3090 or", "gpus.yaml"]),
    "no near GPU": ({"gpu": "tpu"}, "GPU=tpu", None, ["finlora/plan/gpus.yaml", "a100-40g, ", "add a line"]),
    "a batch that GPUs cannot share": (
        {"gpus": 3, "sample_packing": False, "micro_batch_size": 4},
        "GPUS=3",
        None,
        ["sentiment_r8_dora", "4 rows", "3 processes", "1, 2, 4,", "sample_packing: true"],
    ),
    "too many GPUs": ({"gpus": 4096}, "GPUS=4096", None, ["sentiment_r8_dora", "4096 processes", "fewer"]),
    "fp8 on a GPU without": (
        {"gpu": "a5000", "fastdora_fp8": True},
        OWN_PATH,
        "fastdora_fp8",
        ["a5000", "false", "another GPU"],
    ),
    "no adapter": ({"adapter": None}, OWN_PATH, "adapter", ["missing", "recipes that train"]),
    "an unknown base": (
        {"base_model": "a/b"},
        OWN_PATH,
        "base_model",
        ["a/b", "recipes/bases.yaml", "make demo"],
    ),
    "rows that are not here": (
        {"datasets": [{"path": "data/mine.jsonl"}]},
        OWN_PATH,
        "datasets",
        ["data/mine.jsonl", "missing", "bring"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_plans(case):
    changes, begins, key, words = BAD[case]
    with refuses(*words, file=begins, key=key):
        planned(**changes)


RECORD = '{"device": "NVIDIA H200", "rows": %s}'
# The records, the one that is named (None: their pattern), and words.
RECORDS = {
    "none": ([], None, ["no runs", "git"]),
    "no runs": ([RECORD % "{}"], None, ["no runs", "git"]),
    "cut short": (["{"], "0.json", ["JSONDecodeError", "git"]),
    "a list": (["[]"], "0.json", ["TypeError", "git"]),
    "no recipe": ([RECORD % '{"a": {"recipe": "nobodys", "set": {}}}'], "0.json", ["nobodys.yaml", "git"]),
    "a figure of nothing": (
        [RECORD % json.dumps({"a": dict.fromkeys(step_time.FIGURES, 0) | {"recipe": "sentiment_r8_dora", "set": {}}})],
        "0.json",
        ["ValueError", "a: ", "0", "git"],
    ),
    "no figures": (
        [RECORD % '{"a": {"recipe": "sentiment_r8_dora", "set": {}, "step_s": 1.0}}'],
        "0.json",
        ["KeyError", "git"],
    ),
}


@pytest.mark.parametrize("case", RECORDS)
def test_records_that_are_missing_or_damaged(case, tmp_path, monkeypatch):
    texts, named, words = RECORDS[case]
    files = [tmp_path / f"{number}.json" for number in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text, encoding="utf-8")
    monkeypatch.setattr(step_time, "MEASURED", files)
    monkeypatch.setattr(machine, "gpus", lambda: [])
    for reads in (step_time.fit_records, planned_without_a_gpu):
        with refuses(*words, file=tmp_path / named if named else "finlora/plan/train_throughput*.json"):
            reads()


def planned_without_a_gpu():
    """The default GPU is the recorded one where none is here."""
    return planned(gpu=None)


# An edit of the line of h200, what is named (the entry, or the line of the file), the key, and words.
EDITS = {
    "a word for a number": ("tflops: 989", "tflops: fast", "h200", "tflops", ["fast", "number"]),
    "no number": ("memory: 141", "memory: 0", "h200", "memory", ["0", "number above 0"]),
    "a mistyped key": ("bandwidth: 4800", "bandwith: 4800", "h200", "bandwith", ["unknown", "bandwidth?"]),
    "a number for yes or no": ("fp8: true", "fp8: 1", "h200", "fp8", ["1", "true or false"]),
    "one name": ("[NVIDIA H200]", "NVIDIA H200", "h200", "names", ["'NVIDIA H200'", "list"]),
    "no entry": ("h200: {", "h300: 1\nh200: {", "h300", None, ["not a mapping", "memory"]),
    "an entry twice": ("h200: {", "l4: {}\nh200: {", 12, "l4", ["twice|duplicate", "keep one|remove"]),
    "not YAML": ("h200: {", "h200: {{", 10, None, ["YAML"]),
}


@pytest.mark.parametrize("case", EDITS)
def test_a_table_of_gpus_that_was_edited_wrongly(case, tmp_path, monkeypatch):
    before, after, named, key, words = EDITS[case]
    lines = gpus.GPUS.read_text(encoding="utf-8").splitlines()
    (place,) = [number for number, line in enumerate(lines) if line.startswith("h200:")]
    assert before in lines[place]
    lines[place] = lines[place].replace(before, after)
    monkeypatch.setattr(gpus, "GPUS", tmp_path / "gpus.yaml")
    gpus.GPUS.write_text("\n".join(lines), encoding="utf-8")
    place = {"line": named, "file": gpus.GPUS} if isinstance(named, int) else {"file": f"{gpus.GPUS}: {named}"}
    with refuses(*words, key=key, **place):
        gpus.find_gpu("a100-80g")


def test_rows_that_cannot_be_read(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"context": "a"}\n', encoding="utf-8")
    keys = recipe(datasets=[{"path": str(tmp_path / "rows.jsonl")}])
    with refuses("row 1 ", "messages", "make train", file=tmp_path / "r.yaml", key="datasets"):
        plan.rows_of(tmp_path / "r.yaml", keys)
    (tmp_path / "rows.jsonl").write_text("", encoding="utf-8")
    with refuses("no rows", file=tmp_path / "r.yaml", key="datasets"):
        plan.rows_of(tmp_path / "r.yaml", keys)


@pytest.mark.parametrize(
    ("option", "text", "words"),
    [("price", text, "0 or more") for text in ("abc", "", "-1", "nan", "inf", "2,50")]
    + [("gpus", text, "from 1 to 4096") for text in ("none", "0", "-2", "1.5", "9999")],
)
def test_a_bad_number(option, text, words):
    with pytest.raises(click.BadParameter, match=f"^'{text}' is not a number .*{words}") as refused:
        cli.call(["plan", "ner_r8_dora", f"--{option}", text])
    assert refused.value.param.name == option


def test_a_price_of_0_is_one(capsys):
    cli.call(["plan", "ner_r8_dora", "--gpu", "h200", "--price", "0"])
    assert re.search(r"^  cost +0\.00 ", capsys.readouterr().out, re.M)


def test_a_mistake_is_one_line(command):
    done = command("finlora", "plan", "sentment_r8_dora", "--gpus", "4")
    assert done.returncode == 1 and not done.stdout and len(done.stderr.splitlines()) == 1
    failed(done, "sentiment_r8_dora", file="RECIPE=sentment_r8_dora")


def test_the_gpu_that_is_here_is_the_default(monkeypatch):
    monkeypatch.setattr(machine, "gpus", lambda: [("NVIDIA GeForce RTX 4090", 24.0, 23.0)])
    assert planned(gpu=None).key == "rtx4090" and planned(gpu="H200").key == "h200"
    monkeypatch.setattr(machine, "gpus", lambda: [])
    assert RUNS[0].device in planned(gpu=None).gpu.names
