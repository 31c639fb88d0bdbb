"""How far a stage is, on stderr."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

_SECONDS_BETWEEN_LINES = 60.0
_SECONDS_BETWEEN_FRAMES = 0.1


class Report:
    """A live bar where stderr is a terminal, a line a minute where it is not. A context manager.

    Attributes:
      seconds: since it was entered.
    """

    def __init__(self, total: int, *, done: int) -> None:
        """`total` rows there are, of which so many were done before."""
        self._total, self._before, self._done = total, done, done
        # Text is printed as it is: no markup, no guessing at what a number should look like.
        self._console = Console(stderr=True, markup=False, highlight=False, emoji=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def __enter__(self) -> Self:
        self._start = time.perf_counter()
        self._next = self._start
        self._wait = _SECONDS_BETWEEN_LINES
        if self._console.is_terminal:
            columns = TextColumn("{task.completed}/{task.total}"), BarColumn(), TextColumn("{task.description}")
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("rows", total=self._total, completed=self._done)
            self._wait = _SECONDS_BETWEEN_FRAMES
            self._bar.start()
            # A second Ctrl-C ends the process without any clean-up; the cursor must not stay hidden then.
            self._console.show_cursor(True)
        self._next += self._wait
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def done(self) -> None:
        """One more row is done."""
        self._done += 1

    def show(self, tokens: int) -> None:
        """Shows where the work is, when it is time; `tokens` were made."""
        now = time.perf_counter()
        if now < self._next:
            return
        self._next = now + self._wait
        text = f"{tokens / (now - self._start):.0f} tokens/s" if tokens else ""
        if made := self._done - self._before:
            left = (now - self._start) / made * (self._total - self._done)
            text += f"{', ' if text else ''}{left / 60:.0f} min left"
        if self._bar:
            self._bar.update(self._task, completed=self._done, description=text)
        else:
            self._console.print(f"{self._done}/{self._total} rows, {text}")
