"""Statistics of the study's rows, and docs/dora.md with its plots: each sentence with a figure follows from the record.

    python -m bench.dora_page [OUT/rows.jsonl ...]    # records these rows first

Intervals are 95% and over both seeds and test rows: each bootstrap draw takes seeds and rows anew, crosswise (Owen's
pigeonhole bootstrap, which is rather too wide than too narrow). Comparisons use the seeds that both sides have, on the
same rows; p is finlora.evaluate.statistics' paired sign-flip test over rows, Holm-adjusted within a question. A
difference is called distinguishable only when its interval excludes 0 and the adjusted p is below 0.05.
"""

import argparse
import functools
import itertools
import json
import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.dora_study import (
    PAGE,
    RECORD,
    best_rate,
    identity,
    planned_count,
    read_rows,
    read_study,
    resolved,
    variants,
)
from finlora.core.errors import UserError, run
from finlora.core.files import write_text
from finlora.evaluate import statistics as stats
from finlora.plan.pictures import score_picture

RESAMPLES = 5000
LEVEL = 0.05
NAMES = {"full": "full fine-tuning", "lora": "LoRA", "rslora": "rsLoRA", "dora": "DoRA"}
PROMPTS = {"llama3": "chat template", "finlora_inst": "`[INST]`", "raw": "raw context"}


def record(study: dict[str, Any], files: list[Path], out: Path) -> None:
    """Write bench/dora_study.json from rows.jsonl files and the about.json beside the first one."""
    rows = {key: row for key, row in read_rows(files).items() if "failed" not in row}
    if not rows:
        raise UserError(f"{files[0]}: holds no finished run; run the study first")
    beside = files[0].with_name("about.json")
    try:
        about = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{beside}: cannot be read; bring it back beside {files[0].name}") from error
    about["study"] |= {key: study[key] for key in ("defaults", "questions")}
    about["devices"] = sorted({row["device"] for row in rows.values()})
    count = len(about["targets"])
    cells = {question: settings_of(study, question, rows, count) for question in study["questions"]}
    families = {question: compared(question, cells[question]) for question in cells if question != "grid"}
    for question in cells:
        for cell in cells[question]:
            del cell["right"]
    about["planned"] = planned_count(study, rows)
    result = {
        "about": about,
        "runs": [rows[key] for key in sorted(rows)],
        "questions": cells,
        "comparisons": families,
    }
    write_text(out, _compact(result))


def settings_of(study: dict[str, Any], question: str, rows: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The settings of a question with the scores of the seeds that ran; `right` (seeds, test rows) is kept for pairing.

    A setting that is tested with several prompts is as many entries. Settings without a run are left out.
    """
    cells = []
    for change in variants(study, question):
        settings = resolved(study, study["defaults"] | change, rows)
        if settings is None:
            continue
        seeds = range(1, study["questions"][question]["seeds"] + 1)
        runs = {seed: rows[key] for seed in seeds if (key := identity(settings | {"seed": seed})) in rows}
        for prompt in study["tests"][settings["prompt"]] if runs else []:
            tests = {seed: row["test"][prompt] for seed, row in runs.items()}
            right = np.array([bits(test["right"], count) for test in tests.values()], float)
            low, high = interval(right)
            cells.append(
                {
                    "label": _label(question, settings, prompt),
                    "changes": change,
                    "method": settings["method"],
                    "prompt": prompt,
                    "rate": settings["rate"],
                    "seeds": list(tests),
                    "scores": {str(seed): round(test["accuracy"], 5) for seed, test in tests.items()},
                    "mean": round(float(right.mean()), 5),
                    "low": low,
                    "high": high,
                    "finlora": round(float(np.mean([test["finlora"] for test in tests.values()])), 5),
                    "validation": round(float(np.mean([row["validation"]["accuracy"] for row in runs.values()])), 5),
                    "best_rate": settings["rate"] == best_rate(study, settings["method"], rows),
                    "parameters": next(iter(runs.values()))["parameters"],
                    "seconds": round(float(np.median([row["train_seconds"] for row in runs.values()])), 2),
                    "right": right,
                }
            )
    return cells


def compared(question: str, cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The comparisons of a question, Holm-adjusted together; pairs without two seeds in common are left out."""
    results = []
    for a, b in pairs(question, cells):
        common = [seed for seed in a["seeds"] if seed in b["seeds"]]
        if len(common) < 2:
            continue
        one, other = (cell["right"][[cell["seeds"].index(seed) for seed in common]] for cell in (a, b))
        low, high = interval(other - one)
        p = stats.paired(_items(one), _items(other), resamples=RESAMPLES)["p"]
        difference = round(float((other - one).mean()), 5)
        results.append(
            {
                "a": a["label"],
                "b": b["label"],
                "seeds": len(common),
                "difference": difference,
                "low": low,
                "high": high,
                "p": p,
            }
        )
    for result, adjusted in zip(results, holm([result["p"] for result in results]), strict=True):
        result["p"], result["p_holm"] = round(result["p"], 6), round(adjusted, 6)
        result["distinguishable"] = bool(adjusted < LEVEL and not result["low"] <= 0 <= result["high"])
    return results


def pairs(question: str, cells: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(from, to) of each comparison that a question makes."""
    if question == "methods":
        order = sorted(cells, key=lambda cell: list(NAMES).index(cell["method"]))
        return list(itertools.combinations(order, 2))
    if question == "prompt":
        pairs = []
        for method in NAMES:
            own = {(cell["changes"]["prompt"], cell["prompt"]): cell for cell in cells if cell["method"] == method}
            same, mismatch, chat = (
                own.get(key) for key in (("finlora_inst",) * 2, ("finlora_inst", "raw"), ("llama3",) * 2)
            )
            pairs += [pair for pair in ((same, mismatch), (chat, same), (chat, mismatch)) if all(pair)]
        return pairs
    if question == "ranks":
        by = {(cell["method"], cell["changes"]["rank"]): cell for cell in cells}
        ranks = sorted({rank for _, rank in by})
        pairs = [(by.get(("lora", rank)), by.get((method, rank))) for method in ("rslora", "dora") for rank in ranks]
        pairs += [
            (by.get((method, 8)), by.get((method, rank)))
            for method in ("lora", "rslora", "dora")
            for rank in ranks
            if rank != 8
        ]
        return [pair for pair in pairs if all(pair)]
    key, against = {"magnitude": ("magnitude", 1.0), "bits": ("bits", 16)}[question]
    base = next((cell for cell in cells if cell["changes"][key] == against), None)
    return [(base, cell) for cell in cells if base is not None and cell is not base]


def bits(text: str, count: int) -> np.ndarray:
    """`count` booleans of a hexadecimal bit string. Raises UserError where it has another length."""
    raw = np.frombuffer(bytes.fromhex(text), np.uint8)
    if len(raw) != -(-count // 8):
        raise UserError(f"a row has {8 * len(raw)} test bits and not {count}; its run used another split")
    return np.unpackbits(raw, count=count).astype(bool)


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 95% interval of the mean of (seeds, rows) values, seeds and rows drawn anew crosswise; it holds the mean."""
    seed_weights, row_weights = (_weights(count, place) for place, count in enumerate(values.shape))
    means = (row_weights @ values.T.astype(np.float32) * seed_weights).sum(1)
    low, high = np.quantile(means, [LEVEL / 2, 1 - LEVEL / 2])
    return round(min(float(low), float(values.mean())), 5), round(max(float(high), float(values.mean())), 5)


@functools.cache
def _weights(count: int, seed: int) -> np.ndarray:
    """How much each of `count` weighs in each draw, (RESAMPLES, count)."""
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLES)
    return (drawn / count).astype(np.float32)


def holm(values: list[float]) -> list[float]:
    """Holm's adjusted p values, in the order given."""
    adjusted, largest = [0.0] * len(values), 0.0
    for place, i in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, values[i] * (len(values) - place)))
        adjusted[i] = largest
    return adjusted


def _items(right: np.ndarray) -> dict[str, list]:
    rows = range(right.shape[1])
    means = right.mean(0).tolist()
    return {
        "row": list(rows),
        "target": ["" for _ in rows],
        "predicted": ["" for _ in rows],
        "right": means,
        "unparsed": [],
    }


def _label(question: str, settings: dict[str, Any], prompt: str) -> str:
    name = NAMES[settings["method"]]
    if question == "grid":
        return f"{name}, rate {settings['rate']:g}"
    if question == "magnitude":
        return "frozen" if settings["magnitude"] == 0 else f"x {settings['magnitude']:g}"
    if question == "ranks":
        return f"{name}, rank {settings['rank']}"
    if question == "prompt":
        return f"{name}: {PROMPTS[settings['prompt']]} → {PROMPTS[prompt]}"
    if question == "bits":
        return "8 bits, fp8 matmuls" if settings["bits"] == "fp8" else f"{settings['bits']} bits"
    return name


def _compact(result: dict[str, Any]) -> str:
    """JSON with a line for each run, setting and comparison, so that a diff shows what changed."""

    def listed(rows: list) -> str:
        return "[\n" + ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in rows) + "\n ]"

    def named(groups: dict[str, list]) -> str:
        return "{" + ",\n ".join(f"{json.dumps(name)}: {listed(rows)}" for name, rows in groups.items()) + "}"

    return (
        f'{{"about": {json.dumps(result["about"])},\n"runs": {listed(result["runs"])},\n'
        f'"questions": {named(result["questions"])},\n"comparisons": {named(result["comparisons"])}}}\n'
    )


def write(record: Path, page: Path) -> None:
    """Write the page and its plots from the record alone; equal records give equal files."""
    try:
        result = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{record}: cannot be read; make it with python -m bench.dora_page OUT/rows.jsonl") from error
    for name, drawing in plots(result).items():
        write_text(page.with_name(name), drawing)
    write_text(page, text(result))


def text(result: dict[str, Any]) -> str:
    """The page in Markdown."""
    about, cells, families = result["about"], result["questions"], result["comparisons"]
    base, study, split = about["base"], about["study"], about["kit"]["split"]
    training, defaults, lessons = study["training"], study["defaults"], study["lessons"]["rows"]
    majority = max(about["targets"].count(letter) for letter in "nup") / len(about["targets"])
    every = [one for family in families.values() for one in family]
    seen = [one for one in every if one["distinguishable"]]
    half = np.median([(one["high"] - one["low"]) / 2 for one in every]) if every else math.nan
    part = split["test"]
    parts = [
        "# DoRA under equal conditions",
        "<!-- Written by `python -m bench.dora_page`; edit bench/dora_page.py. -->",
        f"DoRA, LoRA, rsLoRA and full fine-tuning of one base model on the same rows, prompt, alpha, dropout, batch "
        f"and epochs: {len(result['runs'])} runs of {about['planned']} planned, on {_joined(about['devices'])}. "
        "[bench/dora_study.json](../bench/dora_study.json) has every run, with what it got right of the test rows; "
        "[bench/dora_study.yaml](../bench/dora_study.yaml) has the plan.",
        "```\npython -m bench.dora_study --corpus KIT --data data/raw --texts TEXTS  # text and split\n"
        "python -m bench.dora_study --kit KIT --out OUT                          # base model and runs\n"
        "python -m bench.dora_page OUT/rows.jsonl                                # this page\n```",
        "## What this can say",
        f"The base is a Llama of {base['parameters'] / 1e6:.1f} million parameters, trained from scratch on "
        f"{base['tokens'] / 1e6:.1f} million tokens (the stream has {about['kit']['tokens'] / 1e6:.1f} million: "
        f"documentation, dictionaries, prose, lexicons, and the prompts of the train rows without their answers) in "
        f"{base['seconds']:.0f} seconds, and then, all weights, on the answers to {lessons:,} train rows that no run "
        f"sees again. Before any run it scores {base['accuracy']:.1%}. It is far weaker than Llama-3.1-8B, so these "
        "results may differ there; the comparison's strengths are equal conditions and several seeds.",
        f"Rows: {split['train']['rows'] - lessons:,} to train, {split['validation']['rows']} to choose the learning "
        f"rate, "
        f"{part['rows']:,} to test ({part['fpb']} FPB, {part['fiqa']} FiQA, {part['tfns']} TFNS, whose swapped labels "
        f"are corrected), near-duplicates on one side. Always answering the most frequent label scores "
        f"{majority:.1%}. The score is the accuracy of greedy answers; the whole answer must be the label.",
        f"All runs: alpha {defaults['alpha']}, dropout {defaults['dropout']} on adapters, AdamW without weight decay, "
        f"cosine with {training['warmup']} warm-up steps, {training['batch']} rows a step, {training['epochs']} "
        f"epochs, loss on the answer, adapters on {', '.join(training['targets'])} with fastdora's layers. Full "
        "fine-tuning trains every weight.",
        "Intervals are 95%, over seeds and test rows together. A question's comparisons are paired on the same seeds "
        f"and rows, and Holm-adjusted within the question. Of {len(every)} comparisons {len(seen)} "
        f"{'is' if len(seen) == 1 else 'are'} distinguishable. The median interval of a difference reaches "
        f"{100 * half:.1f} points to either side: much smaller effects could not have been seen.",
    ]
    parts += _section_grid(cells.get("grid", []))
    for question, title, note, plot in SECTIONS:
        if cells.get(question):
            parts += [f"## {title}", note(result), f"![{title}]({plot})", _table(cells[question])]
            parts += [_comparisons(families.get(question, []))]
    parts += ["## What follows for the recipes", _verdict(result)]
    return "\n\n".join(_wrapped(part) for part in parts if part) + "\n"


def _wrapped(part: str) -> str:
    """Prose at the width of the other pages; tables, code and headings as they are."""
    if part[0] in "|#`<!":
        return part
    fill = functools.partial(textwrap.fill, width=120, break_long_words=False, break_on_hyphens=False)
    return "\n".join(fill(line, subsequent_indent="  " if line.startswith("- ") else "") for line in part.splitlines())


def _section_grid(cells: list[dict[str, Any]]) -> list[str]:
    methods = [method for method in NAMES if any(cell["method"] == method for cell in cells)]
    rates = sorted({cell["rate"] for cell in cells})
    by = {(cell["method"], cell["rate"]): cell for cell in cells}
    lines = ["| | " + " | ".join(f"{rate:g}" for rate in rates) + " |", "| --- |" + " --- |" * len(rates)]
    edge = []
    for method in methods:
        own = {rate: by[method, rate] for rate in rates if (method, rate) in by}
        best = [rate for rate, cell in own.items() if cell["best_rate"]]
        shown = [f"{100 * own[rate]['validation']:.1f}" + "*" * (rate in best) if rate in own else "" for rate in rates]
        lines.append(f"| {NAMES[method]} | " + " | ".join(shown) + " |")
        if best and best[0] in (rates[0], rates[-1]):
            edge.append(NAMES[method])
    seeds = max((len(cell["seeds"]) for cell in cells), default=0)
    note = (
        f"Mean validation accuracy in percent over {seeds} seeds, rank 8; * marks the rate that all other questions "
        "use for that method, at every rank and prompt: of those within one standard error of the highest accuracy, "
        "the one with the lowest validation loss."
    )
    if edge:
        note += f" It is at the grid's edge for {_joined(edge)}: a rate outside it may be better."
    return ["## Learning rates", note, "\n".join(lines)] if cells else []


def _table(cells: list[dict[str, Any]]) -> str:
    lines = [
        "| | rate | trainable | seeds | accuracy % | interval | FinLoRA's scorer % |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for cell in cells:
        lines.append(
            f"| {cell['label']} | {cell['rate']:g} | {cell['parameters']:,} | {len(cell['seeds'])} "
            f"| {100 * cell['mean']:.1f} | {100 * cell['low']:.1f} to {100 * cell['high']:.1f} "
            f"| {100 * cell['finlora']:.1f} |"
        )
    return "\n".join(lines)


def _comparisons(family: list[dict[str, Any]]) -> str:
    if not family:
        return "Too few runs ended for a comparison."
    lines = ["| difference, points | | interval | adjusted p | seeds | |", "| --- | --- | --- | --- | --- | --- |"]
    for one in family:
        verdict = "distinguishable" if one["distinguishable"] else "not distinguishable"
        lines.append(
            f"| {one['b']} − {one['a']} | {100 * one['difference']:+.1f} | {100 * one['low']:+.1f} to "
            f"{100 * one['high']:+.1f} | {_p(one['p_holm'])} | {one['seeds']} | {verdict} |"
        )
    return "\n".join(lines)


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _said(one: dict[str, Any]) -> str:
    what = f"{one['b']} − {one['a']}: {100 * one['difference']:+.1f} points "
    what += f"[{100 * one['low']:+.1f}, {100 * one['high']:+.1f}]"
    return what if one["distinguishable"] else f"{what}, not distinguishable"


def _finding(family: list[dict[str, Any]], nothing: str) -> str:
    """The distinguishable comparisons of a family in one sentence, or `nothing`."""
    seen = [one for one in family if one["distinguishable"]]
    if not family:
        return ""
    if not seen:
        return f"{nothing} is distinguishable here ({len(family)} comparisons)."
    rest = f"; the other {len(family) - len(seen)} are not" if len(seen) < len(family) else ""
    return f"Distinguishable: {'; '.join(map(_said, seen))}{rest}."


def _methods_note(result: dict[str, Any]) -> str:
    finding = _finding(result["comparisons"]["methods"], "No pair of methods")
    targets = result["about"]["targets"]
    majority = max(map(targets.count, "nup")) / len(targets)
    weak = [cell["label"] for cell in result["questions"]["methods"] if cell["low"] <= majority]
    learned = f" Not distinguishable from always answering the most frequent label: {_joined(weak)}." if weak else ""
    return f"Each method at its best rate of the grid, rank 8. {finding}{learned}"


def _magnitude_note(result: dict[str, Any]) -> str:
    finding = _finding(result["comparisons"]["magnitude"], "No factor against x 1")
    return (
        "FinLoRA suspects that its DoRA falls behind because the magnitude shares the low-rank update's learning rate. "
        "Here the magnitude's rate is DoRA's best rate times a factor, or it is frozen; x 1 is what the recipes do. "
        f"{finding}"
    )


def _ranks_note(result: dict[str, Any]) -> str:
    finding = _finding(
        result["comparisons"]["ranks"], "Neither a method against LoRA at equal rank nor a rank against 8"
    )
    return (
        "Alpha stays 16, and each method keeps the rate that was best at rank 8, which may favour that rank. " + finding
    )


def _prompt_note(result: dict[str, Any]) -> str:
    finding = _finding(result["comparisons"]["prompt"], "No prompt against another")
    return (
        "The published benchmark trains on `[INST] context [/INST]` and tests on the raw context. Left of the arrow is "
        "the prompt of training, right of it that of testing; the adapters trained with `[INST]` are tested with both. "
        f"{finding}"
    )


def _bits_note(result: dict[str, Any]) -> str:
    finding = _finding(result["comparisons"]["bits"], "None of them against 16 bits")
    return f"DoRA on the base in 16, 8 (LLM.int8's weights, and with fastdora_fp8) and 4 bits (NF4). {finding}"


def _verdict(result: dict[str, Any]) -> str:
    families = result["comparisons"]
    lines = []
    pair = next(
        (one for one in families.get("methods", []) if (one["a"], one["b"]) == (NAMES["lora"], NAMES["dora"])), None
    )
    if pair and pair["distinguishable"]:
        better, worse = (NAMES["dora"], NAMES["lora"]) if pair["difference"] > 0 else (NAMES["lora"], NAMES["dora"])
        lines.append(f"{better} beats {worse} at equal budget ({_said(pair)}).")
    elif pair:
        lines.append(f"Neither DoRA nor LoRA is to be preferred for its score ({_said(pair)}).")
    better = [one for one in families.get("magnitude", []) if one["distinguishable"] and one["difference"] > 0]
    if better:
        best = max(better, key=lambda one: one["difference"])
        lines.append(f"A rate of its own for the magnitude helps: {_said(best)}.")
    elif families.get("magnitude"):
        lines.append("The magnitude keeps the learning rate of the rest: no other factor is distinguishably better.")
    own = [one for one in families.get("ranks", []) if one["a"].split(",")[0] == one["b"].split(",")[0]]
    better = [one for one in own if one["distinguishable"] and one["difference"] > 0 and "rank 8" in one["a"]]
    if better:
        lines.append(f"Ranks that are better than 8 here: {'; '.join(map(_said, better))}.")
    elif own:
        lines.append("Rank 8 stays: no other rank is distinguishably better for the same method.")
    worse = [
        one
        for one in families.get("prompt", [])
        if one["distinguishable"] and one["b"].endswith(PROMPTS["raw"]) and one["difference"] < 0
    ]
    if worse:
        lines.append(f"One prompt in training and testing matters: {'; '.join(map(_said, worse))}.")
    elif families.get("prompt"):
        lines.append(
            "The prompt mismatch is not distinguishable from one prompt here; one prompt is kept because it "
            "costs nothing."
        )
    worse = [one for one in families.get("bits", []) if one["distinguishable"]]
    if worse:
        lines.append(f"Bits: {'; '.join(map(_said, worse))}.")
    elif families.get("bits"):
        lines.append("8 bits, fp8 matmuls and 4 bits are not distinguishable from 16 bits in score.")
    return "\n".join(f"- {line}" for line in lines)


def _joined(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


SECTIONS: list[tuple[str, str, Callable[[dict[str, Any]], str], str]] = [
    ("methods", "Methods at equal budget", _methods_note, "dora_methods.svg"),
    ("magnitude", "The magnitude's own learning rate", _magnitude_note, "dora_magnitude.svg"),
    ("prompt", "The prompt mismatch", _prompt_note, "dora_prompt.svg"),
    ("ranks", "Ranks", _ranks_note, "dora_ranks.svg"),
    ("bits", "Bits", _bits_note, "dora_bits.svg"),
]


def plots(result: dict[str, Any]) -> dict[str, str]:
    """SVG by file name: means with intervals of a question's settings."""
    about = ["accuracy on test rows; bars: 95% intervals over seeds and rows"]
    return {
        name: score_picture(title, about, result["questions"][question])
        for question, title, _, name in SECTIONS
        if result["questions"].get(question)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("rows", nargs="*", type=Path, help="rows.jsonl files to make the record from; else it stays")
    options = parser.parse_args()
    if options.rows:
        record(read_study(), options.rows, RECORD)
    write(RECORD, PAGE)


if __name__ == "__main__":
    run(main)
