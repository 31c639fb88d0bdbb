"""Dual chunk attention against the paper's definition, written out in NumPy."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import sharding
from qwen_jax.config import DualChunk, Rope
from qwen_jax.errors import ConfigError
from qwen_jax.ops.blockwise import blockwise
from qwen_jax.ops.dual_chunk import dual_chunk_attention, merge
from qwen_jax.ops.mask import Mask
from qwen_jax.ops.rope import rotate, rotation

# Same sums in another order, in float32.
ROUNDING = dict(rtol=2e-5, atol=1e-5)
THETA, HEADS, KV_HEADS, DIM = 1e3, 4, 2, 8


def seeming(query, key, chunks):
    """How far apart the paper lets positions seem, but for its largest position c - 1, which the published code has one
    higher: the table of a chunk's successor goes on to c, and its last entry serves all later chunks."""
    size, window = chunks.chunk_size - chunks.local_size, chunks.local_size
    apart = query // size - key // size
    successive = np.where(query % size < window, size + query % size, chunks.chunk_size)
    return np.where(apart == 0, query % size, np.where(apart == 1, successive, chunks.chunk_size)) - key % size


def formula(q, k, v, query_at, key_at, same, chunks, factors=(1, 1)):
    """One row in float64: q [T, N, H], k and v [K, S, H] not turned yet, positions, and who may see whom."""
    group, turns = q.shape[1] // k.shape[0], THETA ** (-np.arange(0, DIM, 2) / DIM)
    pairs = lambda x: x[..., : DIM // 2] + 1j * x[..., DIM // 2 :]
    k, v = np.repeat(k, group, axis=0), np.repeat(v, group, axis=0)
    distance = seeming(query_at[:, None], key_at[None], chunks)
    scores = np.einsum("tni,nsi,tsi->nts", pairs(q), pairs(k).conj(), np.exp(1j * distance[..., None] * turns)).real
    scores *= np.asarray(factors[0])[..., None] * factors[1] * DIM**-0.5
    scores = np.where((key_at[None] <= query_at[:, None]) & same, scores, -np.inf)
    probs = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("nts,nsh->tnh", probs / probs.sum(axis=-1, keepdims=True), v)


def arrays(batch, queries, keys):
    draw = lambda *shape: np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)
    return draw(batch, queries, HEADS, DIM), draw(batch, KV_HEADS, keys, DIM), draw(batch, KV_HEADS, keys, DIM) + 1


def packed(*rows):
    """Documents of such lengths in each row, and padding where one is negative."""
    segments = [np.concatenate([[i * (n > 0)] * abs(n) for i, n in enumerate(row, 1)]) for row in rows]
    positions = [np.concatenate([np.arange(abs(n)) for n in row]) for row in rows]
    positions, segments = np.array(positions, np.int32), np.array(segments, np.int32)
    return Mask(
        query_positions=positions, key_positions=positions, query_segments=segments, key_segments=segments, aligned=True
    )


def cached(queries, keys, *offsets):
    at = np.array(offsets, np.int32)[:, None] + np.arange(queries, dtype=np.int32)
    return Mask(query_positions=at, key_positions=np.tile(np.arange(keys, dtype=np.int32), (len(offsets), 1)))


@functools.partial(jax.jit, static_argnames=("chunks", "implementation"))
def attend(qkv, mask, *, chunks, implementation):
    rope = Rope(theta=THETA, scaling=chunks)
    turn = lambda positions: rotation(rope, positions, None, head_dim=DIM, logn=0, dtype=jnp.dtype(jnp.float32))
    q, k, v = qkv
    by = turn(mask.query_positions)
    k = rotate(k.swapaxes(1, 2), turn(mask.key_positions)).swapaxes(1, 2)
    queries = tuple(rotate(q, by) for by in (by, *by.afar))
    return dual_chunk_attention(queries, k, v, mask, chunk=chunks.chunk, implementation=implementation)


SMALL = DualChunk(chunk_size=20, local_size=8, original_positions=0)  # chunks of 12
LARGE = DualChunk(chunk_size=60, local_size=20, original_positions=0)  # of 40
CASES = {
    "packed": (SMALL, packed((78,), (5, 1, 30, 42))),
    "few queries": (SMALL, cached(5, 80, 73, 10)),
    "many queries": (LARGE, cached(130, 170, 31, 0)),
}


def of_formula(qkv, mask, chunks):
    rows = []
    for b in range(len(qkv[0])):
        same = True
        if mask.query_segments is not None:
            same = mask.query_segments[b][:, None] == mask.key_segments[b]
        rows.append(formula(*(x[b] for x in qkv), mask.query_positions[b], mask.key_positions[b], same, chunks))
    return np.stack(rows)


def case(name):
    chunks, mask = CASES[name]
    return arrays(*mask.query_positions.shape, mask.key_positions.shape[1]), mask, chunks


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_it_is_the_papers_definition(mesh, name, implementation):
    qkv, mask, chunks = case(name)
    got = attend(qkv, mask, chunks=chunks, implementation=implementation)
    np.testing.assert_allclose(got, of_formula(qkv, mask, chunks), **ROUNDING)


GRADIENTS = {
    # Blocks of 128 queries, which the band lets see no key too few: in row 0 the last of a block is the first of a
    # chunk, in row 1 the first of a block is the last of one. The last documents follow one of as many chunks as fit.
    "xla": (LARGE, packed((15, 285), (9, 291), (291, 9))),
    # Chunks of 15, of which three have all three kinds.
    "pallas": (DualChunk(chunk_size=20, local_size=5, original_positions=0), packed((37, 5, -3))),
}


@pytest.mark.parametrize("implementation", GRADIENTS)
def test_gradients(mesh, implementation):
    chunks, mask = GRADIENTS[implementation]
    batch, length = mask.query_positions.shape
    weights = np.random.default_rng(0).normal(size=(batch, length, HEADS, DIM)).astype(np.float32)
    # Of padding nothing is asked but that it is finite.
    weights *= mask.query_segments[..., None, None] > 0

    def loss(qkv, implementation):
        out = attend(qkv, mask, chunks=chunks, implementation=implementation)
        return (out * weights).sum(), out

    qkv = arrays(batch, length, length)
    gradient = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    (got, out), (expected, _) = gradient(qkv, implementation), gradient(qkv, "reference")
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out * weights, of_formula(qkv, mask, chunks) * weights, **ROUNDING)
    for name, a, b in zip("qkv", got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5, err_msg=name)


@pytest.fixture
def parts():
    """Attention to all keys, and to three parts of them: row 1 sees nothing of the second, and no row of the third."""
    (_, k, v), mask, at = jax.tree.map(jnp.asarray, (arrays(2, 3, 30), cached(3, 30, 20, 4), np.arange(30)))

    def attend(q, keys):
        return blockwise(q, k, v, dataclasses.replace(mask, key_positions=jnp.where(keys, mask.key_positions, 99)))

    return lambda q: (attend(q, at >= 0)[0], merge([attend(q, keys) for keys in (at < 8, at >= 8, at < 0)]))


def test_what_is_merged_is_attention_to_all_keys(mesh, parts):
    q = arrays(2, 3, 30)[0]
    whole, merged = jax.jit(parts)(q)
    np.testing.assert_allclose(merged, whole, **ROUNDING)
    expected, got = (jax.jit(jax.grad(lambda q, i=i: (parts(q)[i] ** 3).sum()))(q) for i in (0, 1))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("sizes", [dict(context=2, tensor=2), dict(context=2, data=2)])
def test_split_attention_equals_whole(sizes):
    """On a mesh with a `context` axis, in the order in which training has its columns."""
    qkv, mask = arrays(2, 64, 64), packed((64,), (5, 59))
    expected = of_formula(qkv, mask, SMALL)
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:4], **sizes)):
        order = sharding.balanced_columns(64)
        (q, k, v), columns = qkv, jax.tree.map(lambda x: x[:, order], dataclasses.replace(mask, balanced=True))
        out = attend((q[:, order], k[:, :, order], v[:, :, order]), columns, chunks=SMALL, implementation="xla")
        np.testing.assert_allclose(out, expected[:, order], **ROUNDING)


def test_cudnn_is_refused_past_a_chunk(mesh):
    qkv, mask, chunks = case("packed")
    with pytest.raises(
        ConfigError, match="dual chunk attention cuts rows of 78 tokens into chunks of 12; choose 'auto'"
    ):
        attend(qkv, mask, chunks=chunks, implementation="cudnn")
