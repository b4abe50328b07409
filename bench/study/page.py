"""The study's record and page: bench/study/results.json from the sweeps, docs/dora.md and its picture from that.

    python -m bench.study.page --record    # where sweeps ran, then the page; recorded runs of other sweeps are kept
    python -m bench.study.page             # the page again, from the record

results.json:

    about   recipe, device, versions, git, rows of each split; of the test rows `sets` and `targets` (a letter a row,
            in the order of SETS and of the files) and `group` (rows about one text, finlora/data/groups.py)
    runs    a line for each evaluated run: sweep, changes (of the recipe, by the sweep), seed, prompt (of the test),
            right (by scoring: the test rows that it has right, as bits in hexadecimal), loss (validation), seconds
            (of training), trainable (parameters); the base model's has no seed
    means   a line for each setting: sweep, label, method, prompt, seeds, mean, low, high (95%, over seeds and rows),
            best_rate (whether its learning rate is the method's best by validation loss)

Comparisons are paired on the same seeds and rows (finlora/sweep/seeds.py) and Holm-adjusted within a question.
"""

import argparse
import itertools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from bench.study import full
from bench.study.rows import OUT, RECIPE, SETS
from finlora.core.errors import UserError, run
from finlora.core.files import read_json, write_text
from finlora.core.paths import ROOT
from finlora.evaluate.compare import join
from finlora.evaluate.results import read
from finlora.evaluate.scorers import Items
from finlora.recipes.bases import shape, trainable_parameters
from finlora.recipes.names import method_of
from finlora.sweep.points import plan
from finlora.sweep.seeds import Mean, mean_score, paired_over_seeds

HERE = Path(__file__).parent
RECORD, PAGE, TEMPLATE = HERE / "results.json", ROOT / "docs" / "dora.md", HERE / "dora.md.jinja"
SWEEPS = ("methods", "ranks", "bits", "magnitude", "confounds", "prompt")
PROMPTS = ("saved", "raw")  # of the test; all but the sweep `prompt` are tested with the trained one
LEARNING_RATE = 0.001  # of the recipe, which the other questions keep
SCORINGS = ("read", "finlora", "strict")  # the first is the one that is compared
NAMES = {"full": "full fine-tuning", "lora": "LoRA", "dora": "DoRA", "rslora": "rsLoRA"}
LEVEL = 0.95


@dataclass(frozen=True)
class Setting:
    """The runs of one setting that were tested with one prompt, by their seed."""

    sweep: str
    changes: dict[str, Any]
    prompt: str
    runs: dict[int | None, dict[str, Any]] = field(default_factory=dict)

    def items(self, about: dict[str, Any], scoring: str = SCORINGS[0]) -> dict[int | None, Items]:
        return {seed: items(one["right"][scoring], about) for seed, one in self.runs.items()}

    def score(self, about: dict[str, Any], scoring: str = SCORINGS[0]) -> Mean:
        return mean_score(list(self.items(about, scoring).values()), LEVEL)

    def mean(self, figure: str) -> float:
        return float(np.mean([one[figure] for one in self.runs.values()]))


def record() -> dict[str, Any]:
    """What the sweeps' folders hold: `about` and `runs`. UserError where nothing is evaluated there."""
    recipe = OUT / f"{RECIPE}.yaml"
    runs, about = [], {}
    for sweep in SWEEPS:
        points = plan(recipe, HERE / f"{sweep}.yaml")
        folder = (ROOT / points[0].recipe["output_dir"]).parent
        try:
            models, warnings = read(folder / "results")
        except UserError:  # nothing of this sweep is evaluated yet
            continue
        print(*warnings, sep="\n")
        for point in points:
            trained = read_json(folder / point.name / "run.json")
            changes = {key: value for key, value in point.changes.items() if key != "seed"}
            for prompt in PROMPTS:
                model = models.get(point.name + f"-{prompt}" * (prompt != "saved"))
                if not (trained and model and set(SETS) <= model.sets.keys()):
                    continue
                right, about = answers_of(model.sets, about)
                parameters = trainable_parameters(point.recipe, shape(point.recipe["base_model"]))
                figures = {"loss": trained["metrics"]["final_eval_loss"], "seconds": trained["metrics"]["seconds"]}
                about |= {key: trained[key] for key in ("device", "versions", "git")}
                entry = {"sweep": sweep, "changes": changes, "seed": point.recipe["seed"], "prompt": prompt}
                runs.append(entry | {"right": right, "trainable": parameters} | figures)
        if sweep == "methods":
            beside, about = others(folder, models, about)
            runs += beside
    if not runs:
        raise UserError(f"{HERE / 'README.md'}: no run of the study is evaluated here; it says how to make them")
    counts = {name: sum(1 for _ in (OUT / f"{name}.jsonl").open()) for name in ("train", "validation")}
    about |= {"recipe": RECIPE, "rows": counts | {"test": len(about["sets"])}}
    return {"about": about, "runs": runs}


def with_recorded(found: dict[str, Any]) -> dict[str, Any]:
    """What was found, and of the record the runs of sweeps that are not here. UserError where their rows differ."""
    if not RECORD.is_file():
        return found
    before = json.loads(RECORD.read_text(encoding="utf-8"))
    if any(before["about"][key] != found["about"][key] for key in ("sets", "targets", "group")):
        raise UserError(f"{RECORD}: its runs were tested on other rows; remove it to record all sweeps anew")
    here = {one["sweep"] for one in found["runs"]}
    kept = [one for one in before["runs"] if one["sweep"] not in here]
    order = ["base", "full", *SWEEPS]
    runs = sorted(kept + found["runs"], key=lambda one: order.index(one["sweep"]))
    return {"about": found["about"], "runs": runs}


def with_means(found: dict[str, Any]) -> dict[str, Any]:
    """The record with a line for each setting, which pictures are drawn from."""
    every = settings(found)
    chosen = best(one for one in every if one.sweep in ("methods", "full")).values()
    means = [
        {"sweep": one.sweep, "label": label(one), "method": method(one), "prompt": one.prompt, "seeds": len(one.runs)}
        | {key: round(value, 5) for key, value in zip(("mean", "low", "high"), one.score(found["about"]), strict=True)}
        | {"best_rate": one in chosen}
        for one in every
    ]
    return {"about": found["about"], "runs": found["runs"], "means": means}


def text_of(found: dict[str, Any]) -> str:
    """JSON with a line for each run and each mean."""
    runs, means = (",\n ".join(map(json.dumps, found[key])) for key in ("runs", "means"))
    return f'{{"about": {json.dumps(found["about"])},\n"runs": [\n {runs}],\n"means": [\n {means}]}}\n'


def others(folder: Path, models: dict[str, Any], about: dict[str, Any]) -> tuple[list[dict], dict[str, Any]]:
    """The base model's answers, and the runs of bench/study/full.py."""
    runs = []
    for name in sorted(
        models.keys() & {"base", *(full.name(*one) for one in itertools.product(full.RATES, full.SEEDS))}
    ):
        right, about = answers_of(models[name].sets, about)
        entry = {"sweep": "base", "changes": {}, "seed": None, "prompt": "saved", "right": right}
        if name != "base":
            log = (folder / name / "log").read_text(encoding="utf-8", errors="replace")
            _, rate, seed = re.split(r"\.learning_rate-|\.seed-", name)
            entry |= {"sweep": "full", "changes": {"learning_rate": float(rate)}, "seed": int(seed)}
            for key, logged in (("loss", "eval_loss"), ("seconds", "train_runtime")):
                entry[key] = float(re.findall(rf"'{logged}': '([\d.]+)'", log)[-1])
        runs.append(entry)
    return runs, about


def answers_of(sets: dict[str, Any], about: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """The rows that a model has right by scoring, and `about` with what the test rows are."""
    right = {}
    for scoring in SCORINGS:
        (together,) = join([(sets[name].items("published", scoring),) for name in SETS])
        right[scoring] = np.packbits(np.array(together["right"], bool)).tobytes().hex()
    rows = {"sets": "".join(name[1] * len(sets[name].rows) for name in SETS), "group": together["group"]}
    rows["targets"] = "".join(target[2] for target in together["target"])  # g, u, s
    if not rows.items() <= (about or rows).items():
        raise UserError("the runs were not tested on the same rows; run the sweeps anew")
    return right, about | rows


def items(right: str, about: dict[str, Any]) -> Items:
    rows = len(about["group"])
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(right), np.uint8), count=rows)
    return {"row": list(range(rows)), "group": about["group"], "right": bits.astype(float).tolist()}


def settings(found: dict[str, Any]) -> list[Setting]:
    by_key: dict[str, Setting] = {}
    for one in found["runs"]:
        key = json.dumps([one["sweep"], one["changes"], one["prompt"]])
        by_key.setdefault(key, Setting(one["sweep"], one["changes"], one["prompt"])).runs[one["seed"]] = one
    return list(by_key.values())


def method(setting: Setting) -> str:
    known = setting.sweep if setting.sweep in ("base", "full") else None
    return known or method_of({"peft_use_dora": True} | setting.changes)


def label(setting: Setting) -> str:
    """What a setting differs by, in words."""
    changes = setting.changes
    if setting.sweep == "base":
        return "base model"
    if setting.sweep == "bits":
        return (
            "4 bits" if changes["load_in_4bit"] else "8 bits, float8 matmuls" if "fastdora_fp8" in changes else "8 bits"
        )
    if setting.sweep == "magnitude":
        rate = changes["lr_groups"][0]["lr"]
        return f"magnitude at {rate:g}" if rate else "magnitude frozen"
    if setting.sweep == "confounds":
        words = {"lora_alpha": "alpha 32, dropout 0.1", "sequence_len": "a quarter of the batch"}
        if "datasets" in changes:
            file = Path(changes["datasets"][0]["path"]).stem
            return {"third": "a third of the rows", "published_labels": "TFNS's exchanged labels"}[file]
        return ", ".join(text for key, text in words.items() if key in changes)
    parts = [NAMES[method(setting)]]
    parts += [f"rank {changes['lora_r']}"] if "lora_r" in changes else []
    parts += [f"learning rate {changes['learning_rate']:g}"] if "learning_rate" in changes else []
    parts += (
        [f"[INST] → {'bare context' if setting.prompt == 'raw' else '[INST]'}"] if setting.sweep == "prompt" else []
    )
    return ", ".join(parts)


@dataclass(frozen=True)
class Comparison:
    a: Setting
    b: Setting
    difference: dict[str, Any]  # finlora.sweep.seeds.paired_over_seeds
    p_adjusted: float

    @property
    def distinguishable(self) -> bool:
        return self.p_adjusted < 1 - LEVEL


def compare(pairs: Iterable[tuple[Setting, Setting]], about: dict[str, Any]) -> list[Comparison]:
    """b from a, each pair on the seeds that both have, Holm-adjusted together."""
    differences = []
    for a, b in (pairs := list(pairs)):
        of_a, of_b = a.items(about), b.items(about)
        common = [seed for seed in of_a if seed in of_b]
        if len(common) < 2:
            raise UserError(f"{label(b)} and {label(a)} have not two seeds in common; finish the sweep {b.sweep}")
        differences.append(paired_over_seeds([of_a[seed] for seed in common], [of_b[seed] for seed in common], LEVEL))
    adjusted = holm([one["p"] for one in differences])
    return [Comparison(*pair, one, float(p)) for pair, one, p in zip(pairs, differences, adjusted, strict=True)]


def holm(values: list[float]) -> list[float]:
    """Holm's adjusted p values, in the order of `values`."""
    order = np.argsort(values)
    adjusted = np.maximum.accumulate(np.array(values)[order] * np.arange(len(values), 0, -1))
    return np.minimum(1, adjusted)[np.argsort(order)].tolist()


def best(settings: Iterable[Setting]) -> dict[str, Setting]:
    """Of each method the setting with the lowest validation loss."""
    by_method: dict[str, Setting] = {}
    for one in sorted(settings, key=lambda one: one.mean("loss")):
        by_method.setdefault(method(one), one)
    return by_method


def pairs_of(sweep: str, by_sweep: dict[str, list[Setting]]) -> list[tuple[Setting, Setting]]:
    """(reference, setting) of each comparison that a question makes."""
    plain = {method(one): one for one in by_sweep["methods"] if one.changes["learning_rate"] == LEARNING_RATE}
    asked = by_sweep.get(sweep, [])
    if sweep == "methods":
        chosen = best(asked + by_sweep.get("full", []))
        return [(chosen[a], chosen[b]) for a, b in itertools.combinations(NAMES, 2) if {a, b} <= chosen.keys()]
    if sweep == "ranks":
        lora = {one.changes["lora_r"]: one for one in asked if method(one) == "lora"}
        other_methods = [(lora[one.changes["lora_r"]], one) for one in asked if method(one) != "lora"]
        return other_methods + [(plain[method(one)], one) for one in asked]
    if sweep == "prompt":
        trained = {method(one): one for one in asked if one.prompt == "saved"}
        return [(trained[method(one)] if one.prompt == "raw" else plain[method(one)], one) for one in asked]
    return [(plain["dora"], one) for one in asked]


def page(found: dict[str, Any]) -> str:
    about = found["about"]
    by_sweep: dict[str, list[Setting]] = {}
    for one in settings(found):
        by_sweep.setdefault(one.sweep, []).append(one)
    compared = {sweep: compare(pairs_of(sweep, by_sweep), about) for sweep in SWEEPS if sweep in by_sweep}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    usual = max(map(about["targets"].count, set(about["targets"]))) / len(about["targets"])
    return environment.get_template(TEMPLATE.name).render(
        about=about,
        runs=sum(one["seed"] is not None and one["prompt"] == "saved" for one in found["runs"]),  # that were trained
        usual=f"{100 * usual:.1f}",
        rates=rates_table(by_sweep["methods"] + by_sweep.get("full", [])),
        scores={sweep: scores_table(asked, about) for sweep, asked in by_sweep.items()},
        differences={sweep: differences_table(comparisons) for sweep, comparisons in compared.items()},
        comparisons=sum(map(len, compared.values())),
        distinguishable=sum(one.distinguishable for all in compared.values() for one in all),
    )


def rates_table(settings: list[Setting]) -> str:
    """Validation loss by method and learning rate; the lowest of each method is bold."""
    columns = sorted({one.changes["learning_rate"] for one in settings})
    lines = ["| | " + " | ".join(f"{rate:g}" for rate in columns) + " |", "| --- |" + " --- |" * len(columns)]
    chosen = best(settings)
    for name in sorted(chosen, key=list(NAMES).index):
        of_rate = {one.changes["learning_rate"]: one for one in settings if method(one) == name}
        cells = ["" if rate not in of_rate else f"{of_rate[rate].mean('loss'):.4f}" for rate in columns]
        cells[columns.index(chosen[name].changes["learning_rate"])] += " **best**"
        lines.append(f"| {NAMES[name]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def scores_table(settings: list[Setting], about: dict[str, Any]) -> str:
    lines = ["| | seeds | right % | 95% interval | by FinLoRA's rule | strict | trainable |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for one in settings:
        score = one.score(about)
        others = " | ".join(f"{100 * one.score(about, scoring).accuracy:.1f}" for scoring in SCORINGS[1:])
        interval = f"{100 * score.low:.1f} to {100 * score.high:.1f}"
        trainable = f"{next(iter(one.runs.values())).get('trainable', 0):,}"
        lines.append(
            f"| {label(one)} | {len(one.runs)} | {100 * score.accuracy:.1f} | {interval} | {others} | {trainable} |"
        )
    return "\n".join(lines)


def differences_table(comparisons: list[Comparison]) -> str:
    lines = ["| | difference, points | 95% interval | p, Holm | distinguishable |", "| --- | --- | --- | --- | --- |"]
    for one in comparisons:
        low, high = 100 * one.difference["low"], 100 * one.difference["high"]
        cells = f"{100 * one.difference['difference']:+.1f} | {low:+.1f} to {high:+.1f} | {one.p_adjusted:.3f}"
        lines.append(
            f"| {label(one.b)} against {label(one.a)} | {cells} | {'**yes**' if one.distinguishable else 'no'} |"
        )
    return "\n".join(lines)


def main(recording: bool) -> None:
    found = with_means(with_recorded(record()) if recording else json.loads(RECORD.read_text(encoding="utf-8")))
    write_text(RECORD, text_of(found))
    write_text(PAGE, page(found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="read the sweeps first")
    options = parser.parse_args()
    run(lambda: main(options.record))
