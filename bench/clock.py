"""Axolotl plugin that measures a run and changes nothing in it: `plugins: [bench.clock.Clock]`.

Writes one JSON row to the file that $CLOCK names when training ends: samples, useful (not padding) tokens and slots a
second from the end of step SKIP to the end of the last, and the peak of allocated memory. The GPU is waited for at
those two moments only. $CLOCK_PROFILE names a file for a profile of steps SKIP + 1 to SKIP + 3; the row's rates then
mean little.
"""

import json
import os
import time
from pathlib import Path

import torch
from axolotl.integrations.base import BasePlugin
from transformers import TrainerCallback

SKIP = 6  # steps in which kernels are compiled and memory is allocated


class Clock(BasePlugin):
    """See the module's docstring."""

    def add_callbacks_post_trainer(self, cfg, trainer):
        callback, step, pad = _Callback(), trainer.training_step, trainer.processing_class.pad_token_id

        def counted(model, inputs, *args, **kwargs):
            ids, positions = inputs["input_ids"], inputs.get("position_ids")
            real = ids != pad
            packed = cfg.sample_packing and positions is not None
            samples = ((positions == 0) & real).sum() if packed else real.new_full((), ids.shape[0], dtype=torch.long)
            callback.counts.append(torch.stack([samples, real.sum()]))
            callback.slots.append(ids.numel())
            return step(model, inputs, *args, **kwargs)

        trainer.training_step = counted
        return [callback]


class _Callback(TrainerCallback):
    def __init__(self):
        self.counts, self.slots = [], []
        self.peak, self.profiler, self.started = 0, None, None

    def on_step_end(self, args, state, control, **kwargs):
        self.peak = max(self.peak, peak_memory())
        if state.global_step == SKIP:
            synchronise()
            self.started, self.first = time.perf_counter(), len(self.counts)
            if os.environ.get("CLOCK_PROFILE"):
                kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
                self.profiler = torch.profiler.profile(activities=kinds)
                self.profiler.start()
        if state.global_step == SKIP + 3 and self.profiler:
            synchronise()
            self.profiler.stop()
            averages = self.profiler.key_averages()
            table = averages.table(sort_by="self_cuda_time_total", row_limit=45, max_name_column_width=70)
            host = averages.table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=70)
            Path(os.environ["CLOCK_PROFILE"]).write_text(table + host)

    def on_train_end(self, args, state, control, **kwargs):
        synchronise()
        seconds = time.perf_counter() - self.started
        samples, tokens = (torch.stack(self.counts[self.first :]).sum(0) / seconds).tolist()
        slots = sum(self.slots[self.first :]) / seconds
        row = {
            "steps": state.global_step - SKIP,
            "step_s": round(seconds / (state.global_step - SKIP), 4),
            "samples_s": round(samples, 2),
            "tokens_s": round(tokens, 1),
            "slots_s": round(slots, 1),
            "peak_gib": round(self.peak / 2**30, 2),
            "loss": next((entry["loss"] for entry in reversed(state.log_history) if "loss" in entry), None),
        }
        Path(os.environ["CLOCK"]).write_text(json.dumps(row))


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
