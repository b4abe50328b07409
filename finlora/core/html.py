"""How numbers are written in pages and tables."""

import math


def axis(low: float, high: float) -> list[float]:
    """About four round marks that hold both ends."""
    rough = max(high - low, abs(high) * 1e-3, 1e-9) / 4
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough)
    start, end = math.floor(low / step), math.ceil(high / step)
    return [round(mark * step, 10) for mark in range(start, max(end, start + 1) + 1)]


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
