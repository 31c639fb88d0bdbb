"""How far many completions are, on stderr."""

from __future__ import annotations

import time
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from qwen_jax.engine import Completion, Engine, Replicas

_SECONDS_BETWEEN_LINES = 60.0
_SECONDS_BETWEEN_FRAMES = 0.1


class Report:
    """A live bar where stderr is a terminal, a line a minute where it is not, one at the end. A context manager."""

    def __init__(self, engine: Engine | Replicas, total: int, *, done: int = 0, quiet: bool = False) -> None:
        """
        Args:
          engine: a fresh one, which makes the completions.
          total: completions there will be.
          done: completions there were before.
          quiet: whether there is nothing but the line at the end.
        """
        self._engine, self._total, self._before, self._done = engine, total, done, done
        # Text is printed as it is: no markup, no guessing at what a number should look like.
        self._console = Console(stderr=True, markup=False, highlight=False, emoji=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._quiet = quiet
        self._first: float | None = None
        self._reason: str | None = "interrupted"

    def __enter__(self) -> Self:
        self._start = time.perf_counter()
        self._seconds = _SECONDS_BETWEEN_LINES
        if self._console.is_terminal and not self._quiet:
            columns = TextColumn("{task.completed}/{task.total}"), BarColumn(), TextColumn("{task.description}")
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("compiling", total=self._total, completed=self._done)
            self._seconds = _SECONDS_BETWEEN_FRAMES
            self._bar.start()
            # A second Ctrl-C ends the process without any clean-up; the cursor must not stay hidden then.
            self._console.show_cursor(True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def step(self) -> None:
        """Shows where the work is, when it is time; called for each token."""
        now = time.perf_counter()
        if self._first is None:
            # Speed is counted from here: before it, programs are compiled.
            self._first, self._next = now, now + self._seconds
        if now < self._next or self._quiet:
            return
        self._next = now + self._seconds
        if self._bar:
            self._bar.update(self._task, completed=self._done, description=self._text(now))
        else:
            self._console.print(f"{self._done}/{self._total} completions, {self._text(now)}")

    def done(self, completion: Completion) -> None:
        """One more has ended."""
        self._done += 1
        self._reason = completion.finish_reason

    def close(self) -> None:
        """Says how many tokens there were, how long they took, and how fast they came after the first."""
        now, tokens = time.perf_counter(), self._engine.stats.generated_tokens
        line = f"{tokens} tokens in {now - self._start:.1f} s"
        if self._first is not None and tokens > 1:
            line += f": the first after {self._first - self._start:.1f} s, then {self._rate(now):.1f} tokens/s"
        self._console.print(f"{line}; {self._reason}" if self._total == 1 else line)

    def _rate(self, now: float) -> float:
        assert self._first is not None
        return (self._engine.stats.generated_tokens - 1) / (now - self._first)

    def _text(self, now: float) -> str:
        running = self._engine.stats.num_running
        waiting = self._total - self._done - running
        text = f"{self._rate(now):.0f} tokens/s, {running} running, {waiting} waiting"
        if made := self._done - self._before:
            left = (now - self._start) / made * (self._total - self._done)
            text += f", {timedelta(seconds=round(left))} left"
        return text
