"""Near duplicates: n-grams, minima of random hashes of them, bands of minima, and who met whom (Broder 1997).

signatures -> buckets -> union-find -> filter. Each step is a function of small tables; the texts are read for the first
and for the last alone. Numbers of documents count through all shards in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from train.data.corpus.config import MinHash
from train.data.corpus.documents import Document
from train.data.corpus.words import hashes, mix, ngrams, words

# n-grams times hashes at a time: what stays in a core's cache.
_BLOCK = 1 << 16


def shingles(document: Document, n: int) -> np.ndarray:
    """uint64 [k]: the n-grams of a document. One without words has one too."""
    return ngrams(hashes(words(document.text)), n)


def hash_functions(settings: MinHash) -> tuple[np.ndarray, np.ndarray]:
    """Factors (odd) and summands, uint64 [bands * rows]: x -> x * a + b, modulo 2^64, is a permutation."""
    count = settings.bands * settings.rows
    rng = np.random.Generator(np.random.Philox(settings.seed))
    a, b = rng.integers(0, 2**64, (2, count, 1), np.uint64)
    return a | np.uint64(1), b


def minima(found: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """uint64 [bands * rows]: the least value of each hash function over the n-grams of a document."""
    step = max(1, _BLOCK // len(a))
    parts = (a * found[start : start + step] + b for start in range(0, len(found), step))
    return np.minimum.reduce([part.min(axis=1) for part in parts])


def signature(found: np.ndarray, settings: MinHash, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """uint64 [bands]: for each band a number that is equal where all of its minima are."""
    total = np.zeros(settings.bands, np.uint64)
    for column in minima(found, a, b).reshape(settings.bands, settings.rows).T:
        total = mix(total + column)
    return total


def signatures(documents: Iterable[Document], settings: MinHash) -> dict[str, np.ndarray]:
    """The tables of a shard of n documents.

    Returns "bands" uint64 [bands, n], and where candidates are verified "shingles" uint64 [sum of k], the distinct
    n-grams of each document sorted, and "ends" int64 [n], where those of each document end.
    """
    a, b = hash_functions(settings)
    bands, kept = [], []
    for document in documents:
        found = shingles(document, settings.ngram)
        bands.append(signature(found, settings, a, b))
        if settings.verify is not None:
            kept.append(np.unique(found))
    table = np.array(bands, np.uint64).reshape(-1, settings.bands).T
    tables = {"bands": np.ascontiguousarray(table)}
    if settings.verify is not None:
        tables["shingles"] = np.concatenate([np.empty(0, np.uint64), *kept])
        tables["ends"] = np.cumsum([len(found) for found in kept], dtype=np.int64)
    return tables


class Shingles:
    """The n-grams of all shards, by the number of the document."""

    def __init__(self, shards: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """
        Args:
          shards: "shingles" and "ends" of each.
        """
        self._shards = shards
        self._first = np.cumsum([0, *(len(ends) for _, ends in shards)])

    def of(self, number: int) -> np.ndarray:
        """uint64 [k], sorted."""
        shard = int(np.searchsorted(self._first, number, "right")) - 1
        found, ends = self._shards[shard]
        local = number - self._first[shard]
        return found[ends[local - 1] if local else 0 : ends[local]]


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Size of the intersection over size of the union of two sorted sets."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


def pairs(band: np.ndarray, verify: float | None, known: Shingles | None) -> np.ndarray:
    """int64 [m, 2]: pairs of documents that are duplicates by one band [n], enough to connect all that are.

    With `verify`, a document of a bucket is compared with the first of each group of duplicates in it.
    """
    order = np.argsort(band, kind="stable")
    same = band[order][1:] == band[order][:-1]
    if verify is None or known is None:
        return np.stack([order[:-1][same], order[1:][same]], axis=1)
    found: list[tuple[int, int]] = []
    edges = np.flatnonzero(np.diff(same, prepend=False, append=False))
    for start, last in edges.reshape(-1, 2):  # runs of equal values: where they begin, and where they end
        leaders: list[tuple[int, np.ndarray]] = []
        for number in order[start : last + 1]:
            own = known.of(number)
            leader = next((first for first, theirs in leaders if jaccard(own, theirs) >= verify), None)
            if leader is None:
                leaders.append((number, own))
            else:
                found.append((leader, number))
    return np.array(found, np.int64).reshape(-1, 2)


def first_of_each(count: int, edges: np.ndarray) -> np.ndarray:
    """int64 [count]: the least number that each document is connected with by pairs [m, 2]: union-find, all at once."""
    labels = np.arange(count)
    while True:
        before = labels.copy()
        low = labels[edges].min(axis=1)
        for side in edges.T:
            np.minimum.at(labels, before[side], low)  # a root learns of a lesser one,
        labels = labels[labels]  # and those below it learn from the root
        if np.array_equal(labels, before):
            return labels
