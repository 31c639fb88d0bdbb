"""Next-token prediction, the objective of pretraining."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax.config import ModelConfig
from qwen_jax.model import Params, forward, forward_with_load, head
from qwen_jax.ops.loss import chunked_cross_entropy
from qwen_jax.ops.router import balance_loss, max_load, z_loss
from train.config import LM


def loss(
    config: ModelConfig, objective: LM, params: Params, batch: Mapping[str, jax.Array], **how: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What is minimised, and sums: the `loss`, over tokens of -log p(target), in nats, and the weights' `weight`.

    They differ for a mixture of experts, by its router's losses, which are sums as well: means of the micro-batch,
    over all devices, times its weight. So are `balance`, `z` and `max_load`, the busiest expert's load over the mean.
    `how` is as for `model.forward`.
    """
    how |= dict(segments=batch["segments"])
    if config.moe is None:
        hidden = forward(config, params, batch["tokens"], batch["positions"], **how)
    else:
        hidden, load = forward_with_load(config, params, batch["tokens"], batch["positions"], **how)
    total = chunked_cross_entropy(hidden, head(params), batch["targets"], batch["weights"])
    sums = {"loss": total, "weight": jnp.sum(batch["weights"])}
    if config.moe is None:
        return total, sums
    by_row = objective.balance_over == "sequence"
    means = {
        "balance": balance_loss(load, config.moe.top_k, by_row=by_row),
        "z": z_loss(load, config.moe.top_k),
        "max_load": max_load(load),
    }
    sums |= {name: mean * sums["weight"] for name, mean in means.items()}
    return total + objective.balance * sums["balance"] + objective.z * sums["z"], sums
