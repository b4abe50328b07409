"""The report on everything under results/: index.html, self-contained, and README.md (`make report`).

finlora report [--results DIR]

Scores are percent: right answers under FinLoRA's rules, or BERTScore F1 x 100. The same results give the same bytes.
"""

import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from markupsafe import Markup

from finlora.core import html
from finlora.core.errors import UserError
from finlora.core.files import replacing
from finlora.core.html import Axis, Cell, Panel, Plot, Point, Row, Series, Table, number, p_value, percent, signed
from finlora.data.corrections import load_corrections
from finlora.evaluate.published import BESIDE, published, published_average
from finlora.evaluate.results import RESULTS, Answers, Run, Subject, base_of, keep, pair, read, set_order, show, unlike
from finlora.evaluate.scorers import summary
from finlora.evaluate.statistics import interval, paired

LETTERS = {"base": "B", "LoRA": "L", "QLoRA": "Q", "DoRA": "D", "rsLoRA": "R"}
PROMPTS = {
    "saved": "the chat template saved with the model",
    "finlora_inst": "FinLoRA's [INST] form",
    "raw": "the raw context, as FinLoRA tested",
    "endpoint": "the endpoint's own",
}
METHODS = {"base": "base model", "lora": "LoRA", "dora": "DoRA", "rslora": "rsLoRA"}
MOST_LABELS, CONFUSIONS, EXAMPLES, LOWEST = 12, 6, 2, 6


def report(folder: Path = RESULTS) -> dict[str, Any]:
    """Write index.html and README.md into the results' folder; return what they show.

    What cannot be used is named on stderr and in both files. Raises UserError where nothing is finished.
    """
    subjects, warnings = read(folder)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    subjects = {name: subject for name, subject in subjects.items() if subject.sets}
    if not subjects:
        raise UserError(f"{show(folder)}: no evaluation is finished; run make eval RECIPE=sentiment_r8_dora to its end")
    shown = gather(subjects, warnings)
    page = html.render("evaluate/report.html.jinja", shown)
    tables = readme(shown)
    with replacing(folder / "index.html") as file:
        file.write(page)
    with replacing(folder / "README.md") as file:
        file.write(tables)
    return shown


def gather(subjects: dict[str, Subject], warnings: list[str]) -> dict[str, Any]:
    """Everything that the report shows, as plain values: the template and the tables only lay it out."""
    adapters = [subject for subject in subjects.values() if subject.run.adapter]
    bases = [subject for subject in subjects.values() if not subject.run.adapter]
    about = [describe(subject, base_of(subject, subjects)) for subject in [*adapters, *bases]]
    for index, entry in enumerate(about, 1):
        entry["id"] = f"s{index}"
    return {
        "warnings": warnings,
        "subjects": about,
        "chart": chart([*about[len(adapters) :], *about[: len(adapters)]]),
        "exchanged": exchanged(subjects),
        "letters": LETTERS,
    }


def describe(subject: Subject, base: Subject | None) -> dict[str, Any]:
    run = subject.run
    tests = [answers for answers in subject.sets.values() if not answers.forgetting]
    forgetting = [answers for answers in subject.sets.values() if answers.forgetting]
    others = base.sets if base else {}
    rows = [line for answers in tests for line in lines(answers, others.get(answers.name))]
    shown = {
        "name": subject.name,
        "run": run,
        "is_base": not run.adapter,
        "base": base.name if base else None,
        "facts": facts(run),
        "more_facts": more_facts(run),
        "prompt": PROMPTS.get(run.prompt, run.prompt or "not recorded"),
        "notes": notes(subject, base),
        "rows": rows,
        "averages": averages(rows),
        "forgetting": [forgotten(answers, others.get(answers.name)) for answers in forgetting],
        "format": [formatting(answers) for answers in tests],
        "details": [details(answers) for answers in tests],
        "curve": curve(run.training or {}),
    }
    return shown | {"tables": list(tables(shown))}


def facts(run: Run) -> str:
    parts = [run.model.rstrip("/").split("/")[-1]]
    parts += [f"{run.bits}-bit"] if run.bits else []
    method = METHODS.get(run.method, run.method or ("adapter" if run.adapter else "base model"))
    parts += [method + (f" r {run.r}, alpha {run.alpha}" if run.r else "")]
    return " · ".join(parts + [part for part in (run.way, run.backend) if part])


def more_facts(run: Run) -> list[tuple[str, str]]:
    training, git = run.training or {}, run.git or {}
    measured = training.get("metrics")
    training = training | (measured if isinstance(measured, dict) else {})
    pairs = [
        ("recipe", run.recipe),
        ("model", run.model),
        ("adapter", run.adapter),
        ("adapter SHA-256", run.adapter_sha256),
        ("prompt", run.prompt),
        ("template SHA-256", run.template_sha256),
        ("way", run.way),
        ("backend", run.backend),
        ("device", run.device),
        ("started", run.started),
        ("git", f"{git['commit']}{', with changes' if git.get('changed') else ''}" if git.get("commit") else None),
        ("versions", ", ".join(f"{name} {version}" for name, version in sorted((run.versions or {}).items()))),
        (
            "training",
            ", ".join(
                f"{name.replace('_', ' ')} {number(value)}"
                for name, value in training.items()
                if isinstance(value, NUMBERS) and not isinstance(value, bool)
            ),
        ),
    ]
    return [(name, str(value)) for name, value in pairs if value]


NUMBERS = (int, float)


def notes(subject: Subject, base: Subject | None) -> list[str]:
    """What a reader must know before trusting this subject's numbers, one sentence each."""
    run, said = subject.run, []
    if run.tiny:
        said.append("A tiny stand-in model, made to try the way: its scores say nothing about the recipe.")
    tests = [answers for answers in subject.sets.values() if not answers.forgetting]
    other = [answers.name for answers in tests if answers.about.published_file is False]
    if other:
        said.append(f"Not FinLoRA's published files (own or synthetic rows), so not comparable: {', '.join(other)}.")
    cut = [
        f"{answers.name} {len(answers.rows):,} of {answers.about.rows:,}"
        for answers in tests
        if answers.about.rows and len(answers.rows) < answers.about.rows
    ]
    cut += [
        f"{answers.name} {answers.about.limit:,} a task"
        for answers in subject.sets.values()
        if answers.forgetting and answers.about.limit
    ]
    if cut:
        said.append(f"LIMIT: only some rows were answered ({', '.join(cut)}).")
    seen = {answers.name: sum(bool(row["seen"]) for row in answers.rows.values()) for answers in tests}
    seen = [f"{name} {count:,}" for name, count in seen.items() if count]
    if seen:
        said.append(f"Some rows were trained on ({', '.join(seen)}); the scores without them are listed too.")
    if run.adapter and any(row["seen"] is None for answers in tests for row in answers.rows.values()):
        said.append("Whether rows were trained on is not known: the adapter's training data is not at hand.")
    if (run.git or {}).get("changed"):
        said.append("The repository had changes that were not committed.")
    if run.adapter and not base:
        said.append("No base to compare with: evaluate it too, with BASE=1.")
    if base:
        if base.run.prompt != run.prompt:
            said.append(
                f"{base.name} was asked with another prompt ({PROMPTS.get(base.run.prompt, base.run.prompt)}): "
                "the differences are those of model and prompt together."
            )
        alone = [name for name in subject.sets if name not in base.sets]
        if alone:
            said.append(f"{base.name} has not answered: {', '.join(alone)}.")
        for name in subject.sets:
            if name in base.sets and (reason := unlike(base.sets[name], subject.sets[name])):
                said.append(f"{name}: no difference from {base.name}, which answered {reason}.")
    return said


def lines(answers: Answers, base: Answers | None) -> Iterator[dict[str, Any]]:
    """One line a version of the labels, the one that was asked for first; then those without rows seen in training."""
    unseen = tuple(line for line, row in answers.rows.items() if not row["seen"])
    for only in ((), unseen) if 0 < len(unseen) < len(answers.rows) else ((),):
        for labels in answers.labels():
            yield measure(answers, base, labels, only)


def measure(answers: Answers, base: Answers | None, labels: str, only: tuple = ()) -> dict[str, Any]:
    """Score, interval and paired difference from the base under one version of the labels, on all or `only` some."""

    def chosen(items: dict[str, list], rows: tuple) -> dict[str, list]:
        return keep(items, [place for place, line in enumerate(rows) if line in wanted]) if only else items

    wanted = set(only)
    everything = tuple(answers.rows)
    ways = list(answers.scorings())
    primary = answers.items(labels)
    strict = answers.items(labels, "strict") if "strict" in ways else None

    def scored(items: dict[str, list], scoring: str | None) -> dict[str, Any]:
        return score(chosen(items, everything)) if only else whole(answers, labels, scoring)

    difference = None
    if base and not unlike(base, answers):
        rows, of_base, of_this = pair(base, answers, labels)
        if not only or wanted & set(rows):
            difference = paired(chosen(of_base, rows), chosen(of_this, rows))
    return {
        "set": answers.name,
        "kind": {"bertscore_f1": "BERTScore F1", "tag_accuracy_f1": "each tag"}.get(answers.about.metric, ""),
        "labels": labels,
        "only": "not seen in training" if only else "",
        "versions": len(answers.labels()),
        "rows": len(only or everything),
        "of": answers.about.rows or len(everything),
        "score": scored(primary, ways[0] if ways else None),
        "f1": not answers.bertscore,
        "other_file": answers.about.published_file is False,
        "strict": scored(strict, "strict") if strict and strict["right"] != primary["right"] else None,
        "unparsed": summary(chosen(strict, everything))["unparsed"] if strict else None,
        "difference": difference,
        # FinLoRA measured with its own labels, on all rows.
        "published": {
            name: published()[answers.name][model]
            for name, model in BESIDE.items()
            if answers.name in published() and labels == "published" and not only
        },
    }


def forgotten(answers: Answers, base: Answers | None) -> dict[str, Any]:
    """The same for a general task, with the base's own score on the questions that both answered."""
    line = measure(answers, base, "published")
    return line | {"base": score(pair(base, answers, "published")[1]) if line["difference"] else None}


@cache
def whole(answers: Answers, labels: str, scoring: str | None) -> dict[str, Any]:
    return score(answers.items(labels, scoring))


def score(items: dict[str, list]) -> dict[str, Any]:
    low, high = interval(items)
    return summary(items) | {"low": low, "high": high}


def averages(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """FinLoRA's overall average over the sets that are here, once a version of the labels; theirs over the same sets.

    Theirs stays out where a set was not measured on FinLoRA's own file.
    """
    found = []
    every = [name for name in published() if name != "overall"]
    counted = [row for row in rows if row["set"] in every and not row["only"]]
    versions = ["corrected", "published"] if any(row["labels"] == "corrected" for row in counted) else ["published"]
    for labels in versions:
        # The wanted version comes last and stays; sets with one version count in both averages.
        chosen = {row["set"]: row for row in sorted(counted, key=lambda row: row["labels"] == labels)}
        if len(chosen) < 2:
            continue
        sets = sorted(chosen, key=set_order)
        other_file = any(row["other_file"] for row in chosen.values())
        theirs = {} if labels == "corrected" or other_file else BESIDE
        found.append(
            {
                "labels": labels,
                "sets": sets,
                "whole": len(sets) == len(every),
                "limited": any(row["rows"] < row["of"] for row in chosen.values()),
                "value": sum(row["score"]["accuracy"] for row in chosen.values()) / len(sets),
                "published": {name: published_average(model, sets) for name, model in theirs.items()},
            }
        )
    return found


def formatting(answers: Answers) -> dict[str, Any]:
    """How reliably the answers have the form that was asked for, and what they took."""
    rows, about = answers.rows.values(), answers.about
    strict = summary(answers.items(answers.labels()[0], "strict")) if "strict" in answers.scorings() else None
    seconds = about.seconds
    return {
        "set": answers.name,
        "rows": len(rows),
        "unparsed": strict["unparsed"] if strict else None,
        "items": strict["items"] if strict else len(rows),
        "cut": sum(row["stopped"] is False for row in rows),
        "max_new_tokens": about.max_new_tokens,
        "empty": sum(not row["answer"].strip() for row in rows),
        "seconds": seconds,
        "speed": len(rows) / seconds if seconds else None,
        "prompt_tokens": about.prompt_tokens,
        "answer_tokens": about.answer_tokens,
    }


def details(answers: Answers) -> dict[str, Any]:
    versions, about = answers.labels(), answers.about
    source = [about.file, about.sha256 and f"SHA-256 {about.sha256[:12]}"]
    source += [about.encoder and f"encoder {about.encoder}"]
    return {
        "set": answers.name,
        "source": " · ".join(filter(None, source)),
        "scorings": scorings(answers),
        "matrices": [matrix for labels in versions if (matrix := confusion_matrix(answers, labels))],
        "labels": versions[0] if len(versions) > 1 else "",
        "errors": lowest(answers) if answers.bertscore else confusions(answers, versions[0]),
        "wrong": None
        if answers.bertscore
        else sum(right < 1 for right in answers.items(versions[0], "strict")["right"]),
    }


def scorings(answers: Answers) -> Table:
    """The score of every scoring, under every version of the labels."""
    body = []
    for name in answers.scorings():
        for labels in answers.labels():
            found = whole(answers, labels, name)
            figures = [percent(found["weighted_f1"]), percent(found["macro_f1"])]
            figures += [number(found["unparsed"]), number(found["items"])]
            body.append([Cell(name, f"{labels} labels"), score_cell(found), *figures])
    heads = ["scoring", "score", "weighted F1", "macro F1", "unparsed", "answers"]
    return Table(heads, body, f"Every scoring of {answers.name}")


def confusion_matrix(answers: Answers, labels: str) -> dict[str, Any] | None:
    """Rows: right answers; columns: strict predictions, then 'unparsed'. None without a small set of labels."""
    known = answers.spec.labels
    if not known or len(known) > MOST_LABELS:
        return None
    items = answers.items(labels, "strict")
    counts = Counter(zip(items["target"], items["predicted"], strict=True))
    columns = [*known, *sorted({p for _, p in counts} - {*known, "unparsed"}), "unparsed"]
    rows, body = [], []
    for target in [*known, *sorted({t for t, _ in counts} - set(known))]:
        row = [counts[target, column] for column in columns]
        rows.append({"target": target, "counts": row, "right": counts[target, target]})
        cells = [
            Cell(number(count), kind="share right" if column == target else "share", share=count / max(sum(row), 1))
            for column, count in zip(columns, row, strict=True)
        ]
        body.append([target, *cells, number(sum(row))])
    of = f"{labels} labels" if len(answers.labels()) > 1 else ""
    caption = Markup("<b>{}</b>: ").format(of) if of else Markup("")
    caption += "right answers by row, strict answers by column"
    label = f"Confusion matrix of {answers.name}{', ' * bool(of)}{of}"
    return {"columns": columns, "rows": rows, "table": Table(["right", *columns, "rows"], body, label, caption)}


def confusions(answers: Answers, labels: str) -> list[dict[str, Any]]:
    """The most frequent pairs of right answer and strict prediction that differ, each with its first rows."""
    items, order = answers.items(labels, "strict"), tuple(answers.rows)
    found: dict[tuple[str, str], list[int]] = defaultdict(list)
    for place, target, predicted, right in zip(
        items["row"], items["target"], items["predicted"], items["right"], strict=True
    ):
        if right < 1:
            found[target, predicted].append(order[place])
    worst = sorted(found.items(), key=lambda pair: (-len(pair[1]), pair[1][0], pair[0]))[:CONFUSIONS]
    lines = {line for _, rows in worst for line in list(dict.fromkeys(rows))[:EXAMPLES]}
    prompts = answers.prompts(lines)
    return [
        {
            "target": target,
            "predicted": predicted,
            "count": len(rows),
            "examples": [example(answers, line, prompts[line]) for line in list(dict.fromkeys(rows))[:EXAMPLES]],
        }
        for (target, predicted), rows in worst
    ]


def lowest(answers: Answers) -> list[dict[str, Any]]:
    """The rows with the lowest BERTScore F1."""
    worst = sorted(answers.rows.values(), key=lambda row: (row["bertscore"], row["row"]))[:LOWEST]
    prompts = answers.prompts([row["row"] for row in worst])
    return [
        {
            "target": "",
            "predicted": "",
            "count": 1,
            "examples": [example(answers, row["row"], prompts[row["row"]])],
        }
        for row in worst
    ]


def example(answers: Answers, line: int, prompt: str) -> dict[str, Any]:
    row = answers.rows[line]
    marks = [f"BERTScore F1 {percent(row['bertscore'])}"] if row["bertscore"] is not None else []
    marks += ["cut at max_new_tokens"] if row["stopped"] is False else []
    marks += ["seen in training"] if row["seen"] else []
    differs = row["corrected"] != row["target"]
    return {
        "row": line,
        "prompt": prompt,
        "target": row["target"],
        "corrected": row["corrected"] if differs else None,
        "answer": row["answer"],
        "marks": marks,
    }


def exchanged(subjects: dict[str, Subject]) -> list[dict[str, str]]:
    """The sets whose published labels are wrong for certain: what is wrong, by the counts, and why it is certain."""
    found = {}
    for subject in subjects.values():
        for name, answers in subject.sets.items():
            entry = load_corrections().get(answers.spec.file)
            if name in found or entry is None or len(answers.labels()) == 1:
                continue
            counts = answers.spec.source_counts or {}
            wrong = [
                f"{counts[right]:,} {right} rows {label}" for label, right in entry.labels.items() if right in counts
            ]
            text = (
                f"It calls {' and '.join(wrong)}: {sum(counts.get(label, 0) for label in entry.labels):,} of its "
                f"{sum(counts.values()):,} rows. {entry.evidence} The table has both scores: corrected is what a "
                "model can do, published is what FinLoRA's figures were measured with, and there a model that answers "
                "rightly scores low, and one trained on the exchanged labels high."
            )
            found[name] = {"set": name, "title": f"{name}: labels are exchanged in FinLoRA's file.", "text": text}
    return [found[name] for name in sorted(found, key=set_order)]


def chart(about: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per set a plot in percent: each subject's score and interval, and FinLoRA's figures."""
    sets: dict[str, dict[str, Any]] = {}
    for subject in about:
        for row in subject["rows"]:
            if row["only"]:
                continue
            entry = sets.setdefault(row["set"], {"set": row["set"], "kind": row["kind"], "lines": []})
            found, labels = row["score"], f", {row['labels']} labels" if row["versions"] > 1 else ""
            point = Point(found["accuracy"], found["low"], found["high"], title=bracket(found))
            colour = "base" if subject["is_base"] else "c0"
            line = Row(subject["name"] + labels, [point], percent(point.value), "", colour, f"#{subject['id']}")
            entry["lines"].append((labels, line))
    axis = Axis(0, 1, [(share / 100, str(share)) for share in (0, 25, 50, 75, 100)])
    for name, entry in sets.items():
        rows = [line for _, line in sorted(entry["lines"], key=lambda pair: pair[0])]
        if name in published():
            figures = sorted((published()[name][model][0], short) for short, model in BESIDE.items())
            points = [
                Point(value / 100, title=f"{short} {value:.2f}", letter=LETTERS[short]) for value, short in figures
            ]
            rows.append(Row("FinLoRA, published", points, colour="c5"))
        body, height = html.rows_plot(rows, axis)
        scores = [f"{row.name} {row.points[0].title}" for row in rows if row.shown]
        scores += [point.title for row in rows if not row.shown for point in row.points]
        entry["svg"] = html.svg(body, height, "; ".join(scores))
    return [sets[name] for name in sorted(sets, key=lambda name: (set_order(name), name))]


def curve(training: dict[str, Any]) -> Plot | None:
    """The logged losses against the step; None where fewer than two steps are logged."""
    log = training.get("log")
    points: dict[str, list[Point]] = {"loss": [], "eval_loss": []}
    for entry in log if isinstance(log, list) else []:
        for key, found in points.items():
            step, value = (entry.get("step"), entry.get(key)) if isinstance(entry, dict) else (None, None)
            if all(isinstance(one, NUMBERS) and math.isfinite(one) for one in (step, value)):
                found.append(Point(value, x=step, title=f"step {step}: {value:.4g}"))
    steps = [point.x for found in points.values() for point in found]
    if len(set(steps)) < 2:
        return None
    series = [
        Series(f"{name}, at the end {found[-1].value:.4g}", found, dots=name != "loss")
        for name, found in (("loss", points["loss"]), ("validation loss", points["eval_loss"]))
        if found
    ]
    first, last = min(steps), max(steps)
    return Plot([Panel("loss", series)], Axis(first, last, [(first, str(first)), (last, str(last))]), "step")


def readme(shown: dict[str, Any]) -> str:
    """The tables as Markdown."""
    out = [
        "# Results",
        "",
        "Percent of right answers under FinLoRA's rules (the earliest label in the answer counts; at one position the",
        "longest), or BERTScore F1 × 100, with 95% bootstrap intervals over rows. *vs base* is paired: the same rows",
        "and labels; ≈ marks a difference that cannot be told from none. FinLoRA's figures are as published.",
        "`index.html` has confusion matrices, the worst errors, training curves and all facts of each run.",
    ]
    if shown["warnings"]:
        out += ["", "**Not in these tables:**", ""] + [f"- {html.plain(warning)}" for warning in shown["warnings"]]
    for entry in shown["exchanged"]:
        out += ["", f"**{entry['title']}** {entry['text']}"]
    for subject in shown["subjects"]:
        name, facts_, prompt = (html.plain(subject[key]) for key in ("name", "facts", "prompt"))
        out += ["", f"## {name}", "", f"{facts_}. Prompt: {prompt}."]
        if subject["notes"]:
            out += [""] + [f"- **{html.plain(note)}**" for note in subject["notes"]]
        for title, table in subject["tables"]:
            out += ["", f"### {title}"] * bool(title) + ["", *html.markdown(table)]
    return "\n".join(out) + "\n"


def tables(subject: dict[str, Any]) -> Iterator[tuple[str, Table]]:
    """What a subject's section shows as tables, each with its heading."""
    if subject["rows"]:
        yield "", score_table(subject)
    if subject["forgetting"]:
        yield "Forgetting", forgetting_table(subject)
    if subject["format"]:
        yield "Format and time", format_table(subject)


def score_table(subject: dict[str, Any]) -> Table:
    heads = ["data set", "score", "vs base", "weighted F1", "strict", "unparsed", "rows"]
    heads += [f"FinLoRA {name}" for name in BESIDE]
    body, before = [], None
    for row in subject["rows"]:
        strict = score_cell(row["strict"]) if row["strict"] else "–" if row["unparsed"] is None else "same"
        f1 = percent(row["score"]["weighted_f1"]) if row["f1"] else "–"
        beside = ["" for _ in BESIDE]
        if row["published"]:
            grey = "quiet" if row["other_file"] else ""
            beside = [Cell(f"{score:.2f}", f"{f1:.3f}", grey) for score, f1 in row["published"].values()]
        cells = [score_cell(row["score"]), difference_cell(row), f1, strict, number(row["unparsed"]), rows_cell(row)]
        body.append([set_cell(row, again=row["set"] == before), *cells, *beside])
        before = row["set"]
    foot = []
    for entry in subject["averages"]:
        name = "FinLoRA's overall average" if entry["whole"] else "average"
        small = f"{len(entry['sets'])} sets, {entry['labels']} labels" + (", LIMIT" if entry["limited"] else "")
        beside = [f"{entry['published'][n]:.2f}" if entry["published"] else "" for n in BESIDE]
        foot.append([Cell(name, small), percent(entry["value"]), *[""] * 5, *beside])
    caption = "Scores"
    if subject["base"]:
        caption += f", and the paired difference from {subject['base']} on the rows that both answered"
        caption += " (▲ better, ▼ worse, ≈ not distinguishable)"
    caption += f". Prompt: {subject['prompt']}. FinLoRA's F1 in small"
    caption += "; grey: not measured on this file." if any(row["other_file"] for row in subject["rows"]) else "."
    return Table(heads, body, f"Scores of {subject['name']}", caption, foot=foot)


def forgetting_table(subject: dict[str, Any]) -> Table:
    body = [
        [
            row["set"],
            rows_cell(row),
            score_cell(row["base"]) if row["base"] else "–",
            score_cell(row["score"]),
            difference_cell(row),
        ]
        for row in subject["forgetting"]
    ]
    caption = "General tasks" + (f", and the paired difference from {subject['base']}" if subject["base"] else "")
    heads = ["task", "rows", "base", "score", "vs base"]
    return Table(heads, body, f"Forgetting, {subject['name']}", f"{caption}: what fine-tuning cost.")


def format_table(subject: dict[str, Any]) -> Table:
    heads = ["data set", "unparsed", "cut", "empty", "seconds", "rows/s", "prompt tokens", "answer tokens"]
    body = []
    for row in subject["format"]:
        unparsed = Cell("–")
        if row["unparsed"] is not None:
            unparsed = Cell(number(row["unparsed"]), f"{percent(row['unparsed'] / row['items'], 1)}%")
        limit = f", at {row['max_new_tokens']}" if row["max_new_tokens"] else ""
        cut = Cell(number(row["cut"]), f"{percent(row['cut'] / row['rows'], 1)}%{limit}")
        figures = ("empty", "seconds", "speed", "prompt_tokens", "answer_tokens")
        body.append([row["set"], unparsed, cut, *(number(row[key]) for key in figures)])
    caption = "Unparsed: no valid answer under strict scoring. Cut: the answer reached max_new_tokens."
    return Table(heads, body, f"Format and time, {subject['name']}", caption)


def set_cell(row: dict[str, Any], again: bool) -> Cell:
    """The data set, and which of its rows and labels; with a link where its labels have two versions."""
    labels, href = f"{row['labels']} labels", ""
    if row["only"]:
        small = row["only"] + (f", {labels}" if row["versions"] > 1 else "")
    elif row["versions"] > 1:
        small, href = labels, f"#exchanged-{row['set']}"
    else:
        small = row["kind"] or labels
    return Cell(row["set"], small + (", other file" if row["other_file"] else ""), "more" if again else "", href=href)


def rows_cell(row: dict[str, Any]) -> Cell:
    return Cell(number(row["rows"]), f"of {row['of']:,}" if row["rows"] < row["of"] else "")


def score_cell(score: dict[str, Any]) -> Cell:
    return Cell(percent(score["accuracy"]), f"[{percent(score['low'], 1)}, {percent(score['high'], 1)}]")


def bracket(score: dict[str, Any]) -> str:
    return str(score_cell(score))


def difference_cell(row: dict[str, Any]) -> Cell:
    """The paired difference of a row with its interval; ▲ and ▼ where it is distinguishable, else ≈."""
    found = row["difference"]
    if not found:
        return Cell("–")
    kind, sign = ("up", "▲") if found["difference"] > 0 else ("down", "▼")
    kind, sign = (kind, sign) if found["distinguishable"] else ("even", "≈")
    small = f"[{signed(found['low'], 1)}, {signed(found['high'], 1)}]"
    small += f", {found['rows']:,} rows" if found["rows"] < row["rows"] else ""
    title = f"p {p_value(found['p'])}; right in one only: base {found['only_a']}, this {found['only_b']} of "
    return Cell(f"{signed(found['difference'])} {sign}", small, kind, title + f"{found['rows']} rows")


def run(folder: Path) -> None:
    """Write the report, and say where it is."""
    folder = folder.resolve()
    shown = report(folder)
    sets = {row["set"] for subject in shown["subjects"] for row in subject["rows"] + subject["forgetting"]}
    print(f"{len(shown['subjects'])} models, {len(sets)} data sets: {show(folder / 'index.html')} and README.md")
