"""The README's pictures are what the recorded results give, and nothing in them is cut off."""

import copy
import json
import shutil
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finlora import cli
from finlora.core.errors import UserError
from finlora.plan import pictures

RECORD = json.loads(pictures.SPEED.read_text(encoding="utf-8"))
SVG = "{http://www.w3.org/2000/svg}"


def test_the_committed_pictures_are_what_the_results_give():
    drawn = pictures.draw()
    assert pictures.FOLDER / "speed.svg" in drawn
    for path, text in drawn.items():
        assert path.is_file() and path.read_text(encoding="utf-8") == text, f"{path}: run `make pictures`"
    assert drawn == pictures.draw()


def length(text: str | None, whole: float, default: float = 0) -> float:
    if text is None:
        return default
    return float(text[:-1]) / 100 * whole if text.endswith("%") else float(text)


def check(picture: str) -> list[str]:
    """Well-formed, and every letter and mark inside the frame if it is as wide as in a wide font; the texts."""
    root = ElementTree.fromstring(picture)
    whole = float(root.get("viewBox").split()[2])
    texts = []

    def walk(element: ElementTree.Element, left: float, width: float) -> None:
        for child in element:
            start = left + length(child.get("x") or child.get("cx") or child.get("x1"), width)
            end = left + length(child.get("x2") or child.get("x") or child.get("cx"), width)
            if child.tag == f"{SVG}svg":
                walk(child, start, length(child.get("width"), width, width))
            elif child.tag == f"{SVG}text":
                text, size = "".join(child.itertext()), {"t": 18, "s": 13}.get(child.get("class"), 15)
                wide = len(text) * size * 0.56
                start -= wide * {"end": 1, "middle": 0.5}.get(child.get("text-anchor"), 0)
                assert 0 <= start and start + wide <= whole, text
                texts.append(text)
            elif child.tag == f"{SVG}rect":
                assert 0 < length(child.get("width"), width) <= width
            else:
                assert 0 <= start <= whole and 0 <= end <= whole, child.attrib
                walk(child, left, width)

    walk(root, 0, whole)
    return texts


@given(st.lists(st.floats(1, 999), min_size=len(pictures.RUNS), max_size=len(pictures.RUNS)), st.floats(0.5, 9))
def test_bars_of_any_rates(rates, finlora):
    record = copy.deepcopy(RECORD)
    for name, rate in zip(pictures.RUNS, [finlora, *(max(rate, finlora) for rate in rates[1:])], strict=True):
        record["rows"][name] = {"samples_s": rate}
    texts = check(pictures.speed(record))
    assert [text for text in texts if "×" in text][0].startswith(
        pictures.per_second(record["rows"]["8bit_dora"]["samples_s"])
    )
    assert texts.count("4-bit LoRA") == 1


CELL = st.builds(
    lambda values, method, seeds: (
        dict(zip(("low", "mean", "high"), sorted(values), strict=True))
        | {
            "label": f"{method}, trained on `[INST]` & <raw>",
            "method": method,
            "seeds": seeds,
            "sweep": "prompt",
            "best_rate": False,
        }
    ),
    st.lists(st.floats(0, 1), min_size=3, max_size=3),
    st.sampled_from(sorted(pictures.COLOURS)),
    st.integers(1, 8),
)


@given(st.lists(CELL, min_size=1, max_size=5), st.lists(CELL, max_size=3))
def test_intervals_of_any_scores(cells, others):
    others = [cell | {"sweep": "ranks"} for cell in others]
    texts = check(pictures.scores({"means": cells + others}))
    assert f"{100 * cells[0]['mean']:.1f}%" in texts
    assert sum(text.endswith((" seed", " seeds")) for text in texts) == len(cells)


def test_results_that_are_not_there(tmp_path, monkeypatch, capsys):
    record = copy.deepcopy(RECORD)
    record["rows"]["4bit_dora"] = {"failed": 1}
    with pytest.raises(UserError, match="4bit_dora.* bench.train_throughput --runs 4bit_dora"):
        pictures.speed(record)
    with pytest.raises(UserError, match="no scores.* bench/study/run.sh"):
        pictures.scores({"means": []})
    monkeypatch.setattr(pictures, "SPEED", tmp_path / "speed.json")
    monkeypatch.setattr(pictures, "SCORES", tmp_path / "scores.json")
    assert pictures.draw() == {}
    monkeypatch.setattr(sys, "argv", ["pictures"])
    cli.call(sys.argv)
    speed, scores = capsys.readouterr().out.splitlines()
    assert "speed.json" in speed and "python -m bench.train_throughput" in speed
    assert "scores.json" in scores and "python -m bench.study.page --record" in scores
    (tmp_path / "scores.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="scores.json: .*restore .* git"):
        pictures.draw()


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(not BROWSER, reason="no chromium or google-chrome on PATH: the pictures were not looked at")
def test_a_browser_draws_every_letter_inside_the_frame(tmp_path):
    """By its own fonts, at 400 pixels."""
    asks = """<script>let out = [];
    for (const svg of document.querySelectorAll("svg[viewBox]")) { const frame = svg.getBoundingClientRect();
      for (const text of svg.querySelectorAll("text")) { const box = text.getBoundingClientRect();
        if (box.left < frame.left || box.right > frame.right || box.bottom > frame.bottom || box.height < 11)
          out.push(text.textContent); } }
    document.title = "outside: " + out.join("|");</script>"""
    drawn = [text.replace(' width="480"', ' width="400"') for text in pictures.draw().values()]
    (tmp_path / "page.html").write_text(f"<!doctype html><title></title>{''.join(drawn)}{asks}", encoding="utf-8")
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
    ]
    command = [BROWSER, *options, (tmp_path / "page.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "<title>outside: </title>" in done.stdout, done.stdout[:300] + done.stderr[-300:]
