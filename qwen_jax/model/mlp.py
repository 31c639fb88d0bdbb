"""The gated feed-forward layer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from qwen_jax.config import ModelConfig
from qwen_jax.model.layers import Linear
from qwen_jax.ops.mlp import in_pieces, mlp


class MLP(nn.Module):
    """`down(silu(gate(x)) * up(x))` (SwiGLU, Shazeer 2020), `width` being its inner size."""

    config: ModelConfig
    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c, dtype = self.config, jnp.dtype(self.config.param_dtype)
        gate = Linear("btd,fd->btf", (self.width, c.width), dtype, name="gate")
        up = Linear("btd,fd->btf", (self.width, c.width), dtype, name="up")
        down = Linear("btf,df->btd", (c.width, self.width), dtype, scale=0.5 / c.num_layers, name="down")
        if in_pieces(x):
            return mlp(x, gate.weight(), up.weight(), down.weight())
        gated, raised = gate(x), up(x)
        return down(jax.nn.silu(gated) * raised)
