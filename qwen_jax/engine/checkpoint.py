"""A model, ready to decode."""

from __future__ import annotations

import dataclasses

import jax
from jax.sharding import Mesh

from qwen_jax.config import DType
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.packing import Capacity
from qwen_jax.errors import ModelError
from qwen_jax.ops.vertical_slash import VerticalSlash
from qwen_jax.text import Tokenizer
from qwen_jax.weights.load import load_params
from qwen_jax.weights.source import NativeCheckpoint, PublishedFolder


def load(
    model: PublishedFolder | NativeCheckpoint,
    tokenizer: Tokenizer,
    *,
    mesh: Mesh,
    capacity: Capacity,
    dtype: DType | None = None,
    sparse: VerticalSlash | None = None,
) -> Engine:
    """The engine of a model.

    Args:
      model: from `weights.source.open_model`.
      tokenizer: the model's own, `model.tokenizer()`, which prompts are encoded with.
      mesh: the devices to run on.
      capacity: how much the engine does at a time.
      dtype: type of parameters and computation; None for the one the model was trained to compute in.
      sparse: how long prompts are taken in; None for full attention.

    Raises FileError or ModelError.
    """
    if model.config.score:
        raise ModelError(f"{model.path} is a reward or classification model: it gives scores, not text")
    try:
        tokenizer.check_fits(model.config.vocab_size)
    except ModelError as error:
        raise ModelError(f"{model.path}: {error}") from error
    dtype = dtype or model.config.dtype
    with jax.set_mesh(mesh):
        # Once, here: a step that cast its weights or cut them from a stack would spend most of its time on that.
        params = load_params(model, dtype=dtype, stacked=False)
    config = dataclasses.replace(model.config, dtype=dtype, param_dtype=dtype)
    return Engine(config, params, num_tokens=tokenizer.num_tokens, mesh=mesh, capacity=capacity, sparse=sparse)
