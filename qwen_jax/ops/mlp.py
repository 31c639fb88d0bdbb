"""The gated MLP of many tokens, some at a time: what it makes between its matrices, several times as wide as a token,
never exists for all of them.

The backward pass is written out: it keeps nothing but its inputs, computes each piece again, and adds the gradients of
the matrices up in float32 from piece to piece. These are gathered along fsdp once, outside of the loop.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qwen_jax import sharding
from qwen_jax.ops import quantized
from qwen_jax.ops.quantized import Quantized

# Tokens of a piece on one device. For 7B, reading the matrices then takes a thirtieth of the time of multiplying with
# them, and what is made of a piece is 300 MB wherever it is held.
PIECE = 8192

_LETTERS = ("fd", "fd", "df")  # of gate, up and down

Weight = Any  # an array, or Quantized, of which there is no gradient
Matrices = tuple[Weight, Weight, Weight]
Splits = tuple[Any, ...]  # a PartitionSpec of each, or Quantized with one in the place of each array
Letters = tuple[str, str, str]


def in_pieces(x: Float[Array, "B T D"]) -> bool:
    """Whether there are so many tokens on one device that `mlp` pays: in rows of 4096 tokens there seldom are."""
    return x.shape[0] * x.shape[1] > 2 * PIECE * sharding.axis_size(sharding.TOKENS)


def mlp(
    x: Float[Array, "B T D"],
    gate: Float[Array, "F D"] | Quantized,
    up: Float[Array, "F D"] | Quantized,
    down: Float[Array, "D F"] | Quantized,
) -> Float[Array, "B T D"]:
    """`down(silu(gate(x)) * up(x))` in x's dtype; the matrices are parameters as stored, cast to it or quantised."""
    matrices = cast(_LETTERS, (gate, up, down), x.dtype)
    x = quantized.only_forward(x, matrices)
    return _mlp(jax.sharding.reshard(x, sharding.activation("btd", x.shape)), matrices)


@jax.custom_vjp
def _mlp(x, matrices):
    return _forward(x, matrices)[0]


def _forward(x, matrices):
    def local(x, matrices):
        gate, up, down = whole(matrices, splits)

        def piece(x):
            hidden = _gated(outputs(x, gate).astype(x.dtype), outputs(x, up).astype(x.dtype))
            return jax.lax.psum(outputs(hidden, down), "tensor").astype(x.dtype)

        return _joined(jax.lax.map(piece, _pieces(x)), like=x)

    rows, splits = sharding.activation("btd", x.shape), splits_of(_LETTERS, matrices)
    # Replication is checked by the tests on meshes: the checker cannot follow the loop.
    mapped = jax.shard_map(local, in_specs=(rows, splits), out_specs=rows, check_vma=False)
    return mapped(x, matrices), (x, matrices)


def _backward(saved, dy):
    def local(x, matrices, dy):
        gathered = whole(matrices, splits)
        gate, up, down = gathered

        def piece(sums, tokens):
            x, dy = tokens
            pre = dot(x, gate, 1, 1).astype(x.dtype), dot(x, up, 1, 1).astype(x.dtype)
            hidden, pull = jax.vjp(_gated, *pre)
            by_gate, by_up = pull(dot(dy, down, 1, 0).astype(x.dtype))
            gradients = dot(by_gate, x, 0, 0), dot(by_up, x, 0, 0), dot(dy, hidden, 0, 0)
            dx = jax.lax.psum(dot(by_gate, gate, 1, 0) + dot(by_up, up, 1, 0), "tensor")
            return jax.tree.map(jnp.add, sums, gradients), dx.astype(x.dtype)

        zeros = tuple(jnp.zeros(w.shape, jnp.float32) for w in gathered)
        gradients, dx = jax.lax.scan(piece, zeros, (_pieces(x), _pieces(dy)))
        gradients = tuple(
            sharding.reduce_scatter(d.astype(w.dtype), axis=sharding.fsdp_dimension(split))
            for d, w, split in zip(gradients, gathered, splits, strict=True)
        )
        return _joined(dx, like=x), gradients

    x, matrices = saved
    rows, splits = sharding.activation("btd", x.shape), splits_of(_LETTERS, matrices)
    mapped = jax.shard_map(local, in_specs=(rows, splits, rows), out_specs=(rows, splits), check_vma=False)
    return mapped(x, matrices, jax.sharding.reshard(dy, rows))


_mlp.defvjp(_forward, _backward)


def _gated(gate: Array, up: Array) -> Array:
    return jax.nn.silu(gate) * up


def cast(letters: Letters, matrices: Matrices, dtype: jnp.dtype) -> Matrices:
    """Parameters as stored, in the dtype of activations where they are not quantised."""
    gate, up, down = (w if isinstance(w, Quantized) else w.astype(dtype) for w in matrices)
    return jax.tree.map(jax.sharding.reshard, (gate, up, down), splits_of(letters, matrices))


def splits_of(letters: Letters, matrices: Matrices) -> Splits:
    """How gate, up and down are split, from the letters of each."""
    return tuple(
        quantized.split(sharding.gathered(of_one, w.shape), 1, w)
        if isinstance(w, Quantized)
        else sharding.weight(of_one, w.shape)
        for of_one, w in zip(letters, matrices, strict=True)
    )


def whole(matrices: Matrices, splits: Splits) -> Matrices:
    """Inside shard_map: the matrices whole along fsdp."""
    gate, up, down = (
        w if isinstance(w, Quantized) else sharding.all_gather(w, axis=sharding.fsdp_dimension(split))
        for w, split in zip(matrices, splits, strict=True)
    )
    return gate, up, down


def _pieces(x: Float[Array, "B T D"]) -> Float[Array, "pieces tokens D"]:
    """Inside shard_map: the tokens of this device, the last piece filled up with zeros."""
    tokens = x.reshape(-1, x.shape[-1])
    count = -(-len(tokens) // PIECE)
    size = -(-len(tokens) // count)
    return jnp.pad(tokens, ((0, count * size - len(tokens)), (0, 0))).reshape(count, size, -1)


def _joined(pieces: Float[Array, "pieces tokens D"], like: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    batch, length, width = like.shape
    return pieces.reshape(-1, width)[: batch * length].reshape(like.shape)


def outputs(x: Array, w: Weight) -> Array:
    """Inside shard_map: the product of rows and a matrix over its inputs, in float32."""
    return quantized.dot(x, w) if isinstance(w, Quantized) else dot(x, w, 1, 1)


def dot(a: Array, b: Array, of_a: int, of_b: int) -> Array:
    """Inside shard_map: the product over one dimension of each, in float32."""
    return jax.lax.dot_general(a, b, (((of_a,), (of_b,)), ((), ())), preferred_element_type=jnp.float32)
