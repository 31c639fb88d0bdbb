"""What an episode of reinforcement learning holds on a device, phase by phase: each is compiled, none runs."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import model
from qwen_jax.config import ModelConfig
from qwen_jax.engine.packing import row_multiple
from qwen_jax.engine.steps import Inputs, compute
from qwen_jax.errors import UserError
from qwen_jax.ops.pages import Rows, kv_heads
from qwen_jax.weights.source import read_config
from train import critic, objectives
from train.adapter import Frozen
from train.config import TrainConfig
from train.feed import abstract_batch
from train.player import capacity
from train.reinforcement import PPO, Online
from train.rewards.config import RewardModel
from train.sampling import along_tensor, engine_mesh, engines_mesh, prepare
from train.step import State


def absent(config: TrainConfig) -> list[str]:
    """The reward models of a run, one that its critic begins with among them, that cannot be read yet."""
    if not isinstance(config.objective, Online):
        return []
    named = [each.source.path for each in config.objective.rewards if isinstance(each.source, RewardModel)]
    if isinstance(config.objective, PPO) and config.objective.critic.model:
        named.append(config.objective.critic.model)
    return [path for path in dict.fromkeys(named) if _shape(path) is None]


def with_critic(config: TrainConfig) -> TrainConfig:
    """The run; a critic that is not there yet counts as one of the policy's shape."""
    if not (isinstance(config.objective, PPO) and config.objective.critic.model in absent(config)):
        return config
    fresh = dataclasses.replace(config.objective.critic, model=None)
    return dataclasses.replace(config, objective=dataclasses.replace(config.objective, critic=fresh))


def lowered(config: TrainConfig, state: State, kept: Frozen) -> dict[str, tuple[jax.stages.Lowered, int]]:
    """The programs of a run on its own completions beside the policy's step, on the current mesh, by phase.

    With each comes what is there all the time, its arguments included, in bytes of one device. In "rollout", a step of
    the engine, all rows decode; "look" is what model, reference and critic say of a micro-batch; "critic" is its step.
    """
    assert isinstance(config.objective, Online)
    everything = held(config, state, kept)
    rollout, own = _rollout(config, state, kept)
    found = {"rollout": (rollout, everything + own)}
    batch = abstract_batch(config)
    if objectives.look_names(config):
        micro = jax.tree.map(_one, batch)
        params = state.critic and state.critic.params
        found["look"] = objectives.look(config).lower(state.params, kept, params, micro), everything
    if isinstance(config.objective, PPO) and state.critic:
        alone = State(state.step, *state.critic)
        found["critic"] = critic.value_step(config).lower(alone, batch), everything
    return found


def held(config: TrainConfig, state: State, kept: Frozen) -> int:
    """Bytes of one device that a run never lets go of: its state, what is beside it, and reward models.

    Those that are `absent` count as models of the policy's shape.
    """
    rewards = config.objective.rewards if isinstance(config.objective, Online) else ()
    return size((state, kept)) + sum(
        _judge(config, each.source.path) for each in rewards if isinstance(each.source, RewardModel)
    )


def _judge(config: TrainConfig, path: str) -> int:
    shape = _shape(path) or config.model_config
    return size(model.abstract(dataclasses.replace(shape, param_dtype=shape.dtype)))


@functools.cache  # a name that is no folder is looked for on the hub
def _shape(path: str) -> ModelConfig | None:
    try:
        return read_config(path)
    except UserError:
        return None


def size(tree: Any) -> int:
    """Bytes of the arrays of a tree on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _one(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """A micro-batch of arrays [accumulation, ...]."""
    assert isinstance(x.sharding, jax.NamedSharding)
    split = jax.NamedSharding(x.sharding.mesh, jax.P(*x.sharding.spec[1:]))
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=split)


def _rollout(config: TrainConfig, state: State, kept: Frozen) -> tuple[jax.stages.Lowered, int]:
    """A step of an engine on its devices, and the bytes of its weights and cache."""
    assert isinstance(config.objective, Online)
    mesh = engines_mesh(jax.sharding.get_mesh(), config.model_config, config.objective.rollout.tensor)
    own = engine_mesh(mesh, 0)
    room = capacity(config, config.data.sequence_length + 1, mesh.shape["data"])
    shape = dataclasses.replace(config.model_config, param_dtype=config.model_config.dtype)
    params = jax.eval_shape(prepare(shape, config.adapter), state.params, Frozen(base=kept.base))
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=along_tensor(x, own)), params)
    with jax.set_mesh(own):
        params = jax.eval_shape(model.repeat_kv_heads, params)
        assert room.cache_tokens and room.max_length
        cache = jax.eval_shape(lambda: model.make_cache(shape, room.cache_tokens // room.page_size, room.page_size))
        ints = lambda *shape: jax.ShapeDtypeStruct(shape, np.int32)
        least, width = row_multiple(shape.dtype), -(-room.max_length // room.page_size)
        count = -(-room.max_rows // least) * least
        rows = Rows(lengths=ints(count), table=ints(count, width), counts=ints(count), width=1)
        shape = dataclasses.replace(shape, num_kv_heads=kv_heads(shape.num_kv_heads))
        prompts = ints(count) if shape.rope.by_length else None
        inputs = Inputs(rows=rows, places=ints(count), prompts=prompts)
        last = jax.ShapeDtypeStruct((count + 1,), jnp.int32)
        return compute.lower(shape, params, cache, last, inputs), size((params, cache))
