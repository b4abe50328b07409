"""bench/study: the split of the study's rows, its sweeps, and that docs/dora.md says what the record holds."""

import json
import random
from collections import defaultdict

import pytest
import yaml

from bench.study import page, rows
from finlora.core.errors import UserError
from finlora.data.groups import row_groups
from finlora.data.rows import read_rows
from finlora.sweep import points

FOUND = json.loads(page.RECORD.read_text(encoding="utf-8"))
BY_SWEEP = defaultdict(list)
for one in page.settings(FOUND):
    BY_SWEEP[one.sweep].append(one)
LABELS = ("negative", "neutral", "positive")


def row(name: str, number: int) -> dict[str, str]:
    drawn = random.Random(f"{name} {number}")
    text = " ".join("".join(drawn.choices("abcdefghij", k=6)) for _ in range(15))
    context = f"Instruction: What is the sentiment of this news?\nInput: {text}\nAnswer: "
    return {"context": context, "target": LABELS[number % 3]}


@pytest.fixture
def made(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "TEST_ROWS", 60)
    monkeypatch.setattr(rows, "VALIDATION_ROWS", 20)
    (tmp_path / "raw" / "test").mkdir(parents=True)
    for name in rows.SETS:
        lines = [row(name, number) for number in range(50)]
        lines += [one | {"context": one["context"].replace("Input: ", "Input:  ")} for one in lines[:10]]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "raw" / "test" / f"{name}_test.jsonl").write_text(text, encoding="utf-8")
    rows.make(tmp_path / "raw", tmp_path / "study")
    return tmp_path / "study"


def questions(file) -> list[str]:
    messages = [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines()]
    return [turns[0]["content"] for turns in messages]


def test_rows_about_one_text_are_on_one_side(made):
    parts = {name: questions(made / f"{name}.jsonl") for name in ("train", "validation")}
    parts["test"] = [row.context for name in rows.SETS for row in read_rows(made / "test" / f"{name}_test.jsonl")]
    sizes = {name: len(contexts) for name, contexts in parts.items()}
    assert sum(sizes.values()) == 180 and 60 <= sizes["test"] < 70 and 20 <= sizes["validation"] < 30
    where = [name for name, contexts in parts.items() for _ in contexts]
    groups = row_groups([context for contexts in parts.values() for context in contexts])
    assert len(set(groups)) == len(set(zip(groups, where, strict=True))) == 150
    third = questions(made / "third.jsonl")
    assert len(third) == len(parts["train"]) // 3 and set(third) < set(parts["train"])
    assert questions(made / "published_labels.jsonl") == parts["train"]
    recipe = yaml.safe_load((made / f"{rows.RECIPE}.yaml").read_text(encoding="utf-8"))
    assert recipe["datasets"][0]["path"].endswith("study/train.jsonl") and recipe["evals_per_epoch"] == 1


@pytest.mark.parametrize("sweep", page.SWEEPS)
def test_each_sweep_has_points_that_are_recipes(sweep, tmp_path):
    """With one seed: five times as many points say the same."""
    content = yaml.safe_load((page.HERE / f"{sweep}.yaml").read_text(encoding="utf-8"))
    assert content["seed"] == [1, 2, 3, 4, 5]
    file = tmp_path / f"{sweep}.yaml"
    file.write_text(yaml.safe_dump(content | {"seed": [1]}), encoding="utf-8")
    planned = points.plan(points.recipe_names.RECIPES / f"{rows.RECIPE}.yaml", file)
    assert len(planned) == len({point.name for point in planned}) >= 2
    labels = [
        page.label(page.Setting(sweep, {k: v for k, v in one.changes.items() if k != "seed"}, "saved"))
        for one in planned
    ]
    assert len(set(labels)) == len(labels)


def test_page_and_record_are_what_the_runs_give():
    assert page.text_of(page.with_means(FOUND)) == page.RECORD.read_text(encoding="utf-8")
    assert page.page(FOUND) == page.PAGE.read_text(encoding="utf-8")


def test_recorded_runs_of_sweeps_that_are_not_here_are_kept():
    bits = [one for one in FOUND["runs"] if one["sweep"] == "bits"]
    found = page.with_recorded({"about": FOUND["about"], "runs": [one | {"loss": 9} for one in bits[:2]]})
    assert [one for one in found["runs"] if one["sweep"] != "bits"] == [
        one for one in FOUND["runs"] if one["sweep"] != "bits"
    ]
    assert [one["loss"] for one in found["runs"] if one["sweep"] == "bits"] == [9, 9]
    with pytest.raises(UserError, match="other rows"):
        page.with_recorded({"about": FOUND["about"] | {"targets": "g"}, "runs": bits})


def test_the_plain_words_of_the_page_hold():
    compared = {
        sweep: page.compare(page.pairs_of(sweep, BY_SWEEP), FOUND["about"]) for sweep in BY_SWEEP if sweep != "base"
    }
    assert not any(one.distinguishable for one in compared["methods"] + compared["magnitude"])
    assert max(abs(one.difference["difference"]) for one in compared["methods"]) < 0.01
    assert all(-0.025 < one.difference["low"] and one.difference["high"] < 0.025 for one in compared["methods"])
    bits = {page.label(one.b): one.difference for one in compared["bits"]}
    assert not any(one.distinguishable for one in compared["bits"])
    assert round(100 * bits["4 bits"]["difference"], 1) == -1.2
    assert all(-0.012 < bits[name]["low"] and bits[name]["high"] < 0.012 for name in bits.keys() - {"4 bits"})
    (rank,) = [one for one in compared["ranks"] if one.distinguishable]
    assert (page.label(rank.a), page.label(rank.b)) == ("LoRA, rank 64", "rsLoRA, rank 64")
    confounds = {page.label(one.b): one for one in compared["confounds"]}
    cost = {
        name: round(100 * one.difference["difference"], 1) for name, one in confounds.items() if one.distinguishable
    }
    assert cost == {"TFNS's exchanged labels": -39.0, "a third of the rows": -9.2}
    together = confounds["alpha 32, dropout 0.1, a quarter of the batch"].difference
    assert round(100 * together["difference"], 1) == 1.7 and not cost.keys() & {"alpha 32, dropout 0.1"}
    raw = [one for one in compared["prompt"] if one.b.prompt == "raw"]
    assert all(one.distinguishable and -0.14 < one.difference["difference"] < -0.09 for one in raw)


def test_holm_adjusts_in_the_order_of_the_values():
    # 4 x 0.01; 3 x 0.02; then 2 x 0.03 = 0.06 again, and 0.04 may not fall below it.
    assert page.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert page.holm([0.9, 0.8]) == [1, 1]
