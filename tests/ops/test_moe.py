"""Experts in blocks of rows beside every expert on every token, and what the router's losses say."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import sharding
from qwen_jax.ops import router
from qwen_jax.ops.moe import apply_experts, dense
from qwen_jax.ops.router import Load, balance_loss, max_load, route, z_loss
from tests.ops.quantized import random
from tests.published import assert_close

EXPERTS, TOP_K, WIDTH, INNER = 8, 3, 8, 12


def choices(kind, rows, length):
    """Experts of each token: any three; the same three; those of one half; only the first and the last."""
    rng = np.random.default_rng(1)
    pick = {
        "any": lambda: rng.permutation(EXPERTS)[:TOP_K],
        "the same": lambda: [5, 2, 7],
        "half": lambda: rng.permutation(EXPERTS // 2)[:TOP_K],
    }[kind]
    return np.array([[pick() for _ in range(length)] for _ in range(rows)], np.int32)


def inputs(rows=8, length=6):
    rng = np.random.default_rng(0)
    normal = lambda *shape: (rng.normal(size=shape) / shape[-1] ** 0.5).astype(np.float32)
    x, weights = normal(rows, length, WIDTH), rng.random((rows, length, TOP_K), np.float32)
    matrices = normal(EXPERTS, INNER, WIDTH), normal(EXPERTS, INNER, WIDTH), normal(EXPERTS, WIDTH, INNER)
    return x, weights, matrices


def loss_of(function):
    def loss(x, weights, matrices, experts):
        y = function(x, weights, experts, *matrices)
        return (jnp.sin(y) ** 3).sum(), y

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


fast, slow = loss_of(apply_experts), loss_of(dense)
load = jax.jit(router.load)


@pytest.mark.parametrize("kind", ["any", "the same", "half"])
def test_the_fast_path_is_the_slow_one(mesh, kind):
    experts = choices(kind, 8, 6)
    got, want = fast(*inputs(), experts), slow(*inputs(), experts)
    assert_close(got, want)
    idle = sorted(set(range(EXPERTS)) - set(experts.ravel()))
    assert idle or kind == "any"
    for gradient in got[1][2]:
        assert not np.asarray(gradient)[idle].any()


def test_blocks_of_every_filling(mesh):
    """One expert of one token, and more rows than a block has, by one."""
    x, weights, matrices = inputs(1, 17)
    experts = np.where(np.arange(17)[None, :, None] < 16, [[[0, 1, 2]]], [[[3, 1, 0]]]).astype(np.int32)
    got, want = fast(x, weights, matrices, experts), slow(x, weights, matrices, experts)
    assert_close(got, want)


def test_quantised_experts_pass_gradients_on(mesh):
    """Those of tokens and of their weights, beside one matrix that has its own."""
    rng, (x, weights, (gate, up, down)) = np.random.default_rng(0), inputs()
    quantised = [random(rng, w.shape[1:], 1, bits=8, group=w.shape[2]) for w in (gate, down) for _ in range(EXPERTS)]
    gates, downs = quantised[:EXPERTS], quantised[EXPERTS:]
    stack = lambda parts: jax.tree.map(lambda *each: jnp.stack(each), *(w for w, _ in parts))
    wide = lambda parts: np.stack([w for _, w in parts])

    def loss(own, function, gate, down):
        x, weights, up = own
        return (jnp.sin(function(x, weights, jnp.asarray(choices("any", 8, 6)), gate, up, down)) ** 3).sum()

    of = jax.jit(jax.grad(loss), static_argnums=1)
    whole = [dataclasses.replace(w, shape=(EXPERTS, *w.shape)) for w in (stack(gates), stack(downs))]
    got = of((x, weights, up), apply_experts, *whole)
    assert_close(got, of((x, weights, up), dense, wide(gates), wide(downs)))


@pytest.mark.parametrize("sizes", [dict(expert=4), dict(expert=2, tensor=2, context=2), dict(fsdp=2, expert=2, data=2)])
@pytest.mark.parametrize("kind", ["any", "the same"])
def test_every_mesh_computes_the_same(sizes, kind):
    experts = choices(kind, 8, 6)
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        want = slow(*inputs(), experts)
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    with jax.set_mesh(sharding.make_mesh(devices=devices, **sizes)):
        x, weights, matrices = inputs()
        split = lambda x: jax.device_put(x, sharding.activation("bt" + "." * (x.ndim - 2), x.shape))
        of = lambda letters, w: jax.device_put(w, sharding.weight(letters, w.shape))
        matrices = tuple(of(letters, w) for letters, w in zip(("efd", "efd", "edf"), matrices, strict=True))
        got = fast(split(x), split(weights), matrices, split(experts))
        for gradient, matrix in zip(got[1][2], matrices, strict=True):
            assert gradient.sharding.spec == matrix.sharding.spec
    assert_close(got, want)


def test_bfloat16_is_accumulated_in_float32(mesh):
    x, weights, matrices = inputs()
    experts = choices("any", 8, 6)
    apply = jax.jit(apply_experts)
    exact, low = (apply(x.astype(t), weights.astype(t), experts, *matrices) for t in ("float32", "bfloat16"))
    assert low.dtype == jnp.bfloat16
    # 8 bits of inputs, of what goes into the last product, and of the sum.
    assert np.abs(exact - low.astype(jnp.float32)).max() < 0.02 * np.abs(exact).max()


def test_weights_are_those_of_the_most_probable(mesh):
    logits = jnp.log(jnp.array([[[0.1, 0.4, 0.2, 0.3]]]))
    weights, experts = route(logits, top_k=2, normalize=False)
    np.testing.assert_array_equal(experts, [[[1, 3]]])
    np.testing.assert_allclose(weights, [[[0.4, 0.3]]], rtol=1e-6)
    weights, _ = route(logits, top_k=2, normalize=True)
    np.testing.assert_allclose(weights, [[[4 / 7, 3 / 7]]], rtol=1e-6)
    assert route(logits.astype(jnp.bfloat16), top_k=2, normalize=True)[0].dtype == jnp.bfloat16


def layers(*each: Load) -> Load:
    return jax.tree.map(lambda *x: jnp.stack(x), *each)


def test_even_routing_costs_top_k(mesh):
    experts = np.array([[[0, 1], [2, 3], [1, 0], [3, 2]]], np.int32)
    even = layers(*[load(jnp.zeros((1, 4, 4)), experts, None)] * 2)
    for by_row in (False, True):
        np.testing.assert_allclose(balance_loss(even, 2, by_row=by_row), 2, rtol=1e-6)
    np.testing.assert_allclose(max_load(even), 1)
    np.testing.assert_allclose(z_loss(even, 2), np.log(4) ** 2, rtol=1e-6)


def test_rows_that_are_uneven_in_opposite_ways_are_even_as_a_batch(mesh):
    logits = np.zeros((2, 3, 4), np.float32)
    logits[0, :, :2] = logits[1, :, 2:] = 9
    experts = np.argsort(-logits, axis=-1, kind="stable")[..., :2].astype(np.int32)
    both = layers(load(jnp.asarray(logits), experts, None))
    np.testing.assert_allclose(balance_loss(both, 2, by_row=False), 2, rtol=1e-3)
    np.testing.assert_allclose(balance_loss(both, 2, by_row=True), 4, rtol=1e-3)


def test_padding_does_not_count(mesh):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 5, 4)).astype(np.float32)
    _, experts = route(jnp.asarray(logits), top_k=2, normalize=False)
    segments = np.array([[1, 1, 2, 0, 0], [0, 0, 0, 0, 0]], np.int32)
    padded = layers(load(jnp.asarray(logits), experts, segments))
    alone = layers(load(jnp.asarray(logits[:1, :3]), experts[:1, :3], None))
    for by_row in (False, True):
        np.testing.assert_allclose(
            balance_loss(padded, 2, by_row=by_row), balance_loss(alone, 2, by_row=by_row), rtol=1e-6
        )
    for measure in (lambda each: z_loss(each, 2), max_load):
        np.testing.assert_allclose(measure(padded), measure(alone), rtol=1e-6)
    nothing = layers(load(jnp.asarray(logits), experts, np.zeros((2, 5), np.int32)))
    assert float(balance_loss(nothing, 2, by_row=True)) == float(z_loss(nothing, 2)) == float(max_load(nothing)) == 0
