"""Cross-entropy that never holds the logits of a whole batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from qwen_jax import sharding

# Logits of one chunk on one device, in float32 numbers: 128 MiB. Large enough for full-speed matmuls.
_CHUNK = 2**25


def chunked_cross_entropy(
    hidden: Float[Array, "B T D"],
    table: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
) -> Float[Array, ""]:
    """The sum over tokens of `weights * (logsumexp(z) - z[target])`, z = table @ hidden, in float32 nats.

    Differentiable in `hidden` and `table`. Their gradients are computed chunk by chunk in the forward pass, while
    the logits are at hand: three matmuls with the table in all, none of them done twice.
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
    ids = P(*rows[:2])

    def local(hidden, table, targets, weights):
        dtype = hidden.dtype
        # Whole along fsdp, gathered once and not in every chunk; the gradient is scattered back the same way.
        whole = sharding.all_gather(table.astype(dtype), axis=1)
        chunks, count = _split_rows(hidden, targets, weights, _CHUNK // whole.shape[0])

        def chunk(carry, inputs):
            loss, dtable = carry
            x, ids, scale = inputs
            part, dlogits = _chunk_loss(x, ids, scale, whole)
            if not with_gradient:
                return (loss + part, dtable), None
            dlogits = dlogits.astype(dtype)
            dx = jax.lax.psum(jnp.dot(dlogits, whole, preferred_element_type=jnp.float32), "tensor").astype(dtype)
            dtable += jnp.einsum("mv,md->vd", dlogits, x, preferred_element_type=jnp.float32)
            return (loss + part, dtable), dx

        start = jnp.zeros(whole.shape, jnp.float32) if with_gradient else None
        (loss, dtable), dx = jax.lax.scan(chunk, (jnp.zeros((), jnp.float32), start), chunks)
        loss = jax.lax.psum(loss, sharding.TOKENS)
        if dx is None or dtable is None:
            return loss, None
        dhidden = dx.reshape(-1, hidden.shape[-1])[:count].reshape(hidden.shape)
        dtable = sharding.reduce_scatter(dtable.astype(dtype), axis=1)
        return loss, (dhidden, dtable.astype(table.dtype))

    # Replication is checked by the tests on meshes: the checker cannot follow the scan's carry.
    mapped = jax.shard_map(
        local,
        in_specs=(rows, split, ids, ids),
        out_specs=(P(), (rows, split) if with_gradient else None),
        check_vma=False,
    )
    return mapped(hidden, table, targets, weights)


def _split_rows(hidden, targets, weights, chunk):
    """The tokens of this device in equal chunks [C, M, ...], the last filled up with weight 0, and their number."""
    count = targets.size
    chunks = max(1, -(-count // max(1, chunk)))
    size = -(-count // chunks)
    fill = chunks * size - count

    def split(x):
        x = x.reshape(count, *x.shape[2:])
        return jnp.pad(x, ((0, fill), *((0, 0),) * (x.ndim - 1))).reshape(chunks, size, *x.shape[1:])

    return (split(hidden), split(targets), split(weights)), count


def _chunk_loss(hidden, targets, weights, table):
    """The weighted loss of [M] tokens, and its gradient by the [M, V] logits of this device's part of V."""
    logits = jnp.einsum("md,vd->mv", hidden, table, preferred_element_type=jnp.float32)
    ids = jax.lax.axis_index("tensor") * table.shape[0] + jnp.arange(table.shape[0])
    is_target = ids == targets[:, None]
    top = jax.lax.pmax(logits.max(-1), "tensor")
    exp = jnp.exp(logits - top[:, None])
    total = jax.lax.psum(exp.sum(-1), "tensor")
    of_target = jax.lax.psum(jnp.sum(jnp.where(is_target, logits, 0), axis=-1), "tensor")
    loss = jnp.sum(weights * (top + jnp.log(total) - of_target))
    return loss, (exp / total[:, None] - is_target.astype(jnp.float32)) * weights[:, None]
