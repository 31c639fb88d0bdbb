"""One layer: attention and feed-forward, each normalised before and added to the residual stream."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from qwen_jax.config import ModelConfig
from qwen_jax.model.attention import Attention
from qwen_jax.model.cache import Batch, LayerCache
from qwen_jax.model.layers import RMSNorm
from qwen_jax.model.mlp import MLP
from qwen_jax.model.moe import MoE
from qwen_jax.ops.attention import Implementation
from qwen_jax.ops.dropout import Dropout
from qwen_jax.ops.mask import Mask
from qwen_jax.ops.rope import Rotation
from qwen_jax.ops.router import Load
from qwen_jax.ops.vertical_slash import VerticalSlash


class Block(nn.Module):
    """`a = x + Attention(norm(x)); a + MLP(norm(a))`, or a mixture of experts in place of the MLP.

    `window` and `dropout` of attention are this layer's, and travel beside its parameters.
    """

    config: ModelConfig
    implementation: Implementation
    sparse: VerticalSlash | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        window: Int[Array, ""] | None,
        cache: LayerCache | None,
        rotation: Rotation,
        mask: Mask | Batch,
        dropout: Dropout | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[LayerCache | None, Load | None]]:
        eps, dtype = self.config.norm_eps, jnp.dtype(self.config.param_dtype)
        mask = dataclasses.replace(mask, window=window, **({"dropout": dropout} if dropout else {}))
        attend = Attention(self.config, self.implementation, self.sparse, name="attention")
        y, cache = attend(RMSNorm(eps, dtype, name="attention_norm")(x), rotation, mask, cache)
        x = x + y
        y = RMSNorm(eps, dtype, name="mlp_norm")(x)
        if self.config.moe:
            y, load = MoE(self.config, self.config.moe, name="mlp")(y, mask.query_segments)
            return x + y, (cache, load)
        return x + MLP(self.config, self.config.mlp_width, name="mlp")(y), (cache, None)
