"""Softmax attention with grouped heads, one signature over several implementations.

reference   the formula, with the whole [T, S] table in float32: the oracle of every other implementation
xla         blocks of queries in plain XLA; what lies above the diagonal is skipped, and the backward pass
            recomputes the probabilities from the log-sum-exp (FlashAttention-2, Dao 2023, section 3.1)
auto        the fastest that can honour the request
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from qwen_jax import sharding
from qwen_jax.ops.mask import Mask

Implementation = Literal["auto", "xla", "reference"]

# Finite, so that a row that sees nothing (padding) has uniform probabilities instead of NaN.
_HIDDEN = -1e30


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Mask,
    *,
    implementation: Implementation,
) -> Float[Array, "B T N H"]:
    """`softmax(q k^T / sqrt(H) + mask) v` per head; query head n uses kv head n // (N / K).

    Scores, softmax and sums are float32; probabilities take q's dtype for the product with v. Queries may be split
    over `context`; keys and values are gathered along it.
    """
    k, v = _one_kv_head_per_device(k), _one_kv_head_per_device(v)
    queries, keys = sharding.activation("btnh", q.shape), sharding.activation("bksh", k.shape)
    by_query, by_key = P(*queries[:2]), P(queries[0], None)
    whole_sequence = sharding.axis_size("context") == 1
    mask = dataclasses.replace(mask, aligned=mask.aligned and whole_sequence)
    specs = dataclasses.replace(
        mask,
        query_positions=by_query,
        key_positions=by_key,
        query_segments=None if mask.query_segments is None else by_query,
        key_segments=None if mask.key_segments is None else by_key,
        window=None if mask.window is None else P(),
    )
    # Each device then has all it needs: the body has no communication, and is the same on any mesh.
    local = jax.shard_map(
        reference if implementation == "reference" else blockwise,
        in_specs=(queries, keys, keys, specs),
        out_specs=queries,
        check_vma=False,
    )
    return local(
        *(
            jax.tree.map(jax.sharding.reshard, x, s)
            for x, s in zip((q, k, v, mask), (queries, keys, keys, specs), strict=True)
        )
    )


def _one_kv_head_per_device(x: Float[Array, "B K S H"]) -> Float[Array, "B R S H"]:
    """x itself, or, where K cannot be split over `tensor`, each head repeated for the devices that share it."""
    ways, (batch, heads, length, dim) = sharding.axis_size("tensor"), x.shape
    if heads % ways == 0:
        return x
    wide = jnp.broadcast_to(x[:, :, None], (batch, heads, ways // heads, length, dim))
    return wide.reshape(batch, ways, length, dim)


def reference(
    q: Float[Array, "B T N H"], k: Float[Array, "B K S H"], v: Float[Array, "B K S H"], mask: Mask
) -> Float[Array, "B T N H"]:
    """The formula as it stands: every score in float32."""
    group = q.shape[2] // k.shape[1]
    k, v = jnp.repeat(k, group, axis=1), jnp.repeat(v, group, axis=1)
    scores = jnp.einsum("btnh,bnsh->bnts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    probs = jax.nn.softmax(jnp.where(mask.visible()[:, None], scores, _HIDDEN), axis=-1)
    return jnp.einsum("bnts,bnsh->btnh", probs.astype(q.dtype), v, preferred_element_type=jnp.float32).astype(q.dtype)


def blockwise(
    q: Float[Array, "B T N H"], k: Float[Array, "B K S H"], v: Float[Array, "B K S H"], mask: Mask
) -> Float[Array, "B T N H"]:
    """`reference`, one block of queries at a time."""
    batch, length, heads, dim = q.shape
    group = heads // k.shape[1]
    # Heads that share a kv head become rows of one matrix: [B, K, T * G, H], token-major, so that a block of
    # queries is a run of rows.
    rows = q.reshape(batch, length, -1, group, dim).swapaxes(1, 2).reshape(batch, -1, length * group, dim)
    out = _blockwise(rows, k, v, mask)
    return out.reshape(batch, -1, length, group, dim).swapaxes(1, 2).reshape(q.shape)


@jax.custom_vjp
def _blockwise(q, k, v, mask):
    return _blockwise_forward(q, k, v, mask)[0]


def _blocks(q, mask):
    """(query tokens, their rows of q, visible keys) of each block, as slices."""
    length, group = mask.query_positions.shape[1], q.shape[2] // mask.query_positions.shape[1]
    # Small blocks skip more of the upper triangle; few blocks keep the program and each matmul's overhead small.
    size = min(max(128, length // 8), 1024) if mask.aligned else 512
    for start in range(0, length, size):
        stop = min(start + size, length)
        keys = slice(0, stop) if mask.aligned else slice(None)
        yield slice(start, stop), slice(start * group, stop * group), keys


def _scores(q, k, mask, tokens, keys):
    """[B, K, rows, keys] in float32, hidden ones at _HIDDEN."""
    scores = jnp.einsum("bkmh,bksh->bkms", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    visible = mask.visible(tokens, keys)[:, None, :, None]
    batch, heads, rows, length = scores.shape
    split = scores.reshape(batch, heads, visible.shape[2], -1, length)
    return jnp.where(visible, split, _HIDDEN).reshape(scores.shape)


def _blockwise_forward(q, k, v, mask):
    outs, lses = [], []
    for tokens, rows, keys in _blocks(q, mask):
        scores = _scores(q[:, :, rows], k[:, :, keys], mask, tokens, keys)
        top = scores.max(-1, keepdims=True)
        probs = jnp.exp(scores - top)
        total = probs.sum(-1, keepdims=True)
        out = jnp.einsum("bkms,bksh->bkmh", probs.astype(q.dtype), v[:, :, keys], preferred_element_type=jnp.float32)
        outs.append((out / total).astype(q.dtype))
        lses.append(top + jnp.log(total))
    out, lse = jnp.concatenate(outs, axis=2), jnp.concatenate(lses, axis=2)
    return out, (q, k, v, mask, out, lse)


def _blockwise_backward(saved, dout):
    q, k, v, mask, out, lse = saved
    # Every score's gradient is p * (dp - delta), and delta is the same for a whole row.
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    dqs = []
    dk, dv = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for tokens, rows, keys in _blocks(q, mask):
        q_block, dout_block, k_block, v_block = q[:, :, rows], dout[:, :, rows], k[:, :, keys], v[:, :, keys]
        probs = jnp.exp(_scores(q_block, k_block, mask, tokens, keys) - lse[:, :, rows])
        dprobs = jnp.einsum("bkmh,bksh->bkms", dout_block, v_block, preferred_element_type=jnp.float32)
        dscores = (probs * (dprobs - delta[:, :, rows]) * q.shape[-1] ** -0.5).astype(q.dtype)
        probs = probs.astype(q.dtype)
        dqs.append(jnp.einsum("bkms,bksh->bkmh", dscores, k_block, preferred_element_type=jnp.float32).astype(q.dtype))
        dk_block = jnp.einsum("bkms,bkmh->bksh", dscores, q_block, preferred_element_type=jnp.float32)
        dv_block = jnp.einsum("bkms,bkmh->bksh", probs, dout_block, preferred_element_type=jnp.float32)
        dk, dv = dk.at[:, :, keys].add(dk_block), dv.at[:, :, keys].add(dv_block)
    return jnp.concatenate(dqs, axis=2), dk.astype(k.dtype), dv.astype(v.dtype), None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)
