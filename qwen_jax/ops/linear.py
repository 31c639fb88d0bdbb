"""Matrix products whose einsum string says everything: shape, contraction and, through its letters, sharding."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qwen_jax import sharding


def contract(pattern: str, x: Float[Array, "..."], w: Float[Array, "..."]) -> Float[Array, "..."]:
    """`einsum(pattern, x, w)` for an activation x and a parameter w as stored, e.g. "btd,dnh->btnh".

    w is cast to x's dtype and gathered along fsdp; the result has x's dtype and the sharding of its letters.
    """
    letters = pattern.split("->")[0].split(",")[1]
    return _contract(pattern, x, sharding.gather(w.astype(x.dtype), letters))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _contract(pattern, x, w):
    return _einsum(pattern, x, w, sharding.activation)


def _forward(pattern, x, w):
    return _contract(pattern, x, w), (x, w)


def _backward(pattern, saved, dy):
    # Written out, because autodiff of a product that accumulates in float32 would run both of these with
    # float32 operands: cotangents stay in the activations' dtype, as the forward operands do.
    x, w = saved
    inputs, out = pattern.split("->")
    xs, ws = inputs.split(",")
    dx = _einsum(f"{out},{ws}->{xs}", dy, w, sharding.activation)
    dw = _einsum(f"{xs},{out}->{ws}", x, dy, sharding.gathered)
    return dx, dw


_contract.defvjp(_forward, _backward)


def _einsum(pattern, a, b, split):
    inputs, out = pattern.split("->")
    sizes = dict(zip(inputs.replace(",", ""), a.shape + b.shape, strict=True))
    spec = split(out, [sizes[letter] for letter in out])
    y = jnp.einsum(pattern, a, b, preferred_element_type=jnp.float32, out_sharding=spec)
    return y.astype(a.dtype)
