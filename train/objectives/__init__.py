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
import jax.numpy as jnp
import numpy as np

from qwen_jax import model, sharding
from qwen_jax.model import Params
from train import adapter
from train.adapter import Frozen
from train.alignment import DPO, ProcessReward, Reward
from train.config import LM, Noise, TrainConfig
from train.objectives import dpo, lm, policy, reward, value
from train.reinforcement import GRPO, PPO

Batch = Mapping[str, jax.Array]
Objective = Callable[[Params, Batch], tuple[jax.Array, dict[str, jax.Array]]]
Refer = Callable[[Frozen, Batch], Batch]
Look = Callable[[Params, Frozen, Params | None, Batch], dict[str, jax.Array]]


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
            case GRPO() | PPO():
                return policy.loss(shape, chosen, params, batch, **how)

    return objective


def inputs(config: TrainConfig) -> dict[str, type]:
    """The arrays of a batch, by their dtype."""
    found: dict[str, type] = dict.fromkeys(("tokens", "targets", "positions", "segments"), np.int32)
    match config.objective:
        case LM():
            extra: dict[str, type] = {}
        case GRPO() | PPO():
            names = ("shares", "sampled", "advantages", *look_names(config))
            extra = dict.fromkeys((*names, *(("returns",) if isinstance(config.objective, PPO) else ())), np.float32)
        case _:
            extra = {"labels": np.int32, "groups": np.int32}
            if isinstance(config.objective, DPO) and not config.compares:
                extra["reference"] = np.float32
    return found | {"weights": np.float32} | extra


def look_names(config: TrainConfig) -> tuple[str, ...]:
    """What is asked of the tokens of an episode before it is learned from: see `look`."""
    chosen = config.objective
    if not isinstance(chosen, GRPO | PPO):
        return ()
    is_ppo = isinstance(chosen, PPO)
    wanted = {"old": is_ppo or chosen.rollout.reuses, "reference": chosen.kl > 0, "values": is_ppo}
    return tuple(name for name, is_wanted in wanted.items() if is_wanted)


def look(config: TrainConfig) -> Look:
    """A compiled function of the trained parameters, what is frozen, the critic's parameters, and a micro-batch.

    Of each target it gives what `look_names` says: the log-probability that the model gives it as it is (`old`), that
    of the reference, and what the critic expects before it (`values`), float32 [b, T] each.
    """
    shape, chosen, join, names = config.model_config, config.objective, adapter.join(config.adapter), look_names(config)
    how: dict[str, Any] = dict(attention=config.attention, balanced=True)

    def said(params: Params, frozen: Frozen, critic: Params | None, batch: Batch) -> dict[str, jax.Array]:
        assert isinstance(chosen, GRPO | PPO)
        of = lambda params: policy.log_probs(shape, params, batch, temperature=chosen.rollout.temperature, **how)
        found = {}
        for name in names:
            if name == "old":
                found[name] = of(join(params, frozen, None))
            elif name == "reference":
                found[name] = of(frozen.base if config.adapter else frozen.reference)
            else:
                found[name] = value.values(config.critic_config, critic, batch, **how)
        return jax.tree.map(lambda x: sharding.whole(x.astype(jnp.float32)), found)

    return jax.jit(said)


def refer(config: TrainConfig) -> Refer:
    """Adds to a micro-batch what its objective compares with."""
    if not (isinstance(config.objective, DPO) and config.compares):
        return lambda frozen, batch: batch

    def add(frozen: Frozen, batch: Batch) -> Batch:
        params = frozen.base if config.adapter else frozen.reference
        assert params is not None, "a run of DPO keeps what it compares with"
        found = dpo.log_probs(config.model_config, params, batch, attention=config.attention, balanced=True)
        return {**batch, "reference": found}

    return add


def log_probs(config: TrainConfig) -> Callable[[Params, Batch], jax.Array]:
    """A compiled function of parameters and a micro-batch: the log-probabilities of its targets, float32 [b, T]."""
    how: dict[str, Any] = dict(attention=config.attention, balanced=True)
    return jax.jit(lambda params, batch: sharding.whole(dpo.log_probs(config.model_config, params, batch, **how)))


def is_random(config: TrainConfig) -> bool:
    """Whether training draws random numbers."""
    return config.noise != Noise() or bool(config.adapter and config.adapter.dropout)
