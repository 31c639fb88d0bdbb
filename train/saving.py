"""Saving that a full disk does not end at once, and the checkpoint that is kept for its held-out loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from qwen_jax.errors import FileError
from qwen_jax.weights.checkpoint import Checkpoints
from train.record import METRICS, Record, rows
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

    def save(self, step: int, state: State, files: Mapping[str, bytes] = MappingProxyType({})) -> None:
        """Begins to save the state after `step` steps, which may be donated once this returns, with more files."""
        if self._running and self._tried(step, self._checkpoints.wait):
            self._failures = 0
        self._record.sync()
        self._running = self._tried(step, lambda: self._begin(step, stacked(state), files))

    def _begin(self, step: int, state: State, files: Mapping[str, bytes]) -> None:
        arrays = dict(params=state.params, optimizer=state.optimizer, critic=state.critic)
        self._checkpoints.save(step, **arrays, files={**self._files, **files}, meta=self._meta)

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


class Best:
    """The step of a stage with the lowest held-out loss, of those that have a checkpoint, which it keeps from deletion.

    Where answers are judged, what is as good as a low loss is a high reward.

    Args:
      checkpoints: of the run.
      directory: of the run, whose record knows the losses before a run was stopped.
      start: of the stage. Another stage reads other text, or longer rows, and its losses are others.
      done: steps done. What was measured there is measured again.
    """

    def __init__(self, checkpoints: Checkpoints, directory: Path, *, start: int, done: int) -> None:
        self._checkpoints, there, path = checkpoints, checkpoints.steps(), directory / METRICS
        losses: dict[int, float] = {}
        for row in rows(path) if path.exists() else ():
            if "held_out_loss" in row:
                losses[row["step"]] = row["held_out_loss"]
            elif "held_out_reward" in row:
                losses[row["step"]] = -row["held_out_reward"]
        known = [(loss, step) for step, loss in losses.items() if start < step < done and step in there]
        self._loss, self._checkpoints.best = min(known, default=(float("inf"), None))

    def improves(self, loss: float) -> bool:
        """Whether a loss is lower than all before it."""
        return loss < self._loss

    def keep(self, step: int, loss: float) -> None:
        """Keeps the checkpoint of this step in the place of the one before."""
        self._loss, self._checkpoints.best = loss, step
