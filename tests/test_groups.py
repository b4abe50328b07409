"""Which rows count as one: those about one text, in every form of FinLoRA's prompts, or about texts that are alike."""

import gzip
import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finlora.data.groups import row_groups
from finlora.data.rows import read_rows

SENTENCES = ["Silicium de Provence SAS and Evergreen Solar Inc . signed a loan agreement in December 2007 .",
             "Net sales of the pulp mill in Finland fell by a tenth in the first quarter of 2009 ."]  # fmt: skip
XML = ["<us-gaap:Assets>87476000000</>\n<us-gaap:InventoryNet>16565000000</>", "<us-gaap:NetIncomeLoss>10335000000</>"]


def asked(question: str, text: str) -> str:
    return f"Instruction: {question}\nOptions: person, location\nInput: {text}\nAnswer: "


def tagged(*sentences: str) -> str:
    lines = [f'{n}. What is best tag for entity "{n}" in sentence: "{text}?"' for n, text in enumerate(sentences, 1)]
    return "\n".join(
        ["You are XBRL expert. US GAAP tags options: ,LongTermDebt,Goodwill", *lines, "Output US GAAP tags:"]
    )


def extracted(xml: str, question: str) -> str:
    example = "Example question: What is the value of income of Example Corp for FY 2022?\nExample answer: 254"
    return f"You are a knowledgeable XBRL assistant.\nXML File: {xml}\n{example}\nQuestion: {question}\nAnswer:"


def formula(name: str, question: str) -> str:
    return f"Use formula {name} to answer the question. Formula: {name} = a / b. Question: {question} Answer:"


def pages(question: str, *texts: str) -> str:
    shown = "\n".join(f"Page {number}:\n{text}" for number, text in enumerate(texts, 40))
    return f"Answer very briefly. Question: {question}\nDocument Pages Context:\n{shown}"


one, other = SENTENCES


@pytest.mark.parametrize(
    ("contexts", "groups"),
    [
        ([asked("What is 'A'?", one), asked("Of what type is 'B'?", one), asked("What is 'A'?", other)], [0, 0, 1]),
        ([asked("What?", one), asked("What?", one.upper() + " https://t.co/x")], [0, 0]),
        ([asked("What?", one), asked("What?", one.replace("2007", "2008"))], [0, 0]),
        ([asked("What?", "sales rose"), asked("What?", "sales fell")], [0, 1]),
        ([tagged(one, "A ."), tagged("B .", "C ."), tagged("C .", one)], [0, 0, 0]),
        ([tagged("A .", "B ."), tagged("C .", "D .")], [0, 1]),
        ([extracted(XML[0], "Total Equity of Visa Inc for FY 2023?"), extracted(XML[0], "Goodwill?")], [0, 0]),
        ([extracted(xml, f"How much was {name} for the year ending in FY 2023?")
          for xml, name in zip(XML, ("Visa Inc's Goodwill", "Net Income of Visa Inc"), strict=True)], [0, 0]),
        ([extracted(xml, f"What is Johnson & Johnson's Goodwill for FY {year}?")
          for xml, year in zip(XML, (2022, 2023), strict=True)], [0, 1]),
        ([formula("ROI", "a is 1 and b is 2"), formula("ROI", "a is 1 and b is 3")], [0, 1]),
        ([formula("ROI", one), formula("ROA", one)], [0, 0]),
        ([pages("Why?", one, "tables"), pages("When?", other), pages("Where?", "cash", one)], [0, 1, 0]),
        ([f"Explain this XBRL term briefly in one sentence: {term}. Answer:" for term in ("Goodwill", "Cash")], [0, 1]),
        ([f"In my own form: answer at once and in one word. {text}" for text in ("a b", "a c", "a b!")], [0, 1, 0]),
        ([], []),
        ([""], [0]),
        (["same", "same"], [0, 0]),
    ],
)  # fmt: skip
def test_rows_about_one_text_are_one_group(contexts, groups):
    assert row_groups(contexts) == groups


@given(st.lists(st.sampled_from("ABCDEFGH"), min_size=1, max_size=12), st.randoms())
def test_neither_order_nor_other_rows_change_who_belongs_together(letters, random):
    contexts = [asked("What?", f"{letter} sold its {letter} plant to {letter}") for letter in letters]
    groups = row_groups(contexts)
    assert {(a == b) == (x == y) for a, x in zip(groups, letters, strict=True)
            for b, y in zip(groups, letters, strict=True)} == {True}  # fmt: skip
    assert set(groups) == set(range(len(set(letters))))
    order = random.sample(range(len(letters)), len(letters))
    moved = row_groups([contexts[place] for place in order])
    assert len(set(zip(moved, (groups[place] for place in order), strict=True))) == len(set(groups))


@pytest.mark.parametrize(
    ("name", "rows", "groups", "largest"),
    [("fpb", 1212, 1208, 2), ("fiqa", 235, 233, 2), ("ner", 3502, 98, 204), ("tfns", 2388, 2376, 5),
     ("nwgi", 4047, 4041, 2), ("formula", 200, 200, 1), ("xbrl_term", 651, 633, 3), ("financebench", 43, 41, 3)],
)  # fmt: skip
def test_the_groups_of_the_real_sets(shared, name, rows, groups, largest):
    numbers = row_groups([row.context for row in read_rows(shared / "test" / f"{name}_test.jsonl")])
    assert (len(numbers), len(set(numbers)), Counter(numbers).most_common(1)[0][1]) == (rows, groups, largest)


@pytest.mark.parametrize(
    ("name", "filings"),
    [("xbrl_extract_tags", 6), ("xbrl_extract_value", 10), ("xbrl_extract_formula_calculations", 19)],
)
def test_the_rows_of_a_real_filing_are_one_group(shared, name, filings):
    """Older rows of XBRL extraction say which filing they are from."""
    with gzip.open(shared / "older" / f"{name}_test_older.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    groups = row_groups([row["context"] for row in rows])
    pairs = {(group, row["doc_path"]) for group, row in zip(groups, rows, strict=True)}
    assert len(pairs) == len(set(groups)) == filings
