"""The mixture of experts that stands in place of the gated feed-forward layer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from qwen_jax import sharding
from qwen_jax.config import ModelConfig, Moe
from qwen_jax.model.layers import Linear, weight
from qwen_jax.model.mlp import MLP
from qwen_jax.ops.lora import Adapted
from qwen_jax.ops.moe import apply_experts
from qwen_jax.ops.quantized import Quantized
from qwen_jax.ops.router import Load, load, route


class Experts(nn.Module):
    """The gated MLPs, stacked. Each starts as a single one would."""

    config: ModelConfig
    moe: Moe

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], weights: Float[Array, "B T k"], experts: Int[Array, "B T k"]
    ) -> Float[Array, "B T D"]:
        c, moe = self.config, self.moe
        outwards, inwards = (moe.num_experts, moe.expert_width, c.width), (moe.num_experts, c.width, moe.expert_width)
        return apply_experts(
            x,
            weights,
            experts,
            gate=_Stack("efd", outwards, jnp.dtype(c.param_dtype), name="gate")(),
            up=_Stack("efd", outwards, jnp.dtype(c.param_dtype), name="up")(),
            down=_Stack("edf", inwards, jnp.dtype(c.param_dtype), scale=0.5 / c.num_layers, name="down")(),
        )


class _Stack(nn.Module):
    """One matrix of each expert, outputs first, of variance `scale / fan-in`."""

    letters: str
    shape: tuple[int, int, int]
    param_dtype: jnp.dtype
    scale: float = 1.0

    @nn.compact
    def __call__(self) -> Float[Array, "E out in"] | Quantized:
        kernel = jax.nn.initializers.variance_scaling(
            self.scale, "fan_in", "truncated_normal", in_axis=2, out_axis=1, batch_axis=0
        )
        split = sharding.weight(self.letters, self.shape)
        w = weight(self, lambda key: kernel(key, self.shape, self.param_dtype, out_sharding=split))
        assert not isinstance(w, Adapted), "experts have no adapters"
        return w


class MoE(nn.Module):
    """A router's weighted choice of experts, and where there is one the shared expert behind its gate."""

    config: ModelConfig
    moe: Moe

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], segments: Int[Array, "B T"] | None
    ) -> tuple[Float[Array, "B T D"], Load]:
        c, moe, dtype = self.config, self.moe, jnp.dtype(self.config.param_dtype)
        # The router's outputs are labels of tokens: on every device, all of them.
        logits = Linear("btd,cd->btc", (moe.num_experts, c.width), dtype, name="router")(x)
        weights, experts = route(logits, top_k=moe.top_k, normalize=moe.normalize_top_k)
        y = Experts(c, moe, name="experts")(x, weights, experts)
        if moe.shared_width:
            gate = Linear("btd,cd->btc", (1, c.width), dtype, name="shared_gate")(x)
            y = y + jax.nn.sigmoid(gate) * MLP(c, moe.shared_width, name="shared")(x)
        return y, load(logits, experts, segments)
