"""Paged attention against its slow twin, and dual chunks in pages against dual chunks in contiguous keys."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.ops.paged_attention import attend
from qwen_jax.ops.pages import Rows, make_pages, write

# Same sums in another order, in float32.
ROUNDING = dict(rtol=2e-5, atol=1e-5)
HEADS, KV_HEADS, DIM, SIZE, CHUNK = 4, 2, 64, 16, 90
GROUPS = {
    "decoding": (1, (700, 3, 33, 1, 260, 0, 9), 5),  # width, lengths, count
    "pieces": (80, (80, 333, 200, 5), 180),
}


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def group(name, size=SIZE):
    """Pages in no order; ids that are never needed are out of range."""
    width, lengths, count = GROUPS[name]
    slots = 768
    table = np.random.default_rng(0).permutation(len(lengths) * slots // size).reshape(len(lengths), -1)
    live = np.arange(len(lengths)) < -(-count // width)
    table = np.where(live[:, None] & (np.arange(slots // size) * size < np.array(lengths)[:, None]), table, 10**6)
    ints = lambda x: jnp.asarray(x, jnp.int32)
    return Rows(lengths=ints(lengths), table=ints(table), count=ints(count), width=width)


def whole(rows):
    """The same rows, all of whose tokens are new."""
    slots = 768
    for row in range(len(rows.lengths)):
        yield Rows(lengths=rows.lengths[row, None], table=rows.table[row, None], count=rows.lengths[row], width=slots)


@functools.partial(jax.jit, static_argnames=("size", "quantised"))
def fill(rows, *, size=SIZE, quantised=False):
    pages, scales = make_pages(len(rows.lengths) * 768 // size, KV_HEADS, size, DIM, "float32", quantised=quantised)
    if not quantised:
        pages = pages + jnp.nan
    for row, part in enumerate(whole(rows)):
        part = Rows(
            lengths=part.lengths,
            table=part.table,
            count=jnp.where(row < rows.num_rows, part.count, 0),
            width=part.width,
        )
        k, v = draw(768, KV_HEADS, DIM, seed=row), draw(768, KV_HEADS, DIM, seed=100 + row)
        pages, scales = write(pages, k, v, part, scales)
    return pages, scales


run = jax.jit(attend, static_argnames=("chunk", "implementation"))


def queries(rows, kinds=1):
    return tuple(draw(len(rows.lengths) * rows.width, HEADS, DIM, seed=200 + i) for i in range(kinds))


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("kinds", [1, 3])
def test_any_window_and_chunk(mesh, name, kinds):
    rows = group(name)
    pages, _ = fill(rows)
    chunk = CHUNK if kinds == 3 else None
    for window in (1, 50, 2**31 - 1):
        got, expected = (
            run(queries(rows, kinds), pages, rows, window=jnp.int32(window), chunk=chunk, implementation=name)
            for name in ("xla", "reference")
        )
        np.testing.assert_allclose(got, expected, **ROUNDING)
        count = int(rows.count)
        assert not np.asarray(got[count:]).any() and np.abs(got[:count]).max(axis=(1, 2)).min() > 0
