"""Vertical-slash attention against dense masked attention and sums of probabilities, written out in NumPy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import sharding
from qwen_jax.errors import ConfigError
from qwen_jax.ops.attention import reference
from qwen_jax.ops.dual_chunk import dual_chunk_attention
from qwen_jax.ops.mask import Mask
from qwen_jax.ops.vertical_slash import Pattern, Span, VerticalSlash, attend, find, recall, vertical_slash_attention

# Same sums in another order, in float32.
ROUNDING = dict(rtol=2e-5, atol=1e-5)
HEADS, KV_HEADS, DIM = 4, 2, 16
LEAST = VerticalSlash(threshold=64, vertical=130, slash=100)  # three block diagonals
CHUNK = 90


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def arrays(batch, queries, keys, *, kinds):
    turned = tuple(draw(batch, queries, HEADS, DIM, seed=1 + i) for i in range(2 * kinds))
    return turned[:kinds], turned[kinds:], draw(batch, KV_HEADS, keys, DIM), draw(batch, KV_HEADS, keys, DIM, seed=9)


def scores_of(queries, k, at, chunk):
    """[N, T, S] of one row, of the query that the distance in chunks picks."""
    k, slots = np.repeat(k, HEADS // KV_HEADS, axis=0), np.arange(k.shape[1])
    back = np.minimum(at[:, None] // chunk - slots // chunk, len(queries) - 1)
    return np.take_along_axis(
        np.stack([np.einsum("tnh,nsh->nts", q.astype(np.float64), k) for q in queries]) * DIM**-0.5,
        np.maximum(back, 0)[None, None],
        axis=0,
    )[0]


def softmax(scores):
    probs = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return probs / probs.sum(axis=-1, keepdims=True)


def test_exactly_the_kept_pairs_are_seen_once(mesh):
    """A piece that begins within a block, ends within another at the last slot, and has padding; and a window."""
    length, keys, begin, end, window = 150, 187, 37, 160, 120
    queries, _, k, v = jax.tree.map(lambda x: x[0], arrays(1, length, keys, kinds=3))
    random = np.random.default_rng(0)
    columns = np.stack([random.permutation(keys)[:9] for _ in range(HEADS)]).astype(np.int32)
    blocks = np.array([[0, 2], [3, 0], [0, 1], [2, 0]], np.int32)
    span = Span(begin=jnp.int32(begin), end=jnp.int32(end), window=jnp.int32(window))
    compute = jax.jit(functools.partial(attend, chunk=CHUNK))
    out, lse = compute(queries, k, v, Pattern(jnp.asarray(columns), jnp.asarray(blocks)), span)

    at, slots = begin + np.arange(length)[:, None], np.arange(keys)
    block_of = (begin + (at - begin) // 64 * 64 - slots + 63) // 64
    kept = np.stack([np.isin(slots, c) | np.isin(block_of, b) for c, b in zip(columns, blocks, strict=True)])
    assert 0.2 < kept.mean() < 0.8
    kept &= (slots <= at) & (at - slots < window)
    scores = np.where(kept, scores_of(queries, k, at[:, 0], CHUNK), -np.inf)
    expected = np.einsum("nts,nsh->tnh", softmax(scores), np.repeat(v, HEADS // KV_HEADS, axis=0))
    real = end - begin
    np.testing.assert_allclose(out[:real], expected[:real], **ROUNDING)
    np.testing.assert_allclose(lse[:real], np.log(np.exp(scores).sum(axis=-1)).T[:real], **ROUNDING)
    assert np.isfinite(out).all()


@pytest.mark.parametrize("kinds", [1, 3])
def test_the_pattern_is_what_the_last_real_queries_look_at(mesh, kinds):
    """Against sums over pairs; padding, which would be looked at first, does not count."""
    length, begin, end = 200, 256, 430
    _, search, k, _ = jax.tree.map(lambda x: x[0], arrays(1, length, 600, kinds=kinds))
    search = tuple(3 * np.where(np.arange(length)[:, None, None] < end - begin, q, 50) for q in search)
    # No head would look at the first columns or the latest diagonals of its own.
    k[:, :30] = k[:, end - 150 : end] = 0
    sparse = VerticalSlash(threshold=64, vertical=130, slash=600)  # all of the block diagonals, in order
    span = Span(begin=jnp.int32(begin), end=jnp.int32(end), window=None)
    chunk = CHUNK if kinds == 3 else None
    found = jax.jit(functools.partial(find, sparse=sparse, chunk=chunk))(search, jnp.asarray(k), span)

    at, slots = np.arange(end - 64, end), np.arange(600)
    scores = scores_of([q[end - 64 - begin : end - begin] for q in search], k, at, CHUNK)
    probs = softmax(np.where(slots <= at[:, None], scores, -np.inf))
    columns, distance = probs.sum(axis=1), at[:, None] - slots
    # The mean over all ways to cut the queries into blocks: the first of a block is so many before its query.
    before = np.arange(64)
    blocks = [((distance[..., None] - before + 63) // 64 == j).mean(axis=-1) for j in range(11)]
    blocks = np.einsum("nts,jts->nj", probs, np.stack(blocks))
    columns[:, :30] = blocks[:, :3] = np.inf
    for head in range(HEADS):
        assert set(found.columns[head].tolist()) == set(np.argsort(-columns[head])[:130].tolist())
        assert found.blocks[head].tolist() == np.argsort(-blocks[head], kind="stable").tolist()


def test_a_column_and_a_diagonal_are_found(mesh):
    column, diagonal, length = 300, 330, 512
    codes = draw(length, DIM)
    k = np.stack([codes, draw(length, DIM, seed=1)])
    q = draw(length, HEADS, DIM, seed=2)
    q[:, 0] = 3 * np.roll(codes, diagonal, axis=0)  # the first head looks that far back
    q[:, 2, 0], k[1, column, 0] = 4, 12  # the third at that key
    sparse = VerticalSlash(threshold=64, vertical=130, slash=200)  # five block diagonals, two to choose
    span = Span(begin=jnp.int32(0), end=jnp.int32(length), window=None)
    found = jax.jit(functools.partial(find, sparse=sparse, chunk=None))((jnp.asarray(q),), jnp.asarray(k), span)
    assert column in found.columns[2]
    assert sorted(found.blocks[0].tolist()) == [0, 1, 2, diagonal // 64, diagonal // 64 + 1]


@functools.partial(jax.jit, static_argnames=("sparse", "chunk"))
def compute(queries, search, k, v, mask, *, sparse, chunk):
    return vertical_slash_attention(queries, search, k, v, mask, sparse=sparse, chunk=chunk, implementation="xla")


def prompts(length, *lengths):
    at = np.tile(np.arange(length, dtype=np.int32), (len(lengths), 1))
    return Mask(query_positions=at, key_positions=at, lengths=np.array(lengths, np.int32), aligned=True)


def test_with_everything_kept_it_is_full_attention(mesh):
    lengths = 300, 64, 290
    inputs, mask = arrays(3, 300, 300, kinds=3), prompts(300, *lengths)
    everything = dict(sparse=VerticalSlash(threshold=64, vertical=300), chunk=CHUNK)
    queries, _, k, v = inputs
    out = compute(*inputs, mask, **everything)
    full = jax.jit(functools.partial(dual_chunk_attention, chunk=CHUNK, implementation="reference"))
    whole = full(queries, k, v, mask)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(out[row, :length], whole[row, :length], **ROUNDING)
    share = jax.jit(functools.partial(recall, **everything))(*inputs, mask)
    np.testing.assert_allclose(share, 1, rtol=1e-5)


def test_a_row_of_a_mesh_is_what_it_is_alone_and_rows_up_to_the_threshold_are_full(mesh):
    inputs, lengths = arrays(4, 300, 300, kinds=1), (300, 64, 290, 17)
    mask, least = prompts(300, *lengths), dict(sparse=LEAST, chunk=None)
    out = np.asarray(compute(*inputs, mask, **least))
    (queries,), _, k, v = inputs
    whole = jax.jit(reference)(queries, k, v, mask)
    for row in (1, 3):
        np.testing.assert_allclose(out[row, : lengths[row]], whole[row, : lengths[row]], **ROUNDING)
    for row in (0, 2):
        assert np.abs(out[row] - whole[row])[: lengths[row]].max() > 0.01
    share = jax.jit(functools.partial(recall, **least))(*inputs, mask)
    assert (share < 1 + 1e-5).all() and (share[0] < 0.99).all() and (share[0] > 0.2).all()
    with jax.set_mesh(sharding.make_mesh(data=2, tensor=2, devices=jax.devices()[:4])):
        split = np.asarray(compute(*inputs, mask, **least))
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(split[row, :length], out[row, :length], **ROUNDING)


def test_a_row_that_is_split_is_refused():
    with (
        jax.set_mesh(sharding.make_mesh(context=2, devices=jax.devices()[:2])),
        pytest.raises(ConfigError, match="cannot split rows over a mesh with context=2; choose context=1"),
    ):
        compute(*arrays(1, 128, 128, kinds=1), prompts(128, 128), sparse=LEAST, chunk=None)


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(threshold=63), "threshold=63 must be at least 64: the tokens of a block"),
        (dict(threshold=64, vertical=129), "vertical=129 must be at least 130: the first 30 columns"),
        (dict(threshold=64, slash=99), "slash=99 must be at least 100: the latest diagonals"),
    ],
)
def test_budgets_below_what_is_always_kept_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        VerticalSlash(**values)
