"""Rows of FinLoRA's schema, read strictly from JSON lines, CSV or Parquet, one at a time and in bounded memory.

What is accepted beside the plain case: a UTF-8 byte order mark at the very start (Excel writes one) is dropped; CRLF
line ends are line ends; a number as target is kept as its text in the file (0, 15092.44 and 1e3 stay as written);
other keys or columns are ignored, unless one of them holds a part of a prompt (PROMPT_KEYS), which would be lost.
Everything else that is not two texts raises finlora.core.errors.UserError with one line that names the file and the
line.
"""

import csv
import gzip
import json
import os
import re
import stat
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from finlora.core.errors import UserError

LIMIT = 16 * 2**20  # bytes of a line or field; FinLoRA's longest line is below 1 MiB
PROMPT_KEYS = frozenset({"conversations", "history", "input", "instruction", "messages", "prompt", "system", "tools"})
EXAMPLE = '{"context": "...", "target": "..."}'

# How files begin that are something other than their name says.
MAGIC = [
    (b"\xff\xfe", "is UTF-16; save it as UTF-8"),
    (b"\xfe\xff", "is UTF-16; save it as UTF-8"),
    (b"\x1f\x8b", "is compressed with gzip; add .gz to its name"),
    (b"PAR1", "is Parquet; give it a name that ends in .parquet"),
    (b"PK\x03\x04", "is a zip or Excel file; unpack it or save it as CSV (UTF-8)"),
    (b"version https://git-lfs", "is a Git LFS pointer and not the data; fetch it with `make data`"),
]


class Row(NamedTuple):
    """One example: the line (JSON lines: its line; CSV: its first line; Parquet: its row, from 1) and its two texts."""

    line: int
    context: str
    target: str


class LeftOut(NamedTuple):
    """A row that is not used: its line and the reason."""

    line: int
    reason: str


class Number(str):
    """The text of a JSON number, kept as written."""


def read_rows(
    path: Path | str, context: str = "context", target: str = "target", left_out: list[LeftOut] | None = None
) -> Iterator[Row]:
    """Yield the rows of a .jsonl, .csv (both also .gz) or .parquet file in file order.

    `context` and `target` are the names of the two keys or columns. Rows whose context or target is empty, blank or
    null raise like any other mistake; where a list `left_out` is given they are noted there and passed over instead.
    Raises UserError (one line: file, line or row, what is wrong, what to do), also when there is no row at all.
    """
    path = Path(path)
    if context == target:
        raise UserError(f"{_name(path)}: the context and the target cannot both be the column {_show(context)}")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else "".join(suffixes[-1:])
    if kind not in READERS or (kind == ".parquet" and suffixes[-1] == ".gz"):
        hint = "if it holds one JSON object a line, rename it to .jsonl" if kind == ".json" else "rename or convert it"
        raise UserError(f"{_name(path)}: the name must end in .jsonl, .jsonl.gz, .csv, .csv.gz or .parquet; {hint}")
    check_regular_file(path)
    found = False
    for row in READERS[kind](path, context, target, left_out):
        found = True
        yield row
    if not found and not left_out:
        raise UserError(f"{_name(path)}: holds no rows; check that it was written whole")


def check_regular_file(path: Path) -> None:
    """Raise UserError unless `path` is a file that can be opened: not a folder, a pipe, or a link in a circle."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise UserError(f"{_name(path)}: is {what}; name a data file")


def _jsonl(path: Path, context: str, target: str, left_out: list[LeftOut] | None) -> Iterator[Row]:
    decode = json.JSONDecoder(
        object_pairs_hook=_unique_keys, parse_int=Number, parse_float=Number, parse_constant=_no_constant
    ).decode
    name = _name(path)
    for line, text in _lines(path):
        where = f"{name}:{line}"
        try:
            row = decode(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: {_json_complaint(text, line, error)}") from error
        if type(row) is not dict:
            raise UserError(f"{where}: is {_kind(row)} and not an object; write {EXAMPLE} on each line")
        if len(row) != 2 or context not in row or target not in row:
            _check_names(where, "key", list(row), context, target)
        # Only an escape can bring in a lone surrogate or a NUL: the raw line was checked when it was decoded.
        checked = _check(where, row[context], row[target], context, target, "\\u" in text)
        if type(checked) is str:
            _leave_out(where, line, checked, left_out)
        else:
            yield Row(line, *checked)


def _csv(path: Path, context: str, target: str, left_out: list[LeftOut] | None) -> Iterator[Row]:
    csv.field_size_limit(LIMIT)
    reader = csv.reader((text for _, text in _lines(path)), strict=True)
    name = _name(path)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        where = f"{name}:{line}"
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{where}: {_csv_complaint(str(error))}") from error
        if not fields:
            raise UserError(f"{where}: is a blank line; remove it")
        if not header:
            header = fields
            _check_names(where, "column", header, context, target)
            places = header.index(context), header.index(target)
            continue
        if len(fields) != len(header):
            counts = f"has {len(fields)} fields and the header {len(header)}"
            raise UserError(f"{where}: {counts}; put fields with commas in double quotes")
        checked = _check(where, fields[places[0]], fields[places[1]], context, target, False)
        if type(checked) is str:
            _leave_out(where, line, checked, left_out)
        else:
            yield Row(line, *checked)


def _parquet(path: Path, context: str, target: str, left_out: list[LeftOut] | None) -> Iterator[Row]:
    import pyarrow  # slow to import, and needed for this kind of file only
    import pyarrow.parquet

    file_name = _name(path)
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            _check_names(file_name, "column", schema.names, context, target)
            for name, numbers in (context, False), (target, True):
                kind = schema.field(name).type
                text = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
                if not (
                    pyarrow.types.is_string(text)
                    or pyarrow.types.is_large_string(text)
                    or (numbers and (pyarrow.types.is_integer(text) or pyarrow.types.is_decimal(text)))
                ):
                    what = f"the column {_show(name)} is {_show(str(kind), 60)} and not text"
                    raise UserError(f"{file_name}: {what}; save it as strings")
            for batch in file.iter_batches(batch_size=1024, columns=[context, target]):
                for one, other in zip(_values(batch[context]), _values(batch[target]), strict=True):
                    number += 1
                    where = f"{file_name}: row {number}"
                    if other is not None and type(other) is not str:
                        other = str(other)
                    for name, value in (context, one), (target, other):
                        if value is not None and len(value) > LIMIT:
                            raise UserError(f"{where}: {_show(name)} is longer than {LIMIT >> 20} MiB; cut the row")
                    checked = _check(where, one, other, context, target, True)
                    if type(checked) is str:
                        _leave_out(where, number, checked, left_out)
                    else:
                        yield Row(number, *checked)
    except UnicodeDecodeError as error:
        raise UserError(f"{file_name}: row {number + 1}: is not UTF-8 text; save it as UTF-8") from error
    except (pyarrow.ArrowException, OSError, MemoryError) as error:
        place = f" after row {number}" if number else ""
        raise UserError(
            f"{file_name}: cannot be read as Parquet{place} ({_one_line(error)}); write or fetch it again"
        ) from error


def _values(column: Any) -> Iterable[object]:
    """A column's values. Where a text is not UTF-8 they come one by one, so that the error rises at its own row."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return (value.as_py() for value in column)


READERS = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, text with its line end) of a UTF-8 file, never holding more than one line."""
    number = 0
    packed = path.suffix.lower() == ".gz"
    try:
        with gzip.open(path, "rb") if packed else open(path, "rb") as file:
            _check_magic(path, file)
            while raw := file.readline(LIMIT + 1):
                number += 1
                if len(raw) > LIMIT:
                    what = f"the line is longer than {LIMIT >> 20} MiB"
                    raise UserError(f"{_name(path)}:{number}: {what}; is it one row? split or cut it")
                if number == 1 and raw.startswith(b"\xef\xbb\xbf"):
                    raw = raw[3:]
                    if not raw:
                        return
                if b"\0" in raw:
                    raise UserError(
                        f"{_name(path)}:{number}: holds a NUL byte; the file is damaged or UTF-16: save it as UTF-8"
                    )
                try:
                    yield number, raw.decode()
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{_name(path)}:{number}: is not UTF-8 at byte {error.start + 1} of the line "
                        f"(0x{raw[error.start]:02x}); save the file as UTF-8"
                    ) from error
    except EOFError as error:
        raise UserError(f"{_name(path)}:{number + 1}: the gzip file is cut short; write or fetch it again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        if number:
            what = f"the gzip file is damaged ({_one_line(error)}); write or fetch it again"
            raise UserError(f"{_name(path)}:{number + 1}: {what}") from error
        raise UserError(f"{_name(path)}: is not a gzip file; take .gz off its name or fetch it again") from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _check_magic(path: Path, file: IO[bytes]) -> None:
    start = file.peek(32)[:32]
    for magic, complaint in MAGIC:
        if start.startswith(magic):
            raise UserError(f"{_name(path)}: {complaint}")
    if re.match(rb"\s*<(!doctype|html|\?xml)", start, re.IGNORECASE):
        raise UserError(f"{_name(path)}: is a web page and not data; fetch it again")


def _check(
    where: str, context: object, target: object, context_name: str, target_name: str, escapes: bool
) -> tuple[str, str] | str:
    """Return the two texts, or the reason for which the row has nothing to learn from; raise where it is wrong."""
    if type(context) is not str and context is not None:
        raise UserError(f"{where}: {_show(context_name)} is {_kind(context)} and not text; write it as a string")
    if type(target) is not str and target is not None:
        if type(target) is not Number:
            raise UserError(f"{where}: {_show(target_name)} is {_kind(target)} and not text; write it as a string")
        target = str(target)
    if escapes:
        for name, text in (context_name, context), (target_name, target):
            _check_characters(where, name, text or "")
    if not context or context.isspace():
        return f"empty {context_name}"
    if not target or target.isspace():
        return f"empty {target_name}"
    return context, target


def _check_characters(where: str, name: str, text: str) -> None:
    if "\0" in text:
        raise UserError(f"{where}: {_show(name)} holds a NUL character; remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        what = f"half a character (\\u{ord(text[error.start]):04x}, a lone surrogate)"
        raise UserError(f"{where}: {_show(name)} holds {what}; replace it") from error


def _check_names(where: str, what: str, names: list[str], context: str, target: str) -> None:
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled is not None:
        raise UserError(f"{where}: the {what} {_show(doubled)} is there twice; keep one")
    for name, option in (context, "--context-column"), (target, "--target-column"):
        if name not in names:
            has = _show(", ".join(names), 80)
            raise UserError(f"{where}: has no {what} {_show(name)} (it has {has}); rename it or pass {option}")
    lost = sorted((PROMPT_KEYS & set(names)) - {context, target})
    if lost:
        raise UserError(
            f"{where}: the {what} {_show(lost[0])} would be lost from the prompt; put its text into {_show(context)}"
        )


def _leave_out(where: str, line: int, reason: str, left_out: list[LeftOut] | None) -> None:
    if left_out is None:
        raise UserError(f"{where}: {reason}; fill it in or remove the row")
    left_out.append(LeftOut(line, reason))


class _DuplicateKey(ValueError):
    pass


class _NotANumber(ValueError):
    pass


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateKey(next(key for key in keys if keys.count(key) > 1))
    return row


def _no_constant(text: str) -> None:
    raise _NotANumber(text)


def _json_complaint(text: str, line: int, error: Exception) -> str:
    if isinstance(error, RecursionError):
        return f"is nested too deeply; write {EXAMPLE}"
    if isinstance(error, _DuplicateKey):
        return f"the key {_show(str(error))} is there twice; keep one"
    if isinstance(error, _NotANumber):
        return f"{error} is not JSON; write a number or a string"
    if not text.strip():
        return "is a blank line; remove it"
    if text.startswith("\ufeff"):
        return "starts with a byte order mark; remove it (were two files joined?)"
    if line == 1 and text.lstrip().startswith("["):
        return f"the file is one JSON array; write one object a line, {EXAMPLE}"
    return f"is not JSON ({error.msg} at column {error.pos + 1}); write one whole object on each line, {EXAMPLE}"


def _csv_complaint(error: str) -> str:
    if "field larger" in error:
        return f"a field is longer than {LIMIT >> 20} MiB; is a double quote left open?"
    if "unexpected end" in error:
        return "a double quote is never closed; close it, and double the quotes inside a field"
    if "new-line character" in error:
        return "holds a bare carriage return; save the file with LF or CRLF line ends"
    return f"is not CSV ({error}); double the quotes inside a quoted field"


def _unreadable(path: Path, error: OSError | ValueError) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"{_name(path)}: is not there; check the path")
    return UserError(f"{_name(path)}: cannot be read ({getattr(error, 'strerror', None) or error}); check the path")


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "an array", bool: "true or false", Number: "a number", str: "a string"}
    return kinds.get(type(value), "null")


def _name(path: Path) -> str:
    return _one_line(path, 4096)


def _show(text: str, width: int = 40) -> str:
    """Quote a text of the file so that it stays on one line and short."""
    quoted = json.dumps(text)[1:-1]
    return f"'{quoted if len(quoted) <= width else quoted[: width - 3] + '...'}'"


def _one_line(what: object, width: int = 120) -> str:
    text = " ".join(str(what).split())
    return text if len(text) <= width else text[: width - 3] + "..."
