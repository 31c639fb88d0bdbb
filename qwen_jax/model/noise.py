"""What makes a forward pass random, in training alone."""

from __future__ import annotations

import dataclasses
import typing

import jax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from qwen_jax.ops.dropout import Dropout, noisy


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Noise:
    """Nothing of it is on unless it is asked for.

    Attributes:
      key: of all numbers of one forward pass.
      neftune_alpha: scale of the noise on embeddings (`ops.dropout.noisy`).
      embedding_dropout: part of the embeddings' numbers that is left out.
      attention_dropout: part of each query's attention weights that is left out.
    """

    key: PRNGKeyArray
    neftune_alpha: float = dataclasses.field(default=0.0, metadata={"static": True})
    embedding_dropout: float = dataclasses.field(default=0.0, metadata={"static": True})
    attention_dropout: float = dataclasses.field(default=0.0, metadata={"static": True})

    def on_embeddings(self, x: Float[Array, "B T D"], segments: Int[Array, "B T"] | None) -> Float[Array, "B T D"]:
        """Noise first, as in NEFTune's code, then dropout."""
        noise, dropout = jax.random.split(jax.random.fold_in(self.key, 0))
        if self.neftune_alpha:
            x = noisy(x, segments, alpha=self.neftune_alpha, key=noise)
        return Dropout(key=dropout, rate=self.embedding_dropout)(x) if self.embedding_dropout else x

    def of_attention(self, num_layers: int) -> Dropout | None:
        """Dropout with a key for each layer; None where there is none."""
        if not self.attention_dropout:
            return None
        return Dropout(key=jax.random.split(jax.random.fold_in(self.key, 1), num_layers), rate=self.attention_dropout)
