"""The results of a sweep (finlora/sweep/run.py): one table, one plot, and the best point where it can be told."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from finlora.core.errors import UserError
from finlora.core.files import write_text
from finlora.core.html import Cell, Table, number, percent, render
from finlora.core.paths import shown
from finlora.core.plot import Axis, Panel, Plot, Point, Series
from finlora.evaluate.compare import join, refuse_unlike
from finlora.evaluate.evaluation import Request, named
from finlora.evaluate.report import difference_cell, score, score_cell
from finlora.evaluate.results import Answers, ModelResults, read
from finlora.evaluate.scorers import Items
from finlora.evaluate.statistics import paired
from finlora.recipes import bases
from finlora.sweep.points import OWN, SweepPoint, as_text, column_of, value_of
from finlora.sweep.seeds import Mean, mean_score, paired_over_seeds

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
    shots: int = 0  # examples before each question

    @property
    def results_name(self) -> str:
        """What finlora.evaluate.runner calls the point."""
        return named(Request(shots=self.shots), self.point.name + (".tiny" if self.run and self.run["tiny"] else ""))

    def figure(self, key: str) -> Any:
        """Of the training's metrics. Its seconds, where it was interrupted, are those since, scaled up to all steps."""
        metrics = self.run["metrics"] if self.run else {}
        if key != "seconds":
            return metrics.get(key)
        here = metrics.get("steps_this_run")
        return metrics["seconds"] * metrics["steps"] / here if here else None

    @property
    def note(self) -> str:
        note = f"failed: {self.failed}" if self.failed else "" if self.run else "not finished"
        resumed = bool(self.figure("seconds")) and self.figure("steps_this_run") < self.figure("steps")
        scaled = "resumed after an interruption: its time is that of the steps since, scaled up"
        return "; ".join(filter(None, [note, scaled * resumed]))


@dataclass(frozen=True)
class Setting:
    """The points that differ in their seed alone: one, where the sweep does not vary the seed."""

    outcomes: tuple[Outcome, ...]

    @property
    def recipe(self) -> dict[str, Any]:
        return self.outcomes[0].point.recipe

    @property
    def name(self) -> str:
        name = self.outcomes[0].point.name
        return re.sub(r"\.seed-\d+", "", name) if len(self.outcomes) > 1 else name

    @property
    def number(self) -> str:
        numbers = [outcome.point.number for outcome in self.outcomes]
        return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"

    @property
    def scored(self) -> dict[int, Outcome]:
        """The evaluated runs by their seed."""
        return {outcome.point.recipe["seed"]: outcome for outcome in self.outcomes if outcome.answers}

    @cached_property
    def score(self) -> Mean | None:
        """On all sets together, over the seeds."""
        return mean_score(common_items(list(self.scored.values()))) if self.scored else None

    def mean(self, key: str) -> float | None:
        """Of a figure of the runs that have it."""
        values = [value for outcome in self.outcomes if (value := outcome.figure(key)) is not None]
        return math.fsum(values) / len(values) if values else None

    @property
    def trainable(self) -> int | None:
        run = next((outcome.run for outcome in self.outcomes if outcome.run), None)
        shape = bases.shape(run["base_model"]) if run else None
        return bases.trainable_parameters(self.recipe, shape) if shape else None

    @property
    def note(self) -> str:
        if len(self.outcomes) == 1:
            return self.outcomes[0].note
        return "; ".join(f"seed {one.point.recipe['seed']} {one.note}" for one in self.outcomes if one.note)


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
    settings = settings_of(outcomes)
    verdict, differences, unlike = verdict_of(settings, sets)
    result = SweepReport(
        title=f"{sweep.stem} on {recipe.stem}",
        verdict=verdict,
        notes=list(notes(settings, sets, warnings + unlike)),
        table=table_of(settings, columns, sets, differences),
        plot=plot_of([setting for setting in settings if any(one.run for one in setting.outcomes)], columns),
    )
    text = render("sweep/report.md.jinja", report=result)
    page = render("sweep/report.html.jinja", report=result, sweep=shown(sweep), recipe=shown(recipe))
    write_text(folder / "table.md", text)
    write_text(folder / "index.html", page)
    print(f"\n{text}\ntable and plot: {shown(folder / 'index.html')}, {shown(folder / 'table.md')}", flush=True)
    return result


def settings_of(outcomes: list[Outcome]) -> list[Setting]:
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        keys = {key: value for key, value in outcome.point.recipe.items() if key not in (*OWN, "seed")}
        groups.setdefault(repr(sorted(keys.items())), []).append(outcome)
    return [Setting(tuple(group)) for group in groups.values()]


def varied(points: list[SweepPoint]) -> list[str]:
    """What the settings differ by, in the sweep file's order."""
    names = dict.fromkeys(column_of(key) for point in points for key in point.changes if key != "seed")
    return [name for name in names if len({repr(value_of(name, point.recipe)) for point in points}) > 1]


def evaluated(outcomes: list[Outcome], folder: Path) -> tuple[list[Outcome], list[str], list[str]]:
    """The outcomes with their evaluations, the sets that all evaluated points answered, and what cannot be used.

    Sets in which answers are right or wrong are one pool of rows; BERTScores, and then general tasks, make one where
    there is nothing else.
    """
    outcomes = list(outcomes)
    try:
        models, warnings = read(folder, [outcome.results_name for outcome in outcomes])
    except UserError:  # nothing is evaluated
        return outcomes, [], []
    usable = {}
    for outcome in outcomes:
        model = models.get(outcome.results_name)
        if outcome.run and model and model.sets:
            if model.run.adapter_sha256 == outcome.run["adapter"]["sha256"]:
                usable[outcome.point.name] = model
            else:
                warnings.append(f"{outcome.point.name}: was evaluated with another adapter; EVAL=1 asks again")
    if not usable:
        return outcomes, [], warnings
    first = next(iter(usable.values())).sets
    sets = [name for name in first if all(name in model.sets for model in usable.values())]
    counted = [name for name in sets if not first[name].forgetting]
    sets = [name for name in counted if not first[name].bertscore] or counted or sets
    for place, outcome in enumerate(outcomes):
        if sets and (model := usable.get(outcome.point.name)):
            outcomes[place] = replace(outcome, model=model, answers=tuple(model.sets[name] for name in sets))
    return outcomes, sets, warnings


def verdict_of(settings: list[Setting], sets: list[str]) -> tuple[str, dict[str, dict[str, Any]], list[str]]:
    """Which setting is best, or that this cannot be told; the others' differences from it; what is not comparable.

    The best score is compared with every other one, on the same rows (and seeds); all those comparisons together are
    wrong in one case of twenty (Bonferroni), so the luck of the highest of many scores is not taken for merit.
    """
    scored = [setting for setting in settings if setting.score]
    if not scored:
        losses = [(loss, setting.name) for setting in settings if (loss := setting.mean("final_eval_loss")) is not None]
        if not losses:
            return "No point has a score or a validation loss yet.", {}, []
        loss = "{:.4g} ({})".format(*min(losses))
        verdict = f"No point is named best: the lowest validation loss is {loss}, and one loss a run does not say how "
        return verdict + "sure it is. EVAL=1 evaluates the points.", {}, []
    best = max(scored, key=lambda setting: setting.score.accuracy)
    others = [setting for setting in scored if setting is not best]
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
    count = sum(len(answers.rows) for answers in next(iter(best.scored.values())).answers)
    together = f" for all {len(others)} comparisons together" if len(others) > 1 else ""
    seeds = " and seeds" if any(len(setting.outcomes) > 1 for setting in settings) else ""
    how = f"paired on the {count:,} rows of {', '.join(sets)}{seeds}, at {LEVEL:.0%}{together}"
    missing = [setting.name for setting in settings if not setting.score]
    without = f" Not in this comparison: {', '.join(missing)}." if missing else ""
    highest = f"{best.name}, {percent(best.score.accuracy)}"
    verdict = f"Best: {highest}, distinguishable from every other point ({how}).{without}"
    if close:
        verdict = f"No point is named best: the highest score is that of {highest}, and it cannot be told apart from "
        verdict += f"{', '.join(close)} ({how}).{without}"
    return verdict, differences, []


def compare(a: Setting, b: Setting, sets: list[str], level: float) -> dict[str, Any]:
    """How far b is from a, over all sets and the seeds that both have. UserError where answers cannot be paired."""
    seeds = [seed for seed in a.scored if seed in b.scored]
    if len(a.outcomes) == len(b.outcomes) == 1:
        pairs = [(a.outcomes[0], b.outcomes[0])]
    else:
        pairs = [(a.scored[seed], b.scored[seed]) for seed in seeds]
    if not pairs:
        raise UserError(f"{a.name} and {b.name} were evaluated with no seed in common; evaluate the same seeds of both")
    for name in sets:
        for one, other in pairs:
            refuse_unlike(name, one.model, other.model)
    items = common_items([one for one, _ in pairs] + [other for _, other in pairs])
    of_a, of_b = items[: len(pairs)], items[len(pairs) :]
    if len(pairs) > 1:
        return paired_over_seeds(of_a, of_b, level)
    resamples = max(2000, math.ceil(100 / (1 - level)))  # as many as a p so small needs
    return paired(*of_a, *of_b, level=level, resamples=resamples)


def common_items(outcomes: list[Outcome]) -> list[Items]:
    """Each run's answers to the rows that all of them answered, all sets as one."""
    of_sets = []
    for answers in zip(*(outcome.answers for outcome in outcomes), strict=True):
        labels = answers[0].labels()[0]
        lines = tuple(line for line in answers[0].rows if all(line in one.rows for one in answers))
        of_sets.append(tuple(one.items(labels, None, lines) for one in answers))
    return list(join(of_sets))


def notes(settings: list[Setting], sets: list[str], warnings: list[str]) -> Iterator[str]:
    runs = [outcome.run for setting in settings for outcome in setting.outcomes if outcome.run]
    if any(run["tiny"] for run in runs):
        yield "A tiny stand-in model and a few steps: these figures try the commands and say nothing about the recipe."
    if sets:
        shots = next((outcome.shots for setting in settings for outcome in setting.outcomes), 0)
        yield (
            f"Score{f' ({shots}-shot)' if shots else ''}: percent of right answers under FinLoRA's rules, or BERTScore "
            "F1 x 100, over all rows of the sets, with its 95% interval. vs best: paired on the same rows; ≈ cannot be "
            "told from none."
        )
    if any(len(setting.outcomes) > 1 for setting in settings):
        yield "Points that differ only in their seed are one line: means, with intervals over seeds and rows."
    devices = sorted({run["device"] for run in runs})
    if devices:
        several = "are of different devices:" if len(devices) > 1 else "on"
        yield f"Times and memory {several} {', '.join(devices)}."
    yield from warnings


def table_of(
    settings: list[Setting], columns: list[str], sets: list[str], differences: dict[str, dict[str, Any]]
) -> Table:
    """A row for each setting; columns in which every cell is empty are left out."""
    by_set = sets if len(sets) > 1 else []
    heads = ["", "point", *columns, "seeds", "score", "vs best", *by_set, "validation loss", "trainable parameters"]
    heads += ["seconds", "samples/s", "peak GiB", "note"]
    body = []
    for one in settings:
        difference, loss = differences.get(one.name), one.mean("final_eval_loss")
        line = [one.number, one.name, *(as_text(column, one.recipe) for column in columns)]
        line += [str(sum(outcome.run is not None for outcome in one.outcomes)) if len(one.outcomes) > 1 else ""]
        line += [score_cell(one.score) if one.score else "", difference_cell(difference) if difference else ""]
        for place in range(len(by_set)):
            right = [score(run.answers[place].items(run.answers[place].labels()[0])) for run in one.scored.values()]
            line += [percent(math.fsum(each.accuracy for each in right) / len(right)) if right else ""]
        line += ["" if loss is None else f"{loss:.4g}"]
        figures = one.trainable, *map(one.mean, ("seconds", "samples_per_second", "peak_memory_gib"))
        line += ["" if value is None else number(value) for value in figures]
        body.append([*line, Cell(one.note, kind="words")])
    kept = [column for column in range(len(heads)) if any(str(line[column]) for line in body)]
    heads, *body = [[line[column] for column in kept] for line in [heads, *body]]
    return Table(heads, body, "All points", left=2)


def plot_of(done: list[Setting], columns: list[str]) -> Plot | None:
    """Score (or validation loss), time and memory against what varies first. None where no point is finished.

    The axis is numeric where every value is a number (logarithmic from a span of four on), else one place a value. What
    else varies makes series, unless it follows from the axis.
    """
    if not done:
        return None
    column, *rest = columns or ["point"]
    texts = [as_text(column, setting.recipe) if columns else "" for setting in done]
    x = [on_axis(column, setting.recipe) for setting in done]
    numeric = bool(columns) and None not in x
    if numeric:
        texts = [f"{value:g}" for value in x]
    else:
        places = list(dict.fromkeys(texts))
        x = [float(places.index(text)) for text in texts]
    long = max(map(len, texts)) > 16
    log = numeric and min(x) > 0 and max(x) / min(x) >= 4
    labels = {
        value: f"#{setting.number}" if long else text
        for value, setting, text in reversed(list(zip(x, done, texts, strict=True)))
    }
    free = [name for name in rest if not follows(texts, [as_text(name, setting.recipe) for setting in done])]
    names = [", ".join(f"{name} {as_text(name, setting.recipe)}" for name in free) for setting in done]
    panels = []
    for title, key in FIGURES.items():
        series: dict[str, list[Point]] = {name: [] for name in names}
        for setting, place, name in zip(done, x, names, strict=True):
            if drawn := point(setting, place, title, key):
                series[name].append(drawn)
        panels += [Panel(title, [Series(*one, line=numeric) for one in series.items()])] if any(series.values()) else []
    if any(setting.score for setting in done):
        panels = [panel for panel in panels if panel.title != "validation loss"]
    title = column + " (numbers as in the table)" * long + ", log scale" * log
    return Plot(panels, Axis(min(x), max(x), sorted(labels.items()), log), title) if panels else None


# By the title of their panels.
FIGURES = {
    SCORE: "",
    "validation loss": "final_eval_loss",
    "training, s": "seconds",
    "peak memory, GiB": "peak_memory_gib",
}


def point(setting: Setting, x: float, title: str, key: str) -> Point | None:
    """A setting's place in a panel; None where it lacks the figure."""
    if title == SCORE:
        if not (score := setting.score):
            return None
        text = f"{setting.name}: {score_cell(score)}"
        return Point(100 * score.accuracy, x, 100 * score.low, 100 * score.high, text)
    y = setting.mean(key)
    return None if y is None else Point(y, x, title=f"{setting.name}: {number(y)}")


def on_axis(column: str, recipe: dict[str, Any]) -> float | None:
    """A point's place on a numeric axis, or None; that of one group of parameters is its own learning rate."""
    value = value_of(column, recipe)
    if column == "lr_groups" and (value is None or len(value) == 1):
        value = value[0]["lr"] if value else recipe["learning_rate"]
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def follows(axis: list[str], values: list[str]) -> bool:
    """Whether each place on the axis has one of the values only."""
    return len(set(zip(axis, values, strict=True))) == len(set(axis))
