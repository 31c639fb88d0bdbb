"""Products with quantised weights against those with the same weights made wide first."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import sharding
from qwen_jax.errors import ConfigError
from qwen_jax.ops.linear import contract
from qwen_jax.ops.quantized import Quantized
from tests.ops.quantized import random

# Sums in another order, of numbers whose zeros are taken off in the sum; in bfloat16, rounded once.
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}


def check(pattern: str, x: jax.Array, w: Quantized, wide: np.ndarray) -> None:
    xs, out = pattern.split(",")[0], pattern.split("->")[1]
    got = jax.jit(lambda x, w: contract(pattern, x, w))(jax.sharding.reshard(x, sharding.activation(xs, x.shape)), w)
    want = np.einsum(pattern, np.asarray(x, np.float64), wide.astype(np.float64))
    assert got.dtype == x.dtype and got.shape == want.shape
    assert got.sharding.spec == sharding.activation(out, want.shape)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=TOLERANCE[str(x.dtype)] * np.abs(want).max())


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


def test_a_group_is_not_split():
    with jax.set_mesh(sharding.make_mesh(tensor=4, devices=jax.devices()[:4])):
        w, _ = random(np.random.default_rng(0), (24, 64), 1, bits=4, group=32)
        with pytest.raises(ConfigError, match="2 groups .* 4 ways"):
            contract("btf,df->btd", jnp.ones((1, 1, 64)), w)


def test_a_gradient_is_refused(mesh):
    w, _ = random(np.random.default_rng(0), (24, 64), 1, bits=4, group=32)
    with pytest.raises(ConfigError, match="for decoding"):
        jax.grad(lambda x: contract("btd,fd->btf", x, w).sum())(jnp.ones((1, 1, 64)))


@pytest.mark.parametrize("rows", [2, 64])
def test_no_wide_copy_is_made(mesh, rows):
    """What a product takes beside its operands is far below the weight as float32."""
    w, wide = random(np.random.default_rng(0), (1024, 1024), 1, bits=4, group=128)
    x = jnp.ones((1, rows, 1024))
    memory = jax.jit(lambda x, w: contract("btd,fd->btf", x, w)).lower(x, w).compile().memory_analysis()
    assert memory.argument_size_in_bytes - x.nbytes < wide.nbytes * (0.125 + 2 / 512 + 0.001)
    assert memory.temp_size_in_bytes < wide.nbytes / 4


def test_the_weight_of_an_expert(mesh):
    rng = np.random.default_rng(0)
    parts = [random(rng, (24, 64), 1, bits=4, group=32, zeros=True) for _ in range(3)]
    stacked = jax.tree.map(lambda *each: jnp.stack(each), *(w for w, _ in parts))
    stacked = dataclasses.replace(stacked, shape=(3, 24, 64))
    check("btd,fd->btf", jnp.asarray(rng.standard_normal((1, 1, 64)), jnp.float32), stacked[jnp.int32(1)], parts[1][1])
