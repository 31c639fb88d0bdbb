"""What is asked of the engine, and what comes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

from qwen_jax.errors import ConfigError
from qwen_jax.ops.sampling import Sampling

FinishReason = Literal["stop", "length", "error"]

MAX_LOGPROBS = 20


class Constraint(Protocol):
    """What a grammar is to the engine: which tokens may come next, as it goes along."""

    def mask(self) -> np.ndarray:
        """uint32 words [ceil(num_tokens / 32)]: token t may be next where bit t % 32 of word t // 32 is set."""
        ...

    def accept(self, token: int) -> None:
        """Takes the token that was chosen."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One completion to make.

    Attributes:
      prompt: token ids, at least one.
      max_new_tokens: tokens at most, at least one.
      sampling: how tokens are chosen.
      seed: of the random numbers, 0 to 2**32 - 1.
      row: tells it from other requests of the same seed, 0 to 2**32 - 1. What is drawn depends on the seed, the row and
        the position, and on nothing beside it.
      stop_ids: tokens that end it; the one that did is its last.
      logprobs: how many of the likeliest tokens are told of with each token, with the logarithms of their
        probabilities, at most 20; None for not even the token's own.
      tempered: these are at the temperature of `sampling`, not at 1; a temperature of 0 counts as 1.
      constraint: which tokens are allowed; None for all. It belongs to this request alone.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = Sampling()
    seed: int = 0
    row: int = 0
    stop_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    tempered: bool = False
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ConfigError("a prompt has no tokens; give at least one")
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        for name in ("seed", "row"):
            if not 0 <= getattr(self, name) < 2**32:
                raise ConfigError(f"{name}={getattr(self, name)} must be between 0 and 2**32 - 1")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise ConfigError(f"logprobs={self.logprobs} must be between 0 and {MAX_LOGPROBS}")


@dataclasses.dataclass(frozen=True)
class Token:
    """What a step made.

    Attributes:
      request: the number that `Engine.add` gave.
      id: the token.
      finish_reason: of a request's last token: "stop" if it is one of `stop_ids`, "length" if there may be no more,
        "error" if the logits were not finite, where `id` means nothing; None before.
      logprob: natural logarithm of its probability under the model: at temperature 1 unless `tempered`, before
        penalties, biases and constraints; None unless asked for.
      top: the likeliest tokens, likewise.
    """

    request: int
    id: int
    finish_reason: FinishReason | None
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()
