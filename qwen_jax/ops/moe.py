"""What experts make of the tokens that are sent to them. No token is dropped, however uneven the shares.

`dense` is the definition. `apply_experts` computes the same from the chosen experts alone: the choices are sorted by
expert and taken in blocks of rows, each of one expert, in a loop that is as long as there are rows. The backward pass
is written out: it keeps nothing but its inputs, and goes through the blocks expert by expert.

`jax.lax.ragged_dot` is not used: on CPU and GPU it multiplies every row with every expert, and on TPU the gradient of
its weights does.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qwen_jax import sharding
from qwen_jax.ops.mlp import (
    Matrices,
    Sums,
    added,
    back,
    cast,
    no_sums,
    of_gradients,
    outputs,
    splits_of,
    whole,
)
from qwen_jax.ops.quantized import Quantized

# Rows of a block: a multiple of the first, which fills registers, and no more than the second, from which on a block
# does not become faster.
_ROW_STEP, _MOST_ROWS = 16, 512

# gate, up and down; as for other weights the letters say how each is split.
_LETTERS = ("efd", "efd", "edf")

# Whatever splits tokens and not experts.
_OTHERS = tuple(axis for axis in sharding.TOKENS if axis != "expert")


def dense(
    x: Float[Array, "B T D"],
    weights: Float[Array, "B T k"],
    experts: Int[Array, "B T k"],
    gate: Float[Array, "E F D"],
    up: Float[Array, "E F D"],
    down: Float[Array, "E D F"],
) -> Float[Array, "B T D"]:
    """`apply_experts`, with every expert applied to every token."""
    chosen = (experts[..., None] == jnp.arange(gate.shape[0])).astype(weights.dtype)
    shares = jnp.einsum("btk,btke->bte", weights, chosen)
    hidden = jax.nn.silu(jnp.einsum("btd,efd->btef", x, gate)) * jnp.einsum("btd,efd->btef", x, up)
    return jnp.einsum("bte,btef,edf->btd", shares, hidden, down)


def apply_experts(
    x: Float[Array, "B T D"],
    weights: Float[Array, "B T k"],
    experts: Int[Array, "B T k"],
    gate: Float[Array, "E F D"] | Quantized,
    up: Float[Array, "E F D"] | Quantized,
    down: Float[Array, "E D F"] | Quantized,
) -> Float[Array, "B T D"]:
    """The sum over a token's experts of weight * down(silu(gate(x)) * up(x)), in x's dtype, added up in float32.

    Args:
      x: tokens.
      weights: of each choice of a token.
      experts: the choices, different from each other for one token.
      gate, up, down: parameters as stored; they are cast to x's dtype and gathered along fsdp, but for quantised ones,
        of which there is no gradient.

    The devices along `expert` have each some of the experts: each is given the tokens of all of them, and returns to
    each its share of the sum.
    """
    matrices = cast(_LETTERS, (gate, up, down), x.dtype)
    rows = sharding.activation("btd", x.shape)
    x, weights, experts = (jax.sharding.reshard(each, rows) for each in (x, weights, experts))
    return _apply(x, weights, experts, matrices)


@jax.custom_vjp
def _apply(x, weights, experts, matrices):
    return _forward(x, weights, experts, matrices)[0]


def _forward(x, weights, experts, matrices):
    def local(x, weights, experts, matrices):
        tokens = _Tokens.of_group(x, weights, experts)
        y = _blocks_forward(tokens, whole(matrices, splits), _Order.of(tokens, len(jax.tree.leaves(matrices)[0])))
        return _returned(y, like=x)

    rows, splits = sharding.activation("btd", x.shape), splits_of(_LETTERS, matrices)
    # Replication is checked by the tests on meshes: the checker cannot follow the loop's carry.
    mapped = jax.shard_map(local, in_specs=(rows, rows, rows, splits), out_specs=rows, check_vma=False)
    return mapped(x, weights, experts, matrices), (x, weights, experts, matrices)


def _backward(saved, dy):
    def local(x, weights, experts, matrices, dy):
        tokens = _Tokens.of_group(x, weights, experts)
        dy = _gathered(dy.astype(x.dtype))
        order = _Order.of(tokens, len(jax.tree.leaves(matrices)[0]))
        dx, dweights, gradients = _blocks_backward(tokens, dy, whole(matrices, splits), order)
        scatter = lambda d, split: sharding.reduce_scatter(d, axis=sharding.fsdp_dimension(split), over=_OTHERS)
        gradients = jax.tree.map(scatter, gradients, of_gradients(splits))
        return _returned(dx, like=x), _returned(dweights, like=weights), gradients

    x, weights, experts, matrices = saved
    rows, splits = sharding.activation("btd", x.shape), splits_of(_LETTERS, matrices)
    specs = (rows, rows, rows, splits, rows)
    mapped = jax.shard_map(local, in_specs=specs, out_specs=(rows, rows, of_gradients(splits)), check_vma=False)
    dx, dweights, gradients = mapped(x, weights, experts, matrices, jax.sharding.reshard(dy, rows))
    return dx, dweights, None, gradients


_apply.defvjp(_forward, _backward)


def _gathered(x: Array) -> Array:
    """Inside shard_map: [B, T, ...] of this device as rows, with those of the other devices along `expert`."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if sharding.axis_size("expert") == 1 else jax.lax.all_gather(rows, "expert", tiled=True)


def _returned(sums: Array, *, like: Array) -> Array:
    """The inverse: what the devices along `expert`, each with parts of F, have for this device's tokens."""
    if sharding.axis_size("expert") > 1:
        sums = jax.lax.psum_scatter(sums, "expert", tiled=True)
    return jax.lax.psum(sums, "tensor").astype(like.dtype).reshape(like.shape)


class _Tokens(NamedTuple):
    """The tokens that one device computes with its experts: x [M, D], weights and experts [M, k]."""

    x: Array
    weights: Array
    experts: Array

    @classmethod
    def of_group(cls, x: Array, weights: Array, experts: Array) -> _Tokens:
        """Of all devices along `expert`; experts are counted from this device's first."""
        return cls(_gathered(x), _gathered(weights), _gathered(experts))


class _Order(NamedTuple):
    """The choices that fell on this device's experts, expert by expert, in blocks of at most `rows`.

    Attributes:
      choices: [R + rows], of M * k, those of each expert in the order of tokens.
      starts, sizes: of each expert's part, [E].
      blocks: of each expert, [E].
      rows: of a block.
    """

    choices: Array
    starts: Array
    sizes: Array
    blocks: Array
    rows: int

    @classmethod
    def of(cls, tokens: _Tokens, num_experts: int) -> _Order:
        (num_tokens, top_k), ways = tokens.experts.shape, sharding.axis_size("expert")
        experts = tokens.experts.ravel() - jax.lax.axis_index("expert") * num_experts
        experts = jnp.where((experts >= 0) & (experts < num_experts), experts, num_experts)
        sizes = jnp.sum(experts[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
        # Where loads are balanced, most experts fit one block that is a quarter larger than the mean.
        mean = num_tokens * top_k / (num_experts * ways)
        rows = min(math.ceil(1.25 * mean / _ROW_STEP) * _ROW_STEP, _MOST_ROWS)
        # A token's choices differ: no more of them than there are experts can be here.
        most = num_tokens * min(top_k, num_experts)
        choices = jnp.pad(jnp.argsort(experts, stable=True)[:most].astype(jnp.int32), (0, rows))
        return cls(choices, jnp.cumsum(sizes) - sizes, sizes, (sizes + rows - 1) // rows, rows)

    def block(self, expert: Array, i: Array, tokens: _Tokens) -> _Block:
        """The block number i of an expert."""
        choices = jax.lax.dynamic_slice_in_dim(self.choices, self.starts[expert] + i * self.rows, self.rows)
        index = jnp.arange(self.rows, dtype=jnp.int32)
        # Rows past the expert's last are another's: what is written for an index past the end is dropped.
        own, (num_tokens, top_k) = index < self.sizes[expert] - i * self.rows, tokens.experts.shape
        return _Block(
            tokens=jnp.where(own, choices // top_k, num_tokens + index),
            choices=jnp.where(own, choices, num_tokens * top_k + index),
        )


class _Block(NamedTuple):
    """Of each row the token and the choice, counted over those of the device; past the end where there is no row."""

    tokens: Array
    choices: Array

    def rows_of(self, x: Array) -> Array:
        return x.at[self.tokens].get(mode="fill", fill_value=0, indices_are_sorted=True, unique_indices=True)

    def weights_of(self, weights: Array) -> Array:
        flat = weights.astype(jnp.float32).ravel().at[self.choices]
        return flat.get(mode="fill", fill_value=0, indices_are_sorted=True, unique_indices=True)[:, None]

    def add(self, sums: Array, rows: Array) -> Array:
        return sums.at[self.tokens].add(rows, mode="drop", indices_are_sorted=True, unique_indices=True)


def _weighted(gate: Array, up: Array, weights: Array) -> Array:
    # Multiplied before `down`, which adds nothing to the gradient's work: the sum is the same.
    return jax.nn.silu(gate) * up * weights


def _blocks_forward(tokens: _Tokens, matrices: Matrices, order: _Order) -> Array:
    """The sum over choices of each token [M, D], in float32, of this device's experts and part of F."""
    ends = jnp.cumsum(order.blocks)

    def add_block(i, y):
        # One loop over the blocks of all experts: nothing is read of those without tokens, as most are in decoding.
        expert = jnp.sum(i >= ends)
        block = order.block(expert, i - (ends - order.blocks)[expert], tokens)
        x, weights = block.rows_of(tokens.x), block.weights_of(tokens.weights)
        gate, up, down = (w[expert] for w in matrices)
        hidden = _weighted(outputs(x, gate), outputs(x, up), weights).astype(x.dtype)
        return block.add(y, outputs(hidden, down))

    return jax.lax.fori_loop(0, ends[-1], add_block, jnp.zeros(tokens.x.shape, jnp.float32))


def _blocks_backward(tokens: _Tokens, dy: Array, matrices: Matrices, order: _Order) -> tuple[Array, Array, Sums]:
    """For the gradient dy [M, D] of the sum those by x and by weights, in float32, and by matrices, in x's dtype."""

    def add_expert(sums, expert):
        index, (gate, up, down) = expert

        def add_block(i, sums):
            dx, dweights, gradients = sums
            block = order.block(index, i, tokens)
            x, dy_rows = block.rows_of(tokens.x), block.rows_of(dy)
            pre = outputs(x, gate), outputs(x, up)
            hidden, pull = jax.vjp(_weighted, *pre, block.weights_of(tokens.weights))
            by_gate, by_up, by_weights = pull(back(dy_rows, down))
            by_gate, by_up, hidden = (each.astype(x.dtype) for each in (by_gate, by_up, hidden))
            dx = block.add(dx, back(by_gate, gate) + back(by_up, up))
            dweights = dweights.at[block.choices].set(by_weights[:, 0], mode="drop", unique_indices=True)
            return dx, dweights, added(gradients, (by_gate, by_up, dy_rows), (x, x, hidden))

        start = *sums, no_sums((gate, up, down))
        *sums, gradients = jax.lax.fori_loop(0, order.blocks[index], add_block, start)
        return tuple(sums), jax.tree.map(lambda d: d.astype(tokens.x.dtype), gradients)

    start = jnp.zeros(tokens.x.shape, jnp.float32), jnp.zeros(tokens.weights.size, jnp.float32)
    # The sums of one expert are small enough for a TPU to keep at hand; those of all, in float32, would not be.
    experts = jnp.arange(len(order.sizes))
    (dx, dweights), gradients = jax.lax.scan(add_expert, start, (experts, matrices))
    return dx, dweights.reshape(tokens.weights.shape), gradients
