"""Adapted weights against the weights that they are merged into."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import sharding
from qwen_jax.model.mlp import MLP
from qwen_jax.ops import mlp
from qwen_jax.ops.dropout import Dropout
from qwen_jax.ops.linear import contract
from qwen_jax.ops.lora import Adapted, merged
from tests.ops.test_mlp import CONFIG, INNER, WIDTH

# Float32 sums in another order, and of numbers that were added before they were multiplied.
RELATIVE = 2e-6
SCALE, RANK = 0.5, 3


def adapted(rng, outputs, inputs, *, dropout=None):
    """A random matrix with an adapter."""
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    w, a, b = draw(*outputs, *inputs), draw(RANK, *inputs), draw(*outputs, RANK)
    return Adapted(w=w, a=a, b=b, dropout=dropout, scale=SCALE)


def assert_close(got, want):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=RELATIVE * np.abs(y).max())


@pytest.mark.parametrize("pattern, outputs, inputs", [("btd,nhd->btnh", (4, 6), (8,)), ("btnh,dnh->btd", (8,), (4, 6))])
def test_a_product_is_that_of_the_merged_weight_on_every_mesh(pattern, outputs, inputs):
    rng = np.random.default_rng(0)
    w, x = adapted(rng, outputs, inputs), jnp.asarray(rng.standard_normal((2, 4, *inputs)), jnp.float32)

    def loss(ab, x):
        x = jax.sharding.reshard(x, sharding.activation(pattern.split(",")[0], x.shape))
        y = contract(pattern, x, Adapted(w=w.w, a=ab[0], b=ab[1], scale=SCALE))
        # Linear in y: a gradient that went by y would have its rounding once more, as often as y is large.
        return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=y.dtype).reshape(y.shape))), y

    found = []
    for sizes in ({}, dict(fsdp=2, tensor=2)):
        devices = jax.devices()[: int(np.prod(list(sizes.values())))]
        with jax.set_mesh(sharding.make_mesh(**sizes, devices=devices)):
            found.append(jax.device_get(jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))((w.a, w.b), x)))
    assert_close(found[1], found[0])
    (_, y), _ = found[0]
    whole = np.asarray(w.w, np.float64) + SCALE * np.tensordot(np.asarray(w.b, np.float64), w.a, axes=1)
    assert_close(y, np.tensordot(x, whole, (range(2, x.ndim), range(len(outputs), whole.ndim))))


@pytest.mark.usefixtures("mesh")
def test_merging_is_the_same_in_a_stack_of_layers():
    each = [adapted(np.random.default_rng(i), (4, 6), (8,)) for i in range(2)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    want = [np.asarray(w.w) + SCALE * np.tensordot(w.b, w.a, axes=1) for w in each]
    assert_close(merged(stack.w, stack.a, stack.b, SCALE), np.stack(want))
    assert_close(merged(each[0].w, each[0].a, each[0].b, SCALE), want[0])


@pytest.mark.usefixtures("mesh")
def test_what_is_frozen_costs_no_gradient():
    """A step computes a third less than one that trains the weights."""
    rng = np.random.default_rng(0)
    x, w = jnp.ones((4, 128, 256)), adapted(rng, (256,), (256,))

    def flops(w):
        def loss(x, w):
            x = jax.sharding.reshard(x, sharding.activation("btd", x.shape))
            return jnp.sum(contract("btd,fd->btf", x, w) ** 2)

        return jax.jit(jax.grad(loss, (0, 1))).lower(x, w).compile().cost_analysis()["flops"]

    assert flops(w) < 0.8 * flops(w.w)


def test_in_pieces_the_mlp_is_the_same_and_so_are_gradients(monkeypatch):
    rng = np.random.default_rng(0)
    shapes = dict(gate=(INNER, WIDTH), up=(INNER, WIDTH), down=(WIDTH, INNER))
    tree = {name: {"w": adapted(rng, (o,), (i,))} for name, (o, i) in shapes.items()}
    tree["up"]["w"] = tree["up"]["w"].w
    x = jnp.asarray(rng.standard_normal((2, 90, WIDTH)), jnp.float32)

    def values(sizes):
        def loss(tree, x):
            x = jax.sharding.reshard(x, sharding.activation("btd", x.shape))
            return jnp.sum(jnp.sin(0.01 * MLP(CONFIG, INNER).apply({"params": tree}, x)))

        devices = jax.devices()[: int(np.prod(list(sizes.values())))]
        with jax.set_mesh(sharding.make_mesh(**sizes, devices=devices)):
            return jax.device_get(jax.jit(jax.value_and_grad(loss, (0, 1)))(tree, x))

    whole = values({})
    monkeypatch.setattr(mlp, "PIECE", 16)
    for sizes in ({}, dict(fsdp=2, context=2, tensor=2)):
        found = values(sizes)
        assert not np.any(found[1][0]["gate"]["w"].w)
        assert_close(found, whole)


@pytest.mark.usefixtures("mesh")
def test_dropout_is_of_what_the_adapter_sees_and_keeps_its_mean():
    rng = np.random.default_rng(0)
    w, x = adapted(rng, (8,), (8,)), jnp.asarray(rng.standard_normal((1, 2, 8)), jnp.float32)

    @jax.jit
    def product(seed):
        drop = Dropout(key=jax.random.key(seed), rate=0.25)
        return contract("btd,fd->btf", x, Adapted(w=w.w, a=w.a, b=w.b, dropout=drop, scale=SCALE))

    each = np.stack([product(seed) for seed in range(225)])
    assert np.array_equal(product(3), each[3]) and not np.array_equal(each[3], each[4])
    plain = contract("btd,fd->btf", x, w)
    np.testing.assert_allclose(each.mean(0), plain, atol=5 * each.std(0).max() / 15)
