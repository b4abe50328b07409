"""Pages and their tables: rendered from Jinja templates, and the same tables as Markdown.

A page is one file without network access, light or dark as the reader's system is. Plots are core/plot.py's.
"""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from finlora.core.plot import Point

HEAD, TAIL = 2000, 1000  # characters that are shown of a long text
# What a browser would hide or act on: control, zero-width and direction characters, lone surrogates.
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\xa0\xad\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def percent(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value * 100:.{digits}f}"


def signed(value: float, digits: int = 2) -> str:
    """Percentage points with their sign; a true minus, so that columns line up."""
    text = f"{value * 100:+.{digits}f}"
    return "0." + "0" * digits if float(text) == 0 else text.replace("-", "−")


def number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"


def p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def visible(text: str, head: int = HEAD, tail: int = TAIL) -> str:
    """A text of the model or the data in which nothing hides: line ends, tabs, outer blanks, control characters."""
    if len(text) > head + tail + 100:
        text = f"{text[:head]}\n… {len(text) - head - tail:,} characters left out …\n{text[-tail:]}"
    text = HIDDEN.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
    text = re.sub(r"^ +| +$", lambda match: "·" * len(match[0]), text, flags=re.M)
    return text.replace("\t", "⇥\t").replace("\n", "↵\n")


def breakable(name: str) -> Markup:
    """A name that may break after an underscore, so that a long one leaves room on a narrow screen."""
    return escape(name).replace("_", Markup("_<wbr>"))


def plain(text: str) -> str:
    """Text that neither ends a cell of a Markdown table nor begins a tag."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


@dataclass(frozen=True)
class Cell:
    """A value and what follows it in small print: its interval, what it is a part of.

    kind: CSS classes. title: shown on hover. href: a link on the small print. share: how strongly the cell is coloured,
    from 0 to 1. point: drawn below the text on an axis from 0 to 1. value: what a table is sorted by, in place of the
    text. words: what a filter of columns looks for in a head, besides the text.
    """

    text: str = ""
    small: str = ""
    kind: str = ""
    title: str = ""
    href: str = ""
    share: float | None = None
    point: Point | None = None
    value: float | None = None
    words: str = ""

    def __str__(self) -> str:
        small = self.small if self.small.startswith("[") or not self.text else self.small and f"({self.small})"
        return f"{self.text} {small}".strip()


def cell(value: Cell | str) -> Cell:
    return value if isinstance(value, Cell) else Cell(value)


@dataclass(frozen=True)
class Table:
    """heads and body have as many columns; the last of the `left` columns names the row. label: for screen readers."""

    heads: list[Cell | str]
    body: list[list[Cell | str]]
    label: str = ""
    caption: str = ""
    left: int = 1

    def texts(self) -> list[list[str]]:
        """The heads and the rows as plain text."""
        return [[str(cell) for cell in row] for row in [self.heads, *self.body]]


def markdown(table: Table) -> str:
    rule = ["---" if column < table.left else "---:" for column in range(len(table.heads))]
    heads, *rows = ([plain(text) for text in row] for row in table.texts())
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, rule, *rows])


def render(template: str, **shown: Any) -> str:
    """A file from a template of this package, as evaluate/report.html.jinja; text is escaped, but in Markdown."""
    return templates().get_template(template).render(shown)


@cache
def templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent.parent),
        autoescape=lambda name: not str(name).endswith(".md.jinja"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    filters = (percent, signed, number, visible, breakable, plain, markdown, cell)
    environment.filters |= {function.__name__: function for function in filters}
    return environment
