"""The README's two plots, drawn from recorded results: docs/speed.svg and docs/scores.svg (`make pictures`).

The same results give the same bytes.
"""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from finlora.core.errors import UserError
from finlora.core.files import write_text
from finlora.core.html import render
from finlora.core.paths import ROOT
from finlora.core.plot import Axis, Point

SPEED, SCORES = Path(__file__).with_name("train_throughput.json"), ROOT / "bench" / "study" / "results.json"
FOLDER = ROOT / "docs"
# Which recorded runs are compared: equal rows, packs and targets, no gradient checkpointing; the first is FinLoRA's.
RUNS = {
    "finlora": "FinLoRA's settings",
    "8bit_dora": "8-bit DoRA",
    "8bit_lora": "8-bit LoRA",
    "bf16_dora": "16-bit DoRA",
    "bf16_lora": "16-bit LoRA",
    "4bit_dora": "4-bit DoRA",
    "4bit_lora": "4-bit LoRA",
}
COLOURS = {"dora": "#059669", "lora": "#2563eb", "rslora": "#d97706", "full": "#6b7280", "finlora": "#777e88"}


class Row(NamedTuple):
    name: str
    small: str
    value: str
    point: Point


def speed(record: dict[str, Any]) -> str:
    """Bars of samples a second from finlora/plan/train_throughput.json. UserError where a run is not recorded."""
    runs = record["rows"]
    if missing := [name for name in RUNS if "samples_s" not in runs.get(name, {})]:
        raise UserError(f"{SPEED}: has no {missing[0]}; run python -m bench.train_throughput --runs {missing[0]}")
    rows = []
    for name, label in RUNS.items():
        samples, times = runs[name]["samples_s"], runs[name]["samples_s"] / runs["finlora"]["samples_s"]
        value = per_second(samples) + (f" ({times:.1f}×)" if name != "finlora" else "")
        rows.append(Row(label, "", value, Point(samples, kind=name.rpartition("_")[2])))
    about = [
        "the shape of Llama-3.1-8B, FPB, FiQA and TFNS prompts,",
        f"one {record['device'].removeprefix('NVIDIA ')}; FinLoRA's settings are 8-bit DoRA",
    ]
    return picture("Samples a second in training", about, rows, Axis(0, max(row.point.y for row in rows), []), True)


def scores(record: dict[str, Any]) -> str:
    """Means with 95% intervals from bench/study/results.json: each method at its best rate, prompts, and confounds."""
    cells = [cell for cell in record["means"] if cell["best_rate"] or cell["sweep"] in ("prompt", "confounds")]
    if not cells:
        raise UserError(f"{SCORES}: has no scores; run bench/study/run.sh")
    about = ["SmolLM2-135M, test rows of FPB, FiQA and TFNS; means and", "95% intervals over seeds and rows"]
    if any("→" in cell["label"] for cell in cells):
        about[1] += "; prompt in training → in testing"
    rows = []
    for cell in cells:
        mean, low, high = (100 * cell[key] for key in ("mean", "low", "high"))
        point = Point(mean, low=low, high=high, kind=cell["method"])
        rows.append(Row(cell["label"], f"{cell['seeds']} seed{'s' * (cell['seeds'] > 1)}", f"{mean:.1f}%", point))
    axis = Axis.around((end for row in rows for end in (row.point.low, row.point.high)), "{:g}%")
    return picture("Right answers on held-out rows", about, rows, axis, False)


def picture(title: str, about: list[str], rows: list[Row], axis: Axis, bars: bool) -> str:
    return render("plan/picture.svg.jinja", title=title, about=about, rows=rows, axis=axis, bars=bars, colours=COLOURS)


def per_second(samples: float) -> str:
    return f"{samples:.1f}" if samples < 10 else f"{samples:.0f}"


def draw() -> dict[Path, str]:
    """Each picture whose results are recorded, by its file."""
    drawn = {}
    for name, source, draw_record in (("speed.svg", SPEED, speed), ("scores.svg", SCORES, scores)):
        if source.is_file():
            try:
                drawn[FOLDER / name] = draw_record(json.loads(source.read_text(encoding="utf-8")))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{source}: is not a recorded result ({error!r}); restore it from git") from error
    return drawn


def run() -> None:
    """Draw what is recorded, and say what is not."""
    for path, text in draw().items():
        write_text(path, text)
        print(path.relative_to(ROOT))
    for what, source, maker in (
        ("speed", SPEED, "bench.train_throughput"),
        ("scores", SCORES, "bench.study.page --record"),
    ):
        if not source.is_file():
            print(f"no {what}: {os.path.relpath(source, ROOT)} is not there; python -m {maker} makes it")
