"""Pages against plain arrays of what was written to them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.errors import ConfigError
from qwen_jax.ops.pages import Rows, gather, kv_heads, make_pages, write
from qwen_jax.sharding import make_mesh

HEADS, DIM = 2, 8


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def gathered(*arguments, dtype):
    return [np.asarray(x) for x in jax.jit(functools.partial(gather, dtype=dtype))(*arguments)]


def ints(*x):
    return jnp.array(x, jnp.int32)


described = jax.jit(lambda rows: (rows.positions, rows.query_starts, rows.num_rows))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=4, max_size=4), st.integers(0, 12))
def test_new_tokens_stand_at_the_end_of_their_rows(past, count):
    new = [min(max(count - row * 3, 0), 3) for row in range(4)]
    rows = Rows(lengths=ints(*np.add(past, new)), table=ints(), count=jnp.int32(count), width=3)
    positions, starts, num_rows = described(rows)
    expected = [position for p, n in zip(past, new, strict=True) for position in range(p, p + n)]
    np.testing.assert_array_equal(positions, expected + [-1] * (12 - count))
    np.testing.assert_array_equal(starts, np.cumsum([0, *new]))
    assert num_rows == np.count_nonzero(new)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_is_what_is_gathered(mesh, dtype):
    """In pieces, of which the last is not full, into pages in no order; what is not written stays as it was."""
    size, width, lengths = 4, 6, (6, 11, 9, 5)
    count = 6 + 6 + 3  # of rows 0 to 2; row 3 is idle
    table = ints([9, 3, 99], [0, 7, 2], [5, 1, 4], [8, 6, 99])
    rows = Rows(lengths=ints(*lengths), table=table, count=jnp.int32(count), width=width)
    k, v = (draw(4 * width, HEADS, DIM, seed=seed).astype(jnp.dtype(dtype)) for seed in (1, 2))
    pages, _ = make_pages(10, HEADS, size, DIM, dtype)
    before = np.ones_like(pages)
    pages, _ = jax.jit(write)(before, k, v, rows)
    for new, whole in zip((k, v), gathered(pages, rows, dtype=dtype), strict=True):
        assert whole.dtype == dtype
        for row, (length, first, end) in enumerate([(6, 0, 6), (11, 6, 12), (9, 12, 15)]):
            np.testing.assert_array_equal(whole[row, :, length - (end - first) : length], new[first:end].swapaxes(0, 1))
            assert not whole[row, :, length:].any()
    assert (np.asarray(pages) != before).sum() == count * HEADS * 2 * DIM


def test_quantised_writes_are_within_half_a_step(mesh):
    """And leave the bytes beside them as they are: the tokens come in pieces, which cut words and cross a page."""
    count, pieces, sevens, table = 136, (5, 1, 90, 40), 0x77777777, ints([3, 1])
    k, v = (draw(count, HEADS, DIM, seed=seed) for seed in (5, 6))
    k[0] = 0
    pages, scales = make_pages(4, HEADS, 128, DIM, "float32", quantised=True)
    pages = jnp.asarray(np.asarray(pages) + sevens)
    run = jax.jit(write, donate_argnums=0, donate_argnames="scales")
    for new, length in zip(pieces, np.cumsum(pieces), strict=True):
        # One width, so one program; only the first tokens are real.
        fresh = (np.roll(x, new - length, axis=0) for x in (k, v))
        rows = Rows(lengths=ints(length), table=table, count=jnp.int32(new), width=count)
        pages, scales = run(pages, *fresh, rows, scales=scales)
    stored = np.asarray(pages)[[3, 1]].view(np.int8).reshape(2, HEADS, 32, 2 * DIM, 4).transpose(0, 2, 4, 1, 3)
    stored = stored.reshape(256, HEADS, 2, DIM)
    steps = np.asarray(scales)[[3, 1]].transpose(0, 3, 1, 2).reshape(256, HEADS, 2)[:count, ..., None]
    assert (np.abs(stored[:count] * steps - np.stack([k, v], axis=2)) <= steps / 2 + 1e-6).all()
    assert (stored[count:] == 0x77).all() and (np.asarray(pages)[[0, 2]] == sevens).all()
    for kind, whole in enumerate(gathered(pages, rows, scales, dtype="float32")):
        np.testing.assert_array_equal(whole[0, :, :count], (stored[:count] * steps)[:, :, kind].swapaxes(0, 1))


def test_each_device_has_a_head():
    with jax.set_mesh(make_mesh(tensor=4, devices=jax.devices()[:4])):
        assert [kv_heads(heads) for heads in (1, 2, 4, 8)] == [4, 4, 4, 8]
        with pytest.raises(ConfigError, match="3 kv heads .* tensor=4"):
            kv_heads(3)
