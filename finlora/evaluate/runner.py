"""Evaluate a trained adapter, a base model, or anything behind an endpoint, on FinLoRA's test sets (`make eval`).

finlora eval --recipe sentiment_r8_dora [--base] [--limit 200] [--tasks fpb,tfns] [--labels
    published]
finlora eval --model <hub id or folder> [--adapter <hub id or folder>] [--bits 8] --tasks general
finlora eval --endpoint http://localhost:8000/v1 --model <name served> --tasks general

lm-evaluation-harness asks and we keep every answer in results/<subject>/<set>/; `make report` scores them. Interrupted,
the same command goes on: answers are written as they come, and finished sets are not asked again.
"""

import datetime
import json
import re
import shutil
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finlora.core.errors import UserError
from finlora.core.files import read_json, replacing
from finlora.core.machine import gpus
from finlora.core.paths import RAW, SAMPLE, existing, shown, slug
from finlora.core.provenance import git_state, versions
from finlora.data.neardup import normalise
from finlora.data.test_sets import TASK_FILES, all_sets, choose, read_set
from finlora.evaluate import forgetting
from finlora.evaluate.results import RESULTS
from finlora.evaluate.scorers import bertscore_items, scorings, summary
from finlora.models.load import adapter_facts, check_fits, prompts, resolve_adapter, template_sha256
from finlora.train.runs import of_recipe

# What makes answers another subject's. Where one of these differs, an old folder's answers are not these.
IDENTITY = ("model", "adapter_sha256", "bits", "prompt", "template_sha256", "way", "backend")
DISK_NEEDED = 64 * 2**20


@dataclass
class Request:
    """What to evaluate, and how. Without a recipe, a model or an adapter there is nothing to evaluate."""

    recipe: str | None = None  # a trained one, by its name or FinLoRA's
    model: str | None = None  # base model: hub id or folder; with an endpoint the name that is served
    adapter: str | None = None  # PEFT adapter: hub id or folder
    base: bool = False  # evaluate the base model too
    bits: int | None = None  # 16, 8 or 4: of the base's weights; None for the recipe's, or 16
    tasks: str | None = None  # test sets, tasks or groups, comma-separated; None for the recipe's
    limit: int | None = None  # the first rows of each set only
    labels: str = "corrected"  # or published
    prompt: str = "saved"  # beside the adapter; or finlora_inst, raw
    tests: str | None = None  # folder with test files of one's own
    tiny: bool = False  # the adapter of a TINY=1 run
    name: str | None = None  # of the results
    force: bool = False  # set earlier answers aside and ask anew
    keep_quantised: bool = False  # leave 8- and 4-bit weights as they are
    batch_tokens: int | None = None  # prompt tokens at a time; None for what memory allows
    backend: str = "transformers"  # or vllm
    endpoint: str | None = None  # base URL of an OpenAI-compatible server
    encoder: str | None = None  # BERTScore's: hub id or folder
    layer: int | None = None  # of the encoder
    results: Path = field(default_factory=lambda: RESULTS)  # the folder that answers are kept in

    def __post_init__(self) -> None:
        self.results = self.results.resolve()


def evaluate(wanted: Request) -> list[Path]:
    """Evaluate as asked and return the folders of the subjects, the base first. Raises UserError."""
    plan = resolve(wanted)
    for name in plan["sets"]:
        forgetting.check(name, plan["folder"]) if name in forgetting.TASKS else read_set(name, plan["folder"])
    if any(name in all_sets() and all_sets()[name].metric == "bertscore_f1" for name in plan["sets"]):
        add_bertscore([{"answer": "one", "target": "one"}], wanted)  # an encoder that is missing is found out here
    if shutil.disk_usage(existing(wanted.results)).free < DISK_NEEDED:
        raise UserError(f"{wanted.results}: the disk is full; free {DISK_NEEDED >> 20} MiB")
    return (on_endpoint if wanted.endpoint else on_weights)(plan, wanted)


def resolve(wanted: Request) -> dict[str, Any]:
    """What is to be evaluated: recipe, model, adapter, bits, sets, folder of the test files. Loads nothing."""
    plan: dict[str, Any] = {"recipe": None, "adapter": None, "training": None, "tiny": False, "trained_on": None}
    if wanted.recipe and (wanted.model or wanted.adapter or wanted.endpoint):
        raise UserError("RECIPE= says model and adapter already; leave out MODEL=, ADAPTER= and ENDPOINT=, or RECIPE=")
    if wanted.recipe:
        plan |= of_recipe(wanted.recipe, wanted.tiny)
    elif wanted.model or wanted.adapter:
        plan["subject"] = wanted.name or slug(wanted.adapter or wanted.model)
        plan["model"] = wanted.model
        plan["default_sets"] = []
    else:
        raise UserError("nothing to evaluate; give RECIPE=<trained recipe>, or MODEL= and ADAPTER= (hub id or folder)")
    if wanted.adapter:
        plan["adapter"] = resolve_adapter(wanted.adapter)
    if plan["adapter"]:
        plan["facts"] = adapter_facts(plan["adapter"])
        plan["model"] = plan["model"] or plan["facts"]["base"]
        if wanted.adapter and not wanted.model:
            print(f"MODEL= is not given: taking the adapter's own base, {plan['model']}")
    plan["bits"] = wanted.bits or plan.get("bits") or 16
    if wanted.name:
        if slug(wanted.name) != wanted.name:
            raise UserError(f"NAME={wanted.name}: becomes a folder of results/; write {slug(wanted.name)}")
        plan["subject"] = wanted.name
    if wanted.prompt != "saved":
        plan["subject"] += f"-{wanted.prompt}"
    if wanted.prompt not in prompts():
        raise UserError(f"PROMPT={wanted.prompt}: there are {', '.join(prompts())}")
    names = [name for name in re.split(r"[,\s]+", wanted.tasks or "") if name]
    plan["sets"] = forgetting.choose(names, choose) if names else plan["default_sets"]
    if not plan["sets"]:
        raise UserError(
            "no test set is named; give TASKS=, for example TASKS=general, TASKS=sentiment or TASKS=fpb,tfns"
        )
    plan["folder"] = Path(wanted.tests) if wanted.tests else RAW
    if (
        not wanted.tests
        and plan["tiny"]
        and not any((RAW / all_sets()[name].file).is_file() for name in plan["sets"])
    ):
        plan["folder"] = SAMPLE
        plan["sets"] = [name for name in plan["sets"] if (SAMPLE / all_sets()[name].file).is_file()]
        if not plan["sets"]:
            raise UserError("the test files are not here and there is no sample of them; run `make data TASK=...`")
        print(f"no test file is fetched: taking the sample rows of {', '.join(plan['sets'])}")
    return plan


def on_weights(plan: dict[str, Any], wanted: Request) -> list[Path]:
    """Load the base, evaluate it where it is asked for, attach the adapter and evaluate that."""
    if plan["adapter"]:
        check_fits(plan["adapter"], plan["model"])
    from finlora.evaluate import harness
    from finlora.models import load as models

    tokenizer = models.load_tokenizer(plan["model"], plan["adapter"], wanted.prompt)
    common = {
        "model": shown(plan["model"]),
        "bits": plan["bits"],
        "prompt": wanted.prompt,
        "template_sha256": template_sha256(tokenizer),
        "backend": wanted.backend,
        "tiny": plan["tiny"],
    }
    quantised = plan["bits"] != 16 and wanted.keep_quantised
    base = common | {
        "subject": f"base-{slug(plan['model'])}-{plan['bits']}bit"
        + (f"-{wanted.prompt}" if wanted.prompt != "saved" else ""),
        "recipe": None,
        "adapter": None,
        "adapter_sha256": None,
        "method": "base",
        "r": None,
        "alpha": None,
        "way": "quantised" if quantised else "plain",
        "training": None,
    }
    subjects = [base] if wanted.base or not plan["adapter"] else []
    if plan["adapter"]:
        facts = plan["facts"]
        subjects.append(
            common
            | {
                "subject": plan["subject"],
                "recipe": plan["recipe"],
                "adapter": shown(str(plan["adapter"])),
                "adapter_sha256": facts["sha256"],
                "method": facts["method"],
                "r": facts["r"],
                "alpha": facts["alpha"],
                "way": "cached norms" if quantised else "merged",
                "training": plan["training"],
            }
        )
    else:
        subjects[0]["subject"] = wanted.name or base["subject"]
    left = {subject["subject"]: claim(subject, plan, wanted) for subject in subjects}
    if wanted.backend == "vllm":
        return on_vllm(plan, wanted, tokenizer, subjects, left)
    model = None
    for subject in subjects:
        if not left[subject["subject"]]:
            continue
        if model is None:
            print(f"loading {subject['model']} ({plan['bits']}-bit)", flush=True)
            model = models.load_base(plan["model"], plan["bits"], wanted.keep_quantised)
        if subject["adapter"]:
            model = models.attach(model, plan["adapter"])
        lm = harness.BatchedHFLM(model, tokenizer, wanted.batch_tokens)
        ask(lm, subject, left[subject["subject"]], plan, wanted)
    return [wanted.results / subject["subject"] for subject in subjects]


def on_vllm(plan, wanted, tokenizer, subjects, left) -> list[Path]:
    """The same through a vLLM server of our own on the merged weights."""
    from finlora.evaluate import vllm

    for subject in subjects:
        if left[subject["subject"]]:
            weights = vllm.merged(plan, subject, tokenizer)
            with vllm.serving(weights, subject["subject"]) as lm:
                ask(lm, subject, left[subject["subject"]], plan, wanted)
    return [wanted.results / subject["subject"] for subject in subjects]


def on_endpoint(plan: dict[str, Any], wanted: Request) -> list[Path]:
    """Evaluate a model that somebody serves; its prompt is the server's."""
    from finlora.evaluate.endpoint import Endpoint

    if wanted.adapter or wanted.base or not wanted.model:
        raise UserError("ENDPOINT= takes MODEL=<the name it serves> and neither ADAPTER= nor BASE=1")
    subject = dict.fromkeys(
        ("recipe", "adapter", "adapter_sha256", "bits", "r", "alpha", "template_sha256", "training")
    )
    subject |= {"subject": plan["subject"], "model": wanted.model, "method": "base", "prompt": "endpoint"}
    subject |= {"way": "endpoint", "backend": wanted.endpoint, "tiny": False}
    if sets := claim(subject, plan, wanted):
        ask(Endpoint(wanted.endpoint, wanted.model), subject, sets, plan, wanted)
    return [wanted.results / subject["subject"]]


def claim(subject: dict[str, Any], plan: dict[str, Any], wanted: Request) -> list[str]:
    """Make results/<subject> this evaluation's and return the sets that are still to be asked."""
    folder = wanted.results / subject["subject"]
    before = read_json(folder / "run.json")
    changed = [key for key in IDENTITY if before and before.get(key) != subject[key]]
    if folder.is_dir() and (wanted.force or changed):
        if changed and not wanted.force:
            what = ", ".join(f"{key}: {str(before.get(key))[:40]} -> {str(subject[key])[:40]}" for key in changed[:2])
            raise UserError(
                f"{shown(str(folder))}: holds the answers of another subject ({what}); FORCE=1 sets them aside, "
                "NAME=<another> keeps both"
            )
        aside = wanted.results / "aside" / f"{folder.name}.{datetime.datetime.now():%Y%m%d-%H%M%S}"
        aside.parent.mkdir(exist_ok=True)
        folder.rename(aside)
        print(f"set aside: {shown(str(aside))}")
    with replacing(folder / "run.json") as file:
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        facts = {
            "versions": versions(),
            "git": git_state(),
            "device": gpus()[0][0] if gpus() else "CPU",
            "started": now,
        }
        json.dump(subject | facts, file, indent=1)
        file.write("\n")
    left = [name for name in plan["sets"] if not is_answered(folder / name, name, plan, wanted)]
    for name in plan["sets"]:
        if name not in left:
            print(f"{subject['subject']}: {name} is answered already; FORCE=1 asks again")
    return left


def is_answered(folder: Path, name: str, plan: dict[str, Any], wanted: Request) -> bool:
    about = read_json(folder / "set.json")
    if about is None:
        return False
    if name in forgetting.TASKS:
        return about["limit"] == wanted.limit
    found = read_set(name, plan["folder"])
    if about["sha256"] != found.sha256:
        print(f"{found.path}: has changed since {folder.parent.name} answered it; asking again")
        return False
    rows = min(wanted.limit or len(found.rows), len(found.rows))
    if about["encoder"] and about["encoder"] != encoder_named(wanted)[2]:
        kept = [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
        about |= add_bertscore(kept, wanted)
        write(folder, about, kept)
    if about["labels_used"] != wanted.labels:  # the answers are the same; only what counts as right is another
        with replacing(folder / "set.json") as file:
            json.dump(about | {"labels_used": wanted.labels}, file, indent=1)
    return about["evaluated"] == rows


def ask(lm, subject: dict[str, Any], sets: list[str], plan, wanted) -> None:
    """Put a subject's test sets to the model, one after the other, and keep every answer."""
    from finlora.evaluate.answer_cache import CachedLM

    folder = wanted.results / subject["subject"]
    with CachedLM(lm, folder / "answers.part.jsonl") as lm, out_of_memory_named():
        for number, name in enumerate(sets, 1):
            print(f"[{number}/{len(sets)}] {subject['subject']}: {name}", flush=True)
            started = time.perf_counter()
            if name in forgetting.TASKS:
                about, rows = forgetting.answers(lm, name, plan["folder"], wanted.limit)
            else:
                about, rows = answers(lm, name, plan, wanted, plan["trained_on"] if subject["adapter"] else None)
            about |= {"seconds": round(time.perf_counter() - started, 3), "limit": wanted.limit}
            if about["metric"] == "bertscore_f1":
                about |= add_bertscore(rows, wanted)
            write(folder / name, about, rows)
            print(summary_line(name, about, rows), flush=True)
    (folder / "answers.part.jsonl").unlink(missing_ok=True)


def answers(lm, name: str, plan, wanted, trained_on: set[str] | None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One of FinLoRA's sets through lm-eval: what set.json holds, and a row for each answer."""
    from lm_eval import evaluate
    from lm_eval.tasks import TaskManager, get_task_dict

    options = {"folder": str(plan["folder"]), "labels": wanted.labels}
    tasks = TaskManager(include_path=str(TASK_FILES), include_defaults=False, metadata=options)
    found = evaluate(lm, get_task_dict([name], tasks), limit=wanted.limit, apply_chat_template=True, bootstrap_iters=0)
    spec, source = all_sets()[name], read_set(name, plan["folder"])
    rows = []
    for sample in sorted(found["samples"][name], key=lambda sample: sample["doc"]["row"]):
        doc, prompt, answer = sample["doc"], sample["arguments"][0][0], sample["resps"][0][0]
        asked, given, ended = lm.tokens[prompt]
        rows.append(
            {
                "row": doc["row"],
                "prompt": prompt,
                "context": doc["context"],
                "target": doc["published"],
                "corrected": doc["corrected"],
                "answer": answer,
                "seen": None if trained_on is None else normalise(doc["context"]) in trained_on,
                "prompt_tokens": asked,
                "answer_tokens": given,
                "stopped": ended,
            }
        )
    return {
        "set": name,
        "task": spec.task,
        "file": source.path,
        "sha256": source.sha256,
        "published_file": source.published_file,
        "rows": len(source.rows),
        "evaluated": len(rows),
        "labels": spec.labels,
        "metric": spec.metric,
        "max_new_tokens": spec.max_new_tokens,
        "prompt_tokens": sum(row["prompt_tokens"] for row in rows),
        "answer_tokens": sum(row["answer_tokens"] for row in rows),
        "encoder": None,
        "labels_used": wanted.labels,
    }, rows


def add_bertscore(rows: list[dict[str, Any]], wanted: Request) -> dict[str, str]:
    """Give each row its BERTScore F1 and return which encoder and layer measured it."""
    from finlora.evaluate.bertscore import bertscore

    encoder, layer, named = encoder_named(wanted)
    values = bertscore([row["answer"] for row in rows], [row["target"] for row in rows], encoder, layer)
    for row, value in zip(rows, values, strict=True):
        row["bertscore"] = value
    return {"encoder": named}


def encoder_named(wanted: Request) -> tuple[str, int, str]:
    from finlora.evaluate.bertscore import ENCODER, LAYER

    encoder, layer = wanted.encoder or ENCODER, LAYER if wanted.layer is None else wanted.layer
    return encoder, layer, f"{shown(encoder)}, layer {layer}"


def summary_line(name: str, about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    if about["metric"] == "lm_eval":
        scores = {"score": sum(row["right"] for row in rows) / len(rows)}
    elif about["metric"] == "bertscore_f1":
        scores = {"BERTScore F1": summary(bertscore_items([row["bertscore"] for row in rows]))["accuracy"]}
    else:
        targets = [row["corrected" if about["labels_used"] == "corrected" else "target"] for row in rows]
        given = [row["answer"] for row in rows]
        found = {key: summary(score(given, targets)) for key, score in scorings(name, all_sets()[name]).items()}
        scores = {key: found[key]["accuracy"] for key in found}
    text = ", ".join(f"{key} {value:.1%}" for key, value in scores.items())
    return f"{name}: {text} of {len(rows)} rows in {about['seconds']:.0f} s"


def write(folder: Path, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    (folder / "set.json").unlink(missing_ok=True)
    with replacing(folder / "answers.jsonl") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with replacing(folder / "set.json") as file:
        json.dump(about, file, indent=1, ensure_ascii=False)
        file.write("\n")


@contextmanager
def out_of_memory_named():
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the GPU is out of memory; the same command goes on with smaller batches with BATCH_TOKENS=2048, and "
            "BITS=4 KEEP_QUANTISED=1 needs less memory"
        ) from error


def run(wanted: Request) -> None:
    """Evaluate, and say where the answers are."""
    try:
        folders = evaluate(wanted)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the answers that are there", file=sys.stderr)
        raise
    print("answers: " + ", ".join(shown(str(folder)) for folder in folders) + "\nnext     make report")
