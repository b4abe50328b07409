"""Full fine-tuning of the study's base model, which is no recipe: all weights train, at RATES and SEEDS.

    python -m bench.study.full [--at-a-time 8]

Rows, prompt, packs, epochs and schedule are those of the study's recipe. Weights are float32: axolotl would train
bfloat16 ones without a float32 copy, and round small updates away. The results lie beside those of methods.yaml.
"""

import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from bench.study.rows import OUT, RECIPE, SETS
from finlora.core.errors import UserError, run
from finlora.core.paths import ROOT
from finlora.evaluate.results import read_kept

RATES, SEEDS = (0.00003, 0.0001, 0.0003), (1, 2, 3, 4, 5)
FOLDER = ROOT / "outputs" / "sweeps" / f"{RECIPE}.methods"


def name(rate: float, seed: int) -> str:
    return f"full.learning_rate-{rate:g}.seed-{seed}"


def train_and_evaluate(rate: float, seed: int) -> None:
    out = FOLDER / name(rate, seed)
    if all(read_kept(FOLDER / "results" / out.name / one)[0] for one in SETS):
        return
    keys = yaml.safe_load((OUT / f"{RECIPE}.yaml").read_text(encoding="utf-8"))
    keys = {key: value for key, value in keys.items() if not key.startswith(("lora_", "peft_", "fastdora_"))}
    for key in ("adapter", "saves_per_epoch", "save_total_limit", "auto_resume_from_checkpoints"):
        del keys[key]
    keys |= {"plugins": keys["plugins"][1:], "bf16": False, "learning_rate": rate, "seed": seed}
    keys |= {"output_dir": str(out), "dataset_prepared_path": str(out / "tokenised"), "save_strategy": "no"}
    out.mkdir(parents=True, exist_ok=True)
    config = out / "recipe.yaml"
    config.write_text(yaml.safe_dump(keys, sort_keys=False), encoding="utf-8")
    command(out, "axolotl.cli.main", "train", str(config), "--launcher", "python")
    tests = ["--tasks", ",".join(SETS), "--tests", str(OUT), "--results", str(FOLDER / "results"), "--name", out.name]
    command(out, "finlora", "eval", "--model", str(out), *tests)


def command(out: Path, module: str, *arguments: str) -> None:
    with (out / "log").open("ab") as log:
        if subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, stdout=log, stderr=log).returncode:
            raise UserError(f"{module} failed; see {out / 'log'}")
    print(f"{out.name}: {arguments[0]} done", flush=True)


def main(at_a_time: int) -> None:
    with ThreadPoolExecutor(at_a_time) as pool:
        list(pool.map(lambda one: train_and_evaluate(*one), [(rate, seed) for seed in SEEDS for rate in RATES]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at-a-time", type=int, default=8)
    options = parser.parse_args()
    run(lambda: main(options.at_a_time))
