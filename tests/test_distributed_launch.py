"""GPUS=, NODES= and ZERO=: the batch is kept, what cannot work is refused, and the cluster files run make train."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml
from failures import failed, refuses
from hypothesis import given
from hypothesis import strategies as st

from finlora import cli
from finlora.core import machine
from finlora.core.errors import UserError
from finlora.recipes import load as recipes
from finlora.recipes import names as recipe_names
from finlora.train import distributed
from finlora.train.distributed import Launch

ROOT = Path(__file__).resolve().parent.parent
PATH = recipe_names.RECIPES / "sentiment_r8_dora.yaml"
RECIPE = recipes.load(PATH).keys
# Made up; no log and no file of a run may show them.
PLANTED = {
    "HF_TOKEN": "hf_PLANTEDplantedPLANTEDplanted0001",
    "WANDB_API_KEY": "planted0002planted0002planted0002planted0",
    "AWS_SECRET_ACCESS_KEY": "plantedPLANTED0003plantedPLANTED0003plan",
    "MY_PASSWORD": "correct-horse-planted-0004",
}


@given(
    micro=st.integers(1, 16),
    accumulation=st.integers(1, 64),
    length=st.integers(512, 20000),
    gpus=st.integers(1, 8),
    nodes=st.integers(1, 4),
)
def test_the_global_batch_is_kept(micro, accumulation, length, gpus, nodes):
    changes = {"micro_batch_size": micro, "gradient_accumulation_steps": accumulation, "sequence_len": length}
    before = micro * accumulation * length
    try:
        after, message = distributed.share_batch(PATH, RECIPE | changes, gpus, nodes)
    except UserError:
        assert before // (gpus * nodes) < 128 * max(1, micro * accumulation // (gpus * nodes) + 1)
        return
    each = after["micro_batch_size"] * after["gradient_accumulation_steps"]
    tokens = each * after["sequence_len"] * gpus * nodes
    assert before - each * gpus * nodes < tokens <= before
    assert after["sequence_len"] <= length  # longer packs would not fit where the recipe's did
    assert (message is None) == (gpus * nodes == 1)
    if micro * accumulation % (gpus * nodes) == 0:
        assert after["sequence_len"] == length and tokens == before
    changed = {key for key in after if after[key] != (RECIPE | changes)[key]}
    assert changed <= {"micro_batch_size", "gradient_accumulation_steps", "sequence_len"}


def test_how_the_batch_is_kept_is_said():
    message = distributed.share_batch(PATH, RECIPE | {"gradient_accumulation_steps": 1, "sequence_len": 5120}, 4, 1)[1]
    assert re.search(r"\b4 processes .*\b1 .*\b1,280 .*\b1 .*\b5,120 ", message)
    message = distributed.share_batch(PATH, RECIPE | {"gradient_accumulation_steps": 8}, 2, 2)[1]
    assert re.search(r"\b4 processes .*\b2 .*\b8 ", message)


REFUSED = {
    "too few tokens": (
        {"sequence_len": 512},
        (8, 1),
        ["512 tokens a step", "8 processes", "fewer"],
    ),
    "rows that do not divide": (
        {"sample_packing": False, "micro_batch_size": 6, "gradient_accumulation_steps": 1},
        (4, 1),
        ["6 rows", "4 processes", "1, 2, 3, 6,", "sample_packing: true"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_batch_that_cannot_be_kept_is_refused(case):
    changes, (gpus, nodes), words = REFUSED[case]
    with refuses("sentiment_r8_dora", *words, file=f"GPUS={gpus}"):
        distributed.share_batch(PATH, RECIPE | changes, gpus, nodes)


def test_a_row_too_long_for_shorter_packs_names_the_way_out():
    written = recipes.Recipe(PATH, RECIPE | {"gradient_accumulation_steps": 1, "sequence_len": 5120})
    shared = distributed.distribute(written, Launch(gpus=4))
    assert re.search(r"\b1,280 tokens\b.*; a row that is longer needs fewer GPUs", shared.batch_kept)
    whole = recipes.Recipe(PATH, RECIPE | {"gradient_accumulation_steps": 4})
    assert "longer" not in distributed.distribute(whole, Launch(gpus=4)).batch_kept


@pytest.mark.parametrize(
    "micro, accumulation, gpus, proposed, times",
    [(1, 1, 2, 2, "2"), (1, 3, 2, 4, "1.33333"), (2, 1, 4, 2, "2"), (2, 3, 2, None, None), (1, 4, 2, None, None)],
)
def test_packs_that_would_be_shortened_are_proposed_whole_in_a_larger_batch(micro, accumulation, gpus, proposed, times):
    keys = RECIPE | {"micro_batch_size": micro, "gradient_accumulation_steps": accumulation}
    assert distributed.whole_packs(keys, gpus) == proposed
    after, message = distributed.share_batch(PATH, keys, gpus, 1)
    assert (after["sequence_len"] < keys["sequence_len"]) == ("faster" in message) == (proposed is not None)
    if proposed:
        words = rf"steps: {proposed} .* 2,560 tokens on each, {times} times the batch"
        assert re.search(words, message)
        whole, _ = distributed.share_batch(PATH, keys | {"gradient_accumulation_steps": proposed}, gpus, 1)
        assert whole["sequence_len"] == keys["sequence_len"]


def test_a_launch_makes_of_a_recipe_what_its_options_say():
    recipe = recipes.Recipe(PATH, RECIPE | {"gradient_accumulation_steps": 8})
    assert distributed.distribute(recipe, Launch()).recipe.keys == recipe.keys
    shared = distributed.distribute(recipe, Launch(2, 2, master="node0", zero=2, offload=True))
    assert shared.recipe.keys["gradient_accumulation_steps"] == 2 and shared.batch_kept
    assert shared.zero == 2 and shared.recipe.path == PATH and "--nnodes=2" in shared.torchrun
    assert (Launch(gpus=2, nodes=2).gpus_needed, Launch(zero=1).gpus_needed, Launch(fsdp=2).gpus_needed) == (2, 1, 0)


def test_ray_is_asked_for_a_worker_a_gpu_and_a_recipe_that_its_workers_take(monkeypatch):
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: name == "ray")
    assert distributed.launcher(Launch(4, 2, 0, None, ray=True)) == (["--use-ray", "--ray-num-workers", "8"], [])
    with refuses("RAY=1", "NODE_RANK", "MASTER", "leave|remove"):
        distributed.launcher(Launch(4, 2, 1, None, ray=True))
    recipe = RECIPE | {"saves_per_epoch": 4, "evals_per_epoch": 2, "num_epochs": 4}
    changed = distributed.epochs_to_steps(recipe)
    assert (changed["save_steps"], changed["eval_steps"]) == (1 / 16, 1 / 8)
    assert recipe.keys() - changed.keys() == {"saves_per_epoch", "evals_per_epoch"}
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: None)
    with refuses("RAY=1", "Ray", "-m pip install 'ray[train]'|pip install 'ray[train]'"):
        distributed.launcher(Launch(4, 2, 0, None, ray=True))


SHARD_REFUSED = [
    ({}, None, True, {}, ["OFFLOAD=1", "ZERO=2", "ZERO=3", "FSDP=2"]),
    ({}, 1, True, {}, ["OFFLOAD=1", "ZERO=2", "ZERO=3", "ZERO=1"]),
    ({"deepspeed": "own.json"}, 2, False, {"file": PATH, "key": "deepspeed"}, ["remove", "ZERO=2"]),
    (
        {"fsdp_version": 2, "fsdp_config": {"offload_params": False}},
        2,
        False,
        {"file": PATH, "key": "fsdp_config"},
        ["remove", "ZERO=2"],
    ),
]


@pytest.mark.parametrize("changes, zero, offload, place, words", SHARD_REFUSED)
def test_sharding_that_cannot_work_is_refused(changes, zero, offload, place, words):
    with refuses(*words, **place):
        distributed.shard(PATH, RECIPE | changes, zero, offload)


@pytest.mark.parametrize(
    "changes, zero, fsdp, processes, place, words",
    [
        ({}, 2, 2, 2, {"file": "ZERO=2 FSDP=2"}, ["one"]),
        ({}, None, 2, 1, {}, ["FSDP=2", "GPUS=2"]),
        ({"deepspeed": "own.json"}, None, 2, 2, {"file": PATH, "key": "deepspeed"}, ["remove", "FSDP=2"]),
    ],
)
def test_fsdp_that_cannot_work_is_refused(changes, zero, fsdp, processes, place, words):
    with refuses(*words, **place):
        distributed.shard(PATH, RECIPE | changes, zero, False, fsdp, processes)


@pytest.mark.parametrize("options", [("--zero", "4"), ("--zero", "0"), ("--fsdp", "1")])
def test_a_stage_that_there_is_not_is_refused(options):
    with pytest.raises(click.BadParameter, match=f"'{options[1]}' is not") as error:
        cli.call(["train", "sentiment_r8_dora", *options])
    assert error.value.param.opts == [options[0]]


@pytest.mark.xdist_group("axolotl")
@pytest.mark.parametrize("name", ["sentiment_bf16_r8_dora", "sentiment_r8_dora", "sentiment_4bit_r4_lora"])
@pytest.mark.parametrize("offload", [False, True])
def test_fsdp_keys_are_axolotls(name, offload):
    """Its strict schema takes them, and its own validators the recipe with them."""
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    from fastdora.plugin.keys import check_keys, input_schema

    path = recipe_names.RECIPES / f"{name}.yaml"
    recipe = distributed.shard(path, recipes.load(path).keys, None, offload, 2, 2)
    check_keys(recipe, str(path), input_schema(tuple(recipe["plugins"])))
    validated = validate_config(DictDefault(recipe))
    assert distributed.weight_share(path, recipe, 4) == (0 if offload else 0.25)
    assert validated.fsdp_version == 2 and validated.fsdp_config.offload_params == offload
    assert validated.fsdp_config.cpu_ram_efficient_loading == ("bf16" in name)


@pytest.mark.xdist_group("axolotl")
@pytest.mark.parametrize("zero, offload", [(1, False), (2, False), (3, False), (2, True), (3, True)])
def test_every_stage_has_its_file(zero, offload):
    """And DeepSpeed's own model of its configuration takes every key of it: a misspelt one would be ignored."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    recipe = distributed.shard(PATH, RECIPE | {"gradient_checkpointing": True}, zero, offload)
    assert distributed.stage(PATH, recipe) == zero
    assert distributed.weight_share(PATH, recipe, 4) == (1 if zero < 3 else 0 if offload else 0.25)
    assert recipe["gradient_checkpointing_kwargs"]["use_reentrant"] == (zero == 3)
    config = json.loads((ROOT / recipe["deepspeed"]).read_text(encoding="utf-8"))
    section = config["zero_optimization"]
    known = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    assert section.keys() <= known
    DeepSpeedZeroConfig(**section)
    assert ("offload_optimizer" in section) == offload and ("offload_param" in section) == (offload and zero == 3)
    assert config.get("zero_force_ds_cpu_optimizer", True) != offload  # else accelerate puts another Adam in its place


def test_torchrun_is_called_with_what_make_was_given():
    assert distributed.launcher(Launch(1, 1, 0, None)) == (["--launcher", "python"], [])
    assert distributed.launcher(Launch(4, 1, 0, None))[1] == ["--", "--standalone", "--nproc_per_node=4"]
    options = distributed.launcher(Launch(8, 2, 1, "node0:29400"))[1]
    assert {"--nnodes=2", "--node_rank=1", "--master_addr=node0", "--master_port=29400"} <= set(options)
    from torch.distributed.run import get_args_parser

    parsed = get_args_parser().parse_args([*options[1:], "script.py"])
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.rdzv_conf) == ("2", "8", "timeout=3600")


@pytest.mark.parametrize("master", [None, "", "node0:", "node0:0", "node0:70000", "a b", "node0;reboot", "$(id)"])
def test_a_master_that_is_none_is_refused(master):
    with refuses("NODES=2", "HOST:PORT", "node0:29500", file=f"MASTER={master or ''}"):
        distributed.launcher(Launch(1, 2, 0, master))


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_node_rank_that_is_none_is_refused(rank):
    with refuses("NODES=2", "0 to 1", "node", file=f"NODE_RANK={rank}"):
        distributed.launcher(Launch(1, 2, rank, "node0"))


@pytest.mark.skipif(bool(machine.gpus()), reason="this machine has a GPU")
@pytest.mark.parametrize("options", [("--gpus", "2"), ("--zero", "2"), ("--nodes", "2", "--master", "node0")])
def test_several_processes_need_a_gpu_each(command, options):
    done = command("finlora", "train", "sentiment_r8_dora", "--tiny", *options)
    failed(done, "processes", "GPU each", "0 ", file=f"GPUS={2 if '--gpus' in options else 1}")


@pytest.mark.slow  # tests/test_distributed.py has two processes of one node, and what each is asked is tested above
@pytest.mark.xdist_group("axolotl")
def test_two_nodes(house, tmp_path):
    """Two `make train` on two loopback addresses and one folder, through torchrun: one run, one adapter.

    Equal, bit for bit, to what one process makes of the same packs. Secrets in the environment are left nowhere.
    """
    recipe = RECIPE | {
        "plugins": [*RECIPE["plugins"], "bench.plugins.CpuProcesses"],
        "base_model": ".cache/tiny",
        "sequence_len": 128,
        "gradient_accumulation_steps": 2,
        "lora_dropout": 0.0,
        "max_steps": 2,
        "optimizer": "adamw_torch",
        "output_dir": "outputs/nodes",
        "dataset_prepared_path": "outputs/nodes/tokenised",
    }
    data = house / "train.jsonl"
    turns = [{"role": "user", "content": "Shares rose."}, {"role": "assistant", "content": "up"}]
    data.write_text((json.dumps({"messages": turns}) + "\n") * 40, encoding="utf-8")
    recipe["datasets"] = [RECIPE["datasets"][0] | {"path": str(data)}]
    for key in ("test_datasets", "evals_per_epoch"):
        del recipe[key]
    file = house / "recipes" / "nodes.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": f"{house}:{house / 'tests'}", "GLOO_SOCKET_IFNAME": "lo"} | PLANTED
    port = 20000 + os.getpid() % 20000
    nodes = [
        subprocess.Popen(
            [sys.executable, "tests/cpu_train.py", str(file), "--nodes", "2", "--node-rank", str(rank)]
            + ["--master", f"127.0.0.2:{port}"],
            cwd=house,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [node.communicate(timeout=400)[0] for node in nodes]
    except subprocess.TimeoutExpired:
        for node in nodes:
            node.terminate()
        raise
    assert [node.returncode for node in nodes] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
    assert re.search("node 1 of 2 .*first node", outputs[1]) and not re.search("node 1 of 2", outputs[0])
    out = house / "outputs" / "nodes"
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert record["processes"] == 2 and record["metrics"]["steps"] == 2
    adapter = (out / "adapter_model.safetensors").read_bytes()
    texts = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert {"run.json", "README.md", "metrics.json", "recipe.yaml", "debug.log"} <= {path.name for path in texts}
    for secret in PLANTED.values():
        assert not [path for path, content in texts.items() if secret.encode() in content]
        assert secret not in outputs[0] + outputs[1]

    one = tmp_path / "one.yaml"
    folders = {"output_dir": str(tmp_path / "one"), "dataset_prepared_path": str(tmp_path / "tokenised")}
    one.write_text(yaml.safe_dump(recipe | folders | {"base_model": str(house / ".cache/tiny")}))
    from forked import axolotl_command

    code, output = axolotl_command("train", str(one), "--launcher", "python")
    assert code == 0, output[-3000:]
    assert (tmp_path / "one" / "adapter_model.safetensors").read_bytes() == adapter


def stand_ins(folder: Path, **scripts: str) -> dict[str, str]:
    """An environment whose PATH begins with these programs, which stand for a cluster's."""
    folder.mkdir()
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


def test_the_slurm_file_runs_make_train_on_each_node(tmp_path):
    """With sbatch's variables set as Slurm sets them, and srun, scontrol and make stood in for."""
    env = stand_ins(
        tmp_path / "bin",
        srun='for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
        scontrol='[ "$*" = "show hostnames gpu[3-4]" ] && printf "gpu3\\ngpu4\\n"',
        make='printf "%s|" "$@"; echo',
    )
    env |= {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_JOB_NODELIST": "gpu[3-4]",
        "SLURM_JOB_ID": "41234",
    }
    file = ROOT / "cluster" / "slurm.sbatch"
    done = subprocess.run(
        ["bash", str(file), "RECIPE=sentiment_r8_dora", "ARGS=--learning-rate 0.0002"],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rest = "MASTER=gpu3:21234|RECIPE=sentiment_r8_dora|ARGS=--learning-rate 0.0002|"
    assert done.stdout.splitlines() == ["setup|"] + [f"train|GPUS=8|NODES=2|NODE_RANK={rank}|{rest}" for rank in (0, 1)]
    distributed.launcher(Launch(8, 2, 1, "gpu3:21234"))


def test_the_ray_file_starts_a_cluster_and_runs_make_train(tmp_path):
    message = 'printf "%s " "$(basename "$0")" "$RAY_USAGE_STATS_ENABLED" "${RAY_ADDRESS:-}" "$@"; echo'
    env = stand_ins(tmp_path / "bin", ray=message, make=message)
    file = ROOT / "cluster" / "ray.sh"
    first = subprocess.run(["bash", str(file), "RECIPE=a", "GPUS=8"], env=env, capture_output=True, text=True)
    assert [line.split() for line in first.stdout.splitlines()] == [
        ["ray", "0", "start", "--head", "--port=6379"],
        ["make", "0", "127.0.0.1:6379", "train", "RAY=1", "RECIPE=a", "GPUS=8"],
        ["ray", "0", "stop"],
    ]
    other = subprocess.run(["bash", str(file)], env=env | {"HEAD": "gpu0:6379"}, capture_output=True, text=True)
    assert other.stdout.split() == ["ray", "0", "start", "--address=gpu0:6379", "--block"]


def test_the_skypilot_file_runs_make_train_on_each_node(tmp_path):
    task = yaml.safe_load((ROOT / "cluster" / "skypilot.yaml").read_text(encoding="utf-8"))
    assert set(task) == {"name", "workdir", "num_nodes", "resources", "envs", "setup", "run"}
    assert task["envs"]["RECIPE"] in recipe_names.names() and not task["envs"]["HF_TOKEN"]
    env = stand_ins(tmp_path / "bin", make='printf "%s|" "$@"') | task["envs"]
    env |= {
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NODE_IPS": "10.0.0.3\n10.0.0.4",
    }
    done = subprocess.run(["bash", "-c", task["run"]], env=env, capture_output=True, text=True)
    expected = "train|RECIPE=sentiment_r8_dora|ZERO=|GPUS=8|NODES=2|NODE_RANK=1|MASTER=10.0.0.3:29500|"
    assert done.stdout == expected, done.stderr
