"""Rows of FinLoRA's schema, read strictly from JSON lines, CSV or Parquet, one at a time and in bounded memory.

What is accepted beside the plain case: a UTF-8 byte order mark at the very start (Excel writes one) is dropped; CRLF
line ends are line ends; a number as target is kept as its text in the file (0, 15092.44 and 1e3 stay as written);
other keys or columns are not read, unless their name says that they are a part of the prompt, which would be lost.
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
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import IO, Any, NamedTuple

from finlora.core.errors import UserError, typed

LIMIT = 16 * 2**20  # bytes of a line or field; FinLoRA's longest line is below 1 MiB
EXAMPLE = '{"context": "...", "target": "..."}'

# Words of names of columns that hold a part of a question, in lower case and in the singular: chat formats, SQuAD and
# its kin. A name that is made of these words only is such a column: questions, pre_text, Question 1, choices_text.
PROMPT_WORDS = frozenset(
    "article background body choice claim content context conversation distractor document ending evidence exhibit "
    "fact headline history human hypothesis input instruction message news option paragraph passage post pre premise "
    "prompt query question sentence statement stem system systemprompt table text tool tweet user userprompt "
    "vignette".split()
)
# Multiple choice: A, option_b, opb, Choice C; and, only where there are several, x, 1, answer_2.
CHOICE = re.compile("(ans|answer|choice|distractor|ending|op|opt|option)?[a-h]")
ONE_OF_SEVERAL = re.compile(r"[\W_]*([a-z]|((ans|answer)[\W_]*)?\d{1,2})[\W_]*")
# Names of the other columns that files of questions have, with which a second header is told from a row.
OTHER_NAMES = frozenset(
    "id idx index q title source split target label gold ans answer output response reply completion assistant "
    "solution explanation category sentiment class summary".split()
)

# How programs write a value that is not there: pandas, R, Python, JSON, SQL, Excel, C. Compared in lower case and
# without blanks at the ends, but None and NA as they are: `none` is an answer. A label of the task is never one.
MISSING = frozenset(
    "nan -nan +nan nat <na> n/a null <null> (null) \\n #n/a #na #name? #ref! #value! #div/0! #num! #null! "
    "1.#qnan -1.#qnan 1.#ind -1.#ind".split()
) | {"#n/a n/a"}
MISSING_AS_WRITTEN = frozenset({"None", "NA"})

# A text that holds one of these would end the turn or open another one: Llama-3, ChatML (Qwen) and Gemma.
CONTROL_TOKEN = re.compile(r"<\|[a-zA-Z0-9_]+\|>|<(?:start|end)_of_turn>")

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


@dataclass(frozen=True)
class Columns:
    """The names of the two columns or keys that are read, and, by name, the first line of each that is not."""

    context: str
    target: str
    unused: dict[str, int]

    def check(self, where: str, line: int, kind: str, names: Iterable[str]) -> None:
        """Raise UserError unless both are there, each name once, and no other one is a part of the prompt."""
        names = list(names)
        doubled = next((name for name in names if names.count(name) > 1), None)
        if doubled is not None:
            raise UserError(f"{where}: the {kind} {_show(doubled)} is there twice; keep one")
        for name, option in (self.context, "--context-column"), (self.target, "--target-column"):
            if name not in names:
                option = typed(f"{option} ...")
                has = _show(", ".join(names), 80)
                raise UserError(f"{where}: has no {kind} {_show(name)} (it has {has}); rename it or pass {option}")
        others = [name for name in names if name not in (self.context, self.target)]
        several = [name for name in others if ONE_OF_SEVERAL.fullmatch(name.casefold())]
        if lost := [name for name in others if _is_prompt(name) or (len(several) > 1 and name in several)]:
            names, it, its = (f"{kind}s", "them", "their texts") if len(lost) > 1 else (kind, "it", "its text")
            raise UserError(
                f"{where}: the {names} {', '.join(map(_show, lost))} would be lost from the prompt; "
                f"put {its} into {_show(self.context)}, or remove {it}"
            )
        for name in others:
            self.unused.setdefault(name, line)

    def is_header(self, context: str, target: str) -> bool:
        """Whether a row holds two names of columns: the header of a second file, whose columns may be others."""
        own = {_plain(self.context), _plain(self.target)}
        names = {_plain(context), _plain(target)}
        return len(names) == 2 and all(name in own or _is_column(name) for name in names)


# Of each row, unchecked: its line, the place as errors name it, and its two values.
Values = Iterator[tuple[int, str, object, object]]


def read_rows(
    path: Path | str,
    context: str = "context",
    target: str = "target",
    left_out: list[LeftOut] | None = None,
    unused: dict[str, int] | None = None,
    labels: Collection[str] = (),
) -> Iterator[Row]:
    """Yield the rows of a .jsonl, .csv (both also .gz) or .parquet file in file order.

    context, target: the names of the two keys or columns. Rows with nothing to learn (a text that is empty or a missing
    value, a chat's control token) raise like any other mistake; where a list `left_out` is given they are noted there
    and passed over instead. unused: gains the names of the other keys or columns with their first line. labels: the
    task's answers, where they are a closed set; none of them is taken for a missing value.
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
    columns = Columns(context, target, {} if unused is None else unused)
    empty = True
    for line, where, *values in READERS[kind](path, columns):
        empty = False
        texts = _text(where, context, values[0], False), _text(where, target, values[1], True)
        if columns.is_header(*texts):
            raise UserError(f"{where}: is the header again (were two files joined?); remove the line")
        reason = fault_of(context, texts[0]) or fault_of(target, texts[1], labels)
        if reason is None:
            yield Row(line, *texts)
        elif left_out is None:
            remedy = "fill it in" if reason.startswith(("empty", "missing")) else "correct it"
            raise UserError(f"{where}: {reason}; {remedy} or remove the row")
        else:
            left_out.append(LeftOut(line, reason))
    if empty:
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


def _jsonl(path: Path, columns: Columns) -> Values:
    decode = json.JSONDecoder(
        object_pairs_hook=_unique_keys, parse_int=Number, parse_float=Number, parse_constant=_no_constant
    ).decode
    name, names = _name(path), None
    for line, text in _lines(path):
        where = f"{name}:{line}"
        try:
            row = decode(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: {_json_complaint(text, line, error)}") from error
        if type(row) is not dict:
            raise UserError(f"{where}: is {_kind(row)} and not an object; write {EXAMPLE} on each line")
        if row.keys() != names:
            names = row.keys()
            columns.check(where, line, "key", names)
        yield line, where, row[columns.context], row[columns.target]


def _csv(path: Path, columns: Columns) -> Values:
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
            separator = re.fullmatch(r"(?:sep=|[^;\t|]+)([;\t|]).*", header[0], re.DOTALL) if len(header) == 1 else None
            if separator:
                raise UserError(f"{where}: its columns are separated by {_show(separator[1])}; save it with commas")
            columns.check(where, line, "column", header)
            places = header.index(columns.context), header.index(columns.target)
            continue
        if len(fields) != len(header):
            counts = f"has {len(fields)} fields and the header {len(header)}"
            raise UserError(f"{where}: {counts}; put fields with commas in double quotes")
        yield line, where, fields[places[0]], fields[places[1]]


def _parquet(path: Path, columns: Columns) -> Values:
    import pyarrow  # slow to import, and needed for this kind of file only
    import pyarrow.parquet

    file_name, number = _name(path), 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns.check(file_name, 1, "column", file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=1024, columns=[columns.context, columns.target]):
                for context, target in zip(*(_values(batch[name]) for name in batch.schema.names), strict=True):
                    number += 1
                    where = f"{file_name}: row {number}"
                    target = Number(target) if type(target) in (int, Decimal) else target  # floats have no one text
                    for name, value in (columns.context, context), (columns.target, target):
                        if isinstance(value, str) and len(value) > LIMIT:
                            raise UserError(f"{where}: {_show(name)} is longer than {LIMIT >> 20} MiB; cut the row")
                    yield number, where, context, target
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
                where = f"{_name(path)}:{number}"
                if len(raw) > LIMIT:
                    raise UserError(
                        f"{where}: the line is longer than {LIMIT >> 20} MiB; is it one row? split or cut it"
                    )
                if number == 1 and raw.startswith(b"\xef\xbb\xbf"):
                    raw = raw[3:]
                    if not raw:
                        return
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


def _text(where: str, name: str, value: object, numbers: bool) -> str:
    """A value as text, "" for null; UserError where it is something else or could not be written as UTF-8."""
    if value is None:
        return ""
    if type(value) is not str and not (numbers and type(value) is Number):
        raise UserError(f"{where}: {_show(name)} is {_kind(value)} and not text; write it as a string")
    # The raw line was checked when it was decoded: these come from a JSON escape or from Parquet.
    if "\0" in value:
        raise UserError(f"{where}: {_show(name)} holds a NUL character; remove it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        what = f"half a character (\\u{ord(value[error.start]):04x}, a lone surrogate)"
        raise UserError(f"{where}: {_show(name)} holds {what}; replace it") from error
    return str(value)


def fault_of(name: str, text: str, labels: Collection[str] = ()) -> str | None:
    """Why a row with this text has nothing to learn from; None where it has. labels: texts that are answers."""
    plain = text.strip()
    if not plain:
        return f"empty {name}"
    if (plain in MISSING_AS_WRITTEN or plain.casefold() in MISSING) and text not in labels:
        return f"missing {name} ({plain!r})"
    if "<" in text and (token := CONTROL_TOKEN.search(text)):
        return f"{name} holds the chat's control token {token[0]}"
    return None


def _is_prompt(name: str) -> bool:
    return _has_only(name, PROMPT_WORDS) or CHOICE.fullmatch(re.sub(r"[\W\d_]+", "", name.casefold())) is not None


def _is_column(name: str) -> bool:
    return len(name) < 40 and _has_only(name, PROMPT_WORDS | OTHER_NAMES)


def _has_only(name: str, known: frozenset[str]) -> bool:
    """Whether all words of a name (singular or plural, digits left out) are known, and there is at least one."""
    words = re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).casefold())
    return bool(words) and all({word, word.removesuffix("s")} & known for word in words)


def _plain(text: str) -> str:
    return text.strip("\ufeff \t").casefold()


class _Complaint(ValueError):
    """What is wrong with a line that json alone would accept, and what to do."""


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        doubled = next(key for key in keys if keys.count(key) > 1)
        raise _Complaint(f"the key {_show(doubled)} is there twice; keep one")
    return row


def _no_constant(text: str) -> None:
    raise _Complaint(f"{text} is not JSON; write a number or a string")


def _json_complaint(text: str, line: int, error: Exception) -> str:
    if isinstance(error, RecursionError):
        return f"is nested too deeply; write {EXAMPLE}"
    if isinstance(error, _Complaint):
        return str(error)
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
    return kinds.get(type(value)) or ("null" if value is None else f"of the type {type(value).__name__}")


def _name(path: Path) -> str:
    return _one_line(path, 4096)


def _show(text: str, width: int = 40) -> str:
    """Quote a text of the file so that it stays on one line and short."""
    quoted = json.dumps(text)[1:-1]
    return f"'{quoted if len(quoted) <= width else quoted[: width - 3] + '...'}'"


def _one_line(what: object, width: int = 120) -> str:
    text = " ".join(str(what).split())
    return text if len(text) <= width else text[: width - 3] + "..."
