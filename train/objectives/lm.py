"""Next-token prediction, the objective of pretraining."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from qwen_jax.config import ModelConfig
from qwen_jax.model import Params, Remat, forward, head
from qwen_jax.ops.attention import Implementation
from qwen_jax.ops.loss import chunked_cross_entropy


def loss(
    config: ModelConfig, params: Params, batch: Mapping[str, jax.Array], *, remat: Remat, attention: Implementation
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The weighted sum over tokens of -log p(target), in nats, and `weight`, the sum of the weights."""
    tokens, positions, segments = batch["tokens"], batch["positions"], batch["segments"]
    hidden, _ = forward(
        config, params, tokens, positions, segments=segments, remat=remat, attention=attention, balanced=True
    )
    total = chunked_cross_entropy(hidden, head(params), batch["targets"], batch["weights"])
    return total, {"weight": jnp.sum(batch["weights"])}
