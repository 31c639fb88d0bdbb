"""What a run of reinforcement learning is: what is sampled, judged and minimised. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qwen_jax.errors import ConfigError
from train.alignment import DPO
from train.rewards.config import RewardSource

ROLLOUT = "rollout"  # the name of the thread that samples


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """How an episode is sampled from the model being trained, by engines on the devices of the training.

    An episode is as many completions as its updates learn from: batch_size * updates / passes.

    Attributes:
      completions: of each prompt.
      max_new_tokens: of a completion; a row of training holds the prompt and all of them, of OnlineDPO twice.
      temperature: of the policy: what is sampled from, and what is trained.
      top_p, top_k: what is sampled from is cut to; what is trained is not.
      updates: optimiser steps that learn from an episode.
      passes: how often each completion is learned from.
      ahead: episodes that are sampled while those before are learned from, with the weights as they are then: with 0,
        an episode is from the newest weights. What the weights have moved on since is made up for by `importance_cap`.
      order: of the prompts: "random", or with "variance" those first whose rewards differed most when they were last
        asked, as Qwen2.5 has it (arXiv 2412.15115); what was never asked comes before all.
      importance_cap: how much likelier to the trainer than to the sampler a token counts, at most (truncated importance
        sampling).
      tensor: devices that share the weights of an engine, all of one host; None for as many as share its kv heads
        evenly. There are as many engines as that makes, and each samples a part of the episode.
      max_rows: completions that an engine makes together; None for all of its part, up to 256.
      cache_tokens: tokens that an engine's cache has room for; None for all rows at their longest.
    """

    completions: int = 8
    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    updates: int = 1
    passes: int = 1
    ahead: Literal[0, 1] = 0
    order: Literal["random", "variance"] = "random"
    importance_cap: float = 2.0
    tensor: int | None = None
    max_rows: int | None = None
    cache_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("completions", "max_new_tokens", "updates", "passes", "tensor", "max_rows", "cache_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")
        if not self.temperature > 0:
            raise ConfigError(
                f"temperature={self.temperature} must be above 0: the likeliest token alone teaches nothing"
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must be above 0 and at most 1")
        if self.top_k < 0:
            raise ConfigError(f"top_k={self.top_k} must be 0, for all tokens, or more")
        if self.updates % self.passes:
            raise ConfigError(f"updates={self.updates} must be a multiple of passes={self.passes}")
        if not self.importance_cap >= 1:
            raise ConfigError(f"importance_cap={self.importance_cap} must be at least 1")

    @property
    def reuses(self) -> bool:
        """Whether weights learn from what they did not sample."""
        return self.updates > 1 or self.ahead > 0


@dataclass(frozen=True, kw_only=True)
class Online:
    """What objectives on the model's own completions share.

    Attributes:
      rollout: how they are sampled.
      rewards: what judges them.
      shaping: what their rewards come to: their weighted sum, or with "qwen2.5-math" sigmoid(0.5 m) + (v - 1) of a
        reward model's m and a verifier's v, 1 or 0 (arXiv 2409.12122): what is right outranks all that is wrong.
    """

    rollout: Rollout = Rollout()
    rewards: tuple[RewardSource, ...] = ()
    shaping: Literal["sum", "qwen2.5-math"] = "sum"

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ConfigError("rewards=() judge nothing; name at least one: objective.rewards.1.source = @Verifier")
        kinds = sorted(type(reward.source).__name__ for reward in self.rewards)
        if self.shaping == "qwen2.5-math" and kinds != ["RewardModel", "Verifier"]:
            raise ConfigError(f"shaping='qwen2.5-math' is of a RewardModel and a Verifier, and rewards are {kinds}")
        if self.shaping == "qwen2.5-math" and any(reward.weight != 1 for reward in self.rewards):
            raise ConfigError("shaping='qwen2.5-math' has no weights; leave objective.rewards.*.weight out")
        for name in ("kl", "clip", "clip_high"):
            if (value := getattr(self, name, None)) is not None and not value >= 0:
                raise ConfigError(f"{name}={value} must not be negative")


@dataclass(frozen=True, kw_only=True)
class GRPO(Online):
    """Group-relative policy optimisation (arXiv 2402.03300): a completion is as good as it is beside the others.

    Its advantage is (reward - mean) / standard deviation over the completions of its prompt. What is minimised, for
    ratios r of the policy to what sampled: -min(r A, clip(r, 1 - clip, 1 + clip_high) A) + kl (q/p - log(q/p) - 1), q
    being the reference, the model that the run begins with. Without `kl` there is no reference in memory.

    Attributes:
      clip: how far below 1 the ratio counts. The Qwen reports do not say; 0.2 is that of PPO.
      clip_high: how far above 1; None for as far (DAPO, arXiv 2503.14476, has 0.28).
      kl: weight of the divergence from the reference. 1e-3 is that of Qwen2.5-Math.
      ratio: of each token, or with "completion" the geometric mean over all of its tokens (GSPO, arXiv 2507.18071).
      average: of the loss: over the tokens of each completion and then over completions; over all tokens (DAPO); or
        with "length" the sum over tokens divided by max_new_tokens, then over completions (Dr. GRPO, arXiv 2503.20783).
      scale: whether advantages are divided by the standard deviation; Dr. GRPO does not.
      resample: how often prompts whose completions all have the same reward are replaced by others (dynamic sampling of
        DAPO); they teach nothing. 0 for never.
    """

    clip: float = 0.2
    clip_high: float | None = None
    kl: float = 1e-3
    ratio: Literal["token", "completion"] = "token"
    average: Literal["completion", "token", "length"] = "completion"
    scale: bool = True
    resample: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rollout.completions < 2:
            raise ConfigError("rollout.completions=1 leaves nothing to compare; a group has at least 2")
        if self.resample < 0:
            raise ConfigError(f"resample={self.resample} must not be negative")


@dataclass(frozen=True, kw_only=True)
class Critic:
    """The value model of PPO: what reward is to be expected after each token.

    Attributes:
      model: a reward model that it begins with, named as in Pretrained; None for the model that the run begins with,
        with a fresh score.
      peak_lr: of its own optimiser, which is otherwise that of the run.
      clip: how far a value may move from what it was when sampled, before its loss counts that; 0 for any.
      warmup_steps: steps of the run in which the critic learns alone.
    """

    model: str | None = None
    peak_lr: float = 5e-6
    clip: float = 0.15
    warmup_steps: int = 50

    def __post_init__(self) -> None:
        if not self.peak_lr > 0:
            raise ConfigError(f"peak_lr={self.peak_lr} must be above 0")
        for name in ("clip", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative")


@dataclass(frozen=True, kw_only=True)
class PPO(Online):
    """Proximal policy optimisation (arXiv 1707.06347) with a critic; the defaults are those of the Qwen report.

    The reward of a completion is given at its last token, and kl times the log-ratio to the reference is taken off at
    each. Advantages are those of GAE (arXiv 1506.02438), normalised over an episode.

    Attributes:
      critic: the value model.
      clip: how far from 1 the ratio of policies counts. Not published; 0.2 is that of the paper.
      kl: weight of the log-ratio to the reference.
      gamma: what a reward counts for one token earlier. Not published.
      trace: lambda of GAE. Not published.
      normalise: rewards less their running mean, divided by their running standard deviation.
      text: weight of next-token prediction on the text parts of `data.source`, against what alignment unlearns; how
        many rows of it a step has is by their weights. Not published.
    """

    rollout: Rollout = Rollout(completions=2, top_p=0.9)
    critic: Critic = Critic()
    clip: float = 0.2
    kl: float = 0.04
    gamma: float = 1.0
    trace: float = 0.95
    normalise: bool = True
    text: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("gamma", "trace"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be between 0 and 1")
        if self.text < 0:
            raise ConfigError(f"text={self.text} must not be negative")


@dataclass(frozen=True, kw_only=True)
class OnlineDPO(Online, DPO):
    """DPO on the model's own completions: of a prompt's, that with the highest reward and that with the lowest."""

    def __post_init__(self) -> None:
        Online.__post_init__(self)
        DPO.__post_init__(self)
        if self.rollout.completions < 2:
            raise ConfigError("rollout.completions=1 leaves nothing to compare; a pair needs at least 2")
