"""Sample boundaries and label positions, computed on the CPU while a batch is collated, so that the GPU never waits.

Head and loss are then applied only where a label is: in a classification task that is two tokens of a hundred. The
logits of other positions reach neither the loss nor a gradient, so leaving them out changes rounding at most. It
works with any causal model of transformers that takes `logits_to_keep` and `shift_labels`, with or without Liger.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.hooks import RemovableHandle

from fastdora import attention

IGNORED = -100
EDGES, LONGEST, ANSWERS = "fastdora_edges", "fastdora_longest", "fastdora_answers"


class Collator:
    """Wraps a collator; adds three entries to its batches: EDGES and LONGEST (where packed), and ANSWERS."""

    def __init__(self, collator: Any, packed: bool, answers: bool):
        self.collator, self.packed, self.answers = collator, packed, answers

    def __getattr__(self, name: str) -> Any:
        if name == "collator":  # unpickling asks before __init__ has run: do not recurse
            raise AttributeError(name)
        return getattr(self.collator, name)

    def __call__(self, *args, **kwargs) -> dict[str, Any]:
        batch = self.collator(*args, **kwargs)
        if self.packed and batch.get("position_ids") is not None:
            batch[EDGES], batch[LONGEST] = attention.boundaries(batch["position_ids"])
        if self.answers and batch.get("labels") is not None:
            batch[ANSWERS] = label_positions(batch["labels"])
        return batch


def label_positions(labels: torch.Tensor) -> torch.Tensor:
    """Positions whose logits the loss reads in any row of `labels` (B, S): int64, at least one."""
    positions = (_shifted(labels) != IGNORED).any(0).nonzero().squeeze(1)
    return positions if len(positions) else positions.new_zeros(1)  # no label at all: the same loss, from one position


def install(trainer, *, packed: bool, answers: bool) -> None:
    """Wrap a transformers Trainer's collators in `Collator` and let its model read the entries."""
    for name in ("data_collator", "eval_data_collator"):
        if getattr(trainer, name, None) is not None:
            setattr(trainer, name, Collator(getattr(trainer, name), packed, answers))
    read_label_positions(trainer.model)


def read_label_positions(model: torch.nn.Module, answers: bool = False) -> RemovableHandle:
    """Let `model(**batch)` use the entries of `Collator`; returns the hook's handle.

    answers: compute label positions in the forward pass for batches without ANSWERS (a GPU waits for it).
    """

    def read(module, args, kwargs):
        kwargs = dict(kwargs)
        edges, longest, positions = (kwargs.pop(name, None) for name in (EDGES, LONGEST, ANSWERS))
        labels = kwargs.get("labels")
        if edges is not None:  # here, since the decoder's layers see the positions alone
            attention.cache_boundaries(kwargs["position_ids"], edges, longest)
        if positions is None and answers and labels is not None:
            positions = label_positions(labels)
        # Without labels the loss is computed elsewhere (label smoothing, say), from the logits of all positions.
        if (
            positions is not None
            and labels is not None
            and "logits_to_keep" not in kwargs
            and "shift_labels" not in kwargs
        ):
            # shift_labels: transformers' loss would otherwise shift the labels that are kept by one position.
            kwargs |= {"logits_to_keep": positions, "shift_labels": _shifted(labels)[:, positions].contiguous()}
        return args, kwargs

    return model.register_forward_pre_hook(read, with_kwargs=True)


def _shifted(labels: torch.Tensor) -> torch.Tensor:
    return F.pad(labels, (0, 1), value=IGNORED)[..., 1:]
