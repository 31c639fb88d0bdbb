"""The gated MLP of many tokens, some at a time: what it makes between its matrices, several times as wide as a token,
never exists for all of them.

The backward pass is written out: it keeps nothing but its inputs, computes each piece again, and adds the gradients of
the matrices up in float32 from piece to piece. These are gathered along fsdp once, outside of the loop.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from qwen_jax import sharding

# Tokens of a piece on one device. For 7B, reading the matrices then takes a thirtieth of the time of multiplying with
# them, and what is made of a piece is 300 MB wherever it is held.
PIECE = 8192

_LETTERS = ("fd", "fd", "df")  # of gate, up and down

Matrices = tuple[Array, Array, Array]
Letters = tuple[str, str, str]


def in_pieces(x: Float[Array, "B T D"]) -> bool:
    """Whether there are so many tokens on one device that `mlp` pays: in rows of 4096 tokens there seldom are."""
    return x.shape[0] * x.shape[1] > 2 * PIECE * sharding.axis_size(sharding.TOKENS)


def mlp(
    x: Float[Array, "B T D"], gate: Float[Array, "F D"], up: Float[Array, "F D"], down: Float[Array, "D F"]
) -> Float[Array, "B T D"]:
    """`down(silu(gate(x)) * up(x))` in x's dtype; the matrices are parameters as stored, cast to it."""
    matrices = cast(_LETTERS, (gate, up, down), x.dtype)
    return _mlp(jax.sharding.reshard(x, sharding.activation("btd", x.shape)), matrices)


@jax.custom_vjp
def _mlp(x, matrices):
    return _forward(x, matrices)[0]


def _forward(x, matrices):
    def local(x, matrices):
        gate, up, down = whole(matrices, splits)

        def piece(x):
            hidden = _gated(dot(x, gate, 1, 1).astype(x.dtype), dot(x, up, 1, 1).astype(x.dtype))
            return jax.lax.psum(dot(hidden, down, 1, 1), "tensor").astype(x.dtype)

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
    """Parameters as stored, in the dtype of activations."""
    gate, up, down = (
        jax.sharding.reshard(w.astype(dtype), split)
        for w, split in zip(matrices, splits_of(letters, matrices), strict=True)
    )
    return gate, up, down


def splits_of(letters: Letters, matrices: Matrices) -> tuple[P, ...]:
    """How gate, up and down are split, from the letters of each."""
    return tuple(sharding.weight(of_one, w.shape) for of_one, w in zip(letters, matrices, strict=True))


def whole(matrices: Matrices, splits: tuple[P, ...]) -> Matrices:
    """Inside shard_map: the matrices whole along fsdp."""
    gate, up, down = (
        sharding.all_gather(w, axis=sharding.fsdp_dimension(split)) for w, split in zip(matrices, splits, strict=True)
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


def dot(a: Array, b: Array, of_a: int, of_b: int) -> Array:
    """Inside shard_map: the product over one dimension of each, in float32."""
    return jax.lax.dot_general(a, b, (((of_a,), (of_b,)), ((), ())), preferred_element_type=jnp.float32)
