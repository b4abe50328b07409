"""Near-duplicate texts in linear time: MinHash signatures by rensa, candidates by banding, each candidate verified.

Two texts are near-duplicates when the Jaccard similarity of their word pairs (each word with the one before it) is at
least the threshold; a group is what such pairs connect. Rows of FinLoRA share long instructions, which would make any
two short tweets alike: word pairs that occur in many distinct texts (COMMON_SHARE) are left out first, so that what a
row says is compared and not what it is asked.

MinHash only proposes pairs. Each is then compared exactly on its word pairs (texts with more than SKETCH distinct ones
on the smallest SKETCH hashes: an estimate with a standard error of at most 0.03). So no two texts are joined by
chance; a pair can be missed, at the threshold itself about one in 500 (tests/test_neardup.py measures it).
"""

import hashlib
import re
import unicodedata
from array import array
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

import numpy as np
from rensa import RMinHash

BANDS, BAND_ROWS = 12, 4  # a pair of similarity s is proposed with probability 1 - (1 - s**4)**12: 0.998 at s = 0.8
NEIGHBOURS = 8  # texts that a text is compared with inside one bucket: bounds the work where many texts are alike
COMMON_SHARE, COMMON_LEAST = 0.01, 20  # a word pair in more distinct texts than both allow is common
COMMON_BITS = 20  # word pairs are counted in 2**20 cells; those that share a cell are counted together
SKETCH = 256  # word pairs kept of a text
COMPARED = 2**20  # bytes of a text that are compared; FinLoRA's longest row has fewer
BLOCK = 2**19  # bytes hashed at once: few enough for the processor's cache
SEED = 42

_URL = re.compile(r"(?i)https?://\S+")
_GAP = re.compile(r"[\W_]+")
_ASCII = {code: chr(code).lower() if chr(code).isalnum() else " " for code in range(128)}
_BYTE = np.random.Generator(np.random.PCG64(SEED)).integers(0, 2**64, 256, dtype=np.uint64)
_POWER = np.cumprod(np.full(BLOCK + COMPARED + 2, 0x9E3779B97F4A7C15, np.uint64))
_FALLING = _POWER[::-1].copy()
_MIX, _PLACE = np.uint64(0xD6E8FEB86659FD93), np.uint64(0xA0761D6478BD642F)


class _Texts(NamedTuple):
    """Hashed texts: `pairs` holds the sorted distinct word pairs of all texts, text i's at starts[i], sizes[i] many.

    `limits[i]` is the largest hash up to which text i's pairs are all there (the largest of all when none is missing).
    """

    pairs: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    limits: np.ndarray
    keys: np.ndarray


def normalise(text: str) -> str:
    """The text as it is compared: lower case, words and digits only, one space between them, links left out.

    Compatibility forms such as full-width letters become plain (NFKC). Signs and punctuation make no difference; a
    text without a single word stays itself. Writing without spaces (Chinese, Japanese) counts as one word a run.
    """
    return " ".join(_plain(text).split()) or " ".join(text.split())


def near_duplicate_groups(texts: Iterable[str], threshold: float = 0.8) -> list[int]:
    """The group of each text: equal numbers are near-duplicates or connected by them, numbered by first occurrence.

    `threshold` is the Jaccard similarity of word pairs, in (0, 1]. `texts` is read once and not kept: memory is 4
    bytes a word and about 250 a text. Equal normalised texts are always in one group; texts whose word pairs are all
    common match equal texts only. The partition is the same in every process and for every order of the texts.
    """
    return duplicate_groups(texts, threshold)[1].tolist()


def duplicate_groups(texts: Iterable[str], threshold: float = 0.8) -> tuple[np.ndarray, np.ndarray]:
    """Two groups of each text, as integer arrays: of those with the same normalised text, and of near-duplicates.

    See near_duplicate_groups, which gives the second.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold {threshold} is not in (0, 1]")
    every = _hashed(texts)
    _, first, same = np.unique(every.keys, return_index=True, return_inverse=True)
    if not len(first):
        return same, same
    # From here on only distinct texts count, in the order of their keys, which no order of the input changes.
    distinct = _Texts(every.pairs, *(column[first] for column in every[1:]))
    bits = _leave_out_common(distinct)
    root = np.arange(len(first))
    for left, right in _proposed(distinct):
        apart = root[left] != root[right]
        left, right = left[apart], right[apart]
        worth = _may_be_similar(distinct, bits, left, right, threshold)
        left, right = left[worth], right[worth]
        similar = _similarity(distinct, left, right) >= threshold
        _join(root, left[similar], right[similar])
    _, seen_at, group = np.unique(root[same], return_index=True, return_inverse=True)
    return same, np.argsort(np.argsort(seen_at))[group]


def _plain(text: str) -> str:
    """The normalised text but for the width of its gaps."""
    if "://" in text:
        text = _URL.sub(" ", text)
    if text.isascii():
        return text.translate(_ASCII)
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return _GAP.sub(" ", folded)


def _hashed(texts: Iterable[str]) -> _Texts:
    pairs, sizes, limits, keys = array("I"), array("q"), array("I"), array("Q")
    for block in _blocks(texts):
        for column, values in zip((pairs, sizes, limits, keys), _hash_block(block), strict=True):
            column.frombytes(values.tobytes())
    sizes = np.frombuffer(sizes, np.int64) if sizes else np.zeros(0, np.int64)
    return _Texts(
        np.frombuffer(pairs, np.uint32) if pairs else np.zeros(0, np.uint32),
        np.cumsum(sizes) - sizes,
        sizes.copy(),
        np.frombuffer(limits, np.uint32) if limits else np.zeros(0, np.uint32),
        np.frombuffer(keys, np.uint64) if keys else np.zeros(0, np.uint64),
    )


def _blocks(texts: Iterable[str]) -> Iterator[list[bytes]]:
    """The plain texts as bytes, gathered up to BLOCK bytes; a text without a word is a digest that no word equals."""
    block, room = [], BLOCK
    for text in texts:
        plain = _plain(text)
        if not plain or plain.isspace():
            plain = "\x7f" + hashlib.blake2b(normalise(text).encode("utf-8", "surrogatepass")).hexdigest()
        encoded = plain.encode("utf-8", "surrogatepass")[:COMPARED]
        room -= len(encoded) + 1
        if room < 0 and block:
            yield block
            block, room = [], BLOCK - len(encoded) - 1
        block.append(encoded)
    if block:
        yield block


def _hash_block(block: list[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Per text: its smallest SKETCH word pairs in order, how many they are, its limit and its key (see _Texts)."""
    data = np.frombuffer(b"\n".join(block) + b"\n", np.uint8)
    letter = np.concatenate(([False], data > 32))
    edges = np.flatnonzero(letter[1:] != letter[:-1])
    begin, end = edges[::2], edges[1::2]
    # A polynomial over each word's bytes, all words at once: differences of one running sum, brought to one exponent.
    running = np.zeros(len(data) + 1, np.uint64)
    np.cumsum(_BYTE.take(data) * _FALLING[: len(data)], out=running[1:])
    words = _mixed((running[end] - running[begin]) * _POWER[begin])
    row = np.repeat(np.arange(len(block)), np.diff(np.searchsorted(begin, np.flatnonzero(data == 10)), prepend=0))
    new = np.concatenate(([True], row[1:] != row[:-1]))
    opening = np.flatnonzero(new)
    before = np.where(new, np.uint64(0), np.roll(words, 1))
    place = np.arange(len(words)) - opening[row]
    keys = np.add.reduceat(_mixed(words + place.astype(np.uint64) * _PLACE), opening)
    pairs = np.sort((row.astype(np.uint64) << np.uint64(32)) | (_mixed(before * _PLACE + words) >> np.uint64(32)))
    pairs = pairs[np.concatenate(([True], pairs[1:] != pairs[:-1]))]
    row = (pairs >> np.uint64(32)).astype(np.int64)
    pairs = pairs.astype(np.uint32)
    starts = np.searchsorted(row, np.arange(len(block)))
    sizes = np.diff(np.append(starts, len(pairs)))
    limits = np.full(len(block), 2**32 - 1, np.uint32)
    long = sizes > SKETCH
    if long.any():
        limits[long] = pairs[starts[long] + SKETCH - 1]
        pairs = pairs[np.arange(len(pairs)) - starts[row] < SKETCH]
        sizes = np.minimum(sizes, SKETCH)
    return pairs, sizes, limits, keys


def _mixed(values: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit numbers after which each bit depends on all bits."""
    values = (values ^ (values >> np.uint64(32))) * _MIX
    values = (values ^ (values >> np.uint64(32))) * _MIX
    return values ^ (values >> np.uint64(32))


def _leave_out_common(texts: _Texts) -> np.ndarray:
    """Drop the common word pairs in place: `pairs`, `starts` and `sizes` change.

    Return 256 bits a text, shape [texts, 4]: those that the first byte of one of its remaining pairs names are set.
    """
    counts = np.zeros(2**COMMON_BITS, np.int64)
    cell_of = np.uint32(32 - COMMON_BITS)
    in_store = np.argsort(texts.starts, kind="stable")
    for ids in _batches(in_store, texts.sizes):
        held, _ = _gather(texts, ids)
        counts += np.bincount(held >> cell_of, minlength=len(counts))
    common = counts > max(COMMON_LEAST, COMMON_SHARE * len(in_store))
    bits = np.zeros((len(in_store), 4), np.uint64)
    free = 0
    for ids in _batches(in_store, texts.sizes):
        held, owner = _gather(texts, ids)
        keep = ~common[held >> cell_of]
        held, owner = held[keep], owner[keep]
        named = np.zeros((len(ids), 256), bool)
        named[owner, held >> np.uint32(24)] = True
        bits[ids] = np.packbits(named, axis=1).view(np.uint64)
        texts.pairs[free : free + len(held)] = held
        texts.sizes[ids] = np.bincount(owner, minlength=len(ids))
        texts.starts[ids] = free + np.cumsum(texts.sizes[ids]) - texts.sizes[ids]
        free += len(held)
    return bits


def _batches(ids: np.ndarray, sizes: np.ndarray) -> Iterator[np.ndarray]:
    """`ids` in runs whose texts hold about a million word pairs."""
    cuts = np.flatnonzero(np.diff(np.cumsum(sizes[ids]) >> 20)) + 1
    yield from np.split(ids, cuts)


def _gather(texts: _Texts, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The word pairs of the texts `ids` in one array, and for each the place in `ids` of its text."""
    sizes = texts.sizes[ids]
    owner = np.repeat(np.arange(len(ids)), sizes)
    shift = np.repeat(texts.starts[ids] - np.cumsum(sizes) + sizes, sizes)
    return texts.pairs[np.arange(len(owner)) + shift], owner


def _proposed(texts: _Texts) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of texts that share a bucket: the same BAND_ROWS MinHash values in one band, NEIGHBOURS for each text."""
    worth = np.flatnonzero(texts.sizes)
    bands = np.empty((BANDS, len(worth)), np.uint32)
    done = 0
    for ids in _batches(worth, texts.sizes):
        held, _ = _gather(texts, ids)
        offsets = np.concatenate(([0], np.cumsum(texts.sizes[ids]))).astype(np.uint64)
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(
            held.astype(np.uint64), offsets, num_perm=BANDS * BAND_ROWS, seed=SEED
        )
        values = np.frombuffer(array("I", chain.from_iterable(matrix.to_rows())), np.uint32)
        values = values.reshape(len(ids), BANDS, BAND_ROWS)
        bucket = np.zeros((len(ids), BANDS), np.uint64)
        for column in range(BAND_ROWS):
            bucket = _mixed(bucket * _PLACE + values[:, :, column])
        bands[:, done : done + len(ids)] = (bucket >> np.uint64(32)).T
        done += len(ids)
    places = np.empty((BANDS, len(worth)), np.int32)
    for band in range(BANDS):
        # Inside a bucket the next band's values put the most similar texts side by side.
        key = (bands[band].astype(np.uint64) << np.uint64(32)) | bands[(band + 1) % BANDS]
        order = np.argsort(key, kind="stable")
        places[band, order] = np.arange(len(order))
        bucket = bands[band][order]
        for step in range(1, NEIGHBOURS + 1):
            at = np.flatnonzero(bucket[:-step] == bucket[step:])
            if not len(at):
                break
            left, right = order[at], order[at + step]
            new = np.ones(len(at), bool)
            for earlier in range(band):
                again = np.flatnonzero(bands[earlier][left] == bands[earlier][right])
                apart = np.abs(places[earlier][left[again]] - places[earlier][right[again]])
                new[again[apart <= NEIGHBOURS]] = False
            yield worth[left[new]], worth[right[new]]


def _may_be_similar(
    texts: _Texts, bits: np.ndarray, left: np.ndarray, right: np.ndarray, threshold: float
) -> np.ndarray:
    """False for pairs that cannot reach the threshold: more bits differ than word pairs may.

    Of two sets of a and b with Jaccard similarity s, (a + b)(1 - s)/(1 + s) elements are in one only, and each bit that
    differs stands for at least one of them.
    """
    differ = np.bitwise_count(bits[left] ^ bits[right]).sum(axis=1, dtype=np.int64)
    allowed = (texts.sizes[left] + texts.sizes[right]) * ((1 - threshold) / (1 + threshold)) + 1e-6
    return (differ <= allowed) | (texts.limits[left] != texts.limits[right])


def _similarity(texts: _Texts, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The Jaccard similarity of the texts left[i] and right[i], as far as both are held (see _Texts.limits)."""
    result = np.empty(len(left))
    limits = np.minimum(texts.limits[left], texts.limits[right])
    for ids in _batches(np.arange(len(left)), texts.sizes[left] + texts.sizes[right]):
        both = []
        for side in (left, right):
            held, owner = _gather(texts, side[ids])
            below = held <= limits[ids][owner]
            both.append((owner[below].astype(np.uint64) << np.uint64(32)) | held[below])
        all_pairs = np.sort(np.concatenate(both))
        shared = all_pairs[1:][all_pairs[1:] == all_pairs[:-1]]
        shared = np.bincount((shared >> np.uint64(32)).astype(np.int64), minlength=len(ids))
        total = np.bincount((all_pairs >> np.uint64(32)).astype(np.int64), minlength=len(ids))
        # Where the common word pairs took all that is below the limit nothing is left to be alike.
        result[ids] = shared / np.maximum(total - shared, 1)
    return result


def _join(root: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    """Merge the groups of left[i] and right[i]; `root` keeps the smallest text of each group for all its texts."""
    for one, other in zip(left.tolist(), right.tolist(), strict=True):
        one, other = _top(root, one), _top(root, other)
        root[max(one, other)] = min(one, other)
    while len(left) and not np.array_equal(root, higher := root[root]):
        root[:] = higher


def _top(root: np.ndarray, text: int) -> int:
    while root[text] != text:
        root[text] = root[root[text]]
        text = int(root[text])
    return text
