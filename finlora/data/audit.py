"""Look through a task's train and test files for what would spoil a training or a score; change nothing.

    finlora audit                  every task
    finlora audit sentiment ner    these
    finlora audit cfa --file questions.csv --columns question=context,answer=target

Prints a table and, below it, each finding with what is done about it; data/README.md holds the evidence. The same goes
to data/audit/<task>.json. A finding that begins with `!` needs attention: something that neither the task table nor
data/corrections.yaml knows, such as another checksum, a label outside the task's set, or a row with nothing to learn.
Exit code: 0 when nothing needs attention; 1 when something does, when no file is there, or for a wrong command.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from ftfy.badness import is_bad
from tabulate import tabulate
from tqdm import tqdm

from finlora.core.errors import UserError, typed
from finlora.core.files import write_json
from finlora.core.paths import PREPARED, RAW, ROOT
from finlora.data.corrections import Correction, applies, corrected_target, load_corrections, standing
from finlora.data.fetch import is_right, read_manifest
from finlora.data.layouts import Reading
from finlora.data.neardup import duplicate_groups
from finlora.data.prepare import Options, read_prepared
from finlora.data.rows import LeftOut, Row, read_rows
from finlora.data.tasks import Mixture, Task, TestSet, load_tasks
from finlora.data.tasks import task as find_task
from finlora.data.tokens import Count, chat, find_measure

OUT = ROOT / "data" / "audit"
FEW = 12  # different answers that the table shows
SHOWN = 5  # lines that a finding names
BATCH = 256  # rows that are tokenized at once
NUMBER = re.compile(r"[-+]?\$?\d[\d,]*(\.\d+)?([eE][-+]?\d+)?%?")
# What ftfy does not look for: UTF-8 shown as code page 850 ("J+ñtehuolto", "Lemmink+ñinen -¦ s"), UTF-8 shown as GBK
# ("Boeing鈥檚"), and characters that are lost for good.
GARBLED = re.compile(r"\+(?!£\d)[¡-ÿ]|-¦|鈥|\ufffd")
AROUND = re.compile(r"[\x00-\x7f]{0,5}[^\x00-\x7f]+[\x00-\x7f]{0,5}")
REPEATS = {"exact": "prompt", "same_words": "same", "near": "near"}  # and the column that is the same
CORRECTED = "corrected as rows are read (data/corrections.yaml); LABELS=published leaves them"


@dataclass(frozen=True)
class Finding:
    """What one file shows, what is done about it, and the first lines that show it."""

    file: str
    attention: bool  # neither the task table nor the corrections know it
    finding: str
    done: str
    first_lines: list[int]


@dataclass
class File:
    """One file and what its rows show.

    rows: in file order, each as it was read, with garbled, bytes, words; corrected and standing, in files with
    corrections; tokens, where they are counted; same and near: the group of the rows in the same words, and of
    near-duplicates.
    """

    name: str
    role: str  # "train", or the test set's name
    path: Path
    labels: list[str] | None
    own: bool = False  # the user's rows in place of the train file
    columns: dict[str, str] = field(default_factory=dict)
    status: str = "read"
    rows: pd.DataFrame = field(default_factory=pd.DataFrame)
    left_out: list[LeftOut] = field(default_factory=list)
    reading: Reading = field(default_factory=Reading)
    findings: list[Finding] = field(default_factory=list)

    def find(self, text: str, done: str, lines: Iterable[int] = (), attention: bool = False) -> None:
        """Add a finding: what it is, what is done about it, and the first lines that show it."""
        first = [int(line) for _, line in zip(range(SHOWN), lines, strict=False)]
        self.findings.append(Finding(self.name, attention, text, done, first))


def audit(
    task: str,
    raw: Path = RAW,
    own: Options | None = None,
    *,
    tokenizer: Path | None = None,
    sequence_len: int | None = None,
    count_tokens: bool = True,
) -> dict[str, Any]:
    """Read every file of a task once and return what they show, as it goes into <task>.json.

    `raw` holds the files; own.file, with its column names, stands in for the train file. Tokens are counted with
    `tokenizer` (a folder or a tokenizer.json), else with that of the base model of the recipe <task>_r8_dora where it
    is on this machine, else with the tiny one; sequence_len is the recipe's unless given.
    Raises UserError for an unknown task and for a tokenizer that is not there.
    """
    entry = find_task(task)
    measure, count = _measure(task, tokenizer, sequence_len) if count_tokens else ({}, None)
    train = File(entry.train, "train", raw / entry.train, entry.labels)
    if own:
        train = File(own.file, "train", Path(own.file), None if own.any_label else entry.labels, True, own.mapping)
    files = [train, *(File(test.file, name, raw / test.file, test.labels) for name, test in entry.tests.items())]
    for each in files:
        if not each.path.exists():
            each.status = "absent"
    _read([each for each in files if each.status == "read"], count)
    table = []
    for each in files:
        if each.status == "absent":
            table.append({"file": each.name, "role": each.role, "status": each.status})
            continue
        table.append(_examine(each, entry, measure))
        if each is not train and train.status != "absent":
            table[-1]["in_train"] = _overlap(each, train)
    return {
        "task": task,
        "released": entry.released,
        "measure": measure,
        "files": table,
        "findings": [asdict(finding) for each in files for finding in each.findings],
    }


def _measure(task: str, tokenizer: Path | None, sequence_len: int | None) -> tuple[dict[str, Any], Count | None]:
    """What tokens are counted with and the length that they are compared with, and the function that counts."""
    recipe_path = ROOT / "recipes" / f"{task}_r8_dora.yaml"
    recipe = yaml.safe_load(recipe_path.read_text(encoding="utf-8")) if recipe_path.exists() else {}
    measure = find_measure(recipe.get("base_model"), tokenizer)
    if measure is None:
        return {}, None
    length = sequence_len or recipe.get("sequence_len")
    return {"tokenizer": measure.tokenizer, "stand_in": measure.stand_in, "sequence_len": length}, measure.count


def _read(files: list[File], count: Count | None) -> None:
    """Read the files, and group the rows of all of them."""
    for file in files:
        _read_rows(file, count)
    same, near = duplicate_groups(prompt for file in files for prompt in file.rows.prompt)
    start = 0
    for file in files:
        end = start + len(file.rows)
        file.rows["same"], file.rows["near"] = same[start:end], near[start:end]
        start = end


def _read_rows(file: File, count: Count | None) -> None:
    """Gather what each row shows; a broken file ends at its flaw."""
    rows: list[Row] = []
    reader = read_rows(file.path, file.columns, file.left_out, file.reading, file.labels or ())
    try:
        rows.extend(tqdm(reader, desc=file.path.name, unit=" rows", disable=None, leave=False))
    except UserError as error:
        file.status = "broken"
        file.find(f"cannot be read to its end: {error}", "fix the file: nothing can be trained on it", attention=True)
    file.rows = table = pd.DataFrame(rows, columns=Row._fields)
    table["prompt"] = [row.prompt for row in rows]
    table["garbled"] = [is_garbled(row.prompt) or is_garbled(row.target) for row in rows]
    table["bytes"] = [len(row.prompt.encode()) + len(row.target.encode()) for row in rows]
    table["words"] = [len(row.prompt.split()) + len(row.target.split()) for row in rows]
    if not file.own and applies(file.name, file.path):
        table["corrected"] = [corrected_target(file.name, row) for row in rows]
        table["standing"] = [standing(file.name, row) for row in rows]
    if count:
        batches = (rows[start : start + BATCH] for start in range(0, len(rows), BATCH))
        chats = ([chat(row.turns) for row in batch] for batch in batches)
        table["tokens"] = [tokens for batch in chats for tokens in count(batch)]


def _examine(file: File, entry: Task | Mixture, measure: dict[str, Any]) -> dict[str, Any]:
    """Add what one file shows to its findings and return its entry of the table."""
    test = entry.tests.get(file.role)
    # The rows whose words another row of the file has with a different answer.
    conflicts = file.rows[file.rows.groupby("same").target.transform("nunique") > 1]
    summary = _summary(file, len(conflicts), measure.get("sequence_len"))
    if test and entry.mixture_of:
        return summary  # the findings about a mixture's test sets are those of their own tasks
    pinned = not file.own and _compare(file, test.rows if test else entry.train_rows, test)
    _judge(file, summary, conflicts, pinned)
    if test and test.metric in ("accuracy", "accuracy_f1"):
        _judge_scoring(file)
    if "tokens" in summary:
        _judge_length(file, summary["tokens"], measure)
    return summary


def find_exchange(counts: dict[str, int], documented: dict[str, int]) -> dict[str, str] | None:
    """The renaming of labels that turns the counts into the documented ones; {} when they are so already.

    Labels whose counts agree keep their names. None when no renaming fits, or when equal counts allow several.
    """
    moved = [label for label in documented if counts.get(label, 0) != documented[label]]
    by_count = {documented[label]: label for label in moved}
    if set(counts) - set(documented) or len(by_count) < len(moved):
        return None
    if {counts.get(label, 0) for label in moved} != by_count.keys():
        return None
    return {label: by_count[counts[label]] for label in moved}


def is_garbled(text: str) -> bool:
    """Whether a text holds characters that were decoded with the wrong code page, or that are lost (U+FFFD)."""
    if text.isascii():
        return False
    # Only what stands around characters other than ASCII matters; looking at no more keeps long filings quick.
    return bool(GARBLED.search(text)) or is_bad("\n".join(["", *AROUND.findall(text)]))


def _summary(file: File, conflicts: int, sequence_len: int | None) -> dict[str, Any]:
    """The file's entry in the table."""
    rows = file.rows
    answers, corrected = (
        rows[name].value_counts().sort_index().to_dict() if name in rows else None for name in ("target", "corrected")
    )
    listed = file.labels is not None or len(answers) <= FEW
    summary = {
        "file": file.name,
        "role": file.role,
        "status": file.status,
        "rows": len(rows),
        "labels": answers if listed else None,
        "labels_corrected": corrected if listed else None,
        "different_answers": len(answers),
        "answers_that_are_numbers": sum(times for answer, times in answers.items() if NUMBER.fullmatch(answer)),
        # Rows that repeat an earlier one: letter for letter; in the same words, those included; nearly, all included.
        "repeats": {name: int(rows[column].duplicated().sum()) for name, column in REPEATS.items()},
        "conflicts": conflicts,
        "garbled": int(rows.garbled.sum()),
        "longest": dict.fromkeys(("bytes", "words", "line"), 0),
    }
    if len(rows):
        summary["longest"] = {key: int(rows.loc[rows.bytes.idxmax(), key]) for key in summary["longest"]}
    if len(rows) and "tokens" in rows:
        summary["tokens"] = {
            "longest": int(rows.tokens.max()),
            "line": int(rows.line[rows.tokens.idxmax()]),
            "median": int(rows.tokens.median()),
            "p99": int(rows.tokens.quantile(0.99)),
            "all": int(rows.tokens.sum()),
            "too_long": int((rows.tokens > sequence_len).sum()) if sequence_len else None,
        }
    return summary


def _compare(file: File, rows: int | None, test: TestSet | None) -> bool:
    """Compare a published file with the manifest, the task table and the corrections; whether it is the pinned one."""
    entry = next((entry for entry in read_manifest().files if entry.local == file.name), None)
    pinned = entry is not None and is_right(file.path, entry)
    if entry and not pinned:
        file.find("its checksum is not the manifest's", "fetch it again, or pass your own as FILE=", attention=True)
    count = len(file.rows) + len(file.left_out)
    if rows and count != rows and file.status == "read":
        file.find(f"it has {count:,} rows and not {rows:,} (data/tasks.yaml)", "fetch it again", attention=True)
    if test and test.source_counts:
        _compare_counts(file, test.source_counts)
    correction = load_corrections().get(file.name)
    if correction and "standing" not in file.rows:
        text = "it is not the file that data/corrections.yaml knows"
        file.find(text, "its labels are taken as they are", attention=True)
    elif correction and correction.rows:
        _compare_rows(file, correction)
    elif correction and correction.answers:
        file.find(f"{_rows(len(correction.answers))} with a wrong answer", CORRECTED, correction.answers)
    return pinned


def _compare_counts(file: File, documented: dict[str, int]) -> None:
    counts = file.rows.target.value_counts().to_dict()
    exchange = find_exchange(counts, documented)
    if exchange == {}:
        return
    both = f"the file has {_listed(counts)}, the source {_listed(documented)}"
    if exchange is None:
        file.find(f"label counts are not the source's: {both}", "find out why before you score on it", attention=True)
        return
    names = ", ".join(f"'{published}' stands for {right}" for published, right in exchange.items())
    text = f"labels are exchanged: {both}; the counts fit when {names}"
    if "corrected" in file.rows and file.rows.corrected.value_counts().to_dict() == documented:
        file.find(text, CORRECTED)
    else:
        file.find(text, "not corrected: add it to data/corrections.yaml", attention=True)


def _compare_rows(file: File, correction: Correction) -> None:
    """Count the rows that a correction holds for, and look whether the file agrees with the reasons for it."""
    rows = file.rows.assign(copies=file.rows.groupby("context").context.transform("size"))
    for kind, done in (
        ("certain", CORRECTED),
        ("unsure", "kept as published: by its own text such a row may come from another data set"),
    ):
        some = rows[rows.standing == kind]
        if len(some):
            often = some.drop_duplicates("context").copies.value_counts()
            shown = ", ".join(f"{count:,} stand {times} times" for times, count in often.head(3).items())
            labels = f" ({_listed(some.target.value_counts())})" if kind == "certain" else ""
            text = f"{len(some):,} rows have exchanged labels, {kind}{labels}; of their {often.sum():,} texts {shown}"
            file.find(text, done, some.line)
    certain = rows[rows.standing == "certain"]
    published, corrected, expected = certain.target, certain.corrected, correction.rows.source_counts
    if len(certain) and _distance(corrected.value_counts(), expected) >= _distance(published.value_counts(), expected):
        text = "the published labels of the rows to be corrected are nearer to the source's shares than the corrected"
        file.find(text, "find out why; until then use LABELS=published", attention=True)
    copied = certain[certain.copies >= correction.rows.not_copied]
    if len(copied):
        text = f"{len(copied):,} rows to be corrected stand {correction.rows.not_copied} times or more"
        text += " and so come from another data set"
        file.find(text, "find out why; until then use LABELS=published", copied.line, attention=True)


def _distance(one: Mapping[str, int], other: Mapping[str, int]) -> float:
    """How far the shares of two label counts are apart: total variation, from 0 to 1."""
    first, second = (pd.Series(counts, dtype=float) / sum(counts.values()) for counts in map(dict, (one, other)))
    return first.sub(second, fill_value=0).abs().sum() / 2


def _judge(file: File, summary: dict[str, Any], conflicts: pd.DataFrame, pinned: bool) -> None:
    """Add what the rows of one file show by themselves."""
    rows, repeats = file.rows, summary["repeats"]
    if unused := file.reading.unused:
        file.find(f"columns that are no part of the rows: {', '.join(unused)}", "not read", unused.values())
    for note in file.reading.notes:
        file.find(f"it has {note}", "taken all the same")
    outside = rows[~rows.target.isin(file.labels)] if file.labels is not None else rows[:0]
    for number, (target, lines) in enumerate(outside.groupby("target", sort=False).line):
        if number < SHOWN:
            text = f"{target[:60]!r} is none of the task's labels ({_rows(len(lines))})"
            file.find(text, "correct the rows, or the labels in data/tasks.yaml", lines, attention=True)
    more = outside.target.nunique() - SHOWN
    if more > 0:
        file.find(f"{more:,} more answers are none of the task's labels", "as above", attention=True)
    for reason in sorted({reason for _, reason in file.left_out}):
        lines = [line for line, why in file.left_out if why == reason]
        done = "correct or remove them: `make data` refuses them" if file.own else "left out and counted by `make data`"
        file.find(f"{_rows(len(lines))}: {reason}", done, lines, attention=not pinned)
    if repeats["near"]:
        text = f"{_rows(repeats['near'])} nearly the same as an earlier one, {repeats['same_words']:,} of them in the "
        text += f"same words, {repeats['exact']:,} letter for letter"
        done = "kept: the published scores count them"
        if file.role == "train":
            done = "kept: " + "FinLoRA repeats rows for balance; " * (not file.own)
            done += "validation rows have no copy or near-duplicate in training"
        file.find(text, done, rows.line[rows.near.duplicated()])
    if len(conflicts):
        text = f"{_rows(len(conflicts))} with the words of another one and a different answer"
        file.find(text, "kept: which one is right is not certain", conflicts.line)
    numbers = summary["answers_that_are_numbers"]
    if numbers and file.labels is None:
        file.find(f"{numbers:,} answers are numbers", "read as text, digit for digit as the file has them")
    if summary["garbled"]:
        text = f"{_rows(summary['garbled'])} with garbled characters (read with a wrong code page, or lost)"
        file.find(text, "kept: the published scores were made with them", rows.line[rows.garbled])


def _judge_scoring(file: File) -> None:
    """FinLoRA's scorer takes the earliest answer of the file that stands in a prediction: a prefix ties with it."""
    targets = file.rows.target.str.lower()
    answers = set(targets)
    tied = sum(any(target[:end] in answers for end in range(1, len(target))) for target in targets)
    if tied:
        text = f"{_rows(tied)} whose right answer begins with another one of the file, which FinLoRA's scorer may take"
        file.find(text, "scored both as FinLoRA does, made deterministic, and strictly")


def _judge_length(file: File, tokens: dict[str, Any], measure: dict[str, Any]) -> None:
    if not tokens["too_long"]:
        return
    text = f"{_rows(tokens['too_long'])} of more than {measure['sequence_len']:,} tokens"
    text += f" (the longest {tokens['longest']:,})"
    if measure["stand_in"]:
        text += ", counted with the tiny tokenizer, which needs more tokens than Llama's"
    done = "training would stop: raise sequence_len, or let the recipe's excess_length_strategy leave rows out"
    if file.role != "train":
        done = "evaluation has to allow for it"
    file.find(text, done, [tokens["line"]], attention=file.role == "train" and not measure["stand_in"])


def _overlap(test: File, train: File) -> dict[str, int]:
    """Count the test rows whose text is in the train file too, in the same words and nearly; of own rows, those."""
    inside, outside = (train, test) if train.own else (test, train)
    same = inside.rows.same.isin(outside.rows.same).sum()
    near = inside.rows[inside.rows.near.isin(outside.rows.near)]
    if len(near):
        text = f"{_rows(len(near))} nearly the same as one of {outside.name}, {same:,} of them in the same words"
        done = "kept in both, as published: a good score on them may be memory"
        if train.own:
            done = f"remove them: they are test rows, and a score on {test.role} would be memory"
        inside.find(text, done, near.line, attention=train.own)
    return {"same_words": int(same), "near": len(near)}


def render(report: dict[str, Any]) -> str:
    """The report of one task as plain text: its table, its labels, its findings."""
    measure = report["measure"]
    tokens = f"tokens were not counted; {typed('--tokenizer ...')} names what to count them with"
    if measure:
        length = f", at most {measure['sequence_len']:,} a row" if measure["sequence_len"] else ""
        more = ", more than by Llama's" if measure["stand_in"] else ""
        tokens = f"tokens by {measure['tokenizer']}{more}{length}"
    head = ["file", "rows", "answers", "= text", "= words", "near", "conflict", "in train", "garbled", "longest"]
    lines, notes = [], []
    for file in report["files"]:
        name = Path(file["file"]).name
        if file["status"] == "absent":
            command = f"make data TASK={report['task']}"
            own = f"not released; bring your own: {command} FILE=your_rows.jsonl"
            notes.append(f"{name}  absent: {command if report['released'] else own}")
            continue
        in_train, longest = "-", f"{file['longest']['words']:,} words"
        if overlap := file.get("in_train"):
            in_train = f"{overlap['same_words']:,}/{overlap['near']:,}"
        if file.get("tokens"):
            longest = f"{file['tokens']['longest']:,} tokens"
        counts = [file["rows"], file["different_answers"], *file["repeats"].values(), file["conflicts"]]
        cells = [name, *(f"{count:,}" for count in counts), in_train, f"{file['garbled']:,}"]
        lines.append([*cells, f"{longest}, {file['longest']['bytes']:,} bytes"])
        if file["labels"]:
            notes.append(f"{name}: {_listed(file['labels'])}")
        if file["labels_corrected"] and file["labels_corrected"] != file["labels"]:
            notes.append(f"{name}, corrected: {_listed(file['labels_corrected'])}")
    text = [f"{report['task']} ({tokens})"]
    if lines:
        table = tabulate(lines, head, "plain", disable_numparse=True, colalign=["left", *["right"] * (len(head) - 1)])
        text += [f"  {line}" for line in table.splitlines()]
    text += [f"  {note}" for note in notes]
    for finding in report["findings"]:
        shown = f" [line {', '.join(map(str, finding['first_lines']))}]" if finding["first_lines"] else ""
        mark = "!" if finding["attention"] else "-"
        text.append(f"  {mark} {Path(finding['file']).name}: {finding['finding']}{shown}")
        text.append(f"      {finding['done']}")
    return "\n".join(text)


def _rows(count: int) -> str:
    return f"{count:,} row" if count == 1 else f"{count:,} rows"


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{label} {count:,}" for label, count in sorted(counts.items()))


def run(tasks: Sequence[str], raw: Path, json_folder: Path, own: Options | None = None, **options: Any) -> int:
    """Print the audit of tasks and keep it in a folder; return how many findings need attention.

    own: the user's rows for the one task. A task that `make data FILE=` prepared has those without being told.
    """
    tasks = tasks or list(load_tasks())
    if own and len(tasks) != 1:
        raise UserError(f"{typed('--file', 'FILE=')}: name the one task that the rows are for (TASK=...)")
    attention = read = 0
    for name in tasks:
        find_task(name)
        rows = own
        if not own and raw == RAW and (prepared := read_prepared(PREPARED / name)) and prepared.settings.file:
            rows = prepared.settings
            print(f"{name}: your own rows, as they were prepared")
        if rows and not Path(rows.file).exists():
            raise UserError(f"{rows.file}: is not there; check the path")
        report = audit(name, raw, rows, **options)
        write_json(json_folder / f"{name}.json", report)
        print(render(report), end="\n\n", flush=True)
        attention += sum(finding["attention"] for finding in report["findings"])
        read += sum(file["status"] != "absent" for file in report["files"])
    if not read:
        raise UserError(f"{raw}: holds no file of {', '.join(tasks)}; run `make data`")
    print(f"{read} files, {attention} findings need attention" + (" (marked !)" if attention else ""))
    return attention
