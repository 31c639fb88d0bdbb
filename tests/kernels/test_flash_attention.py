"""The flash attention kernel, interpreted on CPU, against its slow twin: values, log-sum-exp and gradients."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.kernels import flash_attention_backward
from qwen_jax.kernels.blocks import Blocks
from qwen_jax.kernels.flash_attention import flash_attention
from qwen_jax.kernels.reference import reference

# Small, and different in the two passes, so that a short sequence has several of each.
BLOCKS = Blocks(
    block_q=128,
    block_kv=256,
    block_kv_compute=128,
    backward_block_q=256,
    backward_block_kv=256,
    backward_block_kv_compute=128,
)
# Queries in two pieces; blocks of queries longer than those of keys.
LARGE = dataclasses.replace(BLOCKS, block_q=512, block_kv_compute=256, backward_block_kv=512)
# The same sums in another order, relative to the largest.
FLOAT32 = 1e-5
# Queries with their scale, probabilities and their gradients are rounded to 2^-9 before products of them are summed.
BFLOAT16 = 2e-2


def kernel(q, k, v, blocks=BLOCKS, **options):
    return flash_attention(q, k, v, blocks=blocks, interpret=True, **options)


large = functools.partial(kernel, blocks=LARGE)


def arrays(queries, keys, heads, kv_heads, dim, dtype=jnp.float32, batch=2):
    rng = np.random.default_rng(queries + keys)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    return draw(batch, heads, queries, dim), draw(batch, kv_heads, keys, dim), draw(batch, kv_heads, keys, dim)


def packed(length, documents, padding=0):
    """Documents in order, then padding; a different cut in each of two rows."""
    ids = np.sort(np.random.default_rng(length).integers(1, documents + 1, size=(2, length)), axis=1)
    ids[:, length - padding :] = 0
    return ids


@functools.cache
def _gradients(attend):
    """Compiled once for all calls of one shape: that takes seconds, and running far less."""

    def loss(qkv, masks):
        out, lse = attend(*qkv, scale=qkv[0].shape[-1] ** -0.5, **masks)
        rng = np.random.default_rng(0)
        weights = [jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in (out, lse)]
        # A row that sees nothing has an lse of -1e30, beside which no other would count.
        rows = jnp.where(lse > -1e29, lse, 0.0) * weights[1]
        return (out.astype(jnp.float32) * weights[0]).sum() + rows.sum(), (out, lse)

    return jax.jit(jax.grad(loss, has_aux=True))


def results(attend, qkv, **masks):
    """out, lse, dq, dk and dv, the gradients of weighted sums of both out and lse."""
    grads, (out, lse) = _gradients(attend)(qkv, masks)
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True))


def assert_close(found, expected, tolerance=FLOAT32):
    for name, value in expected.items():
        got, want = np.asarray(found[name], np.float32), np.asarray(value, np.float32)
        if name == "lse":
            blind = want < -1e29
            np.testing.assert_array_equal(got < -1e29, blind)
            got, want = got[~blind], want[~blind]
        assert np.isfinite(got).all(), name
        np.testing.assert_allclose(
            got, want, rtol=0, atol=tolerance * max(np.abs(want).max(initial=0), 1), err_msg=name
        )


# Lengths that are no multiple of any block: what is read beyond the end is NaN.
QUERIES, KEYS = 300, 520
QKV = arrays(QUERIES, KEYS, 4, 2, 64)


def every_mask(queries=QUERIES, keys=KEYS, ids=None, **changes):
    """All that can be given, so that one program serves; without `changes` only the future is hidden."""
    ids = jnp.asarray(np.ones((2, keys)) if ids is None else ids, jnp.int32)
    masks = dict(query_segments=ids[:, keys - queries :], key_segments=ids, query_scale=jnp.ones((2, queries)))
    masks |= dict(window=jnp.int32(0), query_offset=jnp.full(2, keys - queries, jnp.int32))
    return masks | {name: jnp.asarray(value, masks[name].dtype) for name, value in changes.items()}


SHUFFLED = np.random.default_rng(1).integers(0, 4, size=(2, KEYS))
SHUFFLED[:, 128:256] = [[2], [0]]
SCALES = np.linspace(0.5, 2, 2 * QUERIES).reshape(2, QUERIES)
MASKS = {
    "only the future": {},
    "each row its offset": dict(query_offset=[380, 5]),
    "queries before the first key": dict(query_offset=[-170, -1]),
    "queries beyond the last key": dict(query_offset=[1000, 450]),
    "keys all out of the window": dict(query_offset=[1000, 560], window=100),
    "window": dict(window=150),
    "window of one": dict(window=1),
    "packed": dict(ids=packed(KEYS, 3)),
    "packed and padded": dict(ids=packed(KEYS, 9, padding=140)),
    "nothing but padding": dict(ids=np.zeros((2, KEYS))),
    # Blocks are left out by the range of their segments, which says nothing of an order.
    "segments out of order": dict(ids=SHUFFLED),
    "scale per query": dict(query_scale=SCALES),
    "all at once": dict(ids=packed(KEYS, 4, padding=50), window=170, query_offset=[220, 190], query_scale=SCALES),
}


@pytest.mark.parametrize("case", MASKS)
def test_every_mask_equals_the_formula(case):
    masks = every_mask(**MASKS[case])
    assert_close(results(kernel, QKV, **masks), results(reference, QKV, **masks))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    offset=st.lists(st.integers(-QUERIES, KEYS + 300), min_size=2, max_size=2),
    window=st.integers(0, KEYS),
    documents=st.integers(1, 6),
    padding=st.integers(0, KEYS),
)
def test_any_mask_equals_the_formula(offset, window, documents, padding):
    masks = every_mask(ids=packed(KEYS, documents, padding), query_offset=offset, window=window)
    assert_close(results(kernel, QKV, **masks), results(reference, QKV, **masks))


def test_rows_that_see_nothing_are_zero_to_the_last_bit():
    found = results(kernel, QKV, **every_mask(ids=packed(KEYS, 2, padding=60)))
    last = slice(QUERIES - 60, None)
    assert (found["out"][:, :, last] == 0).all() and (found["lse"][:, :, last] == -1e30).all()
    assert (found["dq"][:, :, last] == 0).all()
    assert all((found[name][:, :, KEYS - 60 :] == 0).all() for name in ("dk", "dv"))


def test_causality_is_exact():
    """No later key has any influence, and the gradient says so to the last bit."""
    found = results(kernel, QKV, **every_mask(query_offset=[-10, -10]))
    for name in ("dk", "dv"):
        assert (found[name][:, :, QUERIES - 10 :] == 0).all() and (found[name][:, :, : QUERIES - 10] != 0).any()


def test_packed_equals_separate():
    ids = np.where(np.arange(KEYS) < 350, 1, 2)[None].repeat(2, 0)
    together, first, second = (
        results(kernel, QKV, **every_mask(ids=x))["out"] for x in (ids, np.where(ids == 1, 1, 0), ids // 2)
    )
    np.testing.assert_allclose(together, first + second, rtol=0, atol=1e-6)


def test_parts_of_the_keys_merge_by_their_log_sum_exp():
    def attend(first, end):
        keys = (np.arange(KEYS) >= first) & (np.arange(KEYS) < end)
        found = results(kernel, QKV, **every_mask(key_segments=keys[None].repeat(2, 0)))
        return found["out"], found["lse"]

    (out, lse), *parts = (attend(*part) for part in ((0, KEYS), (0, 190), (190, KEYS)))
    np.testing.assert_allclose(jnp.logaddexp(parts[0][1], parts[1][1]), lse, rtol=0, atol=FLOAT32)
    merged = sum(part * jnp.exp(part_lse - lse)[..., None] for part, part_lse in parts)
    np.testing.assert_allclose(merged, out, rtol=0, atol=FLOAT32)


def test_large_scores_do_not_overflow():
    q, k, v = QKV
    qkv = (q * 10, k * 10, v)
    assert_close(results(kernel, qkv, **every_mask()), results(reference, qkv, **every_mask()), 1e-3)


SHAPES = {
    # Nothing but the causal mask, over lengths that need one beyond the end as well.
    "no multiple of a block": (large, arrays(600, 600, 1, 1, 128), {}),
    # Two heads in a block of queries, and head_dim and lengths below every tile.
    "8 heads on one": (kernel, arrays(7, 150, 8, 1, 72), every_mask(7, 150, ids=packed(150, 2, padding=3), window=120)),
}


@pytest.mark.parametrize("case", SHAPES)
def test_every_shape_equals_the_formula(case):
    attend, qkv, masks = SHAPES[case]
    assert_close(results(attend, qkv, **masks), results(reference, qkv, **masks))


@pytest.mark.slow
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    queries=st.integers(1, 600),
    keys=st.integers(1, 600),
    heads=st.sampled_from([(1, 1), (2, 1), (6, 2), (14, 2)]),
    dim=st.sampled_from([8, 64, 128]),
    offset=st.integers(-20, 600),
    window=st.one_of(st.none(), st.integers(0, 600)),
    attend=st.sampled_from([kernel, large]),
)
def test_any_shape_equals_the_formula(queries, keys, heads, dim, offset, window, attend):
    qkv = arrays(queries, keys, *heads, dim, batch=1)
    masks = dict(query_offset=offset) | ({} if window is None else dict(window=window))
    assert_close(results(attend, qkv, **masks), results(reference, qkv, **masks))


def test_many_keys_go_through_the_backward_pass_in_slabs(monkeypatch):
    """Two whole slabs and a rest, which is no multiple of a block."""
    monkeypatch.setattr(flash_attention_backward, "SLAB", 1)
    qkv = arrays(130, 600, 2, 1, 64)
    masks = every_mask(130, 600, ids=packed(600, 2, padding=5), query_offset=[470, 300])
    found = results(functools.partial(kernel), qkv, **masks)
    assert_close(found, results(reference, qkv, **masks))
    assert all(np.abs(found[name]).max() > 0 for name in ("dq", "dk", "dv"))


def test_bfloat16_sums_in_float32():
    """Whole blocks, and segments alone."""
    ids = jnp.asarray(packed(512, 3, padding=20), jnp.int32)
    low, masks = arrays(512, 512, 2, 1, 64, jnp.bfloat16), dict(query_segments=ids, key_segments=ids)
    found = results(kernel, low, **masks)
    assert found["out"].dtype == found["dq"].dtype == jnp.bfloat16 and found["lse"].dtype == jnp.float32
    assert_close(found, results(reference, tuple(x.astype(jnp.float32) for x in low), **masks), BFLOAT16)


def test_the_window_differs_between_layers_of_a_scan():
    q, k, v = arrays(300, 300, 2, 1, 64)
    windows = jnp.asarray([0, 40, 200], jnp.int32)

    def layers(attend, q):
        step = lambda q, window: (attend(q, k, v, scale=0.125, window=window)[0], None)
        return jax.lax.scan(step, q, windows)[0].sum()

    found, expected = (jax.jit(jax.value_and_grad(functools.partial(layers, a)))(q) for a in (kernel, reference))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4)
    np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=1e-5)


def shapes(q=(2, 4, 8, 64), k=(2, 2, 8, 64), v=None, dtype=jnp.float32):
    return [jax.ShapeDtypeStruct(s, dtype) for s in (q, k, v or k)]


REFUSED = {
    "q has shape": (shapes(q=(4, 8, 64)), {}),
    "k has shape": (shapes(v=(2, 2, 9, 64)), {}),
    "batch and head_dim": (shapes(k=(1, 2, 8, 64)), {}),
    "3 query heads must be a multiple of 2": (shapes(q=(2, 3, 8, 64)), {}),
    "head_dim=60": (shapes(q=(2, 4, 8, 60), k=(2, 2, 8, 60)), {}),
    "float16": (shapes(dtype=jnp.float16), {}),
    "together": (shapes(), dict(query_segments=jnp.ones((2, 8), jnp.int32))),
    "key_segments has shape": (
        shapes(),
        dict(query_segments=jnp.ones((2, 8), jnp.int32), key_segments=jnp.ones((2, 9), jnp.int32)),
    ),
    "query_scale has shape": (shapes(), dict(query_scale=jnp.ones((2, 1)))),
    "query_offset has shape": (shapes(), dict(query_offset=jnp.zeros(3, jnp.int32))),
    "window has shape": (shapes(), dict(window=jnp.zeros(2, jnp.int32))),
    "generation='v3'": (shapes(), dict(blocks=None, generation="v3")),
    "generation=None": (shapes(), dict(blocks=None)),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("message", REFUSED)
def test_bad_arguments_are_refused(message):
    qkv, options = REFUSED[message]
    options = dict(blocks=BLOCKS, scale=1.0) | options
    with pytest.raises(ValueError, match=message) as error:
        jax.eval_shape(lambda *qkv: flash_attention(*qkv, **options), *qkv)
    assert "\n" not in str(error.value)
