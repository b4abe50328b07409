"""Which rows of a test set belong together: those about the same text, or nearly the same.

FinLoRA asks about one NER sentence up to 204 times, under 17 instructions, about one headline in nine questions, about
one filing in dozens; a FiNER row has four sentences. Answers about one text are right or wrong together, so they are
fewer observations than rows (finlora/evaluate/statistics.py). FinanceBench's rows are together where they show the same
page; which other pages are of the same filing, they do not say.
"""

import os
import re
from collections.abc import Sequence

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from finlora.data.neardup import near_duplicate_groups

# What a prompt is about, without its instruction, in the forms of FinLoRA's prompts. One form finds all texts of a row.
FORMS = [
    re.compile(form, re.DOTALL)
    for form in (
        r"""in sentence: ["'](.*?)\??["'] *(?:\n|$)""",  # FiNER, FNXL
        r"\nPage \d+:\n(.*?)(?=\nPage \d+:\n|$)",  # FinanceBench
        r"\nInput:(.*?)(?:Answer:\s*)?$",  # sentiment, headlines, NER
        r"^Use formula .*Question:(.*?)(?:Answer:\s*)?$",  # Financial Math
        r"^Explain this XBRL term briefly in one sentence:(.*?)(?:Answer:\s*)?$",
    )
]
XBRL = re.compile(r"(?:XML File:|```xml)(.*>)(.*)", re.DOTALL)  # the elements, then the question
# A filing has two such texts, of a day and of a year; the question names it: "Visa Inc's Goodwill ... in FY 2022".
COMPANY = r"(?:[A-Z0-9&][\w.&'-]*,? )+(?:Inc|Corp|Co|Company|Group|Ltd|Plc|LLC)\b|[A-Z]\w+ & [A-Z]\w+"
FILING = re.compile(rf"({COMPANY}).*?\bFY ?(\d{{4}})")


def row_groups(contexts: Sequence[str]) -> list[int]:
    """The group of each row, from 0: rows whose texts are equal or near-duplicates, and all that such rows connect."""
    if not contexts:
        return []
    number: dict[str, int] = {}
    start = len(os.path.commonprefix(contexts))  # an instruction in a form that is not known
    pairs = [
        (row, number.setdefault(text, len(number)))
        for row, context in enumerate(contexts)
        for text in texts(context) or [context[start:]]
    ]
    row, text = np.array(pairs).T
    near = np.array(near_duplicate_groups(number))[text] + len(contexts)
    size = near.max() + 1
    links = sparse.coo_array((np.ones(len(row)), (row, near)), shape=(size, size))
    together = connected_components(links, directed=False)[1][: len(contexts)]
    return np.unique(together, return_inverse=True)[1].tolist()


def texts(context: str) -> list[str]:
    """What a prompt is about; nothing where its form is none of FinLoRA's."""
    if xbrl := XBRL.search(context):
        filings = FILING.findall(xbrl[2])  # the last one: an example question may come first
        return [xbrl[1], *("".join(filing).replace(" ", "") for filing in filings[-1:])]
    return next(filter(None, (form.findall(context) for form in FORMS)), [])
