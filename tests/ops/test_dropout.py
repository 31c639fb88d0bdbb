"""Randomness without state."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.errors import ConfigError
from qwen_jax.ops import blockwise
from qwen_jax.ops.attention import attention
from qwen_jax.ops.dropout import Dropout, noisy
from qwen_jax.ops.mask import Mask

pytestmark = pytest.mark.usefixtures("mesh")

RATE = 0.25
SEGMENTS = np.array([[1, 1, 2, 2, 2, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]], np.int32)


def test_noise_is_as_long_as_its_row_says():
    x = jnp.zeros((2, 8, 1000))
    noise = np.asarray(noisy(x, jnp.asarray(SEGMENTS), alpha=5.0, key=jax.random.key(0)))
    for row, tokens in enumerate((5, 8)):
        most = 5 / np.sqrt(tokens * 1000)
        assert 0.99 * most < np.abs(noise[row]).max() <= most * (1 + 1e-6)
        np.testing.assert_allclose(noise[row].std(), most / np.sqrt(3), rtol=0.02)


def heads(length, dim=4):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    return draw(1, length, 4, dim), draw(1, 2, length, dim), draw(1, 2, length, dim)


def mask(length, seed=None):
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    dropout = None if seed is None else Dropout(key=jax.random.key(seed), rate=RATE)
    return Mask(query_positions=positions, key_positions=positions, aligned=True, dropout=dropout)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_attention_weights_that_are_left_out_leave_the_mean_as_it_is(implementation):
    q, k, v = heads(6)
    make = jax.jit(lambda seed: attention(q, k, v, mask(6, seed), implementation=implementation))
    each = np.stack([make(seed) for seed in range(225)])
    plain = attention(q, k, v, mask(6), implementation=implementation)
    np.testing.assert_allclose(each.mean(0), plain, atol=5 * each.std(0).max() / 15)
    alone = each[:, 0, 0] / np.asarray(plain)[0, 0]  # the first token sees itself, or nothing
    np.testing.assert_allclose(np.unique(np.round(alone, 4)), [0, 1 / (1 - RATE)], atol=1e-4)


def test_gradients_of_blocks_are_those_of_the_same_choice():
    """In several blocks, against the formula with the choice that the blocks make."""
    length, (q, k, v) = 144, heads(144)
    drop = mask(length, 7).dropout.fold(0)
    keep = np.zeros((1, 4, length, length), bool)
    for number, (tokens, rows, keys) in enumerate(blockwise._blocks(q.reshape(1, 2, -1, 4), mask(length))):
        shape = (1, 2, rows.stop - rows.start, keys.stop)
        chosen = drop.fold(number).keep(shape).reshape(1, 2, -1, 2, keys.stop).transpose(0, 1, 3, 2, 4)
        keep[:, :, tokens, keys] = chosen.reshape(1, 4, -1, keys.stop)

    def formula(q, k, v):
        k, v = jnp.repeat(k, 2, axis=1), jnp.repeat(v, 2, axis=1)
        scores = jnp.einsum("btnh,bnsh->bnts", q, k) * 0.5
        probs = jax.nn.softmax(jnp.where(np.tri(length, dtype=bool), scores, -1e30), axis=-1)
        return jnp.einsum("bnts,bnsh->btnh", jnp.where(keep, probs / (1 - RATE), 0), v)

    blocks = lambda q, k, v: attention(q, k, v, mask(length, 7), implementation="xla")
    results = []
    for compute in (blocks, formula):
        loss = lambda q, k, v, compute=compute: jnp.sum(jnp.sin(compute(q, k, v)))
        results.append(jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v))
    for found, want in zip(jax.tree.leaves(results[0]), jax.tree.leaves(results[1]), strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["pallas", "cudnn"])
def test_what_cannot_leave_weights_out_says_so(implementation):
    with pytest.raises(ConfigError, match="has no dropout of attention; choose 'auto' or 'xla'"):
        attention(*heads(6), mask(6, 0), implementation=implementation)
