"""Evaluate a trained adapter, a base model, or anything behind an endpoint, on FinLoRA's test sets (`make eval`).

finlora eval --recipe sentiment_r8_dora [--base] [--limit 200] [--tasks fpb,tfns] [--labels published]
finlora eval --model <hub id or folder> [--adapter <hub id or folder>] [--bits 8] --tasks general
finlora eval --endpoint http://localhost:8000/v1 --model <name served> --tasks general

lm-evaluation-harness asks, and every answer is kept in results/<name>/<set>/; `make report` scores them. After an
interruption the same command resumes: answers are written as they come, and finished sets are not asked again.
"""

import datetime
import hashlib
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from finlora.core.errors import UserError
from finlora.core.files import read_json
from finlora.core.machine import gpus
from finlora.core.paths import existing, shown
from finlora.core.provenance import git_state, versions
from finlora.data.few_shot import questions
from finlora.data.neardup import normalise
from finlora.data.test_sets import TASK_FILES, SetRows, all_sets, read_set
from finlora.evaluate import forgetting
from finlora.evaluate.evaluation import Evaluation, Request, resolve
from finlora.evaluate.lengths import Length, answer_length
from finlora.evaluate.results import Row, Run, SetResult, kept_result, kept_rows, write_record, write_set
from finlora.evaluate.scorers import after_answer, bertscore_items, scorings, summary
from finlora.models.load import check_fits
from finlora.recipes.bases import fetch_base
from finlora.train.runs import check_base_weights, folder_lock

# Answers in a folder whose run.json differs in one of these are another model's.
IDENTITY = "model base_sha256 adapter_sha256 bits prompt shots template_sha256 ends way backend".split()
DISK_NEEDED = 64 * 2**20


def evaluate(request: Request) -> list[Path]:
    """Evaluate as asked and return the folders of the results, the base's first. Raises UserError."""
    evaluation = resolve(request)
    check(evaluation)
    tokenizer = None if request.endpoint else load_tokenizer(evaluation)
    lengths = answer_lengths(evaluation, tokenizer)
    runs = evaluation.runs(tokenizer)
    with ExitStack() as stack:
        for run in runs:  # two at a time would share one file of answers
            stack.enter_context(folder_lock(request.results / run.subject, make=False))
        left = {run.subject: prepare_folder(run, evaluation, lengths) for run in runs}
        unfinished = [run for run in runs if left[run.subject]]
        models = stack.enter_context(closing(open_models(evaluation, unfinished, tokenizer)))  # ends a server of ours
        for run, lm in models:
            ask(lm, run, left[run.subject], evaluation, lengths)
    return [request.results / run.subject for run in runs]


def answer_lengths(evaluation: Evaluation, tokenizer) -> dict[str, Length]:
    """How long the answers to each set may be; general tasks have limits of their own."""
    sets = [name for name in evaluation.sets if name not in forgetting.TASKS]
    return {name: answer_length(name, evaluation.folder, evaluation.request.lengths, tokenizer) for name in sets}


def check(evaluation: Evaluation) -> None:
    """UserError for a test file or an encoder that is missing and for a full disk, before weights are loaded."""
    for name in evaluation.sets:
        if name in forgetting.TASKS:
            forgetting.check(name, evaluation.folder)
        else:
            questions_sha256(name, evaluation.folder, evaluation.request)
    if not evaluation.request.endpoint:
        fetch_base_model(evaluation)
    if any(name in all_sets() and all_sets()[name].metric == "bertscore_f1" for name in evaluation.sets):
        add_bertscore([{"answer": "one", "target": "one"}], evaluation.request)
    results = evaluation.request.results
    if shutil.disk_usage(existing(results)).free < DISK_NEEDED:
        raise UserError(f"{results}: the disk is full; free {DISK_NEEDED >> 20} MiB")


def fetch_base_model(evaluation: Evaluation) -> None:
    """Bring the base into the hub's cache. UserError where it is nowhere, or not what the adapter's run recorded."""
    model = evaluation.model
    if not Path(model).is_dir():
        fetch_base(Path(evaluation.name), {"base_model": model}, "the base, which MODEL= names")
        if evaluation.adapter:
            check_base_weights(evaluation.adapter, model)


def load_tokenizer(evaluation: Evaluation):
    """The tokenizer with the prompt's chat template, after the adapter's shapes are held against the base's."""
    if evaluation.adapter:
        check_fits(evaluation.adapter, evaluation.adapter_facts, evaluation.model)
    from finlora.models import load

    return load.load_tokenizer(evaluation.model, evaluation.adapter, evaluation.request.prompt)


def open_models(evaluation: Evaluation, runs: list[Run], tokenizer) -> Iterator[tuple[Run, Any]]:
    """Yield each run with its model as lm-eval takes it. The base's weights are loaded once, the adapter's come last.

    The engines are imported here, since each takes seconds and only one is used.
    """
    request, model = evaluation.request, None
    for run in runs:
        if request.endpoint:
            from finlora.evaluate.endpoint import Endpoint

            yield run, Endpoint(request.endpoint, request.model)
        elif request.backend == "vllm":
            from finlora.evaluate import vllm

            with vllm.serving(vllm.merged(evaluation, run, tokenizer), run.subject) as lm:
                yield run, lm
        else:
            from finlora.evaluate import harness
            from finlora.models import load

            if model is None:
                print(f"loading {run.model} ({run.bits}-bit)", flush=True)
                model = load.load_base(evaluation.model, evaluation.bits, request.keep_quantised, fast=True)
            if run.adapter:
                model = load.attach(model, evaluation.adapter)
            yield run, harness.BatchedHFLM(model, tokenizer, request.batch_tokens, evaluation.eot_tokens)


def prepare_folder(run: Run, evaluation: Evaluation, lengths: dict[str, Length]) -> list[str]:
    """Make results/<subject> this run's, with run.json, and return the test sets that are still to be asked."""
    request = evaluation.request
    folder = request.results / run.subject
    before = read_json(folder / "run.json")
    changed = [key for key in IDENTITY if before and before.get(key) != getattr(run, key)]
    if "ends" in changed and before.get("ends") is None:
        changed.remove("ends")  # earlier versions did not write them
    if "base_sha256" in changed and not (run.base_sha256 and before.get("base_sha256")):
        changed.remove("base_sha256")  # a hub's model before it was fetched, or answers of before 2026-11
    if folder.is_dir() and (request.force or changed):
        if changed and not request.force:
            values = [(key, str(before.get(key))[:40], str(getattr(run, key))[:40]) for key in changed[:2]]
            what = ", ".join(f"{key}: {old} -> {new}" for key, old, new in values)
            raise UserError(
                f"{shown(str(folder))}: holds the answers of another model ({what}); FORCE=1 sets them aside, "
                "NAME=<another> keeps both"
            )
        aside = request.results / "aside" / f"{folder.name}.{datetime.datetime.now():%Y%m%d-%H%M%S}"
        aside.parent.mkdir(exist_ok=True)
        folder.rename(aside)
        print(f"set aside: {shown(str(aside))}")
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    device = gpus()[0][0] if gpus() else "CPU"
    machine = {"versions": versions(), "git": git_state(), "device": device, "started": started}
    write_record(folder / "run.json", replace(run, **machine))
    left = [name for name in evaluation.sets if not is_answered(folder / name, evaluation, lengths.get(name))]
    for name in evaluation.sets:
        if name not in left:
            print(f"{run.subject}: {name} is answered already; FORCE=1 asks again")
    return left


def is_answered(folder: Path, evaluation: Evaluation, length: Length | None) -> bool:
    """Whether results/<subject>/<set> holds the answers asked for, or more; what measures them is brought up to date.

    length: None for a forgetting set.
    """
    result, request = kept_result(folder), evaluation.request
    if result is None:
        return False
    if length is None:
        return result.limit is None or (request.limit is not None and request.limit <= result.limit)
    test_set = read_set(folder.name, evaluation.folder)
    if result.sha256 != test_set.sha256:
        print(f"{test_set.path}: has changed since {folder.parent.name} answered it; asking again")
        return False
    if result.questions_sha256 != questions_sha256(folder.name, evaluation.folder, request):
        print(f"{folder.parent.name}: {folder.name} was answered with other examples; asking again")
        return False
    if not result.lengths:  # until 2026-11 lm-eval cut answers at their first blank line
        print(f"{folder.parent.name}: {folder.name} was answered with answers cut at blank lines; asking again")
        return False
    correct_kept(folder, result, test_set)
    if result.encoder and result.encoder != encoder_named(request)[2]:
        rows = kept_rows(folder)
        result = replace(result, encoder=add_bertscore(rows, request))
        write_set(folder, result, rows)
    if result.evaluated < min(request.limit or len(test_set.rows), len(test_set.rows)):
        return False
    if result.max_new_tokens != length.max_new_tokens:
        rows = kept_rows(folder)
        if cut := len(rows) - len(uncut(rows, result, length)):
            print(
                f"{folder.parent.name}: {folder.name} was answered with up to {result.max_new_tokens} tokens; "
                f"asking {cut} rows again with {length.max_new_tokens}"
            )
            return False
    # The answers are the same; only what counts as right, and what would be cut, is another.
    measured = replace(result, labels_used=request.labels, **length._asdict())
    if measured != result:
        write_record(folder / "set.json", measured)
    return True


def correct_kept(folder: Path, result: SetResult, test_set: SetRows) -> None:
    """Bring the corrected targets beside kept answers up to date with data/corrections.yaml."""
    rows = kept_rows(folder)
    targets = {row.row: row.corrected for row in test_set.rows}
    if changed := [row for row in rows if row["corrected"] != targets[row["row"]]]:
        for row in changed:
            row["corrected"] = targets[row["row"]]
        write_set(folder, result, rows)
        print(f"{folder.parent.name}: {folder.name} has new corrections of {len(changed)} rows; its answers stay")


def uncut(rows: list[Row], result: SetResult, length: Length) -> list[Row]:
    """The rows whose answers would be the same if this were the most tokens that they may have."""
    same = result.max_new_tokens == length.max_new_tokens
    return [row for row in rows if same or (row["stopped"] and row["answer_tokens"] <= length.max_new_tokens)]


def ask(lm, run: Run, sets: list[str], evaluation: Evaluation, lengths: dict[str, Length]) -> None:
    """Put test sets to the model, one after the other, and keep every answer."""
    from finlora.evaluate.answer_cache import CachedLM

    request = evaluation.request
    folder = request.results / run.subject
    with CachedLM(lm, folder / "answers.part.jsonl") as lm, out_of_memory_named():
        for number, name in enumerate(sets, 1):
            print(f"[{number}/{len(sets)}] {run.subject}: {name}", flush=True)
            started = time.perf_counter()
            if name in forgetting.TASKS:
                limit = request.limit
                result, rows = forgetting.answers(lm, name, evaluation.folder, limit)
            else:
                # Answers to fewer rows, or to rows that have changed since, are not asked for again.
                before, limit = kept_result(folder / name), request.limit
                if before and before.lengths:
                    rows = uncut(kept_rows(folder / name), before, lengths[name])
                    lm.keep(rows, generation_options(lengths[name]))
                if before and limit and before.sha256 == read_set(name, evaluation.folder).sha256:
                    limit = before.limit and max(limit, before.limit)  # no answer is taken away
                trained_on = evaluation.trained_on if run.adapter else None
                result, rows = answers(lm, name, evaluation.folder, request, limit, lengths[name], trained_on)
                warn_of_empty(name, rows, lm.reasons)
            result = replace(result, seconds=round(time.perf_counter() - started, 3), limit=limit)
            if result.metric == "bertscore_f1":
                result = replace(result, encoder=add_bertscore(rows, request))
            write_set(folder / name, result, rows)
            print(summary_line(result, rows), flush=True)
    (folder / "answers.part.jsonl").unlink(missing_ok=True)


def warn_of_empty(name: str, rows: list[Row], reasons: dict[str, str]) -> None:
    """Say which rows have an empty answer; reasons: an endpoint's, by prompt."""
    if empty := [row for row in rows if not row["answer"].strip()]:
        lines = ", ".join(str(row["row"]) for row in empty[:5]) + ", ..." * (len(empty) > 5)
        why = ", ".join(sorted({reasons[row["prompt"]] for row in empty if row["prompt"] in reasons}))
        count = f"{len(empty)} empty answer{'s' * (len(empty) > 1)}"
        print(f"warning: {name}: {count} (rows {lines}{f'; {why}' if why else ''})", file=sys.stderr)


def generation_options(length: Length) -> dict[str, Any]:
    """lm-eval's, in the order of its cache keys. Without `until` it would cut answers at a blank line (0.4.11)."""
    return {"max_gen_toks": length.max_new_tokens, "do_sample": False, "until": []}


def questions_sha256(name: str, folder: Path, request: Request) -> str | None:
    """Of all questions of a set with their examples; None without any. UserError where a file is not there."""
    asked = questions(name, folder, request.shots, request.labels)
    return hashlib.sha256("\0".join(asked).encode()).hexdigest() if request.shots else None


def answers(
    lm, name: str, folder: Path, request: Request, limit: int | None, length: Length, trained_on: set[str] | None = None
) -> tuple[SetResult, list[Row]]:
    """One of FinLoRA's test sets through lm-eval, and a row for each answer.

    `trained_on` holds normalised contexts; a row whose context is one of them is marked as seen.
    """
    from lm_eval import evaluate
    from lm_eval.tasks import TaskManager, get_task_dict

    options = {"folder": str(folder), "labels": request.labels, "shots": request.shots}
    tasks = TaskManager(include_path=str(TASK_FILES), include_defaults=False, metadata=options)
    task = get_task_dict([name], tasks)
    task[name].set_config("generation_kwargs", generation_options(length))
    answered = evaluate(lm, task, limit=limit, apply_chat_template=True, bootstrap_iters=0)
    rows = []
    for sample in sorted(answered["samples"][name], key=lambda sample: sample["doc"]["row"]):
        doc, prompt = sample["doc"], sample["arguments"][0][0]
        prompt_tokens, answer_tokens, stopped = lm.tokens[prompt]
        rows.append(
            {
                "row": doc["row"],
                "prompt": prompt,
                "context": doc["context"],
                "target": doc["published"],
                "corrected": doc["corrected"],
                "answer": sample["resps"][0][0],
                "seen": None if trained_on is None else normalise(doc["context"]) in trained_on,
                "prompt_tokens": prompt_tokens,
                "answer_tokens": answer_tokens,
                "stopped": stopped,
            }
        )
    spec, source = all_sets()[name], read_set(name, folder)
    if source.left_out:
        lines = ", ".join(str(line) for line, _ in source.left_out[:5])
        print(f"warning: {source.path}: {len(source.left_out)} rows without an answer were left out (line {lines})")
    result = SetResult(
        set=name,
        task=spec.task,
        file=source.path,
        sha256=source.sha256,
        published_file=source.published_file,
        rows=len(source.rows),
        evaluated=len(rows),
        labels=spec.labels,
        metric=spec.metric,
        **length._asdict(),
        prompt_tokens=sum(row["prompt_tokens"] for row in rows),
        answer_tokens=sum(row["answer_tokens"] for row in rows),
        labels_used=request.labels,
        shots=request.shots or None,
        questions_sha256=questions_sha256(name, folder, request),
    )
    return result, rows


def add_bertscore(rows: list[dict[str, Any]], request: Request) -> str:
    """Give each row its BERTScore F1 and return which encoder and layer measured it."""
    from finlora.evaluate.bertscore import bertscore

    encoder, layer, named = encoder_named(request)
    answers = [after_answer(row["answer"]) for row in rows]
    values = bertscore(answers, [row["target"] for row in rows], encoder, layer)
    for row, value in zip(rows, values, strict=True):
        row["bertscore"] = value
    return named


def encoder_named(request: Request) -> tuple[str, int, str]:
    from finlora.evaluate.bertscore import ENCODER, LAYER

    encoder, layer = request.encoder or ENCODER, LAYER if request.layer is None else request.layer
    return encoder, layer, f"{shown(encoder)}, layer {layer}"


def summary_line(result: SetResult, rows: list[dict[str, Any]]) -> str:
    if result.metric == "lm_eval":
        scores = {"score": sum(row["right"] for row in rows) / len(rows)}
    elif result.metric == "bertscore_f1":
        scores = {"BERTScore F1": summary(bertscore_items([row["bertscore"] for row in rows]))["accuracy"]}
    else:
        targets = [row["corrected" if result.labels_used == "corrected" else "target"] for row in rows]
        texts = [row["answer"] for row in rows]
        scorers = scorings(result.set, all_sets()[result.set])
        scores = {name: summary(score(texts, targets))["accuracy"] for name, score in scorers.items()}
    text = ", ".join(f"{name} {value:.1%}" for name, value in scores.items())
    return f"{result.set}: {text} of {len(rows)} rows in {result.seconds:.0f} s"


@contextmanager
def out_of_memory_named():
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the GPU is out of memory; the same command resumes with smaller batches with BATCH_TOKENS=2048, and "
            "BITS=4 KEEP_QUANTISED=1 needs less memory"
        ) from error


def run(request: Request) -> None:
    """Evaluate, and say where the answers are."""
    try:
        folders = evaluate(request)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command resumes from the answers that are kept", file=sys.stderr)
        raise
    print("answers: " + ", ".join(shown(str(folder)) for folder in folders) + "\nnext     make report")
