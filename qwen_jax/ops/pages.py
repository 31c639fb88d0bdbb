"""Keys and values in pages of a fixed size, which rows of a batch take and share as they grow (Kwon et al., 2023).

Two arrays per layer, whose shapes are chosen for the tiles of TPU memory; `tensor` splits K:

pages   [P, K, S, 2 H]  page, kv head, slot, and in the lanes the key (rotated) beside the value: a kv head's page is
                        whole tiles even at H = 64, a page with all its heads is contiguous, and needs one copy

or, quantised to int8,

pages   [P, K, S/4, 2 H]  int32 words of four slots each, the first in the lowest byte: this is how TPU stores int8, and
                          XLA, which writes single rows of words in place, would copy all pages to write one of bytes
scales  [P, K, 2, S]      float32, what to multiply the key and the value of a slot by; S % 128 = 0, as lanes are

On CPU pages of bfloat16 are uint16, their bits: there XLA would turn all pages into float32 to read or write a few.
"""

from __future__ import annotations

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Num

from qwen_jax import sharding
from qwen_jax.errors import ConfigError
from qwen_jax.ops.attention import one_kv_head_per_device

SPLIT = P(None, "tensor")  # of pages, scales, and tokens [T, heads, H] where they meet
Scales = Float[Array, "P K 2 S"]


@typing.no_type_check  # at run time: in_specs of shard_map have specs in place of arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of a batch with new tokens, in pages.

    The tokens stand in R blocks of `width`, row after row. A row takes whole blocks for its new tokens: one where it
    decodes; for a part of a prompt many, and other rows then have none and are idle.

    Attributes:
      lengths: [R], tokens of each row, the new ones included.
      counts: [R], its new tokens. Blocks that no row takes come last.
      table: [R, M], the pages of each row's slots in order. Ids of pages that hold no token of a row, and what stands
        in such pages, are never used.
      width: see above.
    """

    lengths: Int[Array, " R"]
    counts: Int[Array, " R"]
    table: Int[Array, "R M"]
    width: int = dataclasses.field(metadata={"static": True})

    @property
    def starts(self) -> Int[Array, " R"]:
        """The first new token of each row."""
        return (self._ends - self._blocks) * self.width

    @property
    def of_blocks(self) -> Int[Array, " R"]:
        """The row that each block is of; any row for a block of none."""
        block = jnp.arange(len(self.lengths), dtype=jnp.int32)
        row = jnp.searchsorted(self._ends, block, side="right", method="compare_all").astype(jnp.int32)
        return jnp.minimum(row, len(self.lengths) - 1)

    @property
    def positions(self) -> Int[Array, " T"]:
        """The position of each new token in its row; -1 where there is none."""
        row = self.of_blocks[:, None]
        token = jnp.arange(len(row) * self.width, dtype=jnp.int32).reshape(-1, self.width) - self.starts[row]
        length, count = (jnp.asarray(x)[row] for x in (self.lengths, self.counts))
        return jnp.where(token < count, length - count + token, -1).ravel()

    @property
    def _blocks(self) -> Int[Array, " R"]:
        return -(-self.counts // self.width)

    @property
    def _ends(self) -> Int[Array, " R"]:
        return jnp.cumsum(self._blocks, dtype=jnp.int32)


def make_pages(
    num_pages: int, num_kv_heads: int, page_size: int, head_dim: int, dtype: str, *, quantised: bool = False
) -> tuple[Num[Array, "P K X H2"], Scales | None]:
    """Pages of zeros on the current mesh, and scales where they are quantised. `dtype` is that of keys and values."""
    shape = num_pages, kv_heads(num_kv_heads)
    zeros = lambda *more: lambda dtype: jnp.zeros((*shape, *more), dtype, out_sharding=SPLIT)
    if quantised:
        return zeros(page_size // 4, 2 * head_dim)(jnp.int32), zeros(2, page_size)(jnp.float32)
    bits = dtype == "bfloat16" and sharding.platform() == "cpu"
    return zeros(page_size, 2 * head_dim)(jnp.uint16 if bits else dtype), None


def kv_heads(num_kv_heads: int) -> int:
    """Heads that pages have: at least one for each device along `tensor`."""
    ways = sharding.axis_size("tensor")
    if num_kv_heads % ways and ways % num_kv_heads:
        raise ConfigError(
            f"{num_kv_heads} kv heads cannot be shared by tensor={ways} devices; choose a divisor or a multiple"
        )
    return max(num_kv_heads, ways)


def page_size(pages: Num[Array, "P K X H2"], scales: Scales | None) -> int:
    """Slots of a page."""
    return pages.shape[2] if scales is None else scales.shape[3]


def write(
    pages: Num[Array, "P K X H2"],
    k: Float[Array, "T J H"],
    v: Float[Array, "T J H"],
    rows: Rows,
    scales: Scales | None = None,
) -> tuple[Num[Array, "P K X H2"], Scales | None]:
    """Pages and scales with the new tokens' keys and values in their slots; in place where both are donated.

    With `scales`, each key and each value is quantised by its own largest magnitude, which becomes 127. Where several
    groups of rows share pages, write them all before any attends: else XLA copies all pages.
    """
    # All tokens first: to split heads where tokens were split would be one exchange too intricate for XLA.
    whole = P(None, *sharding.activation("kh", k.shape[1:]))
    k, v = (one_kv_head_per_device(jax.sharding.reshard(x, whole)) for x in (k, v))
    arguments, specs = (pages, k, v, rows, scales), (SPLIT, SPLIT, SPLIT, P(), SPLIT)
    local = jax.shard_map(_write, in_specs=specs, out_specs=(SPLIT, SPLIT), check_vma=False)
    return local(*jax.sharding.reshard(arguments, specs))


def _write(pages, k, v, rows, scales):
    position, size = rows.positions, page_size(pages, scales)
    row = jnp.repeat(rows.of_blocks, rows.width)
    # A page past the last: such updates are dropped.
    page = jnp.where(position < 0, len(pages), rows.table[row, position // size])
    # An index for each row: else XLA on TPU may turn all pages around, to have the heads of a slot side by side.
    page, heads, slot = page[:, None], jnp.arange(pages.shape[1]), position[:, None] % size
    if scales is None:
        update = jnp.concatenate([k, v], axis=-1)
        if pages.dtype == jnp.uint16:
            update = jax.lax.bitcast_convert_type(update.astype(jnp.bfloat16), jnp.uint16)
        return pages.at[page, heads, slot].set(update.astype(pages.dtype), mode="drop"), None
    (k, key_scale), (v, value_scale) = quantize(k), quantize(v)
    update = jnp.concatenate([k, v], axis=-1).astype(jnp.int32) & 255
    scales = _write_scales(scales, jnp.stack([key_scale, value_scale], axis=-1), rows)
    # Up to four tokens share a word. Each adds what changes its own byte, so their sum is right in any order.
    word, shift = (page, heads, slot // 4), (slot % 4 * 8)[..., None]
    change = (update - (pages[word] >> shift & 255)) << shift
    return pages.at[word].add(change, mode="drop"), scales


def _write_scales(scales, steps, rows):
    """Scales with those of the new tokens, [T, J, 2]: all slots of a page at once, the old ones as they were.

    XLA on TPU would copy all scales into VMEM and back to write single numbers. Several blocks may be in one page: each
    writes it with what is new of all of them, so it does not matter which is last.
    """
    heads, size, width = scales.shape[1], scales.shape[3], rows.width
    row, position = rows.of_blocks, rows.positions
    # Pages that the new tokens of a block may be in, counted from its first.
    number = (jnp.maximum(position[::width], 0) // size)[:, None] + jnp.arange(-(-(width - 1) // size) + 1)
    slot = number[:, :, None, None] * size + jnp.arange(size)[:, None]
    own = (position == slot) & (jnp.repeat(row, width) == row[:, None, None, None])
    ids = jnp.take_along_axis(rows.table[row], number, axis=1, mode="clip")
    page = jnp.where(own.any((2, 3)), ids, len(scales))
    # Rows of slots, [P K 2, S], are no other bytes where S = 128. With four axes XLA on TPU may turn them around.
    kind = (page[..., None] * heads + jnp.arange(heads))[..., None] * 2 + jnp.arange(2)
    flat, own = scales.reshape(-1, size), own[:, :, None, None]
    new = jnp.where(own, jnp.moveaxis(steps, 0, -1)[:, :, None], 0).sum(-1)
    return flat.at[kind].set(jnp.where(own.any(-1), new, flat[kind]), mode="drop").reshape(scales.shape)


def quantize(x: Float[Array, "*n H"]) -> tuple[Int[Array, "*n H"], Float[Array, "*n"]]:
    """int8 `n` and float32 `s` with `|x - n s| <= s / 2`, one `s` per vector."""
    wide = x.astype(jnp.float32)
    scale = jnp.abs(wide).max(-1) / 127
    steps = wide / jnp.where(scale > 0, scale, 1)[..., None]
    return jnp.round(steps).astype(jnp.int8), scale


def fetch(
    pages: Num[Array, "P K X H2"], scales: Scales | None, ids: Int[Array, "*n M"], kind: int, dtype: jnp.dtype
) -> Float[Array, "*n K MS H"]:
    """The keys (kind 0) or values (1) of these pages, one page after another. Every id must be that of a page."""
    dim = pages.shape[3] // 2
    lanes = slice(kind * dim, (kind + 1) * dim)
    # Head by head: what is one after another for a head is then one matrix.
    page, head = ids[..., None, :], jnp.arange(pages.shape[1])[:, None]
    # XLA for CPU would copy the lanes of what it has gathered once more; XLA for TPU, turn all pages around for half of
    # their lanes.
    half = lambda pages: pages.at[page, head, :, lanes].get(mode="promise_in_bounds")
    whole = lambda pages: pages.at[page, head].get(mode="promise_in_bounds")[..., lanes]
    x = jax.lax.platform_dependent(pages, cpu=half, default=whole)
    if x.dtype == jnp.uint16:
        x = jax.lax.bitcast_convert_type(x, jnp.bfloat16)
    if scales is not None:
        steps = scales.at[page, head, kind].get(mode="promise_in_bounds")
        split = jnp.moveaxis(jax.lax.bitcast_convert_type(x, jnp.int8), -1, -2).reshape(*steps.shape, dim)
        x = split.astype(jnp.float32) * steps[..., None]
    return x.reshape(*x.shape[:-3], -1, dim).astype(dtype)


def gather(
    pages: Num[Array, "P K X H2"], rows: Rows, scales: Scales | None = None, *, dtype: str
) -> tuple[Float[Array, "R K MS H"], Float[Array, "R K MS H"]]:
    """Keys and values of each row, one after another; zeros where it has no token."""
    arguments, specs = (pages, rows, scales), (SPLIT, P(), SPLIT)

    def local(pages, rows, scales):
        slots = jnp.arange(rows.table.shape[1] * page_size(pages, scales))
        real = slots < rows.lengths[:, None]
        ids = jnp.where(real.reshape(*rows.table.shape, -1).any(-1), rows.table, 0)
        part = lambda kind: fetch(pages, scales, ids, kind, jnp.dtype(dtype))
        return tuple(jnp.where(real[:, None, :, None], part(kind), 0) for kind in (0, 1))

    k, v = jax.shard_map(local, in_specs=specs, out_specs=SPLIT, check_vma=False)(
        *jax.sharding.reshard(arguments, specs)
    )
    return k, v
