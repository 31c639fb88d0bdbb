"""What a run keeps as it is beside what it trains: an adapter's base, DPO's reference, what online merging keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from qwen_jax import model
from qwen_jax.errors import ConfigError, ModelError
from qwen_jax.model import Params
from qwen_jax.weights.load import load_params
from qwen_jax.weights.source import Model, open_model
from train import adapter
from train.adapter import Frozen
from train.alignment import DPO, OnlineMerging
from train.config import Pretrained, TrainConfig
from train.reinforcement import Online


def check_weights(config: TrainConfig) -> None:
    """Raises ConfigError for a run that wants weights and names a shape alone, which can only be planned."""
    if isinstance(config.model, Pretrained):
        return
    kind = type(config.objective).__name__
    wants = {
        "an adapter is trained beside the weights of a model": config.adapter is not None,
        "merging is of a model with weights": config.merging is not None,
        f"objective {kind} compares with the model that the run begins with": config.compares
        or isinstance(config.objective, DPO),
        f"objective {kind} goes on from a model that can already answer": isinstance(config.objective, Online),
    }
    for reason in (reason for reason, is_so in wants.items() if is_so):
        raise ConfigError(f"{reason}: set model = @Pretrained and model.path")


def is_needed(config: TrainConfig) -> bool:
    """Whether a run keeps anything."""
    return bool(config.adapter or config.merging or config.compares)


def load(config: TrainConfig, source: Model, *, warn: Callable[[str], None], unroll: bool) -> Frozen:
    """What the run keeps, on the current mesh, layers as it trains them; an adapter's base with all of its tables.

    Args:
      config: the run.
      source: the model that it begins with.
      warn: takes a line about what was survived in reading another.
      unroll: whether layers are one tree each.

    Raises ModelError for models that do not go together.
    """
    own = adapter.load_frozen(config, source, unroll=unroll) if config.adapter or config.compares else None
    learned = _learned(config.merging, source, warn=warn, unroll=unroll) if config.merging else None
    return Frozen(base=own, learned=learned) if config.adapter else Frozen(reference=own, learned=learned)


def load_reference(config: TrainConfig, *, warn: Callable[[str], None], unroll: bool) -> Params:
    """What DPO compares with, as `load` has it, for a run that does not keep it."""
    assert isinstance(config.model, Pretrained)
    with open_model(config.model.path, warn=warn) as source:
        return adapter.load_frozen(config, source, unroll=unroll)


def without_trained(config: TrainConfig, frozen: Frozen) -> Frozen:
    """What of it the steps need: tables that are trained are of the reference what they were, and else of no use."""
    if config.adapter is None or frozen.base is None or config.compares:
        return frozen
    return frozen._replace(base=adapter.without_tables(frozen.base, config.adapter))


def abstract(config: TrainConfig) -> Frozen:
    """Shapes, dtypes and shardings of that, on the current mesh, layers stacked."""
    params = model.abstract(config.model_config)
    own = jax.tree.map(lambda x: x.update(dtype=jnp.dtype(config.model_config.dtype)), params)
    found = Frozen(
        base=own if config.adapter else None,
        reference=own if config.compares and not config.adapter else None,
        learned=params if config.merging else None,
    )
    return without_trained(config, found)


def _learned(merging: OnlineMerging, source: Model, *, warn: Callable[[str], None], unroll: bool) -> Params:
    """What the model has learned since its base, in float32."""
    with open_model(merging.base, warn=warn) as base:
        loose = dict(dtype="float32", param_dtype="float32", max_position=1)
        one, other = (dataclasses.replace(each.config, **loose) for each in (source, base))
        if one != other:
            raise ModelError(f"merging.base: {base.path} is of another shape than {source.path}, and not what it was")
        params, before = (load_params(each, dtype="float32", stacked=not unroll) for each in (source, base))
    return jax.jit(lambda a, b: jax.tree.map(jnp.subtract, a, b), donate_argnums=0)(params, before)
