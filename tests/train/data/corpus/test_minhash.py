"""Signatures against exact similarity, clusters against a search through the graph, and what must not explode."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train.data.corpus.conftest import prose
from train.data.corpus import exact, minhash
from train.data.corpus.config import MinHash
from train.data.corpus.documents import Document
from train.data.corpus.words import hashes, ngrams, words

SETTINGS = MinHash(ngram=3, bands=10, rows=4)


def sets(common, own, count=2):
    """Sets of random numbers that share `common` of them and have `own` each."""
    rng = np.random.default_rng(0)
    shared = rng.integers(0, 2**64, common, np.uint64)
    return [np.concatenate([shared, rng.integers(0, 2**64, own, np.uint64)]) for _ in range(count)]


@pytest.mark.parametrize("common, own", [(20, 80), (50, 50), (80, 20)])
def test_minima_agree_as_often_as_sets_are_similar(common, own):
    a, b = sets(common, own)
    similarity = common / (common + 2 * own)
    functions = minhash.hash_functions(MinHash(bands=1000, rows=4))
    agree = (minhash.minima(a, *functions) == minhash.minima(b, *functions)).mean()
    # Five standard deviations of the mean of 4000 draws.
    assert abs(agree - similarity) < 5 * np.sqrt(similarity * (1 - similarity) / 4000)


def test_bands_are_equal_where_all_of_their_minima_are():
    a, b = sets(90, 10)
    functions = minhash.hash_functions(SETTINGS)
    same = minhash.minima(a, *functions) == minhash.minima(b, *functions)
    bands = minhash.signature(a, SETTINGS, *functions) == minhash.signature(b, SETTINGS, *functions)
    assert bands.tolist() == same.reshape(10, 4).all(axis=1).tolist() and 0 < bands.sum() < 10


def test_signatures_do_not_know_their_shard_or_their_process():
    documents = [Document(prose(i), f"{i}") for i in range(6)]
    whole = minhash.signatures(documents, SETTINGS)["bands"]
    parts = [minhash.signatures(documents[i : i + 2], SETTINGS)["bands"] for i in (0, 2, 4)]
    assert np.array_equal(whole, np.concatenate(parts, axis=1))
    assert minhash.signatures([], SETTINGS)["bands"].shape == (10, 0)
    # Of another process, on another day: what is on disk must stay readable.
    assert hashes(["qwen", "千"]).tolist() == [1344915303535283217, 10285560222876192865]
    assert minhash.hash_functions(MinHash())[0][:2, 0].tolist() == [1232279569898196539, 1457532264001425279]


@given(st.lists(st.integers(0, 6), max_size=12), st.integers(1, 5))
@settings(deadline=None)
def test_ngrams_are_equal_where_words_are(sequence, n):
    found = ngrams(np.array(sequence, np.uint64), n).tolist()
    windows = [tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1)] or [tuple(sequence)]
    assert len(found) == len(windows)
    assert len(set(found)) == len(set(windows))


def test_words_are_told_without_case_punctuation_and_spaces():
    assert words("It's  A—test, ﬁne?") == ["it", "s", "a", "test", "fine"]
    assert words("你好,world ラ行") == ["你", "好", "world", "ラ", "行"]
    assert words("!!! …") == []


@given(st.lists(st.tuples(st.integers(0, 14), st.integers(0, 14)), max_size=20))
@settings(deadline=None)
def test_clusters_are_the_components_of_the_graph(edges):
    labels = list(range(15))
    for _ in range(15):
        for a, b in edges:
            labels[a] = labels[b] = min(labels[a], labels[b])
    assert minhash.first_of_each(15, np.array(edges, np.int64).reshape(-1, 2)).tolist() == labels


def test_verified_pairs_are_those_that_are_similar_enough():
    base = prose(1, 200).split()
    changed = lambda count, seed: " ".join(random.Random(seed).choices("abcdefgh", k=count) + base[count:])
    documents = [Document(text, "") for text in (" ".join(base), changed(10, 1), changed(60, 2), prose(2, 200))]
    tables = minhash.signatures(documents, MinHash(ngram=3, bands=1, rows=1, verify=0.8))
    known = minhash.Shingles([(tables["shingles"], tables["ends"])])
    exactly = [minhash.jaccard(known.of(0), known.of(i)) for i in range(4)]
    assert exactly[0] == 1 and exactly[1] > 0.85 > 0.75 > exactly[2] > 0.1 > exactly[3]
    everybody = np.zeros(4, np.uint64)  # as if they all met
    assert minhash.pairs(everybody, 0.8, known).tolist() == [[0, 1]]
    assert len(minhash.first_of_each(4, minhash.pairs(everybody, None, None)).nonzero()[0]) == 0


@pytest.mark.parametrize("text", ["the same words again and again", "", "x", "!"])
@pytest.mark.parametrize("verify", [None, 0.8])
def test_of_thousands_of_copies_one_is_kept(text, verify):
    settings = MinHash(bands=3, rows=2, verify=verify)
    one = minhash.signatures([Document(text, "")], settings)
    count = 10_000 if verify is None else 2_000
    known = None
    if verify is not None:
        known = minhash.Shingles([(one["shingles"], one["ends"])] * count)
    edges = [minhash.pairs(np.repeat(band, count), verify, known) for band in one["bands"]]
    assert all(len(pairs) == count - 1 for pairs in edges)
    assert not minhash.first_of_each(count, np.concatenate(edges)).any()


def test_exact_duplicates_have_the_same_words():
    texts = ["One, two", "three", "one two!", "", "one two three", "  ", "THREE", "onetwo"]
    tables = [exact.digests(Document(text, "") for text in texts[start : start + 3]) for start in (0, 3, 6)]
    assert exact.first_of_each(tables).tolist() == [0, 1, 0, 3, 4, 3, 1, 7]
    assert exact.first_of_each([exact.digests([])]).tolist() == []
