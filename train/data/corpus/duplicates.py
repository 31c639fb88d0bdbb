"""The tasks of the two duplicate removals: tables of shards, what is the first of what, and the filter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from train.data.corpus import exact, minhash
from train.data.corpus.config import MinHash
from train.data.corpus.documents import Document, read_documents
from train.data.corpus.filtering import DOCUMENTS, run_filter
from train.data.corpus.tasks import Summary, Task

IDS, DIGESTS, PAIRS, FIRSTS, STARTS = "ids.npy", "digests.npy", "pairs.npy", "firsts.npy", "starts.npy"


def run_digests(task: Task, *, previous: str) -> Summary:
    """The exact duplicates' table of a shard."""
    _save(task, DIGESTS, exact.digests(_noting_ids(task, previous, ids := [])))
    _save(task, IDS, np.array(ids, np.str_))
    return Summary()


def run_first_digests(task: Task, *, tables: str, tasks: int) -> Summary:
    """The first document of each digest, over all shards."""
    found = [_load(task, tables, DIGESTS, index) for index in range(tasks)]
    _save(task, FIRSTS, exact.first_of_each(found))
    _save(task, STARTS, np.cumsum([0, *map(len, found)]))
    return Summary()


def run_signatures(task: Task, *, previous: str, settings: MinHash) -> Summary:
    """The near duplicates' tables of a shard."""
    tables = minhash.signatures(_noting_ids(task, previous, ids := []), settings)
    for name, table in tables.items():
        _save(task, f"{name}.npy", table)
    _save(task, IDS, np.array(ids, np.str_))
    return Summary()


def run_bucket(task: Task, *, tables: str, tasks: int, settings: MinHash) -> Summary:
    """The pairs that meet in the band of the task's number, over all shards."""
    load = lambda name: [_load(task, tables, name, index) for index in range(tasks)]
    band = np.concatenate([bands[task.index] for bands in load("bands.npy")])
    known = None
    if settings.verify is not None:
        known = minhash.Shingles(list(zip(load("shingles.npy"), load("ends.npy"), strict=True)))
    pairs = minhash.pairs(band, settings.verify, known)
    _save(task, PAIRS, pairs)
    return Summary(counts=Counter({"pairs": len(pairs)}))


def run_clusters(task: Task, *, buckets: str, bands: int, tables: str, tasks: int) -> Summary:
    """The first document of each cluster of pairs of all bands."""
    starts = np.cumsum([0, *(len(_load(task, tables, IDS, index)) for index in range(tasks))])
    pairs = np.concatenate([_load(task, buckets, PAIRS, band) for band in range(bands)])
    _save(task, FIRSTS, minhash.first_of_each(int(starts[-1]), pairs))
    _save(task, STARTS, starts)
    return Summary()


def run_drop(task: Task, *, previous: str, tables: str, firsts: str) -> Summary:
    """Keeps what is its own first; the reason of the rest is the document that it repeats."""
    first, starts = _load(task, firsts, FIRSTS, 0), _load(task, firsts, STARTS, 0)
    known: dict[int, np.ndarray] = {}

    def keep(documents: Iterable[Document], counts: Counter[str]) -> Iterator[tuple[Document, str]]:
        for number, document in enumerate(documents, starts[task.index]):
            original = first[number]
            if original == number:
                yield document, ""
                continue
            shard = int(np.searchsorted(starts, original, "right")) - 1
            if shard not in known:
                known[shard] = _load(task, tables, IDS, shard)
            yield document, f"duplicate: of {known[shard][original - starts[shard]]}"

    return run_filter(task, keep=keep, previous=previous)


def _noting_ids(task: Task, previous: str, ids: list[str]) -> Iterator[Document]:
    for document in read_documents(task.input(previous, DOCUMENTS)):
        ids.append(document.id)
        yield document


def _save(task: Task, name: str, table: np.ndarray) -> None:
    with open(task.output(name), "wb") as file:
        np.save(file, table)


def _load(task: Task, phase: str, name: str, index: int) -> np.ndarray:
    """A table, mapped: of the n-grams of all shards only a few are ever read."""
    path = task.input(phase, name, index)
    # An empty table cannot be mapped.
    return np.load(path, mmap_mode="r" if path.stat().st_size > 1024 else None)
