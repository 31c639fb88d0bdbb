"""Logits to tokens: penalty, temperature, top-k, top-p, min-p, in the order of Hugging Face `generate()`.

No stage sorts the vocabulary, which costs a CPU more than the rest of a decode step. The k-th largest logit, the
edge of the nucleus and the token a uniform number falls on are each found by bisection: some thirty masked sums.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from qwen_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the tokens of one completion are chosen; the names, order and meaning are those of HF `generate()`.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token, and the stages below it do not matter.
      top_k: keeps the k most likely tokens, ties with the last included; 0 keeps all.
      top_p: keeps the fewest most likely tokens whose probabilities reach top_p, ties with the last included.
      min_p: keeps tokens at least min_p times as likely as the most likely one.
      repetition_penalty: divides the positive and multiplies the negative logits of tokens seen before, in the
        prompt or the completion (Keskar et al. 2019, CTRL, section 4.1).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature={self.temperature} must be a number from 0 up; 0 takes the likeliest token")
        if self.top_k < 0:
            raise ConfigError(f"top_k={self.top_k} must not be negative; 0 keeps every token")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must be above 0 and at most 1; 1 keeps every token")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p={self.min_p} must be between 0 and 1; 0 keeps every token")
        if not 0 < self.repetition_penalty < math.inf:
            raise ConfigError(f"repetition_penalty={self.repetition_penalty} must be above 0; 1 is no penalty")


@typing.no_type_check  # at run time: where a program is only lowered, JAX makes stages of descriptions of arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Stages:
    """The numbers of `Sampling` for each row of a batch, [B] each.

    A stage that no row asks for is None. That is part of the type jit sees, so the stage is not compiled, while
    new numbers for the same stages compile nothing.
    """

    temperature: Float[Array, " B"] | None = None
    top_k: Float[Array, " B"] | None = None
    top_p: Float[Array, " B"] | None = None
    min_p: Float[Array, " B"] | None = None
    repetition_penalty: Float[Array, " B"] | None = None

    @classmethod
    def of(cls, rows: Sequence[Sampling]) -> Stages:
        """The stages that at least one of `rows` asks for."""
        values = {f.name: np.array([getattr(row, f.name) for row in rows], np.float32) for f in dataclasses.fields(cls)}
        greedy = values["temperature"] == 0
        off = {"temperature": greedy, "repetition_penalty": values["repetition_penalty"] == 1}
        off |= {name: greedy | (values[name] == none) for name, none in (("top_k", 0), ("top_p", 1), ("min_p", 0))}
        return cls(**{name: None if off[name].all() else jnp.asarray(values[name]) for name in values})


def sample(
    logits: Float[Array, "B V"],
    keys: Key[Array, " B"],
    stages: Stages,
    *,
    num_tokens: int,
    seen: Bool[Array, "B V"] | None = None,
) -> Int[Array, " B"]:
    """One token per row, below `num_tokens`: later rows of the table are padding. -1 where a logit is NaN or inf.

    Args:
      logits: float32.
      keys: one per row, so that what a row draws does not depend on the rows beside it.
      stages: what to do; greedy rows do not use their key.
      num_tokens: tokens the tokenizer has.
      seen: tokens the repetition penalty is for; needed when that stage is on.
    """
    logits = jnp.where(jnp.arange(logits.shape[1]) < num_tokens, logits, -jnp.inf)
    if stages.repetition_penalty is not None:
        assert seen is not None, "the repetition penalty is for tokens seen"
        logits = penalize(logits, seen, stages.repetition_penalty)
    tokens = best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if stages.temperature is not None:
        warped = temper(logits, stages.temperature)
        if stages.top_k is not None:
            warped = keep_top_k(warped, stages.top_k)
        if stages.top_p is not None:
            warped = keep_top_p(warped, stages.top_p)
        if stages.min_p is not None:
            warped = keep_min_p(warped, stages.min_p)
        tokens = jnp.where(stages.temperature > 0, draw(warped, keys), best)
    return jnp.where(jnp.isfinite(logits.max(axis=-1)), tokens, -1)  # a maximum is NaN wherever there is one


def penalize(logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, " B"]) -> Float[Array, "B V"]:
    """Logits with those of `seen` tokens made smaller: positive ones divided by `penalty`, negative multiplied."""
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def temper(logits: Float[Array, "B V"], temperature: Float[Array, " B"]) -> Float[Array, "B V"]:
    """Logits over temperature, less the largest of the row; a temperature of 0 counts as 1."""
    # Less the largest before the division: a tiny temperature then makes -inf of the others, never inf - inf.
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted / jnp.where(temperature > 0, temperature, 1.0)[:, None]


def keep_top_k(logits: Float[Array, "B V"], k: Float[Array, " B"]) -> Float[Array, "B V"]:
    """Logits of the k most likely tokens, ties with the last included; -inf elsewhere. k = 0 keeps all."""
    return _keep(logits, jnp.ones_like(logits), jnp.where(k > 0, k, jnp.inf))


def keep_top_p(logits: Float[Array, "B V"], p: Float[Array, " B"]) -> Float[Array, "B V"]:
    """Logits of the fewest most likely tokens that together reach probability p, ties included; -inf elsewhere."""
    return _keep(logits, jax.nn.softmax(logits, axis=-1), jnp.where(p < 1, p, jnp.inf))


def keep_min_p(logits: Float[Array, "B V"], p: Float[Array, " B"]) -> Float[Array, "B V"]:
    """Logits of the tokens at least p times as likely as the most likely one; -inf elsewhere."""
    least = logits.max(axis=-1) + jnp.log(p)
    return jnp.where(logits >= least[:, None], logits, -jnp.inf)


def draw(logits: Float[Array, "B V"], keys: Key[Array, " B"]) -> Int[Array, " B"]:
    """One token per row with probability softmax(logits); a token at -inf is never drawn.

    Inverts the distribution function: one random number per row, where the Gumbel trick needs one per token.
    """
    masses = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    index = jnp.arange(logits.shape[1], dtype=jnp.int32)

    def mass_up_to(last):
        # A masked sum rounds the same way for every `last`, so it grows exactly at tokens that have a mass.
        return jnp.sum(jnp.where(index <= last[:, None], masses, 0.0), axis=-1)

    uniform = jax.vmap(jax.random.uniform)(keys)
    target = uniform * masses.sum(axis=-1)
    # Rounding may put the target above every partial sum: the last token with a mass is the bound.
    final = jnp.max(jnp.where(masses > 0, index, 0), axis=-1)
    return 1 + _largest(lambda last: mass_up_to(last) <= target, jnp.full_like(final, -1), final - 1)


def _keep(logits: Float[Array, "B V"], weights: Float[Array, "B V"], target: Float[Array, " B"]) -> Float[Array, "B V"]:
    """Logits of the top tokens whose weights first add up to `target`, ties included; -inf elsewhere."""
    bits = jax.lax.bitcast_convert_type(logits, jnp.int32)
    order = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # integers in the order of the floats

    def reaches(least):
        return jnp.sum(jnp.where(order >= least[:, None], weights, 0.0), axis=-1) >= target

    least = _largest(reaches, order.min(axis=-1), order.max(axis=-1))
    return jnp.where(order >= least[:, None], logits, -jnp.inf)


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
