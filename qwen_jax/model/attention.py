"""Grouped-query attention."""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from qwen_jax.config import DualChunk, ModelConfig
from qwen_jax.model.cache import LayerCache, write
from qwen_jax.model.layers import Linear, RMSNorm
from qwen_jax.ops.attention import Implementation, attention
from qwen_jax.ops.dual_chunk import dual_chunk_attention
from qwen_jax.ops.mask import Mask
from qwen_jax.ops.rope import Rotation, rotate
from qwen_jax.ops.vertical_slash import VerticalSlash, vertical_slash_attention


class Attention(nn.Module):
    """Project, rotate, attend, project back; with a cache, the keys and values are written to it and read from it.

    With `sparse`, which is for prompts in a cache of more slots than its threshold, rows above that are sparse.
    """

    config: ModelConfig
    implementation: Implementation
    sparse: VerticalSlash | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], rotation: Rotation, mask: Mask, cache: LayerCache | None
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
        k, v = rotate(k, rotation).swapaxes(1, 2), v.swapaxes(1, 2)
        if rotation.logn is not None:
            turned = (turned[0] * rotation.logn,)
        if cache is not None:
            cache = write(cache, k, v, mask.query_positions)
            k, v = cache.k, cache.v
        y = self._attend(turned, (turned[0], *search), k, v, mask)
        # As in Qwen1: what is added to the residual stream starts smaller the more layers add to it.
        o_shape, scale = (c.width, c.num_heads, c.head_dim), 0.5 / c.num_layers
        return Linear("btnh,dnh->btd", o_shape, dtype, scale=scale, name="o")(y), cache

    def _attend(
        self,
        queries: tuple[Float[Array, "B T N H"], ...],
        search: tuple[Float[Array, "B T N H"], ...],
        k: Float[Array, "B K S H"],
        v: Float[Array, "B K S H"],
        mask: Mask,
    ) -> Float[Array, "B T N H"]:
        """The attention that the config and the options ask for."""
        scaling, implementation = self.config.rope.scaling, self.implementation
        chunk = scaling.chunk if isinstance(scaling, DualChunk) else None
        if self.sparse:
            return vertical_slash_attention(
                queries, search, k, v, mask, sparse=self.sparse, chunk=chunk, implementation=implementation
            )
        if chunk:
            return dual_chunk_attention(queries, k, v, mask, chunk=chunk, implementation=implementation)
        return attention(queries[0], k, v, mask, implementation=implementation)
