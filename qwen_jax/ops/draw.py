"""Logits to a distribution cut off below, and a draw from it.

Top-k and top-p each keep the tokens from some logit up. That logit, and the token that a uniform number falls on,
are found without a sort of the vocabulary, which costs a CPU more than the rest of a decode step: among few
candidates or blocks where they suffice, else by bisection, some thirty masked sums.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

# The likeliest tokens of a row, which a CPU finds in the time of two masked sums. More are found more slowly, with
# fewer a nucleus more often goes beyond them.
CANDIDATES = 256

# Probabilities are added up in blocks of so many tokens: about the root of the vocabulary.
BLOCK = 512


def temper(logits: Float[Array, "B V"], temperature: Float[Array, " B"]) -> Float[Array, "B V"]:
    """Logits over temperature, less the largest of the row; a temperature of 0 counts as 1."""
    # Less the largest before the division: a tiny temperature then makes -inf of the others, never inf - inf.
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted / jnp.where(temperature > 0, temperature, 1.0)[:, None]


def likeliest(logits: Float[Array, "B V"]) -> Float[Array, "B C"]:
    """The largest logits of each row, in order; -inf where bisection is faster than to find them."""
    count = min(CANDIDATES, logits.shape[1])
    return jax.lax.platform_dependent(
        logits,
        cpu=lambda x: jax.lax.top_k(x, count)[0],
        default=lambda x: jnp.full_like(x[:, :count], -jnp.inf),
    )


def least_of_top_k(
    logits: Float[Array, "B V"], candidates: Float[Array, "B C"], k: Float[Array, " B"]
) -> Float[Array, " B"]:
    """The logit of the k-th likeliest token, for those from there up to be kept; -inf where k = 0, which keeps all."""
    return _edge(logits, candidates, lambda x: (x > -jnp.inf).astype(x.dtype), jnp.where(k > 0, k, jnp.inf))


def least_of_top_p(
    logits: Float[Array, "B V"], candidates: Float[Array, "B C"], p: Float[Array, " B"], least: Float[Array, " B"]
) -> Float[Array, " B"]:
    """The logit from which up the likeliest tokens first reach probability p, among those from `least` up."""

    def mass(x):
        return jnp.where(x >= least[:, None], jnp.exp(x), 0.0)

    target = jnp.where(p < 1, p * mass(logits).sum(axis=-1), jnp.inf)
    return jnp.maximum(least, _edge(logits, candidates, mass, target))


def draw(masses: Float[Array, "B V"], keys: Key[Array, " B"]) -> Int[Array, " B"]:
    """One token per row with a probability in proportion to its mass; one without mass is never drawn.

    Inverts the distribution function: one random number per row, where the Gumbel trick needs one per token.
    """
    # Two blocks at least: from [1, BLOCK] to [1, 1, BLOCK], JAX forgets how the batch was split.
    blocks = jnp.pad(masses, ((0, 0), (0, -masses.shape[1] % (2 * BLOCK)))).reshape(masses.shape[0], -1, BLOCK)
    sums = blocks.sum(axis=-1)
    target = jax.vmap(jax.random.uniform)(keys) * sums.sum(axis=-1)
    block, rest = _fall(sums, target)
    token, _ = _fall(jax.vmap(lambda row, i: row[i])(blocks, block), rest)
    return block * BLOCK + token


def _edge(
    logits: Float[Array, "B V"],
    candidates: Float[Array, "B C"],
    weigh: Callable[[Array], Array],
    target: Float[Array, " B"],
) -> Float[Array, " B"]:
    """The largest number such that the weights of the logits from there up add to `target`; -inf if there is none.

    Args:
      logits: at most 0.
      candidates: of `likeliest`.
      weigh: logits to weights, which are not negative, and 0 for -inf.
      target: above 0.
    """
    reached = jnp.cumsum(weigh(candidates), axis=-1) >= target[:, None]
    found = jnp.max(jnp.where(reached, candidates, -jnp.inf), axis=-1)

    def reaches(least):
        weights = jnp.where(logits >= _unranked(least)[:, None], weigh(logits), 0.0)
        return weights.sum(axis=-1) >= target

    known = reached.any(axis=-1) | jnp.isinf(target)
    low = _ranked(found)
    high = jnp.where(known, low, 0)  # the rank of the largest logit
    return _unranked(_largest(reaches, low, high))


def _ranked(x: Float[Array, " B"]) -> Int[Array, " B"]:
    """Integers in the order of float32 numbers; 0 for 0."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _unranked(ranks: Int[Array, " B"]) -> Float[Array, " B"]:
    """The numbers of which `_ranked` makes `ranks`."""
    return jax.lax.bitcast_convert_type(jnp.where(ranks < 0, ranks ^ 0x7FFFFFFF, ranks), jnp.float32)


def _fall(masses: Float[Array, "B N"], target: Float[Array, " B"]) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Where in each row the sum of masses goes beyond `target`, at one that is not 0; and what is left of `target`."""
    index = jnp.arange(masses.shape[1], dtype=jnp.int32)

    def mass_up_to(last):
        # A masked sum rounds the same way for every `last`, so it grows exactly at tokens that have a mass.
        return jnp.sum(jnp.where(index <= last[:, None], masses, 0.0), axis=-1)

    # Rounding may put the target above every partial sum: the last with a mass is the bound.
    final = jnp.max(jnp.where(masses > 0, index, 0), axis=-1)
    before = _largest(lambda last: mass_up_to(last) <= target, jnp.full_like(final, -1), final - 1)
    return before + 1, target - mass_up_to(before)


def _largest(
    holds: Callable[[Int[Array, " B"]], Bool[Array, " B"]], low: Int[Array, " B"], high: Int[Array, " B"]
) -> Int[Array, " B"]:
    """Per row the largest integer from low to high for which `holds`, which fails from some point on; else low."""

    def halve(bounds):
        low, high = bounds
        middle = (low | high) - ((low ^ high) >> 1)  # the mean, rounded up, without overflow
        good = holds(middle)
        return jnp.where(good, middle, low), jnp.where(good, high, middle - 1)

    return jax.lax.while_loop(lambda bounds: jnp.any(bounds[0] < bounds[1]), halve, (low, high))[0]
