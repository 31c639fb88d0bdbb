"""Matrix products whose einsum string says everything: shape, contraction and, through its letters, sharding."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from qwen_jax import sharding

# A product of at most this many rows does little more than read the weight.
_FEW_ROWS = 32


def contract(pattern: str, x: Float[Array, "..."], w: Float[Array, "..."]) -> Float[Array, "..."]:
    """`einsum(pattern, x, w)` for an activation x and a parameter w as stored, e.g. "btd,nhd->btnh".

    The result's letters are what is left of x's, then what is left of w's. w is cast to x's dtype and gathered along
    fsdp; the result has x's dtype and the sharding of its letters.
    """
    letters = pattern.split("->")[0].split(",")[1]
    return _contract(pattern, x, sharding.gather(w.astype(x.dtype), letters))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _contract(pattern, x, w):
    return product(pattern, x, w).astype(x.dtype)


def _forward(pattern, x, w):
    return _contract(pattern, x, w), (x, w)


def _backward(pattern, saved, dy):
    # Written out, because autodiff of a product that accumulates in float32 would run both of these with
    # float32 operands: cotangents stay in the activations' dtype, as the forward operands do.
    x, w = saved
    inputs, out = pattern.split("->")
    xs, ws = inputs.split(",")
    dx = product(f"{out},{ws}->{xs}", dy, w).astype(x.dtype)
    dw = _weight_gradient(x, dy, xs, ws, out, w.shape)
    return dx, dw.astype(w.dtype)


_contract.defvjp(_forward, _backward)


def product(pattern: str, x: Float[Array, "..."], w: Float[Array, "..."]) -> Float[Array, "..."]:
    """`contract` of a w that is gathered already, in float32."""
    inputs, out = pattern.split("->")
    xs, ws = inputs.split(",")
    shared = [letter for letter in ws if letter in xs]
    dims = [xs.index(letter) for letter in shared], [ws.index(letter) for letter in shared]
    sizes = dict(zip(xs + ws, x.shape + w.shape, strict=True))
    split = lambda letters: sharding.activation(letters, [sizes[letter] for letter in letters])

    def x_first(x, w):
        return _dot(x, w, dims, split(out))

    def w_first(x, w):
        outputs = len(ws) - len(shared)
        y = _dot(w, x, dims[::-1], split(out[-outputs:] + out[:-outputs]))
        # The barrier keeps the compiler from turning the product round again.
        return jnp.moveaxis(jax.lax.optimization_barrier(y), range(outputs), range(-outputs, 0))

    if math.prod(sizes[letter] for letter in xs if letter not in shared) > _FEW_ROWS or x.dtype != jnp.float32:
        return x_first(x, w)
    # XLA's CPU backend copies a right operand into panels before it multiplies, and reads a left one where it lies:
    # two to three times faster when there is little else to do. Not so in bfloat16.
    return jax.lax.platform_dependent(x, w, cpu=w_first, default=x_first)


def _weight_gradient(x, dy, xs, ws, out, shape):
    rows = [letter for letter in xs if letter not in ws]
    dims = [xs.index(letter) for letter in rows], [out.index(letter) for letter in rows]
    inputs = sum(letter in xs for letter in ws)
    split = lambda letters: sharding.gathered(letters, [shape[ws.index(letter)] for letter in letters])

    def x_first(x, dy):
        dw = _dot(x, dy, dims, split(ws[-inputs:] + ws[:-inputs]))
        return jnp.moveaxis(jax.lax.optimization_barrier(dw), range(inputs), range(-inputs, 0))

    def dy_first(x, dy):
        return _dot(dy, x, dims[::-1], split(ws))

    # XLA's CPU backend turns the left operand round: x once for all products it went into, or each of their dy.
    return jax.lax.platform_dependent(x, dy, cpu=x_first, default=dy_first)


def _dot(a: Array, b: Array, dims: tuple[Sequence[int], Sequence[int]], split: P) -> Array:
    return jax.lax.dot_general(a, b, (dims, ((), ())), preferred_element_type=jnp.float32, out_sharding=split)
