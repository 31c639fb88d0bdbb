"""A trace of a few steps, for TensorBoard's profile page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax

from train.config import Profile


class Profiler:
    """Traces `config.steps` steps of a run, the first `config.skip` of this start left out: those compile.

    Every host writes its own file under `directory`. A context: a run that ends early still ends its trace.
    """

    def __init__(self, directory: Path, config: Profile, *, start: int, warn: Callable[[str], None]) -> None:
        """`warn` takes a line where the run ended before anything was traced."""
        self._directory = directory
        self._warn = warn
        self._first = start + config.skip
        self._end = self._first + config.steps
        self._tracing = False
        self._wanted = config.steps > 0

    def before(self, step: int) -> None:
        """To be called before each step is launched."""
        if step == self._first < self._end:
            jax.profiler.start_trace(self._directory)
            self._tracing, self._wanted = True, False
        elif step == self._end:
            self._stop()

    def _stop(self) -> None:
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        if self._wanted:
            self._warn(f"nothing was traced: the run ended before step {self._first}; lower profile.skip")
