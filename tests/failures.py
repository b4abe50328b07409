"""What a test asks of an error: its class, one line, the file, the line or key, and words for the fault and the remedy.

A word is matched from where a word begins and without regard to case: "remov" is in "Remove it"; "twice|duplicate"
takes either. Words are looked for after the file's name, which may hold any of them. A test chooses words that no
other fault's message has and that a better wording would keep: names, figures, stems, options, commands.
"""

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from finlora.core.errors import UserError


def says(text: str, *words: str, file: object = None, line: int | None = None, key: str | None = None) -> str:
    """The text, which is one line: it begins with the file (and line or row), and names the key whole and each word."""
    assert text and len(text.splitlines()) == 1, text
    rest = text
    if file is not None:
        place = "(?!(row|line) [0-9])" if line is None else f"(row|line) {line}: "
        start = re.match(f"{re.escape(str(file))}(: {place}{'' if line is None else f'|:{line}: '})", text)
        assert start, f"{text!r} does not begin with {file} and {'no line' if line is None else f'line {line}'}"
        rest = text[start.end() :]
    if key is not None:
        assert re.search(rf"(?<![\w\"-]){re.escape(key)}(?![\w\"-])", rest), f"{rest!r} does not name {key}"
    for word in words:
        each = "|".join(re.escape(part) + r"(?!\d)" * part[-1].isdigit() for part in word.split("|"))
        assert re.search(rf"(?<!\w)({each})", rest, re.IGNORECASE), f"{rest!r} does not say {word}"
    return text


@contextmanager
def refuses(*words: str, error: type[Exception] = UserError, **place: object) -> Iterator[pytest.ExceptionInfo]:
    """The block raises exactly this class of error, whose text says all this (as of `says`)."""
    with pytest.raises(error) as caught:
        yield caught
    assert caught.type is error
    says(str(caught.value), *words, **place)


def failed(done: subprocess.CompletedProcess, *words: str, **place: object) -> str:
    """What follows `error: ` on the only such line of a process that ended by itself, without a traceback."""
    assert done.returncode > 0 and "Traceback" not in done.stderr, done
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return says(line.removeprefix("error: "), *words, **place)
