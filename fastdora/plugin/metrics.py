"""Metrics of a run in one small file beside the adapter: rows, tokens, seconds and the loss at every logged step."""

import contextlib
import json
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from transformers import TrainerCallback

from fastdora import packing
from fastdora.plugin.resume import is_distributed

SECONDS_BETWEEN_WRITES = 0.5


def record(cfg, trainer) -> None:
    """Count the samples and tokens of each training batch; write `metrics.json` when training ends.

    Fields: samples, tokens (of each row with its whole prefix; no padding), steps, seconds, samples_per_second,
    tokens_per_second, adapter_step (whose weights the adapter has: with early stopping those of the best validation),
    final_loss and final_eval_loss (the last ones up to that step), peak_memory_gib (null on a CPU), interrupted,
    stopped_early, base_layers (class -> adapted layers), dtype (of the computation), log (step, loss, eval_loss,
    learning_rate). Counting adds no
    synchronisation with the GPU. Ctrl-C ends the run after the current step, with a checkpoint from which the same
    command resumes; axolotl alone would save a half-trained adapter and report success. Distributed processes all end
    after the same step.
    """
    counts = torch.zeros(2, dtype=torch.long, device=trainer.args.device)
    pad = trainer.processing_class.pad_token_id
    step = trainer.training_step

    def counted(model, inputs, *args, **kwargs):
        if packing.COUNTS in inputs:
            counts.add_(inputs[packing.COUNTS].to(counts.device))
            return step(model, inputs, *args, **kwargs)
        ids, positions = inputs["input_ids"], inputs.get("position_ids")
        real = ids != pad
        if cfg.sample_packing and positions is not None:
            samples = ((positions == 0) & real).sum()
        else:
            samples = torch.tensor(ids.shape[0], device=ids.device)
        counts.add_(torch.stack([samples, real.sum()]).to(counts.device))
        return step(model, inputs, *args, **kwargs)

    trainer.training_step = counted
    base_layers = Counter(type(m.base_layer).__name__ for m in trainer.model.modules() if isinstance(m, LoraLayer))
    trainer.add_callback(_Writer(Path(cfg.output_dir) / "metrics.json", counts, dict(base_layers), trainer.model.dtype))


class _Writer(TrainerCallback):
    def __init__(self, path: Path, counts: torch.Tensor, base_layers: dict[str, int], dtype: torch.dtype):
        self.path, self.counts, self.base_layers, self.interrupted = path, counts, base_layers, False
        self.dtype = str(dtype).removeprefix("torch.")
        self.peak = 0
        # Exists while an interrupt would still write a checkpoint; what is in it is shown as progress.
        self.stepping, self.logged, self.written = path.with_name("stepping"), {}, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.started, self.first_step = time.perf_counter(), state.global_step
        if is_distributed():
            self.group = torch.distributed.new_group(backend="gloo")  # on the CPU: no wait for the GPU
        if threading.current_thread() is threading.main_thread():  # Ray trains in another, where no handler can be set
            signal.signal(signal.SIGINT, self.interrupt)
        if state.is_world_process_zero:
            with contextlib.suppress(OSError):  # a full disk costs the progress, not the run
                self.stepping.touch()

    def interrupt(self, *_):
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends the run at once

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():  # axolotl resets the peak at each log line
            self.peak = max(self.peak, torch.cuda.max_memory_allocated())
        if is_distributed():
            flag = torch.tensor(self.interrupted, dtype=torch.uint8)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, self.group)
            self.interrupted = bool(flag)
        if self.interrupted:
            control.should_save = control.should_training_stop = True
        if state.is_world_process_zero and time.perf_counter() - self.written > SECONDS_BETWEEN_WRITES:
            self.written = time.perf_counter()
            steps = {"step": state.global_step, "max_steps": state.max_steps}
            with contextlib.suppress(OSError):
                self.stepping.write_text(json.dumps(steps | self.logged), encoding="utf-8")

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Logging waits for the GPU anyway; counts are this process's share."""
        if "loss" in (logs or {}):
            seconds = time.perf_counter() - self.started
            samples = self.counts[0].item() * args.world_size
            self.logged = {"loss": logs["loss"], "samples_per_second": round(samples / seconds, 3)}

    def on_train_end(self, args, state, control, **kwargs):
        seconds = time.perf_counter() - self.started
        if is_distributed():
            torch.distributed.all_reduce(self.counts)
        if not state.is_world_process_zero:
            return
        self.stepping.unlink(missing_ok=True)
        samples, tokens = self.counts.tolist()
        keys = ("step", "epoch", "loss", "eval_loss", "learning_rate")
        logged = [entry for entry in state.log_history if "loss" in entry or "eval_loss" in entry]
        log = [{key: entry[key] for key in keys if key in entry} for entry in logged]
        # transformers has loaded the best checkpoint by now; state.global_step is still the last step.
        best = state.best_global_step if args.load_best_model_at_end and state.best_model_checkpoint else None
        step = best or state.global_step
        # A run shorter than logging_steps has logged only the mean loss over all its steps.
        mean_loss = next((entry["train_loss"] for entry in reversed(state.log_history) if "train_loss" in entry), None)
        row = {
            "samples": samples,
            "tokens": tokens,
            "steps": state.global_step,
            "steps_this_run": state.global_step - self.first_step,
            "seconds": round(seconds, 3),
            "samples_per_second": round(samples / seconds, 3),
            "tokens_per_second": round(tokens / seconds, 1),
            "adapter_step": step,
            "final_loss": _last(log, "loss", step, mean_loss),
            "final_eval_loss": _last(log, "eval_loss", step),
            "peak_memory_gib": round(self.peak / 2**30, 2) if self.peak else None,
            "interrupted": self.interrupted,
            "stopped_early": not self.interrupted and state.global_step < state.max_steps,
            "base_layers": self.base_layers,
            "dtype": self.dtype,
            "log": log,
        }
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        beside.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, self.path)


def _last(log: list[dict[str, float]], key: str, step: int, without: float | None = None) -> float | None:
    """The key's last value up to that step; `without` where there is none."""
    return next((entry[key] for entry in reversed(log) if key in entry and entry["step"] <= step), without)
