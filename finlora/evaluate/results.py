"""What evaluations leave under results/: each writes its own, and the report and comparisons read them.

The results of a model (a base, or one with an adapter) are a folder with run.json; each data set is a folder in it
with answers.jsonl and, once it is finished, set.json. Scores are never stored: they are computed from the answers, so
that fixing a scorer fixes every report. Prompts can be long; they stay on disk until one is shown.
"""

import datetime
import json
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from finlora.core.errors import UserError
from finlora.core.files import replacing, write_json
from finlora.core.machine import gpus
from finlora.core.paths import ROOT, shown
from finlora.core.provenance import git_state, versions
from finlora.data import tasks
from finlora.data.test_sets import all_sets
from finlora.evaluate import scorers
from finlora.evaluate.questions import Encoder, Questions

RESULTS = ROOT / "results"
Record = TypeVar("Record")
# Answers in a folder whose run.json differs in one of these are another model's.
IDENTITY = "model base_sha256 adapter_sha256 bits prompt shots template_sha256 ends way backend".split()
OR_NONE = Field(default=None)  # of a key that earlier versions did not write


@dataclass(frozen=True, kw_only=True)
class Run:
    """run.json: which model was evaluated, and how. A key that earlier versions did not write is None."""

    subject: str | None = None  # the folder's name when it was written
    recipe: str | None = None
    model: str
    adapter: str | None = None
    adapter_sha256: str | None = None
    base_sha256: str | None = None  # of its base's weights
    bits: int | None = None
    method: str | None = None  # base, lora, dora or rslora
    r: int | None = None
    alpha: int | float | None = None
    prompt: str | None = None  # saved, the name of a template in recipes/prompts, or endpoint
    shots: int | None = None  # examples before each question; None for none
    template_sha256: str | None = None
    ends: list | None = None  # the tokens that end an answer, of template, tokenizer and recipe
    way: str | None = None  # plain, quantised, merged, cached norms or endpoint
    backend: str | None = None  # transformers, vllm, or an endpoint's URL
    tiny: bool | None = None
    training: dict | None = None  # metrics, args, seconds, data_from and log of a recipe's training
    versions: dict | None = None
    git: dict | None = None
    device: str | None = None
    started: str | None = None


@dataclass(frozen=True, kw_only=True)
class SetResult:
    """set.json: one test set as a model answered it. Most is None for MMLU and GSM8K, whose metric is lm_eval."""

    set: str
    task: str | None = None
    file: str | None = None
    sha256: str | None = None  # of the file
    published_file: bool | None = None
    rows: int | None = None  # of the file
    evaluated: int
    labels: list | None = None
    metric: str
    max_new_tokens: int | None = None
    lengths: str | None = None  # whole: every target fits; published: FinLoRA's limits
    targets_cut: int | None = None  # rows whose target has more tokens than max_new_tokens
    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    encoder: str | None = None  # that measured BERTScore, and its layer
    labels_used: str | None = None  # corrected or published
    shots: int | None = None
    questions_sha256: str | None = None  # of what is asked with shots, in all rows of the file
    seconds: int | float | None = None
    limit: int | None = None


class Row(TypedDict):
    """A line of answers.jsonl. In memory it is without its prompt and context."""

    row: int  # the line of the test file
    prompt: str
    target: str
    corrected: str
    answer: str
    seen: Annotated[bool | None, OR_NONE]  # whether its context was trained on; None where that is not known
    prompt_tokens: Annotated[int | None, OR_NONE]
    answer_tokens: Annotated[int | None, OR_NONE]
    stopped: Annotated[bool | None, OR_NONE]  # False where the answer was cut
    bertscore: Annotated[int | float | None, OR_NONE]


class ForgettingRow(TypedDict):
    """A line of answers.jsonl of MMLU or GSM8K."""

    row: int
    id: str  # of the question: task and number
    prompt: str
    target: str
    answer: str
    right: int | float


@dataclass(eq=False)
class Answers:
    """One data set that a model answered: set.json (`about`), its entry in data/tasks.yaml, and the rows in order.

    `rows` maps the file's line number (forgetting sets: the question's id) to the row without its prompt and context.
    """

    folder: Path
    about: SetResult
    spec: tasks.TestSet
    rows: dict[int | str, dict[str, Any]]
    _items: dict[tuple, dict[str, list]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.about.set

    @property
    def forgetting(self) -> bool:
        return self.about.metric == "lm_eval"

    @property
    def bertscore(self) -> bool:
        return self.about.metric == "bertscore_f1"

    def labels(self) -> list[str]:
        """The label versions that differ on these rows, the one that was asked for first."""
        if self.forgetting or all(row["corrected"] == row["target"] for row in self.rows.values()):
            return ["published"]
        used = self.about.labels_used
        return [used, "published" if used == "corrected" else "corrected"]

    def targets(self, labels: str, lines: Collection[int]) -> list[str]:
        """The right answers to these lines under "published" or "corrected" labels."""
        key = "target" if self.forgetting or labels == "published" else "corrected"
        return [self.rows[line][key] for line in lines]

    def scorings(self) -> dict[str, Callable]:
        """The scorings of this set by name, the primary one first; empty where the values were measured elsewhere."""
        return {} if self.forgetting else scorers.scorings(self.name, self.spec)

    def items(self, labels: str, scoring: str | None = None, lines: tuple | None = None) -> dict[str, list]:
        """The items (finlora.evaluate.scorers) of these lines, or of all, under one version of the labels and one
        scoring.

        Items name rows by their place in `lines` and have the group of each. Without a scoring it is the primary one.
        """
        lines = tuple(self.rows) if lines is None else lines
        scorings = self.scorings()
        scoring = scoring or next(iter(scorings), None)
        key = (labels, scoring, lines)
        if key not in self._items:
            rows = [self.rows[line] for line in lines]
            if self.forgetting:
                items = {
                    "row": list(range(len(rows))),
                    "target": [row["target"] for row in rows],
                    "predicted": [row["answer"] for row in rows],
                    "right": [float(row["right"]) for row in rows],
                    "unparsed": [False] * len(rows),
                }
            elif self.bertscore:
                items = scorers.bertscore_items([row["bertscore"] for row in rows])
            else:
                items = scorings[scoring]([row["answer"] for row in rows], self.targets(labels, lines))
            self._items[key] = items | {"group": [self.groups[lines[row]] for row in items["row"]]}
        return self._items[key]

    @cached_property
    def groups(self) -> dict[int | str, int]:
        """The group of each line (finlora/data/groups.py); a question of MMLU or GSM8K is alone."""
        if self.forgetting:
            return {line: place for place, line in enumerate(self.rows)}
        # Earlier versions kept the prompt only.
        about = {row["row"]: row.get("context", row["prompt"]) for row in _json_lines(self.folder / "answers.jsonl")}
        from finlora.data.groups import row_groups  # late: it imports scipy, which reading a record does not need

        return dict(zip(about, row_groups(list(about.values())), strict=True))


@dataclass(eq=False)
class ModelResults:
    """A model that was evaluated: the name of its folder, run.json (`run`), its finished sets in tasks.yaml's order."""

    name: str
    run: Run
    sets: dict[str, Answers]


class _Broken(Exception):
    """A file that an evaluation left is not as it wrote it: one line that names the file and what to do."""


def names(folder: Path = RESULTS) -> list[str]:
    """The names of the evaluated models under `folder`. Raises UserError where there is none."""
    known = sorted(path.name for path in folder.iterdir() if _is_result(path)) if folder.is_dir() else []
    if not known:
        raise UserError(f"{shown(folder)}: has no results yet; evaluate first: make eval RECIPE=sentiment_r8_dora")
    return known


def read(folder: Path = RESULTS, only: Collection[str] = ()) -> tuple[dict[str, ModelResults], list[str]]:
    """Every evaluated model under `folder` by name (or only these), and one line for each thing that cannot be used.

    Raises UserError where there is nothing at all.
    """
    folders = [folder / name for name in names(folder) if not only or name in only]
    models, warnings = {}, []
    for path in folders:
        if (part := path / "answers.part.jsonl").exists():
            warnings.append(f"{shown(path)}: unfinished ({_count(part)} kept); the same make eval resumes from there")
            if not (path / "run.json").exists():
                continue
        try:
            run = _record(Run, path / "run.json")
        except _Broken as error:
            warnings.append(str(error))
            continue
        sets = {}
        for inside in sorted(path.iterdir(), key=lambda inside: (set_order(inside.name), inside.name)):
            if _is_result(inside):
                try:
                    sets[inside.name] = _read_set(inside)
                except _Broken as error:
                    warnings.append(str(error))
        models[path.name] = ModelResults(path.name, run, sets)
    return models, warnings


def read_run(folder: Path) -> Run | None:
    """run.json of results/<model>; None where it is missing or broken."""
    try:
        return _record(Run, folder / "run.json")
    except _Broken:
        return None


def read_kept(folder: Path) -> tuple[SetResult | None, list[dict[str, Any]]]:
    """set.json and the rows of results/<model>/<set>, prompts included; None where it is unfinished or broken."""
    try:
        return _record(SetResult, folder / "set.json"), kept_rows(folder)
    except _Broken:
        return None, []


def kept_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of answers.jsonl, prompts and contexts included."""
    return list(_json_lines(folder / "answers.jsonl"))


def prepare_folder(
    folder: Path, run: Run, questions: list[Questions], encoder: Encoder, force: bool = False
) -> list[Questions]:
    """Make results/<subject> this run's, with run.json, and return what is still to be asked.

    force: set earlier answers aside.
    """
    before = read_run(folder)
    changed = [key for key in IDENTITY if before and getattr(before, key) != getattr(run, key)]
    if "ends" in changed and before.ends is None:
        changed.remove("ends")  # earlier versions did not write them
    if "base_sha256" in changed and None in (run.base_sha256, before.base_sha256):
        changed.remove("base_sha256")  # a hub's model before it was fetched, or answers of before 2026-11
    if folder.is_dir() and (force or changed):
        if changed and not force:
            values = [(key, *(str(getattr(one, key))[:40] for one in (before, run))) for key in changed[:2]]
            what = ", ".join(f"{key}: {old} -> {new}" for key, old, new in values)
            raise UserError(
                f"{shown(folder)}: holds the answers of another model ({what}); FORCE=1 sets them aside, "
                "NAME=<another> keeps both"
            )
        aside = folder.parent / "aside" / f"{folder.name}.{datetime.datetime.now():%Y%m%d-%H%M%S}"
        aside.parent.mkdir(exist_ok=True)
        folder.rename(aside)
        print(f"set aside: {shown(aside)}")
    left = []
    for one in questions:
        if part := unanswered(folder / one.name, one, encoder):
            left.append(part)
        else:
            print(f"{run.subject}: {one.name} is answered already; FORCE=1 asks again")
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    device = gpus()[0][0] if gpus() else "CPU"
    machine = {"versions": versions(), "git": git_state(), "device": device, "started": started}
    write_json(folder / "run.json", asdict(replace(run, **machine)))
    return left


def unanswered(folder: Path, questions: Questions, encoder: Encoder) -> Questions | None:
    """What is left to ask; None where results/<subject>/<set> holds the answers asked for, or more.

    What measures kept answers is then brought up to date: corrections, the encoder, which labels count.
    """
    limit, source, length = questions.limit, questions.source, questions.length
    result, rows = read_kept(folder)
    if result is None:
        return questions
    if source is None:
        enough = result.limit is None or (limit is not None and limit <= result.limit)
        return None if enough else questions
    if limit and result.sha256 == source.sha256:
        limit = result.limit and max(limit, result.limit)  # no answer is taken away
    kept: list[Row] = []
    if result.lengths:  # until 2026-11 lm-eval cut answers at their first blank line, and this was not recorded
        same, longest = result.max_new_tokens == length.max_new_tokens, length.max_new_tokens
        kept = [row for row in rows if same or (row["stopped"] and row["answer_tokens"] <= longest)]
    left = replace(questions, limit=limit, kept=kept)
    subject = folder.parent.name
    if result.sha256 != source.sha256:
        print(f"{source.path}: has changed since {subject} answered it; asking again")
        return left
    if result.questions_sha256 != questions.sha256:
        print(f"{subject}: {questions.name} was answered with other examples; asking again")
        return left
    if not result.lengths:
        print(f"{subject}: {questions.name} was answered with answers cut at blank lines; asking again")
        return left
    if result.evaluated < min(questions.limit or len(source.rows), len(source.rows)):
        return left
    if cut := len(rows) - len(kept):
        print(
            f"{subject}: {questions.name} was answered with up to {result.max_new_tokens} tokens; asking {cut} rows "
            f"again with {length.max_new_tokens}"
        )
        return left
    measure_again(folder, result, rows, questions, encoder)
    return None


def measure_again(
    folder: Path, result: SetResult, rows: list[dict[str, Any]], questions: Questions, encoder: Encoder
) -> None:
    """Bring what measures kept answers up to date; the answers are the same."""
    measured = replace(result, labels_used=questions.labels, **questions.length._asdict())
    corrected = {row.row: row.corrected for row in questions.source.rows}
    changed = [row for row in rows if row["corrected"] != corrected[row["row"]]]
    for row in changed:
        row["corrected"] = corrected[row["row"]]
    if changed:
        print(f"{folder.parent.name}: {questions.name} has new corrections of {len(changed)} rows; its answers stay")
    if changed or result.encoder not in (None, str(encoder)):
        write_set(folder, measured, rows, encoder)
    elif measured != result:
        write_json(folder / "set.json", asdict(measured))


def write_set(folder: Path, result: SetResult, rows: list[dict[str, Any]], encoder: Encoder) -> None:
    """Measure BERTScore where the encoder has not yet, and write answers.jsonl, then set.json: a folder without the
    latter is unfinished.
    """
    if result.metric == "bertscore_f1" and result.encoder != str(encoder):
        from finlora.evaluate.bertscore import add_bertscore  # late: torch and transformers take seconds

        add_bertscore(rows, encoder)
        result = replace(result, encoder=str(encoder))
    (folder / "set.json").unlink(missing_ok=True)
    with replacing(folder / "answers.jsonl") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_json(folder / "set.json", asdict(result))


def print_answered(result: SetResult, rows: list[dict[str, Any]], reasons: dict[str, str]) -> None:
    """Say how a set was answered, and warn of empty answers; reasons: an endpoint's for those, by prompt."""
    empty = [row for row in rows if result.metric != "lm_eval" and not row["answer"].strip()]
    if empty:
        lines = ", ".join(str(row["row"]) for row in empty[:5]) + ", ..." * (len(empty) > 5)
        why = ", ".join(sorted({reasons[row["prompt"]] for row in empty if row["prompt"] in reasons}))
        count = f"{len(empty)} empty answer{'s' * (len(empty) > 1)}"
        print(f"warning: {result.set}: {count} (rows {lines}{f'; {why}' if why else ''})", file=sys.stderr)
    if result.metric == "lm_eval":
        scores = {"score": sum(row["right"] for row in rows) / len(rows)}
    elif result.metric == "bertscore_f1":
        items = scorers.bertscore_items([row["bertscore"] for row in rows])
        scores = {"BERTScore F1": scorers.summary(items)["accuracy"]}
    else:
        targets = [row["corrected" if result.labels_used == "corrected" else "target"] for row in rows]
        texts = [row["answer"] for row in rows]
        scorings = scorers.scorings(result.set, all_sets()[result.set])
        scores = {name: scorers.summary(score(texts, targets))["accuracy"] for name, score in scorings.items()}
    text = ", ".join(f"{name} {value:.1%}" for name, value in scores.items())
    print(f"{result.set}: {text} of {len(rows)} rows in {result.seconds:.0f} s", flush=True)


def base_of(model: ModelResults, models: dict[str, ModelResults]) -> ModelResults | None:
    """An adapter's base: the one with equal model, bits, backend, tiny and shots; of several the same prompt's."""
    if not model.run.adapter:
        return None
    same = [
        other
        for other in models.values()
        if not other.run.adapter
        and all(
            getattr(other.run, key) == getattr(model.run, key) for key in ("model", "bits", "backend", "tiny", "shots")
        )
    ]
    return min(same, key=lambda other: (other.run.prompt != model.run.prompt, other.name), default=None)


def common(a: Answers, b: Answers) -> tuple:
    """The lines that both answered, in file order."""
    return tuple(line for line in a.rows if line in b.rows)


def unlike(a: Answers, b: Answers) -> str | None:
    """Why two models' answers to one set cannot be paired row by row; None where they can."""
    if a.about.sha256 != b.about.sha256:
        return "another file (its SHA-256 differs)"
    if (a.about.metric, a.about.encoder) != (b.about.metric, b.about.encoder):
        return f"another measure ({_measure(a)} and {_measure(b)})"
    lines = common(a, b)
    if not lines:
        return "other rows (none that both answered)"
    for line in lines:
        if any(a.rows[line].get(key) != b.rows[line].get(key) for key in ("target", "corrected")):
            return f"other rows (row {line} has another target)"
    return None


def _measure(answers: Answers) -> str:
    return answers.about.encoder or answers.about.metric


def pair(a: Answers, b: Answers, labels: str) -> tuple[tuple, dict[str, list], dict[str, list]]:
    """The lines that both answered and each one's items on them, scored with one set of labels."""
    lines = common(a, b)
    return lines, a.items(labels, None, lines), b.items(labels, None, lines)


def keep(items: dict[str, list], places: Collection[int]) -> dict[str, list]:
    """The items whose row is one of these places."""
    places = set(places)
    chosen = [i for i, row in enumerate(items["row"]) if row in places]
    return {key: [values[i] for i in chosen] for key, values in items.items()}


def set_order(name: str) -> int:
    """Where a test set stands in data/tasks.yaml; the forgetting sets and unknown ones come after."""
    return list(all_sets()).index(name) if name in all_sets() else len(all_sets())


def _is_result(path: Path) -> bool:
    # make eval FORCE=1 keeps earlier results in aside/.
    return path.is_dir() and not path.name.startswith(".") and path.name != "aside"


def _count(path: Path) -> str:
    with open(path, "rb") as file:
        return f"{sum(1 for _ in file):,} answers"


def _read_set(folder: Path) -> Answers:
    answers, done = folder / "answers.jsonl", folder / "set.json"
    if not done.exists():
        so_far = _count(answers) if answers.exists() else "no answers"
        raise _Broken(f"{shown(folder)}: unfinished ({so_far} so far); the same make eval resumes from there")
    about = _record(SetResult, done)
    if about.set != folder.name:
        raise _Broken(f"{shown(done)}: is of the set {about.set!r} and lies in {folder.name}/; evaluate it again")
    name, kind = ("id", ForgettingRow) if about.metric == "lm_eval" else ("row", Row)
    if name == "row" and about.labels_used not in ("corrected", "published"):
        raise _Broken(f"{shown(done)}: 'labels_used' is neither corrected nor published; evaluate again")
    where, rows, check = shown(answers), {}, TypeAdapter(kind).validate_python
    for line, row in enumerate(_json_lines(answers), 1):
        try:
            row = check(row, strict=True)
        except ValidationError as error:
            raise _Broken(f"{where}:{line}: {_why(error)}; evaluate again") from error
        if row[name] in rows:
            raise _Broken(f"{where}:{line}: {name} {row[name]} is there twice; {AGAIN}")
        if about.metric == "bertscore_f1" and row["bertscore"] is None:
            raise _Broken(f"{where}:{line}: has no bertscore; {AGAIN}")
        rows[row[name]] = {key: value for key, value in row.items() if key != "prompt"}
    if len(rows) != about.evaluated or not rows:
        raise _Broken(f"{where}: has {len(rows):,} answers and set.json says {about.evaluated:,}; {AGAIN}")
    return Answers(folder, about, all_sets().get(folder.name) or tasks.unlisted_set(asdict(about)), rows)


AGAIN = "remove its set.json and evaluate again"


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with open(path, encoding="utf-8") as file:
            for line, text in enumerate(file, 1):
                try:
                    yield json.loads(text)
                except (ValueError, RecursionError) as error:
                    what = "is not JSON" if text.endswith("\n") else "is cut short"
                    raise _Broken(f"{shown(path)}:{line}: {what}; {AGAIN}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise _Broken(f"{shown(path)}: {_why(error)}; {AGAIN}") from error


def _record(kind: type[Record], path: Path) -> Record:
    """The dataclass `kind` from a JSON file; keys that it does not have are left out."""
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes(), strict=True)
    except (OSError, ValidationError) as error:
        raise _Broken(f"{shown(path)}: {_why(error)}; evaluate again") from error


def _why(error: Exception) -> str:
    """What is wrong, in a few words: with the file, or with the first key that is missing or not as it must be."""
    if isinstance(error, FileNotFoundError):
        return "is not there"
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        if first["loc"]:
            return f"{first['loc'][0]!r} is {'missing' if first['type'] == 'missing' else 'wrong'}"
        error = first["msg"]
    return f"cannot be read ({' '.join((getattr(error, 'strerror', None) or str(error)).split())[:120]})"
