"""The forward pass of `flash_attention`.

Scores stand as [keys, queries]: the softmax reduces over sublanes, its statistics lie along lanes, and the products
with the values, `v^T p`, fill the matrix unit. While the vector unit turns the scores of one chunk of keys into
probabilities, the matrix unit computes those of the next, which wait in VMEM.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.kernels.tiles import Tiles, kv_blocks, segment_runs, visit

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


def _kernel(
    control, runs, q, k, v, query_scale, query_segments, key_segments, out, lse,
    scaled, scores, maxima, top, total, sums, *, tiles: Tiles, scale: float,
):  # fmt: skip
    """Scratch: scaled [rows, H]; scores [chunk, rows] and maxima [1, rows] of the chunk that comes next; the state of
    the softmax: top and total [1, rows], sums [H, rows]."""
    batch, i, j = pl.program_id(0), pl.program_id(3), pl.program_id(4)
    first, block = _kv_block(tiles, control, batch, i, j)
    at = visit(tiles, control, runs, batch, i, block)
    pieces = [slice(start, min(start + _PIECE, tiles.rows)) for start in range(0, tiles.rows, _PIECE)]

    @pl.when(j == 0)
    def _():
        scaled[...] = scale_rows(q[...], query_scale, tiles=tiles, scale=scale).astype(scaled.dtype)
        top[...] = jnp.full_like(top, _LEAST_MAXIMUM)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    def compute(chunk, piece, clear):
        x = dot(k[at.keys(chunk), :], scaled[piece, :], ABT)
        return x if clear else jnp.where(at.visible(chunk, piece, query_segments, key_segments), x, HIDDEN)

    def put(x, piece):
        scores[:, piece] = x
        maxima[:, piece] = x.max(axis=0, keepdims=True)

    def accumulate(piece, values):
        new_top = jnp.maximum(top[:, piece], maxima[:, piece])
        shrink = jnp.exp2(top[:, piece] - new_top)
        probs = jnp.exp2(scores[:, piece] - new_top)
        top[:, piece] = new_top
        total[:, piece] = total[:, piece] * shrink + probs.sum(axis=0, keepdims=True)
        sums[:, piece] = sums[:, piece] * shrink + dot(values, probs.astype(values.dtype), ATB)

    def begin(clear):
        for piece in pieces:
            put(compute(at.first, piece, clear), piece)

    def advance(chunk, clear):
        for piece in pieces:
            x = compute(chunk, piece, clear)
            accumulate(piece, v[at.keys(chunk - 1), :])
            put(x, piece)

    @pl.when((block >= first) & (at.first < at.end))
    def _():
        clear = at.clear(at.first)
        pl.when(clear)(lambda: begin(True))
        pl.when(~clear)(lambda: begin(False))
        at.for_each(at.first + 1, advance)
        for piece in pieces:
            accumulate(piece, at.existing(v[at.keys(at.end - 1), :], at.end - 1))

    @pl.when(j == tiles.kv_blocks - 1)
    def _():
        seen = total[...] > 0
        out[...] = (sums[...] * jnp.where(seen, 1 / total[...], 0)).T.reshape(out.shape).astype(out.dtype)
        logs = jnp.where(seen, (top[...] + jnp.log2(total[...])) / LOG2_E, NOTHING)
        for head in range(tiles.heads):
            lse[head] = logs[:, head * tiles.tokens : (head + 1) * tiles.tokens]


def _kv_block(tiles: Tiles, control, batch, i, j):
    """The first block of keys that a block of queries sees, and the one at step j: before the first, there is no work.

    The last block comes at the last step, so that steps without work come first, while the first block is loaded.
    """
    first, last = kv_blocks(tiles, control, batch, i)
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


def forward(
    q, k, v, control, query_scale, query_segments, key_segments, *, tiles: Tiles, scale: float, interpret: bool
):
    """out [B, K, G, T, H] and lse [B, K, G, 1, T] of q [B, K, G, T, H] and k, v [B, K, S, H].

    control: see `tiles.kv_blocks`; query_scale and query_segments [B, 1, T], key_segments [B, 1, S], or None.
    """
    batch, kv_heads, group, length, dim = q.shape
    runs = segment_runs(tiles, query_segments[:, 0], key_segments[:, 0]) if tiles.segmented else None

    def place(b, h, g, i, j, control, runs=None):
        first, block = _kv_block(tiles, control, b, i, j)
        return b, h, g, i, jnp.maximum(block, jnp.minimum(first, tiles.kv_blocks - 1))

    spec = specs(tiles, dim, place)
    row = pltpu.VMEM((1, tiles.rows), jnp.float32)
    return pl.pallas_call(
        functools.partial(_kernel, tiles=tiles, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, kv_heads, group // tiles.heads, tiles.query_blocks, tiles.kv_blocks),
            in_specs=[
                spec["queries"],
                spec["keys"],
                spec["keys"],
                None if query_scale is None else spec["per_token"],
                spec["per_token"] if tiles.segmented else None,
                spec["per_key"] if tiles.segmented else None,
            ],
            out_specs=[spec["queries"], spec["per_query"]],
            scratch_shapes=[
                pltpu.VMEM((tiles.rows, dim), q.dtype),
                pltpu.VMEM((tiles.chunk, tiles.rows), jnp.float32),
                row,
                row,
                row,
                pltpu.VMEM((dim, tiles.rows), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, kv_heads, group, 1, length), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary", "arbitrary")
        ),
        name="flash_attention_forward",
        interpret=interpret,
    )(control, runs, q, k, v, query_scale, query_segments, key_segments)
