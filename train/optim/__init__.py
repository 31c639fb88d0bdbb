"""Optimisers and learning-rate schedules, built from the config on top of optax."""

from __future__ import annotations

import optax

from train.config import TrainConfig
from train.optim.adamw import adamw, decays
from train.optim.online_merging import online_merging
from train.optim.schedule import cosine

__all__ = ["adamw", "cosine", "decays", "make", "online_merging"]


def make(config: TrainConfig) -> optax.GradientTransformationExtraArgs:
    """The optimiser of a run: gradients to changes of the parameters, given the learning rate `rate` and `learned`."""
    optimizer = adamw(config.optimizer)
    if config.merging is None:
        return optimizer
    return optax.chain(optimizer, online_merging(config.merging, seed=config.seed))
