"""Keys and values in pages of a fixed size, which rows of a batch take and share as they grow (Kwon et al., 2023).

Two arrays per layer, whose shapes are chosen for the tiles of TPU memory; `tensor` may split K:

pages   [P, K, S, 2 H]  page, kv head, slot, and in the lanes the key (rotated) beside the value: a kv head's page is
                        whole tiles even at H = 64, a page with all its heads is contiguous, and needs one copy

or, quantised to int8,

pages   [P, K, S/4, 2 H]  int32 words of four slots each, the first in the lowest byte: this is how TPU stores int8, and
                          XLA, which writes single rows of words in place, would copy all pages to write one of bytes
scales  [P, K, 2, S]      float32, what to multiply the key and the value of a slot by; S % 128 = 0, as lanes are

Batches are ragged. `lengths` [R] counts the tokens of each row, the new ones included; `page_table` [R, M] has the
pages of its slots in order; the new tokens of row i, its last ones, are `query_starts[i]:query_starts[i + 1]` of the
batch ([R + 1]: a decoding row has one, a chunk of a prompt many, an idle row none); only the first `num_rows` [1]
rows count. All are int32. Ids of pages that hold no token of a row, and what stands in such pages, are never used.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from qwen_jax.ops.mask import HIDDEN

_TOKENS_AT_ONCE = 32  # each with a copy of the pages of its row


def paged_attention(
    q: Float[Array, "T N H"],
    pages: Num[Array, "P K X H2"],
    lengths: Int[Array, " R"],
    page_table: Int[Array, "R M"],
    query_starts: Int[Array, " R1"],
    num_rows: Int[Array, " 1"],
    *,
    scale: float,
    window: Int[Array, ""] | None = None,
    scales: Float[Array, "P K 2 S"] | None = None,
) -> Float[Array, "T N H"]:
    """Causal attention of each new token to its row, itself included; zeros for tokens of no row.

    The slow twin of `kernels.paged_attention`, in plain XLA. Each token gathers the pages of its row.

    Args:
      q: queries; head n uses kv head n // (N / K).
      pages, lengths, page_table, query_starts, num_rows, scales: see the module.
      scale: what scores are multiplied by.
      window: how many of the latest keys are visible, the query's own included; None for all.
    """
    (count, heads, dim), kv_heads = q.shape, pages.shape[1]
    size = page_size(pages, scales)
    row, position = _places(count, lengths, query_starts, num_rows)
    key_positions = jnp.arange(page_table.shape[1] * size)

    def attend(token):
        q, row, position = token
        visible = key_positions <= position
        if window is not None:
            visible &= position - key_positions < window
        # Idle slots of the table may hold any id.
        ids = jnp.where(visible.reshape(-1, size).any(1), page_table[row], 0)
        if scales is None:
            kv = _by_head(pages[ids])
        else:
            steps = jnp.repeat(scales[ids].swapaxes(2, 3), dim, axis=3)
            kv = _by_head(_bytes(pages[ids]).astype(jnp.float32) * steps)
        # Hidden slots may hold NaN, and 0 * NaN is not 0.
        k, v = jnp.split(jnp.where(visible[:, None], kv, 0).astype(q.dtype), 2, axis=-1)
        q = q.reshape(kv_heads, -1, dim)
        scores = jnp.einsum("kgh,ksh->kgs", q, k, preferred_element_type=jnp.float32) * scale
        probs = jax.nn.softmax(jnp.where(visible, scores, HIDDEN), axis=-1).astype(q.dtype)
        out = jnp.einsum("kgs,ksh->kgh", probs, v, preferred_element_type=jnp.float32)
        return jnp.where(position >= 0, out, 0).astype(q.dtype).reshape(heads, dim)

    return jax.lax.map(attend, (q, row, position), batch_size=min(count, _TOKENS_AT_ONCE))


def _by_head(x: Num[Array, "M K S X"]) -> Num[Array, "K MS X"]:
    """The pages of a row, one after another."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1, x.shape[3])


def page_size(pages: Num[Array, "P K X H2"], scales: Float[Array, "P K 2 S"] | None) -> int:
    """Slots of a page."""
    return pages.shape[2] if scales is None else scales.shape[3]


def _bytes(words: Int[Array, "M K W X"]) -> Int[Array, "M K S X"]:
    split = jnp.moveaxis(jax.lax.bitcast_convert_type(words, jnp.int8), -1, 3)
    return split.reshape(*words.shape[:2], -1, words.shape[3])


def write_pages(
    pages: Num[Array, "P K X H2"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    lengths: Int[Array, " R"],
    page_table: Int[Array, "R M"],
    query_starts: Int[Array, " R1"],
    num_rows: Int[Array, " 1"],
    *,
    scales: Float[Array, "P K 2 S"] | None = None,
) -> tuple[Num[Array, "P K X H2"], Float[Array, "P K 2 S"] | None]:
    """Pages and scales with the new tokens' keys and values in their slots; in place where both are donated.

    With `scales`, each key and each value is quantised by its own largest magnitude, which becomes 127.
    """
    row, position = _places(len(k), lengths, query_starts, num_rows)
    size = page_size(pages, scales)
    # A page past the last: such updates are dropped.
    page = jnp.where(position < 0, len(pages), page_table[row, position // size])
    # An index for each row: else XLA on TPU may turn all pages around, to have the heads of a slot side by side.
    page, heads, slot = page[:, None], jnp.arange(pages.shape[1]), position[:, None] % size
    if scales is None:
        update = jnp.concatenate([k, v], axis=-1).astype(pages.dtype)
        return pages.at[page, heads, slot].set(update, mode="drop"), None
    (k, key_scale), (v, value_scale) = quantize(k), quantize(v)
    update = jnp.concatenate([k, v], axis=-1).astype(jnp.int32) & 255
    # Rows of slots, [P K 2, S], are no other bytes where S = 128. With four axes XLA on TPU may turn these around too.
    kind = (page * pages.shape[1] + heads)[..., None] * 2 + jnp.arange(2)
    steps = jnp.stack([key_scale, value_scale], axis=-1)
    scales = scales.reshape(-1, size).at[kind, slot[..., None]].set(steps, mode="drop").reshape(scales.shape)
    # Up to four tokens share a word. Each adds what changes its own byte, so their sum is right in any order.
    word, shift = (page, heads, slot // 4), (slot % 4 * 8)[..., None]
    change = (update - (pages[word] >> shift & 255)) << shift
    return pages.at[word].add(change, mode="drop"), scales


def quantize(x: Float[Array, "*n H"]) -> tuple[Int[Array, "*n H"], Float[Array, "*n"]]:
    """int8 `n` and float32 `s` with `|x - n s| <= s / 2`, one `s` per vector."""
    wide = x.astype(jnp.float32)
    scale = jnp.abs(wide).max(-1) / 127
    steps = wide / jnp.where(scale > 0, scale, 1)[..., None]
    return jnp.round(steps).astype(jnp.int8), scale


def _places(
    count: int, lengths: Int[Array, " R"], query_starts: Int[Array, " R1"], num_rows: Int[Array, " 1"]
) -> tuple[Int[Array, " T"], Int[Array, " T"]]:
    """The row of each token of the batch and its position there, which is -1 for a token of no row."""
    token = jnp.arange(count, dtype=jnp.int32)
    # Starts beyond the last row that counts may be anything.
    last = query_starts[num_rows[0]]
    ends = jnp.where(jnp.arange(len(lengths)) < num_rows[0], query_starts[1:], jnp.iinfo(jnp.int32).max)
    row = jnp.searchsorted(ends, token, side="right", method="compare_all").astype(jnp.int32)
    row = jnp.minimum(row, len(lengths) - 1)
    position = lengths[row] - query_starts[row + 1] + token
    return row, jnp.where(token < last, position, -1)
