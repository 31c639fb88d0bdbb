"""Matrix products whose einsum string says everything: shape, contraction and, through its letters, sharding."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from qwen_jax import sharding
from qwen_jax.ops import quantized
from qwen_jax.ops.lora import Adapted
from qwen_jax.ops.quantized import Quantized

# A product of at most this many rows does little more than read the weight.
_FEW_ROWS = 64


def contract(pattern: str, x: Float[Array, "..."], w: Float[Array, "..."] | Quantized | Adapted) -> Float[Array, "..."]:
    """`einsum(pattern, x, w)` for an activation x and a parameter w as stored, e.g. "btd,nhd->btnh".

    The letters of w are the outputs, then the inputs, which end x; the result has x's rows, then the outputs.
    w is cast to x's dtype and gathered along fsdp; the result has x's dtype and the sharding of its letters.
    A quantised w is whole along fsdp, and has no gradient: x alone does. Of an adapted w only the adapter has one.
    """
    xs, ws, out = letters(pattern)
    inputs = "".join(letter for letter in ws if letter in xs)
    rows, outputs = xs.removesuffix(inputs), ws.removesuffix(inputs)
    if (xs, ws, out) != (rows + inputs, outputs + inputs, rows + outputs):
        raise ValueError(f"{pattern!r} is not rows + inputs, outputs + inputs -> rows + outputs")
    if isinstance(w, Adapted):
        few = contract(f"{xs},r{inputs}->{rows}r", w.dropout(x) if w.dropout else x, w.a)
        change = contract(f"{rows}r,{outputs}r->{rows}{outputs}", few, w.b)
        return contract(pattern, x, jax.lax.stop_gradient(w.w)) + w.scale * change
    if isinstance(w, Quantized):
        return quantized.contract(xs, outputs, inputs, x, w, dtype=x.dtype)
    return _contract(pattern, x, jax.sharding.reshard(w.astype(x.dtype), sharding.weight(ws, w.shape)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _contract(pattern, x, w):
    return _forward(pattern, x, w)[0]


def _forward(pattern, x, w):
    w = sharding.gather(w, letters(pattern)[1])
    return product(pattern, x, w).astype(x.dtype), (x, w)


def _backward(pattern, saved, dy):
    # Written out, because autodiff of a product that accumulates in float32 would run both of these with
    # float32 operands: cotangents stay in the activations' dtype, as the forward operands do.
    x, w = saved
    xs, ws, out = letters(pattern)
    dx = product(f"{out},{ws}->{xs}", dy, w).astype(x.dtype)
    return dx, sharding.scatter(_weight_gradient(x, dy, pattern, w.shape).astype(w.dtype), ws)


_contract.defvjp(_forward, _backward)


def product(pattern: str, x: Float[Array, "..."], w: Float[Array, "..."]) -> Float[Array, "..."]:
    """`einsum(pattern, x, w)` of a w that is gathered already, in float32: the rows of x, then what is left of w."""
    xs, ws, out = letters(pattern)
    shared = [letter for letter in ws if letter in xs]
    of_x, of_w = [xs.index(letter) for letter in shared], [ws.index(letter) for letter in shared]
    sizes = dict(zip(xs + ws, x.shape + w.shape, strict=True))
    split = lambda kept: sharding.activation(kept, [sizes[letter] for letter in kept])
    x_first = lambda x, w: _dot(x, w, of_x, of_w, split(out))
    if math.prod(sizes[letter] for letter in xs if letter not in shared) > _FEW_ROWS:
        return x_first(x, w)
    # XLA's CPU backend copies a right operand into panels before it multiplies, and reads a left one where it lies:
    # one and a half to three times as fast when there is little else to do.
    w_first = lambda x, w: _turned(w, x, of_w, of_x, out, split)
    return jax.lax.platform_dependent(x, w, cpu=w_first, default=x_first)


def _weight_gradient(x, dy, pattern, shape):
    xs, ws, out = letters(pattern)
    rows = [letter for letter in xs if letter in out]
    of_x, of_dy = [xs.index(letter) for letter in rows], [out.index(letter) for letter in rows]
    split = lambda kept: sharding.unreduced_gradient(kept, [shape[ws.index(letter)] for letter in kept])
    # XLA's CPU backend transposes the left operand: x once for all products it went into, or each of their dy.
    x_first = lambda x, dy: _turned(x, dy, of_x, of_dy, ws, split)
    dy_first = lambda x, dy: _dot(dy, x, of_dy, of_x, split(ws))
    return jax.lax.platform_dependent(x, dy, cpu=x_first, default=dy_first)


def letters(pattern: str) -> tuple[str, str, str]:
    """The letters of the activation, of the weight and of the result."""
    inputs, out = pattern.split("->")
    xs, ws = inputs.split(",")
    return xs, ws, out


def _dot(a: Array, b: Array, of_a: list[int], of_b: list[int], split: P) -> Array:
    """The product over dimensions `of_a` and `of_b`: what is left of a, then what is left of b."""
    dims = ((of_a, of_b), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32, out_sharding=split)


def _turned(a: Array, b: Array, of_a: list[int], of_b: list[int], out: str, split: Callable[[str], P]) -> Array:
    """What is left of b, then what is left of a (the letters `out`), with a as the left operand all the same."""
    first = a.ndim - len(of_a)
    y = _dot(a, b, of_a, of_b, split(out[-first:] + out[:-first]))
    # The barrier keeps the compiler from swapping the operands back.
    return jnp.moveaxis(jax.lax.optimization_barrier(y), range(first), range(-first, 0))
