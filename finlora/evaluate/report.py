"""The report on everything under results/ (`make report`): index.html, README.md, and each set's answers.html.

finlora report [--results DIR]

Scores are percent: right answers under FinLoRA's rules, or BERTScore F1 x 100. FinLoRA's figures are beside answers to
all rows of its published files alone. The same results give the same bytes.
"""

import itertools
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from finlora.core.errors import UserError
from finlora.core.files import write_text
from finlora.core.html import Cell, Table, number, p_value, percent, render, signed, visible
from finlora.core.paths import shown
from finlora.core.plot import Axis, Point, is_number
from finlora.data.corrections import load_corrections
from finlora.data.test_sets import finlora_sets, groups
from finlora.evaluate import results
from finlora.evaluate.published import BESIDE, published, published_average
from finlora.evaluate.results import RESULTS, Answers, ModelResults, Run, base_of, keep, pair, set_order, unlike
from finlora.evaluate.scorers import summary
from finlora.evaluate.statistics import Interval, average, interval, paired
from finlora.train.curves import curves

PROMPTS = {
    "saved": "the chat template saved with the model",
    "finlora_inst": "FinLoRA's [INST] form",
    "raw": "the raw context, as FinLoRA tested",
    "endpoint": "the endpoint's own",
}
METHODS = {"base": "base model", "lora": "LoRA", "dora": "DoRA", "rslora": "rsLoRA"}
KINDS = {"bertscore_f1": "BERTScore F1", "tag_accuracy_f1": "each tag", "lm_eval": "general task"}
MOST_LABELS = 12  # of a test set with a confusion matrix: more do not fit a page
SCORE_AXIS = Axis(0, 1, [])
VERSIONS = ("corrected", "published")  # of labels
LENGTHS = {"published": "FinLoRA's", "whole": "every target fits"}  # the most tokens of an answer, by set.json's key
OTHERS = {"read": "as read", "strict": "strict"}  # scorings beside FinLoRA's, as the tables call them


@dataclass(frozen=True)
class Score:
    """A score and its 95% interval, F1 (each 0 to 1), and how many of the items are no valid answer."""

    accuracy: float
    low: float
    high: float
    weighted_f1: float | None
    f1_interval: Interval | None  # of the weighted F1
    macro_f1: float | None
    unparsed: int
    items: int
    groups: int  # of rows about one text


@dataclass(frozen=True)
class ScoreRow:
    """A model's answers to a test set under one version of the labels, all of them or some."""

    set: str
    kind: str  # BERTScore F1, each tag, general task, or nothing
    labels: str
    versions: int  # of the labels
    only: str  # which rows, where not all
    rows: int
    of: int  # rows that the file has
    comparable: bool  # all rows of FinLoRA's published file, or of a general task
    score: Score
    others: dict[str, Score]  # under the scorings of OTHERS that the set has
    difference: dict[str, Any] | None  # from the base: finlora.evaluate.statistics.paired


@dataclass(frozen=True)
class Average:
    """The plain mean of the scores of several test sets, with its 95% interval, and FinLoRA's over the same sets."""

    of: str  # accuracy, BERTScore F1, or both mixed as in FinLoRA's overall average
    labels: str
    sets: list[str]
    accuracy: float
    low: float
    high: float
    published: dict[str, float | None]  # percent; empty where the rows or labels are not FinLoRA's


@dataclass(frozen=True)
class Model:
    id: str  # in the page
    results: ModelResults
    base: ModelResults | None

    @cached_property
    def rows(self) -> list[ScoreRow]:
        of_base = self.base.sets if self.base else {}
        sets = self.results.sets.values()
        return [row for answers in sets for row in lines(answers, of_base.get(answers.name))]

    @property
    def name(self) -> str:
        return self.results.name


@dataclass(frozen=True)
class Report:
    models: list[Model]
    warnings: list[str]
    corrected: dict[str, str]  # why the published labels of a set are wrong for certain
    overview: list[tuple[str, Table]]  # models by sets, averages, and the paired differences of the adapters


def report(folder: Path = RESULTS) -> Report:
    """Write index.html, README.md and each set's answers.html into the results' folder; return what they show.

    What cannot be used is named on stderr and in both files. Raises UserError where nothing is finished.
    """
    evaluated, warnings = results.read(folder)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    evaluated = {name: model for name, model in evaluated.items() if model.sets}
    if not evaluated:
        raise UserError(
            f"{shown(folder)}: no evaluation is finished; run make eval RECIPE=sentiment_r8_dora to its end"
        )
    models = with_bases(evaluated)
    for answers in (answers for model in models for answers in model.results.sets.values()):
        write_text(answers.folder / "answers.html", answers_page(answers))
    result = Report(models, warnings, corrected_sets(models), list(overview(models)))
    parts = {part.__name__: part for part in (facts, more_facts, notes, tables, scorings, confusion_matrix, curves)}
    parts |= {"report": result, "prompts": PROMPTS, "axis": SCORE_AXIS}
    write_text(folder / "index.html", render("evaluate/report.html.jinja", **parts))
    write_text(folder / "README.md", render("evaluate/report.md.jinja", **parts))
    return result


def with_bases(evaluated: dict[str, ModelResults]) -> list[Model]:
    """Each model that was evaluated beside its base, the bases first."""
    ordered = sorted(evaluated.values(), key=lambda model: not model.run.adapter)
    return [Model(f"m{place}", model, base_of(model, evaluated)) for place, model in enumerate(ordered, 1)]


def tables(model: Model) -> Iterator[tuple[str, Table]]:
    """The tables of a model's section, each with its heading."""
    yield "", score_table(model)
    if tests := [answers for answers in model.results.sets.values() if not answers.forgetting]:
        yield "Format and time", format_table(model.name, tests)


def facts(run: Run) -> str:
    parts = [run.model.rstrip("/").split("/")[-1]]
    parts += [f"{run.bits}-bit"] if run.bits else []
    method = METHODS.get(run.method, run.method or ("adapter" if run.adapter else "base model"))
    parts += [method + (f" r {run.r}, alpha {run.alpha}" if run.r else "")]
    parts += [f"{run.shots}-shot"] if run.shots else []
    return " · ".join(parts + [part for part in (run.way, run.backend) if part])


def more_facts(run: Run) -> list[tuple[str, str]]:
    """All of run.json that a line can show; of the training its figures."""
    entries = asdict(run)
    training = entries.pop("training") or {}
    metrics = training.get("metrics")
    entries["training"] = training | (metrics if isinstance(metrics, dict) else {})
    pairs = []
    for name, value in entries.items():
        if isinstance(value, dict):
            texts = {key: number(one) if is_number(one) else one for key, one in sorted(value.items())}
            value = ", ".join(f"{key.replace('_', ' ')} {one}" for key, one in texts.items() if isinstance(one, str))
        pairs += [(name.replace("_", " "), str(value))] if value else []
    return pairs


def notes(model: ModelResults, base: ModelResults | None) -> Iterator[str]:
    """What a reader must know before trusting this model's numbers, one sentence each."""
    run = model.run
    if run.tiny:
        yield "A tiny stand-in model, made to try the commands: its scores say nothing about the recipe."
    tests = [answers for answers in model.sets.values() if not answers.forgetting]
    if other := [answers.name for answers in tests if not answers.about.published_file]:
        yield f"Not FinLoRA's published files (own or synthetic rows), so not comparable: {', '.join(other)}."
    some = [
        f"{answers.name} {len(answers.rows):,} of {answers.about.rows:,}"
        for answers in tests
        if answers.about.rows and len(answers.rows) < answers.about.rows
    ]
    general = [answers for answers in model.sets.values() if answers.forgetting and answers.about.limit]
    some += [f"{answers.name} {answers.about.limit:,} a task" for answers in general]
    if some:
        yield f"LIMIT: only some rows were answered ({', '.join(some)})."
    limits = [answers for answers in tests if answers.about.lengths == "published" and answers.about.targets_cut]
    if limits:
        cut = ", ".join(f"{answers.name} {answers.about.targets_cut:,} of {answers.about.rows:,}" for answers in limits)
        yield f"LENGTHS=published: targets are longer than an answer may be ({cut}), so not all can be right."
    seen = {answers.name: sum(bool(row["seen"]) for row in answers.rows.values()) for answers in tests}
    if trained_on := [f"{name} {count:,}" for name, count in seen.items() if count]:
        yield f"Some rows were trained on ({', '.join(trained_on)}); the scores without them are listed too."
    if run.adapter and any(row["seen"] is None for answers in tests for row in answers.rows.values()):
        yield "Whether rows were trained on is not known: the adapter's training data is not at hand."
    if (run.git or {}).get("changed"):
        yield "The repository had changes that were not committed."
    if run.adapter and not base:
        yield "No base to compare with: evaluate it too, with BASE=1."
    if base:
        yield from base_notes(model, base)


def base_notes(model: ModelResults, base: ModelResults) -> Iterator[str]:
    if base.run.prompt != model.run.prompt:
        yield (
            f"{base.name} was asked with another prompt ({PROMPTS.get(base.run.prompt, base.run.prompt)}): "
            "the differences are those of model and prompt together."
        )
    if alone := [name for name in model.sets if name not in base.sets]:
        yield f"{base.name} has not answered: {', '.join(alone)}."
    for name in model.sets:
        if name in base.sets and (reason := unlike(base.sets[name], model.sets[name])):
            yield f"{name}: no difference from {base.name}, which answered {reason}."


def lines(answers: Answers, base: Answers | None) -> Iterator[ScoreRow]:
    """One row a version of the labels, the one that was asked for first; then those without rows seen in training."""
    unseen = tuple(line for line, row in answers.rows.items() if not row.get("seen"))
    for only in ((), unseen) if 0 < len(unseen) < len(answers.rows) else ((),):
        for labels in answers.labels():
            yield measure(answers, base, labels, only)


def measure(answers: Answers, base: Answers | None, labels: str, only: tuple) -> ScoreRow:
    """Scores, intervals and paired difference from the base under one version of the labels, on all or `only` some."""
    all_rows, about, kept = tuple(answers.rows), answers.about, set(only)

    def chosen(items: dict[str, list], rows: tuple) -> dict[str, list]:
        return keep(items, [place for place, line in enumerate(rows) if line in kept]) if only else items

    difference = None
    if base and not unlike(base, answers):
        common, of_base, of_this = pair(base, answers, labels)
        if not only or kept & set(common):
            difference = paired(chosen(of_base, common), chosen(of_this, common))
    scorings = [name for name in OTHERS if name in answers.scorings()]
    count, of = len(only or all_rows), about.rows or len(all_rows)
    return ScoreRow(
        set=answers.name,
        kind=KINDS.get(about.metric, ""),
        labels=labels,
        versions=len(answers.labels()),
        only="not seen in training" if only else "",
        rows=count,
        of=of,
        comparable=not about.limit if answers.forgetting else bool(about.published_file) and count == of,
        score=score(chosen(answers.items(labels), all_rows)),
        others={name: score(chosen(answers.items(labels, name), all_rows)) for name in scorings},
        difference=difference,
    )


def score(items: dict[str, list]) -> Score:
    """The items' score; general tasks have no classes that F1 would be of."""
    low, high = interval(items)
    figures = summary(items)
    f1 = None if figures["weighted_f1"] is None else interval(items, "weighted_f1")
    return Score(low=low, high=high, f1_interval=f1, **figures)


def averages(rows: Iterable[ScoreRow], comparable: bool) -> Iterator[Average]:
    """Means over FinLoRA's sets: of accuracy, of BERTScore, and of both as FinLoRA takes its overall average.

    They are once with each version of the labels; sets that have one version count in both.
    """
    rows = [row for row in rows if row.comparable == comparable and not row.only and row.set in published()]
    for labels in VERSIONS:
        of_labels = [row for row in rows if row.versions == 1 or row.labels == labels]
        bertscore = [row for row in of_labels if row.kind == KINDS["bertscore_f1"]]
        accuracy = [row for row in of_labels if row not in bertscore]
        both = of_labels if accuracy and bertscore else []
        for of, averaged in ("accuracy", accuracy), ("BERTScore F1", bertscore), ("both, as FinLoRA's", both):
            as_published = labels == "corrected" and all(row.versions == 1 for row in averaged)
            if len(of_labels) < 2 or not averaged or as_published:
                continue
            sets = [row.set for row in averaged]
            mean, low, high = average([(row.score.accuracy, row.score.low, row.score.high) for row in averaged])
            theirs = {}
            if comparable and labels == "published":
                theirs = {name: published_average(model, sets) for name, model in BESIDE.items()}
            of = "FinLoRA's overall average" if len(sets) == len(finlora_sets()) else of
            yield Average(of, labels, sets, mean, low, high, theirs)


def overview(models: list[Model]) -> Iterator[tuple[str, Table]]:
    """Models by sets: on FinLoRA's published files with its figures, on other rows; averages; adapters' differences."""
    for comparable, title in (True, "Models by test sets"), (False, "On other rows: samples, own files, LIMIT="):
        if table := models_by_sets(models, title, comparable):
            yield title, table
    if (table := average_table(models)).body:
        yield "Averages", table
    if (table := difference_table([model.results for model in models if model.results.run.adapter])).body:
        yield "Differences between adapters", table


def models_by_sets(models: list[Model], title: str, comparable: bool) -> Table | None:
    """A row a model, a column a set and version of its labels."""
    present = []
    for model in models:
        rows = [row for row in model.rows if row.comparable == comparable and not row.only]
        present += [(model, {(row.set, row.labels): row for row in rows})] if rows else []
    every = {key: row for _, rows in present for key, row in rows.items()}
    columns = sorted(every, key=lambda key: (set_order(key[0]), key))
    body = []
    for model, rows in present:
        kind = "c0" if model.results.run.adapter else "base"
        cells = [model_cell(rows[key], kind) if key in rows else Cell("–") for key in columns]
        body.append([Cell(model.name, href=f"#{model.id}"), *cells])
    for name, theirs in BESIDE.items() if comparable and body else ():
        figures = [published().get(test, {}).get(theirs) if labels == "published" else None for test, labels in columns]
        cells = [figure_cell(*figure, draw=True) if figure else Cell("–") for figure in figures]
        body.append([Cell(f"FinLoRA {name}", "published", kind="quiet"), *cells])
    heads = [head(row.set, row.kind, row.labels if row.versions > 1 else "") for row in map(every.get, columns)]
    heads = ["model", *heads]
    return Table(heads, body, title, MODELS_CAPTION[comparable]) if body else None


MODELS_CAPTION = {
    True: "All rows of FinLoRA's published files: scores with 95% intervals, and FinLoRA's figures with their F1.",
    False: "Rows that are not FinLoRA's published ones, or not all of them: its figures cannot be compared with these.",
}


def head(name: str, kind: str, labels: str) -> Cell:
    """A column's head: the set, its measure and labels; a filter finds it by its groups and task too."""
    small = ", ".join(filter(None, [kind, labels and f"{labels} labels"]))
    return Cell(name, small, words=" ".join(group for group, sets in groups().items() if name in sets))


def model_cell(row: ScoreRow, kind: str) -> Cell:
    some = "" if row.comparable else f" on {row.rows:,} rows"
    return replace(score_cell(row.score, kind), small=span(row.score.low, row.score.high) + some)


def average_table(models: list[Model]) -> Table:
    """A row for each average of each model, with FinLoRA's over the same sets."""
    body = []
    for model, comparable in itertools.product(models, (True, False)):
        for mean in averages(model.rows, comparable):
            small = f"{len(mean.sets)} set{'s' * (len(mean.sets) > 1)}, {mean.labels} labels"
            small += "" if comparable else ", other rows"
            theirs = [figure_cell(mean.published.get(name)) for name in BESIDE]
            body.append([Cell(model.name, href=f"#{model.id}"), Cell(mean.of, small, title=", ".join(mean.sets))])
            body[-1] += [score_cell(mean), *theirs]
    caption = "Means over data sets with 95% intervals, and FinLoRA's over the same sets; its overall average mixes "
    caption += "accuracy and BERTScore F1."
    heads = ["model", Cell("average", words="average"), "this model", *(f"FinLoRA {name}" for name in BESIDE)]
    return Table(heads, body, "Averages", caption)


def difference_table(adapters: list[ModelResults]) -> Table:
    """For any two adapters the paired difference on each set that both answered."""
    names = dict.fromkeys(name for adapter in adapters for name in adapter.sets)
    heads, body = {}, []
    for one, other in itertools.combinations(adapters, 2):
        cells = {}
        for name in (name for name in names if name in one.sets and name in other.sets):
            a, b = one.sets[name], other.sets[name]
            versions = {*a.labels(), *b.labels()}
            labels = "corrected" if "corrected" in versions else "published"
            heads[name] = head(name, KINDS.get(a.about.metric, ""), labels if len(versions) > 1 else "")
            if reason := unlike(a, b):
                cells[name] = Cell("–", title=f"answered {reason}")
            else:
                cells[name] = difference_cell(paired(*pair(a, b, labels)[1:]), max(len(a.rows), len(b.rows)))
        body.append((f"{other.name} − {one.name}", cells))
    sets = sorted(heads, key=lambda name: (set_order(name), name))
    rows = [[name, *(cells.get(test, Cell("–")) for test in sets)] for name, cells in body if cells]
    caption = "Percentage points with 95% intervals, paired on the rows that both answered: "
    caption += "▲ the first is better, ▼ the second, ≈ cannot be told apart."
    return Table(["adapters", *(heads[name] for name in sets)], rows, "Differences between adapters", caption)


def scorings(answers: Answers) -> Table:
    """The score of every scoring, under every version of the labels."""
    body = []
    for name in answers.scorings():
        for labels in answers.labels():
            one = score(answers.items(labels, name))
            figures = [percent(one.weighted_f1), percent(one.macro_f1), number(one.unparsed), number(one.items)]
            body.append([Cell(name, f"{labels} labels"), score_cell(one), *figures])
    heads = ["scoring", "score", "weighted F1", "macro F1", "unparsed", "answers"]
    return Table(heads, body, f"Every scoring of {answers.name}")


def confusion_matrix(answers: Answers, labels: str) -> Table | None:
    """Rows: right answers; columns: strict predictions, then 'unparsed'. None without a small set of labels."""
    known = [] if answers.forgetting else answers.spec.labels
    if not known or len(known) > MOST_LABELS:
        return None
    items = answers.items(labels, "strict")
    counts = Counter(zip(items["target"], items["predicted"], strict=True))
    columns = [*known, *sorted({predicted for _, predicted in counts} - {*known, "unparsed"}), "unparsed"]
    body = []
    for target in [*known, *sorted({target for target, _ in counts} - set(known))]:
        row = [counts[target, column] for column in columns]
        cells = [
            Cell(number(count), kind="share right" if column == target else "share", share=count / max(sum(row), 1))
            for column, count in zip(columns, row, strict=True)
        ]
        body.append([target, *cells, number(sum(row))])
    version = f"{labels} labels" if len(answers.labels()) > 1 else ""
    caption = ": ".join(filter(None, [version, "right answers by row, strict answers by column"]))
    label = ", ".join(filter(None, [f"Confusion matrix of {answers.name}", version]))
    return Table(["right", *columns, "rows"], body, label, caption)


def answers_page(answers: Answers) -> str:
    """The page that lists all answers of a model to one set, right and wrong."""
    labels, scorings = answers.labels()[0], list(answers.scorings()) or [answers.about.metric]
    items = {scoring: answers.items(labels, scoring) for scoring in scorings}
    places: dict[int, list[int]] = {}  # of each row's items, which are the same under every scoring
    for place, row in enumerate(items[scorings[0]]["row"]):
        places.setdefault(row, []).append(place)
    rows = []
    for own, row in zip(places.values(), results.kept_rows(answers.folder), strict=True):
        line = row["id" if answers.forgetting else "row"]
        (target,) = answers.targets(labels, [line])
        marks = ["cut at max_new_tokens"] if row.get("stopped") is False else []
        marks += ["empty"] if not row["answer"].strip() else []
        marks += ["seen in training"] if row.get("seen") else []
        marks += [f"published label: {visible(row['target'])}"] if target != row["target"] else []
        texts = [visible(text) for text in (row["prompt"], target, row["answer"])]
        predicted = ", ".join(items["strict"]["predicted"][i] for i in own) if "strict" in items else ""
        right = [round(math.fsum(each["right"][i] for i in own) / len(own), 4) for each in items.values()]
        rows.append([line, *texts, visible(predicted, 80, 20), right, marks])
    names = {"model": answers.folder.parent.name, "set": answers.name}
    return render("evaluate/answers.html.jinja", **names, labels=labels, scorings=scorings, rows=rows)


def corrected_sets(models: list[Model]) -> dict[str, str]:
    """The sets whose published labels are wrong for certain, and why it is certain."""
    reasons = {}
    for answers in (answers for model in models for answers in model.results.sets.values()):
        correction = load_corrections().get(answers.spec.file)
        if correction and len(answers.labels()) > 1:
            reasons[answers.name] = " ".join(correction.evidence.split())
    return {name: reasons[name] for name in sorted(reasons, key=set_order)}


def score_table(model: Model) -> Table:
    scorings = {name: head for name, head in OTHERS.items() if any(name in row.others for row in model.rows)}
    body = []
    for row in model.rows:
        others = [other_cell(row.score, row.others.get(name)) for name in scorings]
        f1, interval, strict = row.score.weighted_f1, row.score.f1_interval, row.others.get("strict")
        f1_cell = Cell(percent(f1), span(*interval), value=f1) if interval and not row.kind == "general task" else "–"
        count = [f"of {row.of:,}"] * (row.rows < row.of)
        count += [f"{row.score.groups:,} groups"] * (row.score.groups < row.rows)
        cells = [score_cell(row.score), difference_cell(row.difference, row.rows), f1_cell, *others]
        unparsed = number(strict.unparsed) if strict else "–"
        body.append([set_cell(row), *cells, unparsed, Cell(number(row.rows), ", ".join(count))])
    caption = "Scores"
    if model.base:
        caption += f", and the paired difference from {model.base.name} on the rows that both answered"
        caption += " (▲ better, ▼ worse, ≈ not distinguishable)"
    heads = ["data set", "score", "vs base", "weighted F1", *scorings.values(), "unparsed", "rows"]
    return Table(heads, body, f"Scores of {model.name}", f"{caption}.")


def other_cell(primary: Score, other: Score | None) -> Cell:
    """The score under another scoring; "same" only where accuracy and both F1 are."""
    if other is None:
        return Cell("–")
    same = all(getattr(primary, key) == getattr(other, key) for key in ("accuracy", "weighted_f1", "macro_f1"))
    return Cell("same", value=other.accuracy) if same else score_cell(other)


def format_table(name: str, tests: list[Answers]) -> Table:
    """How reliably the answers have the form that was asked for, and what they took."""
    body = []
    for answers in tests:
        rows, about = list(answers.rows.values()), answers.about
        strict = score(answers.items(answers.labels()[0], "strict")) if "strict" in answers.scorings() else None
        cells = [share_cell(strict.unparsed, strict.items) if strict else "–"]
        cells += [Cell(number(about.max_new_tokens), LENGTHS.get(about.lengths, "")), number(about.targets_cut)]
        cells += [share_cell(sum(row["stopped"] is False for row in rows), len(rows))]
        empty = sum(not row["answer"].strip() for row in rows)
        speed = len(rows) / about.seconds if about.seconds else None
        figures = (empty, about.seconds, speed, about.prompt_tokens, about.answer_tokens)
        body.append([answers.name, *cells, *map(number, figures)])
    heads = ["data set", "unparsed", "most tokens", "targets cut", "answers cut", "empty", "seconds", "rows/s"]
    heads += ["prompt tokens", "answer tokens"]
    caption = "Unparsed: no valid answer under strict scoring. Cut: longer than an answer's most tokens."
    return Table(heads, body, f"Format and time, {name}", caption)


def share_cell(count: int, of: int) -> Cell:
    return Cell(number(count), f"{percent(count / of, 1)}%")


def set_cell(row: ScoreRow) -> Cell:
    """The data set, and which of its rows and labels; with a link where its labels have two versions."""
    labels = f"{row.labels} labels" if row.versions > 1 or not (row.only or row.kind) else ""
    other = "" if row.comparable or row.only else "other rows"
    small = ", ".join(filter(None, [row.only or row.kind, labels, other]))
    return Cell(row.set, small, href=f"#corrected-{row.set}" if row.versions > 1 else "")


def score_cell(score: Score | Average, kind: str = "") -> Cell:
    """A score with its interval; with a kind also drawn, in that colour."""
    point = Point(score.accuracy, low=score.low, high=score.high, kind=kind) if kind else None
    return Cell(percent(score.accuracy), span(score.low, score.high), point=point, value=score.accuracy)


def figure_cell(figure: float | None, f1: float = math.nan, draw: bool = False) -> Cell:
    """A figure of FinLoRA's in percent."""
    if figure is None:
        return Cell("–")
    point = Point(figure / 100, kind="c5") if draw else None
    return Cell(f"{figure:.2f}", "" if math.isnan(f1) else f"{f1:.3f}", "quiet", point=point, value=figure / 100)


def span(low: float, high: float) -> str:
    return f"[{percent(low, 1)}, {percent(high, 1)}]"


def difference_cell(paired: dict[str, Any] | None, rows: int = 0) -> Cell:
    """A paired difference with its interval, and on how many rows where these are fewer than `rows`; ▲ and ▼ where it
    is distinguishable, else ≈."""
    if not paired:
        return Cell("–")
    kind, sign = ("up", "▲") if paired["difference"] > 0 else ("down", "▼")
    kind, sign = (kind, sign) if paired["distinguishable"] else ("even", "≈")
    small = f"[{signed(paired['low'], 1)}, {signed(paired['high'], 1)}]"
    small += f", {paired['rows']:,} rows" if paired["rows"] < rows else ""
    title = f"p {p_value(paired['p'])}; right in one only: {paired['only_a']} and {paired['only_b']} of "
    text = f"{signed(paired['difference'])} {sign}"
    return Cell(text, small, kind, f"{title}{paired['rows']} rows", value=paired["difference"])


def run(folder: Path) -> None:
    """Write the report, and say where it is."""
    folder = folder.resolve()
    models = report(folder).models
    sets = {row.set for model in models for row in model.rows}
    print(f"{len(models)} models, {len(sets)} data sets: {shown(folder / 'index.html')} and README.md")
