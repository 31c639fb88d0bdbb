"""How attention is cut into tiles, and which of them a block of queries visits.

Queries are taken in blocks; keys in blocks, which are loaded, and within these in chunks, which are computed. The
chunks that a block of queries visits are one run, [first, end). In it lies another, [clear_first, clear_end), of chunks
whose every score counts, so that no mask is needed. Both follow from a few integers by arithmetic of the scalar core.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Int

# The window of a query that sees everything: beyond any length, and far from the end of int32.
_UNLIMITED = 1 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """The blocks of one pass over T x S scores; the size of every block is a power of two.

    Attributes:
      queries, keys: T and S.
      tokens: queries of one head in a block.
      heads: query heads in a block, all of one kv head; the rows of a block are heads * tokens, head by head.
      block_kv: keys that are loaded at once.
      chunk: keys that are computed at once.
    """

    queries: int
    keys: int
    tokens: int
    heads: int
    block_kv: int
    chunk: int

    @property
    def rows(self) -> int:
        return self.heads * self.tokens

    @property
    def query_blocks(self) -> int:
        return -(-self.queries // self.tokens)

    @property
    def kv_blocks(self) -> int:
        return -(-self.keys // self.block_kv)

    @property
    def chunks(self) -> int:
        """How many chunks hold all keys."""
        return -(-self.keys // self.chunk)


def cut(*, queries: int, keys: int, group: int, block_q: int, block_kv: int, block_kv_compute: int) -> Tiles:
    """Tiles for `group` query heads per kv head, none larger than the lengths ask for."""
    tokens, block_kv = min(block_q, _round_up(queries)), min(block_kv, _round_up(keys))
    heads = max(n for n in range(1, group + 1) if group % n == 0 and (n == 1 or n * tokens <= block_q))
    chunk = min(block_kv_compute, block_kv)
    return Tiles(queries=queries, keys=keys, tokens=tokens, heads=heads, block_kv=block_kv, chunk=chunk)


def _round_up(length: int) -> int:
    """The next power of two, and no less than the 128 lanes of a register."""
    return max(128, 1 << (length - 1).bit_length())


class Scalars(NamedTuple):
    """What a kernel knows before it loads anything.

    Attributes:
      offsets: [B], the place of query 0 among the keys.
      window: [1], how many of the latest keys are visible, 0 for all; or None, for all.
      runs: of `segment_runs`, or None.
    """

    offsets: Any
    window: Any
    runs: Any

    def width(self):
        return _UNLIMITED if self.window is None else jnp.where(self.window[0] > 0, self.window[0], _UNLIMITED)


def kv_blocks(tiles: Tiles, scalars: Scalars, batch, query_block):
    """The first and the last block of keys that a block of queries sees; if none, the last comes before the first."""
    position = scalars.offsets[batch] + query_block * tiles.tokens
    first = _divide(position - scalars.width() + 1, tiles.block_kv)
    last = _divide(position + tiles.tokens - 1, tiles.block_kv)
    if scalars.runs is not None:
        skipped, dropped = scalars.runs[0, batch, query_block], scalars.runs[1, batch, query_block]
        per_block = tiles.block_kv // tiles.chunk
        first = jnp.maximum(first, _divide(skipped, per_block))
        last = jnp.minimum(last, _divide(tiles.chunks - dropped - 1, per_block))
    return jnp.maximum(first, 0), jnp.minimum(last, tiles.kv_blocks - 1)


def query_blocks(tiles: Tiles, scalars: Scalars, batch, kv_block):
    """The first and the last block of queries that sees a block of keys, likewise."""
    position = kv_block * tiles.block_kv - scalars.offsets[batch]
    first = _divide(position, tiles.tokens)
    last = _divide(position + tiles.block_kv - 1 + scalars.width() - 1, tiles.tokens)
    return jnp.maximum(first, 0), jnp.minimum(last, tiles.query_blocks - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Visit:
    """A block of queries at a block of keys, in scalars of the kernel.

    Attributes:
      scalars: what the kernel knows of the masks.
      lead: how far the first query is ahead of the first key.
      keys_left: keys from the first of the block to the last there is.
      first, end, clear_first, clear_end: chunks of the block, counted from its first.
    """

    tiles: Tiles
    scalars: Scalars
    lead: jax.Array
    keys_left: jax.Array
    first: jax.Array
    end: jax.Array
    clear_first: jax.Array
    clear_end: jax.Array

    def clear(self, chunk) -> jax.Array:
        return (chunk >= self.clear_first) & (chunk < self.clear_end)

    def for_each(self, first, body: Callable[[jax.Array, bool], None]) -> None:
        """`body(chunk, clear)` for the chunks from `first` on, in order."""
        clear_first = jnp.clip(self.clear_first, first, jnp.maximum(first, self.end))
        clear_end = jnp.maximum(clear_first, jnp.minimum(self.clear_end, self.end))
        if self.scalars.window is not None or self.scalars.runs is not None:
            jax.lax.fori_loop(first, clear_first, lambda c, _: body(c, False), None)
        jax.lax.fori_loop(clear_first, clear_end, lambda c, _: body(c, True), None)
        jax.lax.fori_loop(clear_end, self.end, lambda c, _: body(c, False), None)

    def keys(self, chunk):
        """The chunk as a slice of its block."""
        return pl.ds(pl.multiple_of(chunk * self.tiles.chunk, self.tiles.chunk), self.tiles.chunk)

    def visible(self, chunk, columns: slice, query_segments, key_segments) -> Bool[Array, "keys rows"]:
        """Which scores of a chunk count; columns: a slice of the rows of the block of queries."""
        tiles, lead = self.tiles, self.lead - chunk * self.tiles.chunk
        shape = tiles.chunk, columns.stop - columns.start
        key = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        query = jax.lax.broadcasted_iota(jnp.int32, shape, 1) + columns.start
        if tiles.heads > 1:
            query &= tiles.tokens - 1
        seen = query - key >= -lead
        if self.scalars.window is not None:
            seen &= query - key < self.scalars.width() - lead
        if tiles.keys % tiles.chunk:
            seen &= key < self.keys_left - chunk * tiles.chunk
        if query_segments is not None:
            queries = jnp.concatenate([query_segments[...]] * tiles.heads, axis=1)[:, columns]
            seen &= queries == key_segments[:, self.keys(chunk)].T
        return seen

    def existing(self, x: Array, chunk) -> Array:
        """The chunk x of keys or values, zero beyond the last: what is read there may be NaN, which no zero absorbs."""
        if self.tiles.keys % self.tiles.chunk == 0:
            return x
        key = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
        return jnp.where(key < self.keys_left - chunk * self.tiles.chunk, x, 0)


def visit(tiles: Tiles, scalars: Scalars, batch, query_block, kv_block) -> Visit:
    """The visit of a block of queries at a block of keys."""
    chunk, before, window = tiles.chunk, kv_block * (tiles.block_kv // tiles.chunk), scalars.width()
    lead = scalars.offsets[batch] + query_block * tiles.tokens - kv_block * tiles.block_kv
    latest, keys_left = lead + tiles.tokens - 1, tiles.keys - kv_block * tiles.block_kv
    first, clear_first = _divide(lead - window + 1, chunk), _divide(latest - window + chunk, chunk)
    end = jnp.minimum(_divide(latest, chunk) + 1, tiles.chunks - before)
    clear_end = jnp.minimum(_divide(lead + 1, chunk), _divide(keys_left, chunk))
    if scalars.runs is not None:
        skipped, dropped, clear_skipped, clear_dropped = (scalars.runs[n, batch, query_block] for n in range(4))
        first, end = jnp.maximum(first, skipped - before), jnp.minimum(end, tiles.chunks - dropped - before)
        clear_first = jnp.maximum(clear_first, clear_skipped - before)
        clear_end = jnp.minimum(clear_end, tiles.chunks - clear_dropped - before)
    return Visit(
        tiles=tiles,
        scalars=scalars,
        lead=lead,
        keys_left=keys_left,
        first=jnp.maximum(first, 0),
        end=jnp.minimum(end, tiles.block_kv // chunk),
        clear_first=clear_first,
        clear_end=clear_end,
    )


def segment_runs(
    tiles: Tiles, query_segments: Int[Array, "B T"], key_segments: Int[Array, "B S"]
) -> Int[Array, "4 B blocks"]:
    """What segments take from the run of each block of queries, in chunks: skipped before and dropped after it, and the
    same of its clear part. A query of a negative segment sees nothing."""
    (q_low, q_high, q_same), (k_low, k_high, k_same) = (
        _bounds(query_segments, tiles.tokens),
        _bounds(key_segments, tiles.chunk),
    )
    apart = (q_low[:, :, None] > k_high[:, None]) | (k_low[:, None] > q_high[:, :, None])
    same = q_same[:, :, None] & k_same[:, None] & (q_high[:, :, None] == k_high[:, None])
    clear_skipped = _leading(~same)
    # Of several clear parts the first is used; segments in ascending order have one.
    clear_end = _leading(same | (jnp.arange(tiles.chunks) < clear_skipped[..., None]))
    return jnp.stack([_leading(apart), _leading(apart[..., ::-1]), clear_skipped, tiles.chunks - clear_end])


def _bounds(segments: Int[Array, "B L"], size: int):
    """Least and largest segment of each block, leaving padding out, and whether it is one segment without padding."""
    blocks = jnp.pad(segments, ((0, 0), (0, -segments.shape[1] % size))).reshape(len(segments), -1, size)
    low = jnp.where(blocks > 0, blocks, jnp.iinfo(jnp.int32).max).min(-1)
    high = blocks.max(-1)
    return low, high, (blocks.min(-1) == high) & (high > 0)


def _leading(flags: Bool[Array, "*blocks chunks"]) -> Int[Array, "*blocks"]:
    """How many flags are set before the first that is not."""
    return jnp.cumprod(flags.astype(jnp.int32), axis=-1).sum(-1, dtype=jnp.int32)


def _divide(x, size: int):
    # A shift floors negative numbers, which a division does not.
    return jax.lax.shift_right_arithmetic(x, jnp.int32(size.bit_length() - 1))
