"""An answer as a person reads it: which label, number, calculation or tag it names, if it names exactly one.

Between FinLoRA's rule, to which "not positive" is positive, and strict equality, to which "The sentiment is positive."
is no answer. What was thought aloud, an explanation behind the answer and a negated label do not count; a refusal, two
answers and a label inside another word are no answer. bench/reading.py compares it with a person's verdicts.
"""

import re
from collections.abc import Callable, Collection
from fractions import Fraction

from finlora.evaluate.quantities import DIGITS, Number, calculation, numbers

BOXED = re.compile(r"\\boxed\{\s*(?:\\text\{)?([^{}]*)\}")
ANSWER = re.compile(r"\banswer(?:\s+is\b\s*:?|\s*:)", re.IGNORECASE)
NEXT_ROW = re.compile(r"(?<=\S)\s*\n\s*(?:input|question|instruction)\s*:", re.IGNORECASE)
EXPLANATION = re.compile(
    r"(?<=\S)\s*\b(?:(?:explanation|reason(?:ing)?|rationale|justification|note)\s*:"
    r"|\(?(?:because|since|as (?:it|the)|due to|given that)\b)",
    re.IGNORECASE,
)
REFUSAL = re.compile(
    r"\b(?:(?:i|we) (?:can ?not|can't|am (?:unable|not able)|do(?: not|n't) know)|can(?: ?not|'t) be|sorry|as an ai"
    r"|(?:impossible|hard|difficult|unable) to (?:say|tell|determine)|(?:not|n't) enough|insufficient|unclear)\b",
    re.IGNORECASE,
)
# Before a label: "not", "does not convey a strong", but not "not negative but".
NEGATED = re.compile(
    r"(?:\b(?:not|no|never|neither|nor|without)|n't)\s+(?:(?!but\b|rather\b|yet\b)[\w-]+\s+){0,4}\W?$"
    r"|\b(?:than|instead of)\s+(?:an?\s|the\s)?\W?$",
    re.IGNORECASE,
)
STATED = re.compile(
    r"(?:\b(?:is|are|was|were|be|equals?)|[=:≈])\s*(?:(?:about|approximately|around|roughly|equal to|thus)\s)*\(?$",
    re.I,
)
YEAR = re.compile(r"(?:19|20)\d\d")
TAG = r"[A-Z][A-Za-z]*[a-z][A-Z][A-Za-z0-9]*"
OPERAND = rf"(?:{TAG}|[A-Z]\w+|{DIGITS})"
FORMULA = re.compile(rf"\(*\s*{OPERAND}(?:[\s)]*[-+*/][\s(]*{OPERAND})+\s*\)*")


def named(answer: str) -> str:
    """The part of an answer that names it; nothing where it refuses or only thinks."""
    text = answer.rpartition("</think>")[2].partition("<think>")[0]
    text = " ".join(BOXED.findall(text)) or ANSWER.split(NEXT_ROW.split(text, maxsplit=1)[0], maxsplit=1)[-1]
    text = EXPLANATION.split(text, maxsplit=1)[0]
    return "" if REFUSAL.search(text) else text.replace("us-gaap:", "").strip()


def finder(labels: Collection[str]) -> Callable[[str], set[str]]:
    """What finds which of these labels a text names: as whole words, the longest first, not negated.

    The choices A to D are capitals that begin no sentence ("A bond ..."); Yes and No begin one, or are all that it is.
    """
    spelling = {label.removeprefix("us-gaap:").lower(): label for label in sorted(labels, reverse=True)}
    words = "|".join(map(re.escape, sorted(filter(None, spelling), key=lambda word: (-len(word), word)))) or "(?!)"
    pattern = rf"(?<![\w-])({words})(?![\w-])"
    if set(spelling) <= {"yes", "no"}:
        pattern = rf"(?:(?<=[.!?:/\n\"'*(])|(?<=\bor)|^)\s*({words})(?!\w)|(?:\bis|,) ({words})(?=[.,!]|\s*$)"
    elif all(len(label) == 1 and label.isalpha() for label in spelling):
        pattern = rf"(?<![\w.'-])(?-i:([{words.upper()}]))(?!['’-]|\.?\w|\s+(?!(?:or|and|is)\b)(?-i:[a-z]))"
        pattern += rf"|\b(?:option|choice) \(?([{words}])\b|^\(?([{words}])\)?\W*$"
    compiled = re.compile(pattern, re.IGNORECASE)

    def find(text: str) -> set[str]:
        mentions = [match for match in compiled.finditer(text) if not NEGATED.search(text[: match.start()])]
        return {spelling[match[match.lastindex].lower()] for match in mentions}

    return find


def tags(text: str) -> set[str]:
    """The words that have the form of a US GAAP tag, such as DebtInstrumentFaceAmount."""
    return set(re.findall(rf"(?<![\w-]){TAG}(?![\w-])", text))


def read_number(text: str, equals: Callable[[Number], bool]) -> bool | None:
    """Whether the one number that a text states, or has, is the target; None where it is not one."""
    mentions = numbers(text)
    # "the value for 2023 is ..."; and what is still being calculated is not stated.
    mentions = [each for each in mentions if not YEAR.fullmatch(each[0][0].strip())] or mentions
    stated = [
        value
        for match, value in mentions
        if STATED.search(text[: match.start()]) and not re.match(r"\s*[-+*/^×÷]\s*[\d($]", text[match.end() :])
    ]
    values = set(stated or [value for _, value in mentions])
    if values and all(map(equals, values)):
        return True
    return False if len(values) == 1 else None


def read_calculation(text: str, equals: Callable[[Fraction], bool]) -> bool | None:
    """Whether the one calculation in a text has the target's value; None where there is not one."""
    runs = re.findall(r"[-+(]*\s*[$€£]?\d[\d\s.,$€£%()+\-*/^×÷−–eE]*", text)
    values = {value for run in runs if (value := calculation(run.strip(" .,-+*/"))) is not None}
    return None if len(values) != 1 else all(map(equals, values))


def read_formula(text: str, target: str) -> bool | None:
    """Whether the one formula of tags in a text is the target, spaces aside; None where there is not one."""
    formulas = {_formula(match) for match in FORMULA.findall(text)}
    return None if len(formulas) != 1 else _formula(target) in formulas


def _formula(text: str) -> str:
    text = re.sub(r"\s|us-gaap:", "", text).lower()
    while text.count(")") > text.count("(") and text.endswith(")"):
        text = text[:-1]
    return text
