"""Files of rows, one record at a time with its line: JSON lines, a JSON array, CSV (these also packed) or Parquet.

Python's json and csv read text, since they say at which line and column a file is wrong: pyarrow and pandas take an
open quote or a key that is there twice without a word. What loses nothing is taken and noted: a byte order mark at the
start, blank lines at the end, semicolons or tabs in place of commas. All else that is wrong raises UserError with one
line that names the file and the line.
"""

import csv
import gzip
import io
import json
import os
import re
import stat
import zlib
from collections.abc import Callable, Collection, Iterator
from decimal import Decimal
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

from finlora.core.errors import UserError

LIMIT = 16 * 2**20  # bytes of a line or field; FinLoRA's longest line is below 1 MiB
EXAMPLE = '{"context": "...", "target": "..."}'
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
ENDINGS = ".jsonl, .json, .csv, .tsv (also with .gz or .zst) or .parquet"

# How files begin that are something other than their name says.
MAGIC = [
    (b"\xff\xfe", "is UTF-16; save it as UTF-8"),
    (b"\xfe\xff", "is UTF-16; save it as UTF-8"),
    (b"\x1f\x8b", "is compressed with gzip; add .gz to its name"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd; add .zst to its name"),
    (b"PAR1", "is Parquet; give it a name that ends in .parquet"),
    (b"PK\x03\x04", "is a zip or Excel file; unpack it or save it as CSV (UTF-8)"),
    (b"version https://git-lfs", "is a Git LFS pointer and not the data; fetch it with `make data`"),
]


class Record(NamedTuple):
    """A row's values by key or column. line: JSON lines: its line; CSV: its first; else its number, from 1.

    where: the file and the line, as errors name them.
    """

    line: int
    where: str
    values: dict[str, Any]


class Number(str):
    """The text of a number, kept as written."""


# Called with a place as errors name it, its line, "key" or "column", and the names that are there, before the first
# record that has these names: raises UserError where some are missing, and returns those whose values are needed.
Check = Callable[[str, int, str, list[str]], Collection[str]]


def read_records(path: Path, check: Check, notes: list[str]) -> Iterator[Record]:
    """Yield the records of a file in its order; `notes` gains what was taken although it is not quite as it should be.

    Raises UserError where the file or a record cannot be read.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = len(suffixes) > 1 and suffixes[-1] in (".gz", ".zst")
    kind = suffixes[-2] if packed else "".join(suffixes[-1:])
    if kind not in READERS or (kind == ".parquet" and packed):
        raise UserError(f"{file_name(path)}: the name must end in {ENDINGS}; rename or convert it")
    check_regular_file(path)
    return READERS[kind](path, check, notes)


def check_regular_file(path: Path) -> None:
    """Raise UserError unless `path` is a file that can be opened: not a folder, a pipe, or a link in a circle."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise UserError(f"{file_name(path)}: is {what}; name a data file")


def _json(path: Path, check: Check, notes: list[str]) -> Iterator[Record]:
    name, names, blank = file_name(path), None, 0
    for line, text in _lines(path, notes, arrays=True):
        where = f"{name}:{line}"
        if not text.strip():
            blank = blank or line
            continue
        if blank:
            raise UserError(f"{name}:{blank}: is blank; remove it")
        array = line == 1 and text.lstrip().startswith("[")
        value = _decoded(name, where, text, array)
        for number, values in enumerate(value if array else [value], 1):
            line, where = (number, f"{name}: row {number}") if array else (line, where)
            if type(values) is not dict:
                raise UserError(f"{where}: is {kind_of(values)} and not an object; write {EXAMPLE} for each row")
            if values.keys() != names:
                names = values.keys()
                check(where, line, "key", list(names))
            yield Record(line, where, values)
    if blank:
        notes.append("blank lines at the end")


def _decoded(name: str, where: str, text: str, array: bool) -> Any:
    try:
        return DECODER.decode(text)
    except RecursionError as error:
        raise UserError(f"{where}: is nested too deeply; write {EXAMPLE}") from error
    except json.JSONDecodeError as error:
        if text.startswith("\ufeff"):
            raise UserError(f"{where}: starts with a byte order mark; remove it (were two files joined?)") from error
        if array:
            where, column, remedy = f"{name}:{error.lineno}", error.colno, "was the array written whole?"
        else:
            column, remedy = error.pos + 1, f"write one whole object on each line, {EXAMPLE}"
        raise UserError(f"{where}: is not JSON ({error.msg} at column {column}); {remedy}") from error
    except ValueError as error:  # of the two functions below
        raise UserError(f"{where}: {error}") from error


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        doubled = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {quoted(doubled)} is there twice; keep one")
    return row


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON; write a number or a string")


DECODER = json.JSONDecoder(
    object_pairs_hook=_unique_keys, parse_int=Number, parse_float=Number, parse_constant=_no_constant
)


def _csv(path: Path, check: Check, notes: list[str]) -> Iterator[Record]:
    csv.field_size_limit(LIMIT)
    name, lines = file_name(path), _lines(path, notes)
    skipped, first = 0, next(lines, (1, ""))[1]
    separator = re.fullmatch(rf'"?sep=([{"".join(SEPARATORS)}])"?\s*', first)
    if separator:  # Excel's own line
        skipped, first = 1, next(lines, (2, ""))[1]
    separator = separator[1] if separator else max(SEPARATORS, key=lambda one: len(_header(first, one)))
    if separator != ",":
        notes.append(f"columns separated by {SEPARATORS[separator]}")
    reader = csv.reader(chain([first], (text for _, text in lines)), delimiter=separator, strict=True)
    header: list[str] = []
    blank: list[int] = []  # lines that must be the last ones
    while True:
        line = reader.line_num + 1 + skipped
        where = f"{name}:{line}"
        try:
            fields = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            raise UserError(f"{where}: {_csv_complaint(str(error))}") from error
        if not any(field.strip() for field in fields):
            blank.append(line)
            continue
        if blank:
            raise UserError(f"{name}:{blank[0]}: is blank; remove it")
        if not header:
            header = fields
            check_names(where, "column", header)
            check(where, line, "column", header)
            continue
        if len(fields) != len(header):
            counts = f"has {len(fields)} fields and the header {len(header)}"
            raise UserError(f"{where}: {counts}; put fields with {SEPARATORS[separator]} in double quotes")
        yield Record(line, where, dict(zip(header, fields, strict=True)))
    if blank and header:
        notes.append("blank lines at the end")


def _header(line: str, separator: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=separator, strict=True), [])
    except csv.Error:  # its name goes on in the next line
        return []


def check_names(where: str, kind: str, names: list[str]) -> None:
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled is not None:
        raise UserError(f"{where}: the {kind} {quoted(doubled)} is there twice; keep one")


def _csv_complaint(error: str) -> str:
    if "field larger" in error:
        return f"a field is longer than {LIMIT >> 20} MiB; is a double quote left open?"
    if "unexpected end" in error:
        return "a double quote is never closed; close it, and double the quotes inside a field"
    if "new-line character" in error:
        return "holds a bare carriage return; save the file with LF or CRLF line ends"
    return f"is not CSV ({error}); double the quotes inside a quoted field"


def _parquet(path: Path, check: Check, notes: list[str]) -> Iterator[Record]:
    import pyarrow  # slow to import, and needed for this kind of file only
    import pyarrow.parquet

    name, number = file_name(path), 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            check_names(name, "column", names)
            used = list(check(name, 1, "column", names))
            classes = _class_names(file.schema_arrow)
            for batch in file.iter_batches(batch_size=1024, columns=used):
                for row in zip(*(_values(batch[column]) for column in used), strict=True):
                    number += 1
                    where = f"{name}: row {number}"
                    values = dict(zip(used, row, strict=True))
                    for column in classes.keys() & values.keys():
                        values[column] = _class_name(where, column, values[column], classes[column])
                    numbers = {key: Number(one) for key, one in values.items() if type(one) in (int, Decimal)}
                    yield Record(number, where, values | numbers)  # floats have no one text
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: row {number + 1}: is not UTF-8 text; save it as UTF-8") from error
    except (pyarrow.ArrowException, OSError, MemoryError) as error:
        place = f" after row {number}" if number else ""
        raise UserError(
            f"{name}: cannot be read as Parquet{place} ({one_line(error)}); write or fetch it again"
        ) from error


def _values(column: Any) -> Any:
    """A column's values. Where a text is not UTF-8 they come one by one, so that the error rises at its own row."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return (value.as_py() for value in column)


def _class_names(schema: Any) -> dict[str, list[str]]:
    """The names of each column's classes, which the file holds as numbers; datasets writes them into its metadata."""
    if b"huggingface" not in (schema.metadata or {}):
        return {}
    from datasets import ClassLabel, Features  # takes seconds to import

    features = Features.from_arrow_schema(schema)
    return {name: feature.names for name, feature in features.items() if isinstance(feature, ClassLabel)}


def _class_name(where: str, column: str, number: int | None, names: list[str]) -> str | None:
    if number is None or number == -1:  # datasets' mark of a row without a label
        return None
    if not 0 <= number < len(names):
        text = f"{quoted(column)} is {number}, and the file names {len(names)} classes, from 0"
        raise UserError(f"{where}: {text}; write it again")
    return names[number]


READERS = {".jsonl": _json, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}


def _lines(path: Path, notes: list[str], arrays: bool = False) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, text with its line end) of a UTF-8 file, never holding more than one line.

    arrays: a file that is one JSON array comes as a whole.
    """
    number = 0
    try:
        with _open(path) as file:
            _check_magic(path, file)
            whole = arrays and re.match(rb"(\xef\xbb\xbf)?\s*\[", file.peek(32)[:32])
            while raw := file.read() if whole else file.readline(LIMIT + 1):
                number += 1
                where = f"{file_name(path)}:{number}"
                if len(raw) > LIMIT and not whole:
                    raise UserError(
                        f"{where}: the line is longer than {LIMIT >> 20} MiB; is it one row? split or cut it"
                    )
                if number == 1 and raw.startswith(b"\xef\xbb\xbf"):
                    raw = raw[3:]
                    if not raw:
                        return
                    notes.append("a byte order mark at the start")
                if b"\0" in raw:
                    raise UserError(f"{where}: holds a NUL byte; the file is damaged or UTF-16: save it as UTF-8")
                try:
                    yield number, raw.decode()
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{where}: is not UTF-8 at byte {error.start + 1} of the line "
                        f"(0x{raw[error.start]:02x}); save the file as UTF-8"
                    ) from error
    except EOFError as error:
        raise UserError(
            f"{file_name(path)}:{number + 1}: the gzip file is cut short; write or fetch it again"
        ) from error
    except (OSError, zlib.error) as error:
        if getattr(error, "errno", None) is not None:  # the system's, and not of what is packed
            raise _unreadable(path, error) from error
        kind = "gzip" if path.suffix.lower() == ".gz" else "zstd"
        if number:
            what = f"the {kind} file is damaged ({one_line(error)}); write or fetch it again"
            raise UserError(f"{file_name(path)}:{number + 1}: {what}") from error
        what = f"is not a {kind} file ({one_line(error)}); take {path.suffix} off its name or fetch it again"
        raise UserError(f"{file_name(path)}: {what}") from error


def _open(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")
    if path.suffix.lower() == ".zst":
        import pyarrow  # slow to import, and needed for this kind of file only

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return open(path, "rb")


def _check_magic(path: Path, file: IO[bytes]) -> None:
    start = file.peek(32)[:32]
    for magic, complaint in MAGIC:
        if start.startswith(magic):
            raise UserError(f"{file_name(path)}: {complaint}")
    if re.match(rb"\s*<(!doctype|html|\?xml)", start, re.IGNORECASE):
        raise UserError(f"{file_name(path)}: is a web page and not data; fetch it again")


def _unreadable(path: Path, error: Exception) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"{file_name(path)}: is not there; check the path")
    return UserError(f"{file_name(path)}: cannot be read ({getattr(error, 'strerror', None) or error}); check the path")


def kind_of(value: object) -> str:
    kinds = {dict: "an object", list: "an array", bool: "true or false", Number: "a number", str: "a string"}
    return kinds.get(type(value)) or ("null" if value is None else f"of the type {type(value).__name__}")


def file_name(path: Path) -> str:
    return one_line(path, 4096)


def quoted(text: str, width: int = 40) -> str:
    """Quote a text of the file so that it stays on one line and short."""
    escaped = json.dumps(text)[1:-1]
    return f"'{escaped if len(escaped) <= width else escaped[: width - 3] + '...'}'"


def one_line(what: object, width: int = 120) -> str:
    text = " ".join(str(what).split())
    return text if len(text) <= width else text[: width - 3] + "..."
