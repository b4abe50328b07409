"""Plots as data: points, series and axes. core/plot.svg.jinja draws them, every place in percent of the plot's size."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

CHARACTER = 0.018  # of a plot's width, the width of a character at 480 pixels: axis labels nearer than that overlap


@dataclass(frozen=True)
class Point:
    """A value y at x, with its interval where it has one. title: shown on hover. kind: CSS classes."""

    y: float
    x: float = 0
    low: float | None = None
    high: float | None = None
    title: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Series:
    name: str
    points: list[Point]
    line: bool = True
    dots: bool = True


@dataclass(frozen=True)
class Axis:
    """From low to high, with (value, text) where something is written. log: logarithmic."""

    low: float
    high: float
    labels: list[tuple[float, str]]
    log: bool = False

    @classmethod
    def around(cls, values: Iterable[float], text: str = "{:g}") -> "Axis":
        """An axis whose ends are ticks around all values."""
        values = list(values)
        marks = ticks(min(values), max(values))
        return cls(marks[0], marks[-1], [(mark, text.format(mark)) for mark in marks])

    def share(self, value: float) -> float:
        """Where a value is, from 0 at the low end to 1 at the high end; the middle where both ends are equal."""
        scale = math.log if self.log else float
        return (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low)) if self.high > self.low else 0.5

    def across(self, value: float) -> str:
        return f"{100 * self.share(value):.2f}%"

    def down(self, value: float) -> str:
        """The place from the top, where SVG begins to count."""
        return f"{100 - 100 * self.share(value):.2f}%"

    def spaced_labels(self) -> list[tuple[float, str]]:
        """The labels without those that would overlap the one before."""
        kept: list[tuple[float, str]] = []
        for value, text in sorted(self.labels):
            room = CHARACTER * ((len(text) + len(kept[-1][1])) / 2 + 1) if kept else 0
            if not kept or self.share(value) - self.share(kept[-1][0]) >= room:
                kept.append((value, text))
        return kept


@dataclass(frozen=True)
class Panel:
    """Series over one axis of values."""

    title: str
    series: list[Series]
    from_zero: bool = False

    @property
    def points(self) -> list[Point]:
        return [point for series in self.series for point in series.points]

    @property
    def has_intervals(self) -> bool:
        return any(point.low is not None for point in self.points)

    @property
    def axis(self) -> Axis:
        points = self.points
        ends = [end for point in points for end in (point.y, point.low, point.high) if end is not None]
        return Axis.around(ends + [0] * self.from_zero)


@dataclass(frozen=True)
class Plot:
    """Panels above each other, all of the same series, that share the axis below them."""

    panels: list[Panel]
    axis: Axis
    title: str  # of the axis

    @property
    def names(self) -> list[str]:
        return [series.name for series in self.panels[0].series]


def is_number(value: Any) -> bool:
    """Whether a value that was read can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def ticks(low: float, high: float) -> list[float]:
    """About four round values that enclose both ends."""
    rough = max(high - low, abs(high) * 1e-3, 1e-9) / 4
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough)
    start, end = math.floor(low / step), math.ceil(high / step)
    return [round(mark * step, 10) for mark in range(start, max(end, start + 1) + 1)]
