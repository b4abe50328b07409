"""Result folders as finlora/evaluate/runner.py leaves them, made from rows that nobody had to ask a model for."""

import json
import random
from pathlib import Path
from typing import Any

MODEL = "meta-llama/Llama-3.1-8B-Instruct"
THREE = ["negative", "neutral", "positive"]
METRICS = {"xbrl_term": "bertscore_f1", "formula": "accuracy", "finer": "tag_accuracy_f1", "mmlu": "lm_eval"}
EXCHANGE = {"neutral": "positive", "positive": "neutral", "negative": "negative"}


def subject(results: Path, name: str, *, adapter: bool = True, **facts: Any) -> Path:
    """results/<name> with run.json: an 8-bit DoRA adapter with a training log, or its base."""
    run = {
        "subject": name,
        "recipe": name if adapter else None,
        "model": MODEL,
        "adapter": f"outputs/{name}" if adapter else None,
        "adapter_sha256": "bf3aa00778540de5d89cbd18164a2a1c35a96d7dd079a6931ea57d0948acb754" if adapter else None,
        "bits": 8,
        "method": "dora" if adapter else "base",
        "r": 8 if adapter else None,
        "alpha": 16 if adapter else None,
        "prompt": "saved",
        "template_sha256": "4c1f" * 16,
        "way": "merged" if adapter else "plain",
        "backend": "hf",
        "tiny": False,
        "training": {"metrics": {"steps": 400, "seconds": 255.9}, "args": [], "log": training_log()}
        if adapter
        else None,
        "versions": {"torch": "2.13.0", "transformers": "5.16.1"},
        "git": {"commit": "dd281d430c83be8ebf248c67dc1b88bc74703a71", "changed": False},
        "device": "CPU",
        "started": "2026-01-02T03:04:05+00:00",
    }
    folder = results / name
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(run | facts))
    return folder


def training_log() -> list[dict[str, float]]:
    log: list[dict[str, float]] = [{"step": 0, "eval_loss": 3.1}]
    for step in range(10, 401, 10):
        log.append({"step": step, "loss": 0.25 + 2.5 / (1 + step / 25) + (step % 70) / 1000, "learning_rate": 1e-4})
        if step % 100 == 0:
            log.append({"step": step, "eval_loss": 0.3 + 2.4 / (1 + step / 25)})
    return log


def answered(folder: Path, name: str, rows: list[dict[str, Any]], /, **about: Any) -> Path:
    """<subject>/<set> with answers.jsonl and set.json. A row needs target and answer; the rest is filled in."""
    metric = METRICS.get(name, "accuracy_f1")
    whole = []
    for number, row in enumerate(rows, 1):
        context = row.pop("context", f"What is the sentiment of row {number} of {name}?\nAnswer: ")
        filled = {"row": number, "prompt": f"<|user|>\n{context}<|assistant|>\n", "context": context}
        filled |= {"corrected": row["target"], "seen": False, "stopped": True, "prompt_tokens": 60, "answer_tokens": 2}
        if metric == "lm_eval":
            filled = {"row": number, "id": f"{name}/{number}", "prompt": "Question?"}
        whole.append(filled | row)
    entry = {
        "set": name,
        "task": "sentiment",
        "file": f"data/raw/test/{name}_test.jsonl",
        "sha256": "0123456789abcdef" * 4,
        "published_file": True,
        "rows": len(whole),
        "evaluated": len(whole),
        "labels": THREE if metric == "accuracy_f1" else None,
        "metric": metric,
        "max_new_tokens": 50 if metric != "accuracy_f1" else 10,
        "seconds": 12.5,
        "prompt_tokens": 60 * len(whole),
        "answer_tokens": 2 * len(whole),
        "encoder": "ProsusAI/finbert, layer 10" if metric == "bertscore_f1" else None,
        "labels_used": "corrected",
        "limit": None,
    }
    if metric == "lm_eval":
        entry = {key: entry[key] for key in ("set", "metric", "evaluated", "seconds", "limit")} | {"task": "forgetting"}
    folder = folder / name
    folder.mkdir()
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in whole))
    (folder / "set.json").write_text(json.dumps(entry | about))
    return folder


def label_rows(count: int, share: float, seed: int = 0, exchanged: bool = False) -> list[dict[str, Any]]:
    """Rows with three labels of which about `share` are answered rightly; a few answers are no label at all.

    The targets depend on the place only. `exchanged`: the published labels are TFNS's, the corrected ones are right.
    """
    targets, draw = random.Random(count), random.Random(seed)
    rows = []
    for _ in range(count):
        right = targets.choice(THREE)
        other = draw.choice([label for label in THREE if label != right])
        whole = draw.choice([right] * 15 + [f"The sentiment is {right}"])
        answer = whole if draw.random() < share else draw.choice([other, other, "I think it is mixed.", ""])
        rows.append({"target": EXCHANGE[right] if exchanged else right, "corrected": right, "answer": answer})
    return rows


def everything(results: Path, part: int = 1) -> Path:
    """A base and two adapters on fpb, tfns (both labels), xbrl_term, formula and mmlu. Returns `results`.

    part: how many times fewer rows, for what does not depend on their number.
    """
    for name, adapter, share, seed in (
        ("base-llama-3-1-8b-instruct-8bit", False, 0.6, 1),
        ("sentiment_r8_dora", True, 0.86, 2),
        ("sentiment_r8_lora", True, 0.85, 3),
    ):
        method = {"method": "lora"} if name.endswith("lora") else {}
        folder = subject(results, name, adapter=adapter, **method)
        draw = random.Random(seed)
        seen = [
            {"seen": adapter and number % 10 == 0} | row
            for number, row in enumerate(label_rows(240 // part, share, seed))
        ]
        answered(folder, "fpb", seen)
        answered(folder, "tfns", label_rows(300 // part, share, seed + 9, exchanged=True))
        terms = [
            {
                "context": f"Explain this XBRL term briefly in one sentence: Term {number}. Answer:",
                "target": f"Amount of item {number} after the fifth fiscal year.",
                "answer": "" if number == 7 else f"The amount of item {number}.",
                "bertscore": 0.0 if number == 7 else round(draw.uniform(0.4, 0.4 + share / 2), 6),
            }
            for number in range(40 // part)
        ]
        answered(folder, "xbrl_term", terms)
        sums = []
        for number in range(60 // part):
            target = f"{number * 37.5 + 15:.2f}"
            wrong = draw.random() > share - 0.3
            sums.append(
                {"target": target, "answer": "It depends" if number % 13 == 0 else "12.00" if wrong else target}
            )
        answered(folder, "formula", sums)
        questions = [
            {"target": "1", "answer": "1" if right else "2", "right": float(right)}
            for right in (draw.random() < 0.66 for _ in range(120 // part))
        ]
        answered(folder, "mmlu", questions)
    return results
