"""What is judged, and what is said of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float64


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A completion to judge.

    Attributes:
      prompt: as in its row: a text, or messages.
      completion: its text.
      columns: the whole row of the prompt.
    """

    prompt: str | Sequence[Mapping[str, Any]]
    completion: str
    columns: Mapping[str, Any]


class Verdicts(NamedTuple):
    """What one source of rewards says of some samples.

    Attributes:
      values: NaN where there is no verdict.
      failures: how many of those there are, by reason.
    """

    values: Float64[np.ndarray, "n"]
    failures: Counter[str]


class Source(Protocol):
    """One of the rewards of a run, ready to judge."""

    def check(self, columns: Mapping[str, Any]) -> None:
        """Raises DataError if a row of prompts lacks what is compared with."""

    def __call__(self, samples: Sequence[Sample]) -> Verdicts: ...

    def close(self) -> None: ...
