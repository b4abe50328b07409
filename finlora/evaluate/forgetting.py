"""What fine-tuning may have cost: MMLU and GSM8K as lm-evaluation-harness has them, 5-shot, under the chat template.

Both are asked of base and adapter under the same settings (`make eval RECIPE=... BASE=1 TASKS=forgetting`), so that the
report can pair the questions.
"""

import logging
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

from finlora.core.errors import UserError, first_line
from finlora.core.paths import RAW
from finlora.evaluate.results import ForgettingRow, SetResult

TASKS = {
    "mmlu": {"files": "mmlu/default", "metric": "acc", "filter": "none", "dataset": "cais/mmlu"},
    "gsm8k": {
        "files": "gsm8k",
        "metric": "exact_match",
        "filter": "flexible-extract",
        "dataset": "openai/gsm8k",
    },
}
SHOTS = 5


def choose(names: list[str], others: Callable[[list[str]], list[str]]) -> list[str]:
    """The sets that names stand for; `forgetting` is both of these."""
    own = [task for name in names for task in (TASKS if name == "forgetting" else [name]) if task in TASKS]
    rest = [name for name in names if name not in TASKS and name != "forgetting"]
    return list(dict.fromkeys((others(rest) if rest else []) + own))


def check(name: str, folder: Path) -> None:
    """UserError where a local copy is asked for (TESTS=) and is not there."""
    if folder != RAW and not (folder / name).is_dir():
        raise UserError(
            f"{folder / name}: is missing; put a copy of {TASKS[name]['dataset']} there, or leave TESTS= out"
        )


def answers(lm, name: str, folder: Path, limit: int | None) -> tuple[SetResult, list[ForgettingRow]]:
    """One of the two through lm-eval, and a row for each question, with `right` 0 or 1."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import OfflineModeIsEnabled
    from lm_eval import simple_evaluate, tasks
    from lm_eval.tasks import TaskManager

    # Indexing all ten thousand of its tasks takes longer than asking a few questions.
    manager = TaskManager(include_path=str(Path(tasks.__file__).parent / TASKS[name]["files"]), include_defaults=False)
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
                num_fewshot=SHOTS,
                limit=limit,
                apply_chat_template=True,
                bootstrap_iters=0,
            )
    except (DatasetNotFoundError, OfflineModeIsEnabled, ConnectionError, FileNotFoundError, ValueError) as error:
        raise UserError(
            f"{name}: {TASKS[name]['dataset']} cannot be loaded ({first_line(error)}); go online once, or "
            f"name a folder that holds a copy of it as {name}/ with TESTS="
        ) from error
    metric, filter_name = TASKS[name]["metric"], TASKS[name]["filter"]
    rows = []
    for task in sorted(answered["samples"]):
        for sample in answered["samples"][task]:
            if sample["filter"] == filter_name:
                rows.append(
                    {
                        "row": len(rows) + 1,
                        "id": f"{task}/{sample['doc_id']}",
                        "right": sample[metric],
                        "prompt": sample["arguments"][0][0],
                        "target": str(sample["target"]),
                        "answer": str(sample["filtered_resps"][0]),
                    }
                )
    return SetResult(set=name, task="forgetting", metric="lm_eval", evaluated=len(rows), shots=SHOTS), rows


def in_copy(task: str, copy: Path) -> bool:
    """A copy may hold some of MMLU's subjects only: each is a folder of its own."""
    return task == "gsm8k" or (copy / task.removeprefix("mmlu_")).is_dir()
