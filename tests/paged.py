"""Rows in pages by hand: what the engine does, for tests that want every hidden state."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import model
from qwen_jax.ops.pages import Rows

SIZE = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Paged:
    """The pages of some rows, of which each has its own."""

    cache: Any
    table: Any
    prompts: Any


def paged(config, rows, slots, prompts=None):
    """Empty pages for `rows` rows of up to `slots` tokens, whose prompts have `prompts` tokens."""
    table = np.random.default_rng(0).permutation(rows * -(-slots // SIZE)).astype(np.int32).reshape(rows, -1)
    return Paged(model.make_cache(config, table.size, SIZE), table, prompts)


def forward(config, params, tokens, positions, rows, **how):
    """The hidden states [B, T, D] of tokens [B, T] at consecutive positions, and the rows with them."""
    batch, width = tokens.shape
    counts = np.full(batch, width, np.int32)
    new = Rows(lengths=positions[:, 0] + width, counts=counts, table=rows.table, width=width)
    prompts = None if rows.prompts is None else jnp.repeat(rows.prompts, width)
    whose = model.Batch(rows=(new,), prompts=prompts)
    hidden, cache = model.forward_cached(config, params, tokens.reshape(-1), whose, rows.cache, **how)
    return hidden.reshape(batch, width, -1), dataclasses.replace(rows, cache=cache)
