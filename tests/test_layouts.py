"""The files that people have: each layout and kind of file gives the row that it means, or says which row is wrong."""

import gzip
import json
import re
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from failures import failed, refuses, says

from finlora.core.html import visible
from finlora.core.paths import ROOT
from finlora.data.layouts import Reading, Turn, parse_columns
from finlora.data.prepare import Options, prepare
from finlora.data.rows import preview, read_rows
from finlora.data.tokens import chat

QUESTION, ANSWER = "Is the loan safe?", "no"
USER, ASSISTANT = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}
CHAT = [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "yes"}, USER, ASSISTANT]
SHAREGPT = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
ALPACA = {"instruction": "Is the loan safe?", "input": "", "output": ANSWER}
WHOLE_PROMPT = "Below is an instruction.\n\n### Instruction:\nJudge.\n\n### Input:\nThe loan.\n\n### Response:\nno"
ONE = [("system", "Be brief."), ("user", QUESTION), ("assistant", ANSWER)]
PLAIN = ONE[1:]


def lines(*rows: dict) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(columns: dict, features: dict | None = None) -> bytes:
    table = pa.table(columns)
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def zst(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


# The file's name and bytes, what maps its columns, and the turns of its first row.
CLASSES = {
    "sentence": {"dtype": "string", "_type": "Value"},
    "label": {"names": ["yes", "no"], "_type": "ClassLabel"},
}
FILES = {
    "messages": ("a.jsonl", lines({"messages": [USER, ASSISTANT]}), None, PLAIN),
    "messages of several turns": (
        *("a.jsonl", lines({"messages": CHAT}), None),
        [(turn["role"], turn["content"]) for turn in CHAT],
    ),
    "messages in parts": (
        *(
            "a.jsonl",
            lines({"messages": [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}, ASSISTANT]}),
        ),
        *(None, PLAIN),
    ),
    "conversations": ("a.json", json.dumps([{"conversations": SHAREGPT}]).encode(), None, PLAIN),
    "conversations with a system prompt": (
        *("a.jsonl", lines({"conversations": SHAREGPT, "system": "Be brief."}), None, ONE),
    ),
    "Alpaca without an input": ("a.json", json.dumps([ALPACA], indent=1).encode(), None, PLAIN),
    "Alpaca with an input": (
        *("a.jsonl", lines({"instruction": "Judge.", "input": "The loan.", "output": ANSWER, "text": WHOLE_PROMPT})),
        *(None, [("user", "Judge.\nThe loan."), ("assistant", ANSWER)]),
    ),
    "prompt and completion": ("a.jsonl", lines({"prompt": QUESTION, "completion": ANSWER}), None, PLAIN),
    "prompt and completion of messages": (
        *("a.jsonl", lines({"prompt": [USER], "completion": [ASSISTANT]}), None, PLAIN),
    ),
    "JSON array": ("a.json", json.dumps([{"context": QUESTION, "target": ANSWER}]).encode(), None, PLAIN),
    "packed JSON array": (
        *("a.json.gz", gzip.compress(json.dumps([{"context": QUESTION, "target": ANSWER}]).encode()), None, PLAIN),
    ),
    "zstd": ("a.jsonl.zst", zst(lines({"context": QUESTION, "target": ANSWER})), None, PLAIN),
    "semicolons": ("a.csv", f"context;target\n{QUESTION};{ANSWER}\n".encode(), None, PLAIN),
    "tabs": ("a.tsv", f"context\ttarget\n{QUESTION}\t{ANSWER}\n".encode(), None, PLAIN),
    "Excel's sep= line": ("a.csv", f"\ufeffsep=;\r\ncontext;target\r\n{QUESTION};{ANSWER}\r\n".encode(), None, PLAIN),
    "mapped columns": (
        *("a.csv", f"id,question,answer\n1,{QUESTION},{ANSWER}\n".encode()),
        *("question=context,answer=target", PLAIN),
    ),
    "two columns mapped to the question": (
        *("a.csv", f"text,question,answer\nThe loan.,{QUESTION},{ANSWER}\n".encode()),
        *("text=context,question=context,answer=target", [("user", f"The loan.\n{QUESTION}"), ("assistant", ANSWER)]),
    ),
    "messages in a column of CSV": (
        *("a.csv", b'messages\n"' + json.dumps([USER, ASSISTANT]).replace('"', '""').encode() + b'"\n', None, PLAIN),
    ),
    "Parquet with classes": (
        *("a.parquet", parquet({"sentence": [QUESTION], "label": [1]}, CLASSES)),
        *("sentence=context,label=target", PLAIN),
    ),
    "Parquet with messages": ("a.parquet", parquet({"messages": [[USER, ASSISTANT]]}), None, PLAIN),
}


@pytest.mark.parametrize("case", FILES)
def test_each_file_gives_its_row(case, tmp_path):
    name, content, columns, turns = FILES[case]
    path = tmp_path / name
    path.write_bytes(content)
    (row,) = read_rows(path, parse_columns(columns))
    assert row.turns == turns


def test_all_frames_of_a_packed_file_are_read(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zst(lines({"context": "a b", "target": "c"})) + zst(lines({"context": "d e", "target": "f"})))
    assert [row[1:3] for row in read_rows(path)] == [("a b", "c"), ("d e", "f")]


def test_what_loses_nothing_is_taken_and_noted(tmp_path):
    for name, content, notes in (
        ("a.jsonl", b"\xef\xbb\xbf" + lines({"context": "a b", "target": "c"}) + b"\n \r\n", ["byte order", "blank"]),
        ("a.csv", b"sep=;\r\ncontext;target\r\na b;c\r\n\r\n;\r\n", ["semicolons", "blank"]),
    ):
        path, reading = tmp_path / name, Reading()
        path.write_bytes(content)
        assert [row[1:3] for row in read_rows(path, reading=reading)] == [("a b", "c")]
        assert len(reading.notes) == len(notes)
        assert all(word in note for word, note in zip(notes, reading.notes, strict=True))


SYSTEM = {"role": "system", "content": "Be brief."}
REFUSED = {
    "a tool's turn": (lines({"messages": [USER, {"role": "tool"}, ASSISTANT]}), 1, "turn 2", "'tool'", "remove"),
    "two questions": (lines({"messages": [USER, USER, ASSISTANT]}), 1, "turn 2", "user", "turns"),
    "a late system message": (lines({"messages": [USER, SYSTEM, ASSISTANT]}), 1, "turn 2", "system"),
    "no last answer": (lines({"messages": [USER, ASSISTANT, USER]}), 1, "answer", "trained", "remove"),
    "no answer at all": (lines({"messages": [SYSTEM]}), 1, "answer", "trained"),
    "no messages": (lines({"messages": []}), 1, "messages", "role"),
    "a call of a tool": (
        lines({"messages": [USER, ASSISTANT | {"tool_calls": [{"id": 1}]}]}), 1, "turn 2", "tool_calls", "lost",
    ),
    "a turn that is not to be trained": (
        lines({"messages": [USER, ASSISTANT | {"weight": 0}, USER, ASSISTANT]}), 1, "turn 2", "weight", "lost",
    ),
    "an empty answer": (lines({"messages": [USER, ASSISTANT, USER, ASSISTANT | {"content": ""}]}), 1, "turn 4"),
    "a picture": (
        lines({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT]}), 1, "turn 1", "text",
    ),
    "tools beside": (lines({"messages": [USER, ASSISTANT], "tools": [{"name": "f"}]}), 1, "tools", "lost"),
    "another layout later": (lines({"messages": [USER, ASSISTANT]}, ALPACA), 2, "messages", "--columns"),
    "a missing value as Alpaca's input": (lines(ALPACA | {"input": "nan"}), 1, "input", "missing", "remove"),
    "a history that is not read": (lines(ALPACA | {"history": [["a", "b"]]}), 1, "history", "lost"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_could_be_lost_stops_with_its_line(case, tmp_path):
    content, line, *words = REFUSED[case]
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with refuses(*words, file=path, line=line):
        list(read_rows(path))


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        (b'[{"context": "a", "target": "b"},\n {"context": "a" "target": "b"}]', 2, ["not JSON", "column 18"]),
        (b'[{"context": "a", "target": "b"}', 1, ["not JSON", "whole"]),
        (b'[{"context": "a b", "target": "b"}, 5]', 2, ["number", "object"]),
        (b'[{"context": "a b", "target": "b"}, {"context": "a b"}]', 2, ["target", "key"]),
        (b"[]", None, ["no rows", "whole"]),
    ],
)
def test_a_wrong_array_names_the_line_or_the_row(content, line, words, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with refuses(*words, file=path, line=line):
        list(read_rows(path))


def test_damaged_files_of_the_new_kinds(tmp_path):
    whole = zst(lines({"context": "a b", "target": "c"}) * 50)
    for name, content, words in (
        ("a.jsonl.zst", whole[:-4], ["zstd", "Truncated", "again"]),
        ("b.jsonl.zst", b"{}", ["not a zstd", ".zst off"]),
        ("c.jsonl", whole, ["zstd", ".zst to its name"]),
        ("d.parquet", parquet({"sentence": ["a b"], "label": [2]}, CLASSES), ["label", "2 classes"]),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with refuses(*words, file=path, line=1 if name.endswith("parquet") else None):
            list(read_rows(path, parse_columns("sentence=context,label=target") if "parquet" in name else None))


def test_a_mapping_that_means_nothing_is_refused(tmp_path):
    for text, words in (
        ("question", ["question=context"]),
        ("question=", ["known", "context"]),
        ("question=contxt", ["context?"]),
        ("a=context,a=target", ["question=context"]),
    ):
        with refuses(*words, key="--columns"):
            parse_columns(text)
    path = tmp_path / "a.csv"
    path.write_text("question,answer\na b,c\n")
    with refuses("column", "'question, answer'", "--columns", file=path, line=1, key="ask"):
        list(read_rows(path, parse_columns("ask=context,answer=target")))
    path.write_text("question,answer,note\na b,c,d\n")
    with refuses("system", "correct", file=path, line=1):
        list(read_rows(path, parse_columns("question=context,answer=target,note=system")))


def test_chats_are_prepared_whole_and_kept_apart_by_all_that_comes_before_the_answer(tmp_path):
    own = tmp_path / "own.jsonl"
    own.write_bytes(
        lines(*({"messages": [*CHAT[:2], ASSISTANT | {"content": f"w{n} " * 9}, *CHAT[3:]]} for n in range(12)))
    )
    record = prepare("cfa", out=tmp_path / "out", options=Options(file=str(own), any_label=True))
    rows = [json.loads(line)["messages"] for name in record.outputs for line in (tmp_path / "out" / name).open()]
    assert sorted(map(str, rows)) == sorted(str(json.loads(line)["messages"]) for line in own.open())
    assert record.sources[0].layout.startswith("OpenAI")


def test_the_layout_and_one_row_are_shown_before_anything_is_written(tmp_path):
    own, out = tmp_path / "own.csv", tmp_path / "out"
    own.write_text("id;question;answer\n1;What is it?;A\n2;And then?;Z\n")
    command = [sys.executable, "-m", "finlora", "data", "cfa", "--file", own, "--out", out]
    command += ["--columns", "question=context,answer=target"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    failed(done, "'Z'", "--any-label", file=own, line=3)
    first, *rest = done.stdout.splitlines()
    says(first, "context and target", "question as context", "answer as target", file=own)
    says(rest[1], "not used", "id")
    assert "user<|end_header_id|>↵\n    ↵\n    What is it?<|eot_id|>" in done.stdout
    assert not out.exists()


def test_the_preview_shows_layout_notes_unused_columns_and_a_row(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text("\ufeffq,a,extra,other\nIs it up?,yes,1,2\nAnd now?,no,3,4\n", encoding="utf-8")
    layout, note, unused, heading, *row = preview(path, {"q": "context", "a": "target"}).split("\n")
    assert layout == f"{path}: context and target (q as context, a as target)"
    assert note.startswith("  ") and note.endswith(": a byte order mark at the start")
    assert unused == "  not used: extra, other" and re.fullmatch(r"  the first row .*:", heading)
    shown = chat([Turn("user", "Is it up?"), Turn("assistant", "yes")])
    assert "\n".join(row) == "".join(f"    {line}↵\n" for line in shown.split("\n")).removesuffix("↵\n")


def test_the_preview_of_a_long_row_is_cut_and_needs_no_good_row(tmp_path):
    path = tmp_path / "own.jsonl"
    rows = [{"context": "", "target": "up"}, {"context": "x" * 1800, "target": "none"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    text = visible(chat([Turn("user", "x" * 1800), Turn("assistant", "none")]), 1000, 500)
    assert preview(path, {}, ["none"]).endswith("\n".join(f"    {line}" for line in text.splitlines()))
    path.write_text(json.dumps(rows[0]) + "\n", encoding="utf-8")
    assert preview(path, {}) == f"{path}: context and target"
