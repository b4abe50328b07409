"""Two evaluations on the same rows: is the difference more than chance? (`make compare A=... B=...`)

finlora compare A B [--results DIR]

Per set that both answered: both scores, the paired difference B - A with its 95% interval, and the exact McNemar test
where each row is alone and right or wrong (elsewhere, as for BERTScore and tags, a permutation test of groups of rows).
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tabulate import tabulate

from finlora.core.errors import UserError, did_you_mean
from finlora.core.html import p_value, percent, signed
from finlora.core.paths import shown
from finlora.evaluate.report import PROMPTS, facts
from finlora.evaluate.results import RESULTS, Answers, ModelResults, names, pair, read, unlike
from finlora.evaluate.scorers import summary
from finlora.evaluate.statistics import paired


def compare(a: str, b: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Print the comparison and return its lines: set, labels, a, b (scores 0..1) and what
    finlora.evaluate.statistics.paired says.

    The last line, set "pooled", has every row of FinLoRA's sets whose answers are right or wrong. Raises UserError for
    an evaluation that is not there, and where files, rows, labels or measures differ.
    """
    one, other = find(a, b, folder)
    sets = [name for name in one.sets if name in other.sets]
    if not sets:
        has = [f"{model.name} has {', '.join(model.sets) or 'none that is finished'}" for model in (one, other)]
        raise UserError(f"no set that both answered: {'; '.join(has)}; evaluate both with the same TASKS=")
    for name in sets:
        refuse_unlike(name, one, other)
    print(f"A  {a}: {facts(one.run)}\nB  {b}: {facts(other.run)}")
    for warning in differing(one, other, sets):
        print(f"warning: {warning}", file=sys.stderr)
    lines = [line for name in sets for line in of_set(one.sets[name], other.sets[name])]
    pooled = pool([line for line in lines if line["pooled"]])
    lines += [pooled] if pooled else []
    print_table(lines)
    print("\n" + "\n".join(sentence(line) for line in lines))
    print("\np: exact McNemar test where each row is alone and right or wrong, else a permutation test of groups.")
    if len(lines) > 2:
        print("At 95%, about one in twenty differences that are none looks distinguishable.")
    return lines


def find(a: str, b: str, folder: Path) -> tuple[ModelResults, ModelResults]:
    known = names(folder)
    if not a or not b:
        raise UserError(f"name two evaluations, as in make compare A={known[0]} B={known[-1]}")
    for name in (a, b):
        if name not in known:
            hint = did_you_mean(name, known, 3) or f"there is {', '.join(known)}"
            raise UserError(f"{shown(folder)}: has no evaluation {name!r}; {hint.strip()}")
    if a == b:
        raise UserError(f"A and B are both {a}; name two evaluations")
    models, warnings = read(folder, (a, b))
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    for name in (a, b):
        if name not in models:
            raise UserError(f"{shown(folder / name)}: cannot be used (see the warning above); evaluate it again")
    return models[a], models[b]


def refuse_unlike(name: str, one: ModelResults, other: ModelResults) -> None:
    a, b = one.sets[name], other.sets[name]
    if reason := unlike(a, b):
        raise UserError(f"{name}: {one.name} and {other.name} answered {reason}; evaluate one of them again")
    used = [answers.about.labels_used for answers in (a, b)]
    # Where nothing is corrected both versions are the same labels.
    if used[0] != used[1] and len(a.labels()) + len(b.labels()) > 2:
        raise UserError(
            f"{name}: {one.name} was scored on {used[0]} labels and {other.name} on {used[1]} ones; "
            f"run make eval for {other.name} again with LABELS={used[0]} (its answers are kept)"
        )


def differing(one: ModelResults, other: ModelResults, sets: list[str]) -> Iterator[str]:
    """What else than the adapter differs between the two, one line each."""
    if one.run.model != other.run.model:
        yield f"the models differ: {one.run.model} and {other.run.model}"
    prompts = [PROMPTS.get(model.run.prompt, str(model.run.prompt)) for model in (one, other)]
    if prompts[0] != prompts[1]:
        yield f"the prompts differ: {prompts[0]} (A), {prompts[1]} (B)"
    elif one.run.template_sha256 != other.run.template_sha256:
        yield "the chat templates differ"
    if one.run.shots != other.run.shots:
        yield f"the examples before a question differ: {one.run.shots or 'none'} (A), {other.run.shots or 'none'} (B)"
    for name in sets:
        a, b = one.sets[name], other.sets[name]
        both = len(pair(a, b, a.labels()[0])[0])
        if both < max(len(a.rows), len(b.rows)):
            yield f"{name}: A answered {len(a.rows):,} rows, B {len(b.rows):,}; compared on the {both:,} that both did"
        seen = [sum(bool(row.get("seen")) for row in answers.rows.values()) for answers in (a, b)]
        if any(seen):
            yield f"{name}: rows were trained on, {seen[0]:,} by A and {seen[1]:,} by B"


def of_set(a: Answers, b: Answers) -> Iterator[dict[str, Any]]:
    """One line a version of the labels, the one that was asked for first."""
    versions = max(a.labels(), b.labels(), key=len)
    for place, labels in enumerate(versions):
        _, items_a, items_b = pair(a, b, labels)
        yield line(a.name, labels if len(versions) > 1 else "", items_a, items_b) | {
            "pooled": place == 0 and not a.forgetting and not a.bertscore,
            "items": (items_a, items_b),
        }


def pool(lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """All rows of these lines as one set, each set under the labels that were asked for; None for a single set."""
    if len(lines) < 2:
        return None
    return line("pooled", f"{len(lines)} sets", *join([entry["items"] for entry in lines]))


def join(sets: list[tuple[dict[str, list], ...]]) -> tuple[dict[str, list], ...]:
    """Each model's items on several sets as items on one, every set's rows after those of the one before."""
    pooled: tuple[dict[str, list], ...] = tuple({} for _ in sets[0])
    start = 0
    for items in sets:
        for whole, part in zip(pooled, items, strict=True):
            for key, values in part.items():
                whole.setdefault(key, []).extend([n + start for n in values] if key in ("row", "group") else values)
        start += max(items[0]["row"] + items[0]["group"]) + 1
    return pooled


def line(name: str, labels: str, items_a: dict[str, list], items_b: dict[str, list]) -> dict[str, Any]:
    scores = {"a": summary(items_a)["accuracy"], "b": summary(items_b)["accuracy"]}
    return {"set": name, "labels": labels} | scores | paired(items_a, items_b)


def print_table(lines: list[dict[str, Any]]) -> None:
    table = [
        {
            "set": entry["set"],
            "labels": entry["labels"],
            "rows": f"{entry['rows']:,}",
            "groups": f"{entry['groups']:,}",
            "A": percent(entry["a"]),
            "B": percent(entry["b"]),
            "B - A": signed(entry["difference"]),
            "95% interval": f"[{signed(entry['low'])}, {signed(entry['high'])}]",
            "only A": f"{entry['only_a']:,}",
            "only B": f"{entry['only_b']:,}",
            "p": p_value(entry["p"]).removeprefix("= "),
        }
        for entry in lines
    ]
    sides = ["left", "left", *["right"] * (len(table[0]) - 2)]
    print("\n" + tabulate(table, "keys", "plain", disable_numparse=True, colalign=sides))


def sentence(entry: dict[str, Any]) -> str:
    name = entry["set"] + (
        f" ({entry['labels']}{'' if entry['set'] == 'pooled' else ' labels'})" if entry["labels"] else ""
    )
    if not entry["distinguishable"]:
        return f"{name}: A and B cannot be told apart on these {entry['rows']:,} rows."
    better, worse = ("B", "A") if entry["difference"] > 0 else ("A", "B")
    size = f"{abs(entry['difference']) * 100:.2f} points"
    return f"{name}: {better} is better than {worse} by {size}, distinguishable on these {entry['rows']:,} rows."
