"""Sample boundaries and label positions, computed on the CPU while a batch is collated, so that the GPU never waits.

Head and loss are then applied only where a label is: in a classification task that is two tokens of a hundred. The
logits of other positions reach neither the loss nor a gradient, so leaving them out changes rounding at most. It
works with any causal model of transformers that takes `logits_to_keep` and `shift_labels`, with or without Liger.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.hooks import RemovableHandle

from fastdora import attention, prefixes

IGNORED = -100
ANSWERS, COUNTS = "fastdora_answers", "fastdora_counts"
SEGMENTS = {field: f"fastdora_{field}" for field in attention.Segments._fields}
GROUP, PREFIX = "fastdora_group", "fastdora_prefix"  # columns of rows that share prefixes (prefixes.Shared)


class Collator:
    """Wraps a collator; adds SEGMENTS (where packed) and ANSWERS, and where prefixes are shared COUNTS, to its batches.

    SEGMENTS: an entry for each field of attention.Segments, since transformers 5.16.1 moves tensors within a tuple to
    the GPU one at a time, and waits for it. ANSWERS: `label_positions`. COUNTS: int64 (2,), the rows of a pack and
    their tokens, each row with its whole prefix. Rows with the columns GROUP and PREFIX become one pack in which each
    prefix is once; copy: each then has a copy of its prefix's keys and values (attention.py).
    """

    def __init__(self, collator: Any, packed: bool, answers: bool, copy: bool = False):
        self.collator, self.packed, self.answers, self.copy = collator, packed, answers, copy

    def __getattr__(self, name: str) -> Any:
        if name == "collator":  # unpickling asks before __init__ has run: do not recurse
            raise AttributeError(name)
        return getattr(self.collator, name)

    def __call__(self, features: Any, *args, **kwargs) -> dict[str, Any]:
        rows = features[0] if isinstance(features, list) and features and isinstance(features[0], list) else None
        if rows and GROUP in rows[0]:
            batch = self._shared([row for pack in features for row in pack], *args, **kwargs)
        else:
            batch = self.collator(features, *args, **kwargs)
            if self.packed and batch.get("position_ids") is not None:
                batch.update(entries(attention.Segments(*attention.boundaries(batch["position_ids"]))))
        if self.answers and batch.get("labels") is not None:
            batch[ANSWERS] = label_positions(batch["labels"])
        return batch

    def _shared(self, rows: list[dict[str, Any]], *args, **kwargs) -> dict[str, Any]:
        groups, lengths = ([int(row[name]) for row in rows] for name in (GROUP, PREFIX))
        own = [{name: row[name] for name in row if name not in (GROUP, PREFIX, "length")} for row in rows]
        layout = prefixes.lay_out(own, groups, lengths)
        batch = self.collator([[layout.columns]], *args, **kwargs)
        batch.update(entries(attention.Segments(**prefixes.tensors(layout, batch["input_ids"].shape[1], self.copy))))
        batch[COUNTS] = torch.tensor([layout.rows, layout.tokens])
        return batch


def entries(segments: attention.Segments) -> dict[str, torch.Tensor | int]:
    """A batch's entries for its segments."""
    return {SEGMENTS[field]: value for field, value in segments._asdict().items() if value is not None}


def label_positions(labels: torch.Tensor) -> torch.Tensor:
    """Positions whose logits the loss reads in any row of `labels` (B, S): int64, at least one."""
    positions = (_shifted(labels) != IGNORED).any(0).nonzero().squeeze(1)
    return positions if len(positions) else positions.new_zeros(1)  # no label at all: the same loss, from one position


def install(trainer, *, packed: bool, answers: bool, copy: bool = False) -> None:
    """Wrap a transformers Trainer's collators in `Collator` and let its model read the entries."""
    for name in ("data_collator", "eval_data_collator"):
        if getattr(trainer, name, None) is not None:
            setattr(trainer, name, Collator(getattr(trainer, name), packed, answers, copy))
    read_label_positions(trainer.model)


def read_label_positions(model: torch.nn.Module, answers: bool = False) -> RemovableHandle:
    """Let `model(**batch)` use the entries of `Collator`; returns the hook's handle.

    answers: compute label positions in the forward pass for batches without ANSWERS (a GPU waits for it).
    """

    def read(module, args, kwargs):
        kwargs = dict(kwargs)
        positions, _ = (kwargs.pop(name, None) for name in (ANSWERS, COUNTS))
        segments = {field: kwargs.pop(entry) for field, entry in SEGMENTS.items() if entry in kwargs}
        labels = kwargs.get("labels")
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
            if segments and not kwargs.get("output_hidden_states"):
                segments["kept"] = F.pad(positions, (0, 1), value=labels.shape[1] - 1)
        if segments:  # here, since the decoder's layers see the positions alone
            attention.cache_segments(kwargs["position_ids"], attention.Segments(**segments))
        return args, kwargs

    return model.register_forward_pre_hook(read, with_kwargs=True)


def _shifted(labels: torch.Tensor) -> torch.Tensor:
    return F.pad(labels, (0, 1), value=IGNORED)[..., 1:]
