"""Policy gradients: what was sampled is made likelier by how much better than the rest it was (GRPO, PPO)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qwen_jax.config import ModelConfig
from qwen_jax.model import Params
from train.objectives.dpo import log_probs
from train.objectives.judged import Sums, by_row, per_text
from train.reinforcement import GRPO, PPO

_COLUMNS = ("segments", "weights", "shares", "advantages", "sampled", "old", "reference")


def loss(
    config: ModelConfig, objective: GRPO | PPO, params: Params, batch: Any, **how: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The summed loss of the completions of a micro-batch, and sums.

    Args:
      config: of the model.
      objective: what is minimised.
      params: of the model.
      batch: completions with their prompts, each a segment. `weights` are 1 / (trained tokens of the completion) where
        the target is one of them, `shares` are those of `advantages.shares`, `advantages` are of each token, and
        `sampled` is its log-probability to the sampler. Where weights learn from what they did not sample, `old` is
        that to the model before; where there is a reference, `reference` is that to it.
      how: as for `model.forward`.

    Of a token of advantage A, with r its ratio to `old` and c = min(old / sampled, importance_cap) of probabilities,
    the loss is -c min(r A, clip(r) A), and for GRPO kl (q/p - log(q/p) - 1) beside it (arXiv 2402.03300, equation 4).
    It counts weight * share. The ratio of a completion is that of each of its tokens.

    The sums are of means over the tokens of a completion: `ratio`; `clip_fraction`, the tokens that the clip keeps from
    teaching; `entropy`, estimated by -sampled; `gap`, how far trainer and sampler are apart, in nats; with a reference
    `kl`, the estimate above; and `weight`, the completions.
    """
    found = log_probs(config, params, batch, temperature=objective.rollout.temperature, **how)
    sums = of_log_probs(objective, found, batch)
    return sums["loss"], sums


def of_log_probs(objective: GRPO | PPO, found: Float[Array, "B T"], batch: Any) -> Sums:
    """The sums of a micro-batch whose targets have these log-probabilities."""
    columns = {"found": found} | {name: batch[name] for name in _COLUMNS if name in batch}
    return by_row(lambda *row: _of_row(objective, dict(zip(columns, row, strict=True))), *columns.values())


def _of_row(objective: GRPO | PPO, row: Mapping[str, jax.Array]) -> Sums:
    weights, segments = row["weights"], row["segments"]
    # The log-probabilities of prompts and padding are nobody's, and their exponentials could be infinite.
    only = lambda name: jnp.where(weights > 0, row[name], 0)
    found, sampled, advantages = only("found"), only("sampled"), only("advantages")
    old = only("old") if "old" in row else jax.lax.stop_gradient(found)
    log_ratio = found - old
    if isinstance(objective, GRPO) and objective.ratio == "completion":
        # The mean, since the weights of a completion add up to 1.
        log_ratio = per_text(weights * log_ratio, segments)[segments]
    ratio = jnp.exp(log_ratio)
    surrogate, stopped = clipped(objective, ratio, advantages)
    correction = jnp.minimum(jnp.exp(old - sampled), objective.rollout.importance_cap)
    value = -correction * surrogate
    each = {"ratio": ratio, "clip_fraction": stopped.astype(jnp.float32)}
    each |= {"entropy": -sampled, "gap": jnp.abs(old - sampled)}
    if "reference" in row:
        away = only("reference") - found
        each["kl"] = jnp.expm1(away) - away
        if isinstance(objective, GRPO):
            value += objective.kl * each["kl"]
    each["loss"] = row["shares"] * value
    return {name: jnp.sum(weights * x) for name, x in each.items()} | {"weight": jnp.sum(weights)}


def clipped(
    objective: GRPO | PPO, ratio: Float[Array, "..."], advantages: Float[Array, "..."]
) -> tuple[Float[Array, "..."], jax.Array]:
    """min(r A, clip(r) A), and where that no longer depends on r."""
    high = objective.clip_high if isinstance(objective, GRPO) else None
    low, high = 1 - objective.clip, 1 + (objective.clip if high is None else high)
    stopped = ((advantages > 0) & (ratio > high)) | ((advantages < 0) & (ratio < low))
    return jnp.where(stopped, jnp.clip(ratio, low, high), ratio) * advantages, stopped
