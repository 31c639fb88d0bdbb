"""Which experts see a token, and how evenly tokens are spread over them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Load:
    """Sums over the tokens of each row of a batch, in float32; of a whole model they have a first axis of layers.

    Attributes:
      counts: how many of the tokens' choices fell on each expert; no gradient flows through them.
      probabilities: what the router gave each expert, chosen or not.
      squares: of the log of what the softmax divides by.
    """

    counts: Float[Array, "*L B E"]
    probabilities: Float[Array, "*L B E"]
    squares: Float[Array, "*L B"]


def route(
    logits: Float[Array, "B T E"], *, top_k: int, normalize: bool
) -> tuple[Float[Array, "B T k"], Int[Array, "B T k"]]:
    """The weights of the experts that each token is sent to, in the dtype of the logits, and which they are.

    The softmax is over all experts and in float32; with `normalize` the weights of a token sum to one.
    """
    weights, experts = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32)), top_k)
    if normalize:
        weights = weights / weights.sum(-1, keepdims=True)
    return weights.astype(logits.dtype), experts


def load(logits: Float[Array, "B T E"], experts: Int[Array, "B T k"], segments: Int[Array, "B T"] | None) -> Load:
    """The load of one layer. Tokens of segment 0 are padding and do not count."""
    logits = logits.astype(jnp.float32)
    real = jnp.ones_like(logits[..., :1]) if segments is None else (segments != 0).astype(jnp.float32)[..., None]
    chosen = (experts[..., None] == jnp.arange(logits.shape[-1], dtype=experts.dtype)).astype(jnp.float32).sum(2)
    squares = jax.nn.logsumexp(logits, axis=-1) ** 2
    return Load(
        counts=(chosen * real).sum(1),
        probabilities=(jax.nn.softmax(logits) * real).sum(1),
        squares=(squares * real[..., 0]).sum(1),
    )


def balance_loss(load: Load, top_k: int, *, by_row: bool) -> Float[Array, ""]:
    """E times the sum over experts of their share of choices times their mean probability: `top_k` if all are equal.

    Both are means over layers and tokens (Shazeer et al. 2017; Fedus et al. 2021), of the whole batch, whatever
    devices it is on, or with `by_row` of each row: then it is the mean over rows, weighted by their tokens.
    """
    over = (0,) if by_row else (0, 1)
    counts, probabilities = load.counts.sum(over), load.probabilities.sum(over)
    choices = counts.sum(-1)
    tokens = jnp.maximum(choices / top_k, 1)  # a row may be all padding
    losses = counts.shape[-1] * (counts * probabilities).sum(-1) / tokens**2
    return (losses * choices).sum() / jnp.maximum(choices.sum(), 1)


def z_loss(load: Load, top_k: int) -> Float[Array, ""]:
    """The mean over layers and tokens of the squared log-sum-exp of the router's logits (Zoph et al. 2022)."""
    return load.squares.sum() * top_k / jnp.maximum(load.counts.sum(), 1)


def max_load(load: Load) -> Float[Array, ""]:
    """The choices that fell on the busiest expert of any layer, over their mean: 1 if all are equal."""
    counts = load.counts.sum(1)
    return (counts.max(-1) / jnp.maximum(counts.mean(-1), 1 / counts.shape[-1])).max()
