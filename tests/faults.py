"""Axolotl plugins for tests: what can go wrong in a step."""

from types import SimpleNamespace

import torch
from axolotl.integrations.base import BasePlugin


def in_step(trainer, fault) -> None:
    """Call fault(step, loss) after each training step's backward pass; what it returns is the loss."""
    original = trainer.training_step
    trainer.training_step = lambda *args, **kwargs: fault(trainer.state.global_step + 1, original(*args, **kwargs))


class NotFinite(BasePlugin):
    def trainer_created(self, trainer):
        in_step(trainer, lambda step, loss: loss * float("nan") if step >= 5 else loss)

    def post_trainer_create(self, cfg, trainer):
        self.trainer_created(trainer)


class NotFiniteUpdate(NotFinite):
    def trainer_created(self, trainer):
        def fault(step, loss):
            if step == 4:
                next(p for p in trainer.model.parameters() if p.requires_grad).data.fill_(float("inf"))
            return loss

        in_step(trainer, fault)


class Explosion(NotFinite):
    def trainer_created(self, trainer):
        in_step(trainer, lambda step, loss: loss * 10 if step >= 5 else loss)


class TorchWithCard:
    """torch as the watchdog sees it: with an A100. Torch's own code must not, or it looks for the card itself."""

    cuda = SimpleNamespace(
        is_available=lambda: True,
        current_device=lambda: 0,
        get_device_name=lambda *args: "NVIDIA A100",
        get_device_properties=lambda *args: SimpleNamespace(total_memory=40 * 2**30),
        max_memory_allocated=lambda *args: 39 * 2**30,
        memory_allocated=lambda *args: 10 * 2**30,
    )

    def __getattr__(self, name):
        return getattr(torch, name)


class OutOfMemory(NotFinite):
    def trainer_created(self, trainer):
        from fastdora.plugin import watchdog

        watchdog.torch = TorchWithCard()
        raise_at = {2: "CUDA out of memory. Tried to allocate 5.00 GiB. GPU 0 has a total capacity of 39.50 GiB"}

        def fault(step, loss):
            if step in raise_at:
                raise torch.OutOfMemoryError(raise_at[step])
            return loss

        in_step(trainer, fault)


class OutOfMemoryFromRank8(OutOfMemory):
    def post_trainer_create(self, cfg, trainer):
        if cfg.lora_r >= 8:
            super().post_trainer_create(cfg, trainer)
