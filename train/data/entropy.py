"""What the simplest models reach: empirical entropies of a token sequence."""

from __future__ import annotations

import numpy as np

from qwen_jax.errors import DataError


def ngram_entropy(tokens: np.ndarray, vocab_size: int, *, end_of_text: int) -> tuple[float, float]:
    """(unigram, bigram) entropy in nats per token: H(X2) and H(X2 | X1) of adjacent tokens of the same document.

    `tokens` [n] are ids below `vocab_size`, each document ended by `end_of_text`. X2 ranges over the tokens a loss
    counts: all but the first of each document. Both are plug-in estimates from the tokens they speak of, and so a
    lower bound of the loss that any unigram or bigram model can reach on these tokens, however it was trained. Tokens
    without any such pair are a DataError.
    """
    ids = tokens.astype(np.int64)
    inside = ids[:-1] != end_of_text
    first, second = ids[:-1][inside], ids[1:][inside]
    if not len(second):
        raise DataError(f"{len(ids)} tokens hold no two of the same document, so they have no entropy; give more text")
    unigram = _entropy(np.bincount(second))
    # H(X2 | X1) = H(X1, X2) - H(X1). Pairs are counted by sorting: a table of vocab_size² would not fit for 150k.
    pairs = _entropy(np.unique(first * vocab_size + second, return_counts=True)[1])
    return unigram, pairs - _entropy(np.bincount(first))


def _entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution proportional to `counts`."""
    total, counts = counts.sum(), counts[counts > 0]
    return float(np.log(total) - (counts * np.log(counts)).sum() / total)
