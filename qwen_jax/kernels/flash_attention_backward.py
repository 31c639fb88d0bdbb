"""The backward pass of `flash_attention`: probabilities are computed again from the log-sum-exp (FlashAttention-2, Dao
2023, section 3.1), once for the gradients of queries, keys and values together.

A block of keys stays in VMEM, with the float32 sums of its gradients, while all blocks of queries pass. So a block as
long as the sequence needs nothing in HBM but the gradients themselves; of a longer one, each block of keys leaves its
part of dq, to be summed.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.kernels.flash_attention_forward import ABT, ATB, HIDDEN, LOG2_E, NOTHING, dot, scale_rows, specs
from qwen_jax.kernels.tiles import Tiles, query_blocks, segment_runs, visit


def _kernel(
    control, runs, q, k, v, query_scale, query_segments, key_segments, dout, lse, delta, dq, dk, dv,
    scaled, dq_sums, dk_sums, dv_sums, *, tiles: Tiles, scale: float,
):  # fmt: skip
    """Scratch: scaled [rows, H] and the sums dq_sums [H, rows], dk_sums and dv_sums [block_kv, H]."""
    batch, j, g, i = pl.program_id(0), pl.program_id(2), pl.program_id(3), pl.program_id(4)
    at = visit(tiles, control, runs, batch, i, j)

    @pl.when((g == 0) & (i == 0))
    def _():
        dk_sums[...] = jnp.zeros_like(dk_sums)
        dv_sums[...] = jnp.zeros_like(dv_sums)

    def existing(x):
        """Rows x of queries, zero beyond the last."""
        if tiles.queries % tiles.tokens == 0:
            return x
        token = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) & (tiles.tokens - 1)
        return jnp.where(token < tiles.queries - i * tiles.tokens, x, 0)

    def accumulate(chunk, clear):
        keys = at.keys(chunk)
        key, value = (x[keys, :] if clear else at.existing(x[keys, :], chunk) for x in (k, v))
        grads = existing(dout[...].reshape(tiles.rows, -1))
        scores = dot(key, scaled[...], ABT)
        if not clear:
            seen = at.visible(chunk, slice(0, tiles.rows), query_segments, key_segments)
            scores = jnp.where(seen, scores, HIDDEN)
        probs = jnp.exp2(scores - _row(lse))
        dv_sums[keys, :] += dot(probs.astype(grads.dtype), grads)
        dscores = (probs * (dot(value, grads, ABT) - _row(delta))).astype(key.dtype)
        dk_sums[keys, :] += dot(dscores, scaled[...])
        dq_sums[...] += dot(key, dscores, ATB)

    work = at.first < at.end

    @pl.when(work)
    def _():
        scaled[...] = existing(scale_rows(q[...], query_scale, tiles=tiles, scale=scale)).astype(scaled.dtype)
        dq_sums[...] = jnp.zeros_like(dq_sums)
        at.for_each(at.first, accumulate)
        result = scale_rows(dq_sums[...].T, query_scale, tiles=tiles, scale=scale / LOG2_E)
        dq[...] = result.reshape(dq.shape).astype(dq.dtype)

    @pl.when(~work)
    def _():
        dq[...] = jnp.zeros_like(dq)

    @pl.when((g == pl.num_programs(3) - 1) & (i == tiles.query_blocks - 1))
    def _():
        dk[...] = (dk_sums[...] / LOG2_E).astype(dk.dtype)
        dv[...] = dv_sums[...].astype(dv.dtype)


def _row(per_query):
    """[heads, 1, tokens] as [1, rows]."""
    return jnp.concatenate([per_query[head] for head in range(per_query.shape[0])], axis=1)


def backward(
    q, k, v, control, query_scale, query_segments, key_segments, out, lse, dout, dlse,
    *, tiles: Tiles, scale: float, interpret: bool,
):  # fmt: skip
    """dq, dk and dv; arguments as of `forward`, its results, and their cotangents."""
    batch, kv_heads, group, _, dim = q.shape
    runs = segment_runs(tiles, query_segments[:, 0], key_segments[:, 0]) if tiles.segmented else None
    # Each score's gradient is p * (dp - delta), with one delta for a whole row; that of its log-sum-exp is p.
    delta = jnp.einsum("bkgth,bkgth->bkgt", dout.astype(jnp.float32), out.astype(jnp.float32))[..., None, :] - dlse
    # Rows that see nothing, and those beyond the last, have probabilities of zero.
    lse = jnp.where(lse > NOTHING, lse * LOG2_E, -NOTHING)
    beyond = ((0, 0),) * 4 + ((0, -tiles.queries % tiles.tokens),)
    lse, delta = jnp.pad(lse, beyond, constant_values=-NOTHING), jnp.pad(delta, beyond)

    def place(b, h, j, g, i, control, runs=None):
        # Where nothing is seen nothing is loaded, but for the block that comes next.
        first, last = query_blocks(tiles, control, b, j)
        return b, h, g, jnp.maximum(jnp.minimum(i, last), jnp.minimum(first, tiles.query_blocks - 1)), j

    spec = specs(tiles, dim, place)
    parts = tiles.kv_blocks
    part = pl.BlockSpec(
        (None, None, None, tiles.heads, tiles.tokens, dim), lambda b, h, j, g, i, *_: (j, b, h, g, i, 0)
    )
    dq, dk, dv = pl.pallas_call(
        functools.partial(_kernel, tiles=tiles, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, kv_heads, tiles.kv_blocks, group // tiles.heads, tiles.query_blocks),
            in_specs=[
                spec["queries"],
                spec["keys"],
                spec["keys"],
                None if query_scale is None else spec["per_token"],
                spec["per_token"] if tiles.segmented else None,
                spec["per_key"] if tiles.segmented else None,
                spec["queries"],
                spec["per_query"],
                spec["per_query"],
            ],
            out_specs=[part, spec["keys"], spec["keys"]],
            scratch_shapes=[
                pltpu.VMEM((tiles.rows, dim), q.dtype),
                pltpu.VMEM((dim, tiles.rows), jnp.float32),
                pltpu.VMEM((tiles.block_kv, dim), jnp.float32),
                pltpu.VMEM((tiles.block_kv, dim), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((parts, *q.shape), q.dtype if parts == 1 else jnp.float32),
            jax.ShapeDtypeStruct(k.shape, k.dtype),
            jax.ShapeDtypeStruct(v.shape, v.dtype),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary", "arbitrary")
        ),
        name="flash_attention_backward",
        interpret=interpret,
    )(control, runs, q, k, v, query_scale, query_segments, key_segments, dout, lse, delta)
    return dq.sum(axis=0).astype(q.dtype), dk, dv
