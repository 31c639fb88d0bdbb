"""Entropies against a count in plain Python, and the bounds they promise."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.errors import DataError
from train.data import ngram_entropy

END = 0


def entropy(counts):
    total = sum(counts.values())
    return -sum(n / total * math.log(n / total) for n in counts.values())


@given(st.lists(st.integers(0, 5), min_size=2, max_size=80).filter(lambda ids: any(ids[:-1])))
@settings(deadline=None)
def test_is_the_count_of_pairs_inside_documents(ids):
    pairs = [(a, b) for a, b in zip(ids, ids[1:], strict=False) if a != END]
    unigram, bigram = ngram_entropy(np.array(ids, np.uint16), 6, end_of_text=END)
    assert unigram == pytest.approx(entropy(Counter(b for _, b in pairs)), abs=1e-9)
    assert bigram == pytest.approx(entropy(Counter(pairs)) - entropy(Counter(a for a, _ in pairs)), abs=1e-9)
    assert -1e-9 <= bigram <= unigram + 1e-9


def test_a_cycle_has_no_surprise_left_for_a_bigram():
    unigram, bigram = ngram_entropy(np.tile([1, 2, 3, 4], 100), 5, end_of_text=END)
    assert unigram == pytest.approx(math.log(4), rel=1e-3)
    assert bigram == pytest.approx(0, abs=1e-9)


def test_no_bigram_model_has_a_lower_loss():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 8, 500)
    _, bigram = ngram_entropy(ids, 8, end_of_text=END)
    inside = ids[:-1] != END
    for sharpness in (0.1, 1.0, 5.0):
        table = rng.dirichlet(np.full(8, sharpness), 8) + 1e-12
        assert -np.log(table[ids[:-1], ids[1:]])[inside].mean() >= bigram


def test_the_largest_vocabulary_does_not_overflow():
    ids = np.arange(150_000, 151_936).astype(np.uint32)
    assert ngram_entropy(ids, 151_936, end_of_text=END)[1] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("ids", [[], [3], [END, END, 2]])
def test_tokens_without_a_pair_are_refused(ids):
    with pytest.raises(DataError, match="no two of the same document"):
        ngram_entropy(np.array(ids, np.uint16), 6, end_of_text=END)
