"""Batches: rows of tokens, in an order that is a pure function of (seed, index)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol, cast

import grain
import numpy as np

from qwen_jax.errors import ConfigError, DataError
from train.data.packing import best_fit
from train.data.shards import TokenShards

Batch = dict[str, np.ndarray]
BAD, GOOD = 1, 2  # of what is judged


class Layout(Protocol):
    """Which tokens of a split are in which row.

    Attributes:
      num_rows: rows of an epoch.
      num_columns: columns of these that are filled.
    """

    num_rows: int
    num_columns: int

    def spans(self, row: int) -> list[tuple[int, int]]:
        """What fills the columns of a row: (first token, columns), from left to right.

        The targets of the columns are the tokens after each, one more than the columns. Documents end between spans.
        """
        ...


class Windows:
    """Rows cut every `length` tokens of the text as it follows itself, so that each target is used once."""

    def __init__(self, shards: TokenShards, length: int) -> None:
        self._length, self.num_columns = length, max(0, len(shards) - 1)
        self.num_rows = -(-self.num_columns // length)

    def spans(self, row: int) -> list[tuple[int, int]]:
        start = row * self._length
        return [(start, min(self._length, self.num_columns - start))]


class BestFit:
    """Rows of whole documents (`packing.best_fit`).

    A document that is longer than a row is cut into rows and a rest, as if documents ended there; `too_long` may have
    its beginning or nothing of it kept. In a split that says what is trained, a document of which nothing is left to
    train is left out.

    Attributes:
      num_cut: documents that were cut.
      num_left_out: documents that were left out.
    """

    def __init__(self, shards: TokenShards, length: int, *, seed: int, too_long: str = "split") -> None:
        ends = shards.ends()
        starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
        columns = ends - starts - 1  # the end of text is a target alone
        longer = columns > length
        kept = columns > 0
        self.num_cut = 0 if too_long == "drop" else int(longer.sum())
        if too_long == "drop":
            kept &= ~longer
        elif too_long == "truncate":
            columns = np.minimum(columns, length)
        if shards.num_trained is not None:
            kept &= _anything_trained(shards, starts, columns)
        self.num_left_out = int((~kept).sum())
        starts, columns = starts[kept], columns[kept]
        pieces = -(-columns // length)
        number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)  # of a piece in its document
        self._starts = np.repeat(starts, pieces) + number * length
        self._columns = np.minimum(np.repeat(columns, pieces) - number * length, length)
        self._items, self._bounds = best_fit(self._columns, length, seed=seed)
        self.num_rows, self.num_columns = len(self._bounds) - 1, int(self._columns.sum())

    def spans(self, row: int) -> list[tuple[int, int]]:
        items = self._items[self._bounds[row] : self._bounds[row + 1]]
        return list(zip(self._starts[items].tolist(), self._columns[items].tolist(), strict=True))


def _anything_trained(shards: TokenShards, starts: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Whether a target of each document's first columns is trained."""
    spans = zip(starts.tolist(), columns.tolist(), strict=True)
    return np.array([shards.trained(start + 1, start + 1 + count).any() for start, count in spans], bool)


class Rows:
    """The rows of a split, as one endless stream or, without `shuffle`, once and in order.

    The stream has the rows in a new order each epoch (Grain's index shuffle), and is cut into batches without regard to
    epochs. Rows in order fill the last batch with rows of weight 0.

    Of rows, `full_length` is the fraction that stays whole. Every other is cut into pieces of one of `shorter_lengths`,
    each as likely, as if documents ended there: a function of seed and row, at the price of one target for each cut.

    `first_step` is the number of the first batch; streams that begin at different steps have different orders.

    Attributes:
      layout: what is in which row: windows of the text, each `sequence_length` targets, unless one is given.
      num_rows: rows in an epoch.
      reference: what `train.reference` has for them, float32 [num_rows, T]: batches have it then; None for none.
      num_batches: batches per epoch: whole ones with `shuffle`, otherwise all that `batch` takes.
    """

    def __init__(
        self,
        shards: TokenShards,
        *,
        sequence_length: int,
        batch_size: int,
        seed: int,
        layout: Layout | None = None,
        shuffle: bool = True,
        first_step: int = 0,
        full_length: float = 1.0,
        shorter_lengths: tuple[int, ...] = (),
    ) -> None:
        seed = stream_seed(seed, first_step)
        self._shards, self._length, self._batch_size = shards, sequence_length, batch_size
        self._seed, self._first_step = seed, first_step
        self._full_length, self._shorter_lengths = full_length, shorter_lengths
        self.layout = layout or Windows(shards, sequence_length)
        self.num_rows = self.layout.num_rows
        self._check_size(shuffle)
        order = grain.MapDataset.range(self.num_rows)
        self._order = order.seed(seed).shuffle().repeat() if shuffle else order
        self.num_batches = self.num_rows // batch_size if shuffle else -(-self.num_rows // batch_size)
        self._shuffle = shuffle
        self.reference: np.ndarray | None = None

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """Batch number `step`, or some rows of it; only those are read.

        Returns int32 arrays [b, T] `tokens`, `targets` (the next token), `positions` (from 0 in each document, and at
        the row's start) and `segments` (1, 2, … per document, 0 for padding), and float32 `weights`: 1 where the target
        is of the same document and trained, else 0. A token id the tokenizer does not have is a DataError.

        Of judged texts also int32 `labels`, 1 for bad and 2 for good where something is judged, else 0, and `groups`,
        1, 2, … for those that are compared with each other: each has a segment of its own.
        """
        step -= self._first_step
        if step < 0 or (not self._shuffle and step >= self.num_batches):
            raise IndexError(f"batch {step} of {self.num_batches}")
        return self.read(range(step * self._batch_size, (step + 1) * self._batch_size)[rows])

    def read(self, indices: Sequence[int]) -> Batch:
        """Rows of the stream by number, as `batch` returns them."""
        rows = [cast(int, self._order[index]) if index < len(self._order) else None for index in indices]
        return self._read(rows, [self._piece(index) for index in indices])

    def of_epoch(self, rows: Sequence[int]) -> Batch:
        """Rows of the layout by number, whole, as `batch` returns them."""
        return self._read(rows, [self._length] * len(rows))

    def _read(self, rows: Sequence[int | None], pieces: Sequence[int]) -> Batch:
        """Rows of the layout, None being an empty one, in pieces of so many tokens."""
        window = _Window.empty(len(rows), self._length, self._shards.dtype)
        for place, row in enumerate(rows):
            if row is not None:
                window.fill(place, self._shards, self.layout.spans(row))
        largest = max((ids.max() for ids in (window.tokens, window.targets) if ids.size), default=0)
        if largest >= self._shards.vocab_size:
            raise DataError(
                f"{self._shards.path} holds token id {largest}, its tokenizer has {self._shards.vocab_size}; "
                "the shards are of another tokenizer or damaged: delete them to make them again"
            )
        batch = window.labelled(self._shards.end_of_text, np.array(pieces, np.int32).reshape(-1, 1))
        if self._shards.num_labels is not None:
            batch |= {"labels": window.labels, "groups": window.groups}
        if self.reference is not None:
            empty = np.zeros(self._length, np.float32)
            batch["reference"] = np.stack([empty if row is None else self.reference[row] for row in rows])
        return batch

    @property
    def trained_fraction(self) -> float:
        """Of the tokens, those that are trained."""
        trained = self._shards.num_trained
        return 1.0 if trained is None else trained / len(self._shards)

    def _piece(self, index: int) -> int:
        """Tokens of the pieces of a row of the stream."""
        if self._full_length == 1:
            return self._length
        draw = np.random.default_rng([self._seed, index])
        return self._length if draw.random() < self._full_length else int(draw.choice(self._shorter_lengths))

    def _check_size(self, shuffle: bool) -> None:
        # A batch that is mostly padding would train on next to nothing; evaluation only needs a target.
        if isinstance(self.layout, BestFit):
            if self.num_rows < (needed := self._batch_size if shuffle else 1):
                raise DataError(
                    f"{self._shards.path} fills {self.num_rows} rows of {self._length} tokens, one batch needs "
                    f"{needed}; give more text, or a smaller batch_size or sequence_length"
                )
            return
        needed = self._batch_size * self._length + 1 if shuffle else 2
        if len(self._shards) < needed:
            raise DataError(
                f"{self._shards.path} has {len(self._shards)} tokens, one batch needs {needed}; "
                "give more text, or a smaller batch_size or sequence_length"
            )


def stream_seed(seed: int, *numbers: int) -> int:
    """A seed for what `numbers` tell apart; `seed` itself where all are 0."""
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed={seed} must be 0 or more and below 2**32")
    return int(np.random.SeedSequence([seed, *numbers]).generate_state(1)[0]) if any(numbers) else seed


@dataclasses.dataclass(frozen=True)
class _Window:
    """Rows as they are filled: [b, T] each, and where documents begin there without an end of text before."""

    tokens: np.ndarray
    targets: np.ndarray
    trained: np.ndarray
    starts: np.ndarray
    real: np.ndarray
    labels: np.ndarray
    groups: np.ndarray

    @classmethod
    def empty(cls, rows: int, length: int, dtype: np.dtype) -> _Window:
        return cls(*(np.zeros((rows, length), kind) for kind in (dtype, dtype, bool, bool, bool, np.int32, np.int32)))

    def fill(self, row: int, shards: TokenShards, spans: list[tuple[int, int]]) -> None:
        column = 0
        for number, (start, count) in enumerate(spans, 1):
            here, ids = slice(column, column + count), shards.tokens(start, start + count + 1)
            self.tokens[row, here], self.targets[row, here] = ids[:-1], ids[1:]
            self.trained[row, here] = shards.trained(start + 1, start + count + 1)
            self.starts[row, column] = column > 0
            self.real[row, here] = True
            self.labels[row, here], self.groups[row, here] = shards.labels(start, start + count), number
            column += count

    def labelled(self, end_of_text: int, pieces: np.ndarray) -> Batch:
        """The batch. A document also ends wherever a multiple of `pieces` [b, 1] columns is full."""
        index = np.arange(self.tokens.shape[1], dtype=np.int32)
        last = index == self.tokens.shape[1] - 1
        ends = (self.tokens == end_of_text) | (((index + 1) % pieces == 0) & ~last)
        starts = self.starts.copy()
        starts[:, 1:] |= ends[:, :-1]
        segments = np.cumsum(starts, axis=1, dtype=np.int32) + 1
        positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
        ids = lambda values: np.where(self.real, values, 0).astype(np.int32)
        return {
            "tokens": ids(self.tokens),
            "targets": ids(self.targets),
            "positions": ids(positions),
            "segments": ids(segments),
            "weights": (self.real & self.trained & ~ends).astype(np.float32),
        }
