"""A trace of a few steps, for TensorBoard's profile page."""

from __future__ import annotations

from pathlib import Path

import jax

from train.config import Profile


class Profiler:
    """Traces `config.steps` steps of a run, the first `config.skip` of this start left out: those compile.

    Every host writes its own file under `directory`. A context: a run that ends early still ends its trace.
    """

    def __init__(self, directory: Path, config: Profile, *, start: int) -> None:
        self._directory = directory
        self._first = start + config.skip
        self._end = self._first + config.steps
        self._tracing = False

    def before(self, step: int) -> None:
        """To be called before each step is launched."""
        if step == self._first < self._end:
            jax.profiler.start_trace(self._directory)
            self._tracing = True
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
