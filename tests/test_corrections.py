"""The corrections: what they change, what they leave alone, and how far their evidence holds on the real files."""

from collections import Counter
from pathlib import Path

import pytest
import yaml
from failures import refuses
from hypothesis import example, given
from hypothesis import strategies as st

from finlora.data.corrections import TABLE, Correction, applies, corrected_target, load_corrections, standing
from finlora.data.fetch import read_manifest
from finlora.data.rows import Row, read_rows

REAL = Path(__file__).resolve().parent.parent.parent / "shared" / "finlora" / "data"
TFNS = "test/tfns_test.jsonl"
TRAIN = "train/finlora_sentiment_train.jsonl"
INSTRUCTION = "Instruction: What is the sentiment of this {}? Please choose an answer from {{{}}}.\nInput: {}\nAnswer: "
THREE = "negative/neutral/positive"
SEVEN = (
    "strong negative/moderately negative/mildly negative/neutral/mildly positive/moderately positive/strong positive"
)


def row(text: str, target: str = "neutral", what: str = "tweet", classes: str = THREE) -> Row:
    return Row(1, INSTRUCTION.format(what, classes, text), target)


def real(file: str) -> Path:
    if not (REAL / file).exists():
        pytest.skip("FinLoRA's files are not in ../shared")
    return REAL / file


def test_the_corrected_files_are_the_pinned_ones():
    pinned = {file.path: file.git_blob_sha1 for file in read_manifest().files}
    for file, entry in load_corrections().items():
        assert entry.git_blob_sha1 == pinned[f"data/{file}"]


def test_the_whole_of_tfns_is_corrected():
    changes = {label: corrected_target(TFNS, row("a", label)) for label in ("negative", "neutral", "positive")}
    assert changes == {"negative": "negative", "neutral": "positive", "positive": "neutral"}
    assert corrected_target(TFNS, row("a", "bullish")) == "bullish"


@pytest.mark.parametrize(
    ("published", "expected"),
    [
        (row("$ALLY - Ally Financial pulls outlook"), "unsure"),
        (row("ouch looks like $tsla shorts getting skinned again"), "unsure"),
        (row("Housing starts climb 3.8% in October to $1.314 million rate"), "certain"),
        (row("201 books to read before the end of the year https://t.co/HgzlXonUVR #FTReadingList"), "certain"),
        (row("Housing starts climb 3.8% in October", what="news"), "other"),
        (row("Housing starts climb 3.8% in October", classes=SEVEN), "other"),
        (Row(1, "Is this tweet positive?", "neutral"), "other"),
    ],
)
def test_which_rows_of_the_train_file_are_corrected(published, expected):
    assert standing(TRAIN, published) == expected
    assert corrected_target(TRAIN, published) == ("positive" if expected == "certain" else "neutral")


FORMULA = "test/formula_test.jsonl"


@pytest.mark.parametrize("line", load_corrections()[FORMULA].answers)
def test_each_corrected_answer_is_what_its_derivation_yields(line):
    answer = load_corrections()[FORMULA].answers[line]
    value = eval(answer.derivation)  # the table is our own
    assert f"{value:.2f}" == f"{float(answer.corrected):.2f}" != f"{float(answer.published):.2f}"


def test_a_row_is_told_by_its_line_where_answers_are_corrected():
    answers = load_corrections()[FORMULA].answers
    line, other = next(iter(answers)), max(answers) + 1
    assert standing(FORMULA, Row(line, "a", "1")) == "certain" and standing(FORMULA, Row(other, "a", "1")) == "other"
    assert corrected_target(FORMULA, Row(line, "a", "1")) == answers[line].corrected
    assert corrected_target(FORMULA, Row(other, "a", "1")) == "1"


def test_the_answers_that_are_corrected_are_the_published_ones():
    answers = load_corrections()[FORMULA].answers
    rows = {row.line: row for row in read_rows(real(FORMULA))}
    assert applies(FORMULA, real(FORMULA))
    for line, published in rows.items():
        wrong = answers.get(line)
        assert corrected_target(FORMULA, published) == (wrong.corrected if wrong else published.target)
        assert standing(FORMULA, published) == ("certain" if wrong else "other")
        assert wrong is None or wrong.published == published.target


REGEX = "regular expression"
LABELS = st.sampled_from(["negative", "neutral", "positive", "strong positive", "Yes", ""])
TEXTS = st.one_of(st.text(), st.text().map(lambda text: INSTRUCTION.format("tweet", THREE, text)))


@example(TRAIN, INSTRUCTION.format("tweet", THREE, "sales rose"), "neutral")
@example(TRAIN, INSTRUCTION.format("tweet", THREE, "$tsla rose"), "neutral")
@example(TFNS, "", "positive")
@given(st.sampled_from([TFNS, TRAIN, "test/fpb_test.jsonl", "train/mine.jsonl"]), TEXTS, LABELS)
def test_a_correction_changes_only_what_it_names_and_undoes_itself(file, context, label):
    published = Row(1, context, label)
    corrected = corrected_target(file, published)
    assert corrected_target(file, Row(1, context, corrected)) == label
    if corrected != label:
        assert standing(file, published) == "certain"
        assert {corrected, label} == {"neutral", "positive"}
    if file not in (TFNS, TRAIN):
        assert standing(file, published) == "other"


def test_only_the_published_bytes_are_corrected(tmp_path):
    published = real(TFNS)
    assert applies(TFNS, published)
    changed = tmp_path / "tfns_test.jsonl"
    changed.write_bytes(published.read_bytes() + b'{"context": "one more", "target": "neutral"}\n')
    assert not applies(TFNS, changed)
    assert not applies("test/fpb_test.jsonl", published)


def test_corrected_tfns_has_the_label_counts_of_its_source():
    path = real(TFNS)
    assert Counter(row.target for row in read_rows(path)) == {"positive": 1566, "neutral": 475, "negative": 347}
    corrected = Counter(corrected_target(TFNS, row) for row in read_rows(path))
    assert corrected == {"neutral": 1566, "positive": 475, "negative": 347}


def test_how_far_the_train_files_rule_tells_the_data_sets_apart():
    # The test sets stand for the train file's parts, which have the same instructions. The figures are in README.md.
    standings = {
        name: Counter(standing(TRAIN, row) for row in read_rows(real(f"test/{name}_test.jsonl")))
        for name in ("tfns", "fiqa", "fpb")
    }
    assert standings["tfns"] == {"certain": 2019, "unsure": 369}
    assert standings["fiqa"] == {"unsure": 128, "other": 107}
    assert standings["fpb"] == {"other": 1212}


def changed_table(change) -> str:
    table = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    change(table)
    return yaml.safe_dump(table)


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        ("{}", None, ["no corrections", "git"]),
        ("- a", None, ["mapping", "git"]),
        ("a: 1", "a", ["keys", "evidence, git_blob_sha1"]),
        (changed_table(lambda t: t[TFNS].update(lables={})), TFNS, ["unknown", "lables", "labels"]),
        (changed_table(lambda t: t[TFNS].pop("evidence")), TFNS, ["evidence", "missing"]),
        (changed_table(lambda t: t[TFNS].pop("labels")), TFNS, ["labels", "answers", "missing"]),
        (
            changed_table(lambda t: t[FORMULA].update(labels={"a": "b", "b": "a"})),
            FORMULA,
            ["labels", "answers", "one"],
        ),
        (
            changed_table(lambda t: t[FORMULA]["answers"][12].pop("derivation")),
            f"{FORMULA}: answers: 12",
            ["derivation"],
        ),
        (changed_table(lambda t: t[TFNS].pop("git_blob_sha1")), TFNS, ["git_blob_sha1", "missing"]),
        (changed_table(lambda t: t[TFNS].update(labels={"a": "b"})), TFNS, ["labels", "exchange"]),
        (changed_table(lambda t: t[TFNS].update(labels=["a"])), TFNS, ["labels", "exchange"]),
        (changed_table(lambda t: t[TRAIN].update(rows=5)), f"{TRAIN}: rows", ["keys", "context, not_copied"]),
        (changed_table(lambda t: t[TRAIN]["rows"].pop("without")), f"{TRAIN}: rows", ["without", "missing"]),
        (changed_table(lambda t: t[TRAIN]["rows"].update(rows=1)), f"{TRAIN}: rows", ["unknown", "'rows';", "without"]),
        (
            changed_table(lambda t: t[TRAIN]["rows"].update(context="(")),
            f"{TRAIN}: rows: context",
            [REGEX],
        ),
        (
            changed_table(lambda t: t[TRAIN]["rows"].update(without=5)),
            f"{TRAIN}: rows: without",
            [REGEX],
        ),
    ],
)
def test_a_wrong_table_is_named_with_its_key(tmp_path, text, key, words):
    path = tmp_path / "corrections.yaml"
    path.write_text(text, encoding="latin-1")
    with refuses(*words, file=path, key=key):
        load_corrections(path)


def test_a_table_that_is_not_there(tmp_path):
    with refuses("cannot be read|unreadable", "No such file", "git", file=tmp_path / "corrections.yaml"):
        load_corrections(tmp_path / "corrections.yaml")


def test_the_table_read_has_compiled_expressions_and_no_rows_where_the_whole_file_is_meant():
    table = load_corrections()
    assert table[TFNS].rows is None
    without = table[TRAIN].rows.without
    assert without.search("buy $ABC") and not without.search("for $5")


def test_only_the_files_of_the_table_are_corrected_and_only_with_their_own_bytes(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"hello\n")
    sha1 = "ce013625030ba8dba906f756967f9e9ca394464a"
    entry = Correction(git_blob_sha1=sha1, labels={"a": "b", "b": "a"}, evidence="made up")
    monkeypatch.setattr("finlora.data.corrections.load_corrections", lambda: {"test/a.jsonl": entry})
    assert applies("test/a.jsonl", path) is True
    assert applies("test/b.jsonl", path) is False
    path.write_bytes(b"hello!\n")
    assert applies("test/a.jsonl", path) is False
