"""Every implementation of attention against the formula: values and gradients over a grid of masks."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import sharding
from qwen_jax.errors import ConfigError
from qwen_jax.ops.attention import attention
from qwen_jax.ops.mask import Mask

# Same sums in another order, in float32.
ROUNDING = dict(rtol=2e-5, atol=2e-6)


def arrays(batch, queries, keys, heads, kv_heads, dim, dtype=jnp.float32):
    rng = np.random.default_rng(queries)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    return draw(batch, queries, heads, dim), draw(batch, kv_heads, keys, dim), draw(batch, kv_heads, keys, dim)


def packed(batch, length, window=None, aligned=True):
    rng = np.random.default_rng(length)
    starts = rng.random((batch, length)) < 4 / length
    starts[:, 0] = True
    segments = starts.cumsum(axis=1)
    positions = np.arange(length) - np.maximum.accumulate(np.where(starts, np.arange(length), 0), axis=1)
    ids = {"positions": jnp.asarray(positions, jnp.int32), "segments": jnp.asarray(segments, jnp.int32)}
    sides = {f"{side}_{name}": value for side in ("query", "key") for name, value in ids.items()}
    return Mask(**sides, window=None if window is None else jnp.int32(window), aligned=aligned)


def cached(batch, queries, keys, offset):
    at = jnp.broadcast_to(offset + jnp.arange(queries), (batch, queries))
    return Mask(query_positions=at, key_positions=jnp.broadcast_to(jnp.arange(keys), (batch, keys)))


CASES = {
    "packed": (arrays(2, 300, 300, 4, 2, 8), packed(2, 300)),
    "packed, not known to be aligned": (arrays(2, 40, 40, 4, 2, 8), packed(2, 40, aligned=False)),
    "packed, window": (arrays(2, 260, 260, 4, 1, 8), packed(2, 260, window=7)),
    "window of one": (arrays(1, 9, 9, 2, 2, 8), packed(1, 9, window=1)),
    "one query": (arrays(3, 1, 20, 6, 2, 4), cached(3, 1, 20, 11)),
    "chunk against a cache": (arrays(2, 700, 900, 2, 1, 4), cached(2, 700, 900, 150)),
    "no grouping": (arrays(1, 33, 33, 3, 3, 6), packed(1, 33)),
}


@pytest.mark.parametrize("case", CASES)
def test_blockwise_equals_the_formula(mesh, case):
    qkv, mask = CASES[case]
    weights = jnp.asarray(np.random.default_rng(0).normal(size=qkv[0].shape), jnp.float32)

    def loss(qkv, implementation):
        out = attention(*qkv, mask, implementation=implementation)
        return (out * weights).sum(), out

    grad = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    (gradients, out), (expected_gradients, expected) = grad(qkv, "xla"), grad(qkv, "reference")
    np.testing.assert_allclose(out, expected, **ROUNDING)
    for name, a, b in zip("qkv", gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=name)


def test_bfloat16_accumulates_in_float32(mesh):
    qkv, mask = CASES["packed"]
    low = tuple(x.astype(jnp.bfloat16) for x in qkv)
    exact = attention(*(x.astype(jnp.float32) for x in low), mask, implementation="reference")
    out = attention(*low, mask, implementation="xla")
    assert out.dtype == jnp.bfloat16
    # One rounding of the probabilities and one of the result, 2^-9 each, of values up to about 4.
    np.testing.assert_allclose(out.astype(jnp.float32), exact, rtol=0.02, atol=0.02)


def test_padding_rows_are_finite(mesh):
    """A query that sees no key, as in a row of nothing but padding, gives numbers and no NaN."""
    (q, k, v), _ = CASES["one query"]
    blind = Mask(query_positions=jnp.full((3, 1), -1), key_positions=jnp.broadcast_to(jnp.arange(20), (3, 20)))
    grad = jax.grad(lambda q: attention(q, k, v, blind, implementation="xla").sum())(q)
    assert np.isfinite(grad).all()


@pytest.mark.parametrize("sizes", [dict(context=4, data=2), dict(tensor=4), dict(tensor=2, context=2)])
def test_split_attention_equals_whole(sizes):
    qkv, mask = arrays(2, 32, 32, 4, 2, 8), packed(2, 32)
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        expected = np.asarray(attention(*qkv, mask, implementation="xla"))
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    with jax.set_mesh(sharding.make_mesh(devices=devices, **sizes)):
        split = [
            jax.device_put(np.asarray(x), sharding.activation(s, x.shape))
            for x, s in zip(qkv, ("btnh", "bksh", "bksh"), strict=True)
        ]
        out = jax.jit(lambda qkv, mask: attention(*qkv, mask, implementation="xla"))(
            split, jax.tree.map(np.asarray, mask)
        )
        np.testing.assert_allclose(out, expected, **ROUNDING)


KERNEL = {
    "packed, window": (arrays(2, 40, 40, 4, 2, 8), packed(2, 40, window=7)),
    "chunk against a cache": (arrays(2, 24, 48, 4, 2, 8), cached(2, 24, 48, 10)),
}


@pytest.mark.parametrize("case", KERNEL)
def test_the_kernel_equals_the_formula(mesh, case):
    qkv, mask = KERNEL[case]
    run = jax.jit(lambda qkv, name: attention(*qkv, mask, implementation=name), static_argnums=1)
    np.testing.assert_allclose(run(qkv, "pallas"), run(qkv, "reference"), **ROUNDING)


@pytest.mark.parametrize("balanced", [True, False])
def test_the_kernel_on_a_split_sequence_equals_the_whole(balanced):
    qkv, mask = arrays(2, 64, 64, 4, 2, 8), packed(2, 64)
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        expected = np.asarray(attention(*qkv, mask, implementation="reference"))
    with jax.set_mesh(sharding.make_mesh(context=2, tensor=2, devices=jax.devices()[:4])):
        order = sharding.balanced_columns(64) if balanced else np.arange(64)
        (q, k, v), columns = map(np.asarray, qkv), dataclasses.replace(mask, balanced=balanced)
        columns = jax.tree.map(lambda x: np.asarray(x)[:, order], columns)
        out = jax.jit(lambda *qkv: attention(*qkv, columns, implementation="pallas"))(
            q[:, order], k[:, :, order], v[:, :, order]
        )
        np.testing.assert_allclose(out, expected[:, order], **ROUNDING)


@pytest.mark.parametrize(
    "implementation, case, reason",
    [
        ("cudnn", "no grouping", "this mesh is of cpu"),
        ("pallas", "packed, not known to be aligned", "cannot compare packed documents"),
    ],
)
def test_what_an_implementation_cannot_do_is_refused(mesh, implementation, case, reason):
    qkv, mask = CASES[case]
    with pytest.raises(ConfigError, match=reason):
        attention(*qkv, mask, implementation=implementation)
