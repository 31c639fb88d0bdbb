"""Grouped-query attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from qwen_jax import sharding
from qwen_jax.config import DualChunk, ModelConfig
from qwen_jax.errors import ConfigError
from qwen_jax.model.cache import Batch, LayerCache
from qwen_jax.model.layers import Linear, RMSNorm
from qwen_jax.ops import pages as paged
from qwen_jax.ops.attention import Implementation, attention
from qwen_jax.ops.dual_chunk import dual_chunk_attention
from qwen_jax.ops.mask import Mask
from qwen_jax.ops.paged_attention import attend
from qwen_jax.ops.rope import Rotation, rotate
from qwen_jax.ops.vertical_slash import VerticalSlash, vertical_slash_attention


class Attention(nn.Module):
    """Project, rotate, attend, project back; with a cache, the keys and values are written to it and read from it.

    With `sparse`, groups of rows that bring more than one token are sparse.
    """

    config: ModelConfig
    implementation: Implementation
    sparse: VerticalSlash | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], rotation: Rotation, mask: Mask | Batch, cache: LayerCache | None
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        c, dtype = self.config, jnp.dtype(self.config.param_dtype)
        kv_shape = (c.num_kv_heads, c.head_dim, c.width)
        q = Linear("btd,nhd->btnh", (c.num_heads, c.head_dim, c.width), dtype, bias=c.qkv_bias, name="q")(x)
        k = Linear("btd,khd->btkh", kv_shape, dtype, bias=c.qkv_bias, name="k")(x)
        v = Linear("btd,khd->btkh", kv_shape, dtype, bias=c.qkv_bias, name="v")(x)
        if c.qk_norm:
            q = RMSNorm(c.norm_eps, dtype, name="q_norm")(q)
            k = RMSNorm(c.norm_eps, dtype, name="k_norm")(k)
        turned = tuple(rotate(q, by) for by in (rotation, *rotation.afar))
        search = tuple(rotate(q, by) for by in rotation.search)
        k = rotate(k, rotation)
        if rotation.logn is not None:
            turned = (turned[0] * rotation.logn,)
        if isinstance(mask, Mask):
            y = self._attend(turned, k.swapaxes(1, 2), v.swapaxes(1, 2), mask)
        else:
            assert cache is not None, "a batch of rows in pages has pages"
            y, cache = self._in_pages(turned, search, k, v, mask, cache)
        # As in Qwen1: what is added to the residual stream starts smaller the more layers add to it.
        o_shape, scale = (c.width, c.num_heads, c.head_dim), 0.5 / c.num_layers
        return Linear("btnh,dnh->btd", o_shape, dtype, scale=scale, name="o")(y), cache

    @property
    def _chunk(self) -> int | None:
        scaling = self.config.rope.scaling
        return scaling.chunk if isinstance(scaling, DualChunk) else None

    def _attend(
        self,
        queries: tuple[Float[Array, "B T N H"], ...],
        k: Float[Array, "B K S H"],
        v: Float[Array, "B K S H"],
        mask: Mask,
    ) -> Float[Array, "B T N H"]:
        """The attention that the config asks for, among the tokens themselves."""
        if self._chunk:
            if mask.dropout:
                raise ConfigError("dual chunk attention has no dropout of attention; leave one of them out")
            return dual_chunk_attention(queries, k, v, mask, chunk=self._chunk, implementation=self.implementation)
        return attention(queries[0], k, v, mask, implementation=self.implementation)

    def _in_pages(
        self,
        queries: tuple[Float[Array, "T 1 N H"], ...],
        search: tuple[Float[Array, "T 1 N H"], ...],
        k: Float[Array, "T 1 K H"],
        v: Float[Array, "T 1 K H"],
        batch: Batch,
        cache: LayerCache,
    ) -> tuple[Float[Array, "T 1 N H"], LayerCache]:
        """Of each group of rows: the new tokens go into the pages, and attend to all that their rows have there."""
        pages, scales, start, groups, found = cache.pages, cache.scales, 0, [], []
        queries, search, k, v = jax.tree.map(_everywhere, (queries, search, k, v))
        # All are written before any attends: else XLA would keep a copy of all pages for those that do.
        for rows in batch.rows:
            own = slice(start, start := start + len(rows.positions))
            pages, scales = paged.write(pages, k[own], v[own], rows, scales)
            groups.append((rows, own))
        for rows, own in groups:
            q, s = (tuple(x[own] for x in group) for group in (queries, search))
            if self.sparse and rows.width > 1:
                found.append(
                    self._sparsely(q, s, *paged.gather(pages, rows, scales, dtype=self.config.dtype), own, batch)
                )
                continue
            found.append(
                attend(
                    q,
                    pages,
                    rows,
                    scales=scales,
                    window=batch.window,
                    chunk=self._chunk,
                    implementation="auto" if self.implementation == "cudnn" else self.implementation,
                )
            )
        y = jnp.concatenate(found)[:, None]
        y = jax.sharding.reshard(y, sharding.activation("btnh", y.shape))
        return y, LayerCache(pages, scales)

    def _sparsely(
        self,
        queries: tuple[Float[Array, "T N H"], ...],
        search: tuple[Float[Array, "T N H"], ...],
        k: Float[Array, "R K S H"],
        v: Float[Array, "R K S H"],
        own: slice,
        batch: Batch,
    ) -> Float[Array, "T N H"]:
        """Likewise where the tokens `own` of the batch are to be sparse."""
        assert self.sparse and batch.prompts is not None, "sparse attention goes by the lengths of the prompts"
        by_row = lambda x: x.reshape(len(k), -1, *x.shape[1:])
        slots = jnp.arange(k.shape[2], dtype=jnp.int32)
        mask = Mask(
            query_positions=by_row(batch.positions[own]),
            key_positions=jnp.broadcast_to(slots, (len(k), len(slots))),
            window=batch.window,
            lengths=by_row(batch.prompts[own])[:, 0],
        )
        q, s = (tuple(by_row(x) for x in group) for group in (queries, search))
        y = vertical_slash_attention(
            q, (q[0], *s), k, v, mask, sparse=self.sparse, chunk=self._chunk, implementation=self.implementation
        )
        return y.reshape(queries[0].shape)


def _everywhere(x: Float[Array, "T 1 N H"]) -> Float[Array, "T N H"]:
    """All tokens on every device that has their heads: any row may have its pages anywhere."""
    x = x[:, 0]
    return jax.sharding.reshard(x, sharding.activation("_k_", x.shape))
