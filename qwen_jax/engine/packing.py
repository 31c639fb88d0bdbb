"""Rows and pieces of prompts as arrays of few shapes, which is what is compiled for."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np

from qwen_jax.engine.scheduler import Piece, Row
from qwen_jax.engine.steps import Choice, Inputs
from qwen_jax.ops.pages import Rows
from qwen_jax.ops.sampling import Sampling, Stages

# Numbers of rows, and lengths of pieces, are rounded up to a few: the least, so many times that, and so on.
_STEP = 4
_SHORTEST = 32
# Where padding costs what tokens cost:
_MANY, _STEP_OF_MANY = 4, 2  # rows
_LEAST_FULL = 0.75  # a piece; one that would be less so is cut

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
      chunk: tokens of a prompt that one step takes in, at most.
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

    def piece(self, left: int) -> int:
        """How many tokens of a prompt the next step takes in, of those that are left."""
        size = min(left, self.capacity.chunk)
        shorter = [width for width in self._piece_widths if width < size]
        if self.padding_costs and shorter and size < _LEAST_FULL * self._piece_width(size):
            return shorter[-1]
        return size

    def inputs(self, rows: Sequence[Row], piece: Piece | None) -> tuple[Inputs, int]:
        """What the model takes in, and how many rows of logits the piece has."""
        given: dict[str, Any] = {}
        prompts = []
        if rows:
            count = next(count for count in self._row_counts if count >= len(rows))
            more = count - len(rows)
            given["places"] = np.array([*(row.place for row in rows), *[self.capacity.max_rows] * more], np.int32)
            given["rows"] = self._rows(rows, [row.length for row in rows], count, width=1)
            prompts += [*(len(row.request.prompt) for row in rows), *[0] * more]
        if piece is not None:
            size = piece.stop - piece.start
            width = self._piece_width(size)
            given["tokens"] = np.zeros(width, np.int32)
            given["tokens"][:size] = piece.row.tokens[piece.start : piece.stop]
            given["piece"] = self._rows([piece.row], [piece.stop], 1, width=width, new=size)
            prompts += [len(piece.row.request.prompt)] * width
        if self.prompts:
            given["prompts"] = np.array(prompts, np.int32)
        return Inputs(**given), self.least if piece else 0

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
        return Choice(**arrays, stages=Stages.of([request.sampling if request else _IDLE for request in requests]))

    @functools.cached_property
    def _row_counts(self) -> Sequence[int]:
        step = lambda count: _STEP_OF_MANY if self.padding_costs and count >= _MANY else _STEP
        return _ladder(self.least, self.capacity.max_rows, step)

    @functools.cached_property
    def _piece_widths(self) -> Sequence[int]:
        return _ladder(math.lcm(_SHORTEST, self.least), self.capacity.chunk, lambda width: _STEP)

    def _piece_width(self, size: int) -> int:
        shortest = self._piece_widths[0]
        return next((width for width in self._piece_widths if width >= size), -(-size // shortest) * shortest)

    def _rows(self, rows: Sequence[Row], lengths: Sequence[int], count: int, *, width: int, new: int = 1) -> Rows:
        """A group of `count` rows, of which the first are `rows`."""
        table: Any = np.zeros((count, self.width), np.int32)
        for entry, row in zip(table, rows, strict=False):
            entry[: len(row.pages)] = row.pages
        padded: Any = np.array([*lengths, *[0] * (count - len(rows))], np.int32)
        return Rows(lengths=padded, table=table, count=cast(Any, np.int32(len(rows) * new)), width=width)


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
