"""Where samples begin and where answers are: found on the CPU while a batch is collated, so that the GPU never waits.

The head and the loss are then applied where a label is, and only there: a label task answers with two tokens of a
hundred. The logits of other positions reach neither the loss nor a gradient, so leaving them out changes rounding at
most. It works for any causal model of transformers that takes `logits_to_keep` and `shift_labels`, with Liger's fused
loss or without.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.hooks import RemovableHandle

from fastdora import attention

IGNORED = -100
EDGES, LONGEST, ANSWERS = "fastdora_edges", "fastdora_longest", "fastdora_answers"


class Collator:
    """A collator, and what it makes with three entries more: EDGES, LONGEST (where packed) and ANSWERS."""

    def __init__(self, collator: Any, packed: bool, answers: bool):
        self.collator, self.packed, self.answers = collator, packed, answers

    def __getattr__(self, name: str) -> Any:
        if name == "collator":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.collator, name)

    def __call__(self, *args, **kwargs) -> dict[str, Any]:
        batch = self.collator(*args, **kwargs)
        if self.packed and batch.get("position_ids") is not None:
            batch[EDGES], batch[LONGEST] = attention.boundaries(batch["position_ids"])
        if self.answers and batch.get("labels") is not None:
            batch[ANSWERS] = answer_places(batch["labels"])
        return batch


def answer_places(labels: torch.Tensor) -> torch.Tensor:
    """Positions whose logits the loss reads in any row of `labels` (B, S): int64, at least one."""
    places = (_shifted(labels) != IGNORED).any(0).nonzero().squeeze(1)
    return places if len(places) else places.new_zeros(1)  # without any label the loss stays what it is


def install(trainer, *, packed: bool, answers: bool) -> None:
    """Make a transformers Trainer collate so, and its model read it."""
    for name in ("data_collator", "eval_data_collator"):
        if getattr(trainer, name, None) is not None:
            setattr(trainer, name, Collator(getattr(trainer, name), packed, answers))
    read_places(trainer.model)


def read_places(model: torch.nn.Module, answers: bool = False) -> RemovableHandle:
    """Make `model(**batch)` use the entries of `Collator`. answers: find answers itself in batches without them."""

    def read(module, args, kwargs):
        kwargs = dict(kwargs)
        edges, longest, kept = (kwargs.pop(name, None) for name in (EDGES, LONGEST, ANSWERS))
        labels = kwargs.get("labels")
        if edges is not None:
            attention.remember(kwargs["position_ids"], edges, longest)
        if kept is None and answers and labels is not None:
            kept = answer_places(labels)
        # Without labels somebody else takes the loss (label smoothing, say), and from the logits of all positions.
        if kept is not None and labels is not None and "logits_to_keep" not in kwargs and "shift_labels" not in kwargs:
            kwargs |= {"logits_to_keep": kept, "shift_labels": _shifted(labels)[:, kept].contiguous()}
        return args, kwargs

    return model.register_forward_pre_hook(read, with_kwargs=True)


def _shifted(labels: torch.Tensor) -> torch.Tensor:
    return F.pad(labels, (0, 1), value=IGNORED)[..., 1:]
