"""Logits to tokens: bias, penalties, temperature, top-k, top-p, min-p, in the order of vLLM and Hugging Face."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from qwen_jax.errors import ConfigError
from qwen_jax.ops.draw import draw, least_of_top_k, least_of_top_p, likeliest, temper

# Biases of a row are padded to powers of two from here, so that few shapes are ever compiled.
FEWEST_BIASES = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the tokens of one completion are chosen.

    Names and meaning are those of HF `generate()`, those of the fields it lacks OpenAI's. The order is `generate()`'s
    and that of vLLM (v1/sample/sampler.py): bias, repetition, frequency, presence, temperature, top-k, top-p; min-p
    comes last as in `generate()`, where vLLM has it before top-k.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token, and the stages below it do not matter.
      top_k: keeps the k most likely tokens, ties with the last included; 0 keeps all.
      top_p: keeps the fewest most likely tokens whose probabilities reach top_p, ties with the last included.
      min_p: keeps tokens at least min_p times as likely as the most likely one.
      repetition_penalty: divides the positive and multiplies the negative logits of tokens seen before, in the
        prompt or the completion (Keskar et al. 2019, CTRL, section 4.1).
      presence_penalty: taken from the logits of tokens that the completion has.
      frequency_penalty: taken from the logits of tokens once for each time that the completion has them.
      logit_bias: pairs of a token's id and what is added to its logit.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

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
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise ConfigError(f"{name}={getattr(self, name)} must be between -2 and 2; 0 is no penalty")
        for token, bias in self.logit_bias:
            if token < 0 or not -100 <= bias <= 100:
                raise ConfigError(f"logit_bias={token}: {bias} must be a token's id and a number from -100 to 100")

    @property
    def needs_seen(self) -> bool:
        """Whether what is chosen depends on the tokens seen."""
        return self.repetition_penalty != 1 or bool(self.presence_penalty or self.frequency_penalty)


@typing.no_type_check  # at run time: where a program is only lowered, JAX makes stages of descriptions of arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Stages:
    """The numbers of `Sampling` for each row of a batch, [B] each; of `logit_bias` ids and values, [B, K] each.

    A stage that no row asks for is None. That is part of the type jit sees, so the stage is not compiled, while
    new numbers for the same stages compile nothing.
    """

    temperature: Float[Array, " B"] | None = None
    top_k: Float[Array, " B"] | None = None
    top_p: Float[Array, " B"] | None = None
    min_p: Float[Array, " B"] | None = None
    repetition_penalty: Float[Array, " B"] | None = None
    presence_penalty: Float[Array, " B"] | None = None
    frequency_penalty: Float[Array, " B"] | None = None
    logit_bias: tuple[Int[Array, "B K"], Float[Array, "B K"]] | None = None

    @classmethod
    def of(cls, rows: Sequence[Sampling]) -> Stages:
        """The stages that at least one of `rows` asks for."""
        greedy = np.array([row.temperature == 0 for row in rows])
        unused = {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0}
        unused |= {"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}
        stages = {}
        for name, none in unused.items():
            values = np.array([getattr(row, name) for row in rows], np.float32)
            if name in ("top_k", "top_p", "min_p"):
                values[greedy] = none
            stages[name] = None if (values == none).all() else jnp.asarray(values)
        return cls(**stages, logit_bias=_pad_biases([row.logit_bias for row in rows]))

    @property
    def needs_seen(self) -> bool:
        """Whether any stage is for tokens seen."""
        return any(x is not None for x in (self.repetition_penalty, self.presence_penalty, self.frequency_penalty))


@typing.no_type_check  # as above
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """The tokens that each row of a batch has had.

    Attributes:
      prompt: whether its prompt has a token.
      generated: how often its completion has a token.
    """

    prompt: Bool[Array, "B V"]
    generated: Int[Array, "B V"]

    def add(self, tokens: Int[Array, " B"]) -> Seen:
        """With one more token generated in each row."""
        count = jax.vmap(lambda row, token: row.at[token].add(1))
        return dataclasses.replace(self, generated=count(self.generated, tokens))


def sample(
    logits: Float[Array, "B V"],
    keys: Key[Array, " B"],
    stages: Stages,
    *,
    num_tokens: int,
    seen: Seen | None = None,
    allowed: UInt[Array, "B W"] | None = None,
) -> Int[Array, " B"]:
    """One token per row, below `num_tokens`: later rows of the table are padding.

    -1 where no token is allowed, or the logit of one that is allowed is NaN or inf. Rows have no effect on others.

    Args:
      logits: float32.
      keys: one per row, so that what a row draws does not depend on the rows beside it.
      stages: what to do; greedy rows do not use their key.
      num_tokens: tokens the tokenizer has.
      seen: what the penalties are for; needed when the stage of one is on.
      allowed: uint32 words, W = ceil(num_tokens / 32): token t may be chosen where bit t % 32 of word t // 32 is set.
    """
    logits = jnp.where(_choosable(logits.shape[1], num_tokens, allowed), logits, -jnp.inf)
    if stages.logit_bias is not None:
        logits = add_bias(logits, *stages.logit_bias)
    if stages.needs_seen:
        assert seen is not None, "the penalties are for tokens seen"
        logits = penalize(logits, seen, stages)
    tokens = best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if stages.temperature is not None:
        tokens = jnp.where(stages.temperature > 0, draw(masses(logits, stages), keys), best)
    return jnp.where(jnp.isfinite(logits.max(axis=-1)), tokens, -1)  # a maximum is NaN wherever there is one


def logprobs(
    logits: Float[Array, "B V"], tokens: Int[Array, " B"], *, num_tokens: int, top: int
) -> tuple[Float[Array, " B"], Int[Array, "B top"], Float[Array, "B top"]]:
    """Natural log-probabilities under softmax(logits): those of `tokens`, and ids and those of the `top` likeliest.

    Tokens from `num_tokens` on, padding, have none of the probability.
    """
    logits = jnp.where(_choosable(logits.shape[1], num_tokens), logits, -jnp.inf)
    total = jax.nn.logsumexp(logits, axis=-1)
    own = jax.vmap(lambda row, token: row[token])(logits, tokens)
    values, ids = jax.lax.top_k(logits, top)
    return own - total, ids, values - total[:, None]


def add_bias(logits: Float[Array, "B V"], ids: Int[Array, "B K"], values: Float[Array, "B K"]) -> Float[Array, "B V"]:
    """Logits with `values` added to those of `ids`."""
    return jax.vmap(lambda row, ids, values: row.at[ids].add(values))(logits, ids, values)


def penalize(logits: Float[Array, "B V"], seen: Seen, stages: Stages) -> Float[Array, "B V"]:
    """Logits with those of tokens seen made smaller, or for penalties against their sense larger.

    Repetition divides positive ones and multiplies negative ones; frequency and presence take away.
    """
    if stages.repetition_penalty is not None:
        penalty = stages.repetition_penalty[:, None]
        smaller = jnp.where(logits < 0, logits * penalty, logits / penalty)
        logits = jnp.where(seen.prompt | (seen.generated > 0), smaller, logits)
    if stages.frequency_penalty is not None:
        logits -= stages.frequency_penalty[:, None] * seen.generated.astype(logits.dtype)
    if stages.presence_penalty is not None:
        logits -= jnp.where(seen.generated > 0, stages.presence_penalty[:, None], 0.0)
    return logits


def masses(logits: Float[Array, "B V"], stages: Stages) -> Float[Array, "B V"]:
    """Numbers in proportion to the probabilities after temperature, top-k, top-p and min-p."""
    assert stages.temperature is not None, "greedy rows draw nothing"
    logits = temper(logits, stages.temperature)
    least = jnp.full_like(stages.temperature, -jnp.inf)
    if stages.top_k is not None or stages.top_p is not None:
        candidates = likeliest(logits)
        if stages.top_k is not None:
            least = least_of_top_k(logits, candidates, stages.top_k)
        if stages.top_p is not None:
            least = least_of_top_p(logits, candidates, stages.top_p, least)
    if stages.min_p is not None:
        least = jnp.maximum(least, jnp.log(stages.min_p))
    return jnp.where(logits >= least[:, None], jnp.exp(logits), 0.0)


def _choosable(size: int, num_tokens: int, allowed: UInt[Array, "B W"] | None = None) -> Bool[Array, "..."]:
    """Which of `size` ids are those of tokens that may be chosen: [size], or [B, size] with `allowed`."""
    ids = jnp.arange(size, dtype=jnp.uint32)
    if allowed is None:
        return ids < num_tokens
    return (ids < num_tokens) & ((allowed[:, ids // 32] >> ids % 32) & 1 == 1)


def _pad_biases(
    rows: Sequence[Sequence[tuple[int, float]]],
) -> tuple[Int[Array, "B K"], Float[Array, "B K"]] | None:
    """Ids and values of the pairs in each row, padded with a bias of 0; None if there are none."""
    most = max(map(len, rows))
    if most == 0:
        return None
    shape = len(rows), max(FEWEST_BIASES, 1 << (most - 1).bit_length())
    ids, values = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    for row, pairs in enumerate(rows):
        if pairs:
            ids[row, : len(pairs)], values[row, : len(pairs)] = zip(*pairs, strict=True)
    return jnp.asarray(ids), jnp.asarray(values)
