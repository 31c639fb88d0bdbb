"""Cross-entropy that never holds the logits of a whole batch."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from qwen_jax import sharding
from qwen_jax.ops.mask import HIDDEN

# The vocabulary is taken in chunks. With no more logits than this on one device there is one: 128 MiB in float32.
_LOGITS = 2**25
# But none has fewer rows, so that the hidden states are not read too often.
_LEAST_ROWS = 4096


def chunked_cross_entropy(
    hidden: Float[Array, "B T D"],
    table: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
) -> Float[Array, ""]:
    """The sum over tokens of `weights * (logsumexp(z) - z[target])`, z = table @ hidden, in float32 nats.

    Differentiable in `hidden` and `table`; their gradients are computed in the forward pass. Of every token only the
    log-sum-exp is kept from a first walk over the chunks, and the second computes the logits again: a chunk then has
    all there is to know of its rows of the table, whose gradient is neither summed over chunks nor held in float32.
    """
    rows = sharding.activation("btd", hidden.shape)
    table = jax.sharding.reshard(table, sharding.weight("vd", table.shape))
    targets, weights = (jax.sharding.reshard(x, P(*rows[:2])) for x in (targets, weights))
    return _cross_entropy(jax.sharding.reshard(hidden, rows), table, targets, weights)


@jax.custom_vjp
def _cross_entropy(hidden, table, targets, weights):
    return _over_chunks(hidden, table, targets, weights, with_gradient=False)[0]


def _forward(hidden, table, targets, weights):
    loss, gradients = _over_chunks(hidden, table, targets, weights, with_gradient=True)
    return loss, gradients


def _backward(gradients, scale):
    dhidden, dtable = gradients
    return dhidden * scale.astype(dhidden.dtype), dtable * scale.astype(dtable.dtype), None, None


_cross_entropy.defvjp(_forward, _backward)


def _over_chunks(hidden, table, targets, weights, *, with_gradient):
    rows, split = sharding.activation("btd", hidden.shape), sharding.weight("vd", table.shape)
    ids, by_fsdp = P(*rows[:2]), sharding.fsdp_dimension(split)

    def local(hidden, table, targets, weights):
        # Whole along fsdp, gathered once and not in every chunk; the gradient is scattered back the same way.
        whole = sharding.all_gather(table.astype(hidden.dtype), axis=by_fsdp)
        tokens = _Tokens.of(hidden, targets, weights)
        loss, gradients = _local_loss(tokens, whole, with_gradient=with_gradient)
        loss = jax.lax.psum(loss, sharding.TOKENS)
        if gradients is None:
            return loss, None
        dhidden, dtable = gradients
        dtable = sharding.reduce_scatter(dtable, axis=by_fsdp).astype(table.dtype)
        return loss, (jax.lax.psum(dhidden, "tensor").astype(hidden.dtype).reshape(hidden.shape), dtable)

    # Replication is checked by the tests on meshes: the checker cannot follow the scan's carry.
    mapped = jax.shard_map(
        local,
        in_specs=(rows, split, ids, ids),
        out_specs=(P(), (rows, split) if with_gradient else None),
        check_vma=False,
    )
    return mapped(hidden, table, targets, weights)


def token_log_probs(
    hidden: Float[Array, "B T D"], table: Float[Array, "V D"], targets: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """The log-probability of each target, z[target] - logsumexp(z), z = table @ hidden, in float32 nats.

    Differentiable in `hidden` and `table`. What each token counts for is known in the backward pass alone, so that
    computes the logits once more.
    """
    rows = sharding.activation("btd", hidden.shape)
    table = jax.sharding.reshard(table, sharding.weight("vd", table.shape))
    targets = jax.sharding.reshard(targets, P(*rows[:2]))
    return _log_probs(jax.sharding.reshard(hidden, rows), table, targets)


@jax.custom_vjp
def _log_probs(hidden, table, targets):
    return _log_probs_forward(hidden, table, targets)[0]


def _log_probs_forward(hidden, table, targets):
    rows, split = sharding.activation("btd", hidden.shape), sharding.weight("vd", table.shape)
    ids, by_fsdp = P(*rows[:2]), sharding.fsdp_dimension(split)

    def local(hidden, table, targets):
        whole = sharding.all_gather(table.astype(hidden.dtype), axis=by_fsdp)
        log_sum, of_target = _log_sums(_Tokens.of(hidden, targets, jnp.ones_like(targets, jnp.float32)), whole)
        return tuple(x.reshape(targets.shape) for x in (of_target - log_sum, log_sum))

    mapped = jax.shard_map(local, in_specs=(rows, split, ids), out_specs=(ids, ids), check_vma=False)
    found, log_sum = mapped(hidden, table, targets)
    return found, (hidden, table, targets, log_sum)


def _log_probs_backward(saved, cotangent):
    hidden, table, targets, log_sum = saved
    rows, split = sharding.activation("btd", hidden.shape), sharding.weight("vd", table.shape)
    ids, by_fsdp = P(*rows[:2]), sharding.fsdp_dimension(split)

    def local(hidden, table, targets, weights, log_sum):
        whole = sharding.all_gather(table.astype(hidden.dtype), axis=by_fsdp)
        dhidden, dtable = _gradients(_Tokens.of(hidden, targets, weights), whole, log_sum.ravel())
        dtable = sharding.reduce_scatter(dtable, axis=by_fsdp).astype(table.dtype)
        return jax.lax.psum(dhidden, "tensor").astype(hidden.dtype).reshape(hidden.shape), dtable

    mapped = jax.shard_map(local, in_specs=(rows, split, ids, ids, ids), out_specs=(rows, split), check_vma=False)
    return *mapped(hidden, table, targets, jax.sharding.reshard(-cotangent, ids), log_sum), None


_log_probs.defvjp(_log_probs_forward, _log_probs_backward)


class _Tokens(NamedTuple):
    """What one device has of the batch: hidden states [M, D], targets and weights [M]."""

    hidden: jax.Array
    targets: jax.Array
    weights: jax.Array

    @classmethod
    def of(cls, hidden, targets, weights):
        """Of arrays [B, T, D] and [B, T]."""
        return cls(hidden.reshape(-1, hidden.shape[-1]), targets.ravel(), weights.ravel())


def _local_loss(tokens: _Tokens, table, *, with_gradient):
    """The weighted loss of the tokens, and its gradient by hidden states (float32, of this part of V) and table."""
    log_sum, of_target = _log_sums(tokens, table)
    loss = jnp.sum(tokens.weights * (log_sum - of_target))
    return loss, _gradients(tokens, table, log_sum) if with_gradient else None


def _logits(tokens: _Tokens, table):
    """A function: the start of a chunk of the table and its rows, to logits and where the targets are among them."""
    size, chunks = table.shape[0], _chunks(table, num_tokens=tokens.targets.size)
    starts = jnp.arange(chunks.shape[0]) * chunks.shape[1]
    # Of the targets in this device's part of the vocabulary.
    places = tokens.targets - jax.lax.axis_index("tensor") * size

    def logits(start, rows):
        z = jnp.einsum("md,vd->mv", tokens.hidden, rows, preferred_element_type=jnp.float32)
        place = start + jnp.arange(len(rows))
        return jnp.where(place < size, z, HIDDEN) if chunks[..., 0].size > size else z, place == places[:, None]

    return logits, (starts, chunks)


def _log_sums(tokens: _Tokens, table):
    """Of each token the log-sum-exp of its logits, and that of its target, [M] over the whole vocabulary."""
    logits, chunks = _logits(tokens, table)

    def sums(carry, chunk):
        top, total, of_target = carry
        z, is_target = logits(*chunk)
        higher = jnp.maximum(top, z.max(-1))
        total = total * jnp.exp(top - higher) + jnp.exp(z - higher[:, None]).sum(-1)
        return (higher, total, of_target + jnp.where(is_target, z, 0).sum(-1)), None

    zeros = jnp.zeros(tokens.targets.shape, jnp.float32)
    (top, total, of_target), _ = _scan(sums, (zeros + HIDDEN, zeros, zeros), chunks)
    highest = jax.lax.pmax(top, "tensor")
    log_sum = highest + jnp.log(jax.lax.psum(total * jnp.exp(top - highest), "tensor"))
    return log_sum, jax.lax.psum(of_target, "tensor")


def _gradients(tokens: _Tokens, table, log_sum):
    """Those of the weighted loss, by hidden states (float32, of this part of V) and table."""
    logits, chunks = _logits(tokens, table)

    def gradients(dhidden, chunk):
        z, is_target = logits(*chunk)
        dz = (jnp.exp(z - log_sum[:, None]) - is_target.astype(z.dtype)) * tokens.weights[:, None]
        dz = dz.astype(table.dtype)
        dhidden += jnp.dot(dz, chunk[1], preferred_element_type=jnp.float32)
        drows = jnp.einsum("mv,md->vd", dz, tokens.hidden, preferred_element_type=jnp.float32)
        return dhidden, drows.astype(table.dtype)

    dhidden, dtable = _scan(gradients, jnp.zeros(tokens.hidden.shape, jnp.float32), chunks)
    return dhidden, dtable.reshape(-1, table.shape[1])[: table.shape[0]]


def _chunks(table, *, num_tokens):
    """The rows of a table [V, D] as [C, R, D], the last filled up with zeros."""
    size = table.shape[0]
    count = math.ceil(min(num_tokens * size / _LOGITS, size / _LEAST_ROWS))
    if count <= 1:
        return table[None]
    # In whole tiles of 128 rows, and if there is such a number of chunks, with none left over.
    tiles = -(-size // 128)
    count = next((n for n in range(count, 2 * count) if tiles % n == 0), count)
    rows = -(-tiles // count) * 128
    return jnp.pad(table, ((0, count * rows - size), (0, 0))).reshape(count, rows, -1)


def _scan(body, carry, xs):
    """jax.lax.scan; without a loop if there is one step, so that both walks share their logits."""
    if len(xs[0]) > 1:
        return jax.lax.scan(body, carry, xs)
    carry, y = body(carry, jax.tree.map(lambda x: x[0], xs))
    return carry, jax.tree.map(lambda y: y[None], y)
