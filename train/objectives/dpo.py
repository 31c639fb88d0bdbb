"""Direct preference optimisation: a model is tuned by how much likelier than before it makes what is preferred."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qwen_jax.config import ModelConfig
from qwen_jax.model import Params, forward, head
from qwen_jax.ops.loss import token_log_probs
from train.alignment import DPO
from train.objectives.judged import Sums, Texts, by_row, compared, means, per_text


def log_probs(
    config: ModelConfig, params: Params, batch: Any, *, temperature: float = 1.0, **how: Any
) -> Float[Array, "B T"]:
    """The log-probability of each target of a micro-batch at a temperature; `how` as for `model.forward`."""
    hidden = forward(config, params, batch["tokens"], batch["positions"], segments=batch["segments"], **how)
    return token_log_probs(hidden / temperature, head(params), batch["targets"])


def loss(
    config: ModelConfig, objective: DPO, params: Params, batch: Any, **how: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The summed loss of the prompts of a micro-batch, and sums.

    Args:
      config: of the model.
      objective: what is minimised.
      params: of the model.
      batch: with `labels` and `groups`, and `reference`, the log-probabilities that the reference gives the targets.
      how: as for `model.forward`.

    The sums are those of `judged.compared`, whose values are the rewards; beside them `log_probs_chosen` and
    `log_probs_rejected`, of whole completions, and `log_ratio`, how much likelier than to the reference a token of all
    of them is: against the divergence from it, this is what a drift shows in.
    """
    found = log_probs(config, params, batch, **how)
    arrays = (batch[name] for name in ("reference", "weights", "labels", "segments", "groups"))
    sums = by_row(lambda *row: _of_row(objective, *row), found, *arrays)
    return sums["loss"], sums


def _of_row(
    objective: DPO,
    found: Float[Array, " T"],
    reference: Float[Array, " T"],
    weights: Float[Array, " T"],
    labels: Int[Array, " T"],
    segments: Int[Array, " T"],
    groups: Int[Array, " T"],
) -> Sums:
    ratio, tokens = per_text(weights * (found - reference), segments), per_text(weights, segments)
    by_token = ratio / jnp.maximum(tokens, 1)
    value = objective.beta * (by_token if objective.loss == "ipo" else ratio)
    texts = Texts.of(value, labels, segments, groups)
    sums = compared(texts, lambda good, bad: pair_loss(objective, good - bad))
    chosen, rejected = means(per_text(weights * found, segments), texts)
    drift = sum(means(by_token, texts)) / 2
    return sums | {"log_probs_chosen": chosen, "log_probs_rejected": rejected, "log_ratio": drift}


def pair_loss(objective: DPO, margin: Float[Array, "..."]) -> Float[Array, "..."]:
    """The loss of how much higher the reward of the preferred completion is."""
    if objective.loss == "ipo":
        return ((margin - 0.5) / objective.beta) ** 2
    wrong = objective.label_smoothing
    return -(1 - wrong) * jax.nn.log_sigmoid(margin) - wrong * jax.nn.log_sigmoid(-margin)
