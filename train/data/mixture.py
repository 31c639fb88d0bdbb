"""Rows of several sources in one stream, each as often as its weight says."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from train.data.rows import Batch, Rows, stream_seed


class Schedule:
    """Whose turn it is: row i of a mixture is row j of part p, a pure function of i.

    Row m of a part is due at (m + o) / w, where w is its weight and o in [0, 1) is drawn by `seed`, and rows come as
    they are due. So at any time a part has had its share of the rows to within one or two.
    """

    def __init__(self, weights: Sequence[float], *, seed: int) -> None:
        """`weights` are shares, some of which may be 0."""
        given = np.array(weights, np.float64)
        self._parts = np.flatnonzero(given)
        self._weights = given[self._parts] / given.sum()
        self._offsets = np.random.default_rng(seed).random(len(self._parts))
        self._num_parts = len(given)

    def rows(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Part and number within the part of each row, int64 [n] each."""
        found = [self._row(index) for index in indices]
        return np.array([part for part, _ in found], np.int64), np.array([number for _, number in found], np.int64)

    def counts(self, num_rows: int) -> np.ndarray:
        """Rows of each part among the first `num_rows`, int64 [parts]."""
        before, order, width = self._next(num_rows)
        counts = np.zeros(self._num_parts, np.int64)
        counts[self._parts] = before + np.bincount(order[: num_rows - before.sum()] // width, minlength=len(before))
        return counts

    def _row(self, index: int) -> tuple[int, int]:
        before, order, width = self._next(index)
        part, ahead = divmod(int(order[index - before.sum()]), width)
        return int(self._parts[part]), int(before[part]) + ahead

    def _next(self, index: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Rows of each part that are due a little before row `index`, and the order of the next `width` of each."""
        count = len(self._parts)
        time = index - count - 1.0  # before which fewer rows than `index` are due, by a few
        before = np.maximum(0, np.ceil(time * self._weights - self._offsets)).astype(np.int64)
        ahead = before[:, None] + np.arange(2 * count + 3)
        due = (ahead + self._offsets[:, None]) / self._weights[:, None]
        return before, np.argsort(due, axis=None, kind="stable"), ahead.shape[1]


class MixedRows:
    """The streams of several parts as one; batches are as `Rows.batch` returns them."""

    def __init__(
        self, parts: Sequence[Rows], weights: Sequence[float], *, batch_size: int, seed: int, first_step: int
    ) -> None:
        """`parts` in the order of `weights`; see `Rows` for the others."""
        self.schedule = Schedule(weights, seed=stream_seed(seed, first_step))
        self._parts, self._batch_size, self._first_step = parts, batch_size, first_step

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """Batch number `step`, or some rows of it; only those are read."""
        step -= self._first_step
        if step < 0:
            raise IndexError(f"batch {step} of a stream that begins with 0")
        parts, numbers = self.schedule.rows(range(step * self._batch_size, (step + 1) * self._batch_size)[rows])
        read = [rows.read(numbers[parts == part].tolist()) for part, rows in enumerate(self._parts)]
        place = np.argsort(
            np.argsort(parts, kind="stable"), kind="stable"
        )  # of each row among those read, part by part
        return {name: np.concatenate([batch[name] for batch in read])[place] for name in read[0]}
