"""Questions put to a model through lm-evaluation-harness, with every answer kept as it comes.

lm-eval's own cache (CachingLM) pickles into SQLite and writes from a thread whose errors nobody sees. Here an answer is
a line of JSON, [key, answer, token counts], and a full disk stops the run with all that was answered until then.

MMLU and GSM8K are lm-eval's own tasks, 5-shot, under the chat template. Base and adapter are asked under the same
settings (`make eval RECIPE=... BASE=1 TASKS=forgetting`), so that the report can pair the questions.
"""

import json
import logging
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import OfflineModeIsEnabled
from lm_eval import evaluate, simple_evaluate, tasks
from lm_eval.api.model import LM, hash_args
from lm_eval.tasks import TaskManager, get_task_dict

from finlora.core.errors import UserError, first_line
from finlora.core.paths import RAW, shown
from finlora.data.neardup import normalise
from finlora.data.test_sets import TASK_FILES, all_sets
from finlora.evaluate.questions import FORGETTING, Encoder, Questions
from finlora.evaluate.results import ForgettingRow, Row, SetResult, print_answered, write_set

FORGETTING_SHOTS = 5


def ask(lm, folder: Path, left: list[Questions], encoder: Encoder, trained_on: set[str] | None) -> None:
    """Put test sets to the model, one after the other, and keep every answer in results/<subject>, the folder.

    trained_on: as in `answers`.
    """
    with CachedLM(lm, folder / "answers.part.jsonl") as lm, out_of_memory_named():
        for number, questions in enumerate(left, 1):
            print(f"[{number}/{len(left)}] {folder.name}: {questions.name}", flush=True)
            started = time.perf_counter()
            if questions.kept:
                lm.keep(questions.kept, questions.options)
            result, rows = answers(lm, questions, trained_on)
            result = replace(result, seconds=round(time.perf_counter() - started, 3), limit=questions.limit)
            write_set(folder / questions.name, result, rows, encoder)
            print_answered(result, rows, lm.reasons)
    (folder / "answers.part.jsonl").unlink(missing_ok=True)


@contextmanager
def out_of_memory_named() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the GPU is out of memory; the same command resumes with smaller batches with BATCH_TOKENS=2048, and "
            "BITS=4 KEEP_QUANTISED=1 needs less memory"
        ) from error


def answers(lm, questions: Questions, trained_on: set[str] | None = None) -> tuple[SetResult, list[Row]]:
    """The questions through lm-eval, and a row for each answer.

    `trained_on` holds normalised contexts; a row whose context is one of them is marked as seen.
    """
    name, source = questions.name, questions.source
    if source is None:
        return forgetting_answers(lm, questions)
    options = {"folder": str(questions.folder), "labels": questions.labels, "shots": questions.shots}
    manager = TaskManager(include_path=str(TASK_FILES), include_defaults=False, metadata=options)
    task = get_task_dict([name], manager)
    task[name].set_config("generation_kwargs", questions.options)
    answered = evaluate(lm, task, limit=questions.limit, apply_chat_template=True, bootstrap_iters=0)
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
    spec = all_sets()[name]
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
        **questions.length._asdict(),
        prompt_tokens=sum(row["prompt_tokens"] for row in rows),
        answer_tokens=sum(row["answer_tokens"] for row in rows),
        labels_used=questions.labels,
        shots=questions.shots or None,
        questions_sha256=questions.sha256,
    )
    return result, rows


def forgetting_answers(lm, questions: Questions) -> tuple[SetResult, list[ForgettingRow]]:
    """MMLU or GSM8K through lm-eval, and a row for each question, with `right` 0 or 1."""
    name, folder, about = questions.name, questions.folder, FORGETTING[questions.name]
    # Indexing all ten thousand of its tasks takes longer than asking a few questions.
    manager = TaskManager(include_path=str(Path(tasks.__file__).parent / about["files"]), include_defaults=False)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    subtasks = [task for task in manager.all_subtasks if task == name or name == "mmlu"]
    try:
        with redirect_stdout(None), tempfile.TemporaryDirectory() as fresh:
            if folder != RAW:
                # Off the net `datasets` takes whatever it cached before under a folder's name for the folder itself.
                copy = {"dataset_path": str(folder / name), "dataset_kwargs": {"cache_dir": fresh}}
                subtasks = [{"task": task} | copy for task in subtasks if in_copy(task, folder / name)]
            answered = simple_evaluate(
                lm,
                tasks=subtasks,
                task_manager=manager,
                num_fewshot=FORGETTING_SHOTS,
                limit=questions.limit,
                apply_chat_template=True,
                bootstrap_iters=0,
            )
    except (DatasetNotFoundError, OfflineModeIsEnabled, ConnectionError, FileNotFoundError, ValueError) as error:
        raise UserError(
            f"{name}: {about['dataset']} cannot be loaded ({first_line(error)}); go online once, or "
            f"name a folder that holds a copy of it as {name}/ with TESTS="
        ) from error
    rows = []
    for task in sorted(answered["samples"]):
        for sample in answered["samples"][task]:
            if sample["filter"] == about["filter"]:
                rows.append(
                    {
                        "row": len(rows) + 1,
                        "id": f"{task}/{sample['doc_id']}",
                        "right": sample[about["metric"]],
                        "prompt": sample["arguments"][0][0],
                        "target": str(sample["target"]),
                        "answer": str(sample["filtered_resps"][0]),
                    }
                )
    return SetResult(set=name, task="forgetting", metric="lm_eval", evaluated=len(rows), shots=FORGETTING_SHOTS), rows


def in_copy(task: str, copy: Path) -> bool:
    """A copy may hold some of MMLU's subjects only: each is a folder of its own."""
    return task == "gsm8k" or (copy / task.removeprefix("mmlu_")).is_dir()


class CachedLM(LM):
    """`lm` for lm-eval, with its answers kept in the file `path`; a context manager that closes the file.

    `tokens` is lm's: it maps a prompt to the token counts of prompt and answer and whether the answer ended. `reasons`
    is an endpoint's, for answers without text.
    """

    def __init__(self, lm: LM, path: Path):
        super().__init__()
        self.lm, self.tokens, self.path, self.lock = lm, lm.tokens, path, threading.Lock()
        self.reasons: dict[str, str] = getattr(lm, "reasons", {})
        self.answers: dict[str, tuple[Any, Any]] = {}  # by key: the answer, and the model's token counts for it
        if path.is_file():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    key, answer, counts = json.loads(line)
                    self.answers[key] = tuple(answer) if isinstance(answer, list) else answer, counts
                except ValueError:
                    continue  # the line that a killed run was writing
            print(f"resuming after {len(self.answers)} answers", flush=True)
        self.file = path.open("a", encoding="utf-8")
        self.file.write("\n" if self.answers else "")  # ends a line that was cut
        lm.set_cache_hook(self)

    def __enter__(self) -> "CachedLM":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # a full disk, which add_partial reported
            self.file.close()

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        """lm-eval's hook: called with every new answer as it comes, from any thread."""
        line = json.dumps([hash_args(kind, request), answer, self.tokens.get(request[0])], ensure_ascii=False)
        with self.lock:
            try:
                self.file.write(line + "\n")
                self.file.flush()
            except OSError as error:
                raise UserError(
                    f"{shown(str(self.path))}: cannot be written ({error.strerror}); free some space and run the "
                    "same command again: it resumes from there"
                ) from error

    def keep(self, rows: list[dict[str, Any]], options: dict[str, Any]) -> None:
        """Take rows of answers.jsonl for the answers to their prompts under lm-eval's generation options."""
        for row in rows:
            key = hash_args("generate_until", (row["prompt"], options))
            counts = row["prompt_tokens"], row["answer_tokens"], row["stopped"]
            self.answers.setdefault(key, (row["answer"], counts))

    def generate_until(self, requests: list) -> list[str]:
        return self._answer("generate_until", self.lm.generate_until, requests)

    def loglikelihood(self, requests: list) -> list[tuple[float, bool]]:
        return self._answer("loglikelihood", self.lm.loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list) -> list[float]:
        return self.lm.loglikelihood_rolling(requests)

    def _answer(self, kind: str, ask, requests: list) -> list:
        keys = [hash_args(kind, request.args) for request in requests]
        new = {key: request for key, request in zip(keys, requests, strict=True) if key not in self.answers}
        if new:
            for (key, request), answer in zip(new.items(), ask(list(new.values())), strict=True):
                self.answers[key] = answer, self.tokens.get(request.args[0])
        for key, request in zip(keys, requests, strict=True):
            self.tokens[request.args[0]] = self.answers[key][1]
        return [self.answers[key][0] for key in keys]

    @property
    def tokenizer_name(self) -> str:
        return self.lm.tokenizer_name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.lm.chat_template(chat_template)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.lm.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt)
