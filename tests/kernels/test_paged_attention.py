"""The paged attention kernel, interpreted, against its slow twin; and the twin against attention without pages."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.kernels import paged_attention as kernel
from qwen_jax.ops import paged_attention as ops
from qwen_jax.ops.pages import quantize

# The same sums in another order, in float32.
ROUNDING = dict(rtol=2e-5, atol=2e-6)

# Batches of one shape share one compiled kernel, and compiling is nearly all that these tests do.
TOKENS, ROWS, SLOTS = 80, 8, 384
EVERYTHING = 2**31 - 1  # a window


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of `past` tokens in the cache and `new` ones."""

    past: tuple[int, ...]
    new: tuple[int, ...]
    gaps: tuple[int, ...] = ()  # tokens of no row, after those of each
    heads: int = 14
    kv_heads: int = 2
    dim: int = 64
    page_size: int = 16
    dtype: type = jnp.float32

    def draw(self, *shape: int, seed: int) -> np.ndarray:
        numbers = np.random.default_rng(seed).normal(size=shape).astype(self.dtype)
        return numbers.astype(np.float32)

    @property
    def lengths(self) -> np.ndarray:
        return np.add(self.past, self.new)

    @property
    def starts(self) -> np.ndarray:
        return np.cumsum([0, *np.add(self.new, self.gaps or 0)])

    def written(self) -> list[np.ndarray]:
        """Keys and values of each row, [K, 2 H] for each token."""
        return [self.draw(length, self.kv_heads, 2 * self.dim, seed=i) for i, length in enumerate(self.lengths)]

    def queries(self) -> jax.Array:
        return jnp.asarray(self.draw(TOKENS, self.heads, self.dim, seed=99), self.dtype)

    def table(self) -> np.ndarray:
        """Pages in no order; an id that is never needed is out of range."""
        width = SLOTS // self.page_size
        ids = iter(np.random.default_rng(1).permutation(ROWS * width))
        table = np.full((ROWS, width), 10**6, np.int32)
        for row, length in enumerate(self.lengths):
            need = -(-length // self.page_size)
            table[row, :need] = [next(ids) for _ in range(need)]
        return table

    def arguments(self) -> tuple[jax.Array, ...]:
        """What follows q. Slots that hold no token are NaN."""
        table, size, more = self.table(), self.page_size, ROWS - len(self.new)
        pages = np.full((table.size, self.kv_heads, size, 2 * self.dim), np.nan, np.float32)
        for row, tokens in enumerate(self.written()):
            for slot, kv in enumerate(tokens):
                pages[table[row, slot // size], :, slot % size] = kv
        starts = [*self.starts[:-1], *self.starts[-1:].repeat(more)]
        ints = ([*self.lengths, *[5] * more], table, starts, [*self.new, *[0] * more])
        return jnp.asarray(pages, self.dtype), *(jnp.asarray(x, jnp.int32) for x in ints)

    def expected(self, window: int = EVERYTHING) -> np.ndarray:
        """The formula, query by query, without pages."""
        out = np.zeros((TOKENS, self.heads, self.dim))
        q = np.asarray(self.queries(), np.float32).reshape(TOKENS, self.kv_heads, -1, self.dim)
        for start, past, new, kv in zip(self.starts[:-1], self.past, self.new, self.written(), strict=True):
            for i in range(new):
                k, v = np.split(kv[max(0, past + i + 1 - window) : past + i + 1], 2, axis=-1)
                probs = np.exp(np.einsum("kgh,skh->kgs", q[start + i], k) * self.dim**-0.5)
                probs /= probs.sum(-1, keepdims=True)
                out[start + i] = np.einsum("kgs,skh->kgh", probs, v).reshape(self.heads, self.dim)
        return out


@functools.partial(jax.jit, static_argnames=("generation", "keys", "interpret"))
def fast(q, *arguments, generation="v4", keys=64, interpret=True, **options):
    """On v4 each of two cores takes one kv head; on v5e the core takes both at once."""
    blocks = kernel.Blocks(rows=64, keys=keys)
    options |= dict(generation=generation, blocks=blocks, interpret=interpret)
    return kernel.paged_attention(q, *arguments, scale=q.shape[2] ** -0.5, **options)


@jax.jit
def slow(q, *arguments, **options):
    return ops.paged_attention((q,), *arguments, scale=q.shape[2] ** -0.5, **options)


MIXED = dict(past=(5, 40, 0, 100, 33, 0), new=(1, 0, 20, 1, 37, 1))
CASES = {
    "decoding": (Batch(past=(5, 63, 0, 64), new=(1, 1, 1, 1)), EVERYTHING),
    "mixed": (Batch(**MIXED), EVERYTHING),
    "window": (Batch(**MIXED), 50),
    "window of one": (Batch(**MIXED), 1),
    "gaps": (Batch(**MIXED, gaps=(3, 0, 12, 1, 0, 2)), 50),
    "all rows idle": (Batch(past=(3, 4), new=(0, 0)), EVERYTHING),
    "as many rows and tokens as there can be": (Batch(past=(300,) * 8, new=(10,) * 8), EVERYTHING),
}


@pytest.mark.parametrize("case", CASES)
def test_both_equal_the_formula_without_pages(case):
    batch, window = CASES[case]
    for run in (slow, fast):
        out = run(batch.queries(), *batch.arguments(), window=jnp.int32(window))
        np.testing.assert_allclose(out, batch.expected(window), **ROUNDING)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_batch(data):
    """Any lengths and any window, with one compiled program."""
    row = st.tuples(st.integers(0, 200), st.integers(0, 40), st.integers(0, 9))
    past, new, gaps = zip(*data.draw(st.lists(row, min_size=1, max_size=ROWS)), strict=True)
    assume(sum(new + gaps) <= TOKENS)
    batch, window = Batch(past=past, new=new, gaps=gaps), data.draw(st.integers(1, 250))
    out = fast(batch.queries(), *batch.arguments(), window=jnp.int32(window))
    np.testing.assert_allclose(out, batch.expected(window), **ROUNDING)


def test_bfloat16_accumulates_in_float32():
    """With wide heads in a group of eight, and pages larger than blocks."""
    batch = Batch(**MIXED, heads=8, kv_heads=1, dim=128, page_size=32, dtype=jnp.bfloat16)
    for run in (functools.partial(fast, generation="v5e", keys=16), slow):
        out = run(batch.queries(), *batch.arguments())
        assert out.dtype == jnp.bfloat16
        # One rounding of the probabilities and one of the result, 2^-9 each, of values up to about 4.
        np.testing.assert_allclose(out.astype(jnp.float32), batch.expected(), rtol=0.02, atol=0.02)


def test_int8_pages_are_near_the_pages_they_were_made_from():
    # Without groups, and both heads at a time.
    batch = Batch(past=(5, 140, 0, 300), new=(1, 37, 20, 1), heads=2, page_size=128)
    q, arguments = batch.queries(), batch.arguments()
    (keys, key_scales), (values, value_scales) = (quantize(x) for x in jnp.split(arguments[0], 2, axis=-1))
    stored = np.asarray(jnp.concatenate([keys, values], axis=-1))
    words = stored.reshape(*stored.shape[:2], 32, 4, -1).swapaxes(3, 4).copy().view(np.int32)[..., 0]
    arguments = jnp.asarray(words), *arguments[1:]
    scales = jnp.stack([key_scales, value_scales], axis=2)
    out = fast(q, *arguments, scales=scales, generation="v5e", keys=256)
    np.testing.assert_allclose(out, slow(q, *arguments, scales=scales), **ROUNDING)
    # Steps are 1/127 of the largest of 64 normal numbers, about 3: half of one is 0.012 of a value, and as much times
    # |q| / sqrt(H) = 1 of a score.
    assert 1e-4 < np.abs(out - batch.expected()).max() < 0.05


def test_pages_before_the_window_may_be_gone():
    batch = Batch(past=(100, 101, 0), new=(1, 20, 1))
    q, (pages, lengths, table, *rest) = batch.queries(), batch.arguments()
    # What the table now names there is a page of NaN.
    gone = table.at[:2, :5].set(np.setdiff1d(np.arange(len(pages)), table)[0])
    for run in (fast, slow):
        out = run(q, pages, lengths, gone, *rest, window=jnp.int32(20))
        np.testing.assert_allclose(out, batch.expected(20), **ROUNDING)


def test_rows_share_the_pages_of_a_prefix():
    batch = Batch(past=(40, 40, 39), new=(1, 7, 1))
    q, (pages, lengths, table, *rest) = batch.queries(), batch.arguments()
    shared = table.at[:, :2].set(table[0, :2])
    copied = pages.at[table[1:3, :2]].set(pages[table[:1, :2]])
    expected = fast(q, copied, lengths, table, *rest, window=jnp.int32(EVERYTHING))
    for run in (fast, slow):
        out = run(q, pages, lengths, shared, *rest, window=jnp.int32(EVERYTHING))
        np.testing.assert_allclose(out, expected, **ROUNDING)


def test_a_row_of_nan_leaves_the_others_alone():
    batch = Batch(past=(60, 5, 60), new=(1, 20, 1))
    q, (pages, lengths, table, *rest) = batch.queries(), batch.arguments()
    poisoned = pages.at[table[0, :4]].set(jnp.nan)
    for run in (fast, slow):
        out, clean = (run(q, x, lengths, table, *rest, window=jnp.int32(EVERYTHING)) for x in (poisoned, pages))
        assert np.isnan(out[0]).all()
        np.testing.assert_array_equal(out[1:], clean[1:])


def test_copies_may_happen_at_any_time(capfd):
    """As late as can be, when what is read too early is NaN; accesses to what may still be in use are races."""
    batch = Batch(past=(40, 0, 9), new=(1, 18, 1), heads=2, kv_heads=1)
    q, arguments = batch.queries(), batch.arguments()
    interpret = pltpu.InterpretParams(dma_execution_mode="on_wait", uninitialized_memory="nan", detect_races=True)
    np.testing.assert_allclose(fast(q, *arguments, interpret=interpret), batch.expected(), **ROUNDING)
    assert "race" not in "".join(capfd.readouterr()).lower()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(heads=3), "3 query heads cannot share 2 kv heads"),
        (dict(dim=80), "160 lanes and heads of 80: wanted 2 x 80, and a multiple of 128"),
        (dict(page_size=12), "12 rows of float32: wanted a multiple of 8"),
        (dict(dtype=jnp.float16), "float16, scales are not given: wanted bfloat16 or float32"),
    ],
)
def test_shapes_that_do_not_tile_are_refused(change, message):
    batch = Batch(past=(5,), new=(1,), **change)
    with pytest.raises(ValueError, match=message):
        fast(batch.queries(), *batch.arguments())


@pytest.mark.parametrize(
    "dtype, rows, slots, message",
    [
        (jnp.int32, 32, None, "int32, scales are not given: wanted bfloat16"),
        (jnp.float32, 32, 128, "float32, scales are given: wanted .* int32 with them"),
        (jnp.int32, 8, 32, "32 slots of int8 .* multiple of 128"),
        (jnp.int32, 32, 256, "128 slots of int8 with scales for 256"),
    ],
)
def test_int8_pages_that_do_not_fit_their_scales_are_refused(dtype, rows, slots, message):
    batch = Batch(past=(5,), new=(1,))
    q, (_, *where) = batch.queries(), batch.arguments()
    scales = None if slots is None else jnp.ones((4, 2, 2, slots))
    with pytest.raises(ValueError, match=message):
        fast(q, jnp.zeros((4, 2, rows, 128), dtype), *where, scales=scales)


def test_a_table_that_scalar_memory_does_not_hold_is_refused():
    batch = Batch(past=(5,), new=(1,))
    q, (pages, lengths, table, *rest) = batch.queries(), batch.arguments()
    with pytest.raises(ValueError, match="8 rows x 32768 pages: wanted at most 245760 in all"):
        fast(q, pages, lengths, jnp.zeros((len(table), 2**15), jnp.int32), *rest)


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_generation_is_refused():
    batch = Batch(past=(5,), new=(1,))
    with pytest.raises(ValueError, match="v1"):
        kernel.paged_attention(batch.queries(), *batch.arguments(), scale=1.0, generation="v1", interpret=True)
