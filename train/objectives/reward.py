"""Reward models: scores of whole texts that are compared, and of the steps of one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qwen_jax.config import ModelConfig
from qwen_jax.model import Params, forward, scores
from train.alignment import Reward
from train.data.rows import GOOD
from train.objectives.judged import Sums, Texts, by_row, compared, per_text


def loss(
    config: ModelConfig, objective: Reward, params: Params, batch: Any, **how: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The summed loss of the prompts of a micro-batch, and the sums of `judged.compared`.

    Args:
      config: of a model with a score of one label.
      objective: what is minimised.
      params: of the model.
      batch: with `labels` at the last token of each text, and `groups`.
      how: as for `model.forward`.
    """
    hidden = forward(config, params, batch["tokens"], batch["positions"], segments=batch["segments"], **how)
    score = jnp.sum(scores(config, params, hidden), axis=-1)  # of one label
    of_row = lambda *row: _of_row(objective, *row)
    sums = by_row(of_row, score, batch["labels"], batch["segments"], batch["groups"])
    return sums["loss"], sums


def _of_row(
    objective: Reward,
    score: Float[Array, " T"],
    labels: Int[Array, " T"],
    segments: Int[Array, " T"],
    groups: Int[Array, " T"],
) -> Sums:
    texts = Texts.of(per_text(jnp.where(labels > 0, score, 0), segments), labels, segments, groups)
    return compared(texts, lambda good, bad: pair_loss(objective, good, bad))


def pair_loss(objective: Reward, good: Float[Array, "..."], bad: Float[Array, "..."]) -> Float[Array, "..."]:
    """-log sigmoid of how far apart two scores are, less the margin; and what keeps them near 0."""
    centre = objective.centre * (good + bad) ** 2 if objective.centre else 0
    return -jax.nn.log_sigmoid(good - bad - objective.margin) + centre


def process_loss(config: ModelConfig, params: Params, batch: Any, **how: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The summed cross-entropy of the labels of a micro-batch, which are the choice of two scores; their `accuracy`."""
    hidden = forward(config, params, batch["tokens"], batch["positions"], segments=batch["segments"], **how)
    bad, good = jnp.moveaxis(scores(config, params, hidden), -1, 0)
    labels = jax.sharding.reshard(batch["labels"], jax.typeof(good).sharding.spec)
    is_good, judged = labels == GOOD, (labels > 0).astype(jnp.float32)
    away = jnp.where(is_good, good - bad, bad - good)
    each = {"loss": -jax.nn.log_sigmoid(away), "accuracy": (away > 0).astype(jnp.float32)}
    sums = {name: jnp.sum(judged * x) for name, x in each.items()} | {"weight": jnp.sum(judged)}
    return sums["loss"], sums
