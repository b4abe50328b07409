"""The README's two plots, drawn from recorded results: docs/speed.svg and docs/scores.svg (`make pictures`).

Plain SVG: the same results give the same bytes, and nothing has to be installed. Colours read on light and on dark
pages, which GitHub does not tell a picture apart.
"""

import json
import os
from pathlib import Path
from typing import Any

from finlora.core import html
from finlora.core.errors import UserError
from finlora.core.files import replacing
from finlora.core.html import Axis, Point, Row
from finlora.core.paths import ROOT

SPEED, SCORES = Path(__file__).with_name("train_throughput.json"), ROOT / "bench" / "dora_study.json"
FOLDER = ROOT / "docs"
# Which recorded runs are compared: equal rows, packs and targets, and nothing recomputed; the first one is FinLoRA's.
RUNS = {
    "finlora": "FinLoRA's settings",
    "8bit_dora": "8-bit DoRA",
    "8bit_lora": "8-bit LoRA",
    "bf16_dora": "16-bit DoRA",
    "bf16_lora": "16-bit LoRA",
    "4bit_dora": "4-bit DoRA",
    "4bit_lora": "4-bit LoRA",
}
GREY = "#777e88"
COLOURS = {"dora": "#059669", "lora": "#2563eb", "rslora": "#d97706", "full": "#6b7280", "grey": GREY}
TOP = 82  # below the title and two lines


def speed(record: dict[str, Any]) -> str:
    """Bars of samples a second from finlora/plan/train_throughput.json. UserError where a run is not recorded."""
    rows = record["rows"]
    if missing := [name for name in RUNS if "samples_s" not in rows.get(name, {})]:
        raise UserError(f"{SPEED}: has no {missing[0]}; run python -m bench.train_throughput --runs {missing[0]}")
    throughput = {name: rows[name]["samples_s"] for name in RUNS}
    bars = []
    for name, samples in throughput.items():
        times = "" if name == "finlora" else f" ({samples / throughput['finlora']:.1f}×)"
        colour, gap = name.partition("_")[2] or "grey", not name.endswith("_dora")  # DoRA and LoRA in pairs
        bars.append(Row(RUNS[name], [Point(samples)], _per_second(samples) + times, "", colour, bar=True, gap=gap))
    body, height = html.rows_plot(bars, Axis(0, max(throughput.values()), []), TOP)
    device = record["device"].removeprefix("NVIDIA ")
    about = [
        "the shape of Llama-3.1-8B, FPB, FiQA and TFNS prompts,",
        f"one {device}; FinLoRA's settings are 8-bit DoRA",
    ]
    return html.picture("Samples a second in training", about, body, height, COLOURS, GREY)


def scores(record: dict[str, Any]) -> str:
    """Means with 95% intervals from bench/dora_study.json: methods at equal budget, and the published prompts."""
    cells = list(record["questions"].get("methods", []))
    cells += [cell for cell in record["questions"].get("prompt", []) if cell["prompt"] != "llama3"]
    if not cells:
        raise UserError(f"{SCORES}: has no scores of methods; run python -m bench.dora_study")
    rows = []
    for cell in cells:
        seeds = f"{len(cell['seeds'])} seed{'s' * (len(cell['seeds']) > 1)}"
        point = Point(cell["mean"], cell["low"], cell["high"])
        rows.append(Row(cell["label"].replace("`", ""), [point], f"{100 * cell['mean']:.1f}%", seeds, cell["method"]))
    axis = Axis.around([cell[end] for cell in cells for end in ("low", "high")], "{:g}%", 100)
    body, height = html.rows_plot(rows, axis, TOP)
    about = ["a small Llama, test rows of FPB, FiQA and TFNS; means and", "95% intervals over seeds and rows"]
    if any("→" in cell["label"] for cell in cells):
        about[1] += "; prompt in training → in testing"
    return html.picture("Right answers on held-out rows", about, body, height, COLOURS, GREY)


def _per_second(samples: float) -> str:
    return f"{samples:.1f}" if samples < 10 else f"{samples:.0f}"


def draw() -> dict[Path, str]:
    """Each picture whose results are recorded, by its file."""
    drawn = {}
    for name, source, picture in (("speed.svg", SPEED, speed), ("scores.svg", SCORES, scores)):
        if source.is_file():
            try:
                record = json.loads(source.read_text(encoding="utf-8"))
                drawn[FOLDER / name] = picture(record)
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{source}: is not a recorded result ({error!r}); restore it from git") from error
    return drawn


def run() -> None:
    """Draw what is recorded, and say what is not."""
    for path, text in draw().items():
        with replacing(path) as file:
            file.write(text)
        print(path.relative_to(ROOT))
    for what, source, maker in (("speed", SPEED, "bench.train_throughput"), ("scores", SCORES, "bench.dora_study")):
        if not source.is_file():
            print(f"no {what}: {os.path.relpath(source, ROOT)} is not there; python -m {maker} makes it")
