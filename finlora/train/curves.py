"""A run's curves: losses and learning rate by step, for the page of results and as curves.svg beside the adapter."""

from typing import Any

from finlora.core.html import render
from finlora.core.plot import Axis, Panel, Plot, Point, Series, is_number

LINES = {  # by panel: keys of the log, and what a reader calls them
    "loss": {"loss": "loss", "eval_loss": "validation loss"},
    "learning rate": {"learning_rate": "learning rate"},
}


def curves(log: Any) -> Plot | None:
    """What `metrics.json` logged against the step; None where fewer than two steps are logged."""
    entries = [entry for entry in log if isinstance(entry, dict)] if isinstance(log, list) else []
    panels = []
    for title, lines in LINES.items():
        series = []
        for key, name in lines.items():
            logged = [(one["step"], one[key]) for one in entries if all(is_number(one.get(k)) for k in ("step", key))]
            points = [Point(value, step, title=f"step {step}: {value:.4g}") for step, value in logged]
            if points:
                series.append(Series(f"{name}, at the end {points[-1].y:.4g}", points, dots=key == "eval_loss"))
        if series:
            panels.append(Panel(title, series, from_zero=title == "learning rate"))
    steps = [point.x for panel in panels for point in panel.points]
    if len(set(steps)) < 2:
        return None
    ends = min(steps), max(steps)
    return Plot(panels, Axis(*ends, [(step, str(step)) for step in ends]), "step")


def picture(name: str, plot: Plot) -> str:
    """The curves as an SVG file."""
    return render("train/curves.svg.jinja", name=name, plot=plot)
