"""What a run of alignment is: the objectives on preferences, and merging as it trains. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qwen_jax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Reward:
    """A reward model: the score of a text, at its last token, is to be higher for what is preferred.

    Of a prompt's completions every good one is compared with every bad one, and the loss of a prompt is the mean of
    -log sigmoid(good - bad - margin): of two completions that of Bradley and Terry (arXiv 2203.02155), of more that of
    Qwen2.5-Math (arXiv 2409.12122). A language model gets a head for the score in the place of its own.

    Attributes:
      hidden: whether a new head has two layers, as Qwen2.5-Math has it.
      margin: by which scores are to differ.
      centre: times the mean of (good + bad)^2, which keeps scores near 0 (arXiv 2312.09244).
    """

    hidden: bool = False
    margin: float = 0.0
    centre: float = 0.0

    def __post_init__(self) -> None:
        for name in ("margin", "centre"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative")


@dataclass(frozen=True, kw_only=True)
class ProcessReward:
    """A process-reward model: at the end of each step of a solution, whether it is good, as a choice of two.

    A language model gets a head of two layers, as Qwen2.5-Math-PRM (arXiv 2501.07301) has it.
    """


@dataclass(frozen=True, kw_only=True)
class DPO:
    """Direct preference optimisation (arXiv 2305.18290): the model is its own reward model.

    The reward of a completion is beta times how much likelier it is than to the reference, which is the model that the
    run begins with; beside an adapter that is the base, for free. Rewards are compared as by `Reward`.

    Attributes:
      beta: how dear it is to move away from the reference.
      loss: of the rewards, or with "ipo" the squared distance of their difference by token to 1 / (2 beta)
        (arXiv 2310.12036; by token as TRL has it, on its authors' word).
      label_smoothing: part of the preferences that are taken to be the wrong way round.
      reference: "live" computes what the reference says in every step; "precomputed" computes it once, for all rows,
        and keeps it in the run directory: 4 bytes per token on the disk, and no second model in memory.
    """

    beta: float = 0.1
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    label_smoothing: float = 0.0
    reference: Literal["live", "precomputed"] = "live"

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ConfigError(f"beta={self.beta} must be above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(f"label_smoothing={self.label_smoothing} must be at least 0 and below 0.5")
        if self.label_smoothing and self.loss == "ipo":
            raise ConfigError(f"label_smoothing={self.label_smoothing} is of loss='sigmoid'; leave one of them out")


@dataclass(frozen=True, kw_only=True)
class OnlineMerging:
    """The Online Merging Optimizer (arXiv 2405.17931), on top of `optimizer`.

    Attributes:
      base: the model that the one the run begins with was tuned from, named as in Pretrained. What it has learned since
        pulls back.
      method: "dare" draws what counts of a step, and of what was learned; "ties" takes the largest, and where their
        signs differ the larger alone.
      alpha: weight of what was learned; the steps have the rest. Each step adds it anew, so it is tiny.
      reserve: fraction of the numbers that count.
      every: steps between merges, of which the sum is merged.
    """

    base: str
    method: Literal["dare", "ties"] = "dare"
    alpha: float = 1e-7
    reserve: float = 0.01
    every: int = 1

    def __post_init__(self) -> None:
        if not self.base:
            raise ConfigError('base="" names no model; give the one that the model of the run was tuned from')
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha={self.alpha} must be between 0 and 1")
        if not 0 < self.reserve <= 1:
            raise ConfigError(f"reserve={self.reserve} must be above 0 and at most 1")
        if self.every < 1:
            raise ConfigError(f"every={self.every} must be at least 1")
