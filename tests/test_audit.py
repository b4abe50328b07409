"""The audit: each thing it looks for, in files where it is known to be, and the findings in FinLoRA's real files."""

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from failures import failed, refuses, says
from hypothesis import example, given
from hypothesis import strategies as st

from finlora import cli
from finlora.core.files import git_blob_sha1
from finlora.data import audit as data_audit
from finlora.data import corrections
from finlora.data.audit import audit, find_exchange, is_garbled, render
from finlora.data.corrections import load_corrections
from finlora.data.prepare import Options, prepare
from finlora.data.tasks import load_tasks
from finlora.data.tokens import chat

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "finlora" / "data"
TFNS_COUNTS = {"negative": 347, "positive": 475, "neutral": 1566}
TWEET = "Instruction: What is the sentiment of this tweet? Please choose an answer from {negative/neutral/positive}.\n"


def write(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"context": context, "target": target}, ensure_ascii=False) for context, target in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def words(rng: random.Random, count: int) -> str:
    return " ".join(f"w{rng.randrange(10**6)}" for _ in range(count))


def look(task: str, raw: Path, **options) -> dict:
    return audit(task, raw, **({"count_tokens": False} | options))


def finding_with(report: dict, *words: str) -> dict:
    """The one finding that has all these words; they are names and figures, and what tells it from the others."""
    matching = [finding for finding in report["findings"] if all(word in finding["finding"] for word in words)]
    assert len(matching) == 1, [finding["finding"] for finding in report["findings"]]
    return matching[0]


def figures(finding: dict) -> list[int]:
    return [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", finding["finding"])]


def entry(report: dict, role: str) -> dict:
    return next(file for file in report["files"] if file["role"] == role)


def command(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "finlora", "audit", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )


# The exchange of labels


LABELS = st.lists(st.sampled_from("abcdefghi"), unique=True)


@example(["c", "a", "b"], [1, 2, 3])  # three in a ring
@example(["b", "a", "c"], [1, 2, 1])  # the counts cannot tell "a" from "c"
@given(LABELS.flatmap(st.permutations), st.lists(st.integers(1, 10**6) | st.integers(1, 9), min_size=9, max_size=9))
def test_an_exchange_of_labels_is_found_whenever_the_counts_tell_it(shuffled, numbers):
    documented = dict(zip(sorted(shuffled), numbers, strict=False))
    renaming = dict(zip(documented, shuffled, strict=True))  # right label -> what the file calls it
    counts = {renaming[label]: documented[label] for label in documented}
    exchange = find_exchange(counts, documented)
    moved = [documented[label] for label in documented if counts[label] != documented[label]]
    if len(set(moved)) < len(moved):
        assert exchange is None
    else:
        assert Counter({exchange.get(label, label): counts[label] for label in counts}) == Counter(documented)
        assert all(counts[label] != documented[label] for label in exchange)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"a": 1, "b": 2}, {}),
        ({"a": 2, "b": 1}, {"a": "b", "b": "a"}),
        ({"a": 2, "b": 2}, None),
        ({"a": 1, "b": 2, "c": 1}, None),
        ({"a": 1}, None),
        ({}, None),
    ],
)
def test_other_counts_are_no_exchange(counts, expected):
    assert find_exchange(counts, {"a": 1, "b": 2}) == expected


def tfns_rows(counts: dict[str, int]):
    rng = random.Random(1)
    return [(f"{TWEET}Input: {words(rng, 9)}\nAnswer: ", label) for label, n in counts.items() for _ in range(n)]


def test_exchanged_labels_are_found_from_the_counts_alone(tmp_path):
    swapped = {"negative": 347, "neutral": 475, "positive": 1566}
    write(tmp_path / "test/tfns_test.jsonl", tfns_rows(swapped))
    finding = finding_with(look("sentiment", tmp_path), "exchanged")
    assert re.search("'positive'.* neutral, .*'neutral'.* positive", finding["finding"])
    # These are not the published bytes, so nothing corrects them, and a person has to look.
    assert finding["attention"]
    says(finding["done"], "not corrected", "data/corrections.yaml")


def test_labels_that_agree_with_the_source_are_no_finding(tmp_path):
    write(tmp_path / "test/tfns_test.jsonl", tfns_rows(TFNS_COUNTS))
    assert not [f for f in look("sentiment", tmp_path)["findings"] if "exchanged" in f["finding"]]


def test_counts_that_no_exchange_explains_need_attention(tmp_path):
    write(tmp_path / "test/tfns_test.jsonl", tfns_rows({"negative": 347, "neutral": 476, "positive": 1565}))
    finding = finding_with(look("sentiment", tmp_path), "counts", "source")
    assert finding["attention"] and "neutral 476, positive 1,565" in finding["finding"]


# What rows show by themselves


def test_repeats_conflicts_leaks_numbers_and_garbled_rows_are_counted_with_their_lines(tmp_path):
    rng = random.Random(2)
    base = [words(rng, 30) for _ in range(6)]
    train = [
        (base[0], "1.5"),
        (base[1], "12,000"),
        (base[0], "1.5"),  # 3: letter for letter
        (base[1].upper() + " !", "12,001"),  # 4: the words of 2, another answer
        (base[2] + " J+ñtehuolto", "-3%"),  # 5
        (base[2] + " J+ñtehuolto more", "x"),  # 6: nearly 5
    ]
    test = [
        (base[3], "1"),
        (base[1].title(), "2"),  # 2: in the train file, in the same words
        (base[0] + " more", "25"),  # 3: in the train file, nearly
    ]
    write(tmp_path / "train/formula_train.jsonl", train)
    write(tmp_path / "test/formula_test.jsonl", test)
    report = look("formula", tmp_path)
    file = entry(report, "train")
    assert (file["rows"], file["different_answers"], file["answers_that_are_numbers"]) == (6, 5, 5)
    assert file["repeats"] == {"exact": 1, "same_words": 2, "near": 3}
    assert (file["conflicts"], file["garbled"]) == (2, 2)
    assert file["longest"] == {"bytes": len((train[5][0] + "x").encode()), "words": 33, "line": 6}
    repeats = finding_with(report, "near", "earlier")
    assert repeats["first_lines"] == [3, 4, 6] and figures(repeats) == [3, 2, 1]
    conflicts = finding_with(report, "different answer")
    assert conflicts["first_lines"] == [2, 4] and figures(conflicts) == [2]
    assert finding_with(report, "garbled")["first_lines"] == [5, 6]
    assert entry(report, "formula")["in_train"] == {"same_words": 1, "near": 2}
    leak = finding_with(report, "train/formula_train.jsonl")
    assert leak["first_lines"] == [2, 3] and figures(leak) == [2, 1] and not leak["attention"]
    # 25 begins with 2, so FinLoRA's scorer may read a right 25 as 2.
    assert figures(finding_with(report, "begins with")) == [1]


@example([("a b", "x"), ("A  b!", "y"), ("a b", "x"), ("🚀", "z"), ("c", "x"), ("c", "x"), ("c d e", "y")])
@given(st.lists(st.tuples(st.sampled_from(["a b", "A  b!", "c", "c d e", "🚀"]), st.sampled_from("xyz")), min_size=1))
def test_counts_are_those_of_a_plain_computation(tmp_path_factory, rows):
    raw = tmp_path_factory.mktemp("raw")
    write(raw / "train/formula_train.jsonl", rows)
    file = entry(look("formula", raw), "train")
    plain = [context.replace("A  b!", "a b") for context, _ in rows]
    assert file["rows"] == len(rows)
    assert file["labels"] == dict(sorted(Counter(target for _, target in rows).items()))
    assert file["repeats"]["exact"] == len(rows) - len({context for context, _ in rows})
    assert file["repeats"]["same_words"] == len(rows) - len(set(plain))
    answers: dict[str, set[str]] = {}
    for text, (_, target) in zip(plain, rows, strict=True):
        answers.setdefault(text, set()).add(target)
    assert file["conflicts"] == sum(len(answers[text]) > 1 for text in plain)


def test_a_label_outside_the_set_needs_attention(tmp_path):
    rng = random.Random(3)
    rows = [(words(rng, 9), label) for label in ["Yes", "No", "yes", "maybe", "yes", *"abcdef"]]
    write(tmp_path / "train/headline_train.jsonl", rows)
    report = look("headline", tmp_path)
    finding = finding_with(report, "'yes'", "labels", "2 rows")
    assert finding["attention"] and finding["first_lines"] == [3, 5]
    assert finding_with(report, "3 more", "labels")["attention"]


def test_rows_with_nothing_to_learn_need_attention_and_the_others_are_read(tmp_path):
    write(tmp_path / "train/headline_train.jsonl", [("a", "Yes"), ("b", ""), (" ", "No"), ("c", "No"), ("d", " ")])
    report = look("headline", tmp_path)
    assert entry(report, "train")["rows"] == 2
    assert finding_with(report, "2 rows", "empty target")["first_lines"] == [2, 5]
    assert finding_with(report, "1 row", "empty context")["attention"]


def test_own_rows_that_are_test_rows_need_attention_with_their_own_lines(tmp_path):
    rng = random.Random(12)
    test = [(words(rng, 20), "neutral") for _ in range(35)]
    write(tmp_path / "test/fpb_test.jsonl", test)
    own = write(tmp_path / "own.jsonl", [(words(rng, 20), "neutral"), *((text.title(), label) for text, label in test)])
    finding = finding_with(look("sentiment", tmp_path, own=Options(file=str(own))), "test/fpb_test.jsonl")
    assert finding["attention"] and finding["file"] == str(own)
    assert figures(finding) == [35, 35] and finding["first_lines"] == [2, 3, 4, 5, 6]
    says(finding["done"], "remove", "fpb")


def test_columns_that_are_not_read_are_named(tmp_path):
    (tmp_path / "own.csv").write_text("id,context,target,url\n1,what is one,A,x\n")
    finding = finding_with(look("cfa", tmp_path, own=Options(file=str(tmp_path / "own.csv"))), "id, url")
    assert not finding["attention"]


def test_the_rows_that_would_train_are_audited(tmp_path, monkeypatch, capsys):
    """After `make data FILE=` those are the own rows, without being named again."""
    monkeypatch.setattr(data_audit, "RAW", tmp_path / "raw")
    monkeypatch.setattr(data_audit, "PREPARED", tmp_path / "prepared")
    (tmp_path / "own.csv").write_text("Q,A\nwhat is one,A\nwhat is two,none of these\n")
    own = Options(file=str(tmp_path / "own.csv"), context_column="Q", target_column="A", any_label=True)
    prepare("cfa", tmp_path / "raw", tmp_path / "prepared" / "cfa", own)
    assert data_audit.run(["cfa"], data_audit.RAW, tmp_path / "out", count_tokens=False) == 0
    assert entry(json.loads((tmp_path / "out/cfa.json").read_text()), "train")["labels"] == {"A": 1, "none of these": 1}
    says(capsys.readouterr().out.splitlines()[0], "your own rows", file="cfa")
    (tmp_path / "own.csv").unlink()
    with refuses("is not there|not found", file=tmp_path / "own.csv"):
        data_audit.run(["cfa"], data_audit.RAW, tmp_path / "out", count_tokens=False)


def test_a_broken_file_is_audited_up_to_its_flaw(tmp_path):
    path = write(tmp_path / "train/headline_train.jsonl", [("a", "Yes"), ("b", "No")])
    path.write_text(path.read_text() + '{"context": "c"\n')
    report = look("headline", tmp_path)
    assert entry(report, "train")["status"] == "broken" and entry(report, "train")["rows"] == 2
    finding = finding_with(report, "headline_train.jsonl:3: ", "JSON")
    assert finding["attention"]
    assert "headline_train.jsonl" in render(report)


@pytest.mark.parametrize(
    "text",
    [
        "Turun Seudun J+ñtehuolto",
        "publication of Lemmink+ñinen -¦ s history",
        "sell Lazada to Alibaba for Â£90m",
        "Telenet issues a new Ã‚â‚¬510.0 million revolver",
        "whether Boeing鈥檚 margin is useful",
        "crude reserves-\x9dand clean energy",
        "The \ufffd Netherlands",
        "cafÃ© society",
        "don’t" + "x" * 5000 + "â€™",
    ],
)
def test_garbled_text(text):
    assert is_garbled(text)


@pytest.mark.parametrize(
    "text",
    [
        "plain + text - with £5m",
        "a café in Århus; “quotes” – dashes… and 5 €",
        "🚀 to the moon 🤣",
        "北京 市场",
        "Net income rose by +£5m",
        "∑ (R_t / (1 + i)^t) × σ",
        "Größe · 1 000 m² ± 5 °C",
        "☑ Yes ☐ No • item",
    ],
)
def test_text_that_is_not_garbled(text):
    assert not is_garbled(text)


# The sentiment train file's rule, on generated rows whose checksum the table is given


@pytest.fixture
def ruled(tmp_path, monkeypatch):
    """Write the sentiment train file and make the corrections name its checksum; returns its report."""

    def look_at(rows) -> dict:
        file = "train/finlora_sentiment_train.jsonl"
        path = write(tmp_path / file, rows)
        table = {file: load_corrections()[file].model_copy(update={"git_blob_sha1": git_blob_sha1(path)})}
        monkeypatch.setattr(corrections, "load_corrections", lambda: table)
        monkeypatch.setattr(data_audit, "load_corrections", lambda: table)
        return look("sentiment", tmp_path)

    return look_at


def tweets(counts: dict[str, int], times: int, tag: str = ""):
    rng = random.Random(4)
    each = [(f"{TWEET}Input: {tag}{words(rng, 9)}\nAnswer: ", label) for label, n in counts.items() for _ in range(n)]
    return each * times


SWAPPED = {"negative": 15, "neutral": 20, "positive": 65}


def test_certain_and_unsure_rows_of_the_train_file_are_counted_with_their_copies(ruled):
    news = [(f"{TWEET.replace('tweet', 'news')}Input: {i} said\nAnswer: ", "neutral") for i in range(7)]
    report = ruled(tweets(SWAPPED, 2) + tweets({"positive": 3}, 21, "$ABC ") + tweets({"negative": 4}, 2, "$X ") + news)
    certain = finding_with(report, "exchanged", "certain (", "negative 30, neutral 40, positive 130")
    assert figures(certain) == [200, 30, 40, 130, 100, 100, 2]  # rows, by label, texts, and texts that occur 2 times
    unsure = finding_with(report, "exchanged", "unsure")
    assert figures(unsure) == [71, 7, 4, 2, 3, 21]
    assert entry(report, "train")["labels_corrected"] == {"negative": 38, "neutral": 137, "positive": 103}
    assert not [f for f in report["findings"] if f["attention"] and "checksum" not in f["finding"]]


def test_a_file_that_contradicts_the_rule_needs_attention(ruled):
    report = ruled(tweets({"negative": 15, "neutral": 65, "positive": 20}, 2))
    assert finding_with(report, "nearer", "source")["attention"]


def test_corrected_rows_that_are_copied_like_another_data_sets_need_attention(ruled):
    report = ruled(tweets(SWAPPED, 2) + [(f"{TWEET}Input: no cashtag here\nAnswer: ", "positive")] * 21)
    copied = finding_with(report, "21 times or more")
    assert figures(copied) == [21, 21] and copied["attention"]


# Tokens


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A byte-level BPE tokenizer with Llama's special tokens, in a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        ["what is the sentiment of this tweet"] * 3,
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    return folder


def test_tokens_are_those_of_the_whole_chat(tmp_path, tokenizer):
    from tokenizers import Tokenizer

    rng = random.Random(5)
    rows = [(words(rng, rng.randrange(1, 60)) + " {braces} é ", f"{rng.randrange(10**6)}") for _ in range(50)]
    write(tmp_path / "train/formula_train.jsonl", rows)
    encode = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).encode
    chats = [chat([("user", context), ("assistant", target)]) for context, target in rows]
    lengths = [len(encode(text, add_special_tokens=False)) for text in chats]
    limit = sorted(lengths)[-4]
    report = look("formula", tmp_path, tokenizer=tokenizer, sequence_len=limit, count_tokens=True)
    tokens = entry(report, "train")["tokens"]
    assert (tokens["longest"], tokens["all"]) == (max(lengths), sum(lengths))
    assert tokens["line"] == 1 + lengths.index(max(lengths))
    assert tokens["too_long"] == sum(length > limit for length in lengths) <= 3
    finding = finding_with(report, "tokens")
    assert figures(finding) == [tokens["too_long"], limit, max(lengths)]
    assert finding["attention"] and "sequence_len" in finding["done"]
    assert report["measure"] == {"tokenizer": "the tokenizer given", "stand_in": False, "sequence_len": limit}


def test_a_tokenizer_that_is_none_is_refused(tmp_path):
    with refuses("no tokenizer.json", "folder", file=tmp_path / "nowhere"):
        look("formula", tmp_path, tokenizer=tmp_path / "nowhere", count_tokens=True)
    (tmp_path / "tokenizer.json").write_text("{}")
    with refuses("not a tokenizer", "folder", file=tmp_path / "tokenizer.json"):
        look("formula", tmp_path, tokenizer=tmp_path, count_tokens=True)


# The command


def test_the_command_writes_json_prints_a_table_and_fails_only_for_attention(tmp_path):
    rows = [("what is one", "A"), ("what is two", "B")]
    own = write(tmp_path / "mine.jsonl", rows)
    done = command("cfa", "--file", own, "--raw", tmp_path, "--json", tmp_path / "out", "--no-tokens")
    assert done.returncode == 0, done.stderr
    assert "mine.jsonl" in done.stdout and "cfa_level1_test.jsonl" in done.stdout and "not released" in done.stdout
    report = json.loads((tmp_path / "out/cfa.json").read_text(encoding="utf-8"))
    assert report == json.loads(json.dumps(audit("cfa", tmp_path, Options(file=str(own)), count_tokens=False)))
    assert os.listdir(tmp_path / "out") == ["cfa.json"]
    write(own, [*rows, ("what is three", "Z")])
    done = command("cfa", "--file", own, "--raw", tmp_path, "--json", tmp_path / "out", "--no-tokens")
    assert done.returncode == 1
    (line,) = [line for line in done.stdout.splitlines() if "'Z'" in line]
    says(line.strip(), "labels", "1 row", "line 3", file="! mine.jsonl")


@pytest.fixture
def run_main(monkeypatch):
    """The command in this process: its mistakes are raised, and it ends with exit code 0."""

    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["audit", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.call(sys.argv)
        assert ended.value.code in (0, False)

    return run


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["audit", "TASK=cfa", "FILE=own rows.csv"], "audit cfa --file 'own rows.csv'"),
        (
            ["data", "TASK=cfa", "FILE=a.csv", "COLUMNS=Q=context,A=target"],
            "data cfa --file 'a.csv' --columns 'Q=context,A=target'",
        ),
        (["data", "TASK=general_multi", "MIXTURE=finlora"], "data general_multi --mixture 'finlora'"),
    ],
)
def test_make_passes_its_variables_on(arguments, options):
    env = os.environ | {"COLUMNS": "80"}  # a terminal's width, and no file's columns
    command = ["make", "-n", *arguments, "VENV=anywhere"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert options in " ".join(done.stdout.split()), done


def test_own_columns_are_read_from_csv(tmp_path, run_main):
    own = tmp_path / "mine.csv"
    own.write_text("question,answer,id\nwhat is one,A,1\nwhat is two,B,2\n")
    run_main(
        *("cfa", "--file", own, "--context-column", "question", "--target-column", "answer"),
        *("--raw", tmp_path, "--json", tmp_path / "out", "--no-tokens"),
    )
    assert entry(json.loads((tmp_path / "out/cfa.json").read_text()), "train")["labels"] == {"A": 1, "B": 1}


@pytest.mark.parametrize(
    ("arguments", "place", "words"),
    [
        (["sentimnt"], None, ["tasks.yaml", "'sentimnt'", "sentiment?"]),
        (["sentiment", "ner", "--file", "x.jsonl"], "--file", ["one task"]),
        (
            ["cfa", "--file", "nowhere.jsonl"],
            str(Path("nowhere.jsonl").absolute()),
            ["is not there|not found", "check the path"],
        ),
        (["headline", "--raw", "nowhere"], "nowhere", ["no file of headline", "`make data`"]),
    ],
)
def test_a_mistake_in_the_options(tmp_path, run_main, arguments, place, words):
    with refuses(*words, file=place):
        run_main(*arguments, "--json", tmp_path, "--no-tokens")


def test_a_mistake_is_one_line_and_exit_code_1(tmp_path):
    done = command("headline", "--raw", tmp_path / "nowhere", "--json", tmp_path, "--no-tokens")
    failed(done, "headline", "`make data`", file=tmp_path / "nowhere")
    assert done.returncode == 1 and done.stderr.count("\n") == 1


def test_absent_files_are_named_with_the_command_that_brings_them(tmp_path):
    text = render(look("sentiment", tmp_path))
    assert text.count("absent: make data TASK=sentiment") == 5


# The real files


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> dict[str, dict]:
    """The reports of the files of data/README.md's figures: which rows are alike depends on the files at hand."""
    if not REAL.is_dir():
        pytest.skip("../shared/finlora/data is not here: the real FinLoRA rows were not audited")
    raw = tmp_path_factory.mktemp("real")
    for file in REAL_FILES:
        (raw / file).parent.mkdir(exist_ok=True)
        (raw / file).symlink_to(REAL / file)
    return {name: look(name, raw) for name, task in load_tasks().items() if not task.mixture_of}


REAL_FILES = [
    *(f"test/{name}_test.jsonl" for name in ("fpb", "fiqa", "tfns", "nwgi", "ner")),
    *(f"test/{name}_test.jsonl" for name in ("xbrl_term", "formula", "financebench")),
    *(f"train/{name}_train.jsonl" for name in ("xbrl_term", "formula", "financebench")),
]


def test_the_swapped_tfns_labels_are_found_in_the_real_file(real):
    tfns = entry(real["sentiment"], "tfns")
    assert tfns["labels"] == {"negative": 347, "neutral": 475, "positive": 1566}
    assert tfns["labels_corrected"] == {"negative": 347, "neutral": 1566, "positive": 475}
    finding = finding_with(real["sentiment"], "exchanged")
    assert re.search("'neutral'.* positive", finding["finding"]) and not finding["attention"]
    says(finding["done"], "corrected", "data/corrections.yaml", "LABELS=published")


def test_nothing_in_the_real_files_is_unknown(real):
    assert [f for report in real.values() for f in report["findings"] if f["attention"]] == []


@pytest.mark.parametrize(
    ("task", "role", "rows", "repeats", "garbled", "numbers"),
    [
        ("sentiment", "nwgi", 4047, (0, 0, 3), 0, 0),
        ("ner", "ner", 3502, (561, 561, 1578), 85, 0),
        ("xbrl_term", "train", 5850, (6, 10, 360), 0, 0),
        ("sentiment", "fpb", 1212, (2, 2, 4), 24, 0),
        ("sentiment", "fiqa", 235, (2, 2, 2), 2, 0),
        ("sentiment", "tfns", 2388, (0, 11, 14), 11, 0),
        ("xbrl_term", "xbrl_term", 651, (0, 0, 13), 0, 0),
        ("formula", "train", 800, (0, 0, 0), 0, 800),
        ("formula", "formula", 200, (0, 0, 0), 0, 200),
        ("financebench", "train", 86, (0, 0, 6), 0, 31),
        ("financebench", "financebench", 43, (0, 0, 1), 1, 15),
    ],
)
def test_the_figures_of_the_readme_hold(real, task, role, rows, repeats, garbled, numbers):
    file = entry(real[task], role)
    assert (file["rows"], file["garbled"], file["answers_that_are_numbers"]) == (rows, garbled, numbers)
    assert tuple(file["repeats"].values()) == repeats
    assert file["conflicts"] == (10 if (task, role) == ("xbrl_term", "train") else 0)


def test_leaks_and_ties_of_the_real_files(real):
    assert entry(real["formula"], "formula")["in_train"] == {"same_words": 0, "near": 0}
    assert entry(real["financebench"], "financebench")["in_train"] == {"same_words": 0, "near": 3}
    assert entry(real["xbrl_term"], "xbrl_term")["in_train"] == {"same_words": 2, "near": 71}
    nan = finding_with(real["xbrl_term"], "missing target", "'nan'")
    assert figures(nan) == [6] and nan["first_lines"] == [142, 890, 1589, 1630, 2973] and not nan["attention"]
    assert figures(finding_with(real["formula"], "begins with")) == [37]
    wrong = finding_with(real["formula"], "wrong answer")
    assert figures(wrong) == [6] and wrong["first_lines"] == [12, 141, 142, 150, 152]


def test_a_changed_real_file_is_not_taken_for_the_published_one(tmp_path):
    if not REAL.is_dir():
        pytest.skip("../shared/finlora/data is not here: the real FinLoRA rows were not audited")
    lines = (REAL / "test/tfns_test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "test").mkdir()
    (tmp_path / "test/tfns_test.jsonl").write_text("".join(lines[1:] + lines[:1]), encoding="utf-8")
    report = look("sentiment", tmp_path)
    assert finding_with(report, "checksum", "manifest")["attention"]
    assert finding_with(report, "data/corrections.yaml")["attention"]
    assert finding_with(report, "exchanged")["attention"]
    assert entry(report, "tfns")["labels_corrected"] is None
