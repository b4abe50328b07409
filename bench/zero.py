"""Train the same packs in one process and in two, for each way to share them, and compare adapters and losses.

    PYTHONPATH=.:tests python bench/zero.py

Writes bench/zero.json. Two CPU processes (gloo), the tiny model, four Adam steps over two shuffled epochs, dropout 0.
"""

import json
import shutil
import tempfile
from pathlib import Path

import yaml

from bench.kills import recipe

ROOT = Path(__file__).resolve().parent.parent
RATE, STEPS = 0.001, 4
WAYS = ("ddp", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
METHODS = {
    "lora": {"peft_use_dora": False},
    "dora, fastdora": {"peft_use_dora": True, "fastdora_layers": "fast"},
    "dora, peft": {"peft_use_dora": True, "fastdora_layers": "peft"},
}


def main() -> None:
    from forked import axolotl_processes
    from safetensors.torch import load_file

    from finlora.train import tiny

    folder, base, rows = Path(tempfile.mkdtemp(prefix="zero-")), tiny.build(tiny.sample_texts()), []

    def train(processes: int, **changes):
        path = recipe(
            folder,
            "run",
            base,
            lora_dropout=0.0,
            max_steps=STEPS,
            warmup_steps=0,
            learning_rate=RATE,
            optimizer=changes.pop("optimizer", "adamw_torch"),
            gradient_accumulation_steps=2 // processes,
            save_steps=None,
            save_strategy="no",
            **changes,
        )
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        path.write_text(yaml.safe_dump(config | {"plugins": [*config["plugins"], "cpu_processes.CpuProcesses"]}))
        results = axolotl_processes(processes, "train", str(path), "--launcher", "python")
        failed = [output for code, output in results if code]
        if failed:
            return None, next(line for line in reversed(failed[0].splitlines()) if line.strip())
        log = json.loads((folder / "run" / "metrics.json").read_text(encoding="utf-8"))["log"]
        adapter = load_file(folder / "run" / "adapter_model.safetensors")
        shutil.rmtree(folder / "run")
        return adapter, [entry["loss"] for entry in log]

    for bits in (16, 8, 4):
        for method, keys in METHODS.items():
            keys = keys | {
                "load_in_8bit": bits == 8,
                "load_in_4bit": bits == 4,
                "adapter": "qlora" if bits == 4 else "lora",
            }
            one, losses = train(1, **keys)
            assert one, losses
            for way in WAYS:
                row = {"bits": bits, "method": method, "way": way}
                changes = {} if way == "ddp" else {"deepspeed": str(ROOT / "recipes" / "deepspeed" / f"{way}.json")}
                other, result = train(2, **keys, **changes)
                if other is None:
                    row["failed"] = result
                else:
                    row["adapter_difference"] = max((one[key] - other[key]).abs().max().item() for key in one)
                    row["loss_difference"] = max(abs(a - b) for a, b in zip(losses, result, strict=True))
                    row["same_tensors"] = one.keys() == other.keys()
                rows.append(row)
                print(row, flush=True)
    shutil.rmtree(folder)
    result = {"learning_rate": RATE, "steps": STEPS, "optimizer": "adamw_torch", "processes": 2, "rows": rows}
    (ROOT / "bench" / "zero.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
