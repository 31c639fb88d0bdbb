"""Thresholds against sets counted by hand, and draws that never take what has no mass."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.ops import draw as ops

V = 61

draw, temper, likeliest = jax.jit(ops.draw), jax.jit(ops.temper), jax.jit(ops.likeliest)
least_of_top_k, least_of_top_p = jax.jit(ops.least_of_top_k), jax.jit(ops.least_of_top_p)


def rows(value):
    return jnp.full(1, value, jnp.float32)


def keys(seed, count):
    return jax.random.split(jax.random.key(seed), count)


@settings(deadline=None, max_examples=40)
@given(data=st.data(), few=st.sampled_from([1, 5, V]), k=st.integers(1, V), p=st.floats(0.01, 0.999))
def test_kept_sets_on_ties_and_extremes(data, few, k, p):
    values = st.sampled_from([-3e38, -50.0, -1.0, -0.5, 0.25, 0.5, 7.0, 3e4, -np.inf])
    row = np.array(data.draw(st.lists(values, min_size=V, max_size=V)), np.float32)
    row[0] = 1.0  # a row of nothing but -inf is no distribution
    x = temper(jnp.asarray(row[None]), rows(1.0))
    candidates = likeliest(x)[:, :few]
    tempered = np.asarray(x[0])

    kth = np.sort(row)[::-1][k - 1]
    kept = tempered >= least_of_top_k(x, candidates, rows(k))
    np.testing.assert_array_equal((kept & np.isfinite(row)), np.isfinite(row) & (row >= kth))

    probability = np.exp(row.astype(np.float64) - row.max())
    probability /= probability.sum()
    kept = np.isfinite(row) & (tempered >= least_of_top_p(x, candidates, rows(p), rows(-np.inf)))
    larger = np.array([probability[row > value].sum() for value in row])
    sure = np.abs(larger - p) > 1e-5
    np.testing.assert_array_equal(kept[sure], (np.isfinite(row) & (larger < p))[sure])

    assert kept[row == row.max()].all()


def test_draw_never_takes_a_token_without_mass():
    # Masses so uneven that partial sums round; the masked tokens sit first, last and between.
    masses = jnp.where(jnp.arange(V) % 3 == 1, jnp.exp(jnp.linspace(-20.0, 0.0, V)), 0.0)
    count = 4_000
    tokens = draw(jnp.broadcast_to(masses, (count, V)), keys(5, count))
    assert (np.asarray(tokens) % 3 == 1).all()


def test_draw_is_in_proportion_across_blocks():
    # Three blocks, of which the second has nothing; each token within 5 standard errors of its probability.
    size, count = 2 * ops.BLOCK + 100, 2_000
    tokens = np.array([0, 7, ops.BLOCK - 1, 2 * ops.BLOCK, size - 1])
    p = np.array([0.1, 0.2, 0.05, 0.25, 0.4])
    masses = np.zeros(size, np.float32)
    masses[tokens] = 3 * p
    drawn = draw(jnp.broadcast_to(masses, (count, size)), keys(6, count))
    frequency = np.bincount(drawn, minlength=size) / count
    assert np.isin(drawn, tokens).all()
    np.testing.assert_array_less(np.abs(frequency[tokens] - p), 5 * np.sqrt(p * (1 - p) / count))
