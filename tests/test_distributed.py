"""Several processes train what one trains: DDP and DeepSpeed's ZeRO stages on two CPU processes, for real."""

import json
from pathlib import Path

import pytest
import yaml

from tools.cli import UserError

pytestmark = pytest.mark.xdist_group("axolotl")

ROOT = Path(__file__).resolve().parent.parent
RATE, STEPS = 0.001, 4
WORDS = "rose fell gained lost grew shrank climbed slid".split()


@pytest.fixture(scope="module")
def train(tmp_path_factory, tiny_base):
    """A function that trains the sentiment recipe, changed as asked, in so many CPU processes: its adapter and losses.

    16 rows in 4 packs, 2 of them a step, so 2 steps an epoch whatever the number of processes. Equal runs are run once.
    """
    from forked import axolotl_processes
    from safetensors.torch import load_file

    folder = tmp_path_factory.mktemp("several")
    rows = [(f"Shares of company {i} {WORDS[i % 8]}.", "up" if i % 2 else "down") for i in range(16)]
    (folder / "train.jsonl").write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}) + "\n"
            for a, b in rows
        )
    )
    kept = {}

    def run(processes: int, **changes):
        key = json.dumps([processes, changes], sort_keys=True)
        if key in kept:
            return kept[key]
        recipe = yaml.safe_load((ROOT / "recipes" / "sentiment_r8_dora.yaml").read_text(encoding="utf-8"))
        name = f"{len(kept)}"
        recipe |= {
            "plugins": [*recipe["plugins"], "cpu_processes.CpuProcesses"],
            "base_model": str(tiny_base),
            "datasets": [recipe["datasets"][0] | {"path": str(folder / "train.jsonl")}],
            "output_dir": str(folder / name),
            "dataset_prepared_path": str(folder / "tokenised"),
            "sequence_len": 128,
            "lora_dropout": 0.0,  # each process draws its own
            "gradient_accumulation_steps": 2 // processes,
            "max_steps": STEPS,
            "learning_rate": RATE,
            "warmup_steps": 0,
            "logging_steps": 1,
            "save_strategy": "no",
            "optimizer": "adamw_torch",
        }
        for key_ in ("test_datasets", "evals_per_epoch", "saves_per_epoch", "auto_resume_from_checkpoints"):
            del recipe[key_]
        recipe = {key_: value for key_, value in (recipe | changes).items() if value is not None}
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        results = axolotl_processes(processes, "train", str(path), "--launcher", "python")
        for _, output in results:
            if refused := [line for line in output.splitlines() if line.startswith("error: ")]:
                raise UserError(refused[0])
        assert all(code == 0 for code, _ in results), max((output for _, output in results), key=len)[-3000:]
        log = json.loads((folder / name / "metrics.json").read_text(encoding="utf-8"))["log"]
        adapter = load_file(folder / name / "adapter_model.safetensors")
        kept[key] = adapter, [entry["loss"] for entry in log]
        return kept[key]

    return run


def bits(number: int) -> dict:
    return {
        "load_in_8bit": number == 8,
        "load_in_4bit": number == 4,
        "adapter": "qlora" if number == 4 else "lora",
    }


def zero(stage: int) -> dict:
    changes = {"deepspeed": str(ROOT / "recipes" / "deepspeed" / f"zero{stage}.json")}
    if stage == 3:
        changes["gradient_checkpointing_kwargs"] = {"use_reentrant": True}
    return changes


def difference(one, other) -> tuple[float, float]:
    """The largest difference between two runs' adapters, and between their losses. They hold the same tensors."""
    (adapter, losses), (other_adapter, other_losses) = one, other
    assert adapter.keys() == other_adapter.keys() and len(losses) == len(other_losses) == STEPS
    weights = max((adapter[key] - other_adapter[key]).abs().max().item() for key in adapter)
    return weights, max(abs(a - b) for a, b in zip(losses, other_losses, strict=True))


def test_two_processes_train_what_one_trains(train):
    """Bit for bit, over two shuffled epochs: the same packs in the same order, their sum taken in the same order."""
    adapter, losses = train(1)
    assert difference((adapter, losses), train(2)) == (0, 0)
    assert losses[-1] < losses[0] and len({round(loss, 3) for loss in losses}) == STEPS


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_each_zero_stage_trains_what_one_process_trains(train, stage):
    weights, losses = difference(train(1), train(2, **zero(stage)))
    # Adam divides a gradient by its own size, so where it is all but zero the order of a sum decides its sign.
    assert weights < RATE / 10 and losses < 1e-5


@pytest.mark.parametrize("number", [16, 4])
def test_zero_3_with_other_bits(train, number):
    weights, losses = difference(train(1, **bits(number)), train(2, **bits(number), **zero(3)))
    assert weights < RATE / 10 and losses < 1e-5


def test_what_zero_3_cannot_train_is_refused(train, tmp_path):
    with pytest.raises(UserError, match="key 'gradient_checkpointing_kwargs': ZeRO-3 needs use_reentrant: true"):
        train(
            2, **zero(3) | {"gradient_checkpointing_kwargs": {"use_reentrant": False}, "gradient_checkpointing": True}
        )
    config = json.loads((ROOT / "recipes" / "deepspeed" / "zero3.json").read_text(encoding="utf-8"))
    del config["zero_optimization"]["stage3_param_persistence_threshold"]
    (tmp_path / "own.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match="needs zero_optimization.stage3_param_persistence_threshold: 0"):
        train(2, **zero(3) | {"deepspeed": str(tmp_path / "own.json")})


def test_a_sharded_run_goes_on_from_its_checkpoint(tmp_path, tiny_base):
    """ZeRO-2 in two processes, ended after step 4 of 6 by damage to what came later: the same adapter, bit for bit."""
    from forked import axolotl_processes

    from bench.kills import digest, recipe

    changes = {
        "deepspeed": str(ROOT / "recipes" / "deepspeed" / "zero2.json"),
        "max_steps": 6,
        "optimizer": "adamw_torch",
        "save_total_limit": 5,
    }
    path = recipe(tmp_path, "run", tiny_base, **changes)
    wanted = yaml.safe_load(path.read_text(encoding="utf-8"))
    path.write_text(yaml.safe_dump(wanted | {"plugins": [*wanted["plugins"], "cpu_processes.CpuProcesses"]}))
    digests = []
    for steps in (6, 2):
        results = axolotl_processes(2, "train", str(path), "--launcher", "python")
        assert [code for code, _ in results] == [0, 0], results[0][1][-3000:]
        out = tmp_path / "run"
        assert json.loads((out / "metrics.json").read_text(encoding="utf-8"))["steps_this_run"] == steps
        digests.append(digest(out))
        last = out / "checkpoint-6"
        assert any(path.name.startswith("zero_pp_rank_1") for path in last.rglob("*"))  # the second process's share
        (last / "trainer_state.json").unlink()
        (out / "adapter_model.safetensors").unlink()
    assert digests[0] == digests[1]
