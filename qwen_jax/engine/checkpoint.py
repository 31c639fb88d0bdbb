"""A model, ready to decode."""

from __future__ import annotations

import dataclasses

import jax
from jax.sharding import Mesh

from qwen_jax.config import DType, ModelConfig
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.packing import Capacity
from qwen_jax.engine.speculative import DraftModel, PromptLookup
from qwen_jax.errors import ModelError
from qwen_jax.model import Params
from qwen_jax.ops.vertical_slash import VerticalSlash
from qwen_jax.text import Tokenizer
from qwen_jax.weights.load import load_params
from qwen_jax.weights.source import Model


def load(
    model: Model,
    tokenizer: Tokenizer,
    *,
    mesh: Mesh,
    capacity: Capacity,
    dtype: DType | None = None,
    sparse: VerticalSlash | None = None,
    speculate: PromptLookup | DraftModel | None = None,
) -> Engine:
    """The engine of a model.

    Args:
      model: from `weights.source.open_model`.
      tokenizer: the model's own, `model.tokenizer()`, which prompts are encoded with.
      mesh: the devices to run on.
      capacity: how much the engine does at a time.
      dtype: type of parameters and computation; None for the one the model was trained to compute in.
      sparse: how long prompts are taken in; None for full attention.
      speculate: how tokens are guessed beforehand; a draft model comes from `load_draft`.

    Raises FileError or ModelError.
    """
    config, params = _load(model, tokenizer, mesh, dtype)
    return Engine(
        config,
        params,
        num_tokens=tokenizer.num_tokens,
        mesh=mesh,
        capacity=capacity,
        sparse=sparse,
        speculate=speculate,
    )


def load_draft(
    model: Model,
    tokenizer: Tokenizer,
    *,
    mesh: Mesh,
    dtype: DType | None = None,
    num_guesses: int,
) -> DraftModel:
    """A model that guesses at the tokens of another, whose tokenizer is given; otherwise as `load`.

    Raises FileError or ModelError, also where its own tokenizer is another one.
    """
    if model.tokenizer().pieces != tokenizer.pieces:
        raise ModelError(
            f"{model.path} has another tokenizer than the model it is to guess for; take one of its family"
        )
    config, params = _load(model, tokenizer, mesh, dtype)
    return DraftModel(config=config, params=params, num_guesses=num_guesses)


def _load(model: Model, tokenizer: Tokenizer, mesh: Mesh, dtype: DType | None) -> tuple[ModelConfig, Params]:
    """The config and the parameters of a model that can decode."""
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
    return dataclasses.replace(model.config, dtype=dtype, param_dtype=dtype), params
