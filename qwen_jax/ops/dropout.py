"""What is random in training. A key comes with each use and nothing is remembered: the same step is always the same."""

from __future__ import annotations

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from qwen_jax import sharding


@typing.no_type_check  # at run time: a stack of layers has a stack of keys, and one of partition specs has none
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Dropout:
    """Numbers that are zero with probability `rate`, and else larger by as much: their mean stays as it is."""

    key: PRNGKeyArray
    rate: float = dataclasses.field(metadata={"static": True})

    def keep(self, shape: tuple[int, ...], split: jax.P | None = None) -> Bool[Array, "..."]:
        """Which numbers stay; the same however the array is split."""
        return jax.random.bernoulli(self.key, 1 - self.rate, shape, out_sharding=split)

    def scaled(self, x: Float[Array, "..."], keep: Bool[Array, "..."]) -> Float[Array, "..."]:
        """x where it stays, zero elsewhere."""
        return jnp.where(keep, x / (1 - self.rate), 0)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        return self.scaled(x, self.keep(x.shape, jax.typeof(x).sharding.spec))

    def fold(self, number: int | Int[Array, ""]) -> Dropout:
        """Other numbers, for the part `number` of something."""
        return dataclasses.replace(self, key=jax.random.fold_in(self.key, number))


def noisy(
    x: Float[Array, "B T D"], segments: Int[Array, "B T"] | None, *, alpha: float, key: PRNGKeyArray
) -> Float[Array, "B T D"]:
    """Embeddings with the noise of NEFTune (arXiv 2310.05914): alpha / sqrt(L D) times uniform numbers of -1 to 1.

    L is the number of a row's tokens without padding, as in the paper, whose rows are one conversation each.
    """
    spec = sharding.activation("btd", x.shape)
    noise = jax.random.uniform(key, x.shape, jnp.float32, -1, 1, out_sharding=spec)
    if segments is None:
        size = jnp.float32(x.shape[1] * x.shape[2])
    else:
        size = (jnp.sum(segments > 0, axis=1) * x.shape[2]).astype(jnp.float32)[:, None, None]
    return x + (alpha * noise * jax.lax.rsqrt(jnp.maximum(size, 1))).astype(x.dtype)
