"""Evaluate a trained adapter, a base model, or anything behind an endpoint, on FinLoRA's test sets (`make eval`).

finlora eval --recipe sentiment_r8_dora [--base] [--limit 200] [--tasks fpb,tfns] [--labels published]
finlora eval --model <hub id or folder> [--adapter <hub id or folder>] [--bits 8] --tasks general
finlora eval --endpoint http://localhost:8000/v1 --model <name served> --tasks general

lm-evaluation-harness asks, and every answer is kept in results/<name>/<set>/; `make report` scores them. After an
interruption the same command resumes: answers are written as they come, and finished sets are not asked again.
"""

import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path
from typing import Any

from finlora.core.errors import UserError
from finlora.core.paths import existing, shown
from finlora.core.startup import log_to
from finlora.evaluate.evaluation import Evaluation
from finlora.evaluate.results import Run, prepare_folder
from finlora.train.runs import folder_lock

DISK_NEEDED = 64 * 2**20


def evaluate(evaluation: Evaluation) -> list[Path]:
    """Ask what is left to ask and return the folders of the results, the base's first. Raises UserError."""
    check(evaluation)
    questions, encoder = evaluation.questions, evaluation.encoder
    folders = [evaluation.results / run.subject for run in evaluation.runs]
    with ExitStack() as stack:
        for folder in folders:  # two at a time would share one file of answers
            stack.enter_context(folder_lock(folder, make=False))
        left = {}
        for run, folder in zip(evaluation.runs, folders, strict=True):
            if unanswered := prepare_folder(folder, run, questions, encoder, evaluation.force):
                left[run.subject] = unanswered
        if left:
            log_to(folders[-1] / "eval.log")
        models = open_models(evaluation, [run for run in evaluation.runs if run.subject in left])
        for run, lm in stack.enter_context(closing(models)):  # closing ends a server of ours
            from finlora.evaluate.asking import ask  # late: it imports lm_eval, which takes seconds

            trained_on = evaluation.trained.run.trained_on if run.adapter else None
            ask(lm, evaluation.results / run.subject, left[run.subject], encoder, trained_on)
    return folders


def check(evaluation: Evaluation) -> None:
    """UserError for an encoder that is missing and for a full disk, before weights are loaded."""
    if any(questions.metric == "bertscore_f1" for questions in evaluation.questions):
        from finlora.evaluate.bertscore import add_bertscore  # late: torch and transformers take seconds

        add_bertscore([{"answer": "one", "target": "one"}], evaluation.encoder)
    if shutil.disk_usage(existing(evaluation.results)).free < DISK_NEEDED:
        raise UserError(f"{evaluation.results}: the disk is full; free {DISK_NEEDED >> 20} MiB")


def open_models(evaluation: Evaluation, runs: list[Run]) -> Iterator[tuple[Run, Any]]:
    """Yield each run with its model as lm-eval takes it. The base's weights are loaded once, the adapter's come last.

    The engines are imported here, since each takes seconds and only one is used.
    """
    trained, model = evaluation.trained, None
    for run in runs:
        if run.backend != "transformers":
            from finlora.evaluate import vllm
            from finlora.evaluate.endpoint import Endpoint

            ours = run.way != "endpoint"
            server = vllm.serving(trained, run, evaluation.tokenizer) if ours else nullcontext(run.backend)
            with server as url:
                yield run, Endpoint(url, run.subject if ours else run.model)
        else:
            from finlora.evaluate import harness
            from finlora.models import load

            if model is None:
                print(f"loading {run.model} ({run.bits}-bit)", flush=True)
                keep_quantised = run.way in ("quantised", "cached norms")
                model = load.load_base(trained.base_model, trained.bits, keep_quantised, fast=True)
            if run.adapter:
                model = load.attach(model, trained.adapter)
            yield run, harness.BatchedHFLM(model, evaluation.tokenizer, evaluation.batch_tokens, trained.eot_tokens)


def run(evaluation: Evaluation) -> None:
    """Evaluate, and say where the answers are."""
    try:
        folders = evaluate(evaluation)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command resumes from the answers that are kept", file=sys.stderr)
        raise
    print("answers: " + ", ".join(shown(folder) for folder in folders) + "\nnext     make report")
