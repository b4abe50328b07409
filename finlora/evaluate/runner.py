"""Evaluate a trained adapter, a base model, or anything behind an endpoint, on FinLoRA's test sets (`make eval`).

finlora eval --recipe sentiment_r8_dora [--base] [--limit 200] [--tasks fpb,tfns] [--labels published]
finlora eval --model <hub id or folder> [--adapter <hub id or folder>] [--bits 8] --tasks general
finlora eval --endpoint http://localhost:8000/v1 --model <name served> --tasks general

lm-evaluation-harness asks, and every answer is kept in results/<name>/<set>/; `make report` scores them. After an
interruption the same command resumes: answers are written as they come, and finished sets are not asked again.
"""

import datetime
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from finlora.core.errors import UserError
from finlora.core.machine import gpus
from finlora.core.paths import existing, shown
from finlora.core.provenance import git_state, versions
from finlora.core.startup import log_to
from finlora.evaluate.evaluation import Evaluation, Request
from finlora.evaluate.questions import Questions, answers
from finlora.evaluate.results import Row, Run, SetResult, print_answered, read_kept, read_run, write_record, write_set
from finlora.train.runs import folder_lock

# Answers in a folder whose run.json differs in one of these are another model's.
IDENTITY = "model base_sha256 adapter_sha256 bits prompt shots template_sha256 ends way backend".split()
DISK_NEEDED = 64 * 2**20


@dataclass(frozen=True)
class Unanswered:
    """A test set that is still to be asked, whole or in part."""

    questions: Questions
    limit: int | None  # only the first rows
    kept: list[Row] = field(default_factory=list)  # rows whose answers stay


def evaluate(evaluation: Evaluation) -> list[Path]:
    """Ask what is left to ask and return the folders of the results, the base's first. Raises UserError."""
    check(evaluation)
    request, runs = evaluation.request, evaluation.runs
    with ExitStack() as stack:
        for run in runs:  # two at a time would share one file of answers
            stack.enter_context(folder_lock(request.results / run.subject, make=False))
        left = {run.subject: prepare_folder(run, evaluation) for run in runs}
        if any(left.values()):
            log_to(request.results / runs[-1].subject / "eval.log")
        models = open_models(evaluation, [run for run in runs if left[run.subject]])
        for run, lm in stack.enter_context(closing(models)):  # closing ends a server of ours
            ask(lm, run, left[run.subject], evaluation)
    return [request.results / run.subject for run in runs]


def check(evaluation: Evaluation) -> None:
    """UserError for an encoder that is missing and for a full disk, before weights are loaded."""
    request = evaluation.request
    if any(questions.metric == "bertscore_f1" for questions in evaluation.questions):
        from finlora.evaluate.bertscore import add_bertscore  # late: torch and transformers take seconds

        add_bertscore([{"answer": "one", "target": "one"}], request.encoder, request.layer)
    if shutil.disk_usage(existing(request.results)).free < DISK_NEEDED:
        raise UserError(f"{request.results}: the disk is full; free {DISK_NEEDED >> 20} MiB")


def prepare_folder(run: Run, evaluation: Evaluation) -> list[Unanswered]:
    """Make results/<subject> this run's, with run.json, and return what is still to be asked."""
    request = evaluation.request
    folder = request.results / run.subject
    before = read_run(folder)
    changed = [key for key in IDENTITY if before and getattr(before, key) != getattr(run, key)]
    if "ends" in changed and before.ends is None:
        changed.remove("ends")  # earlier versions did not write them
    if "base_sha256" in changed and None in (run.base_sha256, before.base_sha256):
        changed.remove("base_sha256")  # a hub's model before it was fetched, or answers of before 2026-11
    if folder.is_dir() and (request.force or changed):
        if changed and not request.force:
            values = [(key, *(str(getattr(one, key))[:40] for one in (before, run))) for key in changed[:2]]
            what = ", ".join(f"{key}: {old} -> {new}" for key, old, new in values)
            raise UserError(
                f"{shown(folder)}: holds the answers of another model ({what}); FORCE=1 sets them aside, "
                "NAME=<another> keeps both"
            )
        aside = request.results / "aside" / f"{folder.name}.{datetime.datetime.now():%Y%m%d-%H%M%S}"
        aside.parent.mkdir(exist_ok=True)
        folder.rename(aside)
        print(f"set aside: {shown(aside)}")
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    device = gpus()[0][0] if gpus() else "CPU"
    machine = {"versions": versions(), "git": git_state(), "device": device, "started": started}
    write_record(folder / "run.json", replace(run, **machine))
    left = []
    for questions in evaluation.questions:
        if part := unanswered(folder / questions.name, questions, request):
            left.append(part)
        else:
            print(f"{run.subject}: {questions.name} is answered already; FORCE=1 asks again")
    return left


def unanswered(folder: Path, questions: Questions, request: Request) -> Unanswered | None:
    """What is left to ask; None where results/<subject>/<set> holds the answers asked for, or more.

    What measures kept answers is then brought up to date: corrections, the encoder, which labels count.
    """
    limit, source, length = request.limit, questions.source, questions.length
    result, rows = read_kept(folder)
    if result is None:
        return Unanswered(questions, limit)
    if source is None:
        enough = result.limit is None or (limit is not None and limit <= result.limit)
        return None if enough else Unanswered(questions, limit)
    if limit and result.sha256 == source.sha256:
        limit = result.limit and max(limit, result.limit)  # no answer is taken away
    kept: list[Row] = []
    if result.lengths:  # until 2026-11 lm-eval cut answers at their first blank line, and this was not recorded
        same, longest = result.max_new_tokens == length.max_new_tokens, length.max_new_tokens
        kept = [row for row in rows if same or (row["stopped"] and row["answer_tokens"] <= longest)]
    left = Unanswered(questions, limit, kept)
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
    if result.evaluated < min(request.limit or len(source.rows), len(source.rows)):
        return left
    if cut := len(rows) - len(kept):
        print(
            f"{subject}: {questions.name} was answered with up to {result.max_new_tokens} tokens; asking {cut} rows "
            f"again with {length.max_new_tokens}"
        )
        return left
    measure_again(folder, result, rows, questions, request)
    return None


def measure_again(folder: Path, result: SetResult, rows: list[Row], questions: Questions, request: Request) -> None:
    """Bring what measures kept answers up to date; the answers are the same."""
    measured = replace(result, labels_used=request.labels, **questions.length._asdict())
    corrected = {row.row: row.corrected for row in questions.source.rows}
    changed = [row for row in rows if row["corrected"] != corrected[row["row"]]]
    for row in changed:
        row["corrected"] = corrected[row["row"]]
    if result.encoder:
        from finlora.evaluate import bertscore  # late: torch and transformers take seconds

        measured = replace(measured, encoder=bertscore.measured_by(request.encoder, request.layer))
        if measured.encoder != result.encoder:
            bertscore.add_bertscore(rows, request.encoder, request.layer)
    if changed:
        print(f"{folder.parent.name}: {questions.name} has new corrections of {len(changed)} rows; its answers stay")
    if changed or measured.encoder != result.encoder:
        write_set(folder, measured, rows)
    elif measured != result:
        write_record(folder / "set.json", measured)


def open_models(evaluation: Evaluation, runs: list[Run]) -> Iterator[tuple[Run, Any]]:
    """Yield each run with its model as lm-eval takes it. The base's weights are loaded once, the adapter's come last.

    The engines are imported here, since each takes seconds and only one is used.
    """
    request, trained, model = evaluation.request, evaluation.trained, None
    for run in runs:
        if request.endpoint:
            from finlora.evaluate.endpoint import Endpoint

            yield run, Endpoint(request.endpoint, request.model)
        elif request.backend == "vllm":
            from finlora.evaluate import vllm

            with vllm.serving(vllm.merged(trained, run, evaluation.tokenizer), run.subject) as lm:
                yield run, lm
        else:
            from finlora.evaluate import harness
            from finlora.models import load

            if model is None:
                print(f"loading {run.model} ({run.bits}-bit)", flush=True)
                model = load.load_base(trained.base_model, trained.bits, request.keep_quantised, fast=True)
            if run.adapter:
                model = load.attach(model, trained.adapter)
            yield run, harness.BatchedHFLM(model, evaluation.tokenizer, request.batch_tokens, trained.eot_tokens)


def ask(lm, run: Run, left: list[Unanswered], evaluation: Evaluation) -> None:
    """Put test sets to the model, one after the other, and keep every answer."""
    from finlora.evaluate.answer_cache import CachedLM  # late: it imports lm_eval, which takes seconds

    request = evaluation.request
    folder = request.results / run.subject
    trained_on = evaluation.trained.run.trained_on if run.adapter else None
    with CachedLM(lm, folder / "answers.part.jsonl") as lm, out_of_memory_named():
        for number, part in enumerate(left, 1):
            name = part.questions.name
            print(f"[{number}/{len(left)}] {run.subject}: {name}", flush=True)
            started = time.perf_counter()
            if part.kept:
                lm.keep(part.kept, part.questions.options)
            result, rows = answers(lm, part.questions, part.limit, trained_on)
            result = replace(result, seconds=round(time.perf_counter() - started, 3), limit=part.limit)
            if result.metric == "bertscore_f1":
                from finlora.evaluate import bertscore  # late: torch and transformers take seconds

                bertscore.add_bertscore(rows, request.encoder, request.layer)
                result = replace(result, encoder=bertscore.measured_by(request.encoder, request.layer))
            write_set(folder / name, result, rows)
            print_answered(result, rows, lm.reasons)
    (folder / "answers.part.jsonl").unlink(missing_ok=True)


@contextmanager
def out_of_memory_named() -> Iterator[None]:
    import torch  # late: an endpoint's answers do not need it

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the GPU is out of memory; the same command resumes with smaller batches with BATCH_TOKENS=2048, and "
            "BITS=4 KEEP_QUANTISED=1 needs less memory"
        ) from error


def run(evaluation: Evaluation) -> None:
    """Evaluate, and say where the answers are."""
    try:
        folders = evaluate(evaluation)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command resumes from the answers that are kept", file=sys.stderr)
        raise
    print("answers: " + ", ".join(shown(folder) for folder in folders) + "\nnext     make report")
