"""The benchmarks' own parts: the recipes that they run, and how they start, end and report processes."""

import gzip
import json
import os
import re
from types import SimpleNamespace

import pytest
import tiktoken.load
import torch
import yaml
from failures import refuses
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer

from bench import distributed, eval_throughput, peers, random_base, rows, train_throughput
from fastdora.plugin.keys import check_keys, kept_schema
from finlora.core.paths import ROOT
from finlora.data import tokens
from finlora.data.test_sets import read_set
from finlora.plan import step_time
from finlora.plan.gpus import find_gpu
from finlora.recipes import bases
from finlora.train.tiny import CACHE

pytestmark = pytest.mark.xdist_group("axolotl")

RUNS = yaml.safe_load(train_throughput.RUNS.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", RUNS)
def test_a_measured_recipe_has_keys_that_axolotl_knows(name, tmp_path):
    changes = dict(RUNS[name].get("set", {}))
    changes |= dict.fromkeys(changes.pop("drop", []))
    shipped = yaml.safe_load((ROOT / "recipes" / f"{RUNS[name]['recipe']}.yaml").read_text(encoding="utf-8"))
    recipe = train_throughput.shipped_recipe(RUNS[name]["recipe"], "base", tmp_path / "rows", tmp_path, **changes)
    assert {key: recipe.get(key) for key in changes} == changes
    check_keys(recipe, name, kept_schema(shipped["plugins"], CACHE))
    assert recipe["output_dir"].startswith(str(tmp_path)) and "test_datasets" not in recipe


PROGRAM = "import os, sys, time; sys.stdin.readline(); print('rank', os.environ.get('RANK'), flush=True); {}"


@pytest.mark.parametrize(
    "end, timeout, result",
    [
        ("open(os.environ['CLOCK'], 'w').close()", 60, None),
        ("sys.exit(3) if os.environ['RANK'] == '1' else time.sleep(60)", 60, "rank 1"),
        ("print('pkg.OwnError: no memory', flush=True); print('1/8'); sys.exit(3)", 60, "pkg.OwnError: no memory"),
        ("time.sleep(60)", 2, "not done after 2 s"),
    ],
)
def test_processes_end_together(end, timeout, result, tmp_path, monkeypatch):
    """All of them when one fails, and when the time is up; the last line of the one that failed says why."""
    monkeypatch.setattr(train_throughput, "LATER", PROGRAM.format(end))
    running = train_throughput.start({"base_model": "x"}, tmp_path, 2)
    try:
        assert train_throughput.finish(running, timeout) == result
        assert all(child.poll() is not None for child in running.children)
    finally:
        train_throughput.stop(running)
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text()) == {"base_model": "x"}
    assert result or sorted(path.name for path in tmp_path.glob("clock*")) == ["clock0", "clock1"]


def test_two_runs_are_compared_by_their_largest_differences(tmp_path):
    runs = []
    for number in range(2):
        out = tmp_path / str(number) / "out"
        out.mkdir(parents=True)
        save_file({"a": torch.tensor([1.0, 2.0 + number])}, out / "adapter_model.safetensors")
        log = [{"loss": 3.0}, {"loss": 2.0 - number / 4}]
        (out / "metrics.json").write_text(json.dumps({"log": log}))
        for rank in range(2):
            norms = {"compared": 5, "moved": 1.0, "worst": rank / 8}
            (out / f"norms-{rank}.json").write_text(json.dumps(norms))
        runs.append(out.parent)
    row = distributed.compared(runs[1], distributed.trained(runs[0]))
    assert row == {
        "steps": 2,
        "loss": 1.75,
        "same_tensors": True,
        "adapter_difference": 1.0,
        "loss_difference": 0.25,
        "norms_compared": 10,
        "norm_difference": 0.125,
    }


def test_rows_are_asked_for_by_patterns_and_run_in_one_order():
    names = distributed.asked_rows(["bf16_dora ddp*", "*-bit dora, ddp with graphs"])
    assert names[:3] == [f"{bits}-bit dora, ddp with graphs" for bits in (16, 8, 4)]
    assert names[3:] == ["bf16_dora ddp, batch kept", "bf16_dora ddp, batch times GPUs"]
    every = distributed.asked_rows([])
    assert set(distributed.RATES) < set(every) and every[-1].endswith("offload") and "8-bit peft, ddp" not in every
    with refuses("--list"):
        distributed.asked_rows(["8-bit dora"])


def test_what_one_of_several_gpus_did_is_a_run_that_plans_are_fitted_to(tmp_path, monkeypatch):
    row = {"recipe": "sentiment_r8_dora", "processes": 2, "strategy": "ddp", "set": {"sequence_len": 1280}, "steps": 16}
    row |= {"samples_s": 800.0, "tokens_s": 50000.0, "slots_s": 30000.0, "step_s": 0.09, "peak_gib": 13.0}
    keys = {"fsdp_version": 2, "fsdp_config": {"offload_params": False}}
    rates = {"kept": row, "sharded": row | {"set": row["set"] | keys}, "one": row | {"processes": 1}}
    record = {
        "what": "",
        "git": {},
        "versions": {},
        "device": "2 x NVIDIA H200",
        "rates": rates | {"none": {"failed": ""}},
    }
    path = tmp_path / "train_throughput_two.json"
    path.write_text(json.dumps(distributed.for_plan(record)), encoding="utf-8")
    monkeypatch.setattr(step_time, "MEASURED", [*step_time.MEASURED, path])
    kept, sharded = [run for run in step_time.measured_runs() if run.name in rates]
    assert (kept.name, kept.device, kept.row["samples_s"], kept.row["step_s"]) == ("kept", "NVIDIA H200", 400.0, 0.09)
    assert kept.recipe["sequence_len"] == 1280 and (kept.share, sharded.share) == (1.0, 0.5)
    shape, (_, gpu) = bases.shape(kept.recipe["base_model"]), find_gpu(kept.device)
    assert kept.work(shape, gpu).exchange == kept.work(shape, gpu).launches == 0 < sharded.work(shape, gpu).exchange


def asked(*words):
    given = {"recipes": None, "runs": None, "set": None} | dict(zip(words[::2], words[1::2], strict=True))
    return train_throughput.runs_of(SimpleNamespace(**given))


def test_recipes_are_run_with_each_set_of_keys():
    runs = asked(
        "recipes",
        "sentiment_r8_dora,xbrl_extract_r8_dora@tags_made_5",
        "set",
        [[], ["fastdora_fp8=true", "lora_target_modules=[q_proj, v_proj]"], ["finlora", "micro_batch_size=4"]],
    )
    assert list(runs)[3:5] == [
        "xbrl_extract_r8_dora@tags_made_5",
        "xbrl_extract_r8_dora@tags_made_5 fastdora_fp8=true lora_target_modules=[q_proj, v_proj]",
    ]
    shipped, keys, finlora = list(runs.values())[:3]
    assert shipped == {"recipe": "sentiment_r8_dora", "rows": "sentiment", "set": {}}
    assert keys["set"] == {"fastdora_fp8": True, "lora_target_modules": ["q_proj", "v_proj"]}
    assert finlora["set"] == RUNS["finlora"]["set"] | {"micro_batch_size": 4}
    assert asked("runs", "finlora,8bit_lora") == {name: RUNS[name] for name in ("finlora", "8bit_lora")}
    with refuses("--set fp8", "key=value"):
        asked("recipes", "sentiment_r8_dora", "set", [["fp8"]])
    with refuses("--recipes sentiment_r8_dorra", "sentiment_r8_dora"):
        asked("recipes", "sentiment_r8_dorra")
    with refuses("--runs 8bit", "8bit_dora"):
        asked("runs", "8bit")


def test_a_run_that_fails_is_noted_and_the_next_one_goes_on(tmp_path, monkeypatch, capsys):
    program = "import json, os, sys; sys.stdin.readline(); fails = 'fp8: true' in open(sys.argv[2]).read(); "
    program += "fails and sys.exit('no such kernel'); "
    program += "json.dump({'samples_s': 2.0, 'tokens_s': 8.0}, open(os.environ['CLOCK'], 'w'))"
    monkeypatch.setattr(train_throughput, "LATER", program)
    rows.write_rows(rows.read_rows("finer_made", rows=2), tmp_path / "finer" / "train.jsonl")
    command = f"x --base x --rows {tmp_path} --out {tmp_path / 'out.json'} --recipes finer_r8_dora"
    monkeypatch.setattr("sys.argv", [*command.split(), "--set", "fastdora_fp8=true", "--set", "lora_r=4"])
    train_throughput.main()
    failed, done = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert failed["failed"] == "no such kernel" and failed["set"] == {"fastdora_fp8": True}
    assert done["tokens_row"] == 4 and done["samples_s"] == 2 and done["versions"] and done["git"] and done["device"]
    record = json.loads((tmp_path / "out.json").read_text())
    assert [row.get("samples_s") for row in record["rows"].values()] == [None, 2.0]
    monkeypatch.setattr("sys.argv", [*command.split(), "--rows", str(tmp_path / "none")])
    with refuses("is missing", "bench.rows", file=tmp_path / "none" / "finer" / "train.jsonl"):
        train_throughput.main()


@pytest.fixture(scope="module")
def llama():
    path = tokens.tokenizer_of(tokens.LLAMA)
    if path is None:
        pytest.skip("needs llama-models, which the dev extra has")
    return path


@pytest.mark.parametrize(
    "kind, shortest, longest, shared",
    [
        ("finer_made", 1600, 2600, 1 / 2),
        ("fnxl_made", 8400, 9500, 4 / 5),
        ("tags_made_12", 2700, 5000, 9 / 10),
        ("value_made_12", 2700, 5000, 9 / 10),
        ("formula_made_12", 2700, 5000, 9 / 10),
        ("formula_calculations_made_12", 2700, 5000, 9 / 10),
    ],
)
def test_made_rows_have_the_shape_of_the_real_ones(kind, shortest, longest, shared, llama):
    """Tokens of real rows: FiNER 1,855 (at most 2,842), FNXL 9,047, XBRL extraction 3,800 and 4,500."""
    made = rows.read_rows(kind, rows=48)
    assert len(made) == 48 == len({context for context, _ in made})
    assert made == rows.read_rows(kind, rows=48) != rows.read_rows(kind, rows=47)
    lengths = tokens.counter(llama)([tokens.chat([("user", row[0]), ("assistant", row[1])]) for row in made])
    assert shortest < sum(lengths) / 48 < longest and max(lengths) < longest * 1.2
    contexts = sorted(context for context, _ in made)
    common = [len(os.path.commonprefix(pair)) / len(pair[1]) for pair in zip(contexts, contexts[1:], strict=False)]
    assert sum(part > shared for part in common) == (44 if kind[-1] == "2" else 47)  # 4 filings of 12 questions
    for context, target in made:
        if kind.startswith(("finer", "fnxl")):
            assert target.count(",") == 3 and set(target.split(",")) <= set(rows.TAGS) and context.count("\n") == 5
        else:
            facts = dict(re.findall(r"<us-gaap:(\w+)>(\d+)</>", context))
            named = re.findall(r"\w+", target.replace("us-gaap:", ""))
            known = facts if kind.startswith(("tags", "formula_made")) else facts.values()
            assert named and set(named) - {"100"} <= set(known)


def test_rows_of_a_folder_of_finloras_files(tmp_path):
    files = {"test/ner_test.jsonl": "open", "older/finer_test_older.jsonl.gz": "gzip"}
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        text = "".join(json.dumps({"context": f"{number} of {name}", "target": number}) + "\n" for number in range(9))
        data = text.encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    for kind, name in zip(("ner", "finer"), files, strict=True):
        assert sorted(rows.read_rows(kind, tmp_path)) == [(f"{number} of {name}", str(number)) for number in range(9)]
    with refuses("is missing", "--data", file=tmp_path / "train/formula_train.jsonl"):
        rows.read_rows("formula", tmp_path)
    with refuses("--data"):
        rows.read_rows("ner")
    for kind in ("finer_maid", "ner_5", "tags_made_0"):
        with refuses(kind, "tags_made"):
            rows.read_rows(kind, tmp_path)


def test_made_test_sets_are_asked_as_finloras(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["rows", str(tmp_path), "--tests", "--rows", "3"])
    rows.main()
    assert len(capsys.readouterr().out.splitlines()) == len(rows.TESTS)
    for name in rows.TESTS.values():
        assert len(read_set(name, tmp_path).rows) == 3
    monkeypatch.setattr("sys.argv", ["rows", str(tmp_path), "--tests", "--kinds", "xbrl_extract_made"])
    with refuses("no test set", "tags_made"):
        rows.main()


def test_a_base_with_llama_3s_own_tokenizer(tmp_path, llama):
    random_base.make_base("llama-3", tmp_path, tiny=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    special = "<|begin_of_text|> <|end_of_text|> <|finetune_right_pad_id|> <|start_header_id|> <|eot_id|>".split()
    assert tokenizer.convert_tokens_to_ids(special) == [128000, 128001, 128004, 128006, 128009]
    assert len(tokenizer) == 128256 == AutoConfig.from_pretrained(tmp_path).vocab_size
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (128000, 128009, 128004)
    turns = [("user", " Sales rose 10% – “über” €5.\n"), ("assistant", "positive")]
    text = tokens.chat(turns)
    chat = [{"role": role, "content": content} for role, content in turns]
    ids = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids[0] == 128000 and tokenizer("a")["input_ids"][0] == 128000 and tokenizer.decode(ids) == text
    # llama_models/llama3/tokenizer.py, by tiktoken itself
    merges = tiktoken.load.load_tiktoken_bpe(str(llama))
    special = {token: len(merges) + place for place, token in enumerate(tokens.SPECIAL)}
    own = tiktoken.Encoding("llama-3", pat_str=tokens.WORDS, mergeable_ranks=merges, special_tokens=special)
    assert own.encode(text, allowed_special="all") == ids and own.n_vocab == 128256


def test_shared_and_padded_prompts_get_equal_answers(tmp_path, llama, monkeypatch):
    random_base.make_base("llama-3", tmp_path / "base", tiny=True)
    command = f"x --model {tmp_path / 'base'} --out {tmp_path / 'out.json'} --made-rows 3 --batch-tokens 30000"
    monkeypatch.setattr("sys.argv", [*command.split(), "--made", "finer_made,tags_made_3"])
    eval_throughput.main()
    record = json.loads((tmp_path / "out.json").read_text())
    for kind in ("finer_made", "tags_made_3"):
        assert (
            record[kind]["equal_answers"] == record[kind]["padded"]["samples"] == record[kind]["shared"]["samples"] == 3
        )
        assert (
            record[kind]["supported"] and record[kind]["tokens_a_prompt"] > 1500 and record[kind]["times_as_fast"] > 0
        )
    monkeypatch.setattr("sys.argv", command.split())
    with refuses("--tests", "--made"):
        eval_throughput.main()


@pytest.mark.parametrize("cce", [True, False])
def test_a_peers_keys_are_axolotls_own(cce, tmp_path):
    entries = [entry for name, entry in peers.all_runs(cce).items() if name.startswith("axolotl")]
    assert len(entries) == 10
    for entry in entries:
        changes = dict(entry["set"])
        changes |= dict.fromkeys(changes.pop("drop"))
        recipe = train_throughput.shipped_recipe(entry["recipe"], "base", tmp_path / "rows", tmp_path, **changes)
        check_keys(recipe, entry["recipe"], kept_schema(recipe["plugins"], CACHE))
        assert not any(key.startswith("fastdora") for key in recipe) and recipe["lora_r"] == 8
        # Fused AdamW moves no version counter, by which the kernels know that DoRA's norm is stale.
        assert recipe["optimizer"] == ("adamw_torch" if recipe["peft_use_dora"] else "adamw_torch_fused")


def test_fused_adamw_moves_no_version_counter():
    """Why axolotl's DoRA kernels are measured with another AdamW; where this fails, they need it no more."""
    moved = {}
    for fused in (True, False):
        weight = torch.nn.Parameter(torch.ones(4))
        weight.grad = torch.ones(4)
        before = weight._version
        torch.optim.AdamW([weight], fused=fused, foreach=not fused).step()
        moved[fused] = weight._version > before
    assert moved == {True: False, False: True}


@pytest.fixture
def peers_run(tmp_path, monkeypatch):
    """Runs bench.peers on the tiny model and 60 rows of FinLoRA's shape; returns its rows."""
    (tmp_path / "test").mkdir()
    for place, name in enumerate(rows.REAL["sentiment"]):
        lines = ({"context": f"News {place} {i}: sales rose.\nAnswer: ", "target": "positive"} for i in range(20))
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))

    def ran(*words):
        command = f"x --tiny --data {tmp_path} --out {tmp_path / 'out.json'}".split()
        monkeypatch.setattr("sys.argv", [*command, *words])
        peers.main()
        return json.loads((tmp_path / "out.json").read_text())["rows"]

    return ran


def test_peers_are_run_by_name_and_a_failure_noted(peers_run, monkeypatch):
    program = "import json, os, sys; sys.stdin.readline(); whole = 'prefixes: false' in open(sys.argv[2]).read(); "
    program += "whole and sys.exit('no such kernel'); "
    program += "json.dump({'samples_s': 2.0, 'tokens_s': 8.0}, open(os.environ['CLOCK'], 'w'))"
    monkeypatch.setattr(train_throughput, "LATER", program)
    found = peers_run("--runs", "ours 4-bit LoRA", "ours 8-bit D")
    assert list(found) == ["ours 4-bit LoRA", "ours 8-bit DoRA", "ours 8-bit DoRA whole"]
    assert found["ours 8-bit DoRA"]["tokens_row"] == 4 and found["ours 8-bit DoRA whole"]["failed"] == "no such kernel"
    with refuses("--runs 'theirs'", "--list"):
        peers_run("--runs", "theirs")


@pytest.mark.slow
def test_peers_train_on_a_cpu(peers_run, llama):
    """axolotl with its own kernels, and TRL; a row counts once, whether packed or padded."""
    names = ["axolotl bf16 DoRA", "TRL bf16 DoRA", "TRL 8-bit LoRA"]
    found = peers_run("--steps", "8", "--runs", *names)
    assert list(found) == names
    for row in found.values():
        assert row["steps"] == 2 and 20 < row["tokens_row"] < 40
    # Two rows a step.
    assert found["TRL bf16 DoRA"]["samples_s"] * found["TRL bf16 DoRA"]["step_s"] == pytest.approx(2, rel=0.01)
