"""What is trained where it is not the whole model: an adapter beside parameters that stay as they are."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from qwen_jax import model
from qwen_jax.config import ModelConfig
from qwen_jax.errors import ModelError
from qwen_jax.model import Params
from qwen_jax.model.adapter import TABLES
from qwen_jax.ops.quantized import Quantized
from qwen_jax.weights.adapted import Adapter
from qwen_jax.weights.load import load_params
from qwen_jax.weights.source import Model
from train.config import LoRA, Pretrained, TrainConfig


class Frozen(NamedTuple):
    """What a step is given beside the state, and leaves as it is.

    Attributes:
      base: the parameters that an adapter is trained beside.
      reference: those that DPO compares with, where they are not the base.
      learned: what the model of online merging had learned from its own base.
    """

    base: Params | None = None
    reference: Params | None = None
    learned: Params | None = None


NOTHING = Frozen()


# Of the trained parameters, the frozen ones and a key: what the objective is a function of.
Join = Callable[[Params, Frozen, PRNGKeyArray | None], Params]


def join(adapter: LoRA | None) -> Join:
    """How the two are put together; without an adapter, all parameters are trained."""
    if adapter is None:
        return lambda params, frozen, key: params

    def attached(params: Params, frozen: Frozen, key: PRNGKeyArray | None) -> Params:
        assert frozen.base is not None, "an adapter has a base"
        key = None if key is None else jax.random.fold_in(key, 2)
        return model.attach(frozen.base, params, scale=adapter.scale, dropout=adapter.dropout, key=key)

    return attached


def load_frozen(config: TrainConfig, source: Model, *, unroll: bool) -> Params:
    """The parameters of the base, in the dtype that it computes in or quantised, on the current mesh.

    Raises ModelError where the head is quantised, which the loss takes in chunks, or a table that is to be trained.
    """
    params = load_params(source, dtype=config.model_config.dtype, stacked=not unroll)
    if not config.model_config.score and isinstance(model.head(params), Quantized):
        raise ModelError(f"{source.path} has a quantised head, and training wants it whole; take one without")
    trained = _tables_of(params, config.adapter) if config.adapter else []
    if any(isinstance(params[name]["w"], Quantized) for name in trained):
        raise ModelError(f"{source.path} has a quantised embedding, and train_embeddings wants it whole; leave one out")
    return params


def initial(config: ModelConfig, adapter: LoRA, frozen: Params, *, seed: int) -> Params:
    """What is trained before the first step, layers stacked: matrices that change nothing yet, and maybe tables."""
    make = lambda: model.init_adapter(config, adapter.paths(config), rank=adapter.rank, key=jax.random.key(seed))
    return {**jax.jit(make)(), **_tables(frozen, adapter)}


def abstract(config: ModelConfig, adapter: LoRA) -> tuple[Params, Params]:
    """Shapes, dtypes and shardings of what is trained and of what is not, on the current mesh, layers stacked."""
    stored = jax.tree.map(lambda x: x.update(dtype=jnp.dtype(config.dtype)), model.abstract(config))
    trained = jax.eval_shape(lambda stored: initial(config, adapter, stored, seed=0), stored)
    return trained, without_tables(stored, adapter)


def without_tables(frozen: Params, adapter: LoRA) -> Params:
    """The frozen parameters less those that are trained as they are."""
    return {name: node for name, node in frozen.items() if name not in _tables_of(frozen, adapter)}


def describe(config: TrainConfig, adapter: LoRA) -> bytes:
    """What a checkpoint says of its adapter."""
    assert isinstance(config.model, Pretrained)
    path = Path(os.path.expanduser(config.model.path))
    base = str(path.absolute()) if path.exists() else config.model.path
    return Adapter(base=base, scale=adapter.scale, dropout=adapter.dropout, arrays={}).to_json()


def _tables(frozen: Params, adapter: LoRA) -> Params:
    return {name: {"w": frozen[name]["w"].astype(jnp.float32)} for name in _tables_of(frozen, adapter)}


def _tables_of(frozen: Params, adapter: LoRA) -> list[str]:
    return [name for name in TABLES if name in frozen] if adapter.train_embeddings else []
