"""Numbers and calculations in answers, exactly: as fractions, so that 34728000020 is not 34728000000.

math-verify 0.9 would compare them too, but of two numbers it takes one for the answer, of "34.728 billion" it reads
34.728 and of "(1,499.76)" nothing, and 1615% is 16.15 to it.
"""

import ast
import operator
import re
from fractions import Fraction
from typing import NamedTuple

SIGNS = str.maketrans({"−": "-", "–": "-", "×": "*", "÷": "/"})
# Exponents have two digits, so that no answer makes a number of gigabytes.
DIGITS = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,2})?(?![0-9])"
PLAIN = re.compile(rf"([-+]?)\s*[$€£]?\s*({DIGITS})\s*(%?)")
TERM = re.compile(rf"[$€£]?\s*({DIGITS})\s*(%?)")
DATE = re.compile(r"[0-9]{1,4}([-/])[0-9]{1,2}\1[0-9]{1,4}")
CURRENCY = r"(?:USD|US\$|EUR|GBP|[$€£])?\s?"
SCALES = {"thousand": 3, "k": 3, "million": 6, "mn": 6, "m": 6, "billion": 9, "bn": 9, "b": 9, "trillion": 12, "t": 12}
IN_PROSE = re.compile(
    rf"(?<![\w.,])([-+]\s?)?{CURRENCY}([-+])?({DIGITS})\s?(%|percent\b|(?:{'|'.join(SCALES)})\b|x\b)?(?!\w)",
    re.IGNORECASE,
)
LONGEST = 500  # characters; what is longer could exhaust Python's parser
LARGEST = 2**16  # bits of a power
OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


class Number(NamedTuple):
    """12.5% has the value 12.5 and is a percentage."""

    value: Fraction
    percent: bool

    def equals(self, target: "Number", slack: Fraction, share: float, fractions: bool) -> bool:
        """Whether it is within `slack`, or that share of the target. With `fractions` 12.5% is 12.5 or 0.125 too."""
        pairs = [(self.value, target.value)] if fractions or self.percent == target.percent else []
        if fractions and self.percent != target.percent:
            pairs.append((self.value / (100 if self.percent else 1), target.value / (100 if target.percent else 1)))
        return any(abs(one - other) <= max(slack, Fraction(share) * abs(other)) for one, other in pairs)


def number(text: str) -> Number | None:
    """The number that a text is, "(5)" being -5; None where it is something else."""
    text = text.strip().translate(SIGNS)
    negative = text.startswith("(") and text.endswith(")")
    match = PLAIN.fullmatch(text[1:-1] if negative else text)
    if not match or len(text) > LONGEST:
        return None
    value = Fraction(match[2].replace(",", ""))
    return Number(-value if negative or match[1] == "-" else value, bool(match[3]))


def numbers(text: str) -> list[tuple[re.Match, Number]]:
    """The numbers in prose: "USD 15.0", "$-15.0", "34.728 billion", "15.0x", "(5)" for -5; and where they stand."""
    text, mentions = text.translate(SIGNS), []
    for match in IN_PROSE.finditer(text):
        sign, minus, digits, unit = match.groups(default="")
        value = Fraction(digits.replace(",", "")) * 10 ** SCALES.get(unit.lower(), 0)
        bracketed = text[: match.start()].endswith("(") and text[match.end() :].startswith(")")
        negative = bracketed or "-" in sign + minus
        mentions.append((match, Number(-value if negative else value, unit.lower() in ("%", "percent"))))
    return mentions


def calculation(text: str) -> Fraction | None:
    """The value of a calculation with + - * / ^ and brackets; None where the text is no such thing, or a date.

    Of "a = b = c" it is the first part that is one. A number alone is none.
    """
    text = text.translate(SIGNS).replace("^", "**").strip(" \"'`")
    if len(text) > LONGEST or DATE.fullmatch(text):
        return None
    for part in text.split("="):
        terms = TERM.sub(lambda match: f"('{match[1].replace(',', '') + match[2]}')", part)
        if re.search(r"[^-+*/()\s]", TERM.sub("", part)):
            continue
        try:
            tree = ast.parse(terms.strip(), mode="eval").body
            value = _value(tree)
        except (ArithmeticError, SyntaxError, TypeError, ValueError, RecursionError, MemoryError):
            continue
        if any(isinstance(node, ast.BinOp) for node in ast.walk(tree)):
            return value
    return None


def _value(node: ast.expr) -> Fraction:
    """Raises TypeError for anything but numbers, OPERATIONS and powers."""
    if isinstance(node, ast.Constant):  # a term is a text
        return Fraction(node.value.rstrip("%")) / (100 if node.value.endswith("%") else 1)
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if type(node.op) in OPERATIONS:
            return OPERATIONS[type(node.op)](left, right)
        if isinstance(node.op, ast.Pow) and right.denominator == 1:
            if abs(right) * max(left.numerator.bit_length(), left.denominator.bit_length()) > LARGEST:
                raise ValueError("the power is too large")
            return left**right
        if isinstance(node.op, ast.Pow):
            return Fraction(float(left) ** float(right))  # a root is not exact
    raise TypeError(ast.dump(node))
