"""Optimisers and learning-rate schedules, built from the config on top of optax."""

from train.optim.adamw import adamw, decays
from train.optim.schedule import cosine

__all__ = ["adamw", "cosine", "decays"]
