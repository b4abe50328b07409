"""Rows to measure with: FinLoRA's own, and rows made in the shape of its long tasks, as many as are asked for.

    python -m bench.rows <folder to write> [--data <folder of FinLoRA's files>] [--kinds finer,tags_made_20]

writes <folder>/<kind>/train.jsonl, as `make data` does; with --tests <folder>/test/<set>_test.jsonl, as FinLoRA does. A
made kind may end in its number of questions: of a filing, or of a row of FiNER and FNXL. Made rows have the layout of
FinLoRA's scripts (process_finer.py, process_fnxl.py, process_xbrl_extract.py), tags of the US GAAP taxonomy, and about
the real lengths; companies and figures are invented.
"""

import argparse
import gzip
import hashlib
import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from finlora.core.errors import UserError, did_you_mean, run
from finlora.core.files import write_text
from finlora.core.paths import ROOT
from finlora.data.test_sets import all_sets

Row = tuple[str, str]  # context and target
REAL = {  # files of FinLoRA
    "sentiment": [f"test/{name}_test.jsonl" for name in ("fpb", "fiqa", "tfns")],
    "ner": ["test/ner_test.jsonl"],
    "xbrl_term": ["train/xbrl_term_train.jsonl"],
    "formula": ["train/formula_train.jsonl"],
    "financebench": ["train/financebench_train.jsonl"],
    "finer": ["older/finer_test_older.jsonl.gz"],
    "tags": ["older/xbrl_extract_tags_test_older.jsonl.gz"],
    "xbrl_extract": [
        f"older/xbrl_extract_{kind}_test_older.jsonl.gz" for kind in ("tags", "value", "formula_calculations")
    ],
}
TESTS = {"finer_made": "finer", "fnxl_made": "fnxl"}  # the test set of a made kind
TESTS |= {f"{kind}_made": f"xbrl_extract_{kind}" for kind in ("tags", "value", "formula", "formula_calculations")}
MADE = [*TESTS, "xbrl_extract_made"]  # the last: all four kinds
# The 139 of FiNER in the order of its prompts, then the most frequent ones of 30 Dow Jones filings; 740 make the length
# of FNXL's prompts.
TAGS = (ROOT / "bench" / "us_gaap_tags.txt").read_text(encoding="utf-8").split()
FINER_TAGS, FINER_QUESTIONS, FILING_QUESTIONS = 139, 4, 20
ELEMENTS = 130, 200  # of a filing, the fewest and the most: 3,000 to 4,600 tokens
ROWS = 640  # of a made kind
COMPANIES = (
    "Greystone Group,Tamarind SA,Bellamy Oyj,Oakhaven Inc.,Hartwell Holdings,Nordvik plc,Silverpine Group".split(",")
)


def read_rows(kind: str, data: Path | None = None, rows: int = ROWS) -> list[Row]:
    """The rows of a kind in a fixed order that mixes them, as many as there are or `rows` made ones.

    data: the folder of FinLoRA's files. UserError for an unknown kind, and for a file that is not there.
    """
    name, questions = re.fullmatch(r"(.*?)(?:_(\d+))?", kind).groups()
    if name in MADE and questions != "0":
        found = list(_made(name.removesuffix("_made"), rows, int(questions or 0)))
    elif kind not in REAL:
        near = did_you_mean(kind, [*REAL, *MADE])
        known = ", ".join([*REAL, *MADE])
        raise UserError(f"rows of {kind!r}: {near}there are {known}, made ones also with a number (tags_made_20)")
    elif data is None:
        raise UserError(f"rows of {kind}: are FinLoRA's; name the folder of its files with --data")
    else:
        found = [row for file in REAL[kind] for row in _file_rows(data / file)]
    return sorted(found, key=lambda row: hashlib.sha256(row[0].encode()).hexdigest())


def write_rows(rows: list[Row], path: Path) -> Path:
    """Write rows as they are trained on."""
    turns = (
        [{"role": "user", "content": context}, {"role": "assistant", "content": target}] for context, target in rows
    )
    write_text(path, "".join(json.dumps({"messages": each}) + "\n" for each in turns))
    return path


def write_tests(kind: str, rows: list[Row], folder: Path) -> Path:
    """Write made rows as the test set of their kind; returns the file."""
    path = folder / all_sets()[TESTS[re.sub(r"_\d+$", "", kind)]].file
    lines = (json.dumps({"context": context, "target": target}) + "\n" for context, target in rows)
    write_text(path, "".join(lines))
    return path


def _file_rows(path: Path) -> Iterator[Row]:
    if not path.is_file():
        raise UserError(f"{path}: is missing; --data names a folder of FinLoRA's files")
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield row["context"], str(row["target"])


def _made(kind: str, rows: int, questions: int) -> Iterator[Row]:
    draw = random.Random(0)
    if kind in ("finer", "fnxl"):
        tags = TAGS[:FINER_TAGS] if kind == "finer" else TAGS
        for _ in range(rows):
            yield _tagging(draw, tags, questions or FINER_QUESTIONS)
        return
    kinds = ["tags", "value", "formula", "formula_calculations"] if kind == "xbrl_extract" else [kind]
    questions = questions or FILING_QUESTIONS
    for filing in range(-(-rows // questions)):
        count = min(questions, rows - filing * questions)
        yield from _filing(draw, kinds[filing % len(kinds)], count)


def _tagging(draw: random.Random, tags: list[str], questions: int) -> Row:
    """A row of FiNER or FNXL: the list of all tags, then sentences with a figure to tag each."""
    text = f"You are XBRL expert. Here is a list of US GAAP tags options: ,{','.join(tags)}. Answer the following "
    text += f"{questions} independent questions by providing only {questions} US GAAP tags answers in the order of the "
    text += "questions. Each answer must be separated by a comma (,). Provide nothing else. \n"
    targets: list[str] = []
    while len(targets) < questions:
        asked = draw.choices(tags, k=min(questions - len(targets), draw.choice([1, 1, 2])))
        figures = [f"{draw.uniform(1, 999):.1f}" for _ in asked]
        # Real sentences have 22 to 150 tokens, with a median of 55.
        words = min(200, 10 + draw.lognormvariate(3.4, 0.8))
        parts = [f"{_words(tag).lower()} of $ {figure} million" for tag, figure in zip(asked, figures, strict=True)]
        sentence = f"{draw.choice(COMPANIES)} recorded {' and '.join(parts)}"
        while len(sentence.split()) < words:
            sentence += f" , compared with {_words(draw.choice(TAGS)).lower()} of $ {draw.uniform(1, 999):.1f} million"
            sentence += f" at {draw.choice(['March', 'June', 'December'])} 31 , {draw.randint(2015, 2023)}"
        for figure in figures:
            number = len(targets) + 1 + figures.index(figure)
            text += f'{number}. What is best tag for entity "{figure}" in sentence: "{sentence} .?"\n'
        targets += asked
    return text + "Output US GAAP tags:", ",".join(targets)


def _filing(draw: random.Random, kind: str, questions: int) -> Iterator[Row]:
    """Questions on one context of one filing, which they share with the instruction."""
    company, year = draw.choice(COMPANIES), draw.randint(2015, 2023)
    facts = [(tag, str(draw.randint(1, 90_000) * 1_000_000)) for tag in draw.sample(TAGS, draw.randint(*ELEMENTS))]
    asks = {
        "tags": "the US GAAP XBRL tag of {}",
        "value": "the value of {}",
        "formula": "the formula, in US GAAP XBRL tags, of {}",
        "formula_calculations": "the formula, with values in place of tags, of {}",
    }[kind]
    text = (
        "You are a knowledgeable XBRL assistant. You are given a context of an XBRL filing and a question on it. "
        f"Analyse the context and answer briefly and exactly with {asks.format('what is asked for')}; no XML, no "
        "code, no explanation, no new question.\nXML File: "
    )
    text += "".join(f"<us-gaap:{tag}>{value}</>" for tag, value in facts)
    asked = itertools.cycle(draw.sample(facts, len(facts)))
    for (tag, value), (other, divisor) in zip(asked, draw.choices(facts, k=questions), strict=False):
        ratio = f"{_words(tag)} in percent of {_words(other)}"
        what = asks.format(ratio if kind.startswith("formula") else _words(tag))
        opening = draw.choice(["What is", "Please find", "Can you provide"])
        ask = f"\n{opening} {what} of {company} for the fiscal year ending in FY {year}?\nAnswer:"
        target = {
            "tags": f"us-gaap:{tag}",
            "value": value,
            "formula": f"(us-gaap:{tag} / us-gaap:{other}) * 100",
            "formula_calculations": f"({value} / {divisor}) * 100",
        }[kind]
        yield text + ask, target


def _words(tag: str) -> str:
    return " ".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", tag))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, help="folder of FinLoRA's files; without it, made kinds alone")
    parser.add_argument("--kinds", help=f"of {', '.join([*REAL, *MADE])}; all that can be had without")
    parser.add_argument("--rows", type=int, default=ROWS, help=f"of a made kind ({ROWS})")
    parser.add_argument("--tests", action="store_true", help="test sets in place of train files; of made kinds")
    options = parser.parse_args()
    every = list(TESTS) if options.tests else [*(REAL if options.data else ()), *MADE]
    for kind in options.kinds.split(",") if options.kinds else every:
        rows = read_rows(kind, options.data, options.rows)
        if not options.tests:
            path = write_rows(rows, options.out / kind / "train.jsonl")
        elif re.sub(r"_\d+$", "", kind) in TESTS:
            path = write_tests(kind, rows, options.out)
        else:
            raise UserError(f"--kinds {kind}: has no test set; --tests writes {', '.join(TESTS)}")
        print(f"{path}: {len(rows):,} rows")


if __name__ == "__main__":
    run(main)
