"""The chunked cross-entropy against the plain one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.ops import loss as loss_ops
from qwen_jax.ops.loss import chunked_cross_entropy, token_log_probs


def plain(hidden, table, targets, weights):
    logits = jnp.einsum("btd,vd->btv", hidden, table)
    of_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return (weights * (jax.nn.logsumexp(logits, axis=-1) - of_target)).sum()


@pytest.mark.parametrize("chunk", [128, 200, 300, 2**25])  # of 300 rows: 3, the last filled up, 2, and 1
def test_value_and_gradients_equal_the_plain_loss(mesh, chunk, monkeypatch):
    monkeypatch.setattr(loss_ops, "_LOGITS", 33 * chunk)
    monkeypatch.setattr(loss_ops, "_LEAST_ROWS", 1)
    rng = np.random.default_rng(0)
    hidden, table = (
        jnp.asarray(rng.normal(size=(3, 11, 8)), jnp.float32),
        jnp.asarray(rng.normal(size=(300, 8)), jnp.float32),
    )
    targets = jnp.asarray(rng.integers(0, 300, (3, 11)), jnp.int32)
    weights = jnp.asarray(rng.random((3, 11)) * (rng.random((3, 11)) < 0.7), jnp.float32)
    got = jax.value_and_grad(lambda h, t: 3 * chunked_cross_entropy(h, t, targets, weights), (0, 1))(hidden, table)
    want = jax.value_and_grad(lambda h, t: 3 * plain(h, t, targets, weights), (0, 1))(hidden, table)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)
    without_gradient = 3 * chunked_cross_entropy(hidden, table, targets, weights)
    np.testing.assert_allclose(without_gradient, want[0], rtol=1e-6)


def test_huge_logits_do_not_overflow(mesh):
    hidden, table = jnp.full((1, 2, 4), 50.0), jnp.array([[1.0] * 4, [-1.0] * 4, [0.5] * 4])
    targets, weights = jnp.array([[0, 1]]), jnp.ones((1, 2))
    got = jax.value_and_grad(chunked_cross_entropy, (0, 1))(hidden, table, targets, weights)
    np.testing.assert_allclose(got[0], 400.0, rtol=1e-6)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))


def test_log_probabilities_of_tokens_and_their_gradients_equal_the_plain_ones(mesh, monkeypatch):
    """In three chunks, under a function that weighs each token by what it is."""
    monkeypatch.setattr(loss_ops, "_LOGITS", 33 * 128)
    monkeypatch.setattr(loss_ops, "_LEAST_ROWS", 1)
    rng = np.random.default_rng(0)
    hidden, table = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3, 11, 8), (300, 8)))
    targets = jnp.asarray(rng.integers(0, 300, (3, 11)), jnp.int32)

    def plain_log_probs(hidden, table, targets):
        logits = jnp.einsum("btd,vd->btv", hidden, table)
        return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]

    def of(log_probs):
        values = lambda h, t: (log_probs(h, t, targets),) * 2
        return jax.value_and_grad(lambda h, t: (jnp.sin(values(h, t)[0]).sum(), values(h, t)[1]), (0, 1), has_aux=True)

    got, want = (of(each)(hidden, table) for each in (token_log_probs, plain_log_probs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)
