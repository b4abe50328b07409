"""The runner on a tiny model: what it asks and keeps, that interrupted runs end as uninterrupted ones, bad input."""

import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from importlib.metadata import version

import pytest
import torch
import yaml
from asking import request
from failures import failed, refuses, says
from test_bertscore import make_encoder
from test_endpoint import server  # noqa: F401 (a fixture)
from test_eval_models import adapters  # noqa: F401 (a fixture)
from tqdm import tqdm

from finlora.core import paths
from finlora.core.errors import UserError
from finlora.data import test_sets
from finlora.evaluate import evaluation, questions, runner
from finlora.evaluate import harness as evaluate_harness
from finlora.evaluate.bertscore import bertscore
from finlora.models import load as models
from finlora.recipes import load as recipes
from finlora.train import runs

WORDS = ["negative", "neutral", "positive"]
ASK = "Instruction: What is the sentiment of this news? Please choose an answer from {negative/neutral/positive}.\n"


def write_rows(folder, name, count, seed=0):
    path = folder / test_sets.all_sets()[name].file
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    with path.open("w") as file:
        for number in range(count):
            text = f"{ASK}Input: Share {number} of the fund {'rose ' * draw.randint(1, 9)}\nAnswer: "
            file.write(json.dumps({"context": text, "target": draw.choice(WORDS)}) + "\n")
    return path


@pytest.fixture
def tests_folder(tmp_path):
    write_rows(tmp_path / "tests", "fpb", 24)
    write_rows(tmp_path / "tests", "fiqa", 9, seed=1)
    return tmp_path / "tests"


@pytest.fixture
def evaluate(tmp_path, monkeypatch, tiny_base, adapters, tests_folder):  # noqa: F811
    """`make eval` in this process, with a folder of results of its own; returns the subjects' folders."""
    monkeypatch.setattr(evaluation, "RESULTS", tmp_path / "results")
    for module in paths, recipes, runs:
        monkeypatch.setattr(module, "ROOT", tmp_path)

    def call(*argv, model=tiny_base, adapter="dora", tests=tests_folder, tasks="fpb", prompt="raw"):
        given = ["--model", str(model), "--tests", str(tests), "--tasks", tasks, "--prompt", prompt, *argv]
        given += ["--adapter", str(adapters.get(adapter, adapter))] if adapter else []
        return runner.evaluate(evaluation.resolve(request(given)))

    return call


def read(folder, name="fpb"):
    rows = [json.loads(line) for line in (folder / name / "answers.jsonl").read_text().splitlines()]
    return json.loads((folder / name / "set.json").read_text()), rows


def test_everything_asked_is_kept(evaluate, tests_folder, capsys):
    base, adapter = evaluate("--base", tasks="fpb,fiqa")
    for folder in base, adapter:
        for name, count in (("fpb", 24), ("fiqa", 9)):
            about, rows = read(folder, name)
            assert about["rows"] == about["evaluated"] == len(rows) == count
            assert about["labels_used"] == "corrected" and not about["published_file"]
            assert [row["row"] for row in rows] == list(range(1, count + 1))
            file = tests_folder / test_sets.all_sets()[name].file
            assert [row["context"] for row in rows] == [json.loads(line)["context"] for line in file.open()]
            for row in rows:
                assert row["prompt"] == "<|begin_of_text|>" + row["context"] and row["target"] == row["corrected"]
                assert 0 < row["answer_tokens"] <= 12 and row["seen"] is None
        assert not (folder / "answers.part.jsonl").exists()
    assert [row["answer"] for row in read(base)[1]] != [row["answer"] for row in read(adapter)[1]]
    facts = json.loads((adapter / "run.json").read_text())
    assert (facts["method"], facts["r"], facts["alpha"], facts["bits"]) == ("dora", 4, 16, 16)
    assert facts["way"] == "merged" and facts["prompt"] == "raw" and facts["versions"]["torch"] == version("torch")
    assert json.loads((base / "run.json").read_text())["adapter"] is None
    assert "fpb: finlora" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("group", "sets"), [("sentiment_task", ["fiqa", "fpb"]), ("certification", ["cfa_level1", "cpa_reg"])]
)
def test_lm_eval_alone_finds_the_groups_and_scores_them(group, sets, tmp_path):
    """Through lm-eval's own front door, with a model in place that copies the target, or half of it."""
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    members = [name for name in test_sets.all_sets() if group in task_file(name)["tag"]]
    for name in members:
        write_rows(tmp_path, name, 9)
    wanted = {
        json.loads(line)["context"]: json.loads(line)["target"]
        for path in tmp_path.rglob("*.jsonl")
        for line in path.open()
    }

    class Copier(LM):
        def generate_until(self, requests):
            return [wanted[request.args[0]][: self.length] for request in requests]

        loglikelihood = loglikelihood_rolling = None

    manager = TaskManager(
        include_path=str(test_sets.TASK_FILES), include_defaults=False, metadata={"folder": str(tmp_path)}
    )
    for Copier.length, score in ((99, 1.0), (2, 0.0)):
        found = simple_evaluate(Copier(), tasks=[group], task_manager=manager, bootstrap_iters=0)["results"]
        assert set(found) == set(members) >= set(sets)
        assert all(one["finlora,none"] == one["strict,none"] == score for one in found.values())


def task_file(name):
    return yaml.load((test_sets.TASK_FILES / f"{name}.yaml").read_text(), yaml.BaseLoader)


def test_the_task_files_are_those_of_the_table():
    assert {path.stem for path in test_sets.TASK_FILES.glob("[a-z]*.yaml")} == set(test_sets.all_sets())
    groups = {"general", "certification", "reporting", "analysis"}
    for name, spec in test_sets.all_sets().items():
        file = task_file(name)
        assert file["task"] == file["dataset_kwargs"]["test_set"] == name and file["include"] == "_finlora.yaml"
        assert file["tag"][0] in groups and file["tag"][1:] == [f"{spec.task}_task"]
        assert int(file["generation_kwargs"]["max_gen_toks"]) == spec.max_new_tokens


def test_the_answers_are_the_adapters_own(evaluate, tiny_base, adapters):  # noqa: F811
    """Against `generate` one prompt at a time on PEFT's unmerged model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, rows = read(evaluate()[0])
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32), adapters["dora"]
    )
    for row in rows[:6]:
        ids = tokenizer(row["prompt"], return_tensors="pt", add_special_tokens=False)
        out = model.generate(**ids, max_new_tokens=10, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert row["answer"] == tokenizer.decode(out, skip_special_tokens=True)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_bases_merged_and_kept(evaluate, bits):
    merged = read(evaluate("--bits", str(bits), "--limit", "8", "--name", "merged")[0])
    kept = read(evaluate("--bits", str(bits), "--limit", "8", "--name", "kept", "--keep-quantised")[0])
    same = sum(a["answer"] == b["answer"] for a, b in zip(merged[1], kept[1], strict=True))
    assert same >= 6 if bits == 8 else same == 8
    assert merged[0]["evaluated"] == 8


def test_explanations_are_measured_with_the_encoder_that_is_named(evaluate, tests_folder, tmp_path, monkeypatch):
    write_rows(tests_folder, "xbrl_term", 6)
    encoder = str(make_encoder(tmp_path / "encoder", layers=3))
    about, rows = read(evaluate("--encoder", encoder, "--layer", "2", tasks="xbrl_term")[0], "xbrl_term")
    assert about["metric"] == "bertscore_f1" and about["encoder"] == "encoder, layer 2"
    answers, targets = zip(*[(row["answer"].rpartition("Answer:")[2], row["target"]) for row in rows], strict=True)
    expected = bertscore(answers, targets, encoder, 2)
    assert [row["bertscore"] for row in rows] == expected and 0 < max(expected) < 1
    monkeypatch.setattr(models, "load_base", None)  # no weights are loaded from here on
    about, again = read(evaluate("--encoder", encoder, "--layer", "1", tasks="xbrl_term")[0], "xbrl_term")
    assert about["encoder"] == "encoder, layer 1", "another encoder measures the answers that are there"
    assert [row["answer"] for row in again] == [row["answer"] for row in rows]
    assert [row["bertscore"] for row in again] != expected
    # What is missing is found out before that.
    with refuses("encoder", "BERTScore", "ENCODER=", file=tmp_path / "none"):
        evaluate("--encoder", str(tmp_path / "none"), "--name", "other", tasks="xbrl_term")
    with refuses("layer 10", "BERTScore", "LAYER=", "1 to 3", file=encoder):
        evaluate("--encoder", encoder, "--name", "other", tasks="xbrl_term")


@pytest.fixture
def asked(monkeypatch):
    """The number of prompts in each batch that the model is given."""
    sizes, answer = [], evaluate_harness.generate

    def record(model, tokenizer, ids, *options):
        sizes.append(len(ids))
        return answer(model, tokenizer, ids, *options)

    monkeypatch.setattr(evaluate_harness, "generate", record)
    return sizes


def test_a_second_run_asks_nothing_and_a_larger_limit_what_is_left(evaluate, asked, capsys):
    first = read(evaluate("--limit", "5")[0])[1]
    assert read(evaluate("--limit", "5")[0])[0]["evaluated"] == sum(asked) == 5
    assert re.search(r"\bfpb\b.*FORCE=1", capsys.readouterr().out)
    folder = evaluate()[0]
    about, whole = read(folder)
    assert about["evaluated"] == sum(asked) == 24 and about["limit"] is None and whole[:5] == first
    assert read(evaluate("--limit", "5")[0]) == (about, whole), "a smaller limit takes no answer away"
    before = (folder / "fpb" / "set.json").stat().st_mtime_ns
    about, rows = read(evaluate("--labels", "published")[0])
    assert about["labels_used"] == "published" and len(rows) == 24 and sum(asked) == 24, "other labels ask nothing anew"
    assert (folder / "fpb" / "set.json").stat().st_mtime_ns > before


def test_answers_may_be_as_long_as_the_longest_target(evaluate, tests_folder, asked, capsys):
    """FinLoRA's limit cuts targets and says how many; changing it asks only what it cut again."""
    file = write_rows(tests_folder, "fpb", 6)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[2]["target"] = "profit rose " * 12
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    about, cut = read(evaluate("--lengths", "published")[0])
    assert (about["lengths"], about["max_new_tokens"], about["targets_cut"]) == ("published", 10, 1)
    about, whole = read(evaluate("--limit", "2")[0])  # a smaller number takes no answer away here either
    assert about["evaluated"] == 6 and about["limit"] is None
    limit, again = about["max_new_tokens"], sum(row["stopped"] is False for row in cut)
    assert (about["lengths"], about["targets_cut"]) == ("whole", 0) and limit > 24 and sum(asked) == 6 + again
    assert str(again) in capsys.readouterr().out or not again
    for short, row in zip(cut, whole, strict=True):
        assert row["answer"].startswith(short["answer"]) and row["answer_tokens"] <= limit
        assert row["stopped"] or row["answer_tokens"] == limit


def test_two_evaluations_of_one_model_do_not_share_answers(evaluate, tmp_path):
    with runs.folder_lock(tmp_path / "results" / "mine-raw", make=False):
        with refuses("another command", "wait", file="results/mine-raw"):
            evaluate("--name", "mine", "--limit", "1")
    assert not (tmp_path / "results" / "mine-raw").exists()
    evaluate("--name", "mine", "--limit", "1")


def test_answers_end_at_the_turns_end_of_template_and_recipe(evaluate, adapters, tiny_base, tmp_path, capsys):  # noqa: F811
    """A token that the model writes, declared an end by the recipe beside the adapter, ends its answers."""
    whole = read(evaluate("--limit", "4")[0])[1]
    tokenizer = models.load_tokenizer(str(tiny_base), None, "raw")
    ids = [tokenizer(row["answer"], add_special_tokens=False)["input_ids"] for row in whole]
    end = tokenizer.convert_ids_to_tokens(ids[0][2])
    folder = tmp_path / "told"
    shutil.copytree(adapters["dora"], folder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"eot_tokens": [end]}))
    ended = read(evaluate("--limit", "4", "--name", "told", adapter=folder)[0])[1]
    for before, row, written in zip(whole, ended, ids, strict=True):
        expected = written[: written.index(ids[0][2])] if ids[0][2] in written else written
        assert tokenizer(row["answer"], add_special_tokens=False)["input_ids"] == expected
        assert row["stopped"] or row == before
    assert ended[0]["stopped"] and ended[0]["answer_tokens"] <= 3 < whole[0]["answer_tokens"]
    # Another end makes other answers: they are another result. Records of before had none.
    other = tmp_path / "other"
    shutil.copytree(adapters["dora"], other)
    path = tmp_path / "results" / "told-raw" / "run.json"
    record = json.loads(path.read_text())
    assert end in record["ends"]
    with refuses("another model", "ends:", "FORCE=1", file="results/told-raw"):
        evaluate("--name", "told", "--limit", "4", adapter=other)
    path.write_text(json.dumps({key: value for key, value in record.items() if key != "ends"}))
    assert read(evaluate("--name", "told", "--limit", "4", adapter=other)[0])[1] == ended


def test_another_adapter_under_the_same_name(evaluate, tmp_path, capsys):
    evaluate("--name", "mine", "--limit", "2")
    with refuses("answers", "FORCE=1", "NAME=", file="results/mine-raw", key="adapter_sha256"):
        evaluate("--name", "mine", "--limit", "2", adapter="lora")
    evaluate("--name", "mine", "--limit", "2", "--force", adapter="lora")
    aside = list((tmp_path / "results" / "aside").iterdir())
    assert len(aside) == 1 and json.loads((aside[0] / "run.json").read_text())["method"] == "dora"
    assert json.loads((tmp_path / "results" / "mine-raw" / "run.json").read_text())["method"] == "lora"


def test_a_changed_test_file_is_asked_anew(evaluate, tests_folder, capsys):
    evaluate()
    write_rows(tests_folder, "fpb", 12, seed=5)
    assert read(evaluate()[0])[0]["rows"] == 12
    assert re.search(r"chang.*\bdora-raw\b", capsys.readouterr().out)


def test_kept_answers_follow_new_corrections_without_being_asked_again(evaluate, capsys):
    folder = evaluate("--limit", "3")[0]
    about, rows = read(folder)
    rows[1]["corrected"] = "as it was corrected before"
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "fpb" / "answers.jsonl").write_text(text)
    capsys.readouterr()
    again = read(evaluate("--limit", "3")[0])
    assert again[0] == about and again[1][1]["corrected"] == rows[1]["target"]
    printed = capsys.readouterr().out
    assert "new corrections of 1 rows" in printed and "answered already" in printed


def test_answers_of_before_which_a_blank_line_may_have_cut_are_asked_again(evaluate, capsys):
    folder = evaluate("--limit", "3")[0]
    path = folder / "fpb" / "set.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in about.items() if key not in ("lengths", "targets_cut")}))
    capsys.readouterr()
    assert read(evaluate("--limit", "3")[0])[0]["lengths"] == about["lengths"]
    printed = capsys.readouterr().out
    assert "blank lines" in printed and "answered already" not in printed


def test_killed_at_any_moment_it_goes_on(evaluate, tests_folder, tmp_path):
    """Kill -9 at random moments until it ends by itself: the same answers as without, and none asked twice."""
    write_rows(tests_folder, "fpb", 12)
    argv = ("--batch-tokens", "1", "--name")
    expected = read(evaluate(*argv, "whole")[0])[1]
    part = tmp_path / "results" / "killed-raw" / "answers.part.jsonl"
    draw, kills, answered = random.Random(3), 0, []
    while True:
        child = os.fork()
        if not child:
            tqdm.set_lock(threading.RLock())  # its own is shared between processes, and a killed one may hold it
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                evaluate(*argv, "killed")
            finally:
                os._exit(0)
        before = len(part.read_bytes().splitlines()) if part.exists() else 0
        deadline, lines, target = time.monotonic() + 60, 0, before + draw.randint(1, 5)
        while time.monotonic() < deadline and not os.waitpid(child, os.WNOHANG)[0]:
            with suppress(FileNotFoundError):  # before its first answer, and when it has ended
                lines = part.read_bytes().count(b"\n")
            if lines >= target:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                kills += 1
                answered.append(lines)
                break
            time.sleep(0.002)
        else:
            break
    assert kills >= 2 and answered == sorted(answered)
    assert read(tmp_path / "results" / "killed-raw")[1] == expected


def test_a_line_cut_in_the_middle_is_asked_again(evaluate, tmp_path):
    folder = evaluate("--name", "whole")[0]
    expected = read(folder)[1]
    (folder / "fpb" / "set.json").unlink()
    (folder / "answers.part.jsonl").write_text('["a key", "an answer", [1, 1, true]]\n["anoth')
    assert read(evaluate("--name", "whole")[0])[1] == expected


def test_a_full_disk_loses_nothing(evaluate, tests_folder, tmp_path):
    write_rows(tests_folder, "fpb", 30)
    child = os.fork()
    if not child:
        code, sys.stdout, sys.stderr = 1, *[open(os.devnull, "w")] * 2  # pytest's own files must not meet the limit
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))  # bytes a file may have: the next one fails
            evaluate("--name", "full", "--batch-tokens", "1")
        except UserError as error:
            (tmp_path / "said").write_text(str(error))
            code = 7
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    said = (tmp_path / "said").read_text()
    says(said, "File too large", "free", "same command", file="results/full-raw/answers.part.jsonl")
    assert read(evaluate("--name", "full")[0])[1] == read(evaluate("--name", "other")[0])[1]


def test_memory_that_does_not_suffice(evaluate, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(evaluate_harness, "generate", fail)
    with refuses("memory", "BATCH_TOKENS=", "BITS=4 KEEP_QUANTISED=1"):
        evaluate()


def test_an_endpoint(evaluate, server, capsys):  # noqa: F811
    """The whole way: rows to a server's chat, answers kept; an error in the middle leaves them there."""
    server.script = [{}] * 10 + [{"status": 404}] * 40
    with refuses("404", "MODEL", file=f"{server.url}/chat/completions"):
        evaluate("--endpoint", server.url, model="served/name", adapter=None, prompt="saved")
    server.script = []
    asked = len(server.log)
    folder = evaluate("--endpoint", server.url, model="served/name", adapter=None, prompt="saved")[0]
    about, rows = read(folder)
    assert folder.name == "name" and {row["answer"] for row in rows} == {"Answer:"}
    assert json.loads((folder / "run.json").read_text())["way"] == "endpoint"
    assert len(server.log) - asked < 24, "what was answered before the error is not asked again"
    assert not any("stop" in body for _, body, _ in server.log), "an answer may have a blank line"
    server.script = [{"choice": {"message": {"content": None}, "finish_reason": "content_filter"}}, {"choice": {}}]
    folder = evaluate("--endpoint", server.url, "--name", "empty", model="served/name", adapter=None, prompt="saved")[0]
    assert sorted(row["answer"] for row in read(folder)[1])[:2] == ["", "Answer:"]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    says(line, "fpb", "1 empty answer", "content_filter")
    with refuses("ENDPOINT=", "MODEL=", "ADAPTER=", "BASE=1"):
        evaluate("--endpoint", server.url, "--base", model="m", adapter=None)


@pytest.fixture
def copies(tmp_path):
    """A few rows in the schemas of openai/gsm8k and cais/mmlu."""
    folder = tmp_path / "copies"

    def question(i):
        return {"question": f"Ann has {i} shares and buys {i}. How many?", "answer": f"{i}+{i}={2 * i}\n#### {2 * i}"}

    def choice(i):
        return {"question": f"{i} + {i}?", "subject": "x", "choices": [str(2 * i), "7", "9", "0"], "answer": 0}

    for part, splits, make in (
        ("gsm8k/main", {"train": range(1, 9), "test": range(20, 24)}, question),
        ("mmlu/anatomy", {"dev": range(1, 6), "test": range(20, 23)}, choice),
        ("mmlu/astronomy", {"dev": range(1, 6), "test": range(30, 32)}, choice),
    ):
        (folder / part).mkdir(parents=True)
        for split, numbers in splits.items():
            text = "".join(json.dumps(make(number)) + "\n" for number in numbers)
            (folder / part / f"{split}.jsonl").write_text(text)
        config = part.split("/")[1]
        readme = folder / part.split("/")[0] / "README.md"
        before = readme.read_text() if readme.exists() else "configs:\n"
        files = "".join(f"  - split: {split}\n    path: {config}/{split}.jsonl\n" for split in splits)
        readme.write_text(f"{before}- config_name: {config}\n  data_files:\n{files}")
    for readme in folder.glob("*/README.md"):
        readme.write_text(f"---\n{readme.read_text()}---\n")
    return folder


def test_forgetting_is_asked_of_both_under_the_same_settings(evaluate, copies):
    base, adapter = evaluate("--base", tasks="forgetting", tests=copies)
    for name, count in (("mmlu", 5), ("gsm8k", 4)):
        (about, before), (_, after) = read(base, name), read(adapter, name)
        assert about["metric"] == "lm_eval" and about["evaluated"] == len(before) == len(after) == count
        assert [(row["id"], row["prompt"]) for row in before] == [(row["id"], row["prompt"]) for row in after]
        assert all(row["right"] in (0, 1) for row in before + after)
    # Five shots of the copy's own train or dev rows come first.
    assert read(base, "gsm8k")[1][0]["prompt"].count("How many?") == 6
    assert read(base, "mmlu")[1][0]["prompt"].count("\nA. ") == 6


def test_forgetting_knows_what_is_right(evaluate, copies, monkeypatch):
    """A model that answers each question rightly scores 1 on both, one that answers wrongly 0."""

    def solve(error, requests, **_):
        numbers = [request.args[0].rsplit("Ann has ", 1)[1].split()[0] for request in requests]
        return [f"So #### {2 * int(number) + error}" for number in numbers]

    def prefer(error, requests, **_):
        return [(0.0 if (request.args[1].strip() == "A") == (not error) else -9.0, False) for request in requests]

    harness = evaluate_harness.BatchedHFLM

    def stand_in(*given):
        lm = harness(*given)
        lm.generate_until, lm.loglikelihood = partial(solve, error), partial(prefer, error)
        return lm

    monkeypatch.setattr(evaluate_harness, "BatchedHFLM", stand_in)
    for error in (0, 1):
        folder = evaluate("--name", f"e{error}", tasks="forgetting", tests=copies)[0]
        for name in questions.FORGETTING:
            assert {row["right"] for row in read(folder, name)[1]} == {1 - error}, name


def test_published_and_corrected_labels_of_tfns(evaluate, shared):
    folder = evaluate("--limit", "30", tasks="tfns", tests=shared)[0]
    about, rows = read(folder, "tfns")
    assert about["published_file"] and about["rows"] == 2388 and len(rows) == 30
    exchanged = {"neutral": "positive", "positive": "neutral", "negative": "negative"}
    assert all(row["corrected"] == exchanged[row["target"]] for row in rows)


def test_real_fpb_and_fiqa_rows(evaluate, shared):
    folder = evaluate("--limit", "10", tasks="fpb,fiqa,formula", tests=shared)[0]
    for name in "fpb", "fiqa", "formula":
        about, rows = read(folder, name)
        assert about["published_file"] and len(rows) == 10 and all(row["target"] == row["corrected"] for row in rows)


def test_mistakes_are_found_before_anything_is_loaded(tiny_base, adapters, tmp_path, monkeypatch):  # noqa: F811
    raw, other, none = tmp_path / "raw", tmp_path / "other", tmp_path / "none"
    write_rows(raw, "fpb", 3)
    write_rows(other, "fpb", 3)
    for module in questions, test_sets:
        monkeypatch.setattr(module, "RAW", raw)
    monkeypatch.setattr(models, "load_base", None)

    def mistaken(*argv, say=(), **place):
        with refuses(*say, **place):
            runner.evaluate(evaluation.resolve(request([*argv, "--results", str(tmp_path / "results")])))

    model = ("--model", str(tiny_base))
    fpb = (*model, "--tasks", "fpb")
    mistaken(say=["RECIPE=", "MODEL=", "ADAPTER="])
    mistaken("--recipe", "sentiment_r8_dor", say=["sentiment_r8_dora"], file="RECIPE=sentiment_r8_dor")
    mistaken("--recipe", "sentiment_r8_dora", "--model", "x", say=["RECIPE=", "leave out", "ENDPOINT="])
    mistaken(*model, "--adapter", str(none), say=["no such", "ADAPTER="], file=none)
    mistaken(*model, "--adapter", str(adapters["dora"]), say=["no test set", "TASKS=general"])
    mistaken(*model, "--tasks", "fbp", say=["'fbp'", "fpb"], file="TASKS=fbp")
    tfns, cfa = (raw / test_sets.all_sets()[name].file for name in ("tfns", "cfa_level1"))
    mistaken(*model, "--tasks", "tfns", say=["missing", "make data TASK=sentiment", "TASKS="], file=tfns)
    mistaken(*model, "--tasks", "cfa_level1", say=["missing", "your own", "TASKS="], file=cfa)
    published = ["checksum|SHA-256", "make data TASK=sentiment", "TESTS="]
    mistaken(*fpb, say=published, file=raw / "test" / "fpb_test.jsonl")
    mistaken(*fpb, "--tests", str(none), say=["missing"], file=none / "test" / "fpb_test.jsonl")
    mistaken(*fpb, "--tests", str(other), "--prompt", "x", say=["saved, finlora_inst, raw"], file="PROMPT=x")
    mistaken(*model, "--tasks", "gsm8k", "--tests", str(none), say=["openai/gsm8k", "TESTS="], file=none / "gsm8k")
    mistaken(*fpb, "--name", "../x", say=["results/", "write x"], file="NAME=../x")


def test_mistakes_are_one_line(command, house):
    """Through the command itself."""
    failed(command("finlora", "eval", "--limit", "0"), "--limit", "'0'", "above 0")
    recipe, folder = ("--recipe", "sentiment_r8_dora"), house / "outputs" / "sentiment_r8_dora"
    train = "make train RECIPE=sentiment_r8_dora"
    failed(command("finlora", "eval", *recipe), "not trained", train, file="outputs/sentiment_r8_dora")
    (folder / "checkpoint-5").mkdir(parents=True)
    failed(command("finlora", "eval", *recipe), "unfinished", train, file="outputs/sentiment_r8_dora")
