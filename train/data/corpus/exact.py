"""Documents with the same words: a digest for each, and the first of each digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from train.data.corpus.documents import Document
from train.data.corpus.words import words


def digests(documents: Iterable[Document]) -> np.ndarray:
    """uint64 [n, 2]: 128 bits of the words of each document."""
    rows = [hashlib.blake2b(" ".join(words(each.text)).encode(), digest_size=16).digest() for each in documents]
    return np.frombuffer(b"".join(rows), "<u8").reshape(-1, 2)


def first_of_each(tables: Sequence[np.ndarray]) -> np.ndarray:
    """int64 [n]: for each document of all shards, in order, the number of the first with its digest."""
    table = np.concatenate(tables)
    order = np.lexsort((np.arange(len(table)), table[:, 0], table[:, 1]))
    table = table[order]
    begins = np.ones(len(table), bool)
    begins[1:] = (table[1:] != table[:-1]).any(axis=1)
    firsts = np.empty(len(table), np.int64)
    firsts[order] = order[begins][np.cumsum(begins) - 1]
    return firsts
