"""Causal softmax attention on TPU without the table of scores (FlashAttention-2, Dao 2023), forward and backward."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qwen_jax.kernels.blocks import Blocks, Generation, tuned
from qwen_jax.kernels.flash_attention_backward import backward
from qwen_jax.kernels.flash_attention_forward import forward
from qwen_jax.kernels.tiles import Tiles, cut


@dataclasses.dataclass(frozen=True)
class _Plan:
    """All that is known when the program is traced."""

    forward: Tiles
    backward: Tiles
    scale: float
    interpret: bool


def flash_attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    *,
    scale: float,
    query_segments: Int[Array, "B T"] | None = None,
    key_segments: Int[Array, "B S"] | None = None,
    window: Int[Array, ""] | int | None = None,
    query_offset: Int[Array, "*B"] | int = 0,
    query_scale: Float[Array, "B T"] | None = None,
    blocks: Blocks | None = None,
    generation: Generation | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B N T H"], Float[Array, "B N T"]]:
    """Attention of each query to the keys up to its own place, and the log-sum-exp of its scores.

    Query head n uses kv head n // (N / K). Query t sees key s if s <= t + query_offset, if their segments are the same
    and not 0, and if t + query_offset - s < window. One that sees nothing gives zeros, and a log-sum-exp of -1e30.

    Args:
      q, k, v: bfloat16 or float32, all of one dtype.
      scale: factor of every score.
      query_segments, key_segments: both or none.
      window: how many of the latest keys are visible, the query's own included; 0 or None for all.
      query_offset: the place of query 0 among the keys, for all rows of the batch or each.
      query_scale: factor of every score of a query; constant, no gradient flows to it.
      blocks: sizes of blocks; left out, those tuned for `generation`.
      generation: of the TPU this is compiled for; required without `blocks`.
      interpret: run step by step on any device, for tests.

    Returns:
      out in q's dtype, and lse in float32, natural logarithm. Both have gradients with respect to q, k and v, so that
      results over parts of the keys can be merged.

    Raises:
      ValueError: shapes do not fit together, or the generation is unknown.
    """
    masks = dict(query_segments=query_segments, key_segments=key_segments, window=window)
    _check(q, k, v, masks | dict(query_offset=query_offset, query_scale=query_scale))
    (batch, heads, length, dim), (kv_heads, keys) = q.shape, k.shape[1:3]
    sizes = tuned(generation, head_dim=dim, itemsize=q.dtype.itemsize) if blocks is None else blocks
    lengths = dict(queries=length, keys=keys, group=heads // kv_heads)
    plan = _Plan(
        cut(**lengths, block_q=sizes.block_q, block_kv=sizes.block_kv, block_kv_compute=sizes.block_kv_compute),
        cut(
            **lengths,
            block_q=sizes.backward_block_q,
            block_kv=sizes.backward_block_kv,
            block_kv_compute=sizes.backward_block_kv_compute,
        ),
        scale,
        interpret,
    )
    offsets = jnp.broadcast_to(jnp.asarray(query_offset, jnp.int32), (batch,))
    if window is not None:
        window = jnp.asarray(window, jnp.int32).reshape(1)
    if query_segments is not None and key_segments is not None:
        # No key is of a negative segment: padding sees nothing.
        query_segments = jnp.where(query_segments == 0, -1, query_segments)[:, None].astype(jnp.int32)
        key_segments = key_segments[:, None].astype(jnp.int32)
    if query_scale is not None:
        query_scale = query_scale[:, None].astype(jnp.float32)
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, length, dim)
    arrays = (grouped, k, v, offsets, window, query_scale, query_segments, key_segments)
    out, lse = cast(tuple[Array, Array], _attention(plan, *arrays))
    return out.reshape(q.shape), lse.reshape(batch, heads, length)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan, *arrays):
    return forward(*arrays, tiles=plan.forward, scale=plan.scale, interpret=plan.interpret)


def _attention_forward(plan, *arrays):
    results = _attention(plan, *arrays)
    return results, (arrays, results)


def _attention_backward(plan, saved, cotangents):
    arrays, results = saved
    dq, dk, dv = backward(
        *arrays, *results, *cotangents, tiles=plan.backward, scale=plan.scale, interpret=plan.interpret
    )
    return dq, dk, dv, *[None] * (len(arrays) - 3)


_attention.defvjp(_attention_forward, _attention_backward)


def _check(q, k, v, masks: dict[str, Any]) -> None:
    for name, x in dict(q=q, k=k, v=v).items():
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {x.shape}, but must have four axes: batch, heads, length, head_dim")
    if k.shape != v.shape:
        raise ValueError(f"k has shape {k.shape} and v {v.shape}; they must be the same")
    if (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(f"q has shape {q.shape} and k {k.shape}; batch and head_dim must be the same")
    if not (q.dtype == k.dtype == v.dtype) or q.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; all must be bfloat16, or all float32")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads must be a multiple of {k.shape[1]} kv heads")
    if q.shape[3] % 8:
        raise ValueError(f"head_dim={q.shape[3]} must be a multiple of 8")
    if (masks["query_segments"] is None) != (masks["key_segments"] is None):
        raise ValueError("query_segments and key_segments must be given together")
    batch, per_query, per_key = (q.shape[:1], (q.shape[0], q.shape[2]), (k.shape[0], k.shape[2]))
    allowed = dict(query_segments=[per_query], key_segments=[per_key], window=[()], query_offset=[(), batch])
    for name, x in masks.items():
        shapes = allowed.get(name, [per_query])
        if x is not None and jnp.shape(x) not in shapes:
            raise ValueError(f"{name} has shape {jnp.shape(x)}, but must have {' or '.join(map(str, shapes))}")
