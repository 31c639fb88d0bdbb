"""Attention in plain XLA, one block of queries at a time.

What lies above the diagonal is skipped, or outside of the mask's band, and the backward pass recomputes the
probabilities from the log-sum-exp (FlashAttention-2, Dao 2023, section 3.1).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qwen_jax.ops.mask import HIDDEN, Mask


def blockwise(
    q: Float[Array, "B T N H"], k: Float[Array, "B K S H"], v: Float[Array, "B K S H"], mask: Mask
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """`attention.reference` with little memory, and the log-sum-exp of each query's scores; of one device.

    Both have gradients, so that results over parts of the keys can be merged. A query that sees nothing has a
    log-sum-exp of about -1e30.
    """
    batch, length, heads, dim = q.shape
    group = heads // k.shape[1]
    # Heads that share a kv head become rows of one matrix: [B, K, T * G, H], token-major, so that a block of
    # queries is a run of rows.
    rows = q.reshape(batch, length, -1, group, dim).swapaxes(1, 2).reshape(batch, -1, length * group, dim)
    out, lse = (
        x.reshape(batch, -1, length, group, x.shape[-1]).swapaxes(1, 2).reshape(batch, length, heads, -1)
        for x in _blockwise(rows, k, v, mask)
    )
    return out, lse[..., 0]


@jax.custom_vjp
def _blockwise(q, k, v, mask):
    return _blockwise_forward(q, k, v, mask)[0]


def _blocks(q, mask):
    """(query tokens, their rows of q, visible keys) of each block, as slices."""
    length, group = mask.query_positions.shape[1], q.shape[2] // mask.query_positions.shape[1]
    least, most = mask.band
    # Small blocks skip more of the upper triangle; few blocks keep the program and each matmul's overhead small.
    size = min(max(128, length // 8), 1024) if mask.aligned else 512
    for start in range(0, length, size):
        stop, keys = min(start + size, length), slice(None)
        if mask.aligned:
            # At least one key, which the mask hides where none is in reach.
            keys = slice(0 if most is None else max(start - most, 0), max(stop - least, 1))
        yield slice(start, stop), slice(start * group, stop * group), keys


def _scores(q, k, mask, tokens, keys):
    """[B, K, rows, keys] in float32, hidden ones at HIDDEN."""
    scores = jnp.einsum("bkmh,bksh->bkms", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    visible = mask.visible(tokens, keys)[:, None, :, None]
    batch, heads, rows, length = scores.shape
    split = scores.reshape(batch, heads, visible.shape[2], -1, length)
    return jnp.where(visible, split, HIDDEN).reshape(scores.shape)


def _dropped(x, mask, number):
    """The weights of a block, or their gradient, after dropout: the same each time."""
    if mask.dropout is None:
        return x
    dropout = mask.dropout.fold(number)
    return dropout.scaled(x, dropout.keep(x.shape))


def _blockwise_forward(q, k, v, mask):
    outs, lses = [], []
    for number, (tokens, rows, keys) in enumerate(_blocks(q, mask)):
        scores = _scores(q[:, :, rows], k[:, :, keys], mask, tokens, keys)
        top = scores.max(-1, keepdims=True)
        probs = jnp.exp(scores - top)
        total = probs.sum(-1, keepdims=True)
        probs = _dropped(probs, mask, number)
        out = jnp.einsum("bkms,bksh->bkmh", probs.astype(q.dtype), v[:, :, keys], preferred_element_type=jnp.float32)
        outs.append((out / total).astype(q.dtype))
        lses.append(top + jnp.log(total))
    out, lse = jnp.concatenate(outs, axis=2), jnp.concatenate(lses, axis=2)
    return (out, lse), (q, k, v, mask, out, lse)


def _blockwise_backward(saved, cotangents):
    q, k, v, mask, out, lse = saved
    dout, dlse = cotangents
    # Every score's gradient is p * (dp - delta), and delta is the same for a whole row.
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True) - dlse
    dqs = []
    dk, dv = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for number, (tokens, rows, keys) in enumerate(_blocks(q, mask)):
        q_block, dout_block, k_block, v_block = q[:, :, rows], dout[:, :, rows], k[:, :, keys], v[:, :, keys]
        probs = jnp.exp(_scores(q_block, k_block, mask, tokens, keys) - lse[:, :, rows])
        dprobs = jnp.einsum("bkmh,bksh->bkms", dout_block, v_block, preferred_element_type=jnp.float32)
        dprobs = _dropped(dprobs, mask, number)
        dscores = (probs * (dprobs - delta[:, :, rows]) * q.shape[-1] ** -0.5).astype(q.dtype)
        probs = _dropped(probs, mask, number).astype(q.dtype)
        dqs.append(jnp.einsum("bkms,bksh->bkmh", dscores, k_block, preferred_element_type=jnp.float32).astype(q.dtype))
        dk_block = jnp.einsum("bkms,bkmh->bksh", dscores, q_block, preferred_element_type=jnp.float32)
        dv_block = jnp.einsum("bkms,bkmh->bksh", probs, dout_block, preferred_element_type=jnp.float32)
        dk, dv = dk.at[:, :, keys].add(dk_block), dv.at[:, :, keys].add(dv_block)
    return jnp.concatenate(dqs, axis=2), dk.astype(k.dtype), dv.astype(v.dtype), None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)
