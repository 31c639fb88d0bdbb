"""Which tiles a kernel visits, against the whole table of what sees what."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.kernels.tiles import Scalars, Tiles, cut, kv_blocks, query_blocks, segment_runs, visit


def tiles(queries: int, keys: int, block_q: int, block_kv: int, chunk: int) -> Tiles:
    return cut(queries=queries, keys=keys, group=1, block_q=block_q, block_kv=block_kv, block_kv_compute=chunk)


@functools.partial(jax.jit, static_argnums=0)
def visits(tiles: Tiles, offset, window, query_segments, key_segments):
    """[6, query blocks, kv blocks]: first, end, clear_first and clear_end of each visit, counted from the first chunk
    of all, and whether each of the two blocks is among those that the other is taken to see."""
    segments = jnp.where(query_segments == 0, -1, query_segments)[None], key_segments[None]
    scalars = Scalars(offset[None], window[None], segment_runs(tiles, *segments))

    def one(i, j):
        at, before = visit(tiles, scalars, 0, i, j), j * (tiles.block_kv // tiles.chunk)
        ends = [before + end for end in (at.first, at.end, at.clear_first, at.clear_end)]
        (first_j, last_j), (first_i, last_i) = kv_blocks(tiles, scalars, 0, i), query_blocks(tiles, scalars, 0, j)
        seen = (first_j <= j) & (j <= last_j), (first_i <= i) & (i <= last_i)
        return jnp.stack([*ends, *(x.astype(jnp.int32) for x in seen)])

    grid = jnp.meshgrid(jnp.arange(tiles.query_blocks), jnp.arange(tiles.kv_blocks), indexing="ij")
    return jax.vmap(jax.vmap(one, out_axes=1), out_axes=1)(*grid)


def all_visits(tiles, offset=0, window=0, query_segments=None, key_segments=None):
    ids = [np.ones(n) if x is None else x for x, n in ((query_segments, tiles.queries), (key_segments, tiles.keys))]
    return np.asarray(visits(tiles, *(jnp.asarray(x, jnp.int32) for x in (offset, window, *ids))))


def chunks_of(tiles, offset, window, query_segments, key_segments):
    """[query blocks, chunks]: whether any query of a block sees any key of a chunk, and whether all see all."""
    width = tiles.chunks * tiles.chunk
    distance = offset + np.arange(tiles.queries)[:, None] - np.arange(width)
    ids = np.pad(key_segments, (0, width - tiles.keys))
    seen = (distance >= 0) & ((distance < window) | (window == 0)) & (query_segments[:, None] == ids) & (ids != 0)
    blocks = [seen[first : first + tiles.tokens] for first in range(0, tiles.queries, tiles.tokens)]
    split = [block.reshape(len(block), tiles.chunks, tiles.chunk) for block in blocks]
    return np.stack([x.any((0, 2)) for x in split]), np.stack([x.all((0, 2)) for x in split])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    tiles=st.sampled_from(
        [tiles(300, 520, 128, 256, 128), tiles(900, 900, 256, 512, 128), tiles(512, 256, 128, 256, 256)]
    ),
    offset=st.integers(-300, 1200),
    window=st.integers(0, 900),
    run=st.sampled_from([900, 200, 50]),
    in_order=st.booleans(),
)
def test_all_that_is_seen_is_visited_and_nothing_hidden_is_clear(tiles, offset, window, run, in_order):
    rng = np.random.default_rng(run)
    ids = [rng.integers(0, 4, size=length).repeat(run)[:length] for length in (tiles.queries, tiles.keys)]
    ids = [np.sort(x) if in_order else x for x in ids]
    any_seen, all_seen = chunks_of(tiles, offset, window, *ids)
    table = all_visits(tiles, offset, window, *ids)
    for i, j in np.ndindex(table.shape[1:]):
        first, end, clear_first, clear_end, *inside = table[:, i, j]
        per_block = tiles.block_kv // tiles.chunk
        for chunk in range(j * per_block, min((j + 1) * per_block, tiles.chunks)):
            visited = first <= chunk < end
            assert not any_seen[i, chunk] or (visited and all(inside))
            assert all_seen[i, chunk] or not (visited and clear_first <= chunk < clear_end)


def test_half_of_a_causal_table_is_visited_and_the_diagonal_is_masked():
    first, end, clear_first, clear_end, *_ = all_visits(tiles(2048, 2048, 512, 1024, 128))
    clear = np.minimum(end, clear_end) - np.maximum(first, clear_first)
    assert np.maximum(end - first, 0).sum(1).tolist() == [4, 8, 12, 16]
    assert np.maximum(clear, 0).sum(1).tolist() == [0, 4, 8, 12]


def test_a_window_and_segments_bound_the_visits():
    cuts = tiles(4096, 4096, 256, 512, 128)
    documents = np.arange(4096) // 300 + 1
    # 256 queries with a window of 300 see 555 keys, which lie in 6 chunks; those of two documents, 600.
    for options in (dict(window=300), dict(query_segments=documents, key_segments=documents)):
        first, end, *_ = all_visits(cuts, **options)
        assert np.maximum(end - first, 0).sum(1).max() <= 6


def test_blocks_of_other_documents_are_not_loaded():
    documents = np.arange(2048) // 512 + 1
    *_, loaded, _ = all_visits(tiles(2048, 2048, 256, 256, 128), query_segments=documents, key_segments=documents)
    assert loaded.tolist() == [[j // 2 == i // 2 and j <= i for j in range(8)] for i in range(8)]
    # Of chunks that see the one before theirs, as in dual chunk attention, each sees two blocks, and the first none.
    *_, loaded, _ = all_visits(tiles(2048, 2048, 256, 256, 128), query_segments=documents - 1, key_segments=documents)
    assert loaded.tolist() == [[j // 2 == i // 2 - 1 for j in range(8)] for i in range(8)]
