"""Stops a run with a one-line error: rows too few for a batch, a loss that explodes, a GPU that is too small."""

import math
import re
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from fastdora.plugin import checkpoints
from fastdora.plugin.resume import is_distributed


def guard(cfg, trainer) -> None:
    """Watch each training batch; end the run with exit code 1 and one line that names the last good checkpoint.

    The loss stays on the GPU until the trainer logs or saves: no step waits for it. transformers leaves losses that
    are not finite out of the mean it logs, and axolotl's `loss_watchdog_threshold` stops with exit code 0.
    """
    bad = torch.zeros((), dtype=torch.uint8, device=trainer.args.device)
    step = trainer.training_step

    def watched(model, inputs, *args, **kwargs):
        try:
            loss = step(model, inputs, *args, **kwargs)
        except torch.OutOfMemoryError as error:
            end(out_of_memory(cfg, error, watch.fixed))
        bad.logical_or_(~torch.isfinite(loss.detach()))
        return loss

    trainer.training_step = watched
    watch = _Watch(cfg, trainer, bad)
    trainer.add_callback(watch)


class _Watch(TrainerCallback):
    def __init__(self, cfg, trainer, bad: torch.Tensor):
        self.cfg, self.trainer, self.bad, self.first, self.fixed = cfg, trainer, bad, None, 0

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        # transformers (5.16.1) drops a batch that is not full, warns where none is left, and ends as if all went well.
        if train_dataloader is not None and len(train_dataloader) == 0:
            packs = " packs" if self.cfg.sample_packing else ""
            end(
                f"{self.cfg.axolotl_config_path}: key 'micro_batch_size': the rows fill no batch of "
                f"{self.cfg.micro_batch_size}{packs}, so nothing would train; lower it, or add rows"
            )
        self.fixed = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0

    def on_step_end(self, args, state, control, **kwargs):
        if not (control.should_log or control.should_save or control.should_training_stop):
            return
        if is_distributed():
            torch.distributed.all_reduce(self.bad, torch.distributed.ReduceOp.MAX)
        if self.bad.item():
            self.stop(f"the loss is not finite at step {state.global_step}")

    def on_log(self, args, state, control, logs=None, **kwargs):
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if self.first is None:
            self.first = loss
        if exploded(loss, self.first, self.trainer.model.config.vocab_size):
            self.stop(f"the loss is {loss:.2f} at step {state.global_step}, after {self.first:.2f} at first")

    def stop(self, what: str) -> None:
        logged = self.trainer.state.log_history
        rate = logged[-1].get("learning_rate") if logged else None
        last = checkpoints.last_whole(Path(self.cfg.output_dir))[0]
        where = f"the last good checkpoint is {last}" if last else "no checkpoint was written before"
        if self.trainer.args.process_index:
            sys.exit(1)  # the first process reports it
        end(
            f"{self.cfg.axolotl_config_path}: {what}; {where}. Lower learning_rate ({self.cfg.learning_rate}"
            f"{f', {rate:.2g} at this step' if rate else ''}) or check the latest rows"
        )


def exploded(loss: float, first: float, vocabulary: int) -> bool:
    """Whether a mean loss is worse than guessing every token alike (ln of the vocabulary) and twice the first one."""
    return not math.isfinite(loss) or loss > max(math.log(vocabulary), 2 * first)


def out_of_memory(cfg, error: Exception, fixed: int) -> str:
    """One line: the GPU, the memory that a step needs, and the two keys to change, with the global batch kept.

    fixed: bytes allocated before the first step, which a smaller step does not lower.
    """
    device = torch.cuda.current_device()
    total = torch.cuda.get_device_properties(device).total_memory
    needed = torch.cuda.max_memory_allocated(device) + requested(str(error))
    keys = smaller(cfg.micro_batch_size, cfg.sequence_len, cfg.sample_packing, halvings(total, fixed, needed))
    if keys:
        key, value = keys.popitem()
        accumulation = cfg.gradient_accumulation_steps * (cfg[key] // value)
        advice = f"set {key}: {value} and gradient_accumulation_steps: {accumulation}"
    else:
        advice = "the step cannot be made smaller; load the base model in fewer bits or use a larger card"
    return (
        f"{cfg.axolotl_config_path}: out of memory on {torch.cuda.get_device_name(device)}: a step needs more than "
        f"{needed / 2**30:.1f} of {total / 2**30:.1f} GiB, {fixed / 2**30:.1f} of them for the model; {advice}"
    )


def requested(message: str) -> int:
    """Bytes that the allocation asked for, as torch's message says ("Tried to allocate 2.00 GiB"); 0 without one."""
    match = re.search(r"Tried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)", message)
    return int(float(match[1]) * {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[match[2]]) if match else 0


def halvings(total: int, fixed: int, needed: int) -> int:
    """How often a step's own memory must be halved, at least once, to leave 5% of the GPU free for fragmentation."""
    room = 0.95 * total - fixed
    return max(1, math.ceil(math.log2((needed - fixed) / room))) if 0 < room and fixed < needed else 1


def smaller(micro: int, length: int, packing: bool, times: int) -> dict[str, int]:
    """The one key that makes a step 2^times smaller (or as near as it goes), and its value; empty where none can."""
    for factor in (2**power for power in range(times, 0, -1)):
        if micro % factor == 0:
            return {"micro_batch_size": micro // factor}
        if micro == 1 and packing and length // factor >= 128:
            return {"sequence_len": length // factor}
    return {}


def end(line: str) -> None:
    sys.exit(f"\nerror: {line}")
