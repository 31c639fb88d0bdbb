"""What a run minimises. The training step and the loop do not know which objective runs.

An objective is a pure function of parameters and one micro-batch that returns sums, never means, so that micro-batches
of any size add up: what is minimised, and a dict of float32 scalars, of which `weight` is what all are divided by and
`loss` is what a model is judged by. A micro-batch with a "key" is one of training, and may be random.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax

from qwen_jax.model import Params
from train.config import LM, Noise, TrainConfig
from train.objectives import lm

Batch = Mapping[str, jax.Array]
Objective = Callable[[Params, Batch], tuple[jax.Array, dict[str, jax.Array]]]


def make(config: TrainConfig) -> Objective:
    """The objective that the config chose."""
    match config.objective:
        case LM():
            return functools.partial(
                lm.loss,
                config.model_config,
                config.objective,
                noise=config.noise,
                remat=config.remat,
                attention=config.attention,
            )


def is_random(config: TrainConfig) -> bool:
    """Whether training draws random numbers."""
    return config.noise != Noise() or bool(config.adapter and config.adapter.dropout)
