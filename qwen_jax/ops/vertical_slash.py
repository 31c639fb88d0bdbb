"""Vertical-slash sparse attention (MInference, Jiang et al., 2024): of a long prompt, each head computes few scores.

Where a head looks shows in the last queries: at some columns, keys that all queries look at, and along some diagonals,
keys at some distance. Both are found once per row and head from a softmax of those queries, and all queries of the row
then see the keys of these columns and diagonals, in one softmax. It is an approximation, for prompts only.

Diagonals are kept in blocks, since a block of queries needs a block of keys for even one of them. Block diagonal j of
a block of queries are the keys as many places before it as j blocks have tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qwen_jax import sharding
from qwen_jax.errors import ConfigError
from qwen_jax.ops import dual_chunk
from qwen_jax.ops.attention import Implementation, body, on_each_device, partial_xla
from qwen_jax.ops.mask import HIDDEN, Mask

# The published code's constants.
BLOCK = 64  # tokens of a block of queries, and of keys
LAST = 64  # queries that the pattern is found from; of a prompt in pieces, the last of each piece
FIRST_COLUMNS = 30  # always kept: heads with nothing to look at look at the first tokens
LATEST_DIAGONALS = 100  # always kept: the words just before
FEWEST_COLUMNS = FIRST_COLUMNS + 100  # where a file says 30, vLLM takes these, or a head would have no choice

Queries = tuple[Float[Array, "T N H"], ...]  # of one row: one, or under dual chunk attention three


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerticalSlash:
    """How a prompt is prefilled with sparse attention. The defaults are the budgets of the published code.

    Attributes:
      threshold: rows of more tokens than these are sparse, others are computed in full; vLLM has 32768.
      vertical: columns that a head keeps.
      slash: diagonals that a head keeps, in whole blocks: as many as contain so many adjacent ones.
    """

    threshold: int
    vertical: int = 1000
    slash: int = 6096

    def __post_init__(self) -> None:
        for name, least, reason in (
            ("threshold", BLOCK, "the tokens of a block"),
            ("vertical", FEWEST_COLUMNS, f"the first {FIRST_COLUMNS} columns are always kept, and 100 to choose"),
            ("slash", LATEST_DIAGONALS, "the latest diagonals, which are always kept"),
        ):
            if (value := getattr(self, name)) < least:
                raise ConfigError(f"{name}={value} must be at least {least}: {reason}")

    @property
    def blocks(self) -> int:
        """Block diagonals that a head keeps."""
        return _blocks(self.slash)


def _blocks(diagonals: int) -> int:
    """Block diagonals that so many of the latest diagonals touch."""
    return 1 + -(-(diagonals - 1) // BLOCK)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pattern:
    """What the queries of one row see: `columns`, and the block diagonals `blocks`; none twice."""

    columns: Int[Array, "N V"]
    blocks: Int[Array, "N J"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
    """Of one row: its queries are the tokens from `begin` on, those from `end` on padding; a token sees `window`."""

    begin: Int[Array, ""]
    end: Int[Array, ""]
    window: Int[Array, ""] | None

    def visible(self, at: Int[Array, " M"], slots: Int[Array, " S"]) -> Bool[Array, "M S"]:
        """Which of the keys in `slots` queries at the positions `at` may see."""
        seen = slots <= at[:, None]
        return seen if self.window is None else seen & (at[:, None] - slots < self.window)


def vertical_slash_attention(
    queries: tuple[Float[Array, "B T N H"], ...],
    search: tuple[Float[Array, "B T N H"], ...],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Mask,
    *,
    sparse: VerticalSlash,
    chunk: int | None,
    implementation: Implementation,
) -> Float[Array, "B T N H"]:
    """Attention of the tokens of prompts to a cache, sparse in rows above the threshold. Padding gets anything finite.

    Args:
      queries: one, or the three of `dual_chunk_attention`.
      search: as many, with which the pattern is found: under dual chunk attention, turned without the limit of the
        chunk size, so that keys on one diagonal of the chunk before are equally far off.
      k, v: keys and values, slot s for position s.
      mask: with `lengths`, and queries at consecutive positions.
      sparse: what is kept.
      chunk: tokens of a chunk; None without dual chunk attention.
      implementation: of the rows that are computed in full.

    Raises ConfigError on a mesh with a `context` axis, along which a row's queries would be split.
    """
    if (ways := sharding.axis_size("context")) > 1:
        raise ConfigError(f"sparse prefill cannot split rows over a mesh with context={ways}; choose context=1")
    if chunk is None or k.shape[2] <= chunk:
        queries, search = queries[:1], search[:1]
    if chunk is None or sparse.threshold <= chunk:
        plain = body(implementation, queries[0], mask)
        full = lambda queries, *rest: plain(queries[0], *rest)
    else:
        full = dual_chunk.body(implementation, queries, mask, chunk=chunk)
    on_device = functools.partial(_on_device, sparse=sparse, chunk=chunk, full=full)
    return on_each_device(on_device, (*queries, *search), k, v, mask)


def _on_device(
    queries: tuple[Float[Array, "B T N H"], ...],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Mask,
    *,
    sparse: VerticalSlash,
    chunk: int | None,
    full: Callable[..., Float[Array, "B T N H"]],
) -> Float[Array, "B T N H"]:
    """A device's rows in turn, so that each takes only the branch that is its own."""
    turned, search = queries[: len(queries) // 2], queries[len(queries) // 2 :]

    def of_row(row: Int[Array, ""]) -> Float[Array, "T N H"]:
        q, last, keys, values = jax.tree.map(lambda x: x[row], (turned, search, k, v))
        one = _row(mask, row)

        def kept() -> Float[Array, "T N H"]:
            span = _span(one)
            pattern = find(last, keys, span, sparse=sparse, chunk=chunk)
            return attend(q, keys, values, pattern, span, chunk=chunk)[0]

        def whole() -> Float[Array, "T N H"]:
            # All of its tokens are among the first so many, however long the rows beside it are.
            queries = tuple(x[None, : sparse.threshold] for x in q)
            k, v = (x[None, :, : sparse.threshold] for x in (keys, values))
            some = dataclasses.replace(
                one,
                query_positions=one.query_positions[:, : sparse.threshold],
                key_positions=one.key_positions[:, : sparse.threshold],
            )
            out = full(queries, k, v, some)[0]
            return jnp.pad(out, ((0, q[0].shape[0] - out.shape[0]), (0, 0), (0, 0)))

        return jax.lax.cond(_given(one)[0] > sparse.threshold, kept, whole)

    return jax.lax.map(of_row, jnp.arange(k.shape[0]))


def _row(mask: Mask, row: Int[Array, ""]) -> Mask:
    """The mask of one row, as a batch of one."""
    alone = jax.tree.map(lambda x: x[row][None], dataclasses.replace(mask, window=None))
    return dataclasses.replace(alone, window=mask.window)


def _given(mask: Mask) -> Int[Array, " B"]:
    if mask.lengths is None:
        raise ValueError("sparse prefill looks at the length of each row: give make_cache() `lengths` and `sparse`")
    return mask.lengths


def _span(mask: Mask) -> Span:
    """Of a mask of one row."""
    begin = mask.query_positions[0, 0]
    end = jnp.minimum(begin + mask.query_positions.shape[1], _given(mask)[0])
    return Span(begin=begin, end=end, window=mask.window)


def find(search: Queries, k: Float[Array, "K S H"], span: Span, *, sparse: VerticalSlash, chunk: int | None) -> Pattern:
    """The columns and block diagonals with most of the probability of a row's last queries, head by head."""
    search = tuple(_whole_blocks(q) for q in search)
    first = jnp.clip(span.end - span.begin - LAST, 0, search[0].shape[0] - LAST)
    last = jnp.stack([jax.lax.dynamic_slice_in_dim(q, first, LAST) for q in search])
    at, group = span.begin + first + jnp.arange(LAST), search[0].shape[1] // k.shape[0]

    def of_head(head: Int[Array, ""]) -> tuple[Int[Array, " V"], Int[Array, " J"]]:
        # [64, S] in float32 is much where S is a million: one head at a time.
        keys, slots = k[head // group], jnp.arange(k.shape[1])
        scores = jnp.where(span.visible(at, slots), _scores(last[:, :, head], keys, at, slots, chunk), HIDDEN)
        probs = jnp.where(at[:, None] < span.end, jax.nn.softmax(scores, axis=-1), 0)
        columns = probs.sum(axis=0).at[:FIRST_COLUMNS].set(jnp.inf)
        blocks = _by_block(probs, at[0]).at[: _blocks(LATEST_DIAGONALS)].set(jnp.inf)
        most = lambda x, count: jax.lax.top_k(x, min(count, x.shape[0]))[1]
        return most(columns, sparse.vertical), most(blocks, sparse.blocks)

    return Pattern(*jax.lax.map(of_head, jnp.arange(search[0].shape[1])))


def _whole_blocks(q: Float[Array, "T N H"]) -> Float[Array, "L N H"]:
    return jnp.pad(q, ((0, -q.shape[0] % BLOCK), (0, 0), (0, 0)))


def _by_block(probs: Float[Array, "M S"], first: Int[Array, ""]) -> Float[Array, " J"]:
    """What falls into each block diagonal: of query i, which stands at `first` + i, and key s.

    Of a diagonal r places past block diagonal j, 64 - r of any 64 queries have their key in it, the others in the next.
    """
    queries, slots = probs.shape
    count = _blocks(slots)
    # A row that is one longer than the table moves each query by one place: sums of columns are sums of diagonals,
    # from the query before the first slot that is furthest off to the nearest.
    skewed = jnp.pad(probs[::-1], ((0, 0), (0, queries))).ravel()[:-queries].reshape(queries, -1).sum(axis=0)
    from_nearest = jnp.pad(skewed[::-1], (0, count * BLOCK))
    diagonals = jax.lax.dynamic_slice_in_dim(from_nearest, slots - 1 - first, count * BLOCK).reshape(count, BLOCK)
    past = jnp.arange(BLOCK) / BLOCK
    return (diagonals * (1 - past)).sum(axis=1) + jnp.pad((diagonals * past).sum(axis=1), (1, 0))[:-1]


def _scores(
    queries: Float[Array, "C M H"],
    keys: Float[Array, "S H"],
    at: Int[Array, " M"],
    slots: Int[Array, " S"],
    chunk: int | None,
) -> Float[Array, "M S"]:
    """Of one head, in float32; of three queries the one that the distance in chunks picks."""
    scores = jnp.einsum("cmh,sh->cms", queries, keys, preferred_element_type=jnp.float32) * keys.shape[-1] ** -0.5
    if chunk is None or len(queries) == 1:
        return scores[0]
    back, (own, before, earlier) = at[:, None] // chunk - slots // chunk, scores
    return jnp.where(back == 0, own, jnp.where(back == 1, before, earlier))


def attend(
    queries: Queries,
    k: Float[Array, "K S H"],
    v: Float[Array, "K S H"],
    pattern: Pattern,
    span: Span,
    *,
    chunk: int | None,
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
    """The attention of one row's queries to what they see of the pattern, and the log-sum-exp of their scores.

    The work goes by the pattern, not by S: for each block of queries its columns and blocks of keys are fetched. Blocks
    of padding alone are left out: zeros, and a log-sum-exp of -1e30.
    """
    (length, heads, dim), kv_heads = queries[0].shape, k.shape[0]
    split = lambda x: x.reshape(kv_heads, heads // kv_heads, *x.shape[1:])
    grouped = jnp.stack([split(_whole_blocks(q).swapaxes(0, 1)) for q in queries], axis=2)
    columns, blocks = split(pattern.columns), split(pattern.blocks)
    fetch = jax.vmap(lambda x, slots: x[slots])
    column_keys, column_values = fetch(k, columns), fetch(v, columns)
    body = functools.partial(_block, span=span, chunk=chunk)
    # Per kv head, and per query head of it.
    body = jax.vmap(body, in_axes=(None, 0, None, None, 0, 0, 0, 0))
    body = jax.vmap(body, in_axes=(None, 0, 0, 0, 0, 0, 0, 0))

    def step(i: Int[Array, ""], done: tuple[Array, Array]) -> tuple[Array, Array]:
        q = jax.lax.dynamic_slice_in_dim(grouped, i * BLOCK, BLOCK, axis=3)
        made = body(span.begin + i * BLOCK, q, k, v, columns, column_keys, column_values, blocks)
        put = lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, i * BLOCK, axis=2)
        return put(done[0], made[0]), put(done[1], made[1])

    shape = (kv_heads, heads // kv_heads, grouped.shape[3])
    nothing = jnp.zeros((*shape, dim), queries[0].dtype), jnp.full(shape, HIDDEN, jnp.float32)
    steps = -(-jnp.maximum(span.end - span.begin, 0) // BLOCK)
    out, lse = jax.lax.fori_loop(0, steps, step, nothing)
    flat = lambda x: x.reshape(heads, *x.shape[2:]).swapaxes(0, 1)[:length]
    return flat(out), flat(lse)


def _block(
    begin: Int[Array, ""],
    queries: Float[Array, "C M H"],
    k: Float[Array, "S H"],
    v: Float[Array, "S H"],
    columns: Int[Array, " V"],
    column_keys: Float[Array, "V H"],
    column_values: Float[Array, "V H"],
    blocks: Int[Array, " J"],
    *,
    span: Span,
    chunk: int | None,
) -> tuple[Float[Array, "M H"], Float[Array, " M"]]:
    """One block of queries of one head, the first at position `begin`."""
    wanted = begin - BLOCK * blocks[:, None]
    # A block that begins before the first key, or ends after the last, is fetched from where it fits.
    starts = jnp.clip(wanted, 0, k.shape[0] - BLOCK)
    slots = starts + jnp.arange(BLOCK)
    fetch = lambda x: jax.vmap(lambda start: jax.lax.dynamic_slice_in_dim(x, start, BLOCK))(starts[:, 0])
    keys, values = (
        jnp.concatenate([of_columns, fetch(x).reshape(-1, x.shape[1])])
        for of_columns, x in ((column_keys, k), (column_values, v))
    )
    kept = jnp.zeros(_blocks(k.shape[0]), bool).at[blocks].set(True)
    # A column within a kept block is there already. One after the block of queries is hidden in any case.
    block_of_column = jnp.maximum(begin - columns + BLOCK - 1, 0) // BLOCK
    once = jnp.concatenate([~kept[block_of_column], ((slots >= wanted) & (slots < wanted + BLOCK)).ravel()])
    slots, at = jnp.concatenate([columns, slots.ravel()]), begin + jnp.arange(BLOCK)
    scores = jnp.where(once & span.visible(at, slots), _scores(queries, keys, at, slots, chunk), HIDDEN)
    lse = jax.nn.logsumexp(scores, axis=-1)
    probs = jnp.exp(scores - lse[:, None]).astype(queries.dtype)
    out = jnp.einsum("ms,sh->mh", probs, values, preferred_element_type=jnp.float32)
    return out.astype(queries.dtype), lse


def recall(
    queries: tuple[Float[Array, "B T N H"], ...],
    search: tuple[Float[Array, "B T N H"], ...],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Mask,
    *,
    sparse: VerticalSlash,
    chunk: int | None,
) -> Float[Array, "B N"]:
    """The share of full attention's probability that the pattern keeps, the mean over a row's queries.

    It is `exp(lse_sparse - lse_full)` of each query. Arguments are those of `vertical_slash_attention`; rows below the
    threshold are measured as the others.
    """
    if chunk is None or k.shape[2] <= chunk:
        queries, search = queries[:1], search[:1]
        full = lambda queries, *rest: partial_xla(queries[0], *rest)
    else:
        full = functools.partial(dual_chunk.in_parts, chunk=chunk, by_index=False)

    def on_device(both, k, v, mask):
        queries, search = both[: len(both) // 2], both[len(both) // 2 :]
        _, lse_full = full(queries, k, v, mask)

        def of_row(row: Int[Array, ""]) -> Float[Array, "T N"]:
            q, last, keys, values, whole = jax.tree.map(lambda x: x[row], (queries, search, k, v, lse_full))
            span = _span(_row(mask, row))
            pattern = find(last, keys, span, sparse=sparse, chunk=chunk)
            return jnp.exp(attend(q, keys, values, pattern, span, chunk=chunk)[1] - whole)

        return jax.lax.map(of_row, jnp.arange(k.shape[0]))

    kept = on_each_device(on_device, (*queries, *search), k, v, mask, rank=3)
    real = mask.query_positions < _given(mask)[:, None]
    return kept.mean(axis=1, where=real[..., None])
