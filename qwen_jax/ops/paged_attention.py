"""Attention of new tokens to rows whose keys and values are in pages (ops.pages).

The XLA form walks over blocks of pages with a running softmax (Milakov & Gimelshein, 2018), as many as the rows are
long: one program serves any lengths, and nothing is made that has the size of a row.
"""

from __future__ import annotations

import functools
import math
from typing import Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Num

from qwen_jax import sharding
from qwen_jax.errors import ConfigError
from qwen_jax.kernels import paged_attention as kernel
from qwen_jax.kernels.blocks import Generation
from qwen_jax.ops.mask import HIDDEN
from qwen_jax.ops.pages import SPLIT, Rows, Scales, fetch, page_size

Implementation = Literal["auto", "pallas", "xla", "reference"]
Queries = tuple[Float[Array, "T N H"], ...]

_TOKENS_AT_ONCE = 32  # of the slow twin, each with a copy of the pages of its row
_QUERIES = 64  # of a row in a block, at most
# Queries that are computed at once, and slots of each of their rows. On CPU what a step works on stays in the cache.
_AT_ONCE, _SLOTS = 128, 512
_AT_ONCE_CPU, _SLOTS_CPU = 4, 128


def attend(
    queries: Queries,
    pages: Num[Array, "P K X H2"],
    rows: Rows,
    *,
    scales: Scales | None = None,
    window: Int[Array, ""] | None = None,
    chunk: int | None = None,
    implementation: Implementation,
) -> Float[Array, "T N H"]:
    """Causal attention of each new token to its row, itself included; zeros for tokens that are not real.

    Scores, softmax and sums are float32; probabilities take the queries' dtype for the product with values. Heads are
    split over `tensor`; each device has all tokens.

    Args:
      queries: one, or three under dual chunk attention (`ops.dual_chunk`); head n uses kv head n // (N / K).
      pages, scales: with the new tokens' keys and values already in them.
      rows: whose tokens these are.
      window: how many of the latest keys are visible, the query's own included; None for all.
      chunk: tokens of a chunk; None without dual chunk attention.
      implementation: "reference" is the formula token by token, "pallas" the kernel for TPU.

    Raises ConfigError if the implementation cannot do this.
    """
    if chunk is None or rows.table.shape[1] * page_size(pages, scales) <= chunk:
        queries, chunk = queries[:1], None
    body = functools.partial(_on_device, chunk=chunk, implementation=implementation)
    arguments, specs = (queries, pages, rows, scales, window), (SPLIT, SPLIT, P(), SPLIT, P())
    out = jax.shard_map(body, in_specs=specs, out_specs=SPLIT, check_vma=False)(*jax.sharding.reshard(arguments, specs))
    return jax.sharding.reshard(out, jax.typeof(queries[0]).sharding.spec)


def _on_device(queries, pages, rows, scales, window, *, chunk, implementation):
    """The attention of a device's heads."""
    scale = queries[0].shape[2] ** -0.5
    ragged = pages, rows.lengths, rows.table, rows.starts, rows.counts
    options = dict(scale=scale, window=window, scales=scales)
    generation = sharding.tpu_generation()
    refusal = (
        "dual chunk attention has three queries" if chunk else kernel.refusal(queries[0], pages, rows.table, scales)
    )
    if implementation == "pallas" and not generation and sharding.platform() != "cpu":
        refusal = f"it is a kernel for TPU v4 to v7x and this is {sharding.platform()}"
    if implementation == "pallas" and refusal:
        raise ConfigError(f"paged attention cannot be 'pallas', since {refusal}; choose 'auto'")
    if implementation == "auto":
        implementation = "pallas" if generation and not refusal else "xla"
    if implementation == "reference":
        return paged_attention(queries, *ragged, **options, chunk=chunk)
    if implementation == "pallas":
        interpret = sharding.platform() == "cpu"
        return kernel.paged_attention(
            queries[0], *ragged, **options, generation=cast(Generation, generation or "v5e"), interpret=interpret
        )
    return _xla(queries, pages, rows, scales, window, chunk)


class _Units(NamedTuple):
    """Blocks of Q queries of a row, U of them: the rows of the XLA form."""

    q: Float[Array, "U K CQG H"]  # the queries that share a kv head, those of all chunk distances
    positions: Int[Array, "U Q"]  # of the queries; -1 where there is none
    pages: Int[Array, "U M"]  # from the first that any of them sees on
    start: Int[Array, " U"]  # slot of the row that these pages begin with
    length: Int[Array, " U"]  # pages that any of them sees


def _xla(queries, pages, rows, scales, window, chunk):
    (tokens, heads, dim), num_kv, size = queries[0].shape, pages.shape[1], page_size(pages, scales)
    width = math.gcd(rows.width, _QUERIES) if rows.width > _QUERIES else rows.width
    at_once, slots = (_AT_ONCE_CPU, _SLOTS_CPU) if sharding.platform() == "cpu" else (_AT_ONCE, _SLOTS)
    block = max(1, slots // size)
    units = _units(queries, rows, num_kv, width, size, block, window)
    # Idle ones last; and what is computed together takes as many steps as the longest.
    order = jnp.argsort(-units.length)
    units = jax.tree.map(lambda x: x[order], units)
    count = len(order)
    at_once = min(max(1, at_once // width), count)
    some = functools.partial(_some, pages=pages, scales=scales, window=window, chunk=chunk, block=block)

    def next_units(i, out):
        # The last ones may be computed twice.
        start = jnp.minimum(i * at_once, count - at_once)
        done = some(_Units(*(jax.lax.dynamic_slice_in_dim(x, start, at_once) for x in units)))
        return jax.lax.dynamic_update_slice_in_dim(out, done, start, axis=0)

    real = (units.positions[:, 0] >= 0).sum()
    shape = count, num_kv, width * heads // num_kv, dim
    out = jax.lax.fori_loop(0, -(-real // at_once), next_units, jnp.zeros(shape, queries[0].dtype))
    out = out[jnp.argsort(order)].reshape(count, num_kv, width, -1, dim)
    return jnp.moveaxis(out, 1, 2).reshape(tokens, heads, dim)


def _units(queries, rows: Rows, num_kv: int, width: int, size: int, block: int, window) -> _Units:
    positions = rows.positions.reshape(-1, width)
    count, dim = len(positions), queries[0].shape[2]
    q = jnp.stack(queries).reshape(len(queries), count, width, num_kv, -1, dim)
    least = jnp.where(positions < 0, jnp.iinfo(jnp.int32).max, positions).min(1)
    first = jnp.zeros_like(least) if window is None else jnp.maximum(least - window + 1, 0) // size
    length = jnp.maximum(positions.max(1) // size + 1 - first, 0)
    table = jnp.repeat(rows.table[rows.of_blocks], count // len(rows.table), axis=0)
    # Whole blocks. Other places of the table may hold any id.
    place = jnp.arange(-(-table.shape[1] // block) * block)
    if window is None:
        ids = jnp.pad(table, ((0, 0), (0, len(place) - table.shape[1])))
    else:
        ids = jnp.take_along_axis(table, first[:, None] + place, axis=1, mode="clip")
    return _Units(
        q=jnp.moveaxis(q, (1, 3), (0, 1)).reshape(count, num_kv, -1, dim),
        positions=positions,
        pages=jnp.where(place < length[:, None], ids, 0),
        start=first * size,
        length=length,
    )


def _some(units, *, pages, scales, window, chunk, block):
    """The attention of some units, [U, K, Q * G, H], in as many steps as the longest of them takes."""
    (count, num_kv, _, dim), width = units.q.shape, units.positions.shape[1]
    dtype, slots_at_once, kinds = units.q.dtype, block * page_size(pages, scales), 1 if chunk is None else 3

    def step(i, state):
        top, total, sum = state
        ids = jax.lax.dynamic_slice_in_dim(units.pages, i * block, block, axis=1)
        slots = units.start[:, None] + i * slots_at_once + jnp.arange(slots_at_once)
        visible, at = _visible(units.positions, slots, window), units.positions[:, :, None]
        k, v = (fetch(pages, scales, ids, kind, dtype) for kind in (0, 1))
        # What nobody sees may be NaN, and 0 * NaN is not 0.
        v = jnp.where(visible.any(1)[:, None, :, None], v, 0)
        scores = jnp.einsum("ukmh,uksh->ukms", units.q, k, preferred_element_type=jnp.float32) * dim**-0.5
        scores = scores.reshape(count, num_kv, kinds, width, -1, slots_at_once)
        if chunk is not None:
            back = (at // chunk - slots[:, None] // chunk)[:, None, :, None]
            own, before, earlier = jnp.moveaxis(scores, 2, 0)
            scores = jnp.where(back == 0, own, jnp.where(back == 1, before, earlier))[:, :, None]
        scores = jnp.where(visible[:, None, None, :, None], scores, HIDDEN).reshape(count, num_kv, -1, slots_at_once)
        new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
        probs, shrink = jnp.exp(scores - new_top), jnp.exp(top - new_top)
        part = jnp.einsum("ukms,uksh->ukmh", probs.astype(dtype), v, preferred_element_type=jnp.float32)
        return new_top, total * shrink + probs.sum(-1, keepdims=True), sum * shrink + part

    shape = count, num_kv, units.q.shape[2] // kinds
    zeros = lambda width: jnp.zeros((*shape, width), jnp.float32)
    steps = -(-units.length.max() // block)
    _, total, sum = jax.lax.fori_loop(0, steps, step, (zeros(1) + HIDDEN, zeros(1), zeros(dim)))
    real = jnp.repeat(units.positions >= 0, shape[2] // width, axis=1)
    return jnp.where(real[:, None, :, None], sum / total, 0).astype(dtype)


def _visible(positions: Int[Array, "U Q"], slots: Int[Array, "U S"], window) -> Bool[Array, "U Q S"]:
    back = positions[:, :, None] - slots[:, None]
    return back >= 0 if window is None else (back >= 0) & (back < window)


def paged_attention(
    queries: Queries,
    pages: Num[Array, "P K X H2"],
    lengths: Int[Array, " R"],
    page_table: Int[Array, "R M"],
    query_starts: Int[Array, " R"],
    query_counts: Int[Array, " R"],
    *,
    scale: float,
    window: Int[Array, ""] | None = None,
    scales: Scales | None = None,
    chunk: int | None = None,
) -> Float[Array, "T N H"]:
    """The slow twin of `attend` and of `kernels.paged_attention`, whose rows may have any numbers of new tokens.

    Each token gathers the pages of its row.

    Args:
      queries, pages, scales, window, chunk: see `attend`.
      lengths: tokens of each row, new ones included.
      page_table: pages of each row's slots, in order.
      query_starts, query_counts: row i has the new tokens from `query_starts[i]` on, `query_counts[i]` of them: a
        decoding row one, a chunk of a prompt many, an idle row none. Rows come in the order of their tokens.
      scale: what scores are multiplied by.
    """
    (count, heads, dim), kv_heads = queries[0].shape, pages.shape[1]
    size = page_size(pages, scales)
    row, position = _places(count, lengths, query_starts, query_counts)
    slots = jnp.arange(page_table.shape[1] * size)

    def attend(token):
        q, row, position = token
        visible = slots <= position
        if window is not None:
            visible &= position - slots < window
        # Idle slots of the table may hold any id.
        ids = jnp.where(visible.reshape(-1, size).any(1), page_table[row], 0)
        # Hidden slots may hold NaN, and 0 * NaN is not 0.
        k, v = (jnp.where(visible[:, None], fetch(pages, scales, ids, kind, q.dtype), 0) for kind in (0, 1))
        q = q.reshape(len(q), kv_heads, -1, dim)
        scores = jnp.einsum("ckgh,ksh->ckgs", q, k, preferred_element_type=jnp.float32) * scale
        back = 0 if chunk is None else jnp.clip(position // chunk - slots // chunk, 0, 2)
        scores = jnp.select([back == i for i in range(len(q))], list(scores))
        probs = jax.nn.softmax(jnp.where(visible, scores, HIDDEN), axis=-1).astype(q.dtype)
        out = jnp.einsum("kgs,ksh->kgh", probs, v, preferred_element_type=jnp.float32)
        return jnp.where(position >= 0, out, 0).astype(q.dtype).reshape(heads, dim)

    tokens = jnp.stack(queries, axis=1), row, position
    return jax.lax.map(attend, tokens, batch_size=min(count, _TOKENS_AT_ONCE))


def _places(
    count: int, lengths: Int[Array, " R"], query_starts: Int[Array, " R"], query_counts: Int[Array, " R"]
) -> tuple[Int[Array, " T"], Int[Array, " T"]]:
    """The row of each token of the batch and its position there, which is -1 for a token of no row."""
    token = jnp.arange(count, dtype=jnp.int32)
    row = jnp.searchsorted(query_starts, token, side="right", method="compare_all").astype(jnp.int32) - 1
    row = jnp.maximum(row, 0)
    new = token - query_starts[row]
    return row, jnp.where((new >= 0) & (new < query_counts[row]), lengths[row] - query_counts[row] + new, -1)
