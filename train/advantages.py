"""How much better completions were than expected: from their rewards, on the host, to a number for each token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

# Added to a standard deviation, as TRL's GRPOTrainer and PPOTrainer do.
_LEAST_DEVIATION = 1e-4
_LEAST_VARIANCE = 1e-8


def group(rewards: Float[np.ndarray, " n"], groups: Int[np.ndarray, " n"], *, scale: bool) -> Float[np.ndarray, " n"]:
    """(r - mean) / (std + 1e-4) over the completions of each prompt (arXiv 2402.03300, section 4.1.2).

    Args:
      rewards: of completions; NaN where nothing judged it.
      groups: the prompt of each.
      scale: whether there is a division.

    The paper does not say which standard deviation; this is that of a sample (n - 1), as in TRL. What nothing judged is
    left out of both and has advantage 0, and so has all of a group whose rewards are equal.
    """
    found = np.zeros(len(rewards))
    for each in np.unique(groups):
        here = (groups == each) & ~np.isnan(rewards)
        own = rewards[here].astype(np.float64)
        # Asked first: the mean of equal numbers may be another by rounding.
        if own.size and np.ptp(own) > 0:
            found[here] = (own - own.mean()) / (own.std(ddof=1) + _LEAST_DEVIATION if scale else 1)
    return found


def shares(
    lengths: Int[np.ndarray, " n"], average: Literal["completion", "token", "length"], max_new_tokens: int
) -> Float[np.ndarray, " n"]:
    """What a token of each completion counts beside the others' in a step, over 1 / (length of the completion).

    Args:
      lengths: trained tokens of the completions of the step, all of them.
      average: of the loss, as in GRPO.
      max_new_tokens: of a completion.

    The step divides by the completions that have tokens. With "token" each token of the step then counts the same, and
    with "length" each counts 1 / (completions * max_new_tokens).
    """
    if average == "completion":
        return np.ones(len(lengths))
    if average == "length":
        return lengths / max_new_tokens
    return lengths * np.count_nonzero(lengths) / max(lengths.sum(), 1)


def token_rewards(reward: float, log_ratio: Float[np.ndarray, " t"], kl: float) -> Float[np.ndarray, " t"]:
    """Those of the tokens of a completion: its own at the last, less kl * log(p / q) at each (arXiv 1909.08593).

    Args:
      reward: of the completion.
      log_ratio: of its tokens, how much likelier they are to the policy than to the reference, in nats.
      kl: weight of that.
    """
    found = -kl * log_ratio.astype(np.float64)
    found[-1] += reward
    return found


def gae(
    rewards: Float[np.ndarray, " t"], values: Float[np.ndarray, " t"], *, gamma: float, trace: float
) -> tuple[Float[np.ndarray, " t"], Float[np.ndarray, " t"]]:
    """Advantages and returns of the tokens of a completion (arXiv 1506.02438, equation 16), with nothing after it.

    A(t) is the sum over k of (gamma * trace)^k d(t + k), d(t) = r(t) + gamma V(t + 1) - V(t); its return is A + V.

    Args:
      rewards: of the tokens.
      values: what was expected before each.
      gamma: what a reward counts for one token earlier.
      trace: lambda.
    """
    delta = rewards.astype(np.float64) + gamma * np.append(values[1:], 0) - values
    found, ahead = np.empty_like(delta), 0.0
    for t in reversed(range(len(delta))):
        found[t] = ahead = delta[t] + gamma * trace * ahead
    return found, found + values


def whiten(advantages: Sequence[Float[np.ndarray, " _"]]) -> list[Float[np.ndarray, " _"]]:
    """(x - mean) / sqrt(variance + 1e-8) over all tokens of all completions, as TRL's `masked_whiten`.

    The variance is that of a sample (n - 1); a single token becomes 0.
    """
    tokens = np.concatenate(advantages)
    variance = tokens.var(ddof=1) if tokens.size > 1 else 0.0
    return [(x - tokens.mean()) / np.sqrt(variance + _LEAST_VARIANCE) for x in advantages]


@dataclass(frozen=True)
class RunningMoments:
    """Mean and variance of all rewards there were, batch after batch (Chan, Golub and LeVeque, 1979).

        moments = moments.including(rewards)
        rewards = moments.normalised(rewards)

    JSON has its three numbers exactly: RunningMoments(**json.loads(json.dumps(dataclasses.asdict(moments)))).

    Attributes:
      count: of the rewards.
      mean: of them.
      squares: the sum of their squared distances from it.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def including(self, rewards: Float[np.ndarray, " n"]) -> RunningMoments:
        """Those of what was and these; NaN does not count."""
        own = rewards[~np.isnan(rewards)].astype(np.float64)
        if not own.size:
            return self
        count, away = self.count + own.size, float(own.mean()) - self.mean
        between = away**2 * self.count * own.size / count
        squares = self.squares + float(np.square(own - own.mean()).sum()) + between
        return RunningMoments(count, self.mean + away * own.size / count, squares)

    def normalised(self, rewards: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """(r - mean) / sqrt(variance + 1e-8) of rewards that are among what it is of; the variance of a sample."""
        variance = self.squares / max(self.count - 1, 1)
        return (rewards - self.mean) / math.sqrt(variance + _LEAST_VARIANCE)
