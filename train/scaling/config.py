"""What a sweep is: the schema of the .gin files of `python -m train.scaling`. Imports nothing heavy."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from qwen_jax.errors import ConfigError

LEAST = 3  # of learning rates and of batch sizes: fewer have no middle


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model of the sweep: what differs from that of the run. What is None is as there."""

    width: int | None = None
    num_layers: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_width: int | None = None


@dataclass(frozen=True, kw_only=True)
class Target:
    """The run that the laws are for.

    Attributes:
      run: its config, of which learning rate, warm-up, batch size and steps are replaced.
      tokens: it is to be trained on.
      changes: as in Scaling.
    """

    run: str
    tokens: int
    changes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"tokens={self.tokens} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """A sweep over learning rates and batch sizes, of models of several sizes on several numbers of tokens.

    Attributes:
      output: the folder of the runs, the laws and the picture.
      run: the config of an ordinary run: all that the runs have in common.
      changes: to that config, as `--set` has them, e.g. ("data.sequence_length = 128",).
      models: the sizes.
      tokens: how many each size is trained on.
      batch_sizes: rows of a step.
      peak_lrs: of the schedule.
      warmup: fraction of the steps with a rising learning rate.
      target: the run to recommend values for; None for the laws alone.
    """

    output: str
    run: str
    changes: tuple[str, ...] = ()
    models: tuple[Shape, ...] = ()
    tokens: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    peak_lrs: tuple[float, ...]
    warmup: float = 0.1
    target: Target | None = None

    def __post_init__(self) -> None:
        if not self.output:
            raise ConfigError("output is empty; name the folder that everything is written to")
        for name, least in (("tokens", 2), ("batch_sizes", LEAST), ("peak_lrs", LEAST)):
            _check_rising(name, getattr(self, name), least)
        if len(self.models) < 2:
            raise ConfigError(f"models are {len(self.models)}; a law wants at least 2 sizes: models.1, models.2")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warmup={self.warmup} must be at least 0 and below 1")


def _check_rising(name: str, values: Sequence[float], least: int) -> None:
    if len(values) < least:
        raise ConfigError(f"{name}={values} must be at least {least}")
    if not values[0] > 0 or any(high <= low for low, high in itertools.pairwise(values)):
        raise ConfigError(f"{name}={values} must be above 0 and rise")
