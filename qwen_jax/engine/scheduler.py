"""What the next step computes: continuous batching over pages, with chunked prefill, sharing and preemption.

Every row that has its prompt behind it makes a token in every step, and beside them pieces of prompts are taken in.
Rows are admitted in the order they came: each when the prompt before it is in, or is within this step, so that it finds
what they have in common, and as soon as a place and the pages of all its tokens are free. When a row grows and no page
is left, the row that was admitted last gives up its own and waits, as the first, to be computed again. All this looks
at lengths only: which tokens were chosen may be known later.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Hashable, Iterator

from qwen_jax.engine.pages import Pages
from qwen_jax.engine.request import Request


@dataclasses.dataclass(eq=False)
class Row:
    """A request on its way.

    Attributes:
      request: what was asked for.
      number: of the request.
      kind: what its keys depend on beside its tokens (`ops.rope.kind`); None if no other row may have them.
      tokens: the prompt and the tokens made and read.
      length: tokens that are in the pages, or will be after the steps launched.
      made: tokens made in the steps launched.
      pages: its pages in order.
      place: which of the engine's rows it is; None while it waits.
      decoding: its prompt is behind it, and its last token with the device.
      published: pages that others may find, and `node` what `Pages` calls the last of them.
      done: it has its last token, or nobody wants it any more.
    """

    request: Request
    number: int
    kind: Hashable
    tokens: list[int]
    length: int = 0
    made: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    place: int | None = None
    decoding: bool = False
    published: int = 0
    node: Hashable = None
    done: bool = False

    @property
    def target(self) -> int:
        """Tokens that must be in the pages before the next one is made."""
        return len(self.request.prompt) + self.made

    @property
    def ended(self) -> bool:
        """All its tokens have been launched."""
        return self.made >= self.request.max_new_tokens


@dataclasses.dataclass(frozen=True)
class Piece:
    """The tokens `row.tokens[start:stop]`, to be taken in; if they are the last, a token is made."""

    row: Row
    start: int
    stop: int
    last: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step computes: the next token of rows, and pieces of prompts."""

    rows: list[Row]
    pieces: list[Piece]


class Scheduler:
    """Rows that run, and rows that wait.

    Attributes:
      preemptions: how often a row gave up its pages.
      reused: tokens that were found in pages instead of being computed.
    """

    def __init__(
        self, pages: Pages, *, max_rows: int, block: int, most_pieces: int, room: Callable[[int], int]
    ) -> None:
        """
        Args:
          pages: of the cache.
          max_rows: rows that run together.
          block: pieces take their place in whole blocks of so many tokens.
          most_pieces: of a step.
          room: how much place a step has for pieces, where so much could be filled. A row whose kind is None is taken
            in whole, and alone.
        """
        self.pages = pages
        self.preemptions = self.reused = 0
        self._block, self._most_pieces, self._room = block, most_pieces, room
        self._places = list(range(max_rows - 1, -1, -1))
        self._waiting: deque[Row] = deque()
        self._running: list[Row] = []  # in the order of admission

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def __iter__(self) -> Iterator[Row]:
        yield from self._running
        yield from self._waiting

    def add(self, row: Row) -> None:
        self._waiting.append(row)

    def finish(self, row: Row) -> None:
        """Takes a row out, wherever it is."""
        row.done = True
        if row.place is not None:
            self._leave(row)
        elif row in self._waiting:
            self._waiting.remove(row)

    def restart(self) -> None:
        """Has every row computed again: what is in the pages means nothing any more."""
        while self._running:
            self._preempt(self._running[-1])
        self.pages.forget()

    def plan(self, drafts: int = 0) -> Plan | None:
        """The next step; None if there is nothing to do. The rows' lengths are then those after it.

        `drafts` are the tokens that rows try to be ahead by: slots are had for them, but do not count.
        """
        rows = []
        for row in [row for row in self._running if row.decoding and not row.ended]:
            # A row may be gone, for one that came before it.
            if row.place is not None and self._grow(row, row.target + drafts):
                rows.append(row)
        pieces = self._pieces()
        for row in rows:
            row.length = row.target
            row.made += 1
        return Plan(rows, pieces) if rows or pieces else None

    def publish(self, row: Row) -> None:
        """Lets others find the pages of a row whose tokens are all known and computed."""
        size, known = self.pages.size, min(row.length, len(row.tokens))
        while row.place is not None and row.kind is not None and (row.published + 1) * size <= known:
            start = row.published * size
            tokens = row.tokens[start : start + size]
            row.node = self.pages.publish(row.node, row.pages[row.published], tokens)
            row.published += 1

    def _pieces(self) -> list[Piece]:
        """What is taken in: of prompts that are under way, then of those that wait, as much as there is place for."""
        row = self._under_way() or self._admit()
        if row is None:
            return []
        if row.kind is None:
            return [self._piece(row, row.target)]
        pieces, room = [], self._room(self._fillable())
        while row is not None and row.kind is not None:
            pieces.append(self._piece(row, min(row.target, row.length + room)))
            room -= self._place(pieces[-1].stop - pieces[-1].start)
            full = not room or len(pieces) == self._most_pieces
            row = None if full else self._under_way() or self._admit()
        return pieces

    def _piece(self, row: Row, stop: int) -> Piece:
        piece = Piece(row, row.length, stop, last=stop == row.target)
        row.length, row.decoding = stop, piece.last
        row.made += piece.last
        # Even to a row of this very step: it writes all its keys before it looks at any.
        self.publish(row)
        return piece

    def _under_way(self) -> Row | None:
        """The first row whose prompt is not in."""
        return next((row for row in self._running if not row.decoding), None)

    def _fillable(self) -> int:
        """The place that all prompts would take which could be taken in now, if they had no more in common."""
        waiting = itertools.islice(self._waiting, len(self._places))
        lengths = [row.target - row.length for row in (*self._running, *waiting) if not row.decoding]
        return sum(map(self._place, lengths))

    def _place(self, length: int) -> int:
        return -(-length // self._block) * self._block

    def _admit(self) -> Row | None:
        """The row that waits as the first, if there is room for it."""
        if not (self._waiting and self._places):
            return None
        row = self._waiting[0]
        shared, node = ([], None) if row.kind is None else self.pages.match(row.kind, row.tokens[:-1])
        wanted = self._num_pages(row.target) - len(shared)
        # A page is left for each row that may yet grow: the first that did would have this one give way.
        if wanted + sum(len(row.pages) < self._most_pages(row) for row in self._running) > self.pages.free:
            self.pages.release(shared)
            return None
        self._waiting.popleft()
        row.pages = shared + self.pages.take(wanted)
        row.published, row.node = len(shared), node
        row.length = len(shared) * self.pages.size
        self.reused += row.length
        row.place = self._places.pop()
        self._running.append(row)
        return row

    def _grow(self, row: Row, length: int) -> bool:
        """Pages for so many tokens of a row, at the cost of later rows; False if the row itself had to give way."""
        while (more := self._num_pages(length) - len(row.pages)) > self.pages.free:
            victim = self._running[-1]
            self._preempt(victim)
            if victim is row:
                return False
        row.pages += self.pages.take(max(more, 0))
        return True

    def _preempt(self, row: Row) -> None:
        self._leave(row)
        self._waiting.appendleft(row)
        self.preemptions += 1

    def _leave(self, row: Row) -> None:
        self.pages.release(row.pages)
        assert row.place is not None
        self._places.append(row.place)
        self._running.remove(row)
        row.pages, row.place, row.decoding, row.length, row.published = [], None, False, 0, 0

    def _most_pages(self, row: Row) -> int:
        return self._num_pages(len(row.request.prompt) + row.request.max_new_tokens)

    def _num_pages(self, length: int) -> int:
        return -(-length // self.pages.size)
