"""What a sweep found: one table and one plot, and which point is best where that can be told (finlora/sweep/run.py)."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2

from finlora.core import html
from finlora.core.errors import UserError
from finlora.core.files import replacing
from finlora.core.html import number, percent
from finlora.evaluate.compare import join, refuse_unlike
from finlora.evaluate.report import bracket, cell, difference_text, score, table
from finlora.evaluate.results import pair, read, show
from finlora.evaluate.statistics import paired
from finlora.recipes import bases

TEMPLATE = Path(__file__).with_name("report.html.jinja")
# Keys that are one thing to a reader; every other key stands for itself.
COLUMNS = {
    "lora_r": "rank",
    "lora_alpha": "alpha",
    **dict.fromkeys(("load_in_8bit", "load_in_4bit", "adapter"), "bits"),
    **dict.fromkeys(("peft_use_dora", "peft_use_rslora"), "method"),
}
WIDTH, LEFT, RIGHT, COLOURS = 760, 70, 20, 6
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
    text = "\n".join([f"# {shown['title']}", "", shown["verdict"], "", *markdown(shown["table"])])
    text += "".join(f"\n\n{cell(note)}" for note in shown["notes"]) + "\n"
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(shown)
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


def lay_out(shown: dict[str, Any]) -> list[list[str]]:
    """The table's lines as text, the heads first; columns in which nothing stands are left out."""
    several = shown["sets"] if len(shown["sets"]) > 1 else []
    heads = ["", "point", *shown["columns"], "score", "vs best", *several, "validation loss", "trainable parameters"]
    heads += ["seconds", "samples/s", "peak GiB", "note"]
    body = []
    for row in shown["rows"]:
        line = [str(row["number"]), row["name"], *row["values"]]
        line += [bracket(row["score"]) if row["score"] else "", difference(row)]
        line += (
            [percent(one["accuracy"]) for one in row["by_set"]] if several and row["by_set"] else [""] * len(several)
        )
        line += ["" if row["loss"] is None else f"{row['loss']:.4g}"]
        figures = [row[key] for key in ("trainable", "seconds", "samples_per_second", "memory")]
        body.append([*line, *("" if value is None else number(value) for value in figures), row["note"]])
    kept = [place for place in range(len(heads)) if any(line[place] for line in body)]
    return [[line[place] for place in kept] for line in [heads, *body]]


def difference(row: dict[str, Any]) -> str:
    return (
        difference_text({"difference": row["difference"], "rows": row["difference"]["rows"]})
        if row["difference"]
        else ""
    )


def markdown(lines: list[list[str]]) -> list[str]:
    return table(lines[0], lines[1:], left=2)


def plot(
    points: list[dict[str, Any]], rows: list[dict[str, Any]], columns: list[str], scored: bool
) -> dict[str, Any] | None:
    """Score (or validation loss), time and memory against what varies first, as places in an SVG of WIDTH pixels.

    The axis is numeric where every value is a number (logarithmic from a span of four on), else one place a value. What
    else varies makes series, unless it follows from the axis. None where no point is finished.
    """
    done = [(point, row) for point, row in zip(points, rows, strict=True) if row["finished"]]
    if not done:
        return None
    axis = columns[0] if columns else "point"
    places = {row["number"]: on_axis(axis, point["recipe"]) for point, row in done}
    words = {row["number"]: in_words(axis, value_of(axis, point["recipe"])) if columns else "" for point, row in done}
    numeric = columns and all(place is not None for place in places.values())
    if numeric:
        words = {key: f"{place:g}" for key, place in places.items()}
    else:
        order = list(dict.fromkeys(words.values()))
        places = {key: float(order.index(text)) for key, text in words.items()}
    low, high = min(places.values()), max(places.values())
    logarithmic = numeric and low > 0 and high / low >= 4
    scale = math.log if logarithmic else float
    series = series_of(done, words, columns)
    names = list(dict.fromkeys(series.values()))

    def x(key: int) -> float:
        along = (scale(places[key]) - scale(low)) / (scale(high) - scale(low)) if high > low else 0.5
        return LEFT + 30 + along * (WIDTH - LEFT - RIGHT - 60)

    panels, top = [], 30
    first = ("score, %", "score") if scored else ("validation loss", "loss")
    for title, key in [first, ("training, s", "seconds"), ("peak memory, GiB", "memory")]:
        marks = []
        for _, row in done:
            place = names.index(series[row["number"]])
            beside = (place - (len(names) - 1) / 2) * 7  # intervals of several series would cover each other
            marks.append(mark(row, key) | {"x": x(row["number"]) + beside, "series": place % COLOURS})
        marks = [entry for entry in marks if entry["y"] is not None]
        if marks:
            panels.append(panel(title, marks, top, 90 if panels else 190, lines=bool(numeric)))
            top = panels[-1]["bottom"] + 52
    if not panels:
        return None
    labels: list[dict[str, Any]] = []
    long = max(map(len, words.values())) > 16
    for key in sorted(places, key=x):
        text = f"#{key}" if long else words[key]
        if not labels or x(key) - labels[-1]["x"] > 7 * max(len(text), len(labels[-1]["text"])):
            labels.append({"x": round(x(key), 1), "text": text})
    return {
        "axis": axis + (" (numbers as in the table)" if long else "") + (", log scale" if logarithmic else ""),
        "panels": panels,
        "labels": labels,
        "series": names if len(names) > 1 else [],
        "width": WIDTH,
        "height": top + 6,
        "left": LEFT,
        "right": WIDTH - RIGHT,
    }


def series_of(done: list[tuple[dict, dict]], words: dict[int, str], columns: list[str]) -> dict[int, str]:
    """The name of each point's series: what else than the axis varies and does not follow from it."""
    free = []
    for place, column in enumerate(columns[1:], 1):
        by_axis: dict[str, set[str]] = {}
        for _, row in done:
            by_axis.setdefault(words[row["number"]], set()).add(row["values"][place])
        if any(len(values) > 1 for values in by_axis.values()):
            free.append((place, column))
    return {row["number"]: ", ".join(f"{name} {row['values'][place]}" for place, name in free) for _, row in done}


def mark(row: dict[str, Any], key: str) -> dict[str, Any]:
    """A point's value in a panel and the ends of its interval, which are the value itself where it has none."""
    value = row[key]
    if key == "score" and value:
        low, high, value = (100 * value[part] for part in ("low", "high", "accuracy"))
        return {"y": value, "low": low, "high": high, "text": f"{row['name']}: {value:.2f} [{low:.1f}, {high:.1f}]"}
    text = "" if value is None else f"{row['name']}: {number(value)}"
    return {"y": value, "low": value, "high": value, "text": text}


def panel(title: str, marks: list[dict[str, Any]], top: float, height: float, lines: bool) -> dict[str, Any]:
    """Marks as places in pixels, with the ticks of the panel's own axis and a path for each series."""
    ticks = html.axis(min(entry["low"] for entry in marks), max(entry["high"] for entry in marks))
    low, high = ticks[0], ticks[-1]

    def y(value: float) -> float:
        return round(top + (high - value) / (high - low) * height, 1)

    placed = [
        entry | {"x": round(entry["x"], 1), **{key: y(entry[key]) for key in ("y", "low", "high")}} for entry in marks
    ]
    paths: dict[int, list[dict[str, Any]]] = {}
    for entry in sorted(placed, key=lambda entry: entry["x"]) if lines else []:
        paths.setdefault(entry["series"], []).append(entry)
    return {
        "title": title,
        "top": top,
        "bottom": top + height,
        "ticks": [{"text": f"{tick:g}", "y": y(tick)} for tick in ticks],
        "marks": placed,
        "paths": [
            {"series": name, "d": "M" + "L".join(f"{entry['x']} {entry['y']}" for entry in entries)}
            for name, entries in paths.items()
        ],
    }
