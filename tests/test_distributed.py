"""Several processes train what one trains: DDP, DeepSpeed's ZeRO stages and FSDP2 on two CPU processes, for real."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from tools.cli import UserError
from tools.several import fsdp2_keys

pytestmark = pytest.mark.xdist_group("axolotl")

ROOT = Path(__file__).resolve().parent.parent
RATE, STEPS, LAYERS = 0.001, 4, 12
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
            "plugins": [*recipe["plugins"], "cpu_processes.CpuProcesses", "norm_check.NormCheck"],
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
        if (
            recipe["fastdora_layers"] == "fast" and recipe["peft_use_dora"]
        ):  # every forward of every layer was looked at by norm_check.NormCheck
            norms = json.loads((folder / name / "norms.json").read_text(encoding="utf-8"))
            assert norms["moved"] > 1e-5 and norms["compared"] >= LAYERS * len(log)
        kept[key], run.recipes[key] = (adapter, [entry["loss"] for entry in log]), path
        return kept[key]

    run.recipes = {}

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


def fsdp2(number: int, **keys) -> dict:
    return {"fsdp_version": 2, "fsdp_config": fsdp2_keys(bits(number), False) | keys}


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


LIGER = "axolotl.integrations.liger.LigerPlugin"
BF16 = ["fastdora.FastDoraPlugin", LIGER, "cpu_processes.CpuProcesses", "cpu_bf16.Bf16", "norm_check.NormCheck"]


@pytest.mark.parametrize("way", [zero(1), zero(2), zero(3), fsdp2(16)], ids=["zero1", "zero2", "zero3", "fsdp2"])
def test_under_bf16_too_where_deepspeed_would_round_adapter_and_positions(train, way):
    one, other = train(1, plugins=BF16, **bits(16)), train(2, plugins=BF16, **bits(16), **way)
    assert all(tensor.dtype == torch.float32 for tensor in other[0].values())
    weights, losses = difference(one, other)
    assert weights < 1e-5 and losses < 1e-5


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_each_zero_stage_trains_what_one_process_trains(train, stage):
    weights, losses = difference(train(1), train(2, **zero(stage)))
    # Adam divides a gradient by its own size, so where it is all but zero the order of a sum decides its sign.
    assert weights < RATE / 10 and losses < 1e-5


def test_zero_3_on_4_bits(train):
    """bench/zero.py has all bits, methods and stages."""
    weights, losses = difference(train(1, **bits(4)), train(2, **bits(4), **zero(3)))
    assert weights < RATE / 10 and losses < 1e-5


@pytest.mark.parametrize("number", [16, 8, 4])
def test_fsdp2_trains_what_one_process_trains(train, number):
    """The weights of every kind of base shared out, the norms that every forward uses right."""
    weights, losses = difference(train(1, **bits(number)), train(2, **bits(number), **fsdp2(number)))
    assert weights < RATE / 10 and losses < 1e-5


def test_a_run_under_fsdp2_goes_on_from_its_checkpoint(tmp_path, tiny_base):
    """Bit for bit, under gradient checkpointing; and the checkpoint holds the whole adapter as PEFT writes it."""
    from forked import axolotl_processes
    from safetensors.torch import load_file

    from bench.kills import digest, recipe

    changes = {"lora_dropout": 0.0, "max_steps": 3, "optimizer": "adamw_torch", "gradient_checkpointing": True}
    path = recipe(tmp_path, "run", tiny_base, **bits(8), **fsdp2(8), **changes)
    wanted = yaml.safe_load(path.read_text(encoding="utf-8"))
    path.write_text(yaml.safe_dump(wanted | {"plugins": [*wanted["plugins"], "cpu_processes.CpuProcesses"]}))
    out, digests, written = tmp_path / "run", [], set()
    for _ in range(2):
        for code, output in axolotl_processes(2, "train", str(path), "--launcher", "python"):
            assert code == 0, output[-3000:]
        digests.append(digest(out))
        written.add((out / "checkpoint-2" / "seal.json").stat().st_mtime_ns)
        end = load_file(out / "adapter_model.safetensors")
        last = load_file(out / "checkpoint-3" / "adapter_model.safetensors")
        assert end.keys() == last.keys() and all(end[key].equal(last[key]) for key in end)
        shutil.rmtree(out / "checkpoint-3")
        (out / "adapter_model.safetensors").unlink()
    assert len(written) == 1 and digests[0] == digests[1]


def test_what_fsdp2_cannot_train_is_refused(monkeypatch):
    from fastdora import fsdp2 as checked
    from fastdora.keys import RecipeError

    def refused(key: str, number: int = 16, **changes):
        keys = changes.pop("fsdp_config", {})
        with pytest.raises(RecipeError, match=f"^own.yaml: key '{key}': "):
            checked.check(fsdp2(number, **keys) | bits(number) | changes, "own.yaml")

    refused("fsdp_config")
    monkeypatch.setenv("WORLD_SIZE", "2")
    checked.check(fsdp2(16) | bits(16) | {"optimizer": "adamw_torch_fused"}, "own.yaml")
    refused("fsdp_version", fsdp_version=1)
    refused("optimizer", optimizer="paged_adamw_8bit")
    refused("fsdp_config.state_dict_type", fsdp_config={"state_dict_type": "FULL_STATE_DICT"})
    refused("fsdp_config.activation_checkpointing", fsdp_config={"activation_checkpointing": True})
    refused("fsdp_config.mixed_precision_policy", fsdp_config={"mixed_precision_policy": "bf16"})
    refused("fsdp_config.cpu_ram_efficient_loading", 8, fsdp_config={"cpu_ram_efficient_loading": True})


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


@pytest.mark.parametrize("number", [16, 8, 4])
def test_the_fast_layers_train_what_pefts_train(train, number):
    """Within what the order of sums explains: far less than what another seed changes."""
    weights, losses = difference(train(1, **bits(number)), train(1, **bits(number), fastdora_layers="peft"))
    assert weights < RATE / 10 and losses < 1e-5
    other_weights, other_losses = difference(train(1), train(1, seed=7))
    assert other_weights > 1000 * weights and other_losses > 1000 * losses


def test_a_pack_trains_what_its_rows_train_side_by_side(train):
    """All 16 rows in one pack, or in one padded batch."""
    packed = train(1, sequence_len=1024, gradient_accumulation_steps=1)
    plain = dict(sample_packing=False, eval_sample_packing=False, micro_batch_size=16)
    weights, losses = difference(packed, train(1, sequence_len=1024, gradient_accumulation_steps=1, **plain))
    assert weights < RATE / 10 and losses < 1e-5


def test_what_axolotls_own_kernels_do_to_dora(train):
    """They keep the norm until a tensor's version moves. torch's plain AdamW moves it; the fused one (the default),
    bitsandbytes' and ZeRO's do not, and another adapter comes out. Recipes therefore switch those kernels off.
    """
    changes = {"learning_rate": 0.02, **bits(16)}
    right = train(1, **changes, optimizer="adamw_torch_fused", fastdora_layers="peft")
    kernels = {"fastdora_layers": "peft", "lora_qkv_kernel": True}
    seen = difference(train(1, **changes, **kernels), right)
    unseen = difference(train(1, **changes, **kernels, optimizer="adamw_torch_fused"), right)
    ours = difference(train(1, **changes, optimizer="adamw_torch_fused"), right)
    assert unseen[0] > 10 * max(seen[0], ours[0]) and unseen[1] > 10 * max(seen[1], ours[1])


@pytest.mark.parametrize("optimizer", ["adamw_bnb_8bit", "paged_adamw_8bit"])
def test_norms_under_optimizers_that_move_no_version(train, optimizer):
    """The fixture compares them in every forward."""
    train(1, optimizer=optimizer)


@pytest.mark.parametrize("number", [16, 8, 4])
@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_every_kind_of_base_trains_without_dora_too(train, number, method):
    changes = {"peft_use_dora": False, "peft_use_rslora": method == "rslora"}
    _, losses = train(1, **bits(number), **changes)
    assert losses[-1] < losses[0]


def test_axolotls_merge_is_what_was_trained(train):
    """`axolotl merge-lora` on what the fast layers trained: the logits of PEFT's unmerged model, loaded without us."""
    import torch
    from forked import axolotl_command
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    train(1, learning_rate=0.02, **bits(16))
    path = next(
        path for key, path in train.recipes.items() if json.loads(key) == [1, {"learning_rate": 0.02, **bits(16)}]
    )
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    code, output = axolotl_command("merge-lora", str(path), "--lora-model-dir", recipe["output_dir"])
    assert code == 0, output[-3000:]
    base = AutoModelForCausalLM.from_pretrained(recipe["base_model"], dtype=torch.float32)
    ids = torch.arange(40)[None] + 100
    with torch.no_grad():
        without = base(ids).logits
        unmerged = PeftModel.from_pretrained(base, recipe["output_dir"])(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(f"{recipe['output_dir']}/merged", dtype=torch.float32)(ids).logits
    assert (merged - unmerged).abs().max() < 1e-4 and (unmerged - without).abs().max() > 0.1
