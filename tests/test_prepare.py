"""finlora.data.prepare: what goes in comes out, split without near-duplicates across, and is never half there."""

import csv
import hashlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from failures import failed, refuses, says
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from finlora import cli
from finlora.core.errors import UserError
from finlora.core.paths import ROOT
from finlora.data import audit as auditing
from finlora.data import corrections
from finlora.data import fetch as fetching
from finlora.data import prepare as preparing
from finlora.data.neardup import near_duplicate_groups, normalise
from finlora.data.prepare import Options, _choose_groups, refresh, why_stale
from finlora.data.rows import read_rows
from finlora.data.tasks import load_tasks

SHARED = ROOT.parent / "shared" / "finlora" / "data"
SAMPLE = ROOT / "data" / "sample"
NO_MIXTURE = {"repeated": 0, "not_sampled": 0}


def prepare(task: str, raw: Path | None = None, out: Path | None = None, **options: object) -> dict:
    """What prepared.json holds."""
    if "file" in options:
        options["file"] = str(options["file"])
    return preparing.prepare(task, raw, out, Options(**options)).model_dump()


def is_current(*place: object, **folders: Path) -> bool:
    return why_stale(*place, **folders) is None


def rows_of(path: Path) -> list[tuple[str, str]]:
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        user, assistant = json.loads(line)["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        rows.append((user["content"], assistant["content"]))
    return rows


def write_rows(path: Path, rows: list[tuple[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps({"context": context, "target": target}) + "\n" for context, target in rows)
    path.write_text(text, encoding="utf-8")
    return path


def distinct_rows(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Rows that share next to no words."""
    draw = random.Random(seed)
    return [
        (" ".join(f"{draw.getrandbits(40):x}" for _ in range(20)), draw.choice(["positive", "neutral", "negative"]))
        for _ in range(count)
    ]


def published(tmp_path: Path, rows: list[tuple[str, object]], task: str = "xbrl_term") -> Path:
    raw = tmp_path / "raw"
    write_rows(raw / load_tasks()[task].train, rows)
    return raw


def command(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "finlora", "prepare", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )


def test_messages_counts_and_checksums(tmp_path):
    rows = distinct_rows(100)
    raw = published(tmp_path, rows)
    record = prepare("xbrl_term", raw, tmp_path / "out")
    train, validation = rows_of(tmp_path / "out" / "train.jsonl"), rows_of(tmp_path / "out" / "validation.jsonl")
    assert record["rows"] == {"read": 100, "left_out": 0, **NO_MIXTURE, "train": 98, "validation": 2}
    assert train == [row for row in rows if row not in validation]  # in file order
    assert sorted(train + validation) == sorted(rows)
    assert record == json.loads((tmp_path / "out" / "prepared.json").read_text())
    source = raw / "train" / "xbrl_term_train.jsonl"
    assert record["sources"][0]["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    for name, digest in record["outputs"].items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == digest
    assert not list((tmp_path / "out").glob(".*"))


def test_texts_are_kept_exactly(tmp_path):
    rows = [
        ("  Answer: ", " yes\n"),
        ("5 € – «a» \u2028 📈 \ufeff", "増加"),
        ('"\\\t\r\n\x7f\x01', "'"),
        ("How much?", 15092.44),
        ("How many?", 0),
        ("a", "1e3"),
    ]
    prepare("xbrl_term", published(tmp_path, rows), tmp_path / "out")
    assert rows_of(tmp_path / "out" / "train.jsonl") == [(context, str(target)) for context, target in rows]


def test_same_bytes_in_another_process(tmp_path):
    digests = set()
    for number, hash_seed in enumerate(["0", "1"]):
        out = tmp_path / str(number)
        done = subprocess.run(
            [sys.executable, "-m", "finlora", "prepare", "general_multi", "--raw", SAMPLE, "--out", out],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        digests.add(tuple((out / name).read_bytes() for name in ("train.jsonl", "validation.jsonl", "prepared.json")))
    assert len(digests) == 1


def test_bytes_do_not_change_unseen(tmp_path):
    """If this fails because the output is meant to differ, raise finlora.data.prepare.FORMAT and renew the
    checksums."""
    record = prepare("xbrl_term", published(tmp_path, distinct_rows(50)), tmp_path / "out")
    assert record["format"] == 2
    assert record["outputs"] == GOLDEN


GOLDEN = {
    "train.jsonl": "134a341ffc63b9ad7d2c5ee92287376b681f0fcc325768fa925995aaeeb2bb28",
    "validation.jsonl": "c268958e0a6d6bc4cc9ce6859388dcb488f2411875fb98bde741ec1cbe4bc1f1",
}


def test_seed_and_share_decide_the_split(tmp_path):
    raw = published(tmp_path, distinct_rows(200))
    splits = {}
    for seed, share in (42, 0.02), (7, 0.02), (42, 0.1), (42, 0.0):
        record = prepare("xbrl_term", raw, tmp_path / "out", seed=seed, validation=share)
        assert record["rows"]["validation"] == round(200 * share)
        path = tmp_path / "out" / "validation.jsonl"
        assert path.exists() == (share > 0)
        splits[seed, share] = path.read_bytes() if share else b""
    assert splits[42, 0.02] != splits[7, 0.02]
    assert set(splits[42, 0.02].splitlines()) < set(splits[42, 0.1].splitlines())


@pytest.mark.parametrize("count, held_out", [(1, 0), (9, 0), (10, 1), (49, 1), (100, 2)])
def test_small_files(count, held_out, tmp_path):
    record = prepare("xbrl_term", published(tmp_path, distinct_rows(count)), tmp_path / "out")
    assert (record["rows"]["train"], record["rows"]["validation"]) == (count - held_out, held_out)


@pytest.mark.parametrize("task", ["sentiment", "headline", "finer", "formula", "general_multi", "analysis_multi"])
def test_no_near_duplicates_across_the_split(task, tmp_path):
    prepare(task, SAMPLE, tmp_path, validation=0.1)
    train = [context for context, _ in rows_of(tmp_path / "train.jsonl")]
    validation = [context for context, _ in rows_of(tmp_path / "validation.jsonl")]
    groups = near_duplicate_groups([*dict.fromkeys(train), *validation])
    count = len(dict.fromkeys(train))
    assert validation and not set(groups[:count]) & set(groups[count:])
    assert not set(map(normalise, train)) & set(map(normalise, validation))


def test_copies_and_near_copies_stay_together_and_are_kept(tmp_path):
    base = distinct_rows(40)
    rows = [row for row in base for _ in range(5)]
    rows += [(context.upper() + " !", target) for context, target in base]
    random.Random(1).shuffle(rows)
    record = prepare("xbrl_term", published(tmp_path, rows), tmp_path / "out", validation=0.1)
    train, validation = rows_of(tmp_path / "out" / "train.jsonl"), rows_of(tmp_path / "out" / "validation.jsonl")
    assert Counter(train + validation) == Counter(rows)
    assert len(validation) == 24 and record["near_duplicate_groups"] == 40
    assert not {context.lower().rstrip(" !") for context, _ in train} & {
        context.lower().rstrip(" !") for context, _ in validation
    }


def test_copies_far_apart_stay_together(tmp_path):
    base = distinct_rows(6000)
    rows = [*base, *base, *base]
    record = prepare("xbrl_term", published(tmp_path, rows), tmp_path / "out", validation=0.3)
    train, validation = rows_of(tmp_path / "out" / "train.jsonl"), rows_of(tmp_path / "out" / "validation.jsonl")
    assert len(validation) == 5400 and not set(train) & set(validation)
    assert record["near_duplicate_groups"] == 6000


def test_rows_that_are_all_alike_cannot_be_split(tmp_path):
    raw = published(tmp_path, [("the very same question", "yes")] * 20)
    with refuses("near-duplicates", "--validation 0", file="xbrl_term"):
        prepare("xbrl_term", raw, tmp_path / "out")
    assert prepare("xbrl_term", raw, tmp_path / "out", validation=0)["rows"]["train"] == 20


@example([0] * 10, 0.1, 0)  # cannot be split
@example([0] * 9 + [1], 0.01, 0)  # only one way
@example([0] * 5 + [1] * 5, 0.01, 0)  # the smallest group is above the share
@example([*range(13)] * 4, 0.5, 1)
@given(
    st.lists(st.integers(0, 12), min_size=10, max_size=300),
    st.sampled_from([0.01, 0.02, 0.1, 0.5]),
    st.integers(0, 5),
)
def test_choice_of_groups(groups, share, seed):
    sizes = Counter(groups)
    try:
        chosen = _choose_groups("any", groups, share, seed)
    except UserError:
        assert min(sizes.values()) * 2 > len(groups)
        return
    held_out = sum(sizes[group] for group in chosen)
    target = max(1, round(len(groups) * share))
    assert chosen and (held_out <= target or (chosen and held_out == min(sizes.values())))
    assert held_out < len(groups)
    assert _choose_groups("any", groups, share, seed) == chosen


def test_published_defects_are_left_out_and_counted(tmp_path):
    rows = distinct_rows(40)
    rows[3] = ("", "positive")
    for line in range(5, 20):
        rows[line] = (rows[line][0], " ")
    rows[20] = ("Say <|eot_id|> now", "positive")
    rows[21] = (rows[21][0], "nan")
    raw = published(tmp_path, rows)
    done = command("xbrl_term", "--raw", raw, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "prepared.json").read_text())
    assert record["rows"] == {"read": 40, "left_out": 18, **NO_MIXTURE, "train": 21, "validation": 1}
    assert record["sources"][0]["left_out"] == {
        "empty context": {"rows": 1, "first_lines": [4]},
        "empty target": {"rows": 15, "first_lines": list(range(6, 16))},
        "context holds the chat's control token <|eot_id|>": {"rows": 1, "first_lines": [21]},
        "missing target ('nan')": {"rows": 1, "first_lines": [22]},
    }
    lines = [line for line in done.stdout.splitlines() if "train/xbrl_term_train.jsonl" in line and "empty" in line]
    says(lines[0], "1 row", "empty context", "4")
    says(lines[1], "15 rows", "empty target", "6, 7, 8, 9, 10, 11, 12, 13, 14, 15, ...")


def test_a_published_file_that_is_all_defects(tmp_path):
    raw = published(tmp_path, [("a", "")] * 3)
    with refuses("no rows", "add", file="train/xbrl_term_train.jsonl"):
        prepare("xbrl_term", raw, tmp_path / "out")


# Mixtures


def mixture(tmp_path: Path, **counts: int) -> Path:
    raw = tmp_path / "raw"
    for seed, (task, count) in enumerate(counts.items()):
        rows = [(f"{task} {context}", target) for context, target in distinct_rows(count, seed)]
        write_rows(raw / load_tasks()[task].train, rows)
    return raw


def test_mixture_is_balanced_to_its_largest_task(tmp_path):
    raw = mixture(tmp_path, financebench=30, xbrl_extract=200, formula=70)
    record = prepare("analysis_multi", raw, tmp_path / "out")
    assert record["origin"] == "single tasks"
    train, validation = rows_of(tmp_path / "out" / "train.jsonl"), rows_of(tmp_path / "out" / "validation.jsonl")
    assert len(validation) == len(set(validation)) == 6 and not set(train) & set(validation)
    assert len(set(train)) == 294
    per_task = Counter(context.split()[0] for context, _ in train)
    assert len(set(per_task.values())) == 1 and set(per_task) == {"financebench", "xbrl_extract", "formula"}
    for task in per_task:
        copies = Counter(row for row in train if row[0].startswith(f"{task} "))
        assert max(copies.values()) - min(copies.values()) <= 1  # no row more than once above another
    assert record["rows"]["repeated"] == len(train) - 294
    assert record["rows"]["train"] == len(train)


def test_mixture_takes_its_own_file_when_it_is_there(tmp_path):
    raw = mixture(tmp_path, finer=20, xbrl_term=20)
    assert prepare("reporting_multi", raw, tmp_path / "out")["origin"] == "single tasks"
    assert is_current("reporting_multi", raw, tmp_path / "out")
    write_rows(raw / "train" / "multi" / "reporting_multi.jsonl", distinct_rows(12))
    says(why_stale("reporting_multi", raw, tmp_path / "out"), "files", file=tmp_path / "out" / "prepared.json")
    record = prepare("reporting_multi", raw, tmp_path / "out")
    assert (record["origin"], record["rows"]["read"]) == ("published file", 12)


@pytest.mark.parametrize(
    ("task", "counts", "rows"),
    [
        # As data/create_multitask_datasets.py of FinLoRA: to the rows of NER; to those of the others' largest.
        ("general_multi", {"sentiment": 90, "headline": 60, "ner": 40}, {"repeated": 0, "not_sampled": 70}),
        ("analysis_multi", {"financebench": 30, "xbrl_extract": 70, "formula": 50}, {"repeated": 60, "not_sampled": 0}),
    ],
)
def test_mixture_as_finloras_script_makes_it(task, counts, rows, tmp_path):
    raw = mixture(tmp_path, **counts)
    write_rows(raw / load_tasks()[task].train, distinct_rows(12))  # FinLoRA's own file is left aside
    record = prepare(task, raw, tmp_path / "out", validation=0, mixture="finlora")
    assert record["origin"] == "single tasks" and {key: record["rows"][key] for key in rows} == rows
    train = rows_of(tmp_path / "out" / "train.jsonl")
    each = min(counts.values()) if rows["not_sampled"] else max(counts.values())
    assert Counter(context.split()[0] for context, _ in train) == dict.fromkeys(counts, each)
    if rows["not_sampled"]:
        assert len(set(train)) == len(train)  # a sample
    else:
        for task in counts:  # whole copies, then the first rows
            rows = [row for row in train if row[0].startswith(f"{task} ")]
            assert len(set(rows)) == counts[task] and rows == (rows[: counts[task]] * 3)[:70], task
    with refuses(GONE, "`make data TASK=finer`", file=raw / "train" / "finer_train_batched.jsonl"):
        prepare("reporting_multi", raw, tmp_path / "other", mixture="finlora")


@pytest.mark.parametrize(
    ("mixture", "files"), [("balanced", ["general_multi"]), ("finlora", ["sentiment", "headline", "ner"])]
)
def test_what_a_mixture_is_made_of_is_fetched(mixture, files, monkeypatch):
    asked = []
    monkeypatch.setattr(fetching, "run", lambda tasks, *_: asked.append(tasks))
    monkeypatch.setattr(preparing, "run", lambda tasks, raw, out, options: asked.append((tasks, options.mixture)))
    cli.call(["data", "general_multi", "--mixture", mixture])
    assert asked == [files, (["general_multi"], mixture)]


def test_mixture_with_a_task_missing(tmp_path):
    raw = mixture(tmp_path, finer=20)
    with refuses(
        "is not there|not found", "`make data TASK=reporting_multi`", file=raw / "train" / "xbrl_term_train.jsonl"
    ):
        prepare("reporting_multi", raw, tmp_path / "out")


# Corrections


def test_corrected_and_published_labels(tmp_path, monkeypatch):
    tweet = (
        "Instruction: What is the sentiment of this tweet? Please choose an answer from {negative/neutral/positive}."
        "\nInput: %s\nAnswer: "
    )
    rows = [(tweet % context, target) for context, target in distinct_rows(30)]
    rows += [(tweet % f"$ABC {context}", target) for context, target in distinct_rows(20, seed=1)]
    rows += distinct_rows(20, seed=2)
    raw = published(tmp_path, rows, "sentiment")
    content = (raw / "train" / "finlora_sentiment_train.jsonl").read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    # The table's own expressions, for this file instead of the published one.
    text = corrections.TABLE.read_text(encoding="utf-8")
    table = tmp_path / "corrections.yaml"
    pinned = corrections.load_corrections()["train/finlora_sentiment_train.jsonl"].git_blob_sha1
    table.write_text(text.replace(pinned, blob), encoding="utf-8")
    load = corrections.load_corrections
    monkeypatch.setattr(corrections, "load_corrections", lambda: load(table))
    monkeypatch.setattr(preparing, "CORRECTIONS", table)

    exchanged = {"neutral": "positive", "positive": "neutral", "negative": "negative"}
    expected = [(context, exchanged[target]) for context, target in rows[:30]] + rows[30:]
    changed = sum(target != "negative" for _, target in rows[:30])
    record = prepare("sentiment", raw, tmp_path / "out", validation=0)
    assert rows_of(tmp_path / "out" / "train.jsonl") == expected
    assert (record["sources"][0]["corrected"], record["sources"][0]["unsure"]) == (changed, 20)
    assert is_current("sentiment", raw, tmp_path / "out")
    table.write_text(table.read_text(encoding="utf-8") + "# another thought\n", encoding="utf-8")
    says(why_stale("sentiment", raw, tmp_path / "out"), "changed", "sentiment", file=table)

    record = prepare("sentiment", raw, tmp_path / "out", validation=0, labels="published")
    assert rows_of(tmp_path / "out" / "train.jsonl") == rows
    assert record["sources"][0]["corrected"] == 0 and record["settings"]["labels"] == "published"
    assert record["corrections_sha256"] is None


def test_another_file_under_the_published_name_is_not_corrected(tmp_path):
    record = prepare("sentiment", SAMPLE, tmp_path)
    assert (record["sources"][0]["corrected"], record["sources"][0]["unsure"]) == (0, 0)


# One's own rows


def test_own_csv_with_other_column_names(tmp_path):
    own = tmp_path / "exam.csv"
    rows = [(context, "ABC"[number % 3]) for number, (context, _) in enumerate(distinct_rows(30))]
    with open(own, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("id", "Q", "A"), *((number, *row) for number, row in enumerate(rows))])
    done = command("cfa", "--file", own, "--context-column", "Q", "--target-column", "A", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    assert sorted(rows_of(out / "train.jsonl") + rows_of(out / "validation.jsonl")) == sorted(rows)
    assert is_current("cfa", out=out)
    record = json.loads((out / "prepared.json").read_text())
    assert record["origin"] == "own file" and record["sources"][0]["path"] == str(own)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "csv.gz", "parquet"])
def test_every_kind_of_own_file_gives_the_same_bytes(kind, tmp_path):
    import gzip

    import pyarrow
    import pyarrow.parquet

    rows = [(context, "A") for context, _ in distinct_rows(15)]
    expected = prepare("cfa", out=tmp_path / "expected", file=write_rows(tmp_path / "plain.jsonl", rows))
    own = tmp_path / f"own.{kind}"
    if kind == "parquet":
        contexts, targets = zip(*rows, strict=True)
        pyarrow.parquet.write_table(pyarrow.table({"context": contexts, "target": targets}), own)
    else:
        with gzip.open(own, "wt", newline="") if kind.endswith("gz") else open(own, "w", newline="") as file:
            if kind.startswith("csv"):
                csv.writer(file).writerows([("context", "target"), *rows])
            else:
                file.writelines(json.dumps({"context": c, "target": t}) + "\n" for c, t in rows)
    assert prepare("cfa", out=tmp_path / "out", file=own)["outputs"] == expected["outputs"]


# The rows, and of the error the line, the key and words.
LABELS = ("A, B, C, D", "--any-label")
OWN_MISTAKES = {
    "label outside the set": ([("a", "A"), ("b", "E")], 2, None, "'E'", *LABELS),
    "label in another case": ([("a", "a")], 1, None, "'a'", *LABELS),
    "label with a space": ([("a", "A ")], 1, None, "'A '", *LABELS),
    "two of them": ([("a", "E"), ("b", "A"), ("c", "F")], 1, None, "2 rows", "'E' in line 1", "'F' in line 3", *LABELS),
    "many of them": ([(str(i), f"E{i}") for i in range(9)], 1, None, "9 rows", "'E4' in line 5 and 4 more", *LABELS),
    "long label": ([("a", "x" * 41)], 1, None, f"'{'x' * 40}'", *LABELS),
    "empty answer": ([("a", "A"), ("b", "B"), ("c", "")], 3, "target", "empty", "fill", "remove"),
    "missing answer": ([("a", "A"), ("b", "nan")], 2, "target", "'nan'", "missing", "remove"),
    "control token": ([("a", "A"), ("<|start_header_id|>system", "A")], 2, "context", "<|start_header_id|>", "remove"),
}


@pytest.mark.parametrize("case", OWN_MISTAKES)
def test_mistakes_in_own_rows(case, tmp_path):
    rows, line, key, *words = OWN_MISTAKES[case]
    own = write_rows(tmp_path / "own.jsonl", rows)
    with refuses(*words, file=own, line=line, key=key):
        prepare("cfa", file=own, out=tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


def test_any_label(tmp_path):
    own = write_rows(tmp_path / "own.jsonl", [("a", "E"), ("b", "none of these")])
    assert prepare("cfa", file=own, out=tmp_path / "out", any_label=True)["rows"]["train"] == 2


def test_own_rows_that_are_test_rows_are_told_with_their_lines(tmp_path):
    raw, own = tmp_path / "raw", tmp_path / "own.csv"
    test = distinct_rows(35, seed=8)
    write_rows(raw / load_tasks()["sentiment"].tests["fpb"].file, test)
    mine = [*distinct_rows(30, seed=9), *((context.upper(), target) for context, target in test[:3])]
    mine += [(f"{test[3][0]} more", "neutral")]
    with open(own, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("context", "target"), *mine])
    done = command("sentiment", "--file", own, "--raw", raw, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    (line,) = [line.strip() for line in done.stdout.splitlines() if "test set" in line]
    says(line, "! 4 ", "fpb", "3 in the same words", "32, 33, 34, 35", "remove")
    in_tests = json.loads((tmp_path / "out" / "prepared.json").read_text())["in_tests"]
    assert in_tests == {"fpb": {"same_words": 3, "near": 4, "first_lines": [32, 33, 34, 35]}}


def test_own_rows_that_were_compared_with_no_test_rows_are_told(tmp_path, capsys):
    raw, out = tmp_path / "raw", tmp_path / "out"
    own = write_rows(tmp_path / "own.jsonl", distinct_rows(12, seed=9))
    tests = [raw / test.file for test in load_tasks()["sentiment"].tests.values()]
    for absent in range(len(tests), -1, -1):
        for _ in range(2):  # the second time nothing is new
            preparing.run(["sentiment"], raw, out, Options(file=str(own)))
            told = capsys.readouterr().out
            lines = [line for line in told.splitlines() if "not checked" in line]
            assert len(lines) == bool(absent)
            assert sum(str(path.relative_to(raw)) in line for path in tests for line in lines) == absent
        assert "already there" in told
        if absent:
            write_rows(tests[absent - 1], distinct_rows(3, seed=absent))


def test_only_what_is_prepared_is_called_prepared_again(tmp_path, capsys):
    own, out = write_rows(tmp_path / "own.jsonl", distinct_rows(12)), tmp_path / "out"
    preparing.run(["xbrl_term"], None, out, Options(file=str(own)))
    before = {path: path.read_bytes() for path in out.iterdir()}
    write_rows(own, [*distinct_rows(12), ("a", "nan")])
    capsys.readouterr()
    with refuses("missing", file=own, line=13):
        preparing.run(["xbrl_term"], None, out, Options(file=str(own)))
    assert "again" not in capsys.readouterr().out and {path: path.read_bytes() for path in out.iterdir()} == before


def test_columns_that_are_not_used_are_named(tmp_path):
    own = tmp_path / "own.csv"
    own.write_text("id,context,target,url\n1,a,A,x\n2,b,B,y\n")
    done = command("cfa", "--file", own, "--out", tmp_path / "out")
    preview, summary = [line for line in done.stdout.splitlines() if "not used" in line]
    says(preview.strip(), "id, url")
    says(summary.strip(), "id, url")


def test_a_record_of_an_earlier_format_keeps_its_options(tmp_path):
    """FORMAT 1 had no `mixture`, `unused` and `in_tests`; the own rows and options are taken again."""
    own, out = write_rows(tmp_path / "own.jsonl", distinct_rows(20)), tmp_path / "out"
    prepare("xbrl_term", out=out, file=own, seed=7)
    record = json.loads((out / "prepared.json").read_text()) | {"format": 1}
    del record["in_tests"], record["settings"]["mixture"], record["sources"][0]["unused"]
    (out / "prepared.json").write_text(json.dumps(record))
    says(why_stale("xbrl_term", out=out), "version", "validation split", file=out / "prepared.json")
    again = refresh("xbrl_term", out=out)
    assert (again.settings.file, again.settings.seed, again.format) == (str(own), 7, 2)
    assert is_current("xbrl_term", out=out)


def test_own_rows_are_not_replaced_unasked(tmp_path):
    raw = published(tmp_path, distinct_rows(20))
    own = write_rows(tmp_path / "own.jsonl", distinct_rows(12, seed=5))
    out = tmp_path / "out"
    options = ("xbrl_term", "--raw", raw, "--out", out)
    assert command(*options, "--file", own, "--seed", 7).returncode == 0
    assert command(*options, "--file", own, "--seed", 7).stdout.endswith("(already there)\n")
    failed(command(*options), f"{own}", "--file", "remove the folder", file=out)
    write_rows(own, distinct_rows(14, seed=5))
    says(why_stale("xbrl_term", raw, out), "changed", "xbrl_term", file=own)
    record = refresh("xbrl_term", raw, out)
    assert record.sources[0].rows == 14 and record.settings.seed == 7
    own.unlink()
    says(why_stale("xbrl_term", raw, out), GONE, "check the path", file=own)


def test_refresh_without_a_record_takes_the_published_file(tmp_path):
    raw = published(tmp_path, distinct_rows(20))
    assert refresh("xbrl_term", raw, tmp_path / "out").origin == "published file"


# What counts as current


GONE = "is not there|not found|does not exist"


def test_current_until_something_changes(tmp_path):
    raw, out = published(tmp_path, distinct_rows(30)), tmp_path / "out"
    source = raw / "train" / "xbrl_term_train.jsonl"
    prepared = out / "prepared.json"
    says(why_stale("xbrl_term", raw, out), GONE, file=prepared)
    record = prepare("xbrl_term", raw, out)
    assert is_current("xbrl_term", raw, out)
    assert why_stale("xbrl_term", raw, out, Options()) is None
    says(why_stale("xbrl_term", raw, out, Options(seed=1)), "other options|different options", file=prepared)
    says(why_stale("headline", raw, out), "version", "task", file=prepared)

    os.utime(source, (1, 1))
    assert is_current("xbrl_term", raw, out)  # by content, not by time
    stamp = source.stat()
    content = source.read_bytes()
    source.write_bytes(content[:-5] + b"y" + content[-4:])
    os.utime(source, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    says(why_stale("xbrl_term", raw, out), "changed", "xbrl_term", file=source)
    source.write_bytes(content)
    assert is_current("xbrl_term", raw, out)

    for name in record["outputs"]:
        kept = (out / name).read_bytes()
        (out / name).write_bytes(kept[:-1])
        says(why_stale("xbrl_term", raw, out), "changed", "xbrl_term", file=out / name)
        (out / name).unlink()
        says(why_stale("xbrl_term", raw, out), GONE, "check the path", file=out / name)
        (out / name).write_bytes(kept)
    source.unlink()
    says(why_stale("xbrl_term", raw, out), GONE, "`make data TASK=xbrl_term`", file=source)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_record_is_never_current(tmp_path, data):
    raw, out = tmp_path / "raw", tmp_path / "out"
    if not out.exists():
        prepare("xbrl_term", published(tmp_path, distinct_rows(12)), out)
        (tmp_path / "kept.json").write_bytes((out / "prepared.json").read_bytes())
    content = (tmp_path / "kept.json").read_bytes()
    record = json.loads(content)
    if data.draw(st.booleans()):
        key = data.draw(st.sampled_from(["task", "format", "settings", "sources", "outputs", "corrections_sha256"]))
        record[key] = data.draw(st.sampled_from([0, None, "x", [], ["x"], {"x": "y"}, {"x": 5}]))
        damaged = json.dumps(record).encode()
        harmless = key == "corrections_sha256" and record[key] is None
    else:
        damaged = content[: data.draw(st.integers(0, len(content) - 3))]
        harmless = False
    (out / "prepared.json").write_bytes(damaged)
    assert harmless or why_stale("xbrl_term", raw, out)


def test_same_command_twice_does_nothing(tmp_path):
    raw, out = published(tmp_path, distinct_rows(30)), tmp_path / "out"
    first = command("xbrl_term", "--raw", raw, "--out", out)
    stamps = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = command("xbrl_term", "--raw", raw, "--out", out)
    assert again.stdout == f"{first.stdout.rstrip()} (already there)\n"
    assert stamps == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    other = command("xbrl_term", "--raw", raw, "--out", out, "--seed", 1).stdout
    assert "(already there)" not in other
    says(other.splitlines()[0], "options", "again", file=out / "prepared.json")


# Mistakes of the person who types


def test_mistakes_in_the_options(tmp_path):
    raw, out = published(tmp_path, distinct_rows(30)), tmp_path / "out"
    with refuses("tasks.yaml", "sentiment", key="sentimnt"):
        prepare("sentimnt", raw, out)
    with refuses(GONE, "`make data TASK=headline`", file=raw / "train" / "headline_train.jsonl"):
        prepare("headline", raw, out)
    with refuses("not released", "`make data TASK=cfa FILE=", file=raw / "train" / "cfa_train.jsonl"):
        prepare("cfa", raw, out)
    with refuses(GONE, "check the path", file=tmp_path / "no.jsonl"):
        prepare("cfa", raw, out, file=tmp_path / "no.jsonl")
    with refuses("context", "target", "both", file=tmp_path / "no.jsonl", key="text"):
        prepare("cfa", raw, out, file=tmp_path / "no.jsonl", context_column="text", target_column="text")
    for share in 0.51, -0.01, float("nan"):
        with refuses("validation|--validation", f"{share}", "0 to 0.5"):
            prepare("xbrl_term", raw, out, validation=share)
    assert prepare("xbrl_term", raw, out, validation=0.5)["rows"]["validation"] == 15


def test_under_make_the_remedies_are_what_make_takes(tmp_path, monkeypatch):
    monkeypatch.setenv("MAKELEVEL", "1")
    own = tmp_path / "own.csv"
    own.write_text("question,answer\na,A\n")
    with refuses('COLUMNS="', file=own, line=1, key="context"):
        prepare("cfa", file=own, out=tmp_path / "out")
    with refuses('COLUMNS="', file=own, line=1, key="target"):
        prepare("cfa", file=own, out=tmp_path / "out", context_column="question")
    alike = write_rows(tmp_path / "alike.jsonl", [("the same words in each", "A")] * 20)
    with refuses('ARGS="--validation 0"'):
        prepare("cfa", file=alike, out=tmp_path / "out")
    for run in (
        lambda: preparing.run([], None, None, Options(file=str(own))),
        lambda: auditing.run([], tmp_path, tmp_path, Options(file=str(own))),
    ):
        with refuses("FILE=", "one task", "TASK=") as error:
            run()
        assert "--file" not in str(error.value)


def test_mistakes_of_the_command(tmp_path):
    raw, blocked = published(tmp_path, distinct_rows(30)), tmp_path / "blocked"
    blocked.write_text("")
    done = command("xbrl_term", "--raw", raw, "--out", blocked)
    failed(done, "written", "File exists", "folder", file=blocked / "validation.jsonl")
    done = command("xbrl_term", "headline", "--out", tmp_path / "out")
    failed(done, "--file", "--out", "one task", "TASK=")
    assert done.stdout == "" and done.stderr.count("\n") == 1


def test_full_disk_leaves_the_old_files(tmp_path):
    raw, out = published(tmp_path, distinct_rows(2000)), tmp_path / "out"
    prepare("xbrl_term", raw, out)
    before = {path: path.read_bytes() for path in out.iterdir()}
    done = subprocess.run(
        [sys.executable, "-m", "finlora", "prepare", "xbrl_term", "--raw", raw, "--out", out, "--seed", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    failed(done, "written", "File too large", "space", file=out / "train.jsonl")
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_source_that_changes_while_it_is_read(tmp_path, monkeypatch):
    raw, out = published(tmp_path, distinct_rows(30)), tmp_path / "out"
    source = raw / "train" / "xbrl_term_train.jsonl"

    def touching(*arguments, **options):
        for number, row in enumerate(read_rows(*arguments, **options)):
            os.utime(source, (number, number))
            yield row

    monkeypatch.setattr(preparing, "read_rows", touching)
    with refuses("changed", "again", file=source):
        prepare("xbrl_term", raw, out)
    assert not out.exists()


# Killed at any moment


# Forks the command for each line that it reads and kills it at the next: imported once, so that every kill meets work.
NURSERY = """
import os, signal, sys, finlora.data.prepare, finlora.cli
print("ready", flush=True)
for _ in sys.stdin:
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        finlora.cli.main()
        os._exit(0)
    sys.stdin.readline()
    os.kill(child, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def wait(condition, seconds):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.0005)


@pytest.mark.parametrize("least", [12, pytest.param(40, marks=pytest.mark.slow)])
def test_killed_at_any_moment(tmp_path, least):
    """So many kills, a third of them while the outputs are being put in place; two sources take turns."""
    raw, out = tmp_path / "raw", tmp_path / "out"
    source = raw / "train" / "xbrl_term_train.jsonl"
    sources, versions = {}, {}
    for seed in 0, 1:
        sources[seed] = write_rows(source, distinct_rows(3000, seed)).read_bytes()
        prepare("xbrl_term", raw, tmp_path / f"whole{seed}")
        versions[seed] = {path.name: path.read_bytes() for path in (tmp_path / f"whole{seed}").iterdir()}

    draw = random.Random(0)
    kills, midway, whole_run, seen = 0, 0, 0.0, set()
    arguments = [sys.executable, "-uc", NURSERY, "prepare", "xbrl_term", "--raw", raw, "--out", out]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(arguments, cwd=ROOT, **pipes) as nursery:
        nursery.stdout.readline()
        for attempt in range(200):
            if kills >= least and midway >= least / 6:
                break
            seed = attempt % 2
            source.write_bytes(sources[seed])
            old, started = set(out.glob(".train.jsonl.*")), time.monotonic()
            print("go", file=nursery.stdin, flush=True)
            if not attempt:
                wait(lambda: (out / "prepared.json").exists(), 60)
                whole_run = time.monotonic() - started
            elif attempt % 3:
                time.sleep(draw.uniform(0.1, 1) * whole_run)
            else:
                wait(lambda old=old: set(out.glob(".train.jsonl.*")) - old, 2 * whole_run)
                time.sleep(draw.uniform(0, 0.02))
            print("kill", file=nursery.stdin, flush=True)
            kills += int(nursery.stdout.readline()) == -signal.SIGKILL
            midway += bool(set(out.glob(".train.jsonl.*")) - old)
            for name in "train.jsonl", "validation.jsonl", "prepared.json":
                if (out / name).exists():
                    assert (out / name).read_bytes() in [version[name] for version in versions.values()]
            stale = why_stale("xbrl_term", raw, out)
            seen.add(stale and re.sub(r".*[/ ](\S+: )", r"\1", stale))
            if stale is None:
                assert {name: (out / name).read_bytes() for name in versions[seed]} == versions[seed]
        nursery.stdin.close()
    assert kills >= least and midway >= least / 6
    assert None in seen and len(seen) > 1, seen

    for left in out.glob(".*"):
        os.utime(left, (1, 1))
    prepare("xbrl_term", raw, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == versions[seed]


@pytest.mark.skipif(not SHARED.is_dir(), reason="FinLoRA's files are not beside the project")
@pytest.mark.parametrize(
    "task, rows, left_out, held_out", [("formula", 800, 0, 16), ("financebench", 86, 0, 2), ("xbrl_term", 5856, 6, 117)]
)
def test_real_files(task, rows, left_out, held_out, tmp_path):
    record = prepare(task, SHARED, tmp_path)
    assert record["rows"] == {
        "read": rows,
        "left_out": left_out,
        **NO_MIXTURE,
        "train": rows - left_out - held_out,
        "validation": held_out,
    }
    published_rows = []
    with open(SHARED / load_tasks()[task].train, encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            if row["target"] != "nan":
                published_rows.append((row["context"], str(row["target"])))
    assert sorted(rows_of(tmp_path / "train.jsonl") + rows_of(tmp_path / "validation.jsonl")) == sorted(published_rows)
