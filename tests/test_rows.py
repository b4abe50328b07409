"""finlora.data.rows: what it reads, and the exact line that a person gets for each way a file can be wrong."""

import csv
import gzip
import io
import json
import os
import re
import tracemalloc
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from failures import refuses
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from finlora.core.errors import UserError
from finlora.data.layouts import Reading
from finlora.data.readers import LIMIT
from finlora.data.rows import LeftOut, Row, fault_of, read_rows

SHARED = Path(__file__).resolve().parents[2] / "shared" / "finlora" / "data"
GOOD = b'{"context": "Is it up?", "target": "yes"}\n'
SHAPE = '{"context": "...", "target": "..."}'
TWICE = "twice|duplicate|repeated"
NAMES = (".jsonl, .json, .csv, .tsv (also with .gz or .zst) or .parquet",)
BROKEN = ("cannot be read|unreadable|could not be read", "Parquet", "again")


def parquet(columns: dict, **options) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, **options)
    return sink.getvalue()


def parquet_columns(names: list[str], *columns: list) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_arrays([pa.array(column) for column in columns], names=names), sink)
    return sink.getvalue()


def damaged_gzip() -> bytes:
    packed = bytearray(gzip.compress(GOOD * 50, mtime=0))
    packed[-6] ^= 0xFF  # in the checksum at the end
    return bytes(packed)


def damaged_parquet_text() -> bytes:
    whole = parquet({"context": ["Is it up?"], "target": ["yes"]}, compression="none", use_dictionary=False)
    return whole.replace(b"Is it up?", b"Is it \xff\xfe?")


# The name of a file, its bytes, and of its error: the line (None: of the whole file), the key or column, and words.
MALFORMED = {
    "empty file": ("a.jsonl", b"", None, None, "no rows", "whole"),
    "only a byte order mark": ("a.jsonl", b"\xef\xbb\xbf", None, None, "no rows", "whole"),
    "empty gzip": ("a.jsonl.gz", gzip.compress(b""), None, None, "no rows", "whole"),
    "zero-byte gzip": ("a.jsonl.gz", b"", None, None, "no rows", "whole"),
    "blank first line": ("a.jsonl", b"\n" + GOOD, 1, None, "blank", "remove"),
    "blank line": ("a.jsonl", GOOD + b"\n" + GOOD, 2, None, "blank", "remove"),
    "line of spaces": ("a.jsonl", GOOD + b" \t \r\n" + GOOD, 2, None, "blank", "remove"),
    "truncated gzip": ("a.jsonl.gz", gzip.compress(GOOD * 50)[:-4], 51, None, "cut|truncated|incomplete", "again"),
    "gzip cut in its header": ("a.jsonl.gz", gzip.compress(GOOD)[:5], 1, None, "cut|truncated|incomplete", "again"),
    "damaged gzip": ("a.jsonl.gz", damaged_gzip(), 51, None, "gzip", "damaged|corrupt", "again"),
    "gz name on a plain file": ("a.jsonl.gz", GOOD, None, None, "not a gzip", ".gz off|remove .gz"),
    "plain name on gzip": ("a.jsonl", gzip.compress(GOOD), None, None, "gzip", "add .gz"),
    "junk after gzip": ("a.jsonl.gz", gzip.compress(GOOD) + b"junk", 2, None, "gzip", "damaged|corrupt", "again"),
    "byte order mark inside": ("a.jsonl", GOOD + b"\xef\xbb\xbf" + GOOD, 2, None, "byte order mark", "remove"),
    "UTF-16": ("a.jsonl", GOOD.decode().encode("utf-16"), None, None, "is UTF-16", "UTF-8"),
    "UTF-16 big-endian": ("a.csv", "\ufeffcontext,target\n".encode("utf-16-be"), None, None, "is UTF-16", "UTF-8"),
    "UTF-16 without mark": ("a.jsonl", GOOD.decode().encode("utf-16-le"), 1, None, "NUL byte", "UTF-16", "UTF-8"),
    "NUL bytes at the end": ("a.jsonl", GOOD + b"\0" * 512, 2, None, "NUL byte", "damaged|corrupt", "UTF-8"),
    "NUL byte in a text": ("a.jsonl", b'{"context": "a\0b", "target": "yes"}\n', 1, None, "NUL byte", "UTF-8"),
    "escaped NUL": ("a.jsonl", b'{"context": "a\\u0000b", "target": "yes"}\n', 1, "context", "NUL char", "remove"),
    "Latin-1": (
        *("a.jsonl", GOOD + '{"context": "Société Générale", "target": "yes"}\n'.encode("latin-1")),
        *(2, None, "not UTF-8", "byte 18", "0xe9", "save"),
    ),
    "Windows-1252 CSV": (
        *("a.csv", "context,target\nup 5 €,yes\n".encode("cp1252"), 2, None, "not UTF-8", "byte 6", "0x80", "save"),
    ),
    "surrogate as bytes": (
        *("a.jsonl", b'{"context": "\xed\xa0\x80", "target": "yes"}\n'),
        *(1, None, "not UTF-8", "byte 14", "0xed", "save"),
    ),
    "lone surrogate": (
        *("a.jsonl", b'{"context": "up \\ud83d", "target": "yes"}\n', 1, "context", "\\ud83d", "surrogate"),
    ),
    "lone surrogate in the target": (
        *("a.jsonl", b'{"context": "up", "target": "\\uDC00"}\n', 1, "target", "\\udc00", "surrogate"),
    ),
    "deeply nested": (
        *("a.jsonl", b'{"context": ' + b"[" * 200_000 + b"]" * 200_000 + b', "target": "yes"}\n'),
        *(1, None, "nested", SHAPE),
    ),
    "duplicate key": (
        *("a.jsonl", b'{"context": "a", "target": "yes", "target": "no"}\n', 1, "target", "key", TWICE, "keep|remove"),
    ),
    "duplicate key inside": (
        *(
            "a.jsonl",
            b'{"context": "a", "target": "yes", "meta": {"x": 1, "x": 2}}\n',
            1,
            "x",
            "key",
            TWICE,
            "keep|remove",
        ),
    ),
    "NaN": ("a.jsonl", b'{"context": "a", "target": NaN}\n', 1, None, "NaN", "JSON", "number"),
    "Infinity": ("a.jsonl", b'{"context": "a", "target": -Infinity}\n', 1, None, "-Infinity", "JSON", "number"),
    "wrong keys": (
        *("a.jsonl", b'{"question": "a", "answer": "yes"}\n', 1, "context", "question, answer", "--columns"),
    ),
    "missing target": ("a.jsonl", GOOD + b'{"context": "a"}\n', 2, "target", "key", "'context'", "--columns"),
    "wrong context beside a target": (
        *("a.jsonl", b'{"question": "a", "target": "yes"}\n', 1, "context", "'question, target'", "--columns"),
    ),
    "wrong target beside a context": (
        *("a.jsonl", b'{"context": "a", "answer": "yes"}\n', 1, "target", "'context, answer'", "--columns"),
    ),
    "empty object": ("a.jsonl", b"{}\n", 1, "context", "key", "--columns"),
    "long wrong key": ("a.jsonl", b'{"' + b"k" * 500 + b'": 1}\n', 1, "context", "k" * 77 + "...'"),
    "wrong key of 80 letters": ("a.jsonl", b'{"' + b"k" * 80 + b'": 1}\n', 1, "context", "k" * 80 + "'"),
    "long duplicate key": ("a.jsonl", b'{"%b": 1, "%b": 1}\n' % ((b"k" * 41,) * 2), 1, None, "k" * 37 + "...", TWICE),
    "line break in a wrong key": ("a.jsonl", b'{"a\\nb": 1}\n', 1, "context", "a\\nb", "--columns"),
    "system prompt beside": (
        *("a.jsonl", b'{"system": "Be brief.", "context": "a", "target": "yes"}\n'),
        *(1, "system", "key", "lost|ignored", "'context'"),
    ),
    "input beside": ("a.csv", b"context,input,target\na,b,c\n", 2, "input", "column", "lost|ignored", "'context'"),
    "two parts of a prompt beside": (
        *("a.jsonl", b'{"tools": "x", "system": "y", "context": "a", "target": "b"}\n'),
        *(1, "system", "key", "lost|ignored"),
    ),
    "context is an array": (
        *("a.jsonl", b'{"context": ["a", "b"], "target": "yes"}\n', 1, "context", "array", "text", "string"),
    ),
    "context is a number": (
        *("a.jsonl", b'{"context": 5, "target": "yes"}\n', 1, "context", "a number", "text", "string"),
    ),
    "target is an array": (
        *("a.jsonl", b'{"context": "a", "target": ["yes"]}\n', 1, "target", "array", "text", "string"),
    ),
    "target is an object": (
        *("a.jsonl", b'{"context": "a", "target": {"label": "yes"}}\n', 1, "target", "object", "text", "string"),
    ),
    "target is true": (
        *("a.jsonl", b'{"context": "a", "target": true}\n', 1, "target", "true|bool", "text", "string"),
    ),
    "target is null": ("a.jsonl", b'{"context": "a", "target": null}\n', 1, "target", "empty", "fill", "remove"),
    "empty target": ("a.jsonl", b'{"context": "a", "target": ""}\n', 1, "target", "empty", "fill", "remove"),
    "blank target": (
        *("a.jsonl", GOOD + b'{"context": "a", "target": " \\n"}\n', 2, "target", "empty", "fill", "remove"),
    ),
    "blank context": (
        *("a.jsonl", b'{"context": "\\u00a0", "target": "yes"}\n', 1, "context", "empty", "fill", "remove"),
    ),
    "null beside an escape": (
        *("a.jsonl", b'{"context": null, "target": "\\u0041"}\n', 1, "context", "empty", "fill", "remove"),
    ),
    "array from the second line on": ("a.jsonl", GOOD + b"[\n", 2, None, "not JSON", "column 3", "whole object", SHAPE),
    "object over lines": (
        *("a.jsonl", b'{\n  "context": "a",\n  "target": "yes"\n}\n'),
        *(1, None, "not JSON", "property name", "column 3", "whole object", SHAPE),
    ),
    "cut line": (
        *("a.jsonl", GOOD + GOOD[:20], 2, None, "not JSON", "Unterminated", "column 13", "whole object", SHAPE),
    ),
    "two objects on a line": (
        *("a.jsonl", GOOD.strip() + GOOD, 1, None, "not JSON", "Extra data", "column 42", "whole object", SHAPE),
    ),
    "comma between lines": (
        *("a.jsonl", GOOD.strip() + b",\n" + GOOD, 1, None, "not JSON", "Extra data", "column 42", SHAPE),
    ),
    "trailing comma": (
        *("a.jsonl", b'{"context": "a", "target": "yes",}\n', 1, None, "not JSON", "property name", "column 34", SHAPE),
    ),
    "single quotes": (
        *("a.jsonl", b"{'context': 'a', 'target': 'yes'}\n", 1, None, "not JSON", "quotes", "column 2", SHAPE),
    ),
    "raw tab in a text": (
        *("a.jsonl", b'{"context": "a\tb", "target": "yes"}\n', 1, None, "not JSON", "control", "column 15", SHAPE),
    ),
    "bare carriage returns": (
        *("a.jsonl", GOOD.replace(b"\n", b"\r") * 2, 1, None, "not JSON", "Extra data", "column 43", SHAPE),
    ),
    "a string": ("a.jsonl", b'"context"\n', 1, None, "is a string", "object", SHAPE),
    "a number": ("a.jsonl", b"42\n", 1, None, "is a number", "object", SHAPE),
    "null": ("a.jsonl", GOOD + b"null\n", 2, None, "is null", "object", SHAPE),
    "Git LFS pointer": (
        *("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"),
        *(None, None, "Git LFS pointer", "`make data`"),
    ),
    "web page": ("a.jsonl", b"<!DOCTYPE html>\n<title>404</title>\n", None, None, "web page", "fetch"),
    "HTML in capitals": ("a.csv", b"\n <HTML>\n", None, None, "web page", "fetch"),
    "XML": ("a.jsonl", b"<?xml version='1.0'?>\n", None, None, "web page", "fetch"),
    "Excel name": ("a.xlsx", b"PK", None, None, *NAMES, "rename or convert"),
    "no ending": ("a", GOOD, None, None, *NAMES, "rename or convert"),
    "only .gz": ("a.gz", gzip.compress(GOOD), None, None, *NAMES, "rename or convert"),
    "packed Parquet": ("a.parquet.gz", b"PAR1", None, None, *NAMES, "rename or convert"),
    "Excel under a CSV name": ("a.csv", b"PK\x03\x04\x14\x00", None, None, "zip or Excel", "unpack", "CSV", "UTF-8"),
    "ragged CSV row": (
        *("a.csv", b"context,target\na,yes\nup, then down,no\n", 3, None, "3 fields", "header", "2", "double quotes"),
    ),
    "short CSV row": ("a.csv", b"context,target\na\n", 2, None, "1 field", "header", "2", "double quotes"),
    "CSV without header": (
        *("a.csv", b"Is it up?,yes\nIs it down?,no\n", 1, "context", "column", "Is it up?, yes", "--columns"),
    ),
    "CSV without the target": ("a.csv", b"context,answer\na,b\n", 1, "target", "'context, answer'", "--columns"),
    "CSV column twice": ("a.csv", b"context,target,target\na,b,c\n", 1, "target", "column", TWICE, "keep|remove"),
    "SQuAD's question": (
        *("a.jsonl", b'{"id": "1", "title": "t", "question": "q?", "context": "a", "target": "b"}\n'),
        *(1, "question", "key", "lost|ignored", "'context'", "remove"),
    ),
    "options beside the question": (
        *("a.csv", b"context,Option A,Option B,target\nq,a,b,c\n", 2, "Option A", "column", "lost|ignored"),
    ),
    "a part of a prompt that only some rows have": (
        *("a.jsonl", GOOD * 2 + b'{"context": "a", "Passage_2": "p", "target": "b"}\n'),
        *(3, "Passage_2", "key", "lost|ignored"),
    ),
    "a column in two spellings": (
        *("a.csv", b"context,target,Context\na,b,c\n", 2, "Context", "column", "lost|ignored"),
    ),
    "two CSV files joined": (
        *("a.csv", b"context,target\na,yes\ncontext,target\nb,no\n", 3, None, "header", "joined", "remove"),
    ),
    "two CSV files joined, with a byte order mark": (
        *("a.csv", b"context,target\na,yes\n\xef\xbb\xbfContext, target \nb,no\n", 3, None, "header", "remove"),
    ),
    "a header among JSON lines": (
        *("a.jsonl", GOOD + b'{"context": "context", "target": "target"}\n', 2, None, "header", "remove"),
    ),
    "target nan": ("a.jsonl", b'{"context": "a", "target": "nan"}\n', 1, "target", "'nan'", "missing", "remove"),
    "target None": ("a.csv", b"context,target\na,None\n", 2, "target", "'None'", "missing", "fill", "remove"),
    "target <NA>": (
        *("a.parquet", parquet({"context": ["a"], "target": ["<NA>"]}), 1, "target", "'<NA>'", "missing", "remove"),
    ),
    "context null as text": ("a.csv", b"context,target\nnull,yes\n", 2, "context", "'null'", "missing", "remove"),
    "Excel's error as an answer": ("a.csv", b"context,target\na,#N/A\n", 2, "target", "'#N/A'", "missing", "remove"),
    "control token": (
        *("a.jsonl", b'{"context": "a<|eot_id|>", "target": "yes"}\n'),
        *(1, "context", "control token", "<|eot_id|>", "correct", "remove"),
    ),
    "ChatML's control token": (
        *("a.jsonl", b'{"context": "a", "target": "yes<|im_end|>"}\n', 1, "target", "control token", "<|im_end|>"),
    ),
    "CSV header only": ("a.csv", b"context,target\n", None, None, "no rows", "whole"),
    "CSV blank line": ("a.csv", b"context,target\n\na,yes\n", 2, None, "blank", "remove"),
    "CSV empty target": ("a.csv", b"context,target\na,\n", 2, "target", "empty", "fill", "remove"),
    "CSV unclosed quote": (
        *("a.csv", b'context,target\na,yes\n"b,no\nc,no\n', 3, None, "double quote", "never closed|unclosed", "close"),
    ),
    "CSV text after a quote": (*("a.csv", b'context,target\n"a"b,yes\n', 2, None, "not CSV", "double the quotes"),),
    "CSV bare carriage return": (
        *("a.csv", b"context,target\ra,yes\r", 1, None, "carriage return", "save", "LF or CRLF"),
    ),
    "Parquet with another column": (
        *("a.parquet", parquet({"question": ["a"], "target": ["yes"]})),
        *(None, "context", "column", "'question, target'", "--columns"),
    ),
    "Parquet column twice": (
        *("a.parquet", parquet_columns(["context", "target", "target"], ["a"], ["b"], ["c"])),
        *(None, "target", "column", TWICE, "keep|remove"),
    ),
    "Parquet numbers as context": (
        *("a.parquet", parquet({"context": [1], "target": ["yes"]}), 1, "context", "a number", "text", "string"),
    ),
    "Parquet floats as target": (
        *("a.parquet", parquet({"context": ["a"], "target": [0.1]}), 1, "target", "type float", "text", "string"),
    ),
    "Parquet lists": (
        *("a.parquet", parquet({"context": [["a"]], "target": ["yes"]}), 1, "context", "array", "text", "string"),
    ),
    "Parquet null": (
        *("a.parquet", parquet({"context": ["a", "b"], "target": ["yes", None]})),
        *(2, "target", "empty", "fill", "remove"),
    ),
    "Parquet null context": (
        *("a.parquet", parquet({"context": ["a", "b", None], "target": ["x", "y", "z"]})),
        *(3, "context", "empty", "fill", "remove"),
    ),
    "Parquet structs": (
        *("a.parquet", parquet({"context": [{"k": 1}], "target": ["yes"]}), 1, "context", "object", "text", "string"),
    ),
    "Parquet not UTF-8": ("a.parquet", damaged_parquet_text(), 1, None, "not UTF-8", "save"),
    "Parquet without rows": (
        *("a.parquet", parquet({"context": pa.array([], pa.string()), "target": pa.array([], pa.string())})),
        *(None, None, "no rows", "whole"),
    ),
    "Parquet NUL": (
        *("a.parquet", parquet({"context": ["a\0"], "target": ["yes"]}), 1, "context", "NUL char", "remove"),
    ),
    "truncated Parquet": ("a.parquet", parquet({"context": ["a"], "target": ["yes"]})[:-9], None, None, *BROKEN),
    "not Parquet": ("a.parquet", GOOD * 10, None, None, *BROKEN),
    "zero-byte Parquet": ("a.parquet", b"", None, None, *BROKEN),
    "Parquet under a JSON name": (
        *("a.jsonl", parquet({"context": ["a"], "target": ["yes"]}), None, None, "is Parquet", "name", ".parquet"),
    ),
}


CAPITALS = {
    "CRC",
    "CRLF",
    "CSV",
    "JSON",
    "LF",
    "LFS",
    "NA",
    "NAME",
    "NUL",
    "NULL",
    "UTF",
}  # names; all else of a line is in lower case


def complaint(
    path: Path, *words: str, shown: object = None, line: int | None = None, key: str | None = None, **options
):
    with refuses(*words, file=shown or path, line=line, key=key) as error:
        list(read_rows(path, **options))
    text = str(error.value).removeprefix(str(shown or path))
    assert len(text) < 300
    assert set(re.findall("[A-Z]{2,}", text)) <= CAPITALS
    assert all(any(part in text for part in word.split("|")) for word in words if word != word.lower())


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_file(case, tmp_path):
    name, content, line, key, *words = MALFORMED[case]
    path = tmp_path / name
    path.write_bytes(content)
    complaint(path, *words, line=line, key=key)


MISSING_VALUES = [
    "nan ",
    " NaN",
    "NULL ",
    "Nan",
    "-nan",
    "N/A",
    "n/a",
    "#N/A N/A",
    "NA",
    " None",
    "<na>",
    "\\N",
    "#Ref!",
]


@pytest.mark.parametrize("text", MISSING_VALUES)
def test_a_missing_value_is_refused_in_every_spelling_unless_it_is_a_label(text, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f"context,target\na,{text}\n")
    complaint(path, f"{text.strip()!r}", "missing", "remove", line=2, key="target")
    assert list(read_rows(path, labels=["A", text])) == [Row(2, "a", text)]
    path.write_text(f"context,target\n{text},b\n")
    complaint(path, "missing", "remove", line=2, key="context", labels=["A", text])


@pytest.mark.parametrize("text", ["none", "None of the above", "Not available", "nano", "nan or not", "na", "0", "-"])
def test_an_answer_that_resembles_a_missing_value_is_kept(text, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f"context,target\na,{text}\n")
    assert list(read_rows(path)) == [Row(2, "a", text)]


@pytest.mark.parametrize("key", ["conversations", "history", "instruction", "messages", "prompt", "tools"])
def test_a_part_of_a_prompt_beside_the_texts(key, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f"{key},context,target\na,b,c\n")
    complaint(path, "column", "lost|ignored", line=2, key=key)
    complaint(path, "column", "lost|ignored", line=2, key="context", columns={key: "context"})
    path.write_text(f"{key},target\na,c\n")
    assert list(read_rows(path, {key: "context"})) == [Row(2, "a", "c")]


def test_paths_that_are_no_data_file(tmp_path):
    path = tmp_path / "a.jsonl"
    complaint(path, "is not there|not found|does not exist", "check the path")
    complaint(Path(f"{tmp_path}/a\0.jsonl"), "cannot be read", "null byte", "check the path")
    path.symlink_to(tmp_path / "gone")
    complaint(path, "is not there|not found|does not exist", "check the path")
    path.unlink()
    path.symlink_to(path)
    complaint(path, "cannot be read", "symbolic links", "check the path")
    path.unlink()
    path.mkdir()
    complaint(path, "folder", "data file")
    path.rmdir()
    os.mkfifo(path)  # is refused without waiting for a writer
    complaint(path, "not a regular file", "data file")
    path.unlink()
    path.write_bytes(GOOD)
    complaint(path / "b.jsonl", "cannot be read", "Not a directory", "check the path")


def test_line_break_in_path(tmp_path):
    path = tmp_path / "a\nb.jsonl"
    path.write_bytes(b"5\n")
    complaint(path, "number", SHAPE, shown=f"{tmp_path}/a b.jsonl", line=1)


def test_no_permission(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD)
    path.chmod(0)
    mine = os.geteuid()
    if mine == 0:
        os.seteuid(65534)  # root may read every file, nobody may not
    try:
        complaint(path, "cannot be read", "Permission denied", "check the path")
    finally:
        os.seteuid(mine)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.jsonl.gz"])
def test_200_mb_line_is_refused_in_bounded_memory(name, tmp_path):
    path = tmp_path / name
    with gzip.open(path, "wb", compresslevel=1) if name.endswith(".gz") else open(path, "wb") as file:
        file.write(b'{"context": "')
        for _ in range(200):
            file.write(b"x" * 2**20)
    tracemalloc.start()
    complaint(path, "longer", "16 MiB", "split", line=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * LIMIT


def test_a_line_as_long_as_allowed_is_read_and_no_longer_one(tmp_path):
    path = tmp_path / "a.jsonl"
    text = "x" * (LIMIT - len('{"context": "", "target": "yes"}\n'))
    path.write_text(json.dumps({"context": text, "target": "yes"}) + "\n")
    assert list(read_rows(path)) == [Row(1, text, "yes")]
    path.write_text(json.dumps({"context": text + "x", "target": "yes"}) + "\n")
    complaint(path, "line", "16 MiB", "split", line=1)


def test_a_csv_field_as_long_as_allowed_is_read_and_no_longer_one(tmp_path):
    path = tmp_path / "a.csv"
    text = ("x" * (2**20 - 1) + "\n") * 16  # over many lines, as what follows a quote that is left open
    path.write_text(f'context,target\n"{text}",yes\n')
    assert list(read_rows(path)) == [Row(2, text, "yes")]
    path.write_text(f'context,target\n"{text}x",yes\n')
    complaint(path, "field", "16 MiB", "double quote", line=2)


def test_a_parquet_text_as_long_as_allowed_is_read_and_no_longer_one(tmp_path):
    path = tmp_path / "a.parquet"
    text = "x" * LIMIT
    path.write_bytes(parquet({"context": ["a", text], "target": [text, "yes"]}))
    assert list(read_rows(path)) == [Row(1, "a", text), Row(2, text, "yes")]
    path.write_bytes(parquet({"context": ["a", text + "x"], "target": ["b", "yes"]}))
    complaint(path, "longer", "16 MiB", "cut", line=2, key="context")
    path.write_bytes(parquet({"context": ["a"], "target": [text + "x"]}))
    complaint(path, "longer", "16 MiB", "cut", line=1, key="target")


@pytest.mark.parametrize("literal", ["0", "-0", "15092.44", "1e3", "1E+400", "0.10", "12345678901234567890" * 300])
def test_numeric_target_keeps_its_text(literal, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"context": "How much?", "target": {literal}}}\n')
    (row,) = read_rows(path)
    assert row == Row(1, "How much?", literal)
    assert type(row.target) is str


def test_parquet_numbers_and_dictionaries(tmp_path):
    path = tmp_path / "a.parquet"
    for targets, texts in [
        (pa.array([0, -7]), ["0", "-7"]),
        (pa.array([Decimal("1.50"), Decimal("0.00")]), ["1.50", "0.00"]),
        (pa.array(["yes", "no"]).dictionary_encode(), ["yes", "no"]),
        (pa.array(["yes", "no"], pa.large_string()), ["yes", "no"]),
        (pa.array([1, 2]).dictionary_encode(), ["1", "2"]),
    ]:
        pq.write_table(pa.table({"context": ["a", "b"], "target": targets, "page": [1, 2]}), path)
        assert [row.target for row in read_rows(path)] == texts
        if type(targets[0].as_py()) is str:
            assert [row.context for row in read_rows(path, {"target": "context", "context": "target"})] == texts


def test_parquet_rows_are_numbered_through_all_batches(tmp_path):
    path = tmp_path / "a.parquet"
    contexts = ["" if number == 2100 else str(number) for number in range(1, 3001)]
    path.write_bytes(parquet({"context": contexts, "target": ["yes"] * 3000}))
    left_out = []
    assert [row.line for row in read_rows(path, left_out=left_out)] == [*range(1, 2100), *range(2101, 3001)]
    assert left_out == [LeftOut(2100, "empty context")]


@pytest.mark.parametrize("column", ["context", "target"])
def test_parquet_text_that_is_not_utf_8_is_named_by_its_own_row(tmp_path, column):
    path = tmp_path / "a.parquet"
    texts = [f"text number {number:04}" for number in range(1, 3001)]
    table = {"context": ["a"] * 3000, "target": ["b"] * 3000} | {column: texts}
    whole = parquet(table, compression="none", use_dictionary=False, write_statistics=False)
    path.write_bytes(whole.replace(b"number 2100", b"number \xff100"))
    rows = read_rows(path)
    assert [next(rows).line for _ in range(2099)] == [*range(1, 2100)]
    with refuses("not UTF-8", "save", file=path, line=2100):
        next(rows)


def test_parquet_that_is_damaged_further_on_says_after_which_row(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [f"text number {number:06}" for number in range(4096)]
    options = {"row_group_size": 2048, "compression": "none", "use_dictionary": False}
    whole = parquet({"context": texts, "target": texts}, **options)
    page = pq.read_metadata(io.BytesIO(whole)).row_group(1).column(0).data_page_offset
    path.write_bytes(whole[:page] + b"\xff" * 8 + whole[page + 8 :])
    complaint(path, "cannot be read|unreadable", "Parquet", "row 2048", "again")


def test_byte_order_mark_and_crlf_are_taken(tmp_path):
    expected = [Row(1, "Is it up?", "yes"), Row(2, "Is it up?", "yes")]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n") * 2)
    assert list(read_rows(path)) == expected
    table = tmp_path / "a.csv"
    table.write_bytes(b'\xef\xbb\xbfcontext,target\r\n"Is it\r\nup?",yes\r\nb,no\r\n')
    assert list(read_rows(table)) == [Row(2, "Is it\r\nup?", "yes"), Row(4, "b", "no")]


def test_last_line_may_lack_its_end(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + GOOD.strip())
    assert len(list(read_rows(path))) == 2


def test_columns_that_are_not_used_are_named_with_their_first_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        GOOD + b'{"id": 1, "context": "a", "target": "b"}\n{"id": 2, "page": 3, "context": "a", "target": "b"}\n'
    )
    reading = Reading()
    assert len(list(read_rows(path, reading=reading))) == 3
    assert reading.unused == {"id": 2, "page": 3}
    for name, content in (
        ("a.csv", b"id,context,target,url\n1,a,b,c\n"),
        ("a.parquet", parquet({"id": [1], "context": ["a"], "target": ["b"], "url": ["c"]})),
    ):
        path, reading = tmp_path / name, Reading()
        path.write_bytes(content)
        assert list(read_rows(path, reading=reading)) and list(reading.unused) == ["id", "url"]


@pytest.mark.parametrize(
    "name",
    ["A", "d", "option_1", "Choice B", "opb", "Question", "system prompt", "Distractor2"]
    + ["ending0", "paragraphs", "Sentences", "contexts", "passages", "pre_text", "post_text", "question_text", "ans_a"]
    + ["question_stem", "choices_text", "claim", "ending_b", "questionText", "SystemPrompt"],
)
def test_what_looks_like_a_part_of_the_prompt(name, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f"text of it,{name},label\nx,y,z\n")
    complaint(path, "column", "lost|ignored", line=2, key=name, columns={"text of it": "context", "label": "target"})


@pytest.mark.parametrize(
    "names",
    [
        ["A", "B", "C", "D"],
        ["1", "2", "3", "4"],
        ["w", "x"],
        ["answer_1", "answer_2"],
        ["ending0", "passages", "claim"],
    ],
)
def test_all_columns_that_are_a_part_of_the_prompt_are_named(names, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f"context,target,id,{','.join(names)}\nx,y,1{',z' * len(names)}\n")
    complaint(path, "columns", "lost|ignored", ", ".join(f"'{name}'" for name in names), "remove", line=2)


@pytest.mark.parametrize("names", ["x", "0", "answer_1", "question_id,text_id", "answers,answer_start", "2023,2024"])
def test_columns_that_are_no_part_of_the_prompt_are_not_read(names, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f"context,target,{names}\na,b{',z' * len(names.split(','))}\n")
    assert list(read_rows(path)) == [Row(2, "a", "b")]


HEADERS = [
    "target,context",
    " Target ,CONTEXT",
    "question,answer",
    "Question Text,Label",
    "answer,id",
    "q,ans",
    "Q,A",
    "text,labels",
]


@pytest.mark.parametrize("header", HEADERS)
def test_a_second_header_with_other_columns_is_refused(header, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f"context,target\na,yes\n{header}\nb,no\n")
    complaint(path, "header", "joined", "remove", line=3)


def test_rows_that_hold_a_name_of_a_column_are_no_header(tmp_path):
    path = tmp_path / "a.csv"
    rows = [
        ("question", "yes"),
        ("What is a label?", "answer"),
        ("context", "context"),
        ("A", "B"),
        ("text", "positive"),
    ]
    path.write_text("context,target\n" + "".join(f"{context},{target}\n" for context, target in rows))
    assert [row[1:3] for row in read_rows(path)] == rows


def test_other_names_and_ignored_columns(tmp_path):
    path = tmp_path / "A.CSV"
    path.write_text("id,Q,A\n1,Is it up?,0\n")
    assert list(read_rows(path, {"Q": "context", "A": "target"})) == [Row(2, "Is it up?", "0")]
    path = tmp_path / "a.v2.CSV.GZ"
    path.write_bytes(gzip.compress(b"target,context\n0,Is it up?\n"))
    assert list(read_rows(path)) == [Row(2, "Is it up?", "0")]
    path = tmp_path / "a.jsonl"
    path.write_text('{"input": "Is it up?", "pages": [1, {"a": null}], "target": "yes"}\n')
    assert list(read_rows(path, {"input": "context"})) == [Row(1, "Is it up?", "yes")]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_empty_texts_are_noted_when_asked(kind, tmp_path):
    path = tmp_path / f"a.{kind}"
    contexts, targets = ["a", " ", "c", "d"], ["yes", "no", "", "0"]
    if kind == "parquet":
        pq.write_table(pa.table({"context": contexts, "target": targets}), path)
    elif kind == "csv":
        path.write_text("context,target\n" + "".join(f"{c},{t}\n" for c, t in zip(contexts, targets, strict=True)))
    else:
        rows = [{"context": c, "target": t} for c, t in zip(contexts, targets, strict=True)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shift = kind == "csv"
    left_out = []
    assert list(read_rows(path, left_out=left_out)) == [Row(1 + shift, "a", "yes"), Row(4 + shift, "d", "0")]
    assert left_out == [LeftOut(2 + shift, "empty context"), LeftOut(3 + shift, "empty target")]


def test_a_file_of_empty_texts_only_is_no_mistake_when_they_are_noted(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("Q,A\na,\n,b\n")
    left_out = []
    assert list(read_rows(path, {"Q": "context", "A": "target"}, left_out)) == []
    assert left_out == [LeftOut(2, "empty A"), LeftOut(3, "empty Q")]
    path.write_text("Q,A\n")
    complaint(path, "no rows", columns={"Q": "context", "A": "target"}, left_out=[])


def test_other_mistakes_raise_even_when_empty_texts_are_noted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"context": "a", "target": true}\n')
    complaint(path, "true|bool", "string", line=1, key="target", left_out=[])


def test_memory_does_not_grow_with_the_file(tmp_path):
    path = tmp_path / "a.jsonl"
    with open(path, "w") as file:
        for number in range(5_000):
            file.write(json.dumps({"context": f"{number} " + "x" * 1000, "target": "yes"}) + "\n")
    tracemalloc.start()
    assert sum(1 for _ in read_rows(path)) == 5_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.skipif(not SHARED.is_dir(), reason="FinLoRA's files are not beside the project")
def test_real_files():
    nan = {"xbrl_term_train.jsonl": [142, 890, 1589, 1630, 2973, 3828]}  # targets that are the text nan
    for path in SHARED.glob("*/*.jsonl"):
        left_out, reading = [], Reading()
        rows = list(read_rows(path, left_out=left_out, reading=reading))
        with open(path, encoding="utf-8") as file:
            plain = {line: json.loads(text) for line, text in enumerate(file, 1)}
        assert [row.line for row in left_out] == nan.get(path.name, [])
        assert sorted(reading.unused) == (["pages", "url"] if path.name.startswith("financebench") else [])
        for row in left_out:
            assert plain.pop(row.line)["target"] == "nan"
        assert [(row.context, row.target) for row in rows] == [
            (row["context"], str(row["target"])) for row in plain.values()
        ]
    assert len(list(read_rows(SHARED / "test" / "tfns_test.jsonl"))) == 2388


# Any text that can be written as UTF-8 and is neither blank nor a missing value nor holds a NUL.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(
    lambda text: fault_of("text", text) is None
)
pairs = st.lists(st.tuples(texts, texts), min_size=1, max_size=6)
quick = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


# Line ends of other systems, marks that are cut off at a file's start, and what CSV and JSON quote.
AWKWARD = [("\ufeffa\u2028\x85\x1c b\r", "\ufeff"), ("\r\n\"',\\t", '""'), ("a", " \U0010ffff ")]


@quick
@example(AWKWARD, False, False)
@example(AWKWARD, True, True)
@given(pairs, st.booleans(), st.booleans())
def test_json_lines_round_trip(tmp_path, rows, ascii_only, packed):
    content = "".join(json.dumps({"target": t, "context": c}, ensure_ascii=ascii_only) + "\n" for c, t in rows).encode()
    path = tmp_path / ("a.jsonl.gz" if packed else "a.jsonl")
    path.write_bytes(gzip.compress(content) if packed else content)
    assert list(read_rows(path)) == [Row(line, *row) for line, row in enumerate(rows, 1)]


@quick
@example(AWKWARD, "\n")
@example(AWKWARD, "\r\n")
@given(pairs, st.sampled_from(["\n", "\r\n"]))
def test_csv_round_trip(tmp_path, rows, end):
    path = tmp_path / "a.csv"
    # With LF line ends Python's writer leaves a bare carriage return unquoted, which nothing could read back.
    quoting = csv.QUOTE_ALL if end == "\n" else csv.QUOTE_MINIMAL
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator=end, quoting=quoting).writerows([("context", "target"), *rows])
    assert [row[1:3] for row in read_rows(path)] == rows


@quick
@example(AWKWARD)
@given(pairs)
def test_parquet_round_trip(tmp_path, rows):
    path = tmp_path / "a.parquet"
    contexts, targets = zip(*rows, strict=True)
    pq.write_table(pa.table({"context": contexts, "target": targets}), path)
    assert list(read_rows(path)) == [Row(number, *row) for number, row in enumerate(rows, 1)]


WHOLE = {
    "a.jsonl": GOOD * 3 + '{"context": "Up 5 €?", "target": 5.0, "pages": [1, {"a": "\\u20ac"}]}\n'.encode(),
    "a.csv": 'context,target\n"Is it ""up""?\nReally?",yes\r\nUp 5 €?,no\n'.encode(),
    "a.jsonl.gz": gzip.compress(GOOD * 30, mtime=0),
    "a.parquet": parquet({"context": ["Is it up?", "And now?"] * 9, "target": ["yes", "no"] * 9}),
}


def rows_or_one_line(path):
    try:
        for row in read_rows(path):
            assert row.context.strip() and row.target.strip()
            (row.context + row.target).encode()
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and str(error).startswith(f"{path}:")


@pytest.mark.parametrize("name", WHOLE)
@quick
@given(data=st.data())
def test_any_damage_gives_rows_or_one_line(tmp_path, name, data):
    content = bytearray(WHOLE[name])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, max(0, len(content) - 1)))
        damage = data.draw(st.sampled_from(["change", "insert", "cut", "drop"]))
        if damage == "cut":
            del content[place:]
        elif damage == "drop":
            del content[place : place + data.draw(st.integers(1, 8))]
        else:
            content[place : place + (damage == "change")] = data.draw(st.binary(min_size=1, max_size=4))
    path = tmp_path / name
    path.write_bytes(content)
    rows_or_one_line(path)


@pytest.mark.parametrize("name", WHOLE)
@quick
@given(content=st.binary(max_size=200))
def test_any_bytes_give_rows_or_one_line(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    rows_or_one_line(path)
