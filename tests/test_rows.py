"""data.rows: what it reads, and the exact line that a person gets for each way a file can be wrong."""

import csv
import gzip
import io
import json
import os
import tracemalloc
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.rows import LIMIT, LeftOut, Row, read_rows
from tools.cli import UserError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "finlora" / "data"
GOOD = b'{"context": "Is it up?", "target": "yes"}\n'
SHAPE = '{"context": "...", "target": "..."}'


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


# name of the file, its bytes, what is said after the file's path
MALFORMED = {
    "empty file": ("a.jsonl", b"", ": holds no rows; check that it was written whole"),
    "only a byte order mark": ("a.jsonl", b"\xef\xbb\xbf", ": holds no rows; check that it was written whole"),
    "empty gzip": ("a.jsonl.gz", gzip.compress(b""), ": holds no rows; check that it was written whole"),
    "zero-byte gzip": ("a.jsonl.gz", b"", ": holds no rows; check that it was written whole"),
    "blank first line": ("a.jsonl", b"\n" + GOOD, ":1: is a blank line; remove it"),
    "blank line": ("a.jsonl", GOOD + b"\n" + GOOD, ":2: is a blank line; remove it"),
    "line of spaces": ("a.jsonl", GOOD + b" \t \r\n", ":2: is a blank line; remove it"),
    "truncated gzip": (
        "a.jsonl.gz",
        gzip.compress(GOOD * 50)[:-4],
        ":51: the gzip file is cut short; write or fetch it again",
    ),
    "gzip cut in its header": (
        "a.jsonl.gz",
        gzip.compress(GOOD)[:5],
        ":1: the gzip file is cut short; write or fetch it again",
    ),
    "damaged gzip": ("a.jsonl.gz", damaged_gzip(), None),
    "gz name on a plain file": (
        "a.jsonl.gz",
        GOOD,
        ": is not a gzip file; take .gz off its name or fetch it again",
    ),
    "plain name on gzip": ("a.jsonl", gzip.compress(GOOD), ": is compressed with gzip; add .gz to its name"),
    "junk after gzip": (
        "a.jsonl.gz",
        gzip.compress(GOOD) + b"junk",
        ":2: the gzip file is damaged (Not a gzipped file (b'ju')); write or fetch it again",
    ),
    "byte order mark inside": (
        "a.jsonl",
        GOOD + b"\xef\xbb\xbf" + GOOD,
        ":2: starts with a byte order mark; remove it (were two files joined?)",
    ),
    "UTF-16": ("a.jsonl", GOOD.decode().encode("utf-16"), ": is UTF-16; save it as UTF-8"),
    "UTF-16 big-endian": ("a.csv", "\ufeffcontext,target\n".encode("utf-16-be"), ": is UTF-16; save it as UTF-8"),
    "UTF-16 without mark": (
        "a.jsonl",
        GOOD.decode().encode("utf-16-le"),
        ":1: holds a NUL byte; the file is damaged or UTF-16: save it as UTF-8",
    ),
    "NUL bytes at the end": (
        "a.jsonl",
        GOOD + b"\0" * 512,
        ":2: holds a NUL byte; the file is damaged or UTF-16: save it as UTF-8",
    ),
    "NUL byte in a text": (
        "a.jsonl",
        b'{"context": "a\0b", "target": "yes"}\n',
        ":1: holds a NUL byte; the file is damaged or UTF-16: save it as UTF-8",
    ),
    "escaped NUL": (
        "a.jsonl",
        b'{"context": "a\\u0000b", "target": "yes"}\n',
        ":1: 'context' holds a NUL character; remove it",
    ),
    "Latin-1": (
        "a.jsonl",
        GOOD + '{"context": "Société Générale", "target": "yes"}\n'.encode("latin-1"),
        ":2: is not UTF-8 at byte 18 of the line (0xe9); save the file as UTF-8",
    ),
    "Windows-1252 CSV": (
        "a.csv",
        "context,target\nup 5 €,yes\n".encode("cp1252"),
        ":2: is not UTF-8 at byte 6 of the line (0x80); save the file as UTF-8",
    ),
    "surrogate as bytes": (
        "a.jsonl",
        b'{"context": "\xed\xa0\x80", "target": "yes"}\n',
        ":1: is not UTF-8 at byte 14 of the line (0xed); save the file as UTF-8",
    ),
    "lone surrogate": (
        "a.jsonl",
        b'{"context": "up \\ud83d", "target": "yes"}\n',
        ":1: 'context' holds half a character (\\ud83d, a lone surrogate); mend it",
    ),
    "lone surrogate in the target": (
        "a.jsonl",
        b'{"context": "up", "target": "\\uDC00"}\n',
        ":1: 'target' holds half a character (\\udc00, a lone surrogate); mend it",
    ),
    "deeply nested": (
        "a.jsonl",
        b'{"context": ' + b"[" * 200_000 + b"]" * 200_000 + b', "target": "yes"}\n',
        f":1: is nested too deeply; write {SHAPE}",
    ),
    "duplicate key": (
        "a.jsonl",
        b'{"context": "a", "target": "yes", "target": "no"}\n',
        ":1: the key 'target' is there twice; keep one",
    ),
    "duplicate key inside": (
        "a.jsonl",
        b'{"context": "a", "target": "yes", "meta": {"x": 1, "x": 2}}\n',
        ":1: the key 'x' is there twice; keep one",
    ),
    "NaN": ("a.jsonl", b'{"context": "a", "target": NaN}\n', ":1: NaN is not JSON; write a number or a string"),
    "Infinity": (
        "a.jsonl",
        b'{"context": "a", "target": -Infinity}\n',
        ":1: -Infinity is not JSON; write a number or a string",
    ),
    "wrong keys": (
        "a.jsonl",
        b'{"question": "a", "answer": "yes"}\n',
        ":1: has no key 'context' (it has 'question, answer'); rename it or pass --context-column",
    ),
    "missing target": (
        "a.jsonl",
        GOOD + b'{"context": "a"}\n',
        ":2: has no key 'target' (it has 'context'); rename it or pass --target-column",
    ),
    "empty object": (
        "a.jsonl",
        b"{}\n",
        ":1: has no key 'context' (it has ''); rename it or pass --context-column",
    ),
    "long wrong key": (
        "a.jsonl",
        b'{"' + b"k" * 500 + b'": 1}\n',
        f":1: has no key 'context' (it has '{'k' * 77}...'); rename it or pass --context-column",
    ),
    "line break in a wrong key": (
        "a.jsonl",
        b'{"a\\nb": 1}\n',
        ":1: has no key 'context' (it has 'a\\nb'); rename it or pass --context-column",
    ),
    "system prompt beside": (
        "a.jsonl",
        b'{"system": "Be brief.", "context": "a", "target": "yes"}\n',
        ":1: the key 'system' would be lost from the prompt; put its text into 'context'",
    ),
    "input beside": (
        "a.csv",
        b"context,input,target\na,b,c\n",
        ":1: the column 'input' would be lost from the prompt; put its text into 'context'",
    ),
    "context is an array": (
        "a.jsonl",
        b'{"context": ["a", "b"], "target": "yes"}\n',
        ":1: 'context' is an array and not text; write it as a string",
    ),
    "context is a number": (
        "a.jsonl",
        b'{"context": 5, "target": "yes"}\n',
        ":1: 'context' is a number and not text; write it as a string",
    ),
    "target is an array": (
        "a.jsonl",
        b'{"context": "a", "target": ["yes"]}\n',
        ":1: 'target' is an array and not text; write it as a string",
    ),
    "target is an object": (
        "a.jsonl",
        b'{"context": "a", "target": {"label": "yes"}}\n',
        ":1: 'target' is an object and not text; write it as a string",
    ),
    "target is true": (
        "a.jsonl",
        b'{"context": "a", "target": true}\n',
        ":1: 'target' is true or false and not text; write it as a string",
    ),
    "target is null": (
        "a.jsonl",
        b'{"context": "a", "target": null}\n',
        ":1: empty target; fill it in or remove the row",
    ),
    "empty target": ("a.jsonl", b'{"context": "a", "target": ""}\n', ":1: empty target; fill it in or remove the row"),
    "blank target": (
        "a.jsonl",
        GOOD + b'{"context": "a", "target": " \\n"}\n',
        ":2: empty target; fill it in or remove the row",
    ),
    "blank context": (
        "a.jsonl",
        b'{"context": "\\u00a0", "target": "yes"}\n',
        ":1: empty context; fill it in or remove the row",
    ),
    "array file": (
        "a.jsonl",
        b"[" + GOOD.strip() + b"]\n",
        f":1: is an array and not an object; write {SHAPE} on each line",
    ),
    "array file over lines": (
        "a.jsonl",
        b"[\n" + GOOD.strip() + b"\n]\n",
        f":1: the file is one JSON array; write one object a line, {SHAPE}",
    ),
    "object over lines": (
        "a.jsonl",
        b'{\n  "context": "a",\n  "target": "yes"\n}\n',
        ":1: is not JSON (Expecting property name enclosed in double quotes at column 3); "
        f"write one whole object on each line, {SHAPE}",
    ),
    "cut line": (
        "a.jsonl",
        GOOD + GOOD[:20],
        f":2: is not JSON (Unterminated string starting at at column 13); write one whole object on each line, {SHAPE}",
    ),
    "two objects on a line": (
        "a.jsonl",
        GOOD.strip() + GOOD,
        f":1: is not JSON (Extra data at column 42); write one whole object on each line, {SHAPE}",
    ),
    "comma between lines": (
        "a.jsonl",
        GOOD.strip() + b",\n" + GOOD,
        f":1: is not JSON (Extra data at column 42); write one whole object on each line, {SHAPE}",
    ),
    "trailing comma": (
        "a.jsonl",
        b'{"context": "a", "target": "yes",}\n',
        ":1: is not JSON (Expecting property name enclosed in double quotes at column 34); "
        f"write one whole object on each line, {SHAPE}",
    ),
    "single quotes": (
        "a.jsonl",
        b"{'context': 'a', 'target': 'yes'}\n",
        ":1: is not JSON (Expecting property name enclosed in double quotes at column 2); "
        f"write one whole object on each line, {SHAPE}",
    ),
    "raw tab in a text": (
        "a.jsonl",
        b'{"context": "a\tb", "target": "yes"}\n',
        f":1: is not JSON (Invalid control character at at column 15); write one whole object on each line, {SHAPE}",
    ),
    "bare carriage returns": (
        "a.jsonl",
        GOOD.replace(b"\n", b"\r") * 2,
        f":1: is not JSON (Extra data at column 43); write one whole object on each line, {SHAPE}",
    ),
    "a string": (
        "a.jsonl",
        b'"context"\n',
        f":1: is a string and not an object; write {SHAPE} on each line",
    ),
    "a number": ("a.jsonl", b"42\n", f":1: is a number and not an object; write {SHAPE} on each line"),
    "null": ("a.jsonl", GOOD + b"null\n", f":2: is null and not an object; write {SHAPE} on each line"),
    "Git LFS pointer": (
        "a.jsonl",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
        ": is a Git LFS pointer and not the data; fetch it with `make data`",
    ),
    "web page": (
        "a.jsonl",
        b"<!DOCTYPE html>\n<title>404</title>\n",
        ": is a web page and not data; fetch it again",
    ),
    "JSON name": (
        "a.json",
        GOOD,
        ": the name must end in .jsonl, .jsonl.gz, .csv, .csv.gz or .parquet; "
        "if it holds one JSON object a line, rename it to .jsonl",
    ),
    "Excel name": (
        "a.xlsx",
        b"PK",
        ": the name must end in .jsonl, .jsonl.gz, .csv, .csv.gz or .parquet; rename or convert it",
    ),
    "Excel under a CSV name": (
        "a.csv",
        b"PK\x03\x04\x14\x00",
        ": is a zip or Excel file; unpack it or save it as CSV (UTF-8)",
    ),
    "ragged CSV row": (
        "a.csv",
        b"context,target\na,yes\nup, then down,no\n",
        ":3: has 3 fields and the header 2; put fields with commas in double quotes",
    ),
    "short CSV row": (
        "a.csv",
        b"context,target\na\n",
        ":2: has 1 fields and the header 2; put fields with commas in double quotes",
    ),
    "CSV without header": (
        "a.csv",
        b"Is it up?,yes\nIs it down?,no\n",
        ":1: has no column 'context' (it has 'Is it up?, yes'); rename it or pass --context-column",
    ),
    "CSV with semicolons": (
        "a.csv",
        b"context;target\na;yes\n",
        ":1: has no column 'context' (it has 'context;target'); rename it or pass --context-column",
    ),
    "CSV column twice": (
        "a.csv",
        b"context,target,target\na,b,c\n",
        ":1: the column 'target' is there twice; keep one",
    ),
    "CSV header only": ("a.csv", b"context,target\n", ": holds no rows; check that it was written whole"),
    "CSV blank line": ("a.csv", b"context,target\n\na,yes\n", ":2: is a blank line; remove it"),
    "CSV empty target": ("a.csv", b"context,target\na,\n", ":2: empty target; fill it in or remove the row"),
    "CSV unclosed quote": (
        "a.csv",
        b'context,target\na,yes\n"b,no\nc,no\n',
        ":3: a double quote is never closed; close it, and double the quotes inside a field",
    ),
    "CSV text after a quote": (
        "a.csv",
        b'context,target\n"a"b,yes\n',
        ":2: is not CSV (',' expected after '\"'); double the quotes inside a quoted field",
    ),
    "CSV bare carriage return": (
        "a.csv",
        b"context,target\ra,yes\r",
        ":1: holds a bare carriage return; save the file with LF or CRLF line ends",
    ),
    "CSV field over the limit": (
        "a.csv",
        b'context,target\n"' + (b"x" * 2**20 + b"\n") * 17 + b'",yes\n',
        ":2: a field is longer than 16 MiB; is a double quote left open?",
    ),
    "Parquet with another column": (
        "a.parquet",
        parquet({"question": ["a"], "target": ["yes"]}),
        ": has no column 'context' (it has 'question, target'); rename it or pass --context-column",
    ),
    "Parquet column twice": (
        "a.parquet",
        parquet_columns(["context", "target", "target"], ["a"], ["b"], ["c"]),
        ": the column 'target' is there twice; keep one",
    ),
    "Parquet numbers as context": (
        "a.parquet",
        parquet({"context": [1], "target": ["yes"]}),
        ": the column 'context' is 'int64' and not text; save it as strings",
    ),
    "Parquet floats as target": (
        "a.parquet",
        parquet({"context": ["a"], "target": [0.1]}),
        ": the column 'target' is 'double' and not text; save it as strings",
    ),
    "Parquet lists": (
        "a.parquet",
        parquet({"context": [["a"]], "target": ["yes"]}),
        None,
    ),
    "Parquet null": (
        "a.parquet",
        parquet({"context": ["a", "b"], "target": ["yes", None]}),
        ": row 2: empty target; fill it in or remove the row",
    ),
    "Parquet not UTF-8": ("a.parquet", damaged_parquet_text(), ": row 1: is not UTF-8 text; save it as UTF-8"),
    "Parquet without rows": (
        "a.parquet",
        parquet({"context": pa.array([], pa.string()), "target": pa.array([], pa.string())}),
        ": holds no rows; check that it was written whole",
    ),
    "Parquet text too long": (
        "a.parquet",
        parquet({"context": ["x" * (LIMIT + 1)], "target": ["yes"]}),
        ": row 1: 'context' is longer than 16 MiB; cut the row",
    ),
    "truncated Parquet": ("a.parquet", parquet({"context": ["a"], "target": ["yes"]})[:-9], None),
    "not Parquet": ("a.parquet", GOOD * 10, None),
    "zero-byte Parquet": ("a.parquet", b"", None),
    "Parquet under a JSON name": (
        "a.jsonl",
        parquet({"context": ["a"], "target": ["yes"]}),
        ": is Parquet; give it a name that ends in .parquet",
    ),
}

# Where the words of a library, which change with its version, are quoted: the start and the end of our line.
QUOTED = {
    "damaged gzip": (":51: the gzip file is damaged (", "); write or fetch it again"),
    "Parquet lists": (": the column 'context' is 'list<", ">' and not text; save it as strings"),
    "truncated Parquet": (": cannot be read as Parquet (", "); write or fetch it again"),
    "not Parquet": (": cannot be read as Parquet (", "); write or fetch it again"),
    "zero-byte Parquet": (": cannot be read as Parquet (", "); write or fetch it again"),
}


def complaint(path: Path, **options) -> str:
    with pytest.raises(UserError) as raised:
        list(read_rows(path, **options))
    line = str(raised.value)
    assert "\n" not in line and "\r" not in line
    assert len(line) < len(str(path)) + 300
    return line


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_file(case, tmp_path):
    name, content, expected = MALFORMED[case]
    path = tmp_path / name
    path.write_bytes(content)
    line = complaint(path)
    if expected is not None:
        assert line == f"{path}{expected}"
    else:
        start, end = QUOTED[case]
        assert line.startswith(f"{path}{start}") and line.endswith(end)


def test_folder(tmp_path):
    path = tmp_path / "a.jsonl"
    path.mkdir()
    assert complaint(path) == f"{path}: is a folder; name a data file"


def test_link_loop(tmp_path):
    path = tmp_path / "a.jsonl"
    path.symlink_to(path)
    assert complaint(path) == f"{path}: cannot be read (Too many levels of symbolic links); check the path"


def test_missing(tmp_path):
    path = tmp_path / "a.jsonl"
    assert complaint(path) == f"{path}: is not there; check the path"


def test_dangling_link(tmp_path):
    path = tmp_path / "a.jsonl"
    path.symlink_to(tmp_path / "gone")
    assert complaint(path) == f"{path}: is not there; check the path"


def test_pipe_is_refused_without_waiting(tmp_path):
    path = tmp_path / "a.jsonl"
    os.mkfifo(path)
    assert complaint(path) == f"{path}: is not a regular file; name a data file"


def test_file_as_folder(tmp_path):
    (tmp_path / "a").write_bytes(GOOD)
    path = tmp_path / "a" / "b.jsonl"
    assert complaint(path) == f"{path}: cannot be read (Not a directory); check the path"


def test_nul_in_path(tmp_path):
    path = Path(f"{tmp_path}/a\0.jsonl")
    assert complaint(path) == f"{path}: cannot be read (embedded null byte); check the path"


def test_line_break_in_path(tmp_path):
    path = tmp_path / "a\nb.jsonl"
    path.write_bytes(b"[]\n")
    line = complaint(path)
    assert line == f"{tmp_path}/a b.jsonl:1: is an array and not an object; write {SHAPE} on each line"


def test_no_permission(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD)
    path.chmod(0)
    mine = os.geteuid()
    if mine == 0:
        os.seteuid(65534)  # root may read every file, nobody may not
    try:
        assert complaint(path) == f"{path}: cannot be read (Permission denied); check the path"
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
    line = complaint(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert line == f"{path}:1: the line is longer than 16 MiB; is it one row? split or cut it"
    assert peak < 3 * LIMIT


def test_a_line_at_the_limit_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    text = "x" * (LIMIT - len(GOOD))
    path.write_text(json.dumps({"context": text, "target": "yes"}) + "\n")
    assert [row.context for row in read_rows(path)] == [text]


def test_same_column_for_both(tmp_path):
    path = tmp_path / "a.jsonl"
    line = complaint(path, context="text", target="text")
    assert line == f"{path}: the context and the target cannot both be the column 'text'"


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
    ]:
        pq.write_table(pa.table({"context": ["a", "b"], "target": targets, "page": [1, 2]}), path)
        assert [row.target for row in read_rows(path)] == texts


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


def test_other_names_and_ignored_columns(tmp_path):
    path = tmp_path / "A.CSV"
    path.write_text("id,Q,A\n1,Is it up?,0\n")
    assert list(read_rows(path, "Q", "A")) == [Row(2, "Is it up?", "0")]
    path = tmp_path / "a.jsonl"
    path.write_text('{"input": "Is it up?", "pages": [1, {"a": null}], "target": "yes"}\n')
    assert list(read_rows(path, context="input")) == [Row(1, "Is it up?", "yes")]


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


def test_other_mistakes_raise_even_when_empty_texts_are_noted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"context": "a", "target": true}\n')
    assert complaint(path, left_out=[]) == f"{path}:1: 'target' is true or false and not text; write it as a string"


def test_memory_does_not_grow_with_the_file(tmp_path):
    path = tmp_path / "a.jsonl"
    with open(path, "w") as file:
        for number in range(20_000):
            file.write(json.dumps({"context": f"{number} " + "x" * 1000, "target": "yes"}) + "\n")
    tracemalloc.start()
    assert sum(1 for _ in read_rows(path)) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.skipif(not SHARED.is_dir(), reason="FinLoRA's files are not beside the project")
def test_real_files():
    counts = {path.name: sum(1 for _ in read_rows(path)) for path in SHARED.glob("*/*.jsonl")}
    assert counts["tfns_test.jsonl"] == 2388 and counts["fpb_test.jsonl"] == 1212
    for path in SHARED.glob("*/*.jsonl"):
        with open(path, encoding="utf-8") as file:
            plain = [json.loads(line) for line in file]
        assert [(row.context, row.target) for row in read_rows(path)] == [
            (row["context"], str(row["target"])) for row in plain
        ]


# Any text that can be written as UTF-8 and is neither blank nor holds a NUL.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(
    lambda text: not text.isspace()
)
pairs = st.lists(st.tuples(texts, texts), min_size=1, max_size=6)
quick = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(pairs, st.booleans(), st.booleans())
def test_json_lines_round_trip(tmp_path, rows, ascii_only, packed):
    content = "".join(json.dumps({"target": t, "context": c}, ensure_ascii=ascii_only) + "\n" for c, t in rows).encode()
    path = tmp_path / ("a.jsonl.gz" if packed else "a.jsonl")
    path.write_bytes(gzip.compress(content) if packed else content)
    assert list(read_rows(path)) == [Row(line, *row) for line, row in enumerate(rows, 1)]


@quick
@given(pairs, st.sampled_from(["\n", "\r\n"]))
def test_csv_round_trip(tmp_path, rows, end):
    path = tmp_path / "a.csv"
    # With LF line ends Python's writer leaves a bare carriage return unquoted, which nothing could read back.
    quoting = csv.QUOTE_ALL if end == "\n" else csv.QUOTE_MINIMAL
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator=end, quoting=quoting).writerows([("context", "target"), *rows])
    assert [row[1:] for row in read_rows(path)] == rows


@quick
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


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(WHOLE)), st.data())
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
    try:
        for row in read_rows(path):
            assert row.context.strip() and row.target.strip()
            (row.context + row.target).encode()
    except UserError as error:
        assert "\n" not in str(error) and str(error).startswith(str(path))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["a.jsonl", "a.csv", "a.jsonl.gz", "a.parquet"]), st.binary(max_size=200))
def test_any_bytes_give_rows_or_one_line(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    try:
        list(read_rows(path))
    except UserError as error:
        assert "\n" not in str(error) and str(error).startswith(str(path))
