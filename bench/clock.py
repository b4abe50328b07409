"""Measures a run of a transformers Trainer, for axolotl's plugin Clock (bench/plugins.py) and for bench/sft.py."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from bench.train_throughput import SKIP


def clock(trainer, count: Callable[[dict[str, Any]], torch.Tensor]) -> TrainerCallback:
    """Count every batch that `trainer` takes; returns the callback that measures, for trainer.add_callback.

    count: the samples and the useful (not padding) tokens of a batch, int64 (2,), without waiting for the GPU.

    The callback writes one JSON row to the file that $CLOCK names when training ends: samples, useful tokens and slots
    a second from the end of step SKIP to the end of the last, and the peak of allocated memory. The GPU is waited for
    at those two moments only. $CLOCK_PROFILE names a file for a profile of steps SKIP + 1 to SKIP + 3; the row's
    throughput then means little.
    """
    callback, step = _Callback(), trainer.training_step

    def counted(model, inputs, *args, **kwargs):
        callback.counts.append(count(inputs))  # on the GPU: .item() would wait for it
        callback.slots.append(inputs["input_ids"].numel())
        return step(model, inputs, *args, **kwargs)

    trainer.training_step = counted
    return callback


class _Callback(TrainerCallback):
    def __init__(self):
        self.counts, self.slots = [], []
        self.peak, self.profiler, self.started = 0, None, None

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            self.peak = max(self.peak, torch.cuda.max_memory_allocated())
        if state.global_step == SKIP:
            _synchronize()
            self.started, self.first = time.perf_counter(), len(self.counts)
            if os.environ.get("CLOCK_PROFILE"):
                kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
                self.profiler = torch.profiler.profile(activities=kinds)
                self.profiler.start()
        if state.global_step == SKIP + 3 and self.profiler:
            _synchronize()
            self.profiler.stop()
            averages = self.profiler.key_averages()
            table = averages.table(sort_by="self_cuda_time_total", row_limit=45, max_name_column_width=70)
            host = averages.table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=70)
            Path(os.environ["CLOCK_PROFILE"]).write_text(table + host)

    def on_train_end(self, args, state, control, **kwargs):
        _synchronize()
        seconds = time.perf_counter() - self.started
        samples, tokens = (torch.stack(self.counts[self.first :]).sum(0) / seconds).tolist()
        row = {
            "steps": state.global_step - SKIP,
            "step_s": round(seconds / (state.global_step - SKIP), 4),
            "samples_s": round(samples, 2),
            "tokens_s": round(tokens, 1),
            "slots_s": round(sum(self.slots[self.first :]) / seconds, 1),
            "peak_gib": round(self.peak / 2**30, 2),
            "loss": next((entry["loss"] for entry in reversed(state.log_history) if "loss" in entry), None),
        }
        Path(os.environ["CLOCK"]).write_text(json.dumps(row))


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
