"""What `make demo DATA=` says of rows of one's own before anything is trained."""

import json
from pathlib import Path

import pytest
from failures import refuses

from finlora import demo
from finlora.data import prepare
from finlora.data.rows import read_rows

ANSWERS = {"negative": "sell it", "neutral": "hold it", "positive": "buy it"}


@pytest.fixture
def own(tmp_path: Path, monkeypatch):
    """Writes so many of the sample's rows to a file, with other answers where they are given."""
    monkeypatch.setattr(prepare, "PREPARED", tmp_path / "prepared")

    def write(count: int, answers: dict[str, str]) -> Path:
        path = tmp_path / "own.jsonl"
        rows = [
            {"context": row.context, "target": answers.get(row.target, row.target)} for row in read_rows(demo.HELD_OUT)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[:count]), encoding="utf-8")
        return path

    return write


def test_too_few_rows_are_refused(own):
    with refuses("own.jsonl", "6 rows", "few", "25"):
        demo.prepare_rows(own(6, {}))


def test_answers_that_the_prompt_does_not_have_are_told(own, capsys):
    held_out = demo.prepare_rows(own(100, ANSWERS))
    (line,) = capsys.readouterr().err.splitlines()
    assert "own.jsonl" in line and repr(held_out[0][1]) in line
    assert len(held_out) >= demo.FEWEST_HELD_OUT and {answer for _, answer in held_out} <= set(ANSWERS.values())
    demo.prepare_rows(own(100, {}))
    assert not capsys.readouterr().err
