"""Several processes train what one trains: DDP, DeepSpeed's ZeRO stages and FSDP2 on two CPU processes, for real."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from rounding import FACTOR, apart, beyond, nudged, nudged_model, shaken

from fastdora import graphs
from fastdora.plugin import fsdp2 as checked_fsdp2
from fastdora.plugin import zero3
from fastdora.plugin.keys import RecipeError
from finlora.core.errors import UserError
from finlora.train.distributed import fsdp2_keys

pytestmark = pytest.mark.xdist_group("axolotl")

ROOT = Path(__file__).resolve().parent.parent
RATE, STEPS, LAYERS = 0.001, 4, 12
WORDS = "rose fell gained lost grew shrank climbed slid".split()


@dataclass
class Trained:
    adapter: dict[str, torch.Tensor]
    losses: list[float]
    start: dict[str, torch.Tensor] | None  # of one process
    recipe: Path


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
        recipe = yaml.safe_load((ROOT / "recipes" / "sentiment_r8_dora.yaml").read_text(encoding="utf-8"))
        key = json.dumps([processes, recipe | changes], sort_keys=True)
        if key in kept:
            return kept[key]
        name = f"{len(kept)}"
        recipe |= {
            "plugins": [*recipe["plugins"], "bench.plugins.CpuProcesses", "bench.plugins.NormCheck", "nudged.Nudged"],
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
        if recipe["fastdora_layers"] == "fast" and recipe["peft_use_dora"]:
            for rank in range(processes):  # bench.plugins.NormCheck compared the norms in every forward
                norms = json.loads((folder / name / f"norms-{rank}.json").read_text(encoding="utf-8"))
                # A norm is computed in float64 on a CPU, of weights rounded to float32, and rounded itself.
                assert norms["worst"] < FACTOR * torch.finfo(torch.float32).eps
                assert norms["compared"] >= LAYERS * len(log)
                assert len(log) == 1 or norms["moved"] > 1e-5
        start = load_file(folder / name / "start.safetensors") if processes == 1 else None
        kept[key] = Trained(adapter, [entry["loss"] for entry in log], start, path)
        return kept[key]

    return run


LIGER = "axolotl.integrations.liger.LigerPlugin"
OURS = ["bench.plugins.CpuProcesses", "bench.plugins.NormCheck", "nudged.Nudged"]
GRAPHS = {"plugins": ["fastdora.FastDoraPlugin", LIGER, *OURS, "rerun_graphs.Rerun"]}
SLOW_16, SLOW_8 = (pytest.param(number, marks=pytest.mark.slow) for number in (16, 8))


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


def difference(one: Trained, other: Trained) -> dict[str, float]:
    """How far two runs are apart, in A, B, magnitudes and losses. They hold the same tensors.

    Adapters by the length of the difference against that of what `one` was moved by, of the worst tensor: AdamW divides
    a gradient by its own size, so that a single entry whose gradient is all but zero may go either way.
    """
    adapter, losses = one.adapter, one.losses
    assert adapter.keys() == other.adapter.keys() and len(losses) == len(other.losses)
    apart = {"losses": max(abs(a - b) / a for a, b in zip(losses, other.losses, strict=True))}
    for name, tensor in adapter.items():
        part = next(part for part in ("lora_A", "lora_B", "magnitude") if part in name)
        moved = (tensor.double() - one.start[name]).norm()
        apart[part] = max(apart.get(part, 0.0), ((tensor.double() - other.adapter[name]).norm() / moved).item())
    return apart


def beyond_rounding(train, other: Trained, **recipe) -> dict[str, tuple[float, float]]:
    """Where a run is further from the recipe's in one process than FACTOR times what a nudged start changes there."""
    one = train(1, **recipe)
    draws = [difference(one, train(1, nudge=seed, **recipe)) for seed in range(2)]
    # A step's loss is the sum of two packs' shares; a draw may happen to change none.
    least = {"losses": 2 * torch.finfo(torch.float32).eps}
    bounds = {part: FACTOR * max(least.get(part, 0), *(draw[part] for draw in draws)) for part in draws[0]}
    return {part: (far, bounds[part]) for part, far in difference(one, other).items() if not far <= bounds[part]}


def test_two_processes_train_what_one_trains(train):
    """Bit for bit, over two shuffled epochs: the same packs in the same order, their sum taken in the same order."""
    one = train(1)
    assert not any(difference(one, train(2)).values())
    assert one.losses[-1] < one.losses[0] and len({round(loss, 3) for loss in one.losses}) == STEPS


@pytest.mark.parametrize("number", [SLOW_16, 8, pytest.param(4, marks=pytest.mark.slow)])
def test_two_processes_with_graphs_train_what_one_trains_without(train, number):
    """Bit for bit, although one of them records anew at every pass and the other once (tests/rerun_graphs.py)."""
    passes, other = STEPS - graphs.WARM_UP, train(2, **bits(number), **GRAPHS)
    assert not any(difference(train(1, **bits(number)), other).values())
    assert counted(other) == [{"recorded": 1, "replays": passes}, {"recorded": passes, "replays": passes}]


@pytest.mark.slow
@pytest.mark.parametrize("number", [16, 8, 4])
def test_two_packs_a_process_with_graphs_train_what_they_train_without(train, number):
    """DDP reduces the gradients of the second one."""
    accumulated = {"gradient_accumulation_steps": 2, **bits(number)}
    plain, other = train(2, **accumulated), train(2, **accumulated, **GRAPHS)
    assert plain.losses == other.losses and all(plain.adapter[key].equal(other.adapter[key]) for key in plain.adapter)
    assert [each["replays"] for each in counted(other)] == [2 * STEPS - graphs.WARM_UP] * 2


def counted(trained: Trained) -> list[dict]:
    """What Rerun counted in each process of a run."""
    out = Path(yaml.safe_load(trained.recipe.read_text(encoding="utf-8"))["output_dir"])
    return [json.loads((out / f"graphs-{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


BF16 = {"plugins": ["fastdora.FastDoraPlugin", LIGER, "cpu_bf16.Bf16", *OURS], **bits(16)}
WAYS = {"ddp": {}, "zero1": zero(1), "zero2": zero(2), "zero3": zero(3) | {"alone": True}, "fsdp2": fsdp2(16)}


@pytest.mark.parametrize("way", [pytest.param("zero1", marks=pytest.mark.slow), "zero2", "zero3", "fsdp2"])
def test_the_first_step_under_bf16_where_deepspeed_would_round_adapter_and_positions(train, way):
    """All gradients of one step, with B away from zero: SGD moves each weight in proportion to its own.

    One step, since rounding grows without bound in a second. Each process computes its packs exactly as one process
    does, and the sum of two gradients has one order. But ZeRO and FSDP2 take the gradient's norm, by which it is
    clipped, from each process's share first, so that every weight may be off by one rounding of float32. Where such a
    weight, its scale or an activation lies between two numbers of bf16 a matmul takes the other one, 2^16 times as far
    off. That spreads until the runs are as far apart as bf16 rounds: 1e-3 in a weight. Whether it happens within four
    steps is chance, drawn anew by each processor and library, and no likelier under FSDP2 than under ZeRO.
    """
    first = BF16 | {
        "optimizer": "sgd", "learning_rate": 10.0, "max_steps": 1, "peft_init_lora_weights": "orthogonal"
    }  # fmt: skip
    one, other = train(1, **first, alone=way == "zero3"), train(2, **first, **WAYS[way])
    assert all(tensor.dtype == torch.float32 for tensor in other.adapter.values())
    # What was trained has its norm's, its clipping's and its own sum's rounding: of its movement, and where it ends.
    bounds = {"losses": FACTOR * torch.finfo(torch.float32).eps}
    for seed, part in enumerate(("lora_A", "lora_B", "magnitude")):
        bounds[part] = 0.0
        for name in (name for name in one.adapter if part in name):
            moved = one.adapter[name] - one.start[name]
            rounding = (nudged(moved, seed) - moved).norm() + (
                nudged(one.adapter[name], seed) - one.adapter[name]
            ).norm()
            bounds[part] = max(bounds[part], FACTOR * (rounding / moved.norm()).item())
    actual = difference(one, other)
    assert all(actual[part] <= bounds[part] for part in bounds), (actual, bounds)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_four_steps_under_bf16(train, way):
    """Bit for bit where no gradient is clipped: no other sum has two orders."""
    changes = BF16 | {"max_grad_norm": 0.0}
    one = train(1, **changes, alone=way == "zero3")
    assert not any(difference(one, train(2, **changes, **WAYS[way])).values())


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_each_zero_stage_trains_what_one_process_trains(train, stage):
    assert not beyond_rounding(train, train(2, **zero(stage)))


@pytest.mark.slow
def test_zero_3_on_4_bits(train):
    """bench/zero.py has all bits, methods and stages."""
    assert not beyond_rounding(train, train(2, **bits(4), **zero(3)), **bits(4))


@pytest.mark.parametrize("number", [SLOW_16, SLOW_8, 4])
def test_fsdp2_trains_what_one_process_trains(train, number):
    """The weights of every kind of base shared out, the norms that every forward uses right."""
    assert not beyond_rounding(train, train(2, **bits(number), **fsdp2(number)), **bits(number))


def test_a_run_under_fsdp2_resumes_from_its_checkpoint(tmp_path, tiny_base):
    """Bit for bit, under gradient checkpointing; and the checkpoint holds the whole adapter as PEFT writes it."""
    from forked import axolotl_processes
    from kills import digest, recipe
    from safetensors.torch import load_file

    changes = {"lora_dropout": 0.0, "max_steps": 3, "optimizer": "adamw_torch", "gradient_checkpointing": True}
    path = recipe(tmp_path, "run", tiny_base, **bits(8), **fsdp2(8), **changes)
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    path.write_text(yaml.safe_dump(config | {"plugins": [*config["plugins"], "bench.plugins.CpuProcesses"]}))
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
    def refused(key: str, remedy: str, number: int = 16, **changes):
        keys = changes.pop("fsdp_config", {})
        with pytest.raises(RecipeError, match=f"^own.yaml: key '{key}': .*{remedy}"):
            checked_fsdp2.check(fsdp2(number, **keys) | bits(number) | changes, "own.yaml")

    refused("fsdp_config", "GPUS=2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    checked_fsdp2.check(fsdp2(16) | bits(16) | {"optimizer": "adamw_torch_fused"}, "own.yaml")
    refused("fsdp_version", "2", fsdp_version=1)
    refused("optimizer", "adamw_torch_fused", optimizer="paged_adamw_8bit")
    config = "fsdp_config"
    refused(f"{config}.state_dict_type", "SHARDED_STATE_DICT", fsdp_config={"state_dict_type": "FULL_STATE_DICT"})
    refused(
        f"{config}.activation_checkpointing",
        "remove it|gradient_checkpointing",
        fsdp_config={"activation_checkpointing": True},
    )
    refused(f"{config}.mixed_precision_policy", "remove", fsdp_config={"mixed_precision_policy": "bf16"})
    refused(f"{config}.cpu_ram_efficient_loading", "false", 8, fsdp_config={"cpu_ram_efficient_loading": True})


def test_what_zero_3_cannot_train_is_refused(train, tmp_path):
    config = json.loads((ROOT / "recipes" / "deepspeed" / "zero3.json").read_text(encoding="utf-8"))
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 100
    (tmp_path / "own.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(RecipeError, match="^own.yaml: key 'deepspeed': .*stage3_param_persistence_threshold: 0"):
        zero3.check(zero(3) | {"deepspeed": str(tmp_path / "own.json")}, "own.yaml")
    checkpointing = {"gradient_checkpointing_kwargs": {"use_reentrant": False}, "gradient_checkpointing": True}
    with pytest.raises(UserError, match="yaml: key 'gradient_checkpointing_kwargs': .*use_reentrant: true"):
        train(2, **zero(3) | checkpointing)  # the plugin's hook calls it


@pytest.mark.parametrize("number", [SLOW_16, SLOW_8, 4])
def test_the_fast_layers_train_what_pefts_train(train, number):
    assert not beyond_rounding(train, train(1, **bits(number), fastdora_layers="peft"), **bits(number))


@pytest.mark.slow
def test_another_seed_is_far_beyond_rounding(train):
    """The bounds above are none that anything keeps."""
    assert min(far / bound for far, bound in beyond_rounding(train, train(1, seed=7)).values()) > 100


@pytest.mark.slow
def test_a_pack_trains_what_its_rows_train_side_by_side(train):
    """All 16 rows in one pack, or in one padded batch."""
    packed = dict(sequence_len=1024, gradient_accumulation_steps=1)
    plain = dict(sample_packing=False, eval_sample_packing=False, micro_batch_size=16)
    assert not beyond_rounding(train, train(1, **packed | plain), **packed)


@pytest.mark.slow
def test_what_axolotls_own_kernels_do_to_dora(train):
    """They keep the norm until a tensor's version moves. torch's plain AdamW moves it; the fused one (the default),
    bitsandbytes' and ZeRO's do not, and another adapter comes out. Recipes therefore switch those kernels off.
    """
    changes = {"learning_rate": 0.02, **bits(16)}
    right = train(1, **changes, optimizer="adamw_torch_fused", fastdora_layers="peft")
    kernels = {"fastdora_layers": "peft", "lora_qkv_kernel": True}
    seen = difference(right, train(1, **changes, **kernels))
    unseen = difference(right, train(1, **changes, **kernels, optimizer="adamw_torch_fused"))
    ours = difference(right, train(1, **changes, optimizer="adamw_torch_fused"))
    assert all(unseen[part] > 10 * max(seen[part], ours[part]) for part in unseen)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw_bnb_8bit", "paged_adamw_8bit"])
def test_norms_under_optimizers_that_move_no_version(train, optimizer):
    """The fixture compares them in every forward."""
    train(1, optimizer=optimizer)


@pytest.mark.slow  # tests/test_all_recipes.py trains some
@pytest.mark.parametrize("number", [16, 8, 4])
@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_every_kind_of_base_trains_without_dora_too(train, number, method):
    changes = {"peft_use_dora": False, "peft_use_rslora": method == "rslora"}
    losses = train(1, **bits(number), **changes).losses
    assert losses[-1] < losses[0]


@pytest.mark.slow  # tests/test_merge.py has our own merge, which `make merge` calls
def test_axolotls_merge_is_what_was_trained(train):
    """`axolotl merge-lora` on what the fast layers trained: the logits of PEFT's unmerged model, loaded without us."""
    from forked import axolotl_command
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    path = train(1, learning_rate=0.02, **bits(16)).recipe
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    code, output = axolotl_command("merge-lora", str(path), "--lora-model-dir", recipe["output_dir"])
    assert code == 0, output[-3000:]
    base = AutoModelForCausalLM.from_pretrained(recipe["base_model"], dtype=torch.float32)
    ids = torch.arange(40)[None] + 100
    with torch.no_grad():
        without = base(ids).logits
        unmerged = PeftModel.from_pretrained(base, recipe["output_dir"])(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(f"{recipe['output_dir']}/merged", dtype=torch.float32)(ids).logits
        # Of the merged weights, each rounded once: `merged` differs from `unmerged` as it does from itself, nudged.
        other = AutoModelForCausalLM.from_pretrained(f"{recipe['output_dir']}/merged", dtype=torch.float32)
        logits = {"y": merged}
        bounds = shaken(lambda seed: apart({"y": nudged_model(other, seed)(ids).logits}, logits), torch.float32)
    assert not beyond({"y": unmerged}, logits, bounds) and (unmerged - without).abs().max() > 0.1
