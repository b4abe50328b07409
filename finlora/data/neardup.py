"""Near-duplicate texts: MinHash and locality-sensitive hashing by rensa propose pairs, an exact comparison decides.

Two texts are near-duplicates when the Jaccard similarity of their word pairs (each word with the one before it) is at
least the threshold; a group is what such pairs connect. Rows of FinLoRA share long instructions, which would make any
two short tweets alike: word pairs that occur in many distinct texts (COMMON_SHARE) are left out first, so that what a
row says is compared and not what it is asked.

No two texts are joined by chance, since each proposed pair is compared exactly. A pair can be missed: at the threshold
itself about one in 500 (tests/test_neardup.py measures it).
"""

import hashlib
import re
import unicodedata
from array import array
from collections.abc import Iterable, Iterator
from itertools import chain, islice

import numpy as np
from rensa import RMinHash, RMinHashLSH

BANDS, BAND_ROWS = 12, 4  # a pair of similarity s is proposed with probability 1 - (1 - s**4)**12: 0.998 at s = 0.8
COMMON_SHARE, COMMON_LEAST = 0.01, 20  # a word pair in more distinct texts than both allow is common
COMMON_BITS = 22  # word pairs are counted in 2**22 cells; those that share a cell are counted together
COMPARED = 2**20  # characters of a text that are compared; FinLoRA's longest row has fewer
BATCH = 512  # texts that are hashed at a time: a filing has thousands of word pairs
SEED = 42

_URL = re.compile(r"(?i)https?://\S+")
_GAP = re.compile(r"[\W_]+")
_ASCII = {code: chr(code).lower() if chr(code).isalnum() else " " for code in range(128)}


def normalise(text: str) -> str:
    """The text as it is compared: lower case, words and digits only, one space between them, links left out.

    Compatibility forms such as full-width letters become plain (NFKC). Signs and punctuation make no difference; a
    text without a single word stays itself. Writing without spaces (Chinese, Japanese) counts as one word a run.
    """
    plain = _URL.sub(" ", text) if "://" in text else text
    if plain.isascii():
        plain = plain.translate(_ASCII)
    else:
        plain = _GAP.sub(" ", unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", plain).casefold()))
    return " ".join(plain.split()) or " ".join(text.split())


def near_duplicate_groups(texts: Iterable[str], threshold: float = 0.8) -> list[int]:
    """The group of each text: equal numbers are near-duplicates or connected by them, numbered by first occurrence.

    `threshold` is the Jaccard similarity of word pairs, in (0, 1]. `texts` is read once and not kept: a million
    of 50 words take 1.6 GB. Equal normalised texts are always in one group; texts whose word pairs are all
    common match equal texts only. The partition is the same in every process and for every order of the texts.
    """
    return duplicate_groups(texts, threshold)[1].tolist()


def duplicate_groups(texts: Iterable[str], threshold: float = 0.8) -> tuple[np.ndarray, np.ndarray]:
    """Two groups of each text, as integer arrays: of those with the same normalised text, and of near-duplicates.

    Both are numbered by first occurrence. See near_duplicate_groups, which gives the second.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold {threshold} is not in (0, 1]")
    same = array("q")
    pairs, sizes = _word_pairs(_distinct(texts, same))
    pairs, sizes = _without_common(pairs, sizes)
    # A text's group is the smallest text that it is connected to, found by following `parent` to its end.
    parent = list(range(len(sizes)))
    ends = np.cumsum(sizes)
    for one, other in _proposed(pairs, ends, threshold):
        if _root(parent, one) != _root(parent, other):
            first, second = (pairs[ends[text] - sizes[text] : ends[text]] for text in (one, other))
            shared = len(np.intersect1d(first, second, assume_unique=True))
            if shared >= threshold * (len(first) + len(second) - shared):
                low, high = sorted((_root(parent, one), _root(parent, other)))
                parent[high] = low
    same = np.frombuffer(same, np.int64) if same else np.zeros(0, np.int64)
    roots = np.array([_root(parent, text) for text in range(len(parent))], np.int64)
    # A root is its group's first text, so that numbering the roots in order numbers groups by first occurrence.
    return same, np.unique(roots, return_inverse=True)[1][same] if len(same) else same


def _distinct(texts: Iterable[str], same: array) -> Iterator[list[str]]:
    """Yield the words of each normalised text that is new; `same` gains the number of each text's normalised text."""
    numbers: dict[bytes, int] = {}
    for text in texts:
        plain = normalise(text[:COMPARED])
        # 128 bits instead of the text itself: two texts share them with a probability below 1e-26 among a million.
        key = hashlib.blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        known = len(numbers)
        same.append(numbers.setdefault(key, known))
        if len(numbers) > known:
            yield plain.split()


def _word_pairs(texts: Iterator[list[str]]) -> tuple[np.ndarray, np.ndarray]:
    """The hashes of all texts' distinct word pairs, one text after the other and sorted within it, and their counts."""
    pairs, sizes = [], []
    while batch := list(islice(texts, BATCH)):
        hashed = RMinHash.hash_token_sets(
            [[f"{one} {two}" for one, two in zip(["", *words], words, strict=False)] for words in batch]
        )
        owner = np.repeat(np.arange(len(batch), dtype=np.uint64), [len(row) for row in hashed])
        # The upper half of a 64-bit hash: with a few thousand pairs a text, a false match is one in a million.
        upper = np.fromiter(chain.from_iterable(hashed), np.uint64, len(owner)) >> np.uint64(32)
        distinct = np.sort((owner << np.uint64(32)) | upper)  # np.unique takes ten times as long here (numpy 2.3)
        distinct = distinct[np.diff(distinct, prepend=np.uint64(2**64 - 1)) != 0]
        pairs.append(distinct.astype(np.uint32))
        sizes.append(np.bincount(distinct >> np.uint64(32), minlength=len(batch)))
    return np.concatenate([np.zeros(0, np.uint32), *pairs]), np.concatenate([np.zeros(0, np.int64), *sizes])


def _without_common(pairs: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The word pairs that are not common, and how many of them each text has."""
    cells = pairs >> np.uint32(32 - COMMON_BITS)
    kept = np.bincount(cells, minlength=2**COMMON_BITS)[cells] <= max(COMMON_LEAST, COMMON_SHARE * len(sizes))
    before = np.concatenate(([0], np.cumsum(kept)))
    ends = np.cumsum(sizes)
    return pairs[kept], before[ends] - before[ends - sizes]


def _proposed(pairs: np.ndarray, ends: np.ndarray, threshold: float) -> Iterator[tuple[int, int]]:
    """Pairs of texts, the later one first, that share all BAND_ROWS MinHash values of one band."""
    index = RMinHashLSH(threshold, BANDS * BAND_ROWS, BANDS)
    for first in range(0, len(ends), BATCH):
        last = ends[first : first + BATCH]
        begin = [int(ends[first - 1]) if first else 0, *last[:-1].tolist()]
        start = begin[0]
        held = pairs[start : int(last[-1])].tobytes()
        tokens = [
            [held[at : at + 4] for at in range(4 * (one - start), 4 * (two - start), 4)]
            for one, two in zip(begin, last.tolist(), strict=True)
        ]
        for text, sketch in enumerate(RMinHash.from_token_sets(tokens, BANDS * BAND_ROWS, SEED), first):
            if tokens[text - first]:  # nothing is left of the others
                for other in index.query(sketch):
                    yield text, other
                index.insert(text, sketch)


def _root(parent: list[int], text: int) -> int:
    while parent[text] != text:
        parent[text] = text = parent[parent[text]]
    return text
