"""The results of a sweep (finlora/sweep/run.py): one table, one plot, and the best point where it can be told."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Outcome:
    """What became of a point: its run.json once it is trained, or why it failed."""

    point: SweepPoint
    run: dict[str, Any] | None
    failed: str | None

    @property
    def metrics(self) -> dict[str, Any]:
        return self.run["metrics"] if self.run else {}

    @property
    def resumed(self) -> bool:
        here = self.metrics.get("steps_this_run")
        return bool(here) and here < self.metrics["steps"]

    @property
    def seconds(self) -> float | None:
        """Of the training; where it was interrupted those since, scaled up to all steps."""
        here = self.metrics.get("steps_this_run")
        return self.metrics["seconds"] * self.metrics["steps"] / here if here else None

    @property
    def trainable(self) -> int | None:
        shape = bases.shape(self.run["base_model"]) if self.run else None
        return bases.trainable_parameters(self.point.recipe, shape) if shape else None

    @property
    def note(self) -> str:
        note = f"failed: {self.failed}" if self.failed else "" if self.run else "not finished"
        resumed = "resumed after an interruption: its time is that of the steps since, scaled up"
        return "; ".join(filter(None, [note, resumed * self.resumed]))


@dataclass(frozen=True)
class Evaluated:
    """A point's answers to the sets that all evaluated points answered, and its score on them together."""

    point: SweepPoint
    model: ModelResults
    answers: list[Answers]
    score: Score


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
    sets, evaluated, warnings = evaluations(outcomes, folder / "results")
    verdict, differences, unlike = verdict_of(outcomes, evaluated, sets)
    result = SweepReport(
        title=f"{sweep.stem} on {recipe.stem}",
        verdict=verdict,
        notes=list(notes(outcomes, sets, warnings + unlike)),
        table=table_of(outcomes, columns, sets, evaluated, differences),
        plot=plot_of([outcome for outcome in outcomes if outcome.run], columns, evaluated),
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


def evaluations(outcomes: list[Outcome], folder: Path) -> tuple[list[str], dict[int, Evaluated], list[str]]:
    """The sets that all evaluated points answered, their evaluations by the point's number, and what cannot be used.

    Sets in which answers are right or wrong are one pool of rows; BERTScores, and then general tasks, make one where
    there is nothing else.
    """
    try:
        models, warnings = read(folder, [results_name(outcome.point, outcome.run) for outcome in outcomes])
    except UserError:  # nothing is evaluated
        return [], {}, []
    answered: dict[int, tuple[SweepPoint, ModelResults]] = {}
    for outcome in outcomes:
        model = models.get(results_name(outcome.point, outcome.run))
        if outcome.run and model and model.sets:
            if model.run.adapter_sha256 == outcome.run["adapter"]["sha256"]:
                answered[outcome.point.number] = outcome.point, model
            else:
                warnings.append(f"{outcome.point.name}: was evaluated with another adapter; EVAL=1 asks again")
    if not answered:
        return [], {}, warnings
    first = next(iter(answered.values()))[1].sets
    sets = [name for name in first if all(name in model.sets for _, model in answered.values())]
    counted = [name for name in sets if not first[name].forgetting]
    sets = [name for name in counted if not first[name].bertscore] or counted or sets
    evaluated = {}
    for key, (point, model) in answered.items() if sets else ():
        answers = [model.sets[name] for name in sets]
        items = join([(one.items(one.labels()[0]),) for one in answers])[0]
        evaluated[key] = Evaluated(point, model, answers, score(items))
    return sets, evaluated, warnings


def results_name(point: SweepPoint, run: dict[str, Any] | None) -> str:
    """What finlora.evaluate.runner calls a point."""
    return point.name + (".tiny" if run and run["tiny"] else "")


def verdict_of(
    outcomes: list[Outcome], evaluated: dict[int, Evaluated], sets: list[str]
) -> tuple[str, dict[int, dict[str, Any]], list[str]]:
    """Which point is best, or that this cannot be told; each other point's difference from it; what is not comparable.

    The best score is compared with every other one, on the same rows; all those comparisons together are wrong in one
    case of twenty (Bonferroni), so the luck of the highest of many scores is not taken for merit.
    """
    if not evaluated:
        losses = {o.point.name: o.metrics.get("final_eval_loss") for o in outcomes}
        known = {name: loss for name, loss in losses.items() if loss is not None}
        if not known:
            return "No point has a score or a validation loss yet.", {}, []
        name = min(known, key=known.__getitem__)
        verdict = f"No point is named best: the lowest validation loss is {known[name]:.4g} ({name}), and one loss a "
        return verdict + "run does not say how sure it is. EVAL=1 evaluates the points.", {}, []
    best = max(evaluated.values(), key=lambda one: one.score.accuracy)
    others = {key: one for key, one in evaluated.items() if one is not best}
    if not others:
        return f"No point is named best: only {best.point.name} is evaluated.", {}, []
    differences, unlike = {}, []
    for key, other in others.items():
        try:
            differences[key] = compare(best, other, sets, 1 - (1 - LEVEL) / len(others))
        except UserError as error:
            unlike.append(str(error))
    if unlike:
        return "No point is named best: not all of them can be compared, see below.", differences, unlike
    close = [others[key].point.name for key, one in differences.items() if not one["distinguishable"]]
    count = sum(len(answers.rows) for answers in best.answers)
    together = f" for all {len(others)} comparisons together" if len(others) > 1 else ""
    how = f"paired on the {count:,} rows of {', '.join(sets)}, at {LEVEL:.0%}{together}"
    missing = [outcome.point.name for outcome in outcomes if outcome.point.number not in evaluated]
    without = f" Not in this comparison: {', '.join(missing)}." if missing else ""
    highest = f"{best.point.name}, {percent(best.score.accuracy)}"
    verdict = f"Best: {highest}, distinguishable from every other point ({how}).{without}"
    if close:
        verdict = f"No point is named best: the highest score is that of {highest}, and it cannot be told apart from "
        verdict += f"{', '.join(close)} ({how}).{without}"
    return verdict, differences, []


def compare(a: Evaluated, b: Evaluated, sets: list[str], level: float) -> dict[str, Any]:
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
    outcomes: list[Outcome],
    columns: list[str],
    sets: list[str],
    evaluated: dict[int, Evaluated],
    differences: dict[int, dict[str, Any]],
) -> Table:
    """A row for each point; columns in which every cell is empty are left out."""
    by_set = sets if len(sets) > 1 else []
    heads = ["", "point", *columns, "score", "vs best", *by_set, "validation loss", "trainable parameters", "seconds"]
    heads += ["samples/s", "peak GiB", "note"]
    body = []
    for outcome in outcomes:
        point, metrics, loss = outcome.point, outcome.metrics, outcome.metrics.get("final_eval_loss")
        one, difference = evaluated.get(point.number), differences.get(point.number)
        line = [str(point.number), point.name, *(as_text(column, point.recipe) for column in columns)]
        line += [score_cell(one.score) if one else "", difference_cell(difference) if difference else ""]
        each = [score(answers.items(answers.labels()[0])).accuracy for answers in one.answers] if one else []
        line += [percent(each[place]) if each else "" for place in range(len(by_set))]
        line += ["" if loss is None else f"{loss:.4g}"]
        figures = outcome.trainable, outcome.seconds, metrics.get("samples_per_second"), metrics.get("peak_memory_gib")
        line += ["" if value is None else number(value) for value in figures]
        body.append([*line, Cell(outcome.note, kind="words")])
    kept = [column for column in range(len(heads)) if any(str(line[column]) for line in body)]
    heads, *body = [[line[column] for column in kept] for line in [heads, *body]]
    return Table(heads, body, "All points", left=2)


def plot_of(done: list[Outcome], columns: list[str], evaluated: dict[int, Evaluated]) -> Plot | None:
    """Score (or validation loss), time and memory against what varies first. None where no point is finished.

    The axis is numeric where every value is a number (logarithmic from a span of four on), else one place a value. What
    else varies makes series, unless it follows from the axis.
    """
    if not done:
        return None
    column, *rest = columns or ["point"]
    recipes = {outcome.point.number: outcome.point.recipe for outcome in done}
    texts = {key: as_text(column, recipe) if columns else "" for key, recipe in recipes.items()}
    x = {key: on_axis(column, recipe) for key, recipe in recipes.items()}
    numeric = bool(columns) and None not in x.values()
    if numeric:
        texts = {key: f"{value:g}" for key, value in x.items()}
    else:
        places = list(dict.fromkeys(texts.values()))
        x = {key: float(places.index(text)) for key, text in texts.items()}
    long = max(map(len, texts.values())) > 16
    log = numeric and min(x.values()) > 0 and max(x.values()) / min(x.values()) >= 4
    labels = {x[key]: f"#{key}" if long else text for key, text in reversed(texts.items())}
    axis = Axis(min(x.values()), max(x.values()), sorted(labels.items()), log)
    names = series_names(recipes, texts, rest)
    figures = {"score, %": {key: score_point(one, x[key]) for key, one in evaluated.items()}}
    for title, value in FIGURES.items():
        figures[title] = {
            outcome.point.number: Point(
                value(outcome), x[outcome.point.number], title=f"{outcome.point.name}: {number(value(outcome))}"
            )
            for outcome in done
            if value(outcome) is not None
        }
    del figures["validation loss" if evaluated else "score, %"]
    panels = []
    for title, points in figures.items():
        by_name = {name: [point for key, point in points.items() if names[key] == name] for name in names.values()}
        if points:
            panels.append(Panel(title, [Series(name, one, line=numeric) for name, one in by_name.items()]))
    title = column + " (numbers as in the table)" * long + ", log scale" * log
    return Plot(panels, axis, title) if panels else None


FIGURES = {
    "validation loss": lambda outcome: outcome.metrics.get("final_eval_loss"),
    "training, s": lambda outcome: outcome.seconds,
    "peak memory, GiB": lambda outcome: outcome.metrics.get("peak_memory_gib"),
}


def on_axis(column: str, recipe: dict[str, Any]) -> float | None:
    """A point's place on a numeric axis, or None; that of one group of parameters is its own learning rate."""
    value = value_of(column, recipe)
    if column == "lr_groups" and (value is None or len(value) == 1):
        value = value[0]["lr"] if value else recipe["learning_rate"]
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def series_names(recipes: dict[int, dict[str, Any]], texts: dict[int, str], columns: list[str]) -> dict[int, str]:
    """The name of each point's series: the columns besides the axis that do not follow from it, with their values."""
    free = []
    for column in columns:
        pairs = {(texts[key], as_text(column, recipe)) for key, recipe in recipes.items()}
        free += [column] * (len(pairs) > len({text for text, _ in pairs}))
    return {key: ", ".join(f"{name} {as_text(name, recipe)}" for name in free) for key, recipe in recipes.items()}


def score_point(one: Evaluated, x: float) -> Point:
    value, low, high = (100 * getattr(one.score, key) for key in ("accuracy", "low", "high"))
    return Point(value, x, low, high, f"{one.point.name}: {score_cell(one.score)}")
