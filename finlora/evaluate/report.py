"""The report on everything under results/: index.html, self-contained, and README.md (`make report`).

finlora report [--results DIR]

Scores are percent: right answers under FinLoRA's rules, or BERTScore F1 x 100. The same results give the same bytes.
"""

import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from finlora.core.errors import UserError
from finlora.core.files import replacing
from finlora.core.html import axis, number, p_value, percent, signed
from finlora.data.corrections import load_corrections
from finlora.evaluate.published import BESIDE, published, published_average
from finlora.evaluate.results import RESULTS, Answers, Run, Subject, base_of, keep, pair, read, set_order, show, unlike
from finlora.evaluate.scorers import summary
from finlora.evaluate.statistics import interval, paired

TEMPLATE = Path(__file__).with_name("report.html.jinja")


LETTERS = {"base": "B", "LoRA": "L", "QLoRA": "Q", "DoRA": "D", "rsLoRA": "R"}
PROMPTS = {
    "saved": "the chat template saved with the model",
    "finlora_inst": "FinLoRA's [INST] form",
    "raw": "the raw context, as FinLoRA tested",
    "endpoint": "the endpoint's own",
}
METHODS = {"base": "base model", "lora": "LoRA", "dora": "DoRA", "rslora": "rsLoRA"}
MOST_LABELS, CONFUSIONS, EXAMPLES, LOWEST = 12, 6, 2, 6
HEAD, TAIL = 2000, 1000  # characters that are shown of a long text
# What a browser would hide or act on: control, zero-width and direction characters, lone surrogates.
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\xa0\xad\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


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
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters |= {"percent": percent, "signed": signed, "number": number, "p": p_value}
    environment.filters |= {"visible": visible, "breakable": breakable}
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(shown)
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
        "beside": BESIDE,
        "letters": LETTERS,
        "many": MOST_LABELS,
    }


def describe(subject: Subject, base: Subject | None) -> dict[str, Any]:
    run = subject.run
    tests = [answers for answers in subject.sets.values() if not answers.forgetting]
    forgetting = [answers for answers in subject.sets.values() if answers.forgetting]
    others = base.sets if base else {}
    rows = [line for answers in tests for line in lines(answers, others.get(answers.name))]
    return {
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
        said.append(f"Some rows were trained on ({', '.join(seen)}); the scores without them stand below.")
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
    versions = answers.labels()
    return {
        "set": answers.name,
        "file": answers.about.file,
        "sha256": answers.about.sha256,
        "encoder": answers.about.encoder,
        "scorings": [
            {"labels": labels, "name": name, "score": whole(answers, labels, name)}
            for name in answers.scorings()
            for labels in versions
        ],
        "matrices": [matrix for labels in versions if (matrix := confusion_matrix(answers, labels))],
        "labels": versions[0] if len(versions) > 1 else "",
        "errors": lowest(answers) if answers.bertscore else confusions(answers, versions[0]),
        "wrong": None
        if answers.bertscore
        else sum(right < 1 for right in answers.items(versions[0], "strict")["right"]),
    }


def confusion_matrix(answers: Answers, labels: str) -> dict[str, Any] | None:
    """Rows: right answers; columns: strict predictions, then 'unparsed'. None without a small set of labels."""
    known = answers.spec["labels"]
    if not known or len(known) > MOST_LABELS:
        return None
    items = answers.items(labels, "strict")
    counts = Counter(zip(items["target"], items["predicted"], strict=True))
    columns = [*known, *sorted({p for _, p in counts} - {*known, "unparsed"}), "unparsed"]
    rows = []
    for target in [*known, *sorted({t for t, _ in counts} - set(known))]:
        total = sum(counts[target, column] for column in columns)
        cells = [
            {"count": (n := counts[target, c]), "share": n / total if total else 0, "right": c == target}
            for c in columns
        ]
        rows.append({"target": target, "total": total, "cells": cells})
    return {"labels": labels if len(answers.labels()) > 1 else "", "columns": columns, "rows": rows}


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


def exchanged(subjects: dict[str, Subject]) -> list[dict[str, Any]]:
    """The sets whose published labels are wrong for certain: what is wrong, by the counts, and why it is certain."""
    found = {}
    for subject in subjects.values():
        for name, answers in subject.sets.items():
            entry = load_corrections().get(answers.spec.get("file"))
            if name in found or entry is None or len(answers.labels()) == 1:
                continue
            counts = answers.spec["source_counts"] or {}
            wrong = [
                f"{counts[right]:,} {right} rows {label}" for label, right in entry["labels"].items() if right in counts
            ]
            found[name] = {
                "set": name,
                "calls": " and ".join(wrong),
                "count": sum(counts.get(label, 0) for label in entry["labels"]),
                "rows": sum(counts.values()),
                "evidence": entry["evidence"],
            }
    return [found[name] for name in sorted(found, key=set_order)]


def chart(about: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per set: each subject's score and interval, and FinLoRA's figures, as percent of the axis from 0 to 100."""
    sets: dict[str, dict[str, Any]] = {}
    for subject in about:
        for row in subject["rows"]:
            if row["only"]:
                continue
            entry = sets.setdefault(row["set"], {"set": row["set"], "kind": row["kind"], "lines": [], "published": []})
            mark = {
                key: row["score"][source] * 100 for key, source in (("x", "accuracy"), ("low", "low"), ("high", "high"))
            }
            name, versions = subject["name"], row["versions"]
            label = f"{row['labels']} labels" if versions > 1 else ""
            entry["lines"].append(
                mark | {"name": name, "labels": label, "base": subject["is_base"], "id": subject["id"]}
            )
    for name, entry in sets.items():
        entry["lines"].sort(key=lambda line: line["labels"])
        if name in published():
            marks = [(published()[name][model][0], short) for short, model in BESIDE.items()]
            entry["published"] = [
                {"x": value, "name": short, "letter": LETTERS[short], "lane": place % 2}
                for place, (value, short) in enumerate(sorted(marks))
            ]
    return [sets[name] for name in sorted(sets, key=lambda name: (set_order(name), name))]


def curve(training: dict[str, Any]) -> dict[str, Any] | None:
    """The logged losses as two lines in a box of 1000 by 200, with the marks of its axes."""
    log = training.get("log")
    points: dict[str, list[tuple[float, float]]] = {"loss": [], "eval_loss": []}
    for entry in log if isinstance(log, list) else []:
        for key in points:
            pair = (entry.get("step"), entry.get(key)) if isinstance(entry, dict) else (None, None)
            if all(isinstance(value, NUMBERS) and math.isfinite(value) for value in pair):
                points[key].append(pair)
    values = [value for pairs in points.values() for _, value in pairs]
    steps = [step for pairs in points.values() for step, _ in pairs]
    if len(set(steps)) < 2:
        return None
    ticks = axis(min(values), max(values))
    first, last, low, high = min(steps), max(steps), ticks[0], ticks[-1]

    def place(pair: tuple[float, float]) -> tuple[str, str]:
        return f"{(pair[0] - first) / (last - first) * 1000:.1f}", f"{(high - pair[1]) / (high - low) * 200:.1f}"

    return {
        "loss": [place(pair) for pair in points["loss"]],
        "eval_loss": [place(pair) for pair in points["eval_loss"]],
        "ticks": [{"text": f"{tick:g}", "y": (high - tick) / (high - low) * 100} for tick in ticks],
        "first": first,
        "last": last,
        "final_loss": points["loss"][-1][1] if points["loss"] else None,
        "final_eval_loss": points["eval_loss"][-1][1] if points["eval_loss"] else None,
    }


def visible(text: str, head: int = HEAD, tail: int = TAIL) -> str:
    """A text of the model or the data in which nothing hides: line ends, tabs, outer blanks, control characters."""
    if len(text) > head + tail + 100:
        text = f"{text[:head]}\n… {len(text) - head - tail:,} characters left out …\n{text[-tail:]}"
    text = HIDDEN.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
    text = re.sub(r"^ +| +$", lambda match: "·" * len(match[0]), text, flags=re.M)
    return text.replace("\t", "⇥\t").replace("\n", "↵\n")


def breakable(name: str) -> Markup:
    """A name that may break after an underscore, so that a long one leaves room on a narrow screen."""
    return escape(name).replace("_", Markup("_<wbr>"))


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
        out += ["", "**Not in these tables:**", ""] + [f"- {cell(warning)}" for warning in shown["warnings"]]
    for entry in shown["exchanged"]:
        out += ["", exchange_sentence(entry)]
    for subject in shown["subjects"]:
        out += ["", f"## {cell(subject['name'])}", "", f"{cell(subject['facts'])}. Prompt: {cell(subject['prompt'])}."]
        if subject["notes"]:
            out += [""] + [f"- **{cell(note)}**" for note in subject["notes"]]
        if subject["rows"]:
            out += [""] + score_table(subject)
        if subject["forgetting"]:
            out += [""] + forgetting_table(subject)
        if subject["format"]:
            out += [""] + format_table(subject)
    return "\n".join(out) + "\n"


def exchange_sentence(entry: dict[str, Any]) -> str:
    return (
        f"**{entry['set']}: labels are exchanged in FinLoRA's file.** It calls {entry['calls']}: {entry['count']:,} of "
        f"its {entry['rows']:,} rows. {entry['evidence']} Both scores stand side by side: *corrected* is what a model "
        "can do, *published* is what FinLoRA's figures were measured with, and there a model that answers rightly "
        "scores low, and one trained on the exchanged labels high."
    )


def score_table(subject: dict[str, Any]) -> list[str]:
    heads = [
        "data set",
        "labels",
        "rows",
        "score",
        "vs base",
        "weighted F1",
        "strict",
        *(f"FinLoRA {n}" for n in BESIDE),
    ]
    body = []
    for row in subject["rows"]:
        marks = [row["kind"], "other file" if row["other_file"] else ""]
        marks = ", ".join(mark for mark in marks if mark)
        name = row["set"] + (f" ({marks})" if marks else "") + (f", {row['only']}" if row["only"] else "")
        beside = [f"{row['published'][n][0]:.2f}" if row["published"] else "" for n in BESIDE]
        strict = bracket(row["strict"]) if row["strict"] else "" if row["unparsed"] is None else "same"
        count = f"{row['rows']:,}" + (f" of {row['of']:,}" if row["rows"] < row["of"] else "")
        f1 = percent(row["score"]["weighted_f1"]) if row["f1"] else ""
        body.append([name, row["labels"], count, bracket(row["score"]), difference_text(row), f1, strict, *beside])
    for entry in subject["averages"]:
        name = "overall average (19 sets)" if entry["whole"] else f"average of {len(entry['sets'])} sets"
        name += ", LIMIT" if entry["limited"] else ""
        beside = [f"{entry['published'][n]:.2f}" if entry["published"] else "" for n in BESIDE]
        body.append([f"**{name}**", entry["labels"], "", f"**{percent(entry['value'])}**", "", "", "", *beside])
    return table(heads, body, left=2)


def forgetting_table(subject: dict[str, Any]) -> list[str]:
    heads = ["forgetting", "rows", "base", "score", "vs base"]
    body = [
        [r["set"], f"{r['rows']:,}", bracket(r["base"]) if r["base"] else "", bracket(r["score"]), difference_text(r)]
        for r in subject["forgetting"]
    ]
    return table(heads, body, left=1)


def format_table(subject: dict[str, Any]) -> list[str]:
    heads = ["format and time", "unparsed", "cut", "empty", "seconds", "rows/s", "prompt tokens", "answer tokens"]
    body = []
    for row in subject["format"]:
        unparsed = (
            "" if row["unparsed"] is None else f"{row['unparsed']:,} ({percent(row['unparsed'] / row['items'], 1)}%)"
        )
        tokens = [number(row[key]) for key in ("prompt_tokens", "answer_tokens")]
        times = [number(row["seconds"]), number(row["speed"])]
        body.append([row["set"], unparsed, f"{row['cut']:,}", f"{row['empty']:,}", *times, *tokens])
    return table(heads, body, left=1)


def bracket(score: dict[str, Any]) -> str:
    return f"{percent(score['accuracy'])} [{percent(score['low'], 1)}, {percent(score['high'], 1)}]"


def difference_text(row: dict[str, Any]) -> str:
    found = row["difference"]
    if not found:
        return ""
    text = f"{signed(found['difference'])} [{signed(found['low'], 1)}, {signed(found['high'], 1)}]"
    return (
        text
        + ("" if found["distinguishable"] else " ≈")
        + (f", {found['rows']:,} rows" if found["rows"] < row["rows"] else "")
    )


def table(heads: list[str], body: list[list[str]], left: int) -> list[str]:
    rule = ["---" if column < left else "---:" for column in range(len(heads))]
    return [f"| {' | '.join(row)} |" for row in [heads, rule, *[[cell(text) for text in row] for row in body]]]


def cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def run(folder: Path) -> None:
    """Write the report, and say where it is."""
    folder = folder.resolve()
    shown = report(folder)
    sets = {row["set"] for subject in shown["subjects"] for row in subject["rows"] + subject["forgetting"]}
    print(f"{len(shown['subjects'])} models, {len(sets)} data sets: {show(folder / 'index.html')} and README.md")
