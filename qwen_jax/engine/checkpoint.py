"""A model and its tokenizer from a checkpoint, ready to decode."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qwen_jax.config import DType, ModelConfig
from qwen_jax.engine.decode import Engine
from qwen_jax.errors import ModelError
from qwen_jax.model import abstract, unstack_layers
from qwen_jax.text import Tokenizer
from qwen_jax.weights.checkpoint import open_checkpoint


def load(
    path: Path, *, mesh: Mesh, dtype: DType | None = None, warn: Callable[[str], None]
) -> tuple[Engine, Tokenizer]:
    """The engine and the tokenizer of a checkpoint.

    Args:
      path: a run folder, a checkpoints folder, or the folder of one step.
      mesh: the devices to run on.
      dtype: type of parameters and computation; None for the one the model was trained to compute in.
      warn: takes one line about each newer step that was passed over because it is broken.

    Raises FileError or ModelError.
    """
    checkpoint = open_checkpoint(path, warn=warn)
    config = ModelConfig.from_json(checkpoint.read("model.json").decode())
    tokenizer = Tokenizer.from_bytes(checkpoint.read("tokenizer.json"))
    if tokenizer.num_tokens > config.vocab_size:
        raise ModelError(
            f"{checkpoint.path}: its tokenizer has {tokenizer.num_tokens} tokens and its model a vocabulary of "
            f"{config.vocab_size}; they do not belong together"
        )
    with jax.set_mesh(mesh):
        stored = checkpoint.load("params", abstract(config))
        dtype = dtype or config.dtype
        # Once, here: a step that cast its weights or cut them from a stack would spend most of its time on that.
        params = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), unstack_layers(stored))
    config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
    return Engine(config, params, num_tokens=tokenizer.num_tokens, mesh=mesh), tokenizer
