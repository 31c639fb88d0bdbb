"""The backward pass of `flash_attention`: probabilities are computed again from the log-sum-exp (FlashAttention-2, Dao
2023, section 3.1), once for the gradients of queries, keys and values together.

A block of keys stays in VMEM, with the float32 sums of its gradients, while all blocks of queries pass. So a block as
long as the sequence needs nothing in HBM but the gradients themselves; of a longer one, each block of keys leaves its
part of dq, to be summed. As many parts as there are blocks would grow with the square of the length: so a long sequence
is taken in slabs of a few blocks of keys, one after the other.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.kernels.flash_attention_forward import (
    ABT,
    ATB,
    HIDDEN,
    LOG2_E,
    NOTHING,
    dot,
    input_specs,
    scale_rows,
    specs,
)
from qwen_jax.kernels.tiles import Scalars, Tiles, Visit, query_blocks, segment_runs, visit

# Blocks of keys in a slab, and parts of dq there are at a time: 1 GiB of them at most for 8 heads of 32768 queries.
SLAB = 8


class _Refs(NamedTuple):
    """Arguments of the kernel: scalars, blocks of inputs and outputs, and scratch.

    Attributes:
      scaled: [rows, H].
      dq_sums, dk_sums, dv_sums: [H, rows], [block_kv, H] and [block_kv, H].
    """

    offsets: Any
    window: Any
    runs: Any
    q: Any
    k: Any
    v: Any
    query_scale: Any
    query_segments: Any
    key_segments: Any
    dout: Any
    lse: Any
    delta: Any
    dq: Any
    dk: Any
    dv: Any
    scaled: Any
    dq_sums: Any
    dk_sums: Any
    dv_sums: Any


def _kernel(*args, tiles: Tiles, scale: float):
    refs = _Refs(*args)
    batch, j, g, i = pl.program_id(0), pl.program_id(2), pl.program_id(3), pl.program_id(4)
    at = visit(tiles, Scalars(refs.offsets, refs.window, refs.runs), batch, i, j)
    work = at.first < at.end

    @pl.when((g == 0) & (i == 0))
    def _():
        refs.dk_sums[...] = jnp.zeros_like(refs.dk_sums)
        refs.dv_sums[...] = jnp.zeros_like(refs.dv_sums)

    @pl.when(work)
    def _():
        q = _existing(scale_rows(refs.q[...], refs.query_scale, tiles=tiles, scale=scale), tiles, i)
        refs.scaled[...] = q.astype(refs.scaled.dtype)
        refs.dq_sums[...] = jnp.zeros_like(refs.dq_sums)
        at.for_each(at.first, lambda chunk, clear: _accumulate(refs, at, i, chunk, clear))
        dq = scale_rows(refs.dq_sums[...].T, refs.query_scale, tiles=tiles, scale=scale / LOG2_E)
        refs.dq[...] = dq.reshape(refs.dq.shape).astype(refs.dq.dtype)

    @pl.when(~work)
    def _():
        refs.dq[...] = jnp.zeros_like(refs.dq)

    @pl.when((g == pl.num_programs(3) - 1) & (i == tiles.query_blocks - 1))
    def _():
        refs.dk[...] = (refs.dk_sums[...] / LOG2_E).astype(refs.dk.dtype)
        refs.dv[...] = refs.dv_sums[...].astype(refs.dv.dtype)


def _accumulate(refs: _Refs, at: Visit, query_block, chunk, clear: bool) -> None:
    """Adds what a chunk of keys and a block of queries give to the gradients of each other."""
    tiles, keys = at.tiles, at.keys(chunk)
    k, v = (x[keys, :] if clear else at.existing(x[keys, :], chunk) for x in (refs.k, refs.v))
    dout = _existing(refs.dout[...].reshape(tiles.rows, -1), tiles, query_block)
    scores = dot(k, refs.scaled[...], ABT)
    if not clear:
        seen = at.visible(chunk, slice(0, tiles.rows), refs.query_segments, refs.key_segments)
        scores = jnp.where(seen, scores, HIDDEN)
    probs = jnp.exp2(scores - _row(refs.lse))
    refs.dv_sums[keys, :] += dot(probs.astype(dout.dtype), dout)
    dscores = (probs * (dot(v, dout, ABT) - _row(refs.delta))).astype(k.dtype)
    refs.dk_sums[keys, :] += dot(dscores, refs.scaled[...])
    refs.dq_sums[...] += dot(k, dscores, ATB)


def _existing(rows, tiles: Tiles, query_block):
    """Rows of a block of queries, zero beyond the last query."""
    if tiles.queries % tiles.tokens == 0:
        return rows
    token = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 0) & (tiles.tokens - 1)
    return jnp.where(token < tiles.queries - query_block * tiles.tokens, rows, 0)


def _row(per_query):
    """[heads, 1, tokens] as [1, rows]."""
    return jnp.concatenate([per_query[head] for head in range(per_query.shape[0])], axis=1)


def _row_constants(tiles: Tiles, out, lse, dout, dlse):
    """lse in powers of two and delta, [B, K, G, 1, T], padded to whole blocks: the gradient of a score is
    p * (dp - delta)."""
    delta = jnp.einsum("bkgth,bkgth->bkgt", dout.astype(jnp.float32), out.astype(jnp.float32))[..., None, :] - dlse
    # Rows that see nothing, and those beyond the last, have probabilities of zero.
    lse = jnp.where(lse > NOTHING, lse * LOG2_E, -NOTHING)
    beyond = ((0, 0),) * 4 + ((0, -tiles.queries % tiles.tokens),)
    return jnp.pad(lse, beyond, constant_values=-NOTHING), jnp.pad(delta, beyond)


def backward(
    q, k, v, offsets, window, query_scale, query_segments, key_segments, out, lse, dout, dlse,
    *, tiles: Tiles, scale: float, interpret: bool,
):  # fmt: skip
    """dq, dk and dv; arguments as of `forward`, its results, and their cotangents."""
    size = SLAB * tiles.block_kv
    rows = _row_constants(tiles, out, lse, dout, dlse)
    per_query = (window, query_scale, query_segments, dout, *rows)

    def slab(start, keys, sums):
        """The sums, with what the keys from `start` on give."""
        part = lambda x: None if x is None else jax.lax.dynamic_slice_in_dim(x, start, keys, axis=2)
        own = dataclasses.replace(tiles, keys=keys)
        arrays = (q, part(k), part(v), offsets - start, part(key_segments), *per_query)
        parts, *gradients = _slab(*arrays, tiles=own, scale=scale, interpret=interpret)
        put = lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=2)
        return sums[0] + parts.sum(axis=0), *map(put, sums[1:], gradients)

    if tiles.keys <= size:
        parts, dk, dv = _slab(q, k, v, offsets, key_segments, *per_query, tiles=tiles, scale=scale, interpret=interpret)
        return parts.sum(axis=0).astype(q.dtype), dk, dv
    whole, rest = divmod(tiles.keys, size)
    sums = jnp.zeros(q.shape, jnp.float32), jnp.zeros_like(k), jnp.zeros_like(v)
    sums = jax.lax.fori_loop(0, whole, lambda i, sums: slab(i * size, size, sums), sums)
    dq, dk, dv = slab(whole * size, rest, sums) if rest else sums
    return dq.astype(q.dtype), dk, dv


def _slab(
    q, k, v, offsets, key_segments, window, query_scale, query_segments, dout, lse, delta,
    *, tiles: Tiles, scale: float, interpret: bool,
):  # fmt: skip
    """The parts of dq that blocks of keys leave, in float32 if there are several, and dk and dv."""
    batch, kv_heads, group, _, dim = q.shape
    runs = None if query_segments is None else segment_runs(tiles, query_segments[:, 0], key_segments[:, 0])

    def place(b, h, j, g, i, *scalars):
        # Where nothing is seen nothing is loaded, but for the block that comes next.
        first, last = query_blocks(tiles, Scalars(*scalars), b, j)
        return b, h, g, jnp.maximum(jnp.minimum(i, last), jnp.minimum(first, tiles.query_blocks - 1)), j

    spec, parts = specs(tiles, dim, place), tiles.kv_blocks
    part = pl.BlockSpec(
        (None, None, None, tiles.heads, tiles.tokens, dim), lambda b, h, j, g, i, *_: (j, b, h, g, i, 0)
    )
    sums = [(dim, tiles.rows), (tiles.block_kv, dim), (tiles.block_kv, dim)]
    return pl.pallas_call(
        functools.partial(_kernel, tiles=tiles, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, kv_heads, tiles.kv_blocks, group // tiles.heads, tiles.query_blocks),
            in_specs=[
                *input_specs(spec, query_scale, query_segments),
                spec["queries"],
                spec["per_query"],
                spec["per_query"],
            ],
            out_specs=[part, spec["keys"], spec["keys"]],
            scratch_shapes=[
                pltpu.VMEM((tiles.rows, dim), q.dtype),
                *(pltpu.VMEM(shape, jnp.float32) for shape in sums),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((parts, *q.shape), q.dtype if parts == 1 else jnp.float32),
            jax.ShapeDtypeStruct(k.shape, k.dtype),
            jax.ShapeDtypeStruct(v.shape, v.dtype),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3 + ("arbitrary",) * 2),
        name="flash_attention_backward",
        interpret=interpret,
    )(offsets, window, runs, q, k, v, query_scale, query_segments, key_segments, dout, lse, delta)
