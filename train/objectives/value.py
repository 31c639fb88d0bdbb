"""The critic of PPO: what reward is to be expected after each token."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qwen_jax.config import ModelConfig
from qwen_jax.model import Params, forward, scores
from train.objectives.judged import Sums, by_row
from train.reinforcement import PPO, Critic


def values(config: ModelConfig, params: Params, batch: Any, **how: Any) -> Float[Array, "B T"]:
    """The reward to be expected before each target of a micro-batch is known; `how` as for `model.forward`."""
    hidden = forward(config, params, batch["tokens"], batch["positions"], segments=batch["segments"], **how)
    return jnp.sum(scores(config, params, hidden), axis=-1)  # of one label


def loss(
    config: ModelConfig, objective: PPO, params: Params, batch: Any, **how: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The summed loss of the values of a micro-batch, and sums.

    Args:
      config: of a model with a score of one label.
      objective: of the policy; its critic says how far values may move.
      params: of the critic.
      batch: with `weights` and `shares` as for the policy, `returns`, and `values`, those of when it was sampled.
      how: as for `model.forward`.

    Of a token the loss is max((v - R)^2, (clip(v) - R)^2) / 2, v being kept within `clip` of what it was. The sums are
    of means over the tokens of a completion: `value`, `value_clip_fraction`, the tokens that the clip keeps from
    teaching, and `weight`, the completions.
    """
    names = ("weights", "shares", "values", "returns")
    of_row = lambda *row: _of_row(objective.critic, *row)
    sums = by_row(of_row, values(config, params, batch, **how), *(batch[name] for name in names))
    return sums["loss"], sums


def _of_row(
    critic: Critic,
    found: Float[Array, " T"],
    weights: Float[Array, " T"],
    shares: Float[Array, " T"],
    before: Float[Array, " T"],
    returns: Float[Array, " T"],
) -> Sums:
    near = jnp.clip(found, before - critic.clip, before + critic.clip) if critic.clip else found
    error, of_near = (found - returns) ** 2, (near - returns) ** 2
    each = {
        "loss": shares * 0.5 * jnp.maximum(error, of_near),
        "value": found,
        "value_clip_fraction": (of_near > error).astype(jnp.float32),
    }
    return {name: jnp.sum(weights * x) for name, x in each.items()} | {"weight": jnp.sum(weights)}
