"""Products of activations and weights, and their gradients, against plain einsum."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import sharding
from qwen_jax.ops.linear import contract

PATTERNS = {"btd,nhd->btnh": ((6,), (3, 4, 6)), "btnh,dnh->btd": ((3, 4), (6, 3, 4)), "btd,fd->btf": ((6,), (5, 6))}
# Sums of a few products, taken in another order; in bfloat16, rounded once.
TOLERANCE = {"float32": 1e-6, "bfloat16": 1e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [(2, 3), (2, 40)], ids=["few", "many"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_value_and_gradients_are_those_of_einsum(mesh, pattern, rows, dtype):
    inputs, of_weight = PATTERNS[pattern]
    draw = np.random.default_rng(0).normal
    x, w = jnp.asarray(draw(size=rows + inputs), dtype), jnp.asarray(draw(size=of_weight), dtype)

    @jax.jit
    def both(x, w):
        letters = pattern.split(",")[0]
        x = jax.sharding.reshard(x, sharding.activation(letters, x.shape))
        split = sharding.activation(pattern.split("->")[1], [2] * len(pattern.split("->")[1]))
        plain = lambda x, w: jnp.einsum(pattern, x, w, out_sharding=split)
        wide = (x.astype(jnp.float32), w.astype(jnp.float32))
        y, back = jax.vjp(lambda x, w: contract(pattern, x, w), x, w)
        expected, expected_back = jax.vjp(plain, *wide)
        return (y, *back(y)), (expected, *expected_back(y.astype(jnp.float32)))

    ours, theirs = both(x, w)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype
        scale = np.abs(b).max()
        np.testing.assert_allclose(np.asarray(a, np.float32) / scale, b / scale, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("pattern", ["btd,df->btf", "btd,fd->bft", "btd,hdn->btnh", "bdt,fd->btf"])
def test_letters_in_another_order_are_refused(mesh, pattern):
    with pytest.raises(ValueError, match="rows"):
        contract(pattern, jnp.ones((2, 2, 2)), jnp.ones((2,) * (pattern.index("-") - 4)))
