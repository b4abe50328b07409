"""Do shared prefixes cost score? Rows whole against shared, with three limits of rows a prefix, on two or three tasks.

    python -m bench.study.sharing rows [--data data/raw]      # rows and recipes, from FinLoRA's files and bench/rows.py
    python -m bench.study.sharing run [--gpus 2]              # train and evaluate; the same command resumes it
    python -m bench.study.sharing record                      # bench/study/sharing.json from the sweeps, and the table
    python -m bench.study.sharing table                       # the table of fastdora/README.md again, from the record

Sentiment has the study's rows. FiNER's are the 501 of FinLoRA's
earlier file, which all begin with one list of tags. Questions on filings are made (bench/rows.py), 20 on each filing to
train and 5 on each of others to test. Every arm of a task has about as many rows a step (sharing/<task>.yaml).
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.rows import Row, read_rows, write_rows, write_tests
from bench.study import rows as study
from bench.study.rows import OUT
from finlora.core.errors import UserError, run
from finlora.core.files import read_json, write_text
from finlora.core.paths import RAW, ROOT, shown
from finlora.data.groups import row_groups
from finlora.evaluate.compare import join
from finlora.evaluate.results import read
from finlora.evaluate.scorers import Items
from finlora.recipes.names import parse_name
from finlora.recipes.new import draft, with_value
from finlora.sweep.points import plan
from finlora.sweep.seeds import Mean, mean_score, paired_over_seeds

HERE = Path(__file__).parent
RECORD, README = HERE / "sharing.json", ROOT / "fastdora" / "README.md"
BEGIN, END = "<!-- The table of `python -m bench.study.sharing table`. -->\n\n", "\n\n<!-- Its end. -->"
FILINGS, QUESTIONS = (20, 2, 32), (20, 20, 5)  # to train, validate and test, and the questions that are kept of each
FINER = (340, 41, 120)  # rows to train, validate and test


class Task(NamedTuple):
    recipe: str
    sets: tuple[str, ...]
    folder: Path  # of its rows, its recipe and its test sets


TASKS = {
    "sentiment": Task(study.RECIPE, study.SETS, OUT),
    "filings": Task("xbrl_extract_smollm2_bf16_r8_dora", ("xbrl_extract_tags",), OUT / "filings"),
    "finer": Task("finer_smollm2_bf16_r8_dora", ("finer",), OUT / "finer"),
}


def make(data: Path) -> None:
    """Write rows and recipes of the tasks into data/study. UserError where a file of FinLoRA's is missing."""
    study.make(data, OUT)
    filings: dict[str, list[Row]] = {}
    for row in read_rows("tags_made_20", rows=20 * sum(FILINGS)):
        filings.setdefault(row[0].partition("</>\n")[0], []).append(row)
    of_filing = iter(filings.values())
    parts = [
        [row for _ in range(number) for row in next(of_filing)[:kept]]
        for number, kept in zip(FILINGS, QUESTIONS, strict=True)
    ]
    write("filings", "tags_made", parts)
    rows = read_rows("finer", data)
    groups = row_groups([context for context, _ in rows])
    rows = [row for _, row in sorted(zip(groups, rows, strict=True), key=lambda one: one[0])]  # one text on one side
    edges = (0, FINER[0], FINER[0] + FINER[1], sum(FINER))
    write("finer", "finer_made", [rows[low:high] for low, high in zip(edges, edges[1:], strict=False)])


def write(task: str, kind: str, parts: list[list[Row]]) -> None:
    """The rows of the three parts, the recipe on them, and one validation an epoch."""
    train, validation, test = parts
    name, _, folder = TASKS[task]
    write_rows(train, folder / "train.jsonl")
    write_rows(validation, folder / "validation.jsonl")
    write_tests(kind, test, folder)
    text = draft(name)[1].replace(f"data/prepared/{parse_name(name)['task']}/", f"{shown(folder)}/")
    for key in ("evals_per_epoch", "saves_per_epoch"):
        text = with_value(text, key, 1)
    write_text(folder / f"{name}.yaml", text)
    print(f"{shown(folder)}: {len(train)} rows to train, {len(validation)} to validate, {len(test)} to test")


def train(only: list[str], gpus: int, at_a_time: int) -> None:
    """Train and evaluate the tasks by `finlora sweep`; UserError where a point failed."""
    failed = []
    for task in only:
        name, sets, folder = TASKS[task]
        command = [sys.executable, "-m", "finlora", "sweep", f"{folder}/{name}.yaml", f"{HERE}/sharing/{task}.yaml"]
        command += ["--eval", "--tasks", ",".join(sets), "--tests", str(folder)]
        command += ["--gpus", str(gpus), "--points-per-gpu", str(at_a_time)]
        failed += [task] if subprocess.run(command, cwd=ROOT).returncode else []
    if failed:
        raise UserError(f"{', '.join(failed)}: not every point ended; the same command goes on")


def record() -> dict[str, Any]:
    """What the sweeps' folders hold: of each task the test rows' items, and a line for each evaluated run."""
    found: dict[str, Any] = {"about": {}, "tasks": {}}
    for task, (name, sets, folder) in TASKS.items():
        points = plan(folder / f"{name}.yaml", HERE / "sharing" / f"{task}.yaml")
        results = (ROOT / points[0].recipe["output_dir"]).parent
        models, warnings = read(results / "results") if (results / "results").is_dir() else ({}, [])
        print(*warnings, sep="\n", end="")
        rows, runs = {}, []
        for point in points:
            trained, model = read_json(results / point.name / "run.json"), models.get(point.name)
            if not (trained and model and set(sets) <= model.sets.keys()):
                continue
            (items,) = join([(model.sets[one].items("published", "read"),) for one in sets])
            mine = {"row": items["row"], "group": items["group"]}
            if rows and mine != rows:
                raise UserError(f"{shown(results)}: {point.name} was tested on other rows; run the sweep anew")
            rows, metrics = mine, trained["metrics"]
            found["about"] |= {key: trained[key] for key in ("device", "versions", "git")}
            changes = {key: value for key, value in point.changes.items() if key != "seed"}
            figures = {"loss": metrics["final_eval_loss"], "rows": metrics["samples"], "steps": metrics["steps"]}
            right = np.packbits(np.array(items["right"], bool)).tobytes().hex()
            runs.append({"changes": changes, "seed": point.recipe["seed"], "right": right} | figures)
        if runs:
            found["tasks"][task] = rows | {"runs": runs}
    if not found["tasks"]:
        raise UserError(f"{HERE / 'README.md'}: no run is evaluated here; it says how to make them")
    return found


def text_of(found: dict[str, Any]) -> str:
    """JSON with a line for each run."""
    tasks = []
    for name, task in found["tasks"].items():
        runs = ",\n  ".join(map(json.dumps, task["runs"]))
        row, group = json.dumps(task["row"]), json.dumps(task["group"])
        tasks.append(f'"{name}": {{"row": {row},\n "group": {group},\n "runs": [\n  {runs}]}}')
    return f'{{"about": {json.dumps(found["about"])},\n"tasks": {{\n' + ",\n".join(tasks) + "}}\n"


class Arm(NamedTuple):
    """The runs of one way of making packs, and how far they are from those with whole rows, on the same seeds."""

    label: str
    runs: dict[int, dict[str, Any]]
    score: Mean
    difference: dict[str, Any] | None  # finlora.sweep.seeds.paired_over_seeds; None for whole rows themselves


def arms(task: dict[str, Any]) -> list[Arm]:
    by_label: dict[str, dict[int, dict[str, Any]]] = {}
    for one in task["runs"]:
        by_label.setdefault(label(one["changes"]), {})[one["seed"]] = one
    (whole, *_) = by_label.values()
    found = []
    for name, runs in by_label.items():
        seeds = [seed for seed in runs if seed in whole]
        difference = None
        if runs is not whole and len(seeds) > 1:
            pairs = [[items(task, of[seed]["right"]) for seed in seeds] for of in (whole, runs)]
            difference = paired_over_seeds(*pairs)
        found.append(Arm(name, runs, mean_score([items(task, one["right"]) for one in runs.values()]), difference))
    return found


def items(task: dict[str, Any], right: str) -> Items:
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(right), np.uint8), count=len(task["row"]))
    return {"row": task["row"], "group": task["group"], "right": bits.astype(float).tolist()}


def label(changes: dict[str, Any]) -> str:
    if not changes["fastdora_shared_prefixes"]:
        return "whole rows"
    limit = changes["fastdora_rows_per_prefix"]
    return f"shared, {limit} rows a prefix" if limit else "shared, drawn as if whole"


def table(found: dict[str, Any]) -> str:
    lines = ["| task | packs | rows a step | seeds | right % | from whole rows, points | 95% interval |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for name, task in found["tasks"].items():
        for arm in arms(task):
            one = next(iter(arm.runs.values()))
            cells = [name, arm.label, f"{one['rows'] / one['steps']:.0f}", str(len(arm.runs))]
            cells += [f"{100 * arm.score.accuracy:.1f}"]
            if arm.difference:
                difference, low, high = (100 * arm.difference[key] for key in ("difference", "low", "high"))
                cells += [f"{difference:+.1f}", f"{low:+.1f} to {high:+.1f}"]
            lines.append("| " + " | ".join(cells + [""] * (7 - len(cells))) + " |")
    return "\n".join(lines)


def write_table(found: dict[str, Any]) -> None:
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    write_text(README, f"{before}{BEGIN}{table(found)}{END}{rest.partition(END)[2]}")


def main(step: str, data: Path, tasks: str, gpus: int, at_a_time: int) -> None:
    if step == "rows":
        return make(data)
    if step == "run":
        return train(tasks.split(","), gpus, at_a_time)
    if step == "record":
        write_text(RECORD, text_of(record()))
    write_table(json.loads(RECORD.read_text(encoding="utf-8")))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["rows", "run", "record", "table"])
    parser.add_argument(
        "--data", type=Path, default=RAW, help="with test/fpb_test.jsonl and older/ as FinLoRA has them"
    )
    parser.add_argument("--tasks", default=",".join(TASKS), help="to run")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--at-a-time", type=int, default=14, help="points on each GPU")
    options = parser.parse_args()
    run(lambda: main(options.step, options.data.absolute(), options.tasks, options.gpus, options.at_a_time))
