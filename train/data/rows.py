"""Batches: rows cut from token shards, in an order that is a pure function of (seed, index)."""

from __future__ import annotations

from typing import cast

import grain
import numpy as np

from qwen_jax.errors import ConfigError, DataError
from train.data.shards import TokenShards


class Rows:
    """Rows of sequence_length + 1 tokens cut from a split every sequence_length tokens, so each target is used once.

    The last row of a split is padded. With `shuffle` the rows come as one endless stream, in a new order each epoch
    (Grain's index shuffle), cut into batches without regard to epochs. Without it they come once, in order, and the
    last batch is filled with rows of weight 0.

    Of rows, `full_length` is the fraction that stays whole. Every other is cut into pieces of one of `shorter_lengths`,
    each as likely, as if documents ended there: a function of seed and row, at the price of one target for each cut.

    `first_step` is the number of the first batch; streams that begin at different steps have different orders.

    Attributes:
      num_rows: rows in an epoch.
      num_batches: batches per epoch: whole ones with `shuffle`, otherwise all that `batch` takes.
    """

    def __init__(
        self,
        shards: TokenShards,
        *,
        sequence_length: int,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        first_step: int = 0,
        full_length: float = 1.0,
        shorter_lengths: tuple[int, ...] = (),
    ) -> None:
        if not 0 <= seed < 2**32:
            raise ConfigError(f"seed={seed} must be 0 or more and below 2**32")
        if first_step:
            seed = int(np.random.SeedSequence([seed, first_step]).generate_state(1)[0])
        self._shards, self._length, self._batch_size = shards, sequence_length, batch_size
        self._seed, self._first_step = seed, first_step
        self._full_length, self._shorter_lengths = full_length, shorter_lengths
        self.num_rows = -(-(len(shards) - 1) // sequence_length)
        self._check_size(shuffle)
        order = grain.MapDataset.range(self.num_rows)
        self._order = order.seed(seed).shuffle().repeat() if shuffle else order
        self.num_batches = self.num_rows // batch_size if shuffle else -(-self.num_rows // batch_size)
        self._shuffle = shuffle

    def batch(self, step: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        """Batch number `step`, or some rows of it; only those are read.

        Returns int32 arrays [b, T] `tokens`, `targets` (the next token), `positions` (from 0 in each document, and at
        the row's start) and `segments` (1, 2, … per document, 0 for padding), and float32 `weights`: 1 where the target
        is of the same document, else 0. A token id the tokenizer does not have is a DataError.
        """
        step -= self._first_step
        if step < 0 or (not self._shuffle and step >= self.num_batches):
            raise IndexError(f"batch {step} of {self.num_batches}")
        indices = range(step * self._batch_size, (step + 1) * self._batch_size)[rows]
        window = np.zeros((len(indices), self._length + 1), self._shards.dtype)
        num_targets = np.zeros((len(indices), 1), np.int32)
        for row, index in enumerate(indices):
            if index < len(self._order):
                start = cast(int, self._order[index]) * self._length
                tokens = self._shards.tokens(start, min(start + self._length + 1, len(self._shards)))
                window[row, : len(tokens)] = tokens
                num_targets[row] = len(tokens) - 1
        if window.size and (largest := window.max()) >= self._shards.vocab_size:
            raise DataError(
                f"{self._shards.path} holds token id {largest}, its tokenizer has {self._shards.vocab_size}; "
                "the shards are of another tokenizer or damaged: delete them to make them again"
            )
        pieces = np.array([[self._piece(index)] for index in indices], np.int32).reshape(-1, 1)
        return _label(window.astype(np.int32), num_targets, self._shards.end_of_text, pieces)

    def _piece(self, index: int) -> int:
        """Tokens of the pieces of a row of the stream."""
        if self._full_length == 1:
            return self._length
        draw = np.random.default_rng([self._seed, index])
        return self._length if draw.random() < self._full_length else int(draw.choice(self._shorter_lengths))

    def _check_size(self, shuffle: bool) -> None:
        # A batch that is mostly padding would train on next to nothing; evaluation only needs a target.
        needed = self._batch_size * self._length + 1 if shuffle else 2
        if len(self._shards) < needed:
            raise DataError(
                f"{self._shards.path} has {len(self._shards)} tokens, one batch needs {needed}; "
                "give more text, or a smaller batch_size or sequence_length"
            )


def _label(window: np.ndarray, num_targets: np.ndarray, end_of_text: int, pieces: np.ndarray) -> dict[str, np.ndarray]:
    """The batch of rows of T+1 tokens; in each row the first `num_targets` [b, 1] targets are real.

    Inside a row a document ends with its end of text, and wherever a multiple of `pieces` [b, 1] tokens is full.
    """
    tokens, targets = window[:, :-1], window[:, 1:]
    index = np.arange(tokens.shape[1], dtype=np.int32)
    real = index < num_targets
    last = index == tokens.shape[1] - 1
    ends = (tokens == end_of_text) | (((index + 1) % pieces == 0) & ~last)
    starts = np.zeros_like(ends)
    starts[:, 1:] = ends[:, :-1]
    segments = np.cumsum(starts, axis=1, dtype=np.int32) + 1
    positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    return {
        "tokens": np.where(real, tokens, 0),
        "targets": np.where(real, targets, 0),
        "positions": np.where(real, positions, 0),
        "segments": np.where(real, segments, 0),
        "weights": (real & ~ends).astype(np.float32),
    }
