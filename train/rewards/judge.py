"""The rewards of completions: what all sources say, and what it comes to."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float64

from qwen_jax.text import Tokenizer
from qwen_jax.text.chat import Format
from qwen_jax.text.template import JinjaFormat
from train import hosts
from train.reinforcement import Online
from train.rewards.config import Function, RewardModel, Verifier
from train.rewards.function import FunctionReward
from train.rewards.model import ModelReward
from train.rewards.verdicts import Sample, Source, Verdicts
from train.rewards.verifiers import Rule

__all__ = ["Judge", "Judged", "Sample"]


class Judged(NamedTuple):
    """What samples are worth.

    Attributes:
      total: NaN where a source has no verdict: the sample is to be left out.
      parts: what each source says, before its weight, by name.
      failures: samples without a verdict, by source and reason.
    """

    total: Float64[np.ndarray, "n"]
    parts: dict[str, Float64[np.ndarray, "n"]]
    failures: dict[str, int]


class Judge(contextlib.AbstractContextManager):
    """The rewards of a run, ready to judge. Closing it ends the processes of its functions."""

    def __init__(
        self,
        online: Online,
        *,
        form: Format | JinjaFormat | None,
        tokenizer: Tokenizer,
        mesh: Mesh,
        warn: Callable[[str], None],
    ) -> None:
        """
        Args:
          online: what judges, and what it comes to.
          form: of the policy's chats, for reward models without one of their own.
          tokenizer: of the policy, which reward models must share.
          mesh: of the training.
          warn: takes one line about what could not be judged.

        Raises FileError, DataError, ModelError or SandboxError for a source that cannot be had.
        """
        self._online = online
        self._names = _names([_name(each.source) for each in online.rewards])
        with contextlib.ExitStack() as stack:
            self._sources: list[Source] = []
            for reward in online.rewards:
                match reward.source:
                    case Verifier() as config:
                        source = Rule(config)
                    case Function() as config:
                        source = FunctionReward(config, warn=warn)
                    case RewardModel() as config:
                        source = ModelReward(config, form=form, tokenizer=tokenizer, mesh=mesh, warn=warn)
                stack.callback(source.close)
                self._sources.append(source)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def check(self, columns: Mapping[str, Any]) -> None:
        """Raises DataError if a row of prompts lacks what completions are compared with."""
        for source in self._sources:
            source.check(columns)

    def __call__(self, samples: Sequence[Sample]) -> Judged:
        """Judges samples, several or all of an episode. DataError where too many have no verdict."""
        parts, failures = {}, Counter[str]()
        for name, source, reward in zip(self._names, self._sources, self._online.rewards, strict=True):
            # A reward model is on the devices of all hosts, which compute with it together.
            parts[name], failed = source(samples) if _is_model(reward.source) else _shared(source, samples)
            failures.update({f"{name}: {reason}": count for reason, count in failed.items()})
        return Judged(self._total(list(parts.values())), parts, dict(failures))

    def _total(self, parts: Sequence[Float64[np.ndarray, "n"]]) -> Float64[np.ndarray, "n"]:
        rewards = self._online.rewards
        if self._online.shaping == "qwen2.5-math":
            scores = next(part for part, reward in zip(parts, rewards, strict=True) if _is_model(reward.source))
            met = next(part for part, reward in zip(parts, rewards, strict=True) if not _is_model(reward.source))
            return _sigmoid(0.5 * scores) + (met - 1)
        return np.sum([reward.weight * part for reward, part in zip(rewards, parts, strict=True)], axis=0)


def _shared(source: Source, samples: Sequence[Sample]) -> Verdicts:
    """What a source says, of which each host asks for a share; a prompt's completions stay together."""
    own = hosts.share(len(samples))
    own = samples[_begin(samples, own.start) : _begin(samples, own.stop)]
    found = hosts.together(lambda: source(own) if own else Verdicts(np.zeros(0), Counter()))
    return Verdicts(np.concatenate([each.values for each in found]), sum((each.failures for each in found), Counter()))


def _begin(samples: Sequence[Sample], place: int) -> int:
    """Where the completions of a prompt begin that a place is among."""
    while 0 < place < len(samples) and samples[place].prompt == samples[place - 1].prompt:
        place -= 1
    return place


def _is_model(source: Verifier | Function | RewardModel) -> bool:
    return isinstance(source, RewardModel)


def _sigmoid(x: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    return 0.5 + 0.5 * np.tanh(0.5 * x)  # which does not overflow


def _name(source: Verifier | Function | RewardModel) -> str:
    return "model" if isinstance(source, RewardModel) else source.name


def _names(names: Sequence[str]) -> list[str]:
    """Names that are all different: those that come again are numbered."""
    return [f"{name}_{names[: i + 1].count(name)}" if names.count(name) > 1 else name for i, name in enumerate(names)]
