"""Pages against plain arrays of what was written to them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
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


described = jax.jit(lambda rows: (rows.positions, rows.starts, rows.of_blocks))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 7)), min_size=5, max_size=5))
def test_new_tokens_stand_in_whole_blocks_at_the_end_of_their_rows(rows):
    past, new = (np.array(x) for x in zip(*rows, strict=True))
    blocks = -(-new // 3)
    assume(blocks.sum() <= 5)
    described_rows = Rows(lengths=ints(*past + new), counts=ints(*new), table=ints(), width=3)
    positions, starts, of_blocks = described(described_rows)
    expected = [[*range(p, p + n), *[-1] * (3 * b - n)] for p, n, b in zip(past, new, blocks, strict=True)]
    expected = [position for row in expected for position in row]
    np.testing.assert_array_equal(positions, expected + [-1] * (15 - len(expected)))
    np.testing.assert_array_equal(starts, 3 * (np.cumsum(blocks) - blocks))
    np.testing.assert_array_equal(of_blocks[: blocks.sum()], np.repeat(np.arange(5), blocks))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_is_what_is_gathered(mesh, dtype):
    """In blocks that are not all full, into pages in no order; what is not written stays as it was."""
    size, width, lengths, counts = 4, 3, (6, 11, 9, 5), (5, 4, 3, 0)
    table = ints([9, 3, 99], [0, 7, 2], [5, 1, 4], [8, 6, 99])
    table, lengths, counts = (np.concatenate([x, x[-1:]]) for x in (table, ints(*lengths), ints(*counts)))
    rows = Rows(lengths=lengths, counts=counts, table=table, width=width)
    k, v = (draw(5 * width, HEADS, DIM, seed=seed).astype(jnp.dtype(dtype)) for seed in (1, 2))
    pages, _ = make_pages(10, HEADS, size, DIM, dtype)
    before = np.ones_like(pages)
    pages, _ = jax.jit(write)(before, k, v, rows)
    for new, whole in zip((k, v), gathered(pages, rows, dtype=dtype), strict=True):
        assert whole.dtype == dtype
        for row, block in enumerate((0, 2, 4)):
            length, count = lengths[row], counts[row]
            own = new[block * width : block * width + count]
            np.testing.assert_array_equal(whole[row, :, length - count : length], own.swapaxes(0, 1))
            assert not whole[row, :, length:].any()
    assert (np.asarray(pages) != before).sum() == counts.sum() * HEADS * 2 * DIM


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
        rows = Rows(lengths=ints(length), counts=ints(new), table=table, width=count)
        pages, scales = run(pages, *fresh, rows, scales=scales)
    stored = np.asarray(pages)[[3, 1]].view(np.int8).reshape(2, HEADS, 32, 2 * DIM, 4).transpose(0, 2, 4, 1, 3)
    stored = stored.reshape(256, HEADS, 2, DIM)
    steps = np.asarray(scales)[[3, 1]].transpose(0, 3, 1, 2).reshape(256, HEADS, 2)[:count, ..., None]
    assert (np.abs(stored[:count] * steps - np.stack([k, v], axis=2)) <= steps / 2 + 1e-6).all()
    assert (stored[count:] == 0x77).all() and (np.asarray(pages)[[0, 2]] == sevens).all()
    for kind, whole in enumerate(gathered(pages, rows, scales, dtype="float32")):
        np.testing.assert_array_equal(whole[0, :, :count], (stored[:count] * steps)[:, :, kind].swapaxes(0, 1))


def test_quantised_blocks_may_share_a_page(mesh):
    """Those of a row that are side by side do; it comes to what one long block writes."""
    k, v = (draw(160, HEADS, DIM, seed=seed) for seed in (5, 6))
    made = {}
    for width in (160, 32):
        idle = 160 // width - 1
        lengths, counts = ints(150, *[0] * idle), ints(140, *[0] * idle)
        rows = Rows(lengths=lengths, counts=counts, table=jnp.tile(ints([3, 1]), (1 + idle, 1)), width=width)
        pages, scales = make_pages(4, HEADS, 128, DIM, "float32", quantised=True)
        made[width] = jax.jit(write)(pages, k, v, rows, scales=scales + 0.3)
    for one, many in zip(*made.values(), strict=True):
        np.testing.assert_array_equal(one, many)
    assert (np.asarray(made[32][1])[3, :, :, 10:] != np.float32(0.3)).all()


def test_each_device_has_a_head():
    with jax.set_mesh(make_mesh(tensor=4, devices=jax.devices()[:4])):
        assert [kv_heads(heads) for heads in (1, 2, 4, 8)] == [4, 4, 4, 8]
        with pytest.raises(ConfigError, match="3 kv heads .* tensor=4"):
            kv_heads(3)
