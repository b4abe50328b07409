"""The README's two plots, drawn from recorded results: docs/speed.svg and docs/scores.svg (`make pictures`).

Plain SVG: the same results give the same bytes, and nothing has to be installed. Colours read on light and on dark
pages, which GitHub does not tell a picture apart.
"""

import json
import math
import os
from html import escape
from pathlib import Path
from typing import Any

from finlora.core.errors import UserError
from finlora.core.files import replacing
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
GREY, COLOURS = "#777e88", {"dora": "#059669", "lora": "#2563eb", "rslora": "#d97706", "full": "#6b7280"}
WIDTH, TOP = 480, 82  # shown 400 wide, letters are 12 pixels


def speed(record: dict[str, Any]) -> str:
    """Bars of samples a second from finlora/plan/train_throughput.json. UserError where a run is not recorded."""
    rows = record["rows"]
    if missing := [name for name in RUNS if "samples_s" not in rows.get(name, {})]:
        raise UserError(f"{SPEED}: has no {missing[0]}; run python -m bench.train_throughput --runs {missing[0]}")
    rates = {name: rows[name]["samples_s"] for name in RUNS}
    left, right, y, body, bits = 164, WIDTH - 120, TOP, [], "finlora"
    for name, rate in rates.items():
        if not name.startswith(bits):
            y, bits = y + 8, name.partition("_")[0]
        wide = max(2, rate / max(rates.values()) * (right - left))
        times = "" if name == "finlora" else f" ({rate / rates['finlora']:.1f}×)"
        body += [
            f'<text x="{left - 10}" y="{y + 17}" text-anchor="end">{RUNS[name]}</text>',
            f'<rect x="{left}" y="{y}" width="{wide:.1f}" height="23" rx="2" fill="{_colour(name)}"/>',
            f'<text x="{left + wide + 7:.1f}" y="{y + 17}">{_rate(rate)}{times}</text>',
        ]
        y += 28
    device = record["device"].removeprefix("NVIDIA ")
    about = [
        "the shape of Llama-3.1-8B, FPB, FiQA and TFNS prompts,",
        f"one {device}; FinLoRA's settings are 8-bit DoRA",
    ]
    return _svg("Samples a second in training", about, y + 4, body)


def scores(record: dict[str, Any]) -> str:
    """Means with 95% intervals from bench/dora_study.json: methods at equal budget, and the published prompts."""
    cells = list(record["questions"].get("methods", []))
    cells += [cell for cell in record["questions"].get("prompt", []) if cell["prompt"] != "llama3"]
    if not cells:
        raise UserError(f"{SCORES}: has no scores of methods; run python -m bench.dora_study")
    left, right, step = 30, WIDTH - 84, 44
    low, high = min(cell["low"] for cell in cells), max(cell["high"] for cell in cells)
    unit = next(unit for unit in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if (high - low) / unit <= 6)
    first, last = math.floor(low / unit), max(math.ceil(high / unit), math.floor(low / unit) + 1)

    def place(value: float) -> str:
        return f"{left + (value / unit - first) / (last - first) * (right - left):.1f}"

    bottom, body = TOP + step * len(cells), []
    for tick in range(first, last + 1):
        x = place(tick * unit)
        body.append(f'<path d="M{x} {TOP - 6}V{bottom}" stroke="{GREY}" stroke-opacity="0.35"/>')
        body.append(f'<text x="{x}" y="{bottom + 18}" text-anchor="middle">{100 * tick * unit:.0f}%</text>')
    for number, cell in enumerate(cells):
        y, colour, label = TOP + step * number, COLOURS[cell["method"]], cell["label"].replace("`", "")
        count = len(cell["seeds"])
        seeds = f'<tspan class="s">{count} seed{"s" * (count > 1)}</tspan>'
        span = f"M{place(cell['low'])} {y + 27}H{place(cell['high'])}"
        body += [
            f'<text x="{left}" y="{y + 14}">{escape(label)} {seeds}</text>',
            f'<path d="{span}" stroke="{colour}" stroke-width="4"/>',
            f'<circle cx="{place(cell["mean"])}" cy="{y + 27}" r="6" fill="{colour}"/>',
            f'<text x="{right + 18}" y="{y + 32}">{100 * cell["mean"]:.1f}%</text>',
        ]
    about = ["a small Llama, test rows of FPB, FiQA and TFNS; means and", "95% intervals over seeds and rows"]
    if any("→" in cell["label"] for cell in cells):
        about[1] += "; prompt in training → in testing"
    return _svg("Right answers on held-out rows", about, bottom + 28, body)


def _colour(name: str) -> str:
    return COLOURS.get(name.partition("_")[2], GREY)


def _rate(rate: float) -> str:
    return f"{rate:.1f}" if rate < 10 else f"{rate:.0f}"


def _svg(title: str, about: list[str], height: int, body: list[str]) -> str:
    style = (
        f"text{{font:15px system-ui,sans-serif;fill:{GREY}}}.t{{font-size:18px;font-weight:600}}.s{{font-size:13px}}"
    )
    said = [escape(line) for line in (title, *about)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img">\n'
        f"<title>{said[0]}: {' '.join(said[1:])}</title>\n<style>{style}</style>\n"
        f'<text class="t" x="16" y="24">{said[0]}</text>\n<text class="s" x="16" y="46">{said[1]}</text>\n'
        f'<text class="s" x="16" y="64">{said[2]}</text>\n' + "\n".join(body) + "\n</svg>\n"
    )


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
