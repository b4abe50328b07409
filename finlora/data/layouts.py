"""The layouts of rows that people have, and how each gives a question and its answer.

FinLoRA's own (context and target), chats as OpenAI (messages) and ShareGPT (conversations) write them, Alpaca, prompt
and completion. The first record decides which one a file has. Keys or columns of other names are mapped to these. What
is not used is named; where its name says that it is a part of the prompt, and the row's texts do not hold it, it would
be lost, and the row is refused.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from finlora.core.errors import UserError, did_you_mean, typed
from finlora.data.readers import LIMIT, Number, Record, kind_of, quoted

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
    "id idx index q a title source split target label gold ans answer output response reply completion assistant "
    "solution explanation category sentiment class summary".split()
)

TURN_KEYS = {"role", "from", "content", "value", "name", "id", "weight"}
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}


class Turn(NamedTuple):
    role: str
    content: str


Parts = tuple[
    list[Turn], list[tuple[str, str]]
]  # a row's turns; its texts by the names that errors give them, answer last


@dataclass
class Reading:
    """What read_rows tells of a file besides its rows.

    layout: what its rows are, in words. unused: the first line of each key or column that is not read. notes: what was
    taken although it is not quite as it should be.
    """

    layout: str = ""
    unused: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Layout:
    """A form of rows by the names of its keys or columns; without `optional` ones the row means the same."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


LAYOUTS = (
    Layout("context and target", ("context", "target")),
    Layout("OpenAI messages", ("messages",), ("system",)),
    Layout("ShareGPT conversations", ("conversations",), ("system",)),
    Layout("Alpaca (instruction, input and output)", ("instruction", "output"), ("input", "system")),
    Layout("prompt and completion", ("prompt", "completion"), ("system",)),
)


@dataclass
class Columns:
    """Which keys or columns of a file are read. mapping: names of LAYOUTS by the file's own, where those differ.

    layout: decided by the first record. names: the file's, by those of the layout. suspects: the file's names of what
    may be a part of the prompt and is not read.
    """

    mapping: Mapping[str, str]
    reading: Reading
    layout: Layout | None = None
    kind: str = ""
    names: dict[str, list[str]] = field(default_factory=dict)
    suspects: list[str] = field(default_factory=list)

    def check(self, where: str, line: int, kind: str, names: list[str]) -> list[str]:
        """See readers.Check."""
        here = {name: [name] for name in names if name not in self.mapping}
        here |= {
            meant: [name for name in self.mapping if self.mapping[name] == meant] for meant in self.mapping.values()
        }
        mapped = [] if self.layout else list(self.mapping)  # a record of JSON may lack what is optional
        self.layout = self.layout or next((each for each in LAYOUTS if here.keys() >= {*each.required}), LAYOUTS[0])
        self.kind, layout = kind, self.layout
        required = [name for meant in layout.required for name in here.get(meant, [meant])]
        for name in mapped + required:
            if name not in names:
                remedy = typed("--columns NAME=context,NAME=target", 'COLUMNS="NAME=context,NAME=target"')
                has = quoted(", ".join(names), 80)
                raise UserError(
                    f"{where}: has no {kind} {quoted(name)} (it has {has}); rename it, or map it by {remedy}"
                )
        if other := set(self.mapping.values()).difference(layout.required, layout.optional):
            raise UserError(f"{where}: is read as {layout.name}, which has no {other.pop()!r}; correct the mapping")
        self.names = {meant: here[meant] for meant in layout.required + layout.optional if meant in here}
        used = [name for own in self.names.values() for name in own]
        others = [name for name in names if name not in used]
        several = [name for name in others if ONE_OF_SEVERAL.fullmatch(name.casefold())]
        self.suspects = [name for name in others if _is_prompt(name) or (len(several) > 1 and name in several)]
        self.reading.layout = layout.name
        for name in others:
            self.reading.unused.setdefault(name, line)
        return used + self.suspects

    def turns(self, record: Record) -> Parts:
        where, values, required = record.where, record.values, self.layout.required
        own = [name for meant in required for name in self.names[meant]]
        if len(required) == 2 and not ("prompt" in required and type(values[own[0]]) is list):
            return _question(where, values, self.names, self.layout)
        system = [{"role": "system", "content": values.get(name)} for name in self.names.get("system", [])]
        messages = [message for name in own for message in _messages(where, name, values[name])]
        return _chat(where, [turn for turn in system if turn["content"]] + messages)

    def check_lost(self, record: Record, texts: list[str]) -> None:
        """Raise UserError where the row's texts do not hold what other columns have of the prompt."""
        lost = [name for name in self.suspects if name in record.values and not _is_held(record.values[name], texts)]
        if lost:
            names, it, its = (
                (f"{self.kind}s", "them", "their texts") if len(lost) > 1 else (self.kind, "it", "its text")
            )
            raise UserError(
                f"{record.where}: the {names} {', '.join(map(quoted, lost))} would be lost from the prompt; "
                f"put {its} into {quoted(next(iter(self.names.values()))[0])}, or remove {it}"
            )

    def is_header(self, context: str, target: str) -> bool:
        """Whether a row holds two names of columns: the header of a second file, whose columns may be others."""
        own = {_plain(name) for names in self.names.values() for name in names}
        names = {_plain(context), _plain(target)}
        return len(names) == 2 and all(name in own or _is_column(name) for name in names)


def parse_columns(text: str | None) -> dict[str, str]:
    """NAME=context,NAME=target: names of LAYOUTS by a file's own. UserError where it is something else."""
    known = list(dict.fromkeys(name for layout in LAYOUTS for name in layout.required + layout.optional))
    option, columns = typed("--columns", "COLUMNS="), {}
    for part in text.split(",") if text else ():
        name, equals, meant = (piece.strip() for piece in part.partition("="))
        if not (name and equals) or name in columns:
            raise UserError(
                f"{option}: {part!r} is not a name of your file, = and what it is: question=context,answer=target"
            )
        if meant not in known:
            hint = did_you_mean(meant, known) or f"known are {', '.join(known)}"
            raise UserError(f"{option}: {part!r}: {meant!r} is not known; {hint.strip()}")
        columns[name] = meant
    return columns


def _question(where: str, values: dict[str, Any], names: dict[str, list[str]], layout: Layout) -> Parts:
    """The turns of a row whose texts are in columns of their own."""
    question, answer = layout.required
    parts = [(name, _text(where, name, values[name], False)) for name in names[question]]
    for name in names.get("input", ()):  # as Alpaca joins it, where there is one
        if (text := _text(where, name, values.get(name), False)).strip():
            parts.append((name, text))
    answers = [(name, _text(where, name, values[name], True)) for name in names[answer]]
    system = [(name, _text(where, name, values.get(name), False)) for name in names.get("system", ())]
    system = [part for part in system if part[1].strip()]
    turns = [Turn("system", text) for _, text in system]
    turns.append(Turn("user", "\n".join([text for _, text in parts])))
    turns.append(Turn("assistant", "\n".join([text for _, text in answers])))
    return turns, system + parts + answers


def _chat(where: str, messages: list[dict[str, Any]]) -> Parts:
    """The turns of a chat. UserError unless user and assistant take turns and the assistant has the last one."""
    turns, texts = [], []
    for number, message in enumerate(messages, 1):
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if role not in ROLES:
            known = "known are user, assistant and system (ShareGPT: human, gpt)"
            raise UserError(f"{where}: turn {number} has the role {role!r}; {known}: rewrite or remove the row")
        expected = ("user", "assistant")[sum(turn.role != "system" for turn in turns) % 2]
        if ROLES[role] != expected and not (number == 1 and role == "system"):
            order = "user and assistant take turns, after one system message at most"
            raise UserError(
                f"{where}: turn {number} is the {ROLES[role]}'s and not the {expected}'s; {order}: correct the row"
            )
        lost = [key for key, value in message.items() if key not in TURN_KEYS and value not in (None, "", [], {})]
        if lost or message.get("weight") == "0":  # OpenAI's mark of a turn that is not trained
            key = quoted(lost[0] if lost else "weight")
            raise UserError(f"{where}: turn {number} has {key}, which would be lost; remove it or the row")
        if type(content) is list and all(type(part) is dict and part.get("type") == "text" for part in content):
            content = "".join(part["text"] for part in content)
        texts.append((f"text of turn {number}", _text(where, f"text of turn {number}", content, False)))
        turns.append(Turn(ROLES[role], texts[-1][1]))
    if len(turns) < 2 or turns[-1].role != "assistant":
        raise UserError(
            f"{where}: does not end with an assistant's answer, which would be trained; add it or remove the row"
        )
    return turns, texts


def _messages(where: str, name: str, value: object) -> list[dict[str, Any]]:
    if type(value) is str:  # in a column of CSV
        try:
            value = json.loads(value)
        except ValueError:
            pass
    if type(value) is not list or not value or any(type(message) is not dict for message in value):
        form = '[{"role": "user", "content": "..."}, ...]'
        raise UserError(f"{where}: {quoted(name)} is no list of messages; write {form}")
    return value


def _text(where: str, name: str, value: object, numbers: bool) -> str:
    """A value as text, "" for null; UserError where it is something else or could not be written as UTF-8."""
    if value is None:
        return ""
    if type(value) is not str and not (numbers and type(value) is Number):
        raise UserError(f"{where}: {quoted(name)} is {kind_of(value)} and not text; write it as a string")
    if len(value) > LIMIT:
        raise UserError(f"{where}: {quoted(name)} is longer than {LIMIT >> 20} MiB; cut the row")
    # The raw line was checked when it was decoded: these come from a JSON escape or from Parquet.
    if "\0" in value:
        raise UserError(f"{where}: {quoted(name)} holds a NUL character; remove it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        what = f"half a character (\\u{ord(value[error.start]):04x}, a lone surrogate)"
        raise UserError(f"{where}: {quoted(name)} holds {what}; replace it") from error
    return str(value)


def _is_held(value: object, texts: list[str]) -> bool:
    """Whether a value is empty, or stands in one of the texts, or is all of them, as a prompt that was written out."""
    if value in (None, "", [], {}):
        return True
    plain = value.strip() if isinstance(value, str) else str(value)
    return any(plain in text for text in texts) or all(text.strip() in plain for text in texts)


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
