"""The keys and values of the tokens seen so far."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from qwen_jax import sharding
from qwen_jax.config import ModelConfig
from qwen_jax.ops.vertical_slash import VerticalSlash


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys (rotated) and values of one layer, both [B, K, S, H]: slot s holds the token at position s."""

    k: Float[Array, "B K S H"]
    v: Float[Array, "B K S H"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """One LayerCache per layer, all of the same number of slots.

    A slot past a row's last token may hold anything: a query sees no position later than its own, and each
    position is written before a query at or after it reads.

    Attributes:
      layers: the keys and values.
      lengths: tokens of each row's prompt, where rotations or sparse prefill depend on them; None elsewhere.
    """

    layers: tuple[LayerCache, ...]
    lengths: Int[Array, " B"] | None = None

    @property
    def length(self) -> int:
        """Slots per row."""
        return self.layers[0].k.shape[2]

    def grow(self, length: int) -> Cache:
        """The same content with `length` slots per row."""
        more = length - self.length
        layers = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))), self.layers)
        return dataclasses.replace(self, layers=layers)


def make_cache(
    config: ModelConfig,
    batch: int,
    length: int,
    *,
    lengths: Int[Array, " B"] | None = None,
    sparse: VerticalSlash | None = None,
) -> Cache:
    """An empty cache for `batch` rows of up to `length` tokens, in the config's dtype.

    `lengths` are the tokens of each row's prompt, without padding: wanted, and kept, where `config.rope` or sparse
    prefill goes by them.
    """
    if not (config.rope.by_length or sparse):
        lengths = None
    elif lengths is None:
        raise ValueError(
            "rotations or sparse prefill go by the lengths of the prompts: give make_cache their `lengths`"
        )
    shape = (batch, config.num_kv_heads, length, config.head_dim)
    split = sharding.activation("bksh", shape)
    layer = lambda: jnp.zeros(shape, config.dtype, out_sharding=split)
    return Cache(tuple(LayerCache(layer(), layer()) for _ in range(config.num_layers)), lengths)


def write(
    cache: LayerCache, k: Float[Array, "B K T H"], v: Float[Array, "B K T H"], positions: Int[Array, "B T"]
) -> LayerCache:
    """The cache with row b's keys and values at slots positions[b, 0] onwards."""
    split = sharding.activation("bksh", cache.k.shape)
    rows = P(split[0])

    def local(slots, new, start):
        return jax.vmap(lambda s, n, i: jax.lax.dynamic_update_slice_in_dim(s, n, i, axis=1))(slots, new, start)

    place = jax.shard_map(local, in_specs=(split, split, rows), out_specs=split)
    start = jax.sharding.reshard(positions[:, 0], rows)
    k, v = (jax.sharding.reshard(x, split) for x in (k, v))
    return LayerCache(place(cache.k, k, start), place(cache.v, v, start))
