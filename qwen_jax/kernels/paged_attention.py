"""Ragged paged attention for TPU: one kernel for batches that mix decoding rows and chunks of prompts.

The work is a list of items, each one block of queries of one row. The kernel walks it with two buffers: while a block
of pages is computed, the next one, of this item or of the one after it, is on its way from HBM. Queries that share a
kv head are the rows of one matrix, so keys and values are read once and never repeated. An item with one query, which
is what decoding is made of, has a smaller program of its own.

The pipeline is written by hand, since which blocks there are is only known at run time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Num

from qwen_jax.kernels.blocks import Generation

_HIDDEN = -1e30  # a hidden score: finite, so that a query that sees nothing of a block gives no NaN
_LANES, _SUBLANES = 128, 8
_MAX_HEADS = 4  # kv heads at a time; more would only need larger buffers
# Cores of a device; each takes its share of the kv heads.
_CORES: dict[Generation, int] = {"v4": 2, "v5e": 1, "v5p": 2, "v6e": 1, "v7x": 1}
# Pages in a table: the 2^18 words of the scalar core, less room for the rest of the plan and what the compiler spills.
_MAX_TABLE = 2**18 - 2**14


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """How much is computed at a time, at most; but no less than 16 queries and one page.

    Attributes:
      rows: queries times the heads that share a kv head.
      keys: slots of pages; half as many of float32, which take twice the memory.
    """

    rows: int = 512
    keys: int = 1024


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """What the scalar core reads: the items, I at most, and the arguments that describe the batch."""

    num_items: Any  # [1]
    item_rows: Any  # [I]
    item_starts: Any  # [I], the first token of each, as an index of the batch
    lengths: Any
    page_table: Any  # [R * M]: two dimensions would be padded to 128 columns
    query_ends: Any  # [R], the end of each row's tokens, as an index of the batch
    window: Any  # [1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Scratch:
    """VMEM and semaphores. The pairs are for what is computed and what is on its way."""

    pages: Any  # [2, heads, keys, 2 H]
    scales: Any  # [2, pages, heads, 2, S] or None
    q: Any  # [2, heads, queries, G, width]
    out: Any  # [heads, queries, G, width]
    rows: Any  # [heads, rows, width], the queries of the item
    tokens: Any  # [rows, 1] int32, which query of the item a row is of
    top: Any  # [heads, rows, 1], largest score so far
    total: Any  # [heads, rows, 1], sum of exp(score - top)
    sum: Any  # [heads, rows, width], sum of exp(score - top) * value
    page_copies: Any
    q_copies: Any
    out_copy: Any


class _Item(NamedTuple):
    """A block of queries of one row."""

    index: Array
    row: Array
    start: Array  # its first token, as an index of the batch
    first: Array  # position of that token
    stop: Array  # position after that of its last token
    page: Array  # first page that any of its queries sees, as an index of the row's table
    num_pages: Array
    single: Array  # whether it is one token


def paged_attention(
    q: Float[Array, "T N H"],
    pages: Num[Array, "P K X H2"],
    lengths: Int[Array, " R"],
    page_table: Int[Array, "R M"],
    query_starts: Int[Array, " R"],
    query_counts: Int[Array, " R"],
    *,
    scale: float,
    window: Int[Array, ""] | None = None,
    scales: Float[Array, "P K 2 S"] | None = None,
    generation: Generation,
    blocks: Blocks = Blocks(),
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "T N H"]:
    """Causal attention of each new token to its row, itself included; zeros for tokens of no row.

    The slow twin `ops.paged_attention.paged_attention` and `ops.pages` say what the arrays are.

    Args:
      generation: of the TPU.
      blocks: how much is computed at a time.
      interpret: run on CPU, for tests.

    Raises:
      ValueError: shapes do not tile, or the table is too large for the memory of the scalar core (1 MiB).
    """
    if generation not in _CORES:
        raise ValueError(f"generation={generation!r} is none of {', '.join(_CORES)}")
    if reason := refusal(q, pages, page_table, scales):
        raise ValueError(reason)
    (count, num_heads, dim), (_, kv_heads, _, lanes) = q.shape, pages.shape
    page_size = pages.shape[2] if scales is None else scales.shape[3]
    group, heads = num_heads // kv_heads, _heads_at_once(kv_heads, generation)
    queries = max(16, blocks.rows // group // 16 * 16)
    keys = blocks.keys // 2 if pages.dtype == jnp.float32 else blocks.keys
    block_pages = max(1, keys // page_size)
    # At H = 64 key and value fill one tile of lanes together: zeros in the query hide the value from the scores.
    width = dim if dim % _LANES == 0 else lanes
    rows = q.reshape(count, kv_heads, group, dim).swapaxes(0, 1).astype(jnp.float32)
    rows = jnp.pad(rows, ((0, 0), (0, queries), (0, 0), (0, width - dim)))
    plan = _plan(count, queries, lengths, page_table, query_starts, query_counts, window)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    if not interpret:
        # Else XLA copies a pool that fits into VMEM there, whole, and back.
        pages, scales = jax.tree.map(lambda x: pltpu.with_memory_space_constraint(x, pltpu.HBM), (pages, scales))
    out = pl.pallas_call(
        functools.partial(_kernel, scale=scale, dtype=q.dtype),
        out_shape=jax.ShapeDtypeStruct(rows.shape, rows.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(kv_heads // heads,),
            in_specs=[anywhere, anywhere, None if scales is None else anywhere],
            out_specs=anywhere,
            scratch_shapes=cast(Any, [_scratch(heads, queries, group, width, block_pages, pages, scales)]),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="paged_attention",
    )(plan, rows, pages, scales)
    out = out[:, :count, :, width - dim :].swapaxes(0, 1).reshape(q.shape)
    # For tokens of no row nothing was written, or anything.
    token = jnp.arange(count)[:, None]
    real = ((token >= query_starts) & (token < query_starts + query_counts)).any(1)
    return jnp.where(real[:, None, None], out, 0).astype(q.dtype)


def _heads_at_once(kv_heads: int, generation: Generation) -> int:
    share = kv_heads // math.gcd(kv_heads, _CORES[generation])
    return max(heads for heads in range(1, _MAX_HEADS + 1) if share % heads == 0)


def refusal(q: Array, pages: Array, page_table: Array, scales: Array | None) -> str | None:
    """Why the kernel cannot take arrays like these; None if it can."""
    (_, num_heads, dim), (_, kv_heads, rows, lanes) = q.shape, pages.shape
    tile = 32 // pages.dtype.itemsize
    if pages.dtype not in ((jnp.bfloat16, jnp.float32) if scales is None else (jnp.int32,)):
        wanted = "bfloat16 or float32 without scales, int32 with them"
        return f"pages are {pages.dtype}, scales are {'not ' * (scales is None)}given: wanted {wanted}"
    if num_heads % kv_heads:
        return f"{num_heads} query heads cannot share {kv_heads} kv heads evenly"
    if lanes != 2 * dim or lanes % _LANES:
        return f"pages of {lanes} lanes and heads of {dim}: wanted 2 x {dim}, and a multiple of {_LANES}"
    if rows % tile:
        return f"pages of {rows} rows of {pages.dtype}: wanted a multiple of {tile}, the rows of a tile"
    if scales is not None and (scales.shape[3] != 4 * rows or scales.shape[3] % _LANES):
        slots = f"{4 * rows} slots of int8 with scales for {scales.shape[3]}"
        return f"pages of {slots}: wanted as many, a multiple of {_LANES}, the lanes of a tile"
    if page_table.size > _MAX_TABLE:
        table = f"{page_table.shape[0]} rows x {page_table.shape[1]} pages"
        return f"a table of {table}: wanted at most {_MAX_TABLE} in all; use fewer rows or larger pages"


def _plan(
    count: int,
    queries: int,
    lengths: Int[Array, " R"],
    page_table: Int[Array, "R M"],
    query_starts: Int[Array, " R"],
    query_counts: Int[Array, " R"],
    window: Int[Array, ""] | None,
) -> _Plan:
    num = len(lengths)
    items = (query_counts + queries - 1) // queries
    ends = jnp.cumsum(items, dtype=jnp.int32)
    # An item has a token, and only the last one of a row is not full.
    item = jnp.arange(min(count, num + count // queries), dtype=jnp.int32)
    rows = jnp.minimum(jnp.searchsorted(ends, item, side="right", method="compare_all").astype(jnp.int32), num - 1)
    return _Plan(
        num_items=ends[-1:],
        item_rows=rows,
        item_starts=query_starts[rows] + (item - ends[rows] + items[rows]) * queries,
        lengths=lengths,
        page_table=page_table.reshape(-1),
        query_ends=query_starts + query_counts,
        window=jnp.asarray(jnp.iinfo(jnp.int32).max if window is None else window, jnp.int32).reshape(1),
    )


def _scratch(
    heads: int, queries: int, group: int, width: int, block_pages: int, pages: Array, scales: Array | None
) -> _Scratch:
    wide = lambda *shape: pltpu.VMEM(shape, jnp.float32)
    rows = (heads, queries * group)
    return _Scratch(
        pages=pltpu.VMEM((2, heads, block_pages * pages.shape[2], pages.shape[3]), pages.dtype),
        scales=None if scales is None else wide(2, block_pages, heads, *scales.shape[2:]),
        q=wide(2, heads, queries, group, width),
        out=wide(heads, queries, group, width),
        rows=wide(*rows, width),
        tokens=pltpu.VMEM((rows[1], 1), jnp.int32),
        top=wide(*rows, 1),
        total=wide(*rows, 1),
        sum=wide(*rows, width),
        page_copies=pltpu.SemaphoreType.DMA((2,)),
        q_copies=pltpu.SemaphoreType.DMA((2,)),
        out_copy=pltpu.SemaphoreType.DMA,
    )


def _kernel(plan, q, pages, scales, out, scratch, *, scale, dtype):
    heads = scratch.pages.shape[1]
    heads = pl.ds(pl.program_id(0) * heads, heads)
    walk = _Walk(plan, q, pages, scales, out, scratch, heads, scale, dtype)
    num_items = plan.num_items[0]

    def next_block(item, block, step):
        """Computes a block, while the one after it is copied."""
        slot, more = step & 1, block + 1 < walk.num_blocks(item)
        following = item.index + jnp.where(more, 0, 1)

        @pl.when(following < num_items)
        def _():
            following_item = walk.item(following)
            pl.when(~more)(lambda: walk.fetch_queries(following_item))
            walk.fetch_pages(following_item, jnp.where(more, block + 1, 0), 1 - slot)

        walk.wait_pages(item, block, slot)
        walk.attend(item, block, slot)
        return step + 1

    def next_item(index, step):
        item = walk.item(index)
        walk.begin(item)
        step = jax.lax.fori_loop(0, walk.num_blocks(item), functools.partial(next_block, item), step)

        # A block of queries may reach into the tokens of the next row, which must then be written later.
        @pl.when(index > 0)
        def _():
            walk.wait_out(walk.item(index - 1))

        walk.finish(item)
        return step

    @pl.when(num_items > 0)
    def _():
        # Once: a division of vectors takes many instructions.
        scratch.tokens[:] = jax.lax.div(jax.lax.broadcasted_iota(jnp.int32, scratch.tokens.shape, 0), q.shape[2])
        first = walk.item(0)
        walk.fetch_queries(first)
        walk.fetch_pages(first, 0, 0)
        jax.lax.fori_loop(0, num_items, next_item, 0)
        walk.wait_out(walk.item(num_items - 1))


@dataclasses.dataclass(frozen=True)
class _Walk:
    """The steps of the walk. `slot` is which of two buffers; a block is counted from the first page of its item."""

    plan: _Plan
    q: Any
    pages: Any
    scales: Any
    out: Any
    scratch: _Scratch
    heads: Any  # the slice of kv heads that this step of the grid takes
    scale: float
    dtype: jnp.dtype

    @property
    def page_size(self) -> int:
        return self.pages.shape[2] if self.scales is None else self.scales.shape[3]

    @property
    def block_pages(self) -> int:
        return self.scratch.pages.shape[2] // self.pages.shape[2]

    def item(self, index) -> _Item:
        plan, queries = self.plan, self.scratch.q.shape[2]
        row, start = plan.item_rows[index], plan.item_starts[index]
        end = jnp.minimum(start + queries, plan.query_ends[row])
        # The last token of a row is in its last slot.
        shift = plan.lengths[row] - plan.query_ends[row]
        first, stop = start + shift, end + shift
        page = jax.lax.div(jnp.maximum(first - plan.window[0] + 1, 0), self.page_size)
        return _Item(
            index=index,
            row=row,
            start=start,
            first=first,
            stop=stop,
            page=page,
            num_pages=_ceil_div(stop, self.page_size) - page,
            single=end - start == 1,
        )

    def num_blocks(self, item: _Item):
        return _ceil_div(item.num_pages, self.block_pages)

    def fetch_pages(self, item: _Item, block, slot):
        self._each_page_copy(item, block, slot, lambda copy: copy.start())

    def wait_pages(self, item: _Item, block, slot):
        self._each_page_copy(item, block, slot, lambda copy: copy.wait())

    def _each_page_copy(self, item, block, slot, act):
        plan, scratch, size, done = self.plan, self.scratch, self.pages.shape[2], block * self.block_pages
        ids = item.row * (plan.page_table.shape[0] // plan.lengths.shape[0]) + item.page + done
        semaphore = scratch.page_copies.at[slot]

        def page_copies(i):
            page = plan.page_table[ids + i]
            rows = pl.ds(pl.multiple_of(i * size, size), size)
            source, target = self.pages.at[page, self.heads], scratch.pages.at[slot, :, rows]
            act(pltpu.make_async_copy(source, target, semaphore))
            if self.scales is not None:
                source, target = self.scales.at[page, self.heads], scratch.scales.at[slot, i]
                act(pltpu.make_async_copy(source, target, semaphore))

        count = item.num_pages - done

        # Most blocks are full. Their copies are one run of instructions, which the compiler can put side by side.
        @pl.when(count >= self.block_pages)
        def _():
            for i in range(self.block_pages):
                page_copies(i)

        @pl.when(count < self.block_pages)
        def _():
            jax.lax.fori_loop(0, count, lambda i, _: page_copies(i), None)

    def fetch_queries(self, item: _Item):
        self._by_size(item, lambda queries: self._query_copy(item, queries).start())

    def _query_copy(self, item, queries):
        source = self.q.at[self.heads, pl.ds(item.start, queries)]
        slot = item.index & 1
        return pltpu.make_async_copy(source, self.scratch.q.at[slot, :, :queries], self.scratch.q_copies.at[slot])

    def wait_out(self, item: _Item):
        self._by_size(item, lambda queries: self._out_copy(item, queries).wait())

    def _out_copy(self, item, queries):
        target = self.out.at[self.heads, pl.ds(item.start, queries)]
        return pltpu.make_async_copy(self.scratch.out.at[:, :queries], target, self.scratch.out_copy)

    def _by_size(self, item, run):
        """run(queries) with the static number of queries that the item is computed with."""
        pl.when(item.single)(lambda: run(1))
        pl.when(~item.single)(lambda: run(self.scratch.q.shape[2]))

    def _rows(self, queries: int) -> int:
        """Rows that are computed: those of the queries, in whole tiles."""
        return pl.cdiv(queries * self.scratch.q.shape[3], _SUBLANES) * _SUBLANES

    def begin(self, item: _Item):
        """Takes the queries of an item."""
        scratch, (_, heads, _, group, width) = self.scratch, self.scratch.q.shape

        def take(queries):
            self._query_copy(item, queries).wait()
            rows = self._rows(queries)
            q = scratch.q[item.index & 1, :, :queries]
            scratch.rows[:, : queries * group] = q.reshape(heads, queries * group, width)
            scratch.top[:, :rows] = jnp.full((heads, rows, 1), _HIDDEN, jnp.float32)
            scratch.total[:, :rows] = jnp.zeros((heads, rows, 1), jnp.float32)
            scratch.sum[:, :rows] = jnp.zeros((heads, rows, width), jnp.float32)

        self._by_size(item, take)

    def attend(self, item: _Item, block, slot):
        """Adds a block of keys and values to the sums of an item."""
        base = (item.page + block * self.block_pages) * self.page_size

        def every_head(queries):
            attend = lambda head, _: self._attend_head(item, base, slot, head, queries)
            # The heads of a single query are too little work to be waited for one by one.
            jax.lax.fori_loop(0, self.scratch.pages.shape[1], attend, None, unroll=queries == 1)

        self._by_size(item, every_head)

    def _attend_head(self, item, base, slot, head, queries):
        scratch, width, rows = self.scratch, self.scratch.q.shape[4], self._rows(queries)
        k, v = self._keys_and_values(slot, head, width, item.stop - base)
        q = scratch.rows[head, :rows].astype(self.dtype)
        key_scale, value_scale = self._scales(slot, head)
        position = item.first + (0 if queries == 1 else scratch.tokens[:])
        key = base + jax.lax.broadcasted_iota(jnp.int32, (1, k.shape[0]), 1)
        visible = (key <= position) & (key > position - self.plan.window[0])
        scores = jax.lax.dot_general(q, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        scores = jnp.where(visible, scores * key_scale, _HIDDEN)
        last_top = scratch.top[head, :rows]
        top = jnp.maximum(last_top, scores.max(axis=1, keepdims=True))
        probs, decay = jnp.exp(scores - top), jnp.exp(last_top - top)
        scratch.top[head, :rows] = top
        scratch.total[head, :rows] = decay * scratch.total[head, :rows] + probs.sum(axis=1, keepdims=True)
        if value_scale is not None:
            probs = jnp.where(visible, probs * value_scale, 0)
        more = jnp.dot(probs.astype(self.dtype), v, preferred_element_type=jnp.float32)
        scratch.sum[head, :rows] = decay * scratch.sum[head, :rows] + more

    def _keys_and_values(self, slot, head, width, count):
        """Those of the block, [keys, width] both; the values after the first `count` are zero."""
        stored, kv = self.pages.dtype if self.scales is None else jnp.int8, self.scratch.pages[slot, head]
        words = _zero_after(pltpu.bitcast(kv[:, -width:], jnp.int32), count, packing=4 // jnp.dtype(stored).itemsize)
        return (pltpu.bitcast(x, stored).astype(self.dtype) for x in (kv[:, :width], words))

    def _scales(self, slot, head):
        """What the scores of each key are multiplied by, and the probability of each value (None: 1)."""
        if self.scales is None:
            return self.scale, None
        pages = [self.scratch.scales[slot, page, head] for page in range(self.block_pages)]
        both = jnp.concatenate(pages, axis=1)
        return both[:1] * self.scale, both[1:]

    def finish(self, item: _Item):
        """Writes the result of an item."""
        scratch, (_, heads, _, group, width) = self.scratch, self.scratch.q.shape

        def write(queries):
            rows = queries * group
            result = scratch.sum[:, :rows] / scratch.total[:, :rows]
            scratch.out[:, :queries] = result.reshape(heads, queries, group, width)
            self._out_copy(item, queries).start()

        self._by_size(item, write)


def _ceil_div(x, y: int):
    # `//` rounds down below zero too, which takes the scalar core several steps.
    return jax.lax.div(x + y - 1, y)


def _zero_after(words: Int[Array, "W H"], count: Int[Array, ""], *, packing: int) -> Int[Array, "W H"]:
    """Words, of `packing` slots each, with zeros from slot `count` on: NaN may stand there, and 0 * NaN is not 0."""
    first = packing * jax.lax.broadcasted_iota(jnp.int32, (words.shape[0], 1), 0)
    kept = jnp.clip(count - first, 0, packing)
    return words & jnp.where(kept == packing, -1, (1 << kept * (32 // packing)) - 1)
