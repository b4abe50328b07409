"""Pages, tables and plots: one page shell, one table for HTML and Markdown, rows and panels of points as SVG.

A page is one file without script and network, light or dark as the reader's system is. Plots are WIDTH units wide and
scale with the page; their colours are the classes c0 to c5 and `base`, which the page or `picture` defines.
"""

import math
import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

WIDTH, EDGE = 480, 16
LETTER = 8.4  # width of a letter of 15 px in a wide font: 0.56 of its size
LINE = 18  # height of a line of text
COLOURS = 6
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


# Pages


def render(template: str, shown: dict[str, Any]) -> str:
    """A page from a template of this package, such as evaluate/report.html.jinja; all text in it is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent.parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters |= {"percent": percent, "signed": signed, "number": number, "visible": visible}
    environment.filters["table"] = html_table
    return environment.get_template(template).render(shown)


def breakable(name: str) -> Markup:
    """A name that may break after an underscore, so that a long one leaves room on a narrow screen."""
    return escape(name).replace("_", Markup("_<wbr>"))


def visible(text: str, head: int = HEAD, tail: int = TAIL) -> str:
    """A text of the model or the data in which nothing hides: line ends, tabs, outer blanks, control characters."""
    if len(text) > head + tail + 100:
        text = f"{text[:head]}\n… {len(text) - head - tail:,} characters left out …\n{text[-tail:]}"
    text = HIDDEN.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
    text = re.sub(r"^ +| +$", lambda match: "·" * len(match[0]), text, flags=re.M)
    return text.replace("\t", "⇥\t").replace("\n", "↵\n")


# Tables


@dataclass(frozen=True)
class Cell:
    """A value and what follows it in small print: its interval, what it is a part of. kind: CSS classes. title: shown
    on hover. href: a link on the small print. share: how strongly the cell is coloured, from 0 to 1."""

    text: str = ""
    small: str = ""
    kind: str = ""
    title: str = ""
    href: str = ""
    share: float | None = None

    def __str__(self) -> str:
        small = self.small if self.small.startswith("[") or not self.text else self.small and f"({self.small})"
        return f"{self.text} {small}".strip()


@dataclass(frozen=True)
class Table:
    """heads and body have as many columns; the last of the `left` columns names the row. label: for screen readers."""

    heads: list[str]
    body: list[list[Cell | str]]
    label: str = ""
    caption: str | Markup = ""
    left: int = 1
    foot: list[list[Cell | str]] = field(default_factory=list)

    def texts(self) -> list[list[str]]:
        """The heads and the rows as plain text."""
        return [self.heads, *[[str(cell) for cell in row] for row in [*self.body, *self.foot]]]


def markdown(table: Table) -> list[str]:
    """The lines of a Markdown table; the last rows, `foot`, in bold."""
    heads, *rows = table.texts()
    rule = ["---" if column < table.left else "---:" for column in range(len(heads))]
    rows = [[plain(text) for text in row] for row in rows]
    for row in rows[len(table.body) :]:
        row[:] = [f"**{text}**" if text else "" for text in row]
    return [f"| {' | '.join(row)} |" for row in [heads, rule, *rows]]


def plain(text: str) -> str:
    """Text that neither ends a cell of a Markdown table nor begins a tag."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def html_table(table: Table) -> Markup:
    """The table in a box that scrolls sideways on a narrow screen."""
    heads = Markup("").join(Markup('<th scope="col">{}</th>').format(head) for head in table.heads)
    parts = [
        Markup('<div class="box" tabindex="0" role="region" aria-label="{}">\n<table>\n').format(table.label),
        Markup("<caption><span>{}</span></caption>\n").format(table.caption) if table.caption else "",
        Markup("<thead><tr>{}</tr></thead>\n").format(heads),
    ]
    for tag, rows in (("tbody", table.body), ("tfoot", table.foot)):
        if rows:
            lines = [Markup("<tr>{}</tr>\n").format(Markup("").join(_cells(row, table.left))) for row in rows]
            parts += [Markup(f"<{tag}>\n"), *lines, Markup(f"</{tag}>\n")]
    return Markup("").join([*parts, Markup("</table>\n</div>")])


def _cells(row: list[Cell | str], left: int) -> Iterable[Markup]:
    for column, cell in enumerate(row):
        cell = cell if isinstance(cell, Cell) else Cell(cell)
        inside = breakable(cell.text) if column == left - 1 else escape(cell.text)
        if cell.small.startswith("["):  # a score or a difference and its interval
            inside = Markup('<b>{}</b> <span class="ci">{}</span>').format(inside, cell.small)
        elif cell.small:
            small = Markup('<a href="{}">{}</a>').format(cell.href, cell.small) if cell.href else cell.small
            inside = Markup("{} <small>{}</small>").format(inside, small)
        style = "" if cell.share is None else Markup(' style="--share: {:.3f}"').format(cell.share)
        kind = Markup(' class="{}"').format(cell.kind) if cell.kind else ""
        title = Markup(' title="{}"').format(cell.title) if cell.title else ""
        tag, scope = ("th", Markup(' scope="row"')) if column == left - 1 else ("td", "")
        yield Markup("<{0}{1}{2}{3}{4}>{5}</{0}>").format(Markup(tag), scope, kind, style, title, inside)


# Plots


def ticks(low: float, high: float) -> list[float]:
    """About four round values that enclose both ends."""
    rough = max(high - low, abs(high) * 1e-3, 1e-9) / 4
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough)
    start, end = math.floor(low / step), math.ceil(high / step)
    return [round(mark * step, 10) for mark in range(start, max(end, start + 1) + 1)]


@dataclass(frozen=True)
class Axis:
    """From low to high, with (value, text) where something is written. log: logarithmic."""

    low: float
    high: float
    labels: list[tuple[float, str]]
    log: bool = False

    @classmethod
    def around(cls, values: Iterable[float], text: str = "{:g}", scale: float = 1) -> "Axis":
        """An axis whose ends are ticks around all values, written as `text` says of the tick times `scale`."""
        values = list(values)
        marks = ticks(min(values), max(values))
        return cls(marks[0], marks[-1], [(mark, text.format(mark * scale)) for mark in marks])

    def at(self, value: float) -> float:
        """Where a value is, from 0 at the low end to 1 at the high end; the middle where both ends are equal."""
        scale = math.log if self.log else float
        return (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low)) if self.high > self.low else 0.5


@dataclass(frozen=True)
class Point:
    """A value with its interval (the value itself where it has none). x: its place on a panel's axis. title: shown on
    hover. letter: what is written beside it in a row, in place of a dot."""

    value: float
    low: float | None = None
    high: float | None = None
    x: float = 0
    title: str = ""
    letter: str = ""

    def ends(self) -> tuple[float, float]:
        return (self.value if self.low is None else self.low), (self.value if self.high is None else self.high)


@dataclass(frozen=True)
class Row:
    """A name, its points on the axis below all rows, and the value as text. bar: a bar from 0 in place of a dot. gap:
    some room before the next row."""

    name: str
    points: list[Point]
    shown: str = ""
    small: str = ""
    colour: str = "c0"
    href: str = ""
    bar: bool = False
    gap: bool = False


@dataclass(frozen=True)
class Series:
    name: str
    points: list[Point]
    line: bool = True
    dots: bool = True


@dataclass(frozen=True)
class Panel:
    """Series over one axis of values; the panels of a plot lie above each other and share the axis below them."""

    title: str
    series: list[Series]

    def values(self) -> Axis:
        return Axis.around(end for one in self.series for point in one.points for end in point.ends())


def rows_plot(rows: list[Row], axis: Axis, top: float = 0) -> tuple[Markup, float]:
    """Rows as the inside of an SVG that begins at `top`, and where they end. Names that are long stand above."""
    beside = all(len(row.name + row.small) <= 18 for row in rows)
    left = 164 if beside else 24
    right = WIDTH - EDGE - 12 - LETTER * max(len(row.shown) for row in rows)
    y, body = top + 4, []

    def x(value: float) -> float:
        return left + axis.at(value) * (right - left)

    for row in rows:
        lines = [row.name] if beside else textwrap.wrap(row.name, 50 - len(row.small)) or [""]
        room = 10 * any(point.letter for point in row.points)  # for letters above and below
        middle = y + room + (13 if beside else LINE * len(lines) + 10)
        name_y = [middle + 5] if beside else [y + LINE * (place + 0.8) for place in range(len(lines))]
        for place, (line, at) in enumerate(zip(lines, name_y, strict=True)):
            small = row.small if place == len(lines) - 1 else ""
            body.append(_text(left - 10 if beside else left, at, line, "end" if beside else "start", small, row.href))
        for place, point in enumerate(row.points):
            body.append(_point_in_row(row, point, x, middle, above=place % 2 == 0))
        if row.shown:
            body.append(_text(right + 12, middle + 5, row.shown))
        y = middle + room + 14 + (8 if row.gap else 0)
    for value, text in axis.labels:
        body.insert(0, _line(x(value), top, x(value), y, "grid"))
        body.append(_text(x(value), y + LINE, text, "middle"))
    return Markup("\n").join(body), y + (LINE + 8 if axis.labels else 0)


def _point_in_row(row: Row, point: Point, x: Any, middle: float, above: bool) -> Markup:
    low, high = point.ends()
    if row.bar:
        shape = Markup('<path d="M{:.1f} {:.1f}H{:.1f}" stroke-width="22"/>').format(
            x(0), middle, max(x(0) + 2, x(point.value))
        )
    elif point.letter:
        shape = _line(x(point.value), middle - 5, x(point.value), middle + 5)
        shape += _text(x(point.value), middle - 8 if above else middle + LINE, point.letter, "middle", kind="s")
    else:
        shape = _line(x(low), middle, x(high), middle) + _circle(x(point.value), middle, 5.5)
    return Markup('<g class="mark {}">{}{}</g>').format(row.colour, _title(point), shape)


@dataclass(frozen=True)
class Plot:
    """Panels above each other that share the axis below them. Series are beside each other where their intervals would
    cover each other; axis labels that would overlap are left out."""

    panels: list[Panel]
    axis: Axis
    title: str  # of the axis

    @property
    def names(self) -> list[str]:
        return [one.name for one in self.panels[0].series]

    def legend(self) -> Markup:
        """What the colours of the series are."""
        names = enumerate(self.names)
        return Markup("&ensp;").join(Markup('<b class="c{}">● {}</b>').format(n % COLOURS, name) for n, name in names)

    def svg(self) -> Markup:
        body, bottom = [], 0.0
        for panel in self.panels:
            part, bottom = _panel(panel, self.axis, bottom + 34, 190 if panel is self.panels[0] else 90)
            body += part
        body.append(_text(WIDTH - EDGE, bottom + 24, self.title, "end", kind="t"))
        about = f"{', '.join(panel.title for panel in self.panels)} against {self.title}"
        return svg(Markup("\n").join(body), bottom + 32, about)


def _panel(panel: Panel, axis: Axis, top: float, height: float) -> tuple[list[Markup], float]:
    """A panel's parts, and where its labels end."""
    values, left, right, bottom = panel.values(), 64, WIDTH - EDGE, top + height

    def x(value: float) -> float:
        return left + 20 + axis.at(value) * (right - left - 40)

    def y(value: float) -> float:
        return bottom - values.at(value) * height

    body = [_text(left, top - 12, panel.title, kind="t")]
    for value, text in values.labels:
        body += [_line(left, y(value), right, y(value), "grid"), _text(left - 8, y(value) + 4, text, "end", kind="s")]
    intervals = any(point.low is not None for one in panel.series for point in one.points)
    for place, one in enumerate(panel.series):
        aside = (place - (len(panel.series) - 1) / 2) * 7 * intervals
        body.append(_series(one, place, lambda value, aside=aside: x(value) + aside, y))
    end = -math.inf
    for value, text in sorted(axis.labels):
        if x(value) - LETTER * len(text) / 2 > end:
            body.append(_text(x(value), bottom + LINE, text, "middle"))
            end = x(value) + LETTER * len(text) / 2
    return body, bottom + LINE


def _series(series: Series, place: int, x: Any, y: Any) -> Markup:
    points, parts = sorted(series.points, key=lambda point: point.x), []
    if series.line and points:
        path = "L".join(f"{x(point.x):.1f} {y(point.value):.1f}" for point in points)
        parts.append(Markup('<path class="course" d="M{}"/>').format(path))
    for point in points if series.dots else []:
        low, high = point.ends()
        interval = _line(x(point.x), y(low), x(point.x), y(high)) if low < high else Markup("")
        parts.append(Markup("<g>{}{}{}</g>").format(_title(point), interval, _circle(x(point.x), y(point.value), 4)))
    return Markup('<g class="mark c{}">{}</g>').format(place % COLOURS, Markup("").join(parts))


def svg(body: Markup, height: float, label: str) -> Markup:
    return Markup('<svg viewBox="0 0 {} {:.0f}" role="img" aria-label="{}">\n{}\n</svg>').format(
        WIDTH, height, label, body
    )


def picture(title: str, about: list[str], body: Markup, height: float, colours: dict[str, str], grey: str) -> str:
    """An SVG file of its own, with a title and lines about it in its first 82 units. Colours must read on light and on
    dark pages, which GitHub does not tell a picture apart."""
    style = [
        f"text{{font:15px system-ui,sans-serif;fill:{grey}}}.t{{font-size:18px;font-weight:600}}.s{{font-size:13px}}",
        f".grid{{stroke:{grey};stroke-opacity:.35}}.mark{{stroke:currentColor;stroke-width:4}}",
        ".mark circle{fill:currentColor;stroke:none}",
        *(f".{name}{{color:{value}}}" for name, value in colours.items()),
    ]
    lines = [_text(EDGE, 24, title, kind="t")]
    lines += [_text(EDGE, 46 + LINE * number, line, kind="s") for number, line in enumerate(about)]
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {0} {1:.0f}" width="{0}" role="img">\n'
        "<title>{2}: {3}</title>\n<style>{4}</style>\n{5}\n{6}\n</svg>\n"
    ).format(WIDTH, height, title, " ".join(about), Markup("".join(style)), Markup("\n").join(lines), body)


def _text(
    x: float, y: float, text: str, anchor: str = "start", small: str = "", href: str = "", kind: str = ""
) -> Markup:
    inside = Markup('<a href="{}">{}</a>').format(href, text) if href else escape(text)
    inside += Markup(' <tspan class="s">{}</tspan>').format(small) if small else ""
    kind = Markup(' class="{}"').format(kind) if kind else ""
    return Markup('<text{} x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(kind, x, y, anchor, inside)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str = "") -> Markup:
    kind = Markup(' class="{}"').format(kind) if kind else ""
    return Markup('<path{} d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>').format(kind, x1, y1, x2, y2)


def _circle(x: float, y: float, radius: float) -> Markup:
    return Markup('<circle cx="{:.1f}" cy="{:.1f}" r="{}"/>').format(x, y, radius)


def _title(point: Point) -> Markup:
    return Markup("<title>{}</title>").format(point.title) if point.title else Markup("")
