"""Prefixes that rows share: found in tokenized rows, packed so that they meet, and laid out so that each is there once.

Causal attention makes the hidden states of a prefix equal in all rows that begin with it. A pack therefore needs it
once, if the rows' other tokens (their suffixes) attend to it: forward and backward pass are the same functions of the
weights, and the prefix's gradient is the sum over its rows. Dropout alone differs: its mask is drawn once for a prefix.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

OPEN_PACKS = 64  # packs that a row may still join: more fill them no better, at a longer search


class Shared(NamedTuple):
    """For each row the group that it shares a prefix with (-1: none) and that prefix's length in tokens."""

    groups: np.ndarray  # int64 (rows,)
    lengths: np.ndarray  # int64 (rows,), equal within a group; 0 without one


def find(rows: Sequence[np.ndarray], limits: Iterable[int], capacity: int, together: int | None) -> Shared:
    """Put rows into groups of one shared prefix each, so that packs have the fewest tokens.

    rows: token ids, an array each. limits: the longest prefix that each may share; it must end before the token that
    predicts the first label. capacity: tokens of a pack. together: as in `pack`. The prefixes of sorted rows form a
    tree. A row joins one of its ancestors, where tokens that packs leave out by it are the most (one level: rows do not
    share a part of their prefix with a second group).
    """
    # Big-endian bytes sort as the numbers do, and are there once: the sort and the comparisons read these.
    keys = [np.asarray(row[: max(limit, 0)], dtype=">u4").tobytes() for row, limit in zip(rows, limits, strict=True)]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    lengths = [len(row) for row in rows]
    packs = max(1.0, sum(lengths) / capacity)
    mean = sum(lengths) / max(1, len(lengths))

    def saved(depth: int, count: int) -> float:
        """Tokens left out by `count` rows that share `depth`, in packs that bundles of them join at random."""
        bundles = max(1.0, count / (together or 1), count * mean / capacity)
        copies = packs * (1 - (1 - 1 / packs) ** bundles) if packs > 1 else 1.0
        return depth * (count - max(1.0, copies))

    groups, depths = np.full(len(rows), -1), np.zeros(len(rows), dtype=np.int64)
    # Each open node of the tree: its depth, the rows in it that no deeper group takes, and what deeper groups save.
    stack: list[tuple[int, list[int], float]] = [(0, [], 0.0)]

    def close(depth: int, inside: list[int], deeper: float, parent: int) -> tuple[list[int], float]:
        """Make a group of a node's rows if that saves more than leaving them to its parent."""
        own = saved(depth, len(inside))
        if len(inside) > 1 and own > parent * len(inside):
            groups[inside], depths[inside] = inside[0], depth
            return [], deeper + own
        return inside, deeper

    for position, row in enumerate(order):
        after = keys[order[position + 1]] if position + 1 < len(order) else b""
        common = _common(keys[row], after)
        if common > stack[-1][0]:
            stack.append((common, [row], 0.0))
            continue
        stack[-1][1].append(row)
        while common < stack[-1][0]:
            depth, inside, deeper = stack.pop()
            parent = max(common, stack[-1][0])
            inside, deeper = close(depth, inside, deeper, parent)
            if stack[-1][0] < common:
                stack.append((common, [], 0.0))
            above = stack[-1]
            stack[-1] = (above[0], above[1] + inside, above[2] + deeper)
    return Shared(groups, depths)


def _common(first: bytes, second: bytes) -> int:
    """How many tokens two rows begin with in common."""
    size = min(len(first), len(second)) // 4
    if not size:
        return 0
    differs = np.frombuffer(first, np.uint32, size) != np.frombuffer(second, np.uint32, size)
    return int(differs.argmax()) if differs.any() else size


def pack(
    lengths: np.ndarray,
    shared: Shared,
    capacity: int,
    together: int | None,
    most_rows: int | None = None,
    generator: np.random.Generator | None = None,
) -> list[list[int]]:
    """Packs of at most `capacity` tokens and `most_rows` rows, in which every row is once.

    lengths (rows,): tokens of each row. together: rows of one prefix that are put into a pack together, and the most
    that it takes. None: rows are drawn as if they shared nothing, and those that happen to meet share. generator: draws
    the order; None keeps the rows' own.
    """
    size = lengths - shared.lengths
    order = np.arange(len(lengths)) if generator is None else generator.permutation(len(lengths))
    bundles = _bundles(order, size, shared, capacity, min(together or 1, most_rows or len(order)))
    if generator is not None:
        bundles = [bundles[number] for number in generator.permutation(len(bundles))]
    packs: list[list[int]] = []
    opened: list[_Pack] = []
    smallest = int(size.min(initial=capacity))
    for bundle in bundles:
        group, own = int(shared.groups[bundle[0]]), int(size[bundle].sum())
        prefix = int(shared.lengths[bundle[0]])
        chosen = next((one for one in opened if one.takes(group, own, prefix, len(bundle))), None)
        if chosen is None:
            if len(opened) == OPEN_PACKS:
                opened.remove(max(opened, key=lambda one: capacity - one.room))
            chosen = _Pack(capacity, most_rows or len(order), together or len(order))
            opened.append(chosen)
            packs.append(chosen.rows)
        chosen.add(bundle, group, own, prefix)
        if chosen.room < smallest or not chosen.places:
            opened.remove(chosen)
    return packs


class _Pack:
    """A pack that is being filled: tokens and rows for which it has room, its rows, and how many each prefix has."""

    def __init__(self, room: int, places: int, of_one_prefix: int):
        self.room, self.places, self.of_one_prefix = room, places, of_one_prefix
        self.rows, self.groups = [], Counter()

    def takes(self, group: int, own: int, prefix: int, rows: int) -> bool:
        if rows > self.places or own + (0 if group in self.groups else prefix) > self.room:
            return False
        return group < 0 or self.groups[group] + rows <= self.of_one_prefix

    def add(self, bundle: list[int], group: int, own: int, prefix: int) -> None:
        self.room -= own + (0 if group in self.groups else prefix)
        self.places -= len(bundle)
        self.rows += bundle
        if group >= 0:
            self.groups[group] += len(bundle)


def _bundles(order: np.ndarray, size: np.ndarray, shared: Shared, capacity: int, together: int) -> list[list[int]]:
    """Rows of one prefix that go into one pack: at most `together`, and what a pack holds."""
    bundles, latest = [], {}
    for row in order.tolist():
        group = int(shared.groups[row])
        bundle, tokens = latest.get(group, ([], 0))
        if group < 0 or not bundle or len(bundle) == together or tokens + size[row] > capacity:
            bundle, tokens = [], int(shared.lengths[row])
            bundles.append(bundle)
        bundle.append(row)
        latest[group] = bundle, tokens + int(size[row])
    return bundles


def split(packs: list[list[int]], count: int) -> list[list[int]]:
    """Halve the packs with the most rows until there are `count`, in their order; fewer where each has one row."""
    packs = list(packs)
    while len(packs) < count:
        largest = max(range(len(packs)), key=lambda number: len(packs[number]), default=0)
        if not packs or len(packs[largest]) < 2:
            break
        half = len(packs[largest]) // 2
        packs[largest : largest + 1] = [packs[largest][:half], packs[largest][half:]]
    return packs


class Layout(NamedTuple):
    """A pack's tokens, and where its segments are: prefixes first, then suffixes group by group, then other rows."""

    columns: dict[str, np.ndarray]  # name -> (tokens,): the rows' columns, and position_ids
    edges: list[int]  # where each segment begins, and the end of the last one
    suffixes: list[int]  # where each group's suffixes begin, and the end of the last group's
    prefixes: list[int]  # where each group's prefix begins, and the end of the last one
    rows: int
    tokens: int  # of the rows, each with its whole prefix


def lay_out(rows: list[dict[str, Any]], groups: Sequence[int], lengths: Sequence[int]) -> Layout:
    """Lay out a pack of rows (token columns of equal length; `labels` among them) whose groups and prefixes these are.

    Raises ValueError for a suffix whose first token has a label: it is predicted from the prefix, which other rows go
    on from too.
    """
    members = defaultdict(list)
    for number, (group, length) in enumerate(zip(groups, lengths, strict=True)):
        members[group if length else -1].append(number)
    together = [(numbers, lengths[numbers[0]]) for group, numbers in members.items() if group >= 0 and len(numbers) > 1]
    alone = [number for group, numbers in members.items() if group < 0 or len(numbers) == 1 for number in numbers]
    sizes = [len(row["labels"]) for row in rows]
    segments = [(numbers[0], 0, length) for numbers, length in together]
    edges = np.cumsum([0, *(length for _, length in together)]).tolist()
    suffixes = [edges[-1]]
    for numbers, length in together:
        segments += [(number, length, sizes[number]) for number in numbers]
        suffixes.append(suffixes[-1] + sum(sizes[number] - length for number in numbers))
    for number, start, _ in segments[len(together) :]:
        if rows[number]["labels"][start] != -100:
            raise ValueError(f"the first of a row's tokens after a shared prefix of {start} has a label")
    segments += [(number, 0, sizes[number]) for number in alone]
    names = [name for name in rows[0] if name != "position_ids"]
    columns = {
        name: np.concatenate([np.asarray(rows[number][name][start:end]) for number, start, end in segments])
        for name in names
    }
    columns["position_ids"] = np.concatenate([np.arange(start, end) for _, start, end in segments])
    ends = np.cumsum([0, *(end - start for _, start, end in segments)]).tolist()
    return Layout(columns, ends, suffixes, edges, len(rows), sum(sizes))


def tensors(layout: Layout, size: int, copy: bool) -> dict[str, torch.Tensor | int]:
    """The fields of attention.Segments for a layout padded to `size` tokens, by a segment that nothing reads.

    copy: give each row a copy of its prefix's keys and values.
    """
    ends = [*layout.edges, *([size] if size > layout.edges[-1] else [])]
    # Where nothing is shared, one empty group: the kernels take no batch of none.
    groups = (part if len(part) > 1 else part * 2 for part in (layout.suffixes, layout.prefixes))
    fields = dict(zip(("edges", "suffixes", "prefixes"), (ends, *groups), strict=True))
    if copy:
        fields |= _copies(layout, np.array(ends))
    made = {name: torch.tensor(np.asarray(part, dtype=np.int32)) for name, part in fields.items()}
    lengths = {"edges": "longest", "suffixes": "longest_suffixes", "prefixes": "longest_prefix"}
    lengths |= {"key_edges": "longest_keys"} if copy else {}
    return made | {longest: max(2, int(made[name].diff().max())) for name, longest in lengths.items()}


def _copies(layout: Layout, ends: np.ndarray) -> dict[str, np.ndarray]:
    """The fields `copied`, `key_edges` and `copies` of attention.Segments."""
    starts, sizes = ends[:-1], np.diff(ends)
    shared = np.diff(layout.prefixes)  # each group's prefix, which is also its first segments'
    count = len(shared)
    # A suffix belongs to the group in whose part of the pack it begins.
    group = np.searchsorted(layout.suffixes, starts, side="right") - 1
    is_suffix = (starts >= layout.suffixes[0]) & (starts < layout.suffixes[-1]) & (np.arange(len(starts)) >= count)
    before = np.where(is_suffix, shared[group.clip(0, max(0, count - 1))] if count else 0, 0)
    first = np.where(is_suffix, np.asarray(layout.prefixes)[group.clip(0, max(0, count - 1))], 0)
    key_edges = np.concatenate([[0], np.cumsum(sizes + before)])
    within = np.arange(key_edges[-1]) - np.repeat(key_edges[:-1], sizes + before)
    before_each = np.repeat(before, sizes + before)
    copied = np.where(
        within < before_each,
        np.repeat(first, sizes + before) + within,
        np.repeat(starts, sizes + before) + within - before_each,
    )
    copies = np.zeros((ends[-1], 4), dtype=np.int64)
    copies[:, 0] = np.arange(ends[-1]) + np.repeat(key_edges[:-1] + before - starts, sizes)
    for number in range(count):
        members = np.flatnonzero(is_suffix & (group == number))
        tokens = slice(layout.prefixes[number], layout.prefixes[number + 1])
        copies[tokens, 1], copies[tokens, 2], copies[tokens, 3] = members[0], len(members), np.arange(shared[number])
    return {"copied": copied, "key_edges": key_edges, "copies": copies.reshape(-1)}
