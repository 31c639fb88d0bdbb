"""What a run minimises. The training step and the loop do not know which objective runs.

An objective is a pure function of parameters and one micro-batch that returns sums, never means, so that micro-batches
of any size add up: what is minimised, and a dict of float32 scalars, of which `weight` is what all are divided by and
`loss` is what a model is judged by. A micro-batch with a "key" is one of training, and may be random.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from qwen_jax import model
from qwen_jax.model import Params
from train.adapter import Frozen
from train.alignment import DPO, ProcessReward, Reward
from train.config import LM, Noise, TrainConfig
from train.objectives import dpo, lm, reward

Batch = Mapping[str, jax.Array]
Objective = Callable[[Params, Batch], tuple[jax.Array, dict[str, jax.Array]]]
Refer = Callable[[Frozen, Batch], Batch]


def make(config: TrainConfig) -> Objective:
    """The objective that the config chose."""
    shape, chosen = config.model_config, config.objective

    def objective(params: Params, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        how: dict[str, Any] = dict(remat=config.remat, attention=config.attention, balanced=True)
        if "key" in batch and config.noise != Noise():
            how["noise"] = model.Noise(key=batch["key"], **dataclasses.asdict(config.noise))
        match chosen:
            case LM():
                return lm.loss(shape, chosen, params, batch, **how)
            case Reward():
                return reward.loss(shape, chosen, params, batch, **how)
            case ProcessReward():
                return reward.process_loss(shape, params, batch, **how)
            case DPO():
                return dpo.loss(shape, chosen, params, batch, **how)

    return objective


def refer(config: TrainConfig) -> Refer:
    """Adds to a micro-batch what its objective compares with."""
    if not isinstance(config.objective, DPO):
        return lambda frozen, batch: batch

    def add(frozen: Frozen, batch: Batch) -> Batch:
        params = frozen.base if config.adapter else frozen.reference
        assert params is not None, "a run of DPO keeps what it compares with"
        found = dpo.log_probs(config.model_config, params, batch, attention=config.attention, balanced=True)
        return {**batch, "reference": found}

    return add


def is_random(config: TrainConfig) -> bool:
    """Whether training draws random numbers."""
    return config.noise != Noise() or bool(config.adapter and config.adapter.dropout)
