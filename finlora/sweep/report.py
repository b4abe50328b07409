"""The results of a sweep (finlora/sweep/run.py): one table, one plot, and the best point where it can be told."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finlora.core.errors import UserError
from finlora.core.files import write_text
from finlora.core.html import Cell, Table, number, percent, render
from finlora.core.paths import shown
from finlora.core.plot import Axis, Panel, Plot, Point, Series
from finlora.evaluate.compare import join, refuse_unlike
from finlora.evaluate.report import Score, difference_cell, score, score_cell
from finlora.evaluate.results import Answers, ModelResults, pair, read
from finlora.evaluate.statistics import paired
from finlora.recipes import bases
from finlora.sweep.points import SweepPoint, as_text, column_of, value_of

LEVEL = 0.95
SCORE = "score, %"  # the title of its panel


@dataclass(frozen=True)
class Outcome:
    """What became of a point: its run.json once it is trained, or why it failed; its answers where it is evaluated."""

    point: SweepPoint
    run: dict[str, Any] | None
    failed: str | None
    model: ModelResults | None = None
    answers: tuple[Answers, ...] = ()  # to the sets that all evaluated points answered
    score: Score | None = None  # on them together

    @property
    def name(self) -> str:
        return self.point.name

    @property
    def results_name(self) -> str:
        """What finlora.evaluate.runner calls the point."""
        return self.name + (".tiny" if self.run and self.run["tiny"] else "")

    def metric(self, key: str) -> Any:
        return self.run["metrics"].get(key) if self.run else None

    @property
    def seconds(self) -> float | None:
        """Of the training; where it was interrupted those since, scaled up to all steps."""
        here = self.metric("steps_this_run")
        return self.metric("seconds") * self.metric("steps") / here if here else None

    @property
    def trainable(self) -> int | None:
        shape = bases.shape(self.run["base_model"]) if self.run else None
        return bases.trainable_parameters(self.point.recipe, shape) if shape else None

    @property
    def note(self) -> str:
        note = f"failed: {self.failed}" if self.failed else "" if self.run else "not finished"
        resumed = bool(self.seconds) and self.metric("steps_this_run") < self.metric("steps")
        scaled = "resumed after an interruption: its time is that of the steps since, scaled up"
        return "; ".join(filter(None, [note, scaled * resumed]))


@dataclass(frozen=True)
class SweepReport:
    title: str
    verdict: str
    notes: list[str]
    table: Table
    plot: Plot | None


def report(recipe: Path, sweep: Path, outcomes: list[Outcome], folder: Path) -> SweepReport:
    """Write table.md and index.html into the sweep's folder, print the table; return what they show."""
    columns = varied([outcome.point for outcome in outcomes])
    outcomes, sets, warnings = evaluated(outcomes, folder / "results")
    verdict, differences, unlike = verdict_of(outcomes, sets)
    result = SweepReport(
        title=f"{sweep.stem} on {recipe.stem}",
        verdict=verdict,
        notes=list(notes(outcomes, sets, warnings + unlike)),
        table=table_of(outcomes, columns, sets, differences),
        plot=plot_of([outcome for outcome in outcomes if outcome.run], columns),
    )
    text = render("sweep/report.md.jinja", report=result)
    page = render("sweep/report.html.jinja", report=result, sweep=shown(sweep), recipe=shown(recipe))
    write_text(folder / "table.md", text)
    write_text(folder / "index.html", page)
    print(f"\n{text}\ntable and plot: {shown(folder / 'index.html')}, {shown(folder / 'table.md')}", flush=True)
    return result


def varied(points: list[SweepPoint]) -> list[str]:
    """What the points differ by, in the sweep file's order."""
    names = dict.fromkeys(column_of(key) for point in points for key in point.changes)
    return [name for name in names if len({repr(value_of(name, point.recipe)) for point in points}) > 1]


def evaluated(outcomes: list[Outcome], folder: Path) -> tuple[list[Outcome], list[str], list[str]]:
    """The outcomes with their evaluations, the sets that all evaluated points answered, and what cannot be used.

    Sets in which answers are right or wrong are one pool of rows; BERTScores, and then general tasks, make one where
    there is nothing else.
    """
    try:
        models, warnings = read(folder, [outcome.results_name for outcome in outcomes])
    except UserError:  # nothing is evaluated
        return outcomes, [], []
    usable = {}
    for outcome in outcomes:
        model = models.get(outcome.results_name)
        if outcome.run and model and model.sets:
            if model.run.adapter_sha256 == outcome.run["adapter"]["sha256"]:
                usable[outcome.name] = model
            else:
                warnings.append(f"{outcome.name}: was evaluated with another adapter; EVAL=1 asks again")
    if not usable:
        return outcomes, [], warnings
    first = next(iter(usable.values())).sets
    sets = [name for name in first if all(name in model.sets for model in usable.values())]
    counted = [name for name in sets if not first[name].forgetting]
    sets = [name for name in counted if not first[name].bertscore] or counted or sets
    scored = []
    for outcome in outcomes:
        if sets and (model := usable.get(outcome.name)):
            answers = tuple(model.sets[name] for name in sets)
            (items,) = join([(one.items(one.labels()[0]),) for one in answers])
            outcome = replace(outcome, model=model, answers=answers, score=score(items))
        scored.append(outcome)
    return scored, sets, warnings


def verdict_of(outcomes: list[Outcome], sets: list[str]) -> tuple[str, dict[str, dict[str, Any]], list[str]]:
    """Which point is best, or that this cannot be told; the others' differences from it; what is not comparable.

    The best score is compared with every other one, on the same rows; all those comparisons together are wrong in one
    case of twenty (Bonferroni), so the luck of the highest of many scores is not taken for merit.
    """
    scored = [outcome for outcome in outcomes if outcome.score]
    if not scored:
        losses = [outcome for outcome in outcomes if outcome.metric("final_eval_loss") is not None]
        if not losses:
            return "No point has a score or a validation loss yet.", {}, []
        low = min(losses, key=lambda outcome: outcome.metric("final_eval_loss"))
        loss = f"{low.metric('final_eval_loss'):.4g} ({low.name})"
        verdict = f"No point is named best: the lowest validation loss is {loss}, and one loss a run does not say how "
        return verdict + "sure it is. EVAL=1 evaluates the points.", {}, []
    best = max(scored, key=lambda outcome: outcome.score.accuracy)
    others = [outcome for outcome in scored if outcome is not best]
    if not others:
        return f"No point is named best: only {best.name} is evaluated.", {}, []
    differences, unlike = {}, []
    for other in others:
        try:
            differences[other.name] = compare(best, other, sets, 1 - (1 - LEVEL) / len(others))
        except UserError as error:
            unlike.append(str(error))
    if unlike:
        return "No point is named best: not all of them can be compared, see below.", differences, unlike
    close = [name for name, difference in differences.items() if not difference["distinguishable"]]
    count = sum(len(answers.rows) for answers in best.answers)
    together = f" for all {len(others)} comparisons together" if len(others) > 1 else ""
    how = f"paired on the {count:,} rows of {', '.join(sets)}, at {LEVEL:.0%}{together}"
    missing = [outcome.name for outcome in outcomes if not outcome.score]
    without = f" Not in this comparison: {', '.join(missing)}." if missing else ""
    highest = f"{best.name}, {percent(best.score.accuracy)}"
    verdict = f"Best: {highest}, distinguishable from every other point ({how}).{without}"
    if close:
        verdict = f"No point is named best: the highest score is that of {highest}, and it cannot be told apart from "
        verdict += f"{', '.join(close)} ({how}).{without}"
    return verdict, differences, []


def compare(a: Outcome, b: Outcome, sets: list[str], level: float) -> dict[str, Any]:
    """How far b is from a, over all sets. UserError where their answers cannot be paired."""
    for name in sets:
        refuse_unlike(name, a.model, b.model)
    pairs = [pair(one, other, one.labels()[0])[1:] for one, other in zip(a.answers, b.answers, strict=True)]
    resamples = max(2000, math.ceil(100 / (1 - level)))  # as many as a p so small needs
    return paired(*join(pairs), level=level, resamples=resamples)


def notes(outcomes: list[Outcome], sets: list[str], warnings: list[str]) -> Iterator[str]:
    runs = [outcome.run for outcome in outcomes if outcome.run]
    if any(run["tiny"] for run in runs):
        yield "A tiny stand-in model and a few steps: these figures try the commands and say nothing about the recipe."
    if sets:
        yield (
            "Score: percent of right answers under FinLoRA's rules, or BERTScore F1 x 100, over all rows of the sets, "
            "with its 95% interval. vs best: paired on the same rows; ≈ cannot be told from none."
        )
    devices = sorted({run["device"] for run in runs})
    if devices:
        several = "are of different devices:" if len(devices) > 1 else "on"
        yield f"Times and memory {several} {', '.join(devices)}."
    yield from warnings


def table_of(
    outcomes: list[Outcome], columns: list[str], sets: list[str], differences: dict[str, dict[str, Any]]
) -> Table:
    """A row for each point; columns in which every cell is empty are left out."""
    by_set = sets if len(sets) > 1 else []
    heads = ["", "point", *columns, "score", "vs best", *by_set, "validation loss", "trainable parameters", "seconds"]
    heads += ["samples/s", "peak GiB", "note"]
    body = []
    for one in outcomes:
        difference, loss = differences.get(one.name), one.metric("final_eval_loss")
        line = [str(one.point.number), one.name, *(as_text(column, one.point.recipe) for column in columns)]
        line += [score_cell(one.score) if one.score else "", difference_cell(difference) if difference else ""]
        each = [percent(score(answers.items(answers.labels()[0])).accuracy) for answers in one.answers if by_set]
        line += each or [""] * len(by_set)
        line += ["" if loss is None else f"{loss:.4g}"]
        figures = one.trainable, one.seconds, one.metric("samples_per_second"), one.metric("peak_memory_gib")
        line += ["" if value is None else number(value) for value in figures]
        body.append([*line, Cell(one.note, kind="words")])
    kept = [column for column in range(len(heads)) if any(str(line[column]) for line in body)]
    heads, *body = [[line[column] for column in kept] for line in [heads, *body]]
    return Table(heads, body, "All points", left=2)


def plot_of(done: list[Outcome], columns: list[str]) -> Plot | None:
    """Score (or validation loss), time and memory against what varies first. None where no point is finished.

    The axis is numeric where every value is a number (logarithmic from a span of four on), else one place a value. What
    else varies makes series, unless it follows from the axis.
    """
    if not done:
        return None
    column, *rest = columns or ["point"]
    texts = [as_text(column, outcome.point.recipe) if columns else "" for outcome in done]
    x = [on_axis(column, outcome.point.recipe) for outcome in done]
    numeric = bool(columns) and None not in x
    if numeric:
        texts = [f"{value:g}" for value in x]
    else:
        places = list(dict.fromkeys(texts))
        x = [float(places.index(text)) for text in texts]
    long = max(map(len, texts)) > 16
    log = numeric and min(x) > 0 and max(x) / min(x) >= 4
    labels = {
        value: f"#{outcome.point.number}" if long else text
        for value, outcome, text in reversed(list(zip(x, done, texts, strict=True)))
    }
    free = [name for name in rest if not follows(texts, [as_text(name, outcome.point.recipe) for outcome in done])]
    names = [", ".join(f"{name} {as_text(name, outcome.point.recipe)}" for name in free) for outcome in done]
    panels = []
    for title, value in FIGURES.items():
        series: dict[str, list[Point]] = {name: [] for name in names}
        for outcome, place, name in zip(done, x, names, strict=True):
            if (y := value(outcome)) is not None:
                series[name].append(point(outcome, y, place, title))
        panels += [Panel(title, [Series(*one, line=numeric) for one in series.items()])] if any(series.values()) else []
    if any(outcome.score for outcome in done):
        panels = [panel for panel in panels if panel.title != "validation loss"]
    title = column + " (numbers as in the table)" * long + ", log scale" * log
    return Plot(panels, Axis(min(x), max(x), sorted(labels.items()), log), title) if panels else None


FIGURES = {
    SCORE: lambda outcome: 100 * outcome.score.accuracy if outcome.score else None,
    "validation loss": lambda outcome: outcome.metric("final_eval_loss"),
    "training, s": lambda outcome: outcome.seconds,
    "peak memory, GiB": lambda outcome: outcome.metric("peak_memory_gib"),
}


def point(outcome: Outcome, y: float, x: float, title: str) -> Point:
    if title != SCORE:
        return Point(y, x, title=f"{outcome.name}: {number(y)}")
    low, high = 100 * outcome.score.low, 100 * outcome.score.high
    return Point(y, x, low, high, f"{outcome.name}: {score_cell(outcome.score)}")


def on_axis(column: str, recipe: dict[str, Any]) -> float | None:
    """A point's place on a numeric axis, or None; that of one group of parameters is its own learning rate."""
    value = value_of(column, recipe)
    if column == "lr_groups" and (value is None or len(value) == 1):
        value = value[0]["lr"] if value else recipe["learning_rate"]
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def follows(axis: list[str], values: list[str]) -> bool:
    """Whether each place on the axis has one of the values only."""
    return len(set(zip(axis, values, strict=True))) == len(set(axis))
