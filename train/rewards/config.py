"""What judges completions: the schema of `objective.rewards`. Imports nothing heavy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from qwen_jax.errors import ConfigError
from qwen_jax.sandbox.process import Limits


@dataclass(frozen=True, kw_only=True)
class Verifier:
    """A rule: 1 if it is met, and 0 if not. What it compares with is a column of the prompts' rows.

    Attributes:
      name: "math" for the same final answer as in `column`, as a number or an expression; "tagged" for the same text
        between <answer> tags; "countdown" for an expression there that uses `meta.numbers` and equals `meta.target`;
        "code" for a program that passes the tests in `column`, run in the sandbox; "instructions" for the part of the
        programs in `column` that pass it, likewise.
      column: what is compared with.
      seconds: that a program may take in the sandbox; one that takes more does not pass.
      memory_mib: that it may use, likewise.
      allow_weak: judge where no sandbox can be had, with processes of less isolation.
    """

    name: Literal["math", "tagged", "countdown", "code", "instructions"]
    column: str = "answer"
    seconds: float = 5.0
    memory_mib: int = 1024
    allow_weak: bool = False

    def __post_init__(self) -> None:
        if not self.column:
            raise ConfigError('column="" names no column of the rows')
        if not 0 < self.seconds < math.inf or self.memory_mib < 1:
            raise ConfigError(f"seconds={self.seconds} and memory_mib={self.memory_mib} must be numbers above 0")

    @property
    def limits(self) -> Limits:
        """Of a program."""
        return Limits(wall_seconds=self.seconds, cpu_seconds=self.seconds, memory_bytes=self.memory_mib << 20)


@dataclass(frozen=True, kw_only=True)
class Function:
    """A function of a Python file: f(prompts, completions, **columns) -> list[float], as TRL has them.

    It runs in a process of its own, which is ended when it takes too long, and begun anew. Prompts and completions are
    texts, or messages where the prompts are; None is no verdict, and such a completion is left out. A call that fails
    is made again in halves, within four times its seconds, so that a completion costs no other its verdict.

    Attributes:
      path: the file, which may import what is installed, and what lies beside it.
      name: of the function.
      seconds: that one call may take.
      fraction: of the completions of an episode that may go without a verdict; with more, the run ends.
    """

    path: str
    name: str = "reward"
    seconds: float = 60.0
    fraction: float = 0.5

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError('path="" names no file; give one with a function `reward`')
        if not self.name.isidentifier():
            raise ConfigError(f'name="{self.name}" is no name of a function')
        if not 0 < self.seconds < math.inf:
            raise ConfigError(f"seconds={self.seconds} must be a number above 0")
        if not 0 <= self.fraction < 1:
            raise ConfigError(f"fraction={self.fraction} must be at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class RewardModel:
    """The score that a reward model gives a text, on the mesh of the training.

    Attributes:
      path: the model, with the tokenizer of the policy, named as in Pretrained.
      batch_size: texts that are scored together.
    """

    path: str
    batch_size: int = 16

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError('path="" names no model; give a reward model')
        if self.batch_size < 1:
            raise ConfigError(f"batch_size={self.batch_size} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class RewardSource:
    """One of the rewards.

    Attributes:
      source: what judges.
      weight: of its verdict in the sum.
    """

    source: Verifier | Function | RewardModel
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ConfigError(f"weight={self.weight} must be a number")
