"""Rows to train on or to answer: a question and its answer, read strictly from a file and in bounded memory.

Everything that is not such a row raises finlora.core.errors.UserError with one line that names the file and the line.
A number as target is kept as its text in the file (0, 15092.44 and 1e3 stay as written).
"""

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from finlora.core.errors import UserError
from finlora.core.html import visible
from finlora.data.layouts import Columns, Reading, Turn
from finlora.data.readers import file_name, read_records
from finlora.data.tokens import chat

# How programs write a value that is not there: pandas, R, Python, JSON, SQL, Excel, C. Compared in lower case and
# without blanks at the ends, but None and NA as they are: `none` is an answer. A label of the task is never one.
MISSING = frozenset(
    "nan -nan +nan nat <na> n/a null <null> (null) \\n #n/a #na #name? #ref! #value! #div/0! #num! #null! "
    "1.#qnan -1.#qnan 1.#ind -1.#ind".split()
) | {"#n/a n/a"}
MISSING_AS_WRITTEN = frozenset({"None", "NA"})

# A text that holds one of these would end the turn or open another one: Llama-3, ChatML (Qwen) and Gemma.
CONTROL_TOKEN = re.compile(r"<\|[a-zA-Z0-9_]+\|>|<(?:start|end)_of_turn>")


class Row(NamedTuple):
    """One example: where it is (see readers.Record), its question and its answer, and the turns before the question."""

    line: int
    context: str
    target: str
    earlier: tuple[Turn, ...] = ()

    @property
    def turns(self) -> list[Turn]:
        return [*self.earlier, Turn("user", self.context), Turn("assistant", self.target)]

    @property
    def prompt(self) -> str:
        """All that comes before the answer, as near-duplicates are looked for."""
        return "\n".join(turn.content for turn in self.turns[:-1])


class LeftOut(NamedTuple):
    """A row that is not used: its line and the reason."""

    line: int
    reason: str


def read_rows(
    path: Path | str,
    columns: Mapping[str, str] | None = None,
    left_out: list[LeftOut] | None = None,
    reading: Reading | None = None,
    labels: Collection[str] = (),
) -> Iterator[Row]:
    """Yield the rows of a file in its order.

    columns: names of LAYOUTS by the file's own. Rows with nothing to learn (a text that is empty or a missing value, a
    chat's control token) raise like any other mistake; where a list `left_out` is given they are noted there and
    passed over instead. reading: gains what is to be said of the file. labels: the task's answers, where they are a
    closed set; none of them is taken for a missing value.
    Raises UserError (one line: file, line or row, what is wrong, what to do), also when there is no row at all.
    """
    path, reading = Path(path), Reading() if reading is None else reading
    read = Columns(columns or {}, reading)
    empty = True
    for record in read_records(path, read.check, reading.notes):
        empty = False
        turns, texts = read.turns(record)
        row = Row(record.line, turns[-2].content, turns[-1].content, tuple(turns[:-2]))
        if len(texts) == 2 and texts[0][0] in record.values and read.is_header(row.context, row.target):
            raise UserError(f"{record.where}: is the header again (were two files joined?); remove the line")
        if read.suspects:
            read.check_lost(record, [text for _, text in texts])
        reason = next(filter(None, [fault_of(*text) for text in texts[:-1]]), None) or fault_of(*texts[-1], labels)
        if reason is None:
            yield row
        elif left_out is None:
            remedy = "fill it in" if reason.startswith(("empty", "missing")) else "correct it"
            raise UserError(f"{record.where}: {reason}; {remedy} or remove the row")
        else:
            left_out.append(LeftOut(record.line, reason))
    if empty:
        raise UserError(f"{file_name(path)}: holds no rows; check that it was written whole")


def preview(path: Path, columns: Mapping[str, str], labels: Collection[str] = ()) -> str:
    """What a file is taken for, and its first row as Llama-3's chat template writes it."""
    reading = Reading()
    row = next(read_rows(path, columns, [], reading, labels), None)
    lines = [f"{path}: {reading.layout}"]
    if columns:
        lines[0] += f" ({', '.join(f'{name} as {meant}' for name, meant in columns.items())})"
    lines += [f"  taken all the same: {note}" for note in reading.notes]
    if reading.unused:
        lines.append(f"  not used: {', '.join(reading.unused)}")
    if row:
        lines.append("  the first row as the model sees it; what the assistant says is trained:")
        lines += [f"    {line}" for line in visible(chat(row.turns), 1000, 500).splitlines()]
    return "\n".join(lines)


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
