"""What the objectives on preferences share: sums over the texts of a row, and what comparing them comes to."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from qwen_jax import sharding
from train.data.config import MOST_COMPLETIONS
from train.data.rows import BAD, GOOD

Sums = dict[str, jax.Array]


class Texts(NamedTuple):
    """The texts of a row by their number, [S]; the first is padding.

    Attributes:
      value: their score.
      label: BAD or GOOD; 0 for none.
      group: the prompt that they are compared in; 0 for none.
    """

    value: Float[Array, " S"]
    label: Int[Array, " S"]
    group: Int[Array, " S"]

    @classmethod
    def of(
        cls,
        value: Float[Array, " S"],
        labels: Int[Array, " T"],
        segments: Int[Array, " T"],
        groups: Int[Array, " T"],
    ) -> Texts:
        """The texts of these columns, with their scores."""
        found = jax.ops.segment_max(groups, segments, num_segments=groups.shape[0] + 1)
        return cls(value, per_text(labels, segments), jnp.maximum(found, 0).at[0].set(0))


def by_row(of_row: Callable[..., Sums], *arrays: Float[Array, "B T"] | Int[Array, "B T"]) -> Sums:
    """The sums over rows of `of_row`, each on the device that has the row; columns may be in any order."""
    rows = P(sharding.BATCH, None)
    per_row = jax.shard_map(
        lambda *own: jax.vmap(of_row)(*own), in_specs=(rows,) * len(arrays), out_specs=P(sharding.BATCH)
    )
    found = per_row(*(jax.sharding.reshard(x, rows) for x in arrays))
    return {name: jnp.sum(x) for name, x in found.items()}


def per_text(x: jax.Array, segments: Int[Array, " T"]) -> jax.Array:
    """The sum of the columns of each text, [T + 1]: texts are numbered from 1."""
    return jax.ops.segment_sum(x, segments, num_segments=x.shape[0] + 1)


def means(x: Float[Array, " S"], texts: Texts) -> tuple[jax.Array, jax.Array]:
    """Means of a number of each text over the good ones of a group and over the bad ones, summed over groups."""
    counts, share = _counts(texts), _pairs(texts) > 0
    each = lambda label: jnp.where(share[texts.group] & (texts.label == label), x / counts[label][texts.group], 0)
    return jnp.sum(each(GOOD)), jnp.sum(each(BAD))


def compared(texts: Texts, loss: Callable[[jax.Array, jax.Array], jax.Array]) -> Sums:
    """Every good text of a group with every bad one; each group counts 1, whatever it holds.

    Args:
      texts: of a row.
      loss: of the values of good texts and of bad ones, elementwise.

    Returns:
      `loss`; `accuracy`, how often the good one has the higher value, and `margin`, by how much; the means of their
      values, `chosen` and `rejected`; and `weight`, the groups.
    """
    pairs, size = _pairs(texts), texts.value.shape[0]
    share = jnp.where(pairs > 0, 1 / jnp.maximum(pairs, 1), 0)[texts.group]

    def at(sums: Sums, distance: jax.Array) -> tuple[Sums, None]:
        """Each text with the one that comes so many after it."""
        other = jax.tree.map(lambda x: jnp.roll(x, -distance), texts)
        inside = jnp.arange(size) < size - distance
        here = inside & (texts.group == other.group) & (texts.label * other.label == BAD * GOOD)
        good, bad = (jnp.where(texts.label == label, texts.value, other.value) for label in (GOOD, BAD))
        found = {"loss": loss(good, bad), "accuracy": (good > bad).astype(jnp.float32), "margin": good - bad}
        return {name: sums[name] + jnp.sum(jnp.where(here, share * x, 0)) for name, x in found.items()}, None

    zeros = dict.fromkeys(("loss", "accuracy", "margin"), jnp.sum(texts.value) * 0)
    sums, _ = jax.lax.scan(at, zeros, jnp.arange(1, min(MOST_COMPLETIONS, size)))
    chosen, rejected = means(texts.value, texts)
    return sums | {"chosen": chosen, "rejected": rejected, "weight": jnp.sum((pairs > 0).astype(jnp.float32))}


def _counts(texts: Texts) -> dict[int, jax.Array]:
    """How many good and bad texts a group has, [S] each, at least 1."""
    return {label: jnp.maximum(_count(texts, label), 1) for label in (GOOD, BAD)}


def _pairs(texts: Texts) -> Float[Array, " S"]:
    """How many comparisons each group has."""
    return (_count(texts, GOOD) * _count(texts, BAD)).at[0].set(0)


def _count(texts: Texts, label: int) -> Float[Array, " S"]:
    return jax.ops.segment_sum((texts.label == label).astype(jnp.float32), texts.group, texts.value.shape[0])
