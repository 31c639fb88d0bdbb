"""The gated MLP of many tokens, some at a time: what it makes between its matrices, several times as wide as a token,
never exists for all of them.

The backward pass is written out: it keeps nothing but its inputs, computes each piece again, and adds the gradients of
the matrices up in float32 from piece to piece. These are gathered along fsdp once, outside of the loop.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from qwen_jax import sharding
from qwen_jax.ops import quantized
from qwen_jax.ops.linear import contract
from qwen_jax.ops.lora import Adapted
from qwen_jax.ops.quantized import Quantized

# Tokens of a piece on one device. For 7B, reading the matrices then takes a thirtieth of the time of multiplying with
# them, and what is made of a piece is 300 MB wherever it is held.
PIECE = 8192

_LETTERS = ("fd", "fd", "df")  # of gate, up and down

Weight = Any  # an array, Quantized or Adapted
Matrices = tuple[Weight, Weight, Weight]
Splits = tuple[Any, ...]  # a PartitionSpec of each, or Quantized with one in the place of each array
Letters = tuple[str, str, str]
Sums = tuple[Array | None, ...]  # gradients in float32, None for a quantised matrix


def in_pieces(x: Float[Array, "B T D"]) -> bool:
    """Whether there are so many tokens on one device that `mlp` pays: in rows of 4096 tokens there seldom are."""
    return x.shape[0] * x.shape[1] > 2 * PIECE * sharding.axis_size(sharding.TOKENS)


def mlp(
    x: Float[Array, "B T D"],
    gate: Float[Array, "F D"] | Quantized | Adapted,
    up: Float[Array, "F D"] | Quantized | Adapted,
    down: Float[Array, "D F"] | Quantized | Adapted,
) -> Float[Array, "B T D"]:
    """`down(silu(gate(x)) * up(x))` in x's dtype; the matrices are parameters as stored, cast to it or quantised.

    There is no gradient of quantised ones, and of adapted ones that of the adapter.
    """
    if any(isinstance(w, Adapted) for w in (gate, up, down)):
        return _adapted(x, (gate, up, down))
    matrices = cast(_LETTERS, (gate, up, down), x.dtype)
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
        matrices = gate, up, down = whole(matrices, splits)

        def piece(sums, tokens):
            x, dy = tokens
            pre = outputs(x, gate).astype(x.dtype), outputs(x, up).astype(x.dtype)
            hidden, pull = jax.vjp(_gated, *pre)
            by_gate, by_up = pull(back(dy, down).astype(x.dtype))
            sums = added(sums, (by_gate, by_up, dy), (x, x, hidden))
            dx = jax.lax.psum(back(by_gate, gate) + back(by_up, up), "tensor")
            return sums, dx.astype(x.dtype)

        sums, dx = jax.lax.scan(piece, no_sums(matrices), (_pieces(x), _pieces(dy)))
        scatter = lambda d, split: sharding.reduce_scatter(d.astype(x.dtype), axis=sharding.fsdp_dimension(split))
        return _joined(dx, like=x), jax.tree.map(scatter, sums, of_gradients(splits))

    x, matrices = saved
    rows, splits = sharding.activation("btd", x.shape), splits_of(_LETTERS, matrices)
    outs = rows, of_gradients(splits)
    mapped = jax.shard_map(local, in_specs=(rows, splits, rows), out_specs=outs, check_vma=False)
    return mapped(x, matrices, jax.sharding.reshard(dy, rows))


_mlp.defvjp(_forward, _backward)


def _adapted(x: Float[Array, "B T D"], matrices: Matrices) -> Float[Array, "B T D"]:
    """Likewise by `contract`, whose gradients of adapters autodiff adds up from piece to piece: they are small."""
    rows = sharding.activation("btd", x.shape)
    of_pieces = P(None, *rows)
    cut = jax.shard_map(lambda x: _pieces(x)[:, None], in_specs=rows, out_specs=of_pieces)
    joined = jax.shard_map(lambda y, x: _joined(y, like=x), in_specs=(of_pieces, rows), out_specs=rows)

    @jax.checkpoint
    def piece(numbered):
        number, x = numbered
        gate, up, down = (w.fold(number) if isinstance(w, Adapted) else w for w in matrices)
        hidden = _gated(contract("btd,fd->btf", x, gate), contract("btd,fd->btf", x, up))
        return contract("btf,df->btd", hidden, down)

    x = jax.sharding.reshard(x, rows)
    pieces = cut(x)
    return joined(jax.lax.map(piece, (jnp.arange(len(pieces)), pieces)), x)


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


def of_gradients(splits: Splits) -> tuple[Any, ...]:
    """How gradients are split; None for those of quantised matrices, which there are not."""
    return tuple(None if isinstance(split, Quantized) else split for split in splits)


def no_sums(matrices: Matrices) -> Sums:
    """Inside shard_map: gradients of whole matrices, before any is added."""
    return tuple(None if isinstance(w, Quantized) else jnp.zeros(w.shape, jnp.float32) for w in matrices)


def added(sums: Sums, by_outputs: tuple[Array, ...], inputs: tuple[Array, ...]) -> Sums:
    """Inside shard_map: the same with those that come of some rows, by the outputs of each matrix and its inputs."""
    return tuple(
        None if total is None else total + dot(dy, x, 0, 0)
        for total, dy, x in zip(sums, by_outputs, inputs, strict=True)
    )


def _pieces(x: Float[Array, "B T D"]) -> Float[Array, "pieces tokens D"]:
    """Inside shard_map: the tokens of this device, the last piece filled up with zeros."""
    tokens = x.reshape(-1, x.shape[-1])
    count = -(-len(tokens) // PIECE)
    size = -(-len(tokens) // count)
    return jnp.pad(tokens, ((0, count * size - len(tokens)), (0, 0))).reshape(count, size, -1)


def _joined(pieces: Float[Array, "pieces ... D"], like: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    batch, length, width = like.shape
    return pieces.reshape(-1, width)[: batch * length].reshape(like.shape)


def outputs(x: Array, w: Weight) -> Array:
    """Inside shard_map: the product of rows and a matrix over its inputs, in float32."""
    return quantized.dot(x, w) if isinstance(w, Quantized) else dot(x, w, 1, 1)


def back(dy: Array, w: Weight) -> Array:
    """Inside shard_map: the product of rows and a matrix over its outputs, in float32."""
    return quantized.dot_back(dy, w) if isinstance(w, Quantized) else dot(dy, w, 1, 0)


def dot(a: Array, b: Array, of_a: int, of_b: int) -> Array:
    """Inside shard_map: the product over one dimension of each, in float32."""
    return jax.lax.dot_general(a, b, (((of_a,), (of_b,)), ((), ())), preferred_element_type=jnp.float32)
