"""Axolotl plugins for tests: what can go wrong in a step."""

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


class OutOfMemory(NotFinite):
    def trainer_created(self, trainer):
        class Card:
            total_memory = 40 * 2**30

        torch.cuda.current_device = lambda: 0
        torch.cuda.get_device_name = lambda *args: "NVIDIA A100"
        torch.cuda.get_device_properties = lambda *args: Card
        torch.cuda.max_memory_allocated = lambda *args: 39 * 2**30
        torch.cuda.memory_allocated = lambda *args: 10 * 2**30
        torch.cuda.is_available = lambda: True  # for watchdog's look at the memory before the first step
        # Where CUDA is built into torch its DataLoader asks as well, and would pin memory on the card.
        torch.accelerator.current_device_index = lambda: 0
        trainer.args.dataloader_pin_memory = False
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
