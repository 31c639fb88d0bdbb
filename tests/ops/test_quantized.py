"""Products with quantised weights against those with the same weights made wide first."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import sharding
from qwen_jax.errors import ConfigError
from qwen_jax.ops.embedding import embed
from qwen_jax.ops.linear import contract
from qwen_jax.ops.quantized import Quantized
from tests.ops.quantized import random

# Sums in another order, of numbers whose zeros are taken off in the sum; in bfloat16, rounded once.
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}


@functools.partial(jax.jit, static_argnums=0)
def both(pattern: str, x: jax.Array, w: Quantized, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The product, and what it takes dy back to."""
    y, pull = jax.vjp(lambda x: contract(pattern, x, w), x)
    return y, pull(jax.sharding.reshard(dy, jax.typeof(y).sharding.spec))[0]


def check(pattern: str, x: jax.Array, w: Quantized, wide: np.ndarray) -> None:
    """The product with w and the gradient of its activations, against einsum of what w stands for."""
    xs, ws, out = pattern.replace("->", ",").split(",")
    want = np.einsum(pattern, np.asarray(x, np.float64), wide.astype(np.float64))
    dy = jnp.asarray(np.random.default_rng(1).standard_normal(want.shape), x.dtype)
    back = np.einsum(f"{out},{ws}->{xs}", np.asarray(dy, np.float64), wide.astype(np.float64))
    got = both(pattern, jax.sharding.reshard(x, sharding.activation(xs, x.shape)), w, dy)
    for found, wanted, letters in zip(got, (want, back), (out, xs), strict=True):
        assert found.dtype == x.dtype and found.shape == wanted.shape
        assert found.sharding.spec == sharding.activation(letters, wanted.shape)
        atol = TOLERANCE[str(x.dtype)] * np.abs(wanted).max()
        np.testing.assert_allclose(np.asarray(found, np.float64), wanted, atol=atol)


@pytest.mark.parametrize("rows", [(1, 1), (2, 2), (2, 40)], ids=["one", "few", "many"])
@pytest.mark.parametrize("bits, group, zeros", [(4, 32, False), (4, 64, True), (8, 32, True), (8, 192, False)])
def test_is_that_of_the_wide_weight(mesh, rows, bits, group, zeros):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((*rows, 192)), jnp.float32)
    for packed in (True, False):
        check("btd,nhd->btnh", x, *random(rng, (3, 100, 192), 1, bits=bits, group=group, zeros=zeros, packed=packed))


@pytest.mark.parametrize("rows", [(1, 2), (2, 40)], ids=["few", "many"])
def test_in_bfloat16(mesh, rows):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((*rows, 4, 16)), jnp.bfloat16)
    for packed in (True, False):
        check("btnh,dnh->btd", x, *random(rng, (40, 4, 16), 2, bits=4, group=32, packed=packed))


@pytest.mark.parametrize("pattern, shape, inputs", [("btd,fd->btf", (24, 64), 1), ("btf,df->btd", (24, 64), 1)])
@pytest.mark.parametrize("packed", [True, False])
def test_split_over_tensor(pattern, shape, inputs, packed):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 3, 64)), jnp.float32)
    with jax.set_mesh(sharding.make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4])):
        for bits, group in ((4, 32), (8, 64)):
            w, wide = random(rng, shape, inputs, bits=bits, group=group, packed=packed)
            check(pattern, x, w, wide)


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("packed, zeros", [(True, False), (False, False), (True, True), (False, True)])
def test_a_table_is_looked_up_and_is_a_head(packed, zeros, tensor):
    rng = np.random.default_rng(0)
    w, wide = random(rng, (24, 64), 1, bits=8, group=64, zeros=zeros, packed=packed, table=True)
    ids = np.array([[0, 23, 11, 12], [5, 5, 24, -1]])
    with jax.set_mesh(sharding.make_mesh(fsdp=2, tensor=tensor, devices=jax.devices()[: 2 * tensor])):
        tokens = jax.sharding.reshard(jnp.asarray(ids, jnp.int32), sharding.activation("bt", ids.shape))
        found = jax.jit(functools.partial(embed, dtype=jnp.dtype("float32")))(tokens, w)
        for rows in (2, 40):
            check("btd,vd->btv", jnp.asarray(rng.standard_normal((2, rows, 64)), jnp.float32), w, wide)
    known = (ids >= 0) & (ids < 24)
    np.testing.assert_array_equal(found, np.where(known[..., None], wide[np.where(known, ids, 0)], np.nan))


def test_a_group_is_not_split():
    with jax.set_mesh(sharding.make_mesh(tensor=4, devices=jax.devices()[:4])):
        w, _ = random(np.random.default_rng(0), (24, 64), 1, bits=4, group=32)
        with pytest.raises(ConfigError, match="2 groups .* 4 ways"):
            contract("btf,df->btd", jnp.ones((1, 1, 64)), w)


@pytest.mark.parametrize("rows", [2, 64])
def test_no_wide_copy_is_made(mesh, rows):
    """What a product and its way back take beside their operands is far below the weight as float32."""
    w, wide = random(np.random.default_rng(0), (1024, 1024), 1, bits=4, group=128)
    x = jnp.ones((1, rows, 1024))
    memory = both.lower("btd,fd->btf", x, w, x).compile().memory_analysis()
    assert memory.argument_size_in_bytes - 2 * x.nbytes < wide.nbytes * (0.125 + 2 / 512 + 0.001)
    assert memory.temp_size_in_bytes < wide.nbytes / 4


def test_the_weight_of_an_expert(mesh):
    rng = np.random.default_rng(0)
    parts = [random(rng, (24, 64), 1, bits=4, group=32, zeros=True) for _ in range(3)]
    stacked = jax.tree.map(lambda *each: jnp.stack(each), *(w for w, _ in parts))
    stacked = dataclasses.replace(stacked, shape=(3, 24, 64))
    check("btd,fd->btf", jnp.asarray(rng.standard_normal((1, 1, 64)), jnp.float32), stacked[jnp.int32(1)], parts[1][1])
