"""The forward pass of `flash_attention`.

Scores stand as [keys, queries]: the softmax reduces over sublanes, its statistics lie along lanes, and the products
with the values, `v^T p`, fill the matrix unit. While the vector unit turns the scores of one chunk of keys into
probabilities, the matrix unit computes those of the next, which wait in VMEM.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.kernels.tiles import Scalars, Tiles, Visit, kv_blocks, segment_runs, visit

# The softmax is in powers of two, which is what the hardware has; the factor is part of the scale of the queries.
LOG2_E = math.log2(math.e)
# The log-sum-exp of a query that sees nothing; finite, so that differences of two are numbers.
NOTHING = -1e30
# A hidden score lies so far below the least maximum that its probability is zero even where nothing is seen.
HIDDEN, _LEAST_MAXIMUM = -2e30, -1e30
# Rows of queries in one straight run of instructions: enough to keep both units busy, few enough to be kept near.
_PIECE = 256

ABT = (((1,), (1,)), ((), ()))
ATB = (((0,), (0,)), ((), ()))
AB = (((1,), (0,)), ((), ()))


def dot(a, b, dimensions=AB):
    """Matrix product with float32 sums; float32 operands are not rounded."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def scale_rows(q, query_scale, *, tiles: Tiles, scale: float):
    """[rows, H] in float32: queries whose products with keys are scores, as exponents of two."""
    q = q.reshape(tiles.rows, -1).astype(jnp.float32) * (scale * LOG2_E)
    return q if query_scale is None else (q.T * jnp.concatenate([query_scale[...]] * tiles.heads, axis=1)).T


class _Refs(NamedTuple):
    """Arguments of the kernel: scalars, blocks of inputs and outputs, and scratch.

    Attributes:
      scaled: [rows, H].
      scores, maxima: [chunk, rows] and [1, rows], of the chunk that is accumulated next.
      top, total, sums: [1, rows], [1, rows] and [H, rows], the state of the softmax.
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
    out: Any
    lse: Any
    scaled: Any
    scores: Any
    maxima: Any
    top: Any
    total: Any
    sums: Any


def _kernel(*args, tiles: Tiles, scale: float):
    refs = _Refs(*args)
    batch, i, j = pl.program_id(0), pl.program_id(3), pl.program_id(4)
    scalars = Scalars(refs.offsets, refs.window, refs.runs)
    first, block = _kv_block(tiles, scalars, batch, i, j)
    at = visit(tiles, scalars, batch, i, block)

    @pl.when(j == 0)
    def _():
        q = scale_rows(refs.q[...], refs.query_scale, tiles=tiles, scale=scale)
        refs.scaled[...] = q.astype(refs.scaled.dtype)
        refs.top[...] = jnp.full_like(refs.top, _LEAST_MAXIMUM)
        refs.total[...] = jnp.zeros_like(refs.total)
        refs.sums[...] = jnp.zeros_like(refs.sums)

    pl.when((block >= first) & (at.first < at.end))(lambda: _walk(refs, at))

    @pl.when(j == tiles.kv_blocks - 1)
    def _():
        total = refs.total[...]
        out = (refs.sums[...] * jnp.where(total > 0, 1 / total, 0)).T
        refs.out[...] = out.reshape(refs.out.shape).astype(refs.out.dtype)
        lse = jnp.where(total > 0, (refs.top[...] + jnp.log2(total)) / LOG2_E, NOTHING)
        for head in range(tiles.heads):
            refs.lse[head] = lse[:, head * tiles.tokens : (head + 1) * tiles.tokens]


def _walk(refs: _Refs, at: Visit) -> None:
    """Takes the chunks of a visit into the softmax, each while the scores of the next are computed."""
    pieces = [slice(row, min(row + _PIECE, at.tiles.rows)) for row in range(0, at.tiles.rows, _PIECE)]

    def compute(chunk, piece, clear):
        scores = dot(refs.k[at.keys(chunk), :], refs.scaled[piece, :], ABT)
        if clear:
            return scores
        return jnp.where(at.visible(chunk, piece, refs.query_segments, refs.key_segments), scores, HIDDEN)

    def keep(scores, piece):
        refs.scores[:, piece] = scores
        refs.maxima[:, piece] = scores.max(axis=0, keepdims=True)

    def begin(clear):
        for piece in pieces:
            keep(compute(at.first, piece, clear), piece)

    def advance(chunk, clear):
        for piece in pieces:
            scores = compute(chunk, piece, clear)
            _accumulate(refs, piece, refs.v[at.keys(chunk - 1), :])
            keep(scores, piece)

    clear = at.clear(at.first)
    pl.when(clear)(lambda: begin(True))
    pl.when(~clear)(lambda: begin(False))
    at.for_each(at.first + 1, advance)
    values = at.existing(refs.v[at.keys(at.end - 1), :], at.end - 1)
    for piece in pieces:
        _accumulate(refs, piece, values)


def _accumulate(refs: _Refs, piece: slice, values) -> None:
    """Takes the scores that are kept into the softmax."""
    top = jnp.maximum(refs.top[:, piece], refs.maxima[:, piece])
    shrink = jnp.exp2(refs.top[:, piece] - top)
    probs = jnp.exp2(refs.scores[:, piece] - top)
    refs.top[:, piece] = top
    refs.total[:, piece] = refs.total[:, piece] * shrink + probs.sum(axis=0, keepdims=True)
    refs.sums[:, piece] = refs.sums[:, piece] * shrink + dot(values, probs.astype(values.dtype), ATB)


def _kv_block(tiles: Tiles, scalars: Scalars, batch, i, j):
    """The first block of keys that a block of queries sees, and the one at step j: before the first, there is no work.

    The last block comes at the last step, so that steps without work come first, while the first block is loaded.
    """
    first, last = kv_blocks(tiles, scalars, batch, i)
    return first, last - (tiles.kv_blocks - 1 - j)


def specs(tiles: Tiles, dim: int, place):
    """Block specs by what they hold; `place` turns the arguments of an index map into (batch, kv head, group, query
    block, kv block)."""

    def spec(shape, index):
        return pl.BlockSpec(shape, lambda *step: index(*place(*step)))

    return {
        "queries": spec((None, None, tiles.heads, tiles.tokens, dim), lambda b, h, g, i, j: (b, h, g, i, 0)),
        "keys": spec((None, None, tiles.block_kv, dim), lambda b, h, g, i, j: (b, h, j, 0)),
        "per_query": spec((None, None, tiles.heads, 1, tiles.tokens), lambda b, h, g, i, j: (b, h, g, 0, i)),
        "per_token": spec((None, 1, tiles.tokens), lambda b, h, g, i, j: (b, 0, i)),
        "per_key": spec((None, 1, tiles.block_kv), lambda b, h, g, i, j: (b, 0, j)),
    }


def input_specs(spec, query_scale, query_segments):
    """Of q, k, v, query_scale, query_segments and key_segments; None for those that are None."""
    segments = [None, None] if query_segments is None else [spec["per_token"], spec["per_key"]]
    return [spec["queries"], spec["keys"], spec["keys"], None if query_scale is None else spec["per_token"], *segments]


def forward(
    q, k, v, offsets, window, query_scale, query_segments, key_segments, *, tiles: Tiles, scale: float, interpret: bool
):
    """out [B, K, G, T, H] and lse [B, K, G, 1, T] of q [B, K, G, T, H] and k, v [B, K, S, H].

    offsets [B], and window [1], query_scale and query_segments [B, 1, T] and key_segments [B, 1, S], each or None.
    """
    batch, kv_heads, group, length, dim = q.shape
    runs = None if query_segments is None else segment_runs(tiles, query_segments[:, 0], key_segments[:, 0])

    def place(b, h, g, i, j, *scalars):
        first, block = _kv_block(tiles, Scalars(*scalars), b, i, j)
        return b, h, g, i, jnp.maximum(block, jnp.minimum(first, tiles.kv_blocks - 1))

    spec = specs(tiles, dim, place)
    scratch = [(tiles.chunk, tiles.rows), *[(1, tiles.rows)] * 3, (dim, tiles.rows)]
    return pl.pallas_call(
        functools.partial(_kernel, tiles=tiles, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, kv_heads, group // tiles.heads, tiles.query_blocks, tiles.kv_blocks),
            in_specs=input_specs(spec, query_scale, query_segments),
            out_specs=[spec["queries"], spec["per_query"]],
            scratch_shapes=[
                pltpu.VMEM((tiles.rows, dim), q.dtype),
                *(pltpu.VMEM(shape, jnp.float32) for shape in scratch),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, kv_heads, group, 1, length), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 4 + ("arbitrary",)),
        name="flash_attention_forward",
        interpret=interpret,
    )(offsets, window, runs, q, k, v, query_scale, query_segments, key_segments)
