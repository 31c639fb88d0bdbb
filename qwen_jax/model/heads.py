"""The heads of reward and classification models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from qwen_jax.config import ModelConfig, Score
from qwen_jax.model.layers import Linear


class ScoreHead(nn.Module):
    """`output(x)`, or `output(relu(hidden(x)))`, in float32: a reward in bfloat16 would have two decimals."""

    score: Score
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T C"]:
        width, x = x.shape[-1], x.astype(jnp.float32)
        shape = (self.score.labels, width)
        if not self.score.hidden:
            return Linear("btd,cd->btc", shape, self.param_dtype, name="output")(x)
        x = jax.nn.relu(Linear("btd,fd->btf", (width, width), self.param_dtype, bias=True, name="hidden")(x))
        return Linear("btf,cf->btc", shape, self.param_dtype, bias=True, name="output")(x)


def scores(config: ModelConfig, params: Mapping[str, Any], hidden: Float[Array, "B T D"]) -> Float[Array, "B T C"]:
    """The float32 scores of hidden states, one per label (C), of a model whose config has a `score`."""
    if config.score is None:
        raise ValueError("scores() takes a model with a score head, and this config has score=None")
    head = ScoreHead(config.score, jnp.dtype(config.param_dtype))
    return cast(Array, head.apply({"params": params["score"]}, hidden))
