"""The keys and values of the tokens seen so far, in pages (`ops.pages`)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from qwen_jax.config import ModelConfig
from qwen_jax.ops.pages import Rows, make_pages


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """The pages of one layer: keys (rotated) and values; int32 words with `scales` where they are int8."""

    pages: Num[Array, "P K X H2"]
    scales: Float[Array, "P K 2 S"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """One LayerCache per layer, all of the same pages.

    A slot that holds no token of a row may hold anything: a query sees no position later than its own.
    """

    layers: tuple[LayerCache, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Whose the tokens of a decoding batch are.

    Attributes:
      rows: groups of rows; their tokens, [T] in all, stand in the batch one group after another.
      prompts: [T], tokens of the prompt of each token's row, where rotations go by them; None elsewhere.
      window: int32 scalar, how many of the latest keys are visible, its own included; None for all.
    """

    rows: tuple[Rows, ...]
    prompts: Int[Array, " T"] | None = None
    window: Int[Array, ""] | None = None

    @property
    def positions(self) -> Int[Array, " T"]:
        """Where each token stands in its row; -1 for one that is not real."""
        return jnp.concatenate([rows.positions for rows in self.rows])

    @property
    def query_segments(self) -> Int[Array, "T 1"]:
        """1 for a token that is real, else 0, as in a `Mask`."""
        return (self.positions >= 0).astype(jnp.int32)[:, None]


def make_cache(config: ModelConfig, num_pages: int, page_size: int, *, int8: bool = False) -> Cache:
    """Empty pages of `page_size` tokens on the current mesh, in the config's dtype or in int8.

    A page of int8 has a multiple of 128 tokens.
    """
    if int8 and page_size % 128:
        raise ValueError(f"pages of int8 have a multiple of 128 tokens, not {page_size}")
    layer = lambda: make_pages(num_pages, config.num_kv_heads, page_size, config.head_dim, config.dtype, quantised=int8)
    return Cache(tuple(LayerCache(*layer()) for _ in range(config.num_layers)))
