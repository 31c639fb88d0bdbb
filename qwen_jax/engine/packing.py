"""Rows and pieces of prompts as arrays of few shapes, which is what is compiled for."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qwen_jax import sharding
from qwen_jax.config import DType
from qwen_jax.engine.scheduler import Piece, Row
from qwen_jax.engine.steps import Choice, Inputs
from qwen_jax.ops.pages import Rows
from qwen_jax.ops.sampling import Sampling, Stages

# Numbers of rows, and lengths of pieces, are rounded up to a few: the least, so many times that, and so on.
_STEP = 4
_SHORTEST = 32
_BLOCK = 32  # what a piece is padded to
MOST_PIECES = 16  # of a step: there is room for logits after each
# Where padding costs what tokens cost:
_MANY, _STEP_OF_MANY = 4, 2  # rows
_SMALL_BLOCK = 8
_LEAST_FULL = 0.75  # of the place for pieces; where it would be less, there is less of it

_IDLE = Sampling(temperature=0)

# A token to be made: so many after the next one of a row; None for what nobody asked for.
Wanted = tuple[Row, int] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capacity:
    """How much the engine does at a time.

    Attributes:
      max_rows: requests that run together; more wait.
      max_length: tokens of a request at most, its prompt and what follows; None for what the model has positions for.
      cache_tokens: tokens that the cache has room for; None for `max_rows` requests of `max_length` tokens each.
      page_size: tokens of a page, the unit in which rows take room and share what they have in common; with int8 a
        multiple of 128.
      chunk: tokens of prompts that one step takes in, at most.
      int8: whether keys and values are kept in int8, with a scale for each.
    """

    max_rows: int = 8
    max_length: int | None = None
    cache_tokens: int | None = None
    page_size: int = 32
    chunk: int = 512
    int8: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
    """How rows become arrays.

    Attributes:
      capacity: of the engine.
      width: pages of a row at most.
      least: rows are multiples of this many.
      prompts: whether the lengths of prompts matter.
      padding_costs: whether it costs what tokens cost, as on CPU. Elsewhere a step takes about as long with more of it.
    """

    capacity: Capacity
    width: int
    least: int
    prompts: bool
    padding_costs: bool

    @property
    def block(self) -> int:
        """What a piece is padded to."""
        block = min(_SMALL_BLOCK if self.padding_costs else _BLOCK, self.capacity.chunk)
        return -(-block // self.least) * self.least

    def room(self, fillable: int) -> int:
        """The place that the next step has for pieces, where so much could be filled."""
        size = min(fillable, self._widths[-1])
        width = next(width for width in self._widths if width >= size)
        if self.padding_costs and width > self._widths[0] and size < _LEAST_FULL * width:
            return max(width for width in self._widths if width < size)
        return width

    def inputs(self, rows: Sequence[Row], pieces: Sequence[Piece]) -> Inputs:
        """What the model takes in."""
        given: dict[str, Any] = {}
        prompts = []
        if rows:
            count = next(count for count in self._row_counts if count >= len(rows))
            more = count - len(rows)
            given["places"] = np.array([*(row.place for row in rows), *[self.capacity.max_rows] * more], np.int32)
            given["rows"] = self._rows(rows, [row.length for row in rows], [1] * len(rows), count, width=1)
            prompts += [*(len(row.request.prompt) for row in rows), *[0] * more]
        if pieces:
            arrays, lengths = self._pieces(pieces)
            given |= arrays
            prompts += lengths
        if self.prompts:
            given["prompts"] = np.array(prompts, np.int32)
        return Inputs(**given)

    def _pieces(self, pieces: Sequence[Piece]) -> tuple[dict[str, Any], list[int]]:
        """The fields of `Inputs` for pieces, and the length of the prompt of each token."""
        sizes = [piece.stop - piece.start for piece in pieces]
        places = [-(-size // self.block) * self.block for size in sizes]
        # A prompt that is taken in whole, since what it keeps goes by all of it, is one block.
        whole = pieces[0].row.kind is None
        shortest = self._widths[0]
        longer = -(-sum(places) // shortest) * shortest
        total = longer if whole else next(width for width in self._widths if width >= sum(places))
        count = 1 if whole else total // self.block
        starts = np.cumsum([0, *places[:-1]])
        tokens, lengths = np.zeros(total, np.int32), np.zeros(total, np.int32)
        for piece, start, size in zip(pieces, starts, sizes, strict=True):
            tokens[start : start + size] = piece.row.tokens[piece.start : piece.stop]
            lengths[start : start + size] = len(piece.row.request.prompt)
        ends = np.zeros(-(-min(count, MOST_PIECES) // self.least) * self.least, np.int32)
        ends[: len(pieces)] = starts + sizes - 1
        rows = [piece.row for piece in pieces]
        group = self._rows(rows, [piece.stop for piece in pieces], sizes, count, width=total // count)
        return dict(pieces=group, tokens=tokens, ends=ends), lengths.tolist()

    def known(self, rows: Sequence[Row], inputs: Inputs) -> Inputs:
        """The inputs with the last tokens of `rows`, which the host knows."""
        assert inputs.rows is not None
        tokens: Any = np.zeros((len(inputs.rows.lengths), 1), np.int32)
        tokens[: len(rows), 0] = [row.tokens[-1] for row in rows]
        return dataclasses.replace(inputs, known=tokens)

    def choice(self, wanted: Sequence[Wanted]) -> Choice:
        """How tokens are chosen, but for grammars."""
        requests = [of and of[0].request for of in wanted]
        # Only what follows the last token is made for certain.
        places = [of[0].place if of and not of[1] else self.capacity.max_rows for of in wanted]
        arrays: dict[str, Any] = dict(
            places=np.array(places, np.int32),
            seeds=np.array([request.seed if request else 0 for request in requests], np.uint32),
            rows=np.array([request.row if request else 0 for request in requests], np.uint32),
            positions=np.array([of[0].length + of[1] if of else 0 for of in wanted], np.int32),
        )
        tempers = [request.sampling.temperature or 1 if request and request.tempered else 1 for request in requests]
        if any(temper != 1 for temper in tempers):
            arrays["tempers"] = np.array(tempers, np.float32)
        return Choice(**arrays, stages=Stages.of([request.sampling if request else _IDLE for request in requests]))

    @functools.cached_property
    def _row_counts(self) -> Sequence[int]:
        step = lambda count: _STEP_OF_MANY if self.padding_costs and count >= _MANY else _STEP
        return _ladder(self.least, self.capacity.max_rows, step)

    @functools.cached_property
    def _widths(self) -> Sequence[int]:
        shortest = max(1, min(_SHORTEST, self.capacity.chunk) // self.block) * self.block
        return _ladder(shortest, max(1, self.capacity.chunk // shortest) * shortest, lambda width: _STEP)

    def _rows(
        self, rows: Sequence[Row], lengths: Sequence[int], counts: Sequence[int], count: int, *, width: int
    ) -> Rows:
        """A group of `count` rows, of which the first are `rows`."""
        table: Any = np.zeros((count, self.width), np.int32)
        for entry, row in zip(table, rows, strict=False):
            entry[: len(row.pages)] = row.pages
        padded: Any = np.zeros((2, count), np.int32)
        padded[:, : len(rows)] = lengths, counts
        return Rows(lengths=padded[0], counts=padded[1], table=table, width=width)


def row_multiple(dtype: DType) -> int:
    """Of how many rows there are multiples on the current mesh."""
    # XLA on CPU multiplies one row of bfloat16 some ten times slower than two.
    return math.lcm(sharding.axis_size(sharding.ROWS), 2 if dtype == "bfloat16" else 1)


def _ladder(least: int, most: int, step: Callable[[int], int]) -> Sequence[int]:
    """`least`, `step` times that and so on; the last is what `most` needs, in multiples of `least`."""
    values = [least]
    while values[-1] < most:
        values.append(min(values[-1] * step(values[-1]), -(-most // least) * least))
    return values


def allowed(wanted: Sequence[Wanted], num_tokens: int) -> np.ndarray | None:
    """The words of each request's grammar, all ones for those without; None if there is no grammar at all."""
    constraints = [of and of[0].request.constraint for of in wanted]
    if not any(constraints):
        return None
    words = np.full((len(wanted), -(-num_tokens // 32)), 2**32 - 1, np.uint32)
    for row, constraint in zip(words, constraints, strict=True):
        if constraint:
            row[:] = constraint.mask()
    return words
