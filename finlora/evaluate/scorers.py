"""Answers scored: by FinLoRA's rules with their ties decided, as a person reads them, and strictly.

A scorer turns the answers of a test set into items, a dictionary of equally long lists: row (index of the answer),
target, predicted (the class for F1), right (0 to 1) and unparsed; finlora/evaluate/results.py adds the row's group. An
item is an answer, or one tag of it where a target is several comma-separated tags; summary() turns items into scores.
On every test set answers equal to the targets score 1.0 and answers that hold nothing of them 0; neither the order of
labels nor PYTHONHASHSEED changes a score.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from functools import partial

import numpy as np

from finlora.core.errors import UserError
from finlora.data.tasks import TestSet
from finlora.evaluate import reading
from finlora.evaluate.quantities import Number, calculation, number

Items = dict[str, list]

UNPARSED = "unparsed"
# Besides the strict scorer these sets have one that takes a number within 1% of the target.
NUMERIC = ("formula", "xbrl_extract_value", "xbrl_extract_formula_calculations")
TWO_DECIMALS = Fraction(1, 200)  # half a unit of the second decimal


def scorings(name: str, spec: TestSet) -> dict[str, Callable[[Sequence[str], Sequence[str]], Items]]:
    """What scores the test set `name`, the primary one first; each takes the answers and the targets.

    There is none for a bertscore_f1 set, whose scores finlora/evaluate/bertscore.py measures: see bertscore_items().
    """
    if spec.metric == "bertscore_f1":
        return {}
    scorers = {"finlora": partial(finlora, spec), "read": partial(read, spec), "strict": partial(strict, spec)}
    if name == "nwgi":
        scorers["three classes"] = partial(_three_classes, spec)
    if name in NUMERIC:
        scorers["within 1%"] = partial(strict, spec, share=0.01)
    return scorers


def after_answer(answer: str) -> str:
    """What FinLoRA measures of an answer: what stands after its last "Answer:", without white space around it."""
    return answer.rpartition("Answer:")[2].strip()


def finlora(spec: TestSet, answers: Sequence[str], targets: Sequence[str]) -> Items:
    """FinLoRA's score: an answer is right when its earliest label (_earliest) equals the target, case aside.

    The labels are the targets given, whatever the table of tasks says; fewer rows have fewer labels and are easier.
    Several tags are compared by their place, without line breaks: a missing one is empty, surplus ones are left out.
    For F1 a wrong answer is a class of its own under its text (after_answer), so it hardly ever counts against another
    class's precision.
    """
    rows = list(_rows(spec, [after_answer(answer) for answer in answers], targets))
    labels = _lowered(target for _, _, target in rows)
    items = _no_items()
    for row, answer, target in rows:
        label = _earliest(answer, labels)
        right = (label or answer).lower() == target.lower()
        _add(items, row, target, target if right else answer, right, not label and not right)
    return items


def strict(spec: TestSet, answers: Sequence[str], targets: Sequence[str], share: float = 0.0) -> Items:
    """The strict score: the whole answer must be the target, not merely hold it.

    Case, spaces, and quotes or punctuation around the answer do not count. Where the table of tasks lists labels, only
    a label is an answer. A number ("$1,234.50", "(5)" for -5, "2e6") is compared exactly, in Financial Math to the two
    decimals that it asks for; there 12.5% is 12.5 or 0.125 as well, elsewhere a percentage is one in both or in none. A
    calculation with numbers ("(3 - 1) / 4") is compared by its exact value, and no number is one. `share` tolerates
    that part of the target's size (0.01: 1%). Anything else is compared as text. Several tags are compared by their
    place as in finlora().
    Predicted is "unparsed" for an answer that has no letter or digit, is no label, is no number or calculation where
    the target is one, or is several words where the target is one.
    """
    rows = list(_rows(spec, answers, targets))
    closed, tags = spec.labels is not None, spec.metric == "tag_accuracy_f1"
    spellings = _spellings(spec, rows)
    items = _no_items()
    for row, answer, target in rows:
        plain_answer, plain_target = _plain(answer), _plain(target)
        target = spellings[plain_target]
        if plain_answer == plain_target:
            predicted = target
        elif closed:
            predicted = spellings.get(plain_answer) or spellings.get(plain_answer.strip("()[]{}"), UNPARSED)
        elif not tags and (goal := number(plain_target) or calculation(target)) is not None:
            value = number(plain_answer) if isinstance(goal, Number) else calculation(answer)
            if value is None:
                predicted = UNPARSED
            else:
                predicted = target if _equals(spec, goal, share)(value) else spellings.get(plain_answer, plain_answer)
        else:
            prose = " " in plain_answer and " " not in plain_target
            predicted = spellings.get(
                plain_answer, UNPARSED if prose or not re.search(r"\w", plain_answer) else plain_answer
            )
        _add(items, row, target, predicted, predicted == target, predicted == UNPARSED != target)
    return items


def read(spec: TestSet, answers: Sequence[str], targets: Sequence[str]) -> Items:
    """As a person reads it (finlora/evaluate/reading.py): the strictly right, and what names the target and no other.

    Predicted is the label, number or tag that it names instead, and "unparsed" where it names none or several.
    """
    items = strict(spec, answers, targets)
    closed, tags = spec.labels is not None, spec.metric == "tag_accuracy_f1"
    rows = list(_rows(spec, [reading.named(answer) for answer in answers], targets, re.compile(r"[,;\n]")))
    spellings = _spellings(spec, rows)
    find = reading.finder(spellings.values())
    for place, (_, text, target) in enumerate(rows):
        if items["right"][place]:
            continue
        verdict, instead, target = None, _plain(text), items["target"][place]
        if not closed and not tags and (goal := number(_plain(target)) or calculation(target)) is not None:
            reads = reading.read_number if isinstance(goal, Number) else reading.read_calculation
            verdict = reads(text, _equals(spec, goal))
        elif not closed and re.search(r"[a-z]", target) and reading.FORMULA.fullmatch(target.replace("us-gaap:", "")):
            verdict = reading.read_formula(text, target)
        elif len(names := find(text) | (set() if closed else reading.tags(text))) == 1:
            (name,) = names
            verdict = _plain(name.removeprefix("us-gaap:")) == _plain(target.removeprefix("us-gaap:"))
            instead = spellings.get(_plain(name), _plain(name))
        predicted = UNPARSED if verdict is None else target if verdict else instead
        items["predicted"][place], items["right"][place] = predicted, float(bool(verdict))
        items["unparsed"][place] = verdict is None
    return items


def bertscore_items(values: Sequence[float]) -> Items:
    """Items of a bertscore_f1 set, one an answer: right is its BERTScore F1, and there are no classes."""
    items = _no_items()
    for row, value in enumerate(values):
        _add(items, row, "", "", value, False)
    return items


def summary(items: Items) -> dict[str, float | int | None]:
    """accuracy (the mean of right), weighted_f1, macro_f1 (each 0 to 1), and the counts unparsed, items and groups.

    Both F1 are over the classes that targets have; weighted_f1 is also what scikit-learn gives over all classes. They
    are None where there are no classes (BERTScore). Raises UserError where there are no items.
    """
    if not items["right"]:
        raise UserError("there are no answers to score; evaluate at least one row")
    weighted = macro = None
    if any(items["target"]):
        target, predicted, classes = codes(items)
        hits = np.bincount(target[target == predicted], minlength=classes)
        support, claims = (np.bincount(each, minlength=classes + 1)[:classes] for each in (target, predicted))
        weighted, macro = (float(score) for score in f1(support, claims, hits))
    return {
        "accuracy": math.fsum(items["right"]) / len(items["right"]),
        "weighted_f1": weighted,
        "macro_f1": macro,
        "unparsed": sum(items["unparsed"]),
        "items": len(items["right"]),
        "groups": len(set(items.get("group", items["row"]))),
    }


def codes(items: Items) -> tuple[np.ndarray, np.ndarray, int]:
    """Target and predicted class of each item as numbers, and how many classes the targets have.

    Predictions outside the targets' classes have that count as their number: none of them can be a hit.
    """
    classes = {name: code for code, name in enumerate(sorted(set(items["target"])))}
    target = np.array([classes[name] for name in items["target"]])
    predicted = np.array([classes.get(name, len(classes)) for name in items["predicted"]])
    return target, predicted, len(classes)


def f1(support: np.ndarray, claims: np.ndarray, hits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted and macro F1 from each class's counts of targets, predictions and right predictions (last axis)."""
    scores = 2 * hits / np.maximum(support + claims, 1)
    there = support > 0
    return (scores * support).sum(-1) / support.sum(-1), (scores * there).sum(-1) / there.sum(-1)


def _three_classes(spec: TestSet, answers: Sequence[str], targets: Sequence[str]) -> Items:
    """NWGI as its text describes it: the seven labels without their strength ("mildly positive" is positive)."""
    seven = spec.labels or sorted(set(targets))
    three = {label.split()[-1] for label in seven}
    items = strict(spec.model_copy(update={"labels": [*seven, *three]}), answers, targets)
    for key in ("target", "predicted"):
        items[key] = [label.split()[-1] for label in items[key]]
    items["right"] = [float(one == other) for one, other in zip(items["target"], items["predicted"], strict=True)]
    return items


def _rows(
    spec: TestSet, answers: Sequence[str], targets: Sequence[str], between: re.Pattern = re.compile(",")
) -> Iterator[tuple[int, str, str]]:
    """Yield (index of the answer, answer, target) of each item; `between` stands between the tags of an answer."""
    for row, (answer, target) in enumerate(zip(answers, targets, strict=True)):
        if spec.metric != "tag_accuracy_f1":
            yield row, answer, target
            continue
        answer_tags = [tag.strip().replace("\n", "") for tag in between.split(answer)]
        target_tags = [tag.strip().replace("\n", "") for tag in target.split(",")]
        answer_tags += [""] * (len(target_tags) - len(answer_tags))
        for answer_tag, target_tag in zip(answer_tags, target_tags, strict=False):  # leaves out surplus answers
            yield row, answer_tag, target_tag


def _spellings(spec: TestSet, rows: Sequence[tuple[int, str, str]]) -> dict[str, str]:
    """Labels by what _plain makes of them. A target that the table does not list is an answer all the same."""
    return {_plain(text): text for text in sorted({*(spec.labels or ()), *(target for *_, target in rows)})}


def _equals(spec: TestSet, goal: Number | Fraction, share: float = 0.0) -> Callable[[Number | Fraction], bool]:
    """Whether a number or a calculation's value is as near to the target's as the set asks."""
    asked = spec.metric == "accuracy"  # Financial Math: two decimals; rates are percentages or fractions of one
    if isinstance(goal, Number):
        return lambda value: value.equals(goal, TWO_DECIMALS if asked else Fraction(0), share, asked)
    return lambda value: abs(value - goal) <= Fraction(share) * abs(goal)


def _no_items() -> Items:
    return {"row": [], "target": [], "predicted": [], "right": [], "unparsed": []}


def _add(items: Items, row: int, target: str, predicted: str, right: float, unparsed: bool) -> None:
    for key, value in zip(items, (row, target, predicted, float(right), unparsed), strict=True):
        items[key].append(value)


def _lowered(labels: Iterable[str]) -> dict[str, str]:
    """Labels by their lower case; an empty label would be found in every answer."""
    return {label.lower(): label for label in sorted(set(labels), reverse=True) if label}


def _earliest(answer: str, lowered: dict[str, str]) -> str | None:
    """The label that stands earliest in the answer as a case-insensitive substring.

    FinLoRA leaves a tie to the hash order of a set. Here the longest label wins ("150.0" over "15"), so an answer that
    is a label is that label.
    """
    text = answer.lower()
    places = [(text.find(label), -len(label), label) for label in lowered if label in text]
    return lowered[min(places)[2]] if places else None


def _plain(text: str) -> str:
    """Text without what an answer may differ in: case, spaces, and quotes, emphasis or punctuation around it."""
    text = re.sub(r"\s*([-+*/^()=])\s*", r"\1", " ".join(text.lower().split()))
    # A full stop in front belongs to a number.
    return text.lstrip(" \"'`“”‘’«»*").rstrip(" \"'`“”‘’«»*.,;:!?")
