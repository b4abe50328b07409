"""Kill a training run again and again, resume it, and compare its adapter with an uninterrupted run's.

    python tests/kills.py [--kills 20]

Writes bench/kills.json. `kill -9` at random moments, every fourth one while a checkpoint is being written; before every
third resume the newest checkpoint is damaged as well. Runs on a CPU with the tiny model, through the real axolotl.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import yaml

from fastdora.plugin import checkpoints
from finlora.train import tiny

ROOT = Path(__file__).resolve().parent.parent
WORDS = "rose fell gained lost grew shrank climbed slid".split()


def recipe(folder: Path, name: str, base_model: Path, **changes) -> Path:
    """Write a recipe of 12 steps, two epochs, a checkpoint each second step, and its rows; return its file."""
    rows = folder / "train.jsonl"
    if not rows.exists():
        turns = [(f"Shares of company {i} {WORDS[i % 8]}.", "up" if i % 2 else "down") for i in range(24)]
        lines = [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in turns]
        rows.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    config = yaml.safe_load((ROOT / "recipes" / "sentiment_r8_dora.yaml").read_text(encoding="utf-8"))
    config |= {
        "base_model": str(base_model),
        "datasets": [config["datasets"][0] | {"path": str(rows)}],
        "output_dir": str(folder / name),
        "dataset_prepared_path": str(folder / "tokenised"),
        "sequence_len": 128,
        "gradient_accumulation_steps": 1,
        "max_steps": 12,
        "warmup_steps": 2,
        "learning_rate": 0.003,
        "logging_steps": 1,
        "save_steps": 2,
        "auto_resume_from_checkpoints": True,
    }
    for key in ("test_datasets", "evals_per_epoch", "saves_per_epoch"):
        config.pop(key, None)
    config = {key: value for key, value in (config | changes).items() if value is not None}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def digest(out: Path) -> str:
    return hashlib.sha256((out / "adapter_model.safetensors").read_bytes()).hexdigest()


def killed(path: Path, out: Path, delay: float | None) -> dict:
    """Start a run and kill it: `delay` seconds after its first step began, or (None) while it writes a checkpoint.

    Returns at which step it was killed and whether in a checkpoint, or ended=True.
    """
    from forked import finish, start  # here, as in main: it imports axolotl, ten seconds

    (out / "stepping").unlink(missing_ok=True)
    child = start(["train", str(path), "--launcher", "python"])
    pid, began = child[0], None
    while True:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            code, output = finish(child)
            assert code == 0, output[-3000:]
            return {"ended": True}
        if began is None and (out / "stepping").exists():
            began = time.monotonic()
        unsealed = [folder for folder in checkpoints.numbered(out) if not (folder / checkpoints.SEAL).exists()]
        if (delay is None and unsealed) or (delay is not None and began and time.monotonic() - began >= delay):
            os.kill(pid, signal.SIGKILL)
            finish(child)
            steps = [int(folder.name.split("-")[1]) for folder in checkpoints.numbered(out)]
            return {"ended": False, "in_checkpoint": bool(unsealed), "newest_checkpoint": max(steps, default=0)}
        time.sleep(0.001)


DAMAGES = ("truncated", "changed", "removed", "emptied seal")


def damage(folder: Path, kind: str, choose: random.Random) -> str:
    """Damage a checkpoint as a bad disk or a cut copy would; return the file's name."""
    name = choose.choice(sorted(path.name for path in folder.iterdir() if path.name != checkpoints.SEAL))
    file = folder / name
    if kind == "truncated":
        os.truncate(file, file.stat().st_size // 2)
    elif kind == "changed":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif kind == "removed":
        file.unlink()
    else:
        name = checkpoints.SEAL
        (folder / name).write_text("", encoding="utf-8")
    return name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    kills = parser.parse_args().kills
    from forked import finish, start

    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    base = tiny.build(tiny.sample_texts())
    choose, rows, runs, tried = random.Random(0), [], [], {kind: [0, 0] for kind in DAMAGES}
    whole = recipe(folder, "whole", base)
    code, output = finish(start(["train", str(whole), "--launcher", "python"]))
    assert code == 0, output[-3000:]
    seconds = json.loads((folder / "whole" / "metrics.json").read_text(encoding="utf-8"))["seconds"]
    while len(rows) < kills:
        name = f"run{len(runs)}"
        path, out, mine = recipe(folder, name, base), folder / name, 0
        while True:
            delay = None if len(rows) % 4 == 3 else choose.uniform(0, seconds)
            row = killed(path, out, 1e9 if len(rows) == kills else delay)
            if row.pop("ended"):
                break
            mine += 1
            sealed = [folder for folder in checkpoints.numbered(out) if (folder / checkpoints.SEAL).exists()]
            if len(rows) % 3 == 2 and (newest := sealed[:1]):
                kind = DAMAGES[sum(count for count, _ in tried.values()) % len(DAMAGES)]
                row["damaged"] = f"{newest[0].name}/{damage(newest[0], kind, choose)} {kind}"
                last, _, lines = checkpoints.last_whole(out)
                tried[kind][0] += 1
                tried[kind][1] += any(f"/{newest[0].name} is broken (" in line for line in lines)
                row["resumed_from"] = last.name if last else "the beginning"
            rows.append({"run": name} | row)
        runs.append({"run": name, "kills": mine, "identical": digest(out) == digest(folder / "whole")})
    result = {
        "command": " ".join(["python", *sys.argv]),
        "kills": len(rows),
        "kills_in_a_checkpoint": sum(row["in_checkpoint"] for row in rows),
        "runs": len(runs),
        "runs_resumed": sum(run["kills"] > 0 for run in runs),
        "resumes": len(rows),
        "identical_adapters": sum(run["identical"] for run in runs),
        "damaged": {kind: {"tried": count, "recovered": recovered} for kind, (count, recovered) in tried.items()},
        "kills_by_row": rows,
        "runs_by_row": runs,
    }
    (ROOT / "bench" / "kills.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder)
    print(json.dumps({key: value for key, value in result.items() if not key.endswith("by_row")}, indent=1))


if __name__ == "__main__":
    main()
