"""Saving that a full disk does not end at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from qwen_jax.errors import FileError
from qwen_jax.weights.checkpoint import Checkpoints
from train.record import Record
from train.step import State, stacked

FAILURES_IN_A_ROW = 3


class Saver:
    """Saves states in the background; used as a context manager, whose end waits for the last save.

    A save that fails is a warning and a row in the record, the third in a row a FileError. How a save went is known
    when the next one begins. The last one must succeed.

    Args:
      checkpoints: where to.
      record: of the run; put on the disk before each save.
      files: stored in every checkpoint.
      meta: likewise.
      warn: told of a save that failed.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        record: Record,
        *,
        files: Mapping[str, bytes],
        meta: Mapping[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        self._checkpoints, self._record, self._files, self._meta, self._warn = checkpoints, record, files, meta, warn
        self._running = False
        self._failures = 0
        self._last: FileError | None = None

    def save(self, step: int, state: State) -> None:
        """Begins to save the state after `step` steps, which may be donated once this returns."""
        if self._running and self._tried(step, self._checkpoints.wait):
            self._failures = 0
        self._record.sync()
        self._running = self._tried(step, lambda: self._begin(step, stacked(state)))

    def _begin(self, step: int, state: State) -> None:
        self._checkpoints.save(step, params=state.params, optimizer=state.optimizer, files=self._files, meta=self._meta)

    def _tried(self, step: int, action: Callable[[], None]) -> bool:
        try:
            action()
            self._last = None
        except FileError as error:
            self._last = error
            self._failures += 1
            self._record.checkpoint_failed(step, self._failures)
            if self._failures == FAILURES_IN_A_ROW:
                raise FileError(
                    f"{FAILURES_IN_A_ROW} saves in a row have failed, the last one with: {error}"
                ) from error
            self._warn(f"checkpoint failed at step {step}: {error}; training goes on")
        return self._last is None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self._checkpoints.wait()
        except FileError as failure:
            self._last = failure
            if error:
                self._warn(f"the last checkpoint failed too: {failure}")
        if self._last and not error:
            raise self._last
