"""Paged attention against its slow twin, and dual chunks in pages against dual chunks of contiguous keys."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import sharding
from qwen_jax.errors import ConfigError
from qwen_jax.kernels import paged_attention as kernel
from qwen_jax.ops.dual_chunk import dual_chunk_attention
from qwen_jax.ops.mask import Mask
from qwen_jax.ops.paged_attention import attend, paged_attention
from qwen_jax.ops.pages import SPLIT, Rows, gather, kv_heads, make_pages, write

# Same sums in another order, in float32.
ROUNDING = dict(rtol=2e-5, atol=1e-5)
HEADS, KV_HEADS, DIM, SLOTS, CHUNK = 4, 2, 64, 384, 90
EVERYTHING = 2**31 - 1  # a window
WIDTHS = {"decoding": 1, "pieces": 24}
LENGTHS = {"decoding": (3, 384, 33, 1, 260, 129, 50, 9), "pieces": (72, 333, 20, 48, 5, 9)}
COUNTS = {"decoding": (1, 1, 1, 1, 1, 1, 0, 0), "pieces": (60, 18, 20, 0, 0, 0)}


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def group(name, size=16):
    """Rows in pages in no order, the last of them idle; ids that are never needed are out of range."""
    counts = np.array(COUNTS[name], np.int32)
    lengths = LENGTHS[name] * (counts > 0)
    ids = np.random.default_rng(0).permutation(len(lengths) * SLOTS // size).reshape(len(lengths), -1)
    table = np.where(np.arange(ids.shape[1]) * size < lengths[:, None], ids, 10**6)
    lengths = jnp.asarray(LENGTHS[name], jnp.int32)
    return Rows(lengths=lengths, counts=counts, table=jnp.asarray(table, jnp.int32), width=WIDTHS[name])


def contiguous(rows):
    """Keys beside values, [R, slots, K, 2 H]."""
    return draw(len(rows.lengths), SLOTS, KV_HEADS, 2 * DIM, seed=1)


def filled(rows):
    """Pages; NaN in slots that hold no token."""
    table, size = np.asarray(rows.table), SLOTS // rows.table.shape[1]
    pages = np.full((table.size, KV_HEADS, size, 2 * DIM), np.nan, np.float32)
    live = np.count_nonzero(rows.counts)
    for ids, length, kv in zip(table[:live], np.asarray(rows.lengths), contiguous(rows), strict=False):
        for slot in range(length):
            pages[ids[slot // size], :, slot % size] = kv[slot]
    return pages


def queries(rows, kinds=1):
    return tuple(draw(len(rows.lengths) * rows.width, HEADS, DIM, seed=2 + i) for i in range(kinds))


run = jax.jit(attend, static_argnames=("chunk", "implementation"))


@pytest.mark.parametrize("name, windows", [("decoding", (1, 50, EVERYTHING)), ("pieces", (50, EVERYTHING))])
def test_it_equals_its_slow_twin(mesh, name, windows):
    """With any window; rows that are idle get zeros, and every other token something."""
    rows = group(name)
    pages, real = filled(rows), np.asarray(rows.positions) >= 0
    for window in windows:
        got, expected = (
            run(queries(rows), pages, rows, window=jnp.int32(window), implementation=implementation)
            for implementation in ("xla", "reference")
        )
        np.testing.assert_allclose(got, expected, **ROUNDING)
        np.testing.assert_array_equal(np.asarray(got).any(axis=(1, 2)), real)


@pytest.mark.parametrize("name, implementation", [("decoding", "xla"), ("decoding", "reference"), ("pieces", "xla")])
def test_dual_chunks_are_those_of_contiguous_keys(mesh, name, implementation):
    rows, window = group(name), jnp.int32(250)
    q, of_blocks, real = queries(rows, kinds=3), rows.of_blocks, np.asarray(rows.positions) >= 0
    num = len(of_blocks)
    k, v = np.split(contiguous(rows)[of_blocks].swapaxes(1, 2), 2, axis=-1)
    slots = np.tile(np.arange(SLOTS, dtype=np.int32), (num, 1))
    mask = Mask(query_positions=rows.positions.reshape(num, -1), key_positions=slots, window=window)
    by_row = tuple(x.reshape(num, -1, *x.shape[1:]) for x in q)
    formula = jax.jit(functools.partial(dual_chunk_attention, chunk=CHUNK, implementation="reference"))
    expected = np.asarray(formula(by_row, k, v, mask))
    got = run(q, filled(rows), rows, chunk=CHUNK, window=window, implementation=implementation)
    np.testing.assert_allclose(got[real], expected.reshape(got.shape)[real], **ROUNDING)


def test_rows_within_a_chunk_are_plain_attention(mesh):
    rows = group("decoding")
    options = dict(chunk=SLOTS, implementation="xla")
    program = jax.make_jaxpr(functools.partial(attend, **options))
    pages = filled(rows)
    assert str(program(queries(rows, kinds=3)[:1], pages, rows)) == str(program(queries(rows), pages, rows))


def test_quantised_pages(mesh):
    rows = group("decoding", size=128)
    random = np.random.default_rng(0)
    pages, scales = make_pages(48, KV_HEADS, 128, DIM, "float32", quantised=True)
    pages = jnp.asarray(random.integers(-(2**31), 2**31, pages.shape), jnp.int32)
    scales = jnp.asarray(random.uniform(0.005, 0.02, scales.shape), jnp.float32)
    got, expected = (
        run(queries(rows), pages, rows, scales=scales, implementation=implementation)
        for implementation in ("xla", "reference")
    )
    np.testing.assert_allclose(got, expected, **ROUNDING)


@pytest.mark.parametrize("sizes", [dict(tensor=2), dict(tensor=4, expert=2)])
def test_on_a_mesh_it_is_what_it_is_on_one_device(sizes):
    """Also where devices share a kv head, and where tokens are split."""
    rows = group("decoding")
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        expected = run(queries(rows), filled(rows), rows, window=jnp.int32(EVERYTHING), implementation="xla")

    @jax.jit
    def step(q, k, v, pages, rows):
        q = jax.sharding.reshard(q, sharding.activation("bnh", q.shape))
        k, v = (jax.sharding.reshard(x, sharding.activation("bkh", x.shape)) for x in (k, v))
        pages, _ = write(pages, k, v, rows)
        out = attend((q,), pages, rows, implementation="xla")
        assert jax.typeof(out).sharding.spec == jax.typeof(q).sharding.spec
        return out, gather(pages, rows, dtype="float32")

    live, last = np.count_nonzero(rows.counts), np.asarray(rows.lengths) - 1
    latest = contiguous(rows)[np.arange(len(last)), last]
    erased = filled(rows)
    for row in range(live):
        erased[np.asarray(rows.table)[row, last[row] // 16], :, last[row] % 16] = np.nan
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[: np.prod(list(sizes.values()))], **sizes)):
        repeats = kv_heads(KV_HEADS) // KV_HEADS
        pages = jax.device_put(np.repeat(erased, repeats, axis=1), jax.NamedSharding(jax.sharding.get_mesh(), SPLIT))
        out, (k, _) = step(*queries(rows), *np.split(latest, 2, axis=-1), pages, rows)
    np.testing.assert_allclose(out, expected, **ROUNDING)
    for row in range(live):
        keys = np.repeat(contiguous(rows)[row, : last[row] + 1, :, :DIM], repeats, axis=1)
        np.testing.assert_array_equal(k[row, :, : last[row] + 1], keys.swapaxes(0, 1))


def test_the_kernel_is_given_the_rows(mesh, monkeypatch):
    """A slow twin in the place of the kernel, which has its own tests."""
    rows = group("decoding")

    def twin(q, *ragged, generation, interpret, **options):
        assert interpret
        return paged_attention((q,), *ragged, **options)

    monkeypatch.setattr(kernel, "paged_attention", twin)
    options = dict(window=jnp.int32(50))
    # A program of its own: that of `run` may be there already.
    compute = jax.jit(functools.partial(attend, implementation="pallas"))
    got = compute(queries(rows), filled(rows), rows, **options)
    np.testing.assert_allclose(got, run(queries(rows), filled(rows), rows, **options, implementation="xla"), **ROUNDING)


@pytest.mark.parametrize(
    "size, kinds, reason", [(16, 3, "dual chunk attention has three queries"), (12, 1, "12 rows of float32")]
)
def test_what_the_kernel_cannot_do_is_refused(mesh, size, kinds, reason):
    rows = group("decoding", size=size)
    with pytest.raises(ConfigError, match=f"cannot be 'pallas', since .*{reason}.*; choose 'auto'"):
        run(queries(rows, kinds), filled(rows), rows, chunk=CHUNK if kinds > 1 else None, implementation="pallas")
