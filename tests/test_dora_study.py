"""The study behind docs/dora.md: its split, its settings, its runs in small, its statistics and its page."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from bench import dora_corpus, dora_page, dora_study
from finlora.core.errors import UserError
from finlora.data.neardup import near_duplicate_groups
from finlora.train.tiny import train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "finlora" / "data"
STUDY = dora_study.read_study()
SEEDS, ROWS = 4, 160


def sample_rows() -> list[tuple[str, str, str]]:
    lines = (ROOT / "data" / "sample" / "test" / "fpb_test.jsonl").read_text(encoding="utf-8").splitlines()
    return [("fpb", row["context"], row["target"]) for row in map(json.loads, lines)]


# The split


def test_near_duplicates_stay_on_one_side():
    rows = sample_rows()
    rows += [(name, context.replace("Input: ", "Input:  "), target) for name, context, target in rows[:60]]
    parts = dora_corpus.split(rows, {"train": 120, "validation": 30, "seed": 1})
    assert sum(map(len, parts.values())) == len(rows)
    where = [name for name in parts for _ in parts[name]]
    groups = near_duplicate_groups(dora_corpus.sentence(row[1]) for name in parts for row in parts[name])
    assert len(set(zip(groups, where, strict=True))) == len(set(groups))


def test_the_split_repeats_and_needs_rows_to_test_on():
    rows, sizes = sample_rows(), {"train": 100, "validation": 20, "seed": 0}
    assert dora_corpus.split(rows, sizes) == dora_corpus.split(rows, sizes)
    with pytest.raises(UserError, match="none to test"):
        dora_corpus.split(rows, sizes | {"train": len(rows)})


def test_text_that_holds_a_test_row_is_found():
    row = sample_rows()[0][1]
    held_out = dora_corpus.grams(dora_corpus.sentence(row))
    assert not held_out.isdisjoint(dora_corpus.grams("Before. " + dora_corpus.sentence(row).upper() + " After."))
    assert held_out.isdisjoint(dora_corpus.grams("Another text that has nothing in common with the row at all."))


def test_a_lexicon_becomes_sentences(tmp_path):
    (tmp_path / "table.txt").write_text("$:\t-1.5\t0.8\t[-1, -2]\nplunges\t-1.5\t0.5\t[-1]\n", encoding="utf-8")
    (tmp_path / "assigned.py").write_text("words = {}\nwords['record profit'] \t = 0.5\n", encoding="utf-8")
    assert dora_corpus._polarities(tmp_path / "table.txt") == ["plunges is negative."]
    assert dora_corpus._polarities(tmp_path / "assigned.py") == ["record profit is positive."]


def test_real_rows_have_corrected_labels():
    if not (REAL / "test" / "tfns_test.jsonl").exists():
        pytest.skip("../shared/finlora/data is not here: the real rows' corrected labels were not tested")
    rows = dora_corpus.labelled(REAL)
    tfns = [target for name, _, target in rows if name == "tfns"]
    assert (tfns.count("neutral"), tfns.count("positive"), tfns.count("negative")) == (1566, 475, 347)


def test_labels_that_cannot_be_corrected_are_refused(tmp_path):
    (tmp_path / "test").mkdir()
    for name in dora_corpus.SETS:
        (tmp_path / "test" / f"{name}_test.jsonl").write_text('{"context": "Up", "target": "positive"}\n')
    with pytest.raises(UserError, match="tfns_test.jsonl: .*published"):
        dora_corpus.labelled(tmp_path)


# What runs


def test_each_question_changes_what_it_asks_about_and_nothing_else():
    asked = {"grid": {"method", "rate"}, "methods": {"method"}, "magnitude": {"magnitude"}, "bits": {"bits"}}
    asked |= {"ranks": {"method", "rank"}, "prompt": {"method", "prompt"}}
    assert set(STUDY["questions"]) == set(asked)
    for question, keys in asked.items():
        for change in dora_study.variants(STUDY, question):
            settings = STUDY["defaults"] | change
            assert {key for key in settings if settings[key] != STUDY["defaults"][key]} <= keys == set(change)


def test_runs_are_planned_once_and_in_order():
    plan = dora_study.planned(STUDY)
    assert len({dora_study.identity(run) for run in plan}) == len(plan)
    numbers = [run["rate"] != "best" for run in plan]
    assert numbers == sorted(numbers, reverse=True)  # the grid first: it decides the rate of the others
    assert {run["seed"] for run in plan if run["rate"] == "best" and run["rank"] == 8 and run["magnitude"] == 1} == set(
        range(1, 11)
    )


def made_row(settings: dict, accuracy: float, targets: int = ROWS) -> dict:
    """A row as a run leaves it; the same test rows are hard in every run."""
    draw = np.random.default_rng(settings["seed"])
    right = np.random.default_rng(0).random(targets) + 0.05 * draw.standard_normal(targets) < accuracy
    test = {
        "accuracy": float(right.mean()),
        "finlora": float(right.mean()),
        "right": np.packbits(right).tobytes().hex(),
    }
    return {
        "settings": settings,
        "parameters": 1000,
        "steps": 10,
        "loss": [1.0, 0.5],
        "train_seconds": 1.0,
        "validation": {"accuracy": accuracy, "finlora": accuracy, "loss": 1 - accuracy},
        "test": dict.fromkeys(STUDY["tests"][settings["prompt"]], test),
        "seconds": 2.0,
        "device": "CPU",
    }


def accuracy_of(run: dict) -> float:
    good = {"full": 0.0003, "lora": 0.003, "rslora": 0.001, "dora": 0.003}[run["method"]]
    lost = 0.2 * (run["rate"] != good) + 0.3 * (run["method"] == "full")
    return 0.85 - lost - 0.2 * (run["magnitude"] == 30)


def made_rows() -> dict[str, dict]:
    rows: dict[str, dict] = {}
    while ready := list(dora_study.waiting(STUDY, rows, set())):
        rows |= {dora_study.identity(run): made_row(run, accuracy_of(run)) for run in ready}
    return rows


@pytest.fixture(scope="module")
def rows() -> dict[str, dict]:
    return made_rows()


def test_the_grid_decides_the_rate_and_what_ran_is_not_run_again(rows):
    assert all(isinstance(row["settings"]["rate"], float) for row in rows.values())
    best = {row["settings"]["method"]: row["settings"]["rate"] for row in rows.values() if row["settings"]["seed"] == 8}
    assert best == {"full": 0.0003, "lora": 0.003, "rslora": 0.001, "dora": 0.003}
    one = next(iter(rows))
    left = {key: row for key, row in rows.items() if key != one}
    again = {dora_study.identity(run) for run in dora_study.waiting(STUDY, left, set())}
    assert again == {one}
    assert not list(dora_study.waiting(STUDY, left, {one}))


def test_test_rows_have_no_say_in_the_rate(rows):
    other = {key: row | {"test": {"llama3": {"accuracy": 0.0, "right": ""}}} for key, row in rows.items()}
    for method in ("full", "lora", "rslora", "dora"):
        assert dora_study.best_rate(STUDY, method, rows) == dora_study.best_rate(STUDY, method, other) is not None


def test_the_loss_decides_between_rates_of_near_accuracy(rows):
    def best(**changes) -> float:
        made = {}
        for key, row in rows.items():
            scores = changes.get(f"at_{row['settings']['rate']}") if row["settings"]["method"] == "dora" else None
            made[key] = row | ({"validation": dict(zip(("accuracy", "loss"), scores, strict=True))} if scores else {})
        return dora_study.best_rate(STUDY, "dora", made)

    one_error = (0.85 * 0.15 / STUDY["split"]["validation"]) ** 0.5
    assert best() == 0.003  # 0.85 at a loss of 0.15; the others are at 0.65
    assert best(**{"at_0.001": (0.85 - 0.9 * one_error, 0.1)}) == 0.001
    assert best(**{"at_0.001": (0.85 - 1.1 * one_error, 0.1)}) == 0.003
    assert best(**{"at_0.001": (0.85 - 0.9 * one_error, 0.2)}) == 0.003
    assert best(**{"at_0.003": (0.85, None)}) in (0.0001, 0.0003, 0.001)  # diverged


def test_rows_cut_short_or_failed_run_again(tmp_path, rows):
    good, bad = list(rows.values())[:2]
    file = tmp_path / "rows.jsonl"
    failed = {"settings": bad["settings"], "failed": "RuntimeError: no"}
    file.write_text("\n".join([json.dumps(failed), json.dumps(good), json.dumps(bad)[:50]]))
    read = dora_study.read_rows([file])
    assert [row.get("failed") for row in read.values()] == ["RuntimeError: no", None]
    file.write_text("\n".join(json.dumps(row) for row in (failed, bad, failed)))
    assert list(dora_study.read_rows([file]).values()) == [bad]


# Runs, in small


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A random base and a kit of sample rows."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    from bench.dora_runs import Kit

    folder = tmp_path_factory.mktemp("base")
    data = sample_rows()
    tokenizer = train_tokenizer([row[1] for row in data] * 4, 512)
    set_seed(0)
    shape = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=2, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    parts = {"train": data[:32], "validation": data[32:48], "test": data[48:72]}
    return folder, Kit(tokenizer, {name: dora_corpus._rows(tokenizer, part) for name, part in parts.items()})


def run_of(**changes) -> dict:
    return STUDY["defaults"] | {"rate": 0.01, "seed": 1} | changes


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "full"])
def test_trainable_parameters_follow_the_formula(small, method, rank):
    import torch

    from bench.dora_runs import build

    model = build(run_of(method=method, rank=rank), STUDY["training"]["targets"], small[0], torch.device("cpu"))
    sizes = [(48, 48), (48, 24), (48, 24)] * 2  # q, k and v of two layers: in, out
    expected = sum(rank * (one + other) + (method == "dora") * other for one, other in sizes)
    if method == "full":
        expected = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


@pytest.mark.parametrize("factor", [0.0, 3.0])
def test_the_magnitude_has_its_own_rate(small, factor):
    import torch

    from bench.dora_runs import build, optimizer_of

    cpu = torch.device("cpu")
    model = build(run_of(magnitude=factor), STUDY["training"]["targets"], small[0], cpu)
    rates = [group["lr"] for group in optimizer_of(model, run_of(magnitude=factor), cpu).param_groups]
    assert rates == ([0.01] if factor == 0 else [0.01, 0.03])
    moving = [p for name, p in model.named_parameters() if "magnitude" in name and p.requires_grad]
    assert len(moving) == (0 if factor == 0 else 6)


def test_equal_settings_give_equal_rows_and_another_seed_does_not(small):
    import torch

    from bench.dora_runs import fine_tune

    training = STUDY["training"] | {"batch": 8, "epochs": 2, "new_tokens": 3}
    study = STUDY | {"training": training, "lessons": {"rows": 8}}

    def run(**changes) -> dict:
        row = fine_tune(run_of(**changes), study, small[0], small[1], torch.device("cpu"))
        return {key: value for key, value in row.items() if "seconds" not in key}

    first = run(prompt="finlora_inst")
    assert first == run(prompt="finlora_inst") != run(prompt="finlora_inst", seed=2)
    assert set(first["test"]) == {"finlora_inst", "raw"} and first["steps"] == 6
    assert len(first["test"]["raw"]["right"]) == 2 * 3


def test_the_base_model_repeats_and_learns(small, tmp_path):
    import torch

    from bench.dora_runs import pretrain

    kit = tmp_path / "kit"
    small[1].tokenizer.save_pretrained(kit / "tokenizer")
    (kit / "rows.json").write_text(json.dumps(small[1].rows))
    stream = [token for prompt in small[1].rows["train"]["prompts"]["llama3"] for token in prompt]
    save_file({"tokens": np.array(stream, np.uint16)}, kit / "tokens.safetensors")
    study = STUDY | {
        "model": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2},
        "pretraining": STUDY["pretraining"] | {"length": 16, "batch": 8, "steps": 24, "seconds": 600},
        "lessons": {"rows": 16, "epochs": 2, "learning_rates": [0.0001, 0.001]},
        "training": STUDY["training"] | {"batch": 8, "new_tokens": 2},
    }
    one, other = (pretrain(study, kit, tmp_path / name, torch.device("cpu")) for name in "ab")
    assert one["sha256"] == other["sha256"] and one["steps"] == 24 and one["tokens"] == 24 * 8 * 16
    assert one["loss"] < np.log(len(small[1].tokenizer))
    assert (tmp_path / "a" / "base.json").exists() and 0 <= one["accuracy"] <= 1


def test_only_answers_have_labels():
    from bench.dora_runs import collate, collate_prompts

    batch = collate([[5, 6, 7], [8]], [[1, 2], [3, 2]], 0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1, 2, 0, 0, 0], [8, 3, 2, 0, 0, 0, 0, 0]]
    assert batch["labels"][0].tolist() == [-100] * 3 + [1, 2] + [-100] * 3
    assert batch["labels"][1].tolist() == [-100, 3, 2] + [-100] * 5
    assert batch["fastdora_answers"].tolist() == [0, 1, 2, 3]
    ids, mask = collate_prompts([[5, 6, 7], [8]], 0)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]


# Statistics and the page


@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 2**31), st.floats(0, 1))
def test_an_interval_holds_its_mean(seeds, count, seed, share):
    values = (np.random.default_rng(seed).random((seeds, count)) < share).astype(float)
    low, high = dora_page.interval(values)
    assert low - 1e-5 <= values.mean() <= high + 1e-5 and 0 <= low <= high <= 1


def test_holm():
    assert dora_page.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert dora_page.holm([0.9, 0.8]) == [1.0, 1.0] and dora_page.holm([]) == []


def test_bits_of_another_split_are_refused():
    assert dora_page.bits("a0", 3).tolist() == [True, False, True]
    with pytest.raises(UserError, match="another split"):
        dora_page.bits("a0", 9)


@pytest.fixture(scope="module")
def recorded(rows, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows.values())), encoding="utf-8")
    part = {"rows": ROWS, "fpb": ROWS, "fiqa": 0, "tfns": 0}
    about = {
        "study": {key: STUDY[key] for key in ("model", "pretraining", "lessons", "training")},
        "base": {"parameters": 10**7, "tokens": 10**8, "seconds": 80, "accuracy": 0.6, "device": "CPU"},
        "kit": {"tokens": 10**7, "split": dict.fromkeys(dora_corpus.SPLITS, part)},
        "sets": "f" * ROWS,
        "targets": ("nup" * ROWS)[:ROWS],
    }
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")
    dora_page.record(STUDY, [folder / "rows.jsonl"], folder / "dora_study.json")
    return folder / "dora_study.json"


def test_a_made_effect_is_found_and_no_effect_is_not(recorded):
    result = json.loads(recorded.read_text(encoding="utf-8"))
    by = {(one["a"], one["b"]): one for one in result["comparisons"]["methods"]}
    assert by["full fine-tuning", "DoRA"]["distinguishable"] and by["full fine-tuning", "DoRA"]["difference"] > 0.2
    assert not by["LoRA", "DoRA"]["distinguishable"] and by["LoRA", "DoRA"]["difference"] == 0
    factors = {one["b"]: one["distinguishable"] for one in result["comparisons"]["magnitude"]}
    assert factors == {"frozen": False, "x 0.1": False, "x 3": False, "x 10": False, "x 30": True}
    assert all(one["p_holm"] >= one["p"] for family in result["comparisons"].values() for one in family)
    assert len(result["runs"]) == result["about"]["planned"] > 200


def test_the_page_says_what_the_record_says(recorded, tmp_path):
    dora_page.write(recorded, tmp_path / "dora.md")
    page = (tmp_path / "dora.md").read_text(encoding="utf-8")
    assert max(len(line) for line in page.splitlines() if line[:1] != "|") <= 120
    for table in re.findall(r"(?m)(?:^\|.*\n)+", page):
        assert len({line.count("|") for line in table.splitlines()}) == 1
    page = " ".join(page.split())  # however its lines are broken
    assert "Neither DoRA nor LoRA is to be preferred for its score (DoRA − LoRA: +0.0 points" in page
    assert re.search(r"Distinguishable: x 30 − x 1: -[12]\d\.\d points", page)
    assert "no other factor is distinguishably better" in page
    assert "| DoRA | 0.003 | 1,000 | 10 |" in page
    for _, _, _, plot in dora_page.SECTIONS:
        assert f"({plot})" in page and (tmp_path / plot).read_text(encoding="utf-8").endswith("</svg>\n")


def test_a_record_of_few_rows_still_gives_a_page(recorded, rows, tmp_path):
    few = [row for row in rows.values() if row["settings"]["seed"] == 1 and row["settings"]["magnitude"] == 1]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, few)), encoding="utf-8")
    (tmp_path / "about.json").write_bytes(recorded.with_name("about.json").read_bytes())
    dora_page.record(STUDY, [tmp_path / "rows.jsonl"], tmp_path / "few.json")
    dora_page.write(tmp_path / "few.json", tmp_path / "few.md")
    assert "## Learning rates" in (tmp_path / "few.md").read_text(encoding="utf-8")


def test_the_committed_page_is_that_of_the_committed_record(tmp_path):
    if not dora_study.RECORD.exists():
        pytest.skip("the study has not been recorded")
    dora_page.write(dora_study.RECORD, tmp_path / "dora.md")
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert made == {name: (dora_study.PAGE.parent / name).read_bytes() for name in made}
