"""Runs that go wrong end in one line: a loss that is not finite, one that explodes, a card that is too small."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from kills import recipe

from fastdora.plugin import checkpoints

pytestmark = pytest.mark.xdist_group("axolotl")


@pytest.fixture
def train(tmp_path, tiny_base):
    """A function that trains with one of tests/faults.py's plugins: exit code, error line and output folder."""
    from forked import axolotl_command

    def run(plugin: str | None, **changes) -> tuple[int, str, Path]:
        path = recipe(tmp_path, "run", tiny_base, **changes)
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        config["plugins"] = ([f"faults.{plugin}"] if plugin else []) + config["plugins"]
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        code, output = axolotl_command("train", str(path), "--launcher", "python")
        lines = [line for line in output.splitlines() if line.startswith("error: ")]
        assert code == 0 or (len(lines) == 1 and "Traceback" not in output), output[-3000:]
        return code, "".join(lines), tmp_path / "run"

    return run


def test_a_loss_that_is_not_finite_stops_the_run(train):
    """From step 5 on; transformers would log a finite mean, save checkpoint-6 and end with exit code 0."""
    code, line, out = train("NotFinite", logging_steps=3)
    assert code == 1
    assert re.search(rf"run.yaml: .*not finite.* step 6\b.* {out}/checkpoint-4\b", line), line
    assert "learning_rate (0.003" in line
    assert checkpoints.last_whole(out)[0] == out / "checkpoint-4"
    assert not (out / "adapter_model.safetensors").exists()


def test_weights_that_are_not_finite_are_never_a_checkpoint(train):
    """An update that ruins the adapter shows in the loss one step later; the checkpoint between them is not written."""
    code, line, out = train("NotFiniteUpdate")
    assert code == 1 and re.search(rf"not finite.* step 5\b.* {out}/checkpoint-2\b", line), line
    assert not (out / "checkpoint-4").exists()


def test_a_loss_that_explodes_stops_the_run(train):
    code, line, out = train("Explosion")
    assert code == 1 and re.search(r"run.yaml: .*loss.* \d+\.\d\d at step 5\b.* 1\d\.\d\d at first", line), line
    assert not (out / "adapter_model.safetensors").exists()


def test_out_of_memory_names_the_two_keys(train):
    """torch's own error in the step; the card around it is made up, for none is here."""
    code, line, out = train("OutOfMemory", sequence_len=256, gradient_accumulation_steps=3)
    assert code == 1
    assert re.search(r"run.yaml: out of memory.* NVIDIA A100: .*44.0 of 40.0 GiB.* 10.0 ", line), line
    assert "sequence_len: 128" in line and "gradient_accumulation_steps: 6" in line


@given(
    fixed=st.integers(0, 60 * 2**30),
    needed=st.integers(1, 400 * 2**30),
    micro=st.integers(1, 64),
    accumulation=st.integers(1, 64),
    length=st.integers(128, 32768),
    packing=st.booleans(),
)
def test_what_out_of_memory_advises(fixed, needed, micro, accumulation, length, packing):
    from fastdora.plugin import watchdog

    total = 80 * 2**30
    times = watchdog.halvings(total, fixed, needed)
    assert times >= 1
    if fixed < needed:
        assert fixed + (needed - fixed) / 2**times <= 0.95 * total or 0.95 * total <= fixed
        assert times == 1 or fixed + (needed - fixed) / 2 ** (times - 1) > 0.95 * total
    keys = watchdog.smaller(micro, length, packing, times)
    assert len(keys) <= 1
    for key, value in keys.items():
        before = {"micro_batch_size": micro, "sequence_len": length}[key]
        assert 1 <= value < before and before // value <= 2**times
        assert (key == "micro_batch_size") == (micro > 1)
    assert keys or (micro > 1 and micro % 2) or not packing or length < 256
    assert watchdog.requested("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has") == 2**31
    assert watchdog.requested("something else") == 0


@given(loss=st.floats(allow_nan=True), first=st.floats(0, 20))
def test_what_counts_as_an_explosion(loss, first):
    from fastdora.plugin import watchdog

    exploded = watchdog.exploded(loss, first, 128256)
    assert exploded or loss <= 2 * first or loss <= math.log(128256)
    assert not exploded or not math.isfinite(loss) or (loss > 2 * first and loss > math.log(128256))


def test_early_stopping_is_an_option_of_the_recipe(train, tmp_path):
    """Validation does not get better at a learning rate of 0: the second look without progress ends the run."""
    rows = tmp_path / "validation.jsonl"
    turns = [{"role": "user", "content": "Shares rose."}, {"role": "assistant", "content": "up"}]
    rows.write_text((json.dumps({"messages": turns}) + "\n") * 4, encoding="utf-8")
    data = {"ds_type": "json", "split": "train", "type": "chat_template", "field_messages": "messages"}
    code, line, out = train(
        None,
        test_datasets=[{"path": str(rows), **data}],
        eval_sample_packing=False,
        eval_steps=2,
        save_steps=2,
        early_stopping_patience=2,
        learning_rate=1e-30,
    )
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert code == 0 and metrics["steps"] == 6 and metrics["stopped_early"] and not metrics["interrupted"]
    assert metrics["adapter_step"] == 2
    kept = (out / "checkpoint-2" / "adapter_model.safetensors").read_bytes()
    assert (out / "adapter_model.safetensors").read_bytes() == kept


@pytest.mark.parametrize("load_best, step, losses", [(True, 4, (2.0, 1.5)), (False, 6, (1.0, 1.8))])
def test_the_losses_of_a_run_are_those_of_the_adapter_it_keeps(load_best, step, losses, tmp_path):
    from transformers import TrainerState

    from fastdora.plugin.metrics import _Writer

    log = [(2, 3.0, None), (2, None, 1.9), (4, 2.0, None), (4, None, 1.5), (6, 1.0, None), (6, None, 1.8)]
    state = TrainerState(global_step=6, max_steps=12, best_global_step=4, best_model_checkpoint="checkpoint-4")
    state.log_history = [
        {"step": step} | ({"loss": loss} if loss else {"eval_loss": validation}) for step, loss, validation in log
    ]
    writer = _Writer(tmp_path / "metrics.json", torch.tensor([6, 60]), {}, torch.float32)
    writer.started, writer.first_step = 0.0, 0
    writer.on_train_end(SimpleNamespace(load_best_model_at_end=load_best), state, None)
    metrics = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert (metrics["adapter_step"], metrics["steps"]) == (step, 6)
    assert (metrics["final_loss"], metrics["final_eval_loss"]) == losses
