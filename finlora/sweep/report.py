"""The results of a sweep (finlora/sweep/run.py): one table, one plot, and the best point where it can be told."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finlora.core import html
from finlora.core.errors import UserError
from finlora.core.files import replacing
from finlora.core.html import Axis, Cell, Panel, Plot, Point, Series, Table, number, percent
from finlora.evaluate.compare import join, refuse_unlike
from finlora.evaluate.report import bracket, difference_cell, score, score_cell
from finlora.evaluate.results import pair, read, show
from finlora.evaluate.statistics import paired
from finlora.recipes import bases

# Keys that make one column together; every other key is a column of its own.
COLUMNS = {
    "lora_r": "rank",
    "lora_alpha": "alpha",
    **dict.fromkeys(("load_in_8bit", "load_in_4bit", "adapter"), "bits"),
    **dict.fromkeys(("peft_use_dora", "peft_use_rslora"), "method"),
}
LEVEL = 0.95


def report(recipe: Path, sweep: Path, points: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Write table.md and index.html into the sweep's folder, print the table; return what they show.

    A point has number, name, changes, recipe, out, run (run.json or None) and failed (why, or None).
    """
    rows = [describe(point) for point in points]
    columns = varied(points)
    for row, point in zip(rows, points, strict=True):
        row["values"] = [in_words(column, value_of(column, point["recipe"])) for column in columns]
    sets, warnings = add_scores(rows, points, folder / "results")
    verdict, unlike = verdict_of(rows, sets)
    devices = sorted({point["run"]["device"] for point in points if point["run"]})
    shown = {
        "title": f"{sweep.stem} on {recipe.stem}",
        "sweep": show(sweep),
        "recipe": show(recipe),
        "columns": columns,
        "sets": sets,
        "rows": rows,
        "verdict": verdict,
        "warnings": warnings + unlike,
        "devices": devices,
        "tiny": any(point["run"]["tiny"] for point in points if point["run"]),
    }
    shown |= {"notes": list(notes(shown)), "table": lay_out(shown), "plot": plot(points, rows, columns, bool(sets))}
    text = "\n".join([f"# {shown['title']}", "", shown["verdict"], "", *html.markdown(shown["table"])])
    text += "".join(f"\n\n{html.plain(note)}" for note in shown["notes"]) + "\n"
    page = html.render("sweep/report.html.jinja", shown)
    for name, content in (("table.md", text), ("index.html", page)):
        with replacing(folder / name) as file:
            file.write(content)
    print(f"\n{text}\ntable and plot: {show(folder / 'index.html')}, {show(folder / 'table.md')}", flush=True)
    return shown


def describe(point: dict[str, Any]) -> dict[str, Any]:
    """A point's figures: validation loss, seconds of training, samples a second, GiB at the peak, and its notes."""
    run = point["run"] or {}
    metrics = run.get("metrics", {})
    seconds, whole, here = (metrics.get(key) for key in ("seconds", "steps", "steps_this_run"))
    resumed = bool(here) and here < whole
    shape = bases.shape(run["base_model"]) if run else None
    note = f"failed: {point['failed']}" if point["failed"] else "" if run else "not finished"
    if resumed:
        note = (
            f"{note}; " * bool(note) + "went on after an interruption: its time is that of the steps since, scaled up"
        )
    return {
        "number": point["number"],
        "name": point["name"],
        "finished": bool(run),
        "loss": metrics.get("final_eval_loss"),
        "seconds": seconds * whole / here if here else None,
        "samples_per_second": metrics.get("samples_per_second"),
        "memory": metrics.get("peak_memory_gib"),
        "trainable": bases.trainable_parameters(point["recipe"], shape) if shape else None,
        "note": note,
        "score": None,
        "by_set": [],
        "difference": None,
    }


def varied(points: list[dict[str, Any]]) -> list[str]:
    """What the points differ by, in the sweep file's order."""
    names = dict.fromkeys(COLUMNS.get(key, key) for point in points for key in point["changes"])
    return [name for name in names if len({repr(value_of(name, point["recipe"])) for point in points}) > 1]


def value_of(column: str, recipe: dict[str, Any]) -> Any:
    if column == "bits":
        return 8 if recipe.get("load_in_8bit") else 4 if recipe.get("load_in_4bit") else 16
    if column == "method":
        return "rslora" if recipe.get("peft_use_rslora") else "dora" if recipe.get("peft_use_dora") else "lora"
    return recipe.get({"rank": "lora_r", "alpha": "lora_alpha"}.get(column, column))


def in_words(column: str, value: Any) -> str:
    if column == "lr_groups":
        groups = [f"{group['name']} {group['lr']:g}" for group in value or []]
        return ", ".join(groups) or "as learning_rate"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def on_axis(column: str, recipe: dict[str, Any]) -> float | None:
    """A point's place on a numeric axis (of one group of parameters with a rate of its own: that rate), or None."""
    value = value_of(column, recipe)
    if column == "lr_groups" and (value is None or len(value) == 1):
        value = value[0]["lr"] if value else recipe["learning_rate"]
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def subject(name: str, small: bool) -> str:
    """What finlora.evaluate.runner calls a point."""
    return name + (".tiny" if small else "")


def add_scores(rows: list[dict[str, Any]], points: list[dict[str, Any]], folder: Path) -> tuple[list[str], list[str]]:
    """Score the rows' evaluations on the sets that all of them answered; those sets, and what cannot be used.

    Sets in which answers are right or wrong are one pool of rows; BERTScores, and then general tasks, make one where
    there is nothing else.
    """
    if not folder.is_dir():
        return [], []
    try:
        names = [subject(point["name"], bool(point["run"] and point["run"]["tiny"])) for point in points]
        subjects, warnings = read(folder, names)
    except UserError:
        return [], []
    found: list[tuple[dict[str, Any], Any]] = []
    for row, point, name in zip(rows, points, names, strict=True):
        if point["run"] and name in subjects and subjects[name].sets:
            if subjects[name].run.adapter_sha256 == point["run"]["adapter"]["sha256"]:
                found.append((row, subjects[name]))
            else:
                warnings.append(f"{point['name']}: was evaluated with another adapter; EVAL=1 asks again")
    sets = [name for name in found[0][1].sets if all(name in other.sets for _, other in found)] if found else []
    counted = [name for name in sets if not found[0][1].sets[name].forgetting]
    right = [name for name in counted if not found[0][1].sets[name].bertscore]
    sets = right or counted or sets
    for row, answering in found if sets else []:
        answers = [answering.sets[name] for name in sets]
        items = join([(one.items(one.labels()[0]),) for one in answers])[0]
        row |= {"answers": answers, "subject": answering, "score": score(items)}
        row["by_set"] = [score(one.items(one.labels()[0])) for one in answers]
    return sets, warnings


def verdict_of(rows: list[dict[str, Any]], sets: list[str]) -> tuple[str, list[str]]:
    """Which point is best, or that this cannot be told; and a line for each two that cannot be compared.

    The best score is held against every other one, on the same rows; all those comparisons together are wrong in one
    case of twenty (Bonferroni), so the luck of the highest of many scores is not taken for merit.
    """
    asked = [row for row in rows if row["score"]]
    if not asked:
        known = [row for row in rows if row["loss"] is not None]
        if not known:
            return "No point has a score or a validation loss yet.", []
        low = min(known, key=lambda row: row["loss"])
        return (
            f"No point is named best: the lowest validation loss is {low['loss']:.4g} ({low['name']}), and one loss "
            "a run does not say how sure it is. EVAL=1 evaluates the points."
        ), []
    best = max(asked, key=lambda row: row["score"]["accuracy"])
    others = [row for row in asked if row is not best]
    if not others:
        return f"No point is named best: only {best['name']} is evaluated.", []
    close, unlike = [], []
    for row in others:
        try:
            row["difference"] = compare(best, row, sets, 1 - (1 - LEVEL) / len(others))
        except UserError as error:
            unlike.append(str(error))
            continue
        if not row["difference"]["distinguishable"]:
            close.append(row["name"])
    if unlike:
        return "No point is named best: not all of them can be compared, see below.", unlike
    count = sum(len(answers.rows) for answers in best["answers"])
    together = f" for all {len(others)} comparisons together" if len(others) > 1 else ""
    sure = f"paired on the {count:,} rows of {', '.join(sets)}, at {LEVEL:.0%}{together}"
    highest = f"{best['name']}, {percent(best['score']['accuracy'])}"
    missing = [row["name"] for row in rows if not row["score"]]
    without = f" Not in this comparison: {', '.join(missing)}." if missing else ""
    if close:
        return (
            f"No point is named best: the highest score is that of {highest}, and it cannot be told apart from "
            f"{', '.join(close)} ({sure}).{without}"
        ), []
    return f"Best: {highest}, distinguishable from every other point ({sure}).{without}", []


def compare(a: dict[str, Any], b: dict[str, Any], sets: list[str], level: float) -> dict[str, Any]:
    """How far b is from a, over all sets. UserError where their answers cannot be paired."""
    for name in sets:
        refuse_unlike(name, a["subject"], b["subject"])
    pairs = [pair(one, other, one.labels()[0])[1:] for one, other in zip(a["answers"], b["answers"], strict=True)]
    resamples = max(2000, math.ceil(100 / (1 - level)))  # as many as the interval's ends need
    return paired(*join(pairs), level=level, resamples=resamples)


def notes(shown: dict[str, Any]) -> Iterator[str]:
    if shown["tiny"]:
        yield "A tiny stand-in model and a few steps: these figures try the way and say nothing about the recipe."
    if shown["sets"]:
        yield (
            "Score: percent of right answers under FinLoRA's rules, or BERTScore F1 x 100, over all rows of the sets, "
            "with its 95% bootstrap interval. vs best: paired on the same rows; ≈ cannot be told from none."
        )
    if len(shown["devices"]) > 1:
        yield f"Times and memory are of different devices: {', '.join(shown['devices'])}."
    elif shown["devices"]:
        yield f"Times and memory on {shown['devices'][0]}."
    yield from shown["warnings"]


def lay_out(shown: dict[str, Any]) -> Table:
    """A row for each point; columns in which every cell is empty are left out."""
    by_set = shown["sets"] if len(shown["sets"]) > 1 else []
    heads = ["", "point", *shown["columns"], "score", "vs best", *by_set, "validation loss", "trainable parameters"]
    heads += ["seconds", "samples/s", "peak GiB", "note"]
    body = []
    for row in shown["rows"]:
        line = [str(row["number"]), row["name"], *row["values"]]
        line += [score_cell(row["score"]) if row["score"] else "", versus_best(row)]
        line += [percent(one["accuracy"]) for one in row["by_set"]] if by_set and row["by_set"] else [""] * len(by_set)
        line += ["" if row["loss"] is None else f"{row['loss']:.4g}"]
        figures = [row[key] for key in ("trainable", "seconds", "samples_per_second", "memory")]
        line += ["" if value is None else number(value) for value in figures]
        body.append([*line, Cell(row["note"], kind="words")])
    kept = [column for column in range(len(heads)) if any(str(line[column]) for line in body)]
    heads, *body = [[line[column] for column in kept] for line in [heads, *body]]
    return Table(heads, body, "All points", left=2)


def versus_best(row: dict[str, Any]) -> Cell:
    return difference_cell(row | {"rows": row["difference"]["rows"]}) if row["difference"] else Cell()


def plot(points: list[dict[str, Any]], rows: list[dict[str, Any]], columns: list[str], scored: bool) -> Plot | None:
    """Score (or validation loss), time and memory against what varies first. None where no point is finished.

    The axis is numeric where every value is a number (logarithmic from a span of four on), else one place a value. What
    else varies makes series, unless it follows from the axis.
    """
    done = [(point, row) for point, row in zip(points, rows, strict=True) if row["finished"]]
    if not done:
        return None
    column = columns[0] if columns else "point"
    x = {row["number"]: on_axis(column, point["recipe"]) for point, row in done}
    words = {
        row["number"]: in_words(column, value_of(column, point["recipe"])) if columns else "" for point, row in done
    }
    numeric = bool(columns) and all(value is not None for value in x.values())
    if numeric:
        words = {key: f"{value:g}" for key, value in x.items()}
    else:
        order = list(dict.fromkeys(words.values()))
        x = {key: float(order.index(text)) for key, text in words.items()}
    long = max(map(len, words.values())) > 16
    labels = {x[key]: f"#{key}" if long else text for key, text in reversed(words.items())}
    log = numeric and min(x.values()) > 0 and max(x.values()) / min(x.values()) >= 4
    axis = Axis(min(x.values()), max(x.values()), sorted(labels.items()), log)
    names = series_of(done, words, columns)
    panels = []
    first = ("score, %", "score") if scored else ("validation loss", "loss")
    for title, key in [first, ("training, s", "seconds"), ("peak memory, GiB", "memory")]:
        series = [
            Series(
                name,
                [
                    mark(row, key, x[row["number"]])
                    for _, row in done
                    if row[key] is not None and names[row["number"]] == name
                ],
                line=numeric,
            )
            for name in dict.fromkeys(names.values())
        ]
        if any(one.points for one in series):
            panels.append(Panel(title, series))
    if not panels:
        return None
    numbers = " (numbers as in the table)" * long
    return Plot(panels, axis, column + numbers + ", log scale" * log)


def series_of(done: list[tuple[dict, dict]], words: dict[int, str], columns: list[str]) -> dict[int, str]:
    """The name of each point's series: the columns besides the axis that do not follow from it, with their values."""
    named = []
    for place, column in enumerate(columns[1:], 1):
        by_axis: dict[str, set[str]] = {}
        for _, row in done:
            by_axis.setdefault(words[row["number"]], set()).add(row["values"][place])
        if any(len(values) > 1 for values in by_axis.values()):
            named.append((place, column))
    return {row["number"]: ", ".join(f"{name} {row['values'][place]}" for place, name in named) for _, row in done}


def mark(row: dict[str, Any], key: str, x: float) -> Point:
    """A row's value in a panel; a score in percent with its interval."""
    value = row[key]
    if key == "score":
        low, high, share = (100 * value[part] for part in ("low", "high", "accuracy"))
        return Point(share, low, high, x, f"{row['name']}: {bracket(value)}")
    return Point(value, x=x, title=f"{row['name']}: {number(value)}")
