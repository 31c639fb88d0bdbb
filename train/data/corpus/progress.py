"""What a person sees of a corpus in the making, on stderr: a line per phase, and a bar where that is a terminal."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from train.data.corpus.tasks import Summary

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Follows phases, as a context manager."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, markup=False, highlight=False, emoji=False, soft_wrap=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Bars(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)

    def line(self, text: str) -> None:
        """Prints a line."""
        self._console.print(text)

    def begin(self, name: str, tasks: int) -> None:
        """A phase begins."""
        self._name, self._tasks, self._done = name, tasks, 0
        self._began = self._said = time.monotonic()
        self._bar = self._bars.add_task(name, total=tasks)

    def step(self) -> None:
        """A task of it is done."""
        self._done += 1
        self._bars.advance(self._bar)
        if self._bars.disable and time.monotonic() - self._said > SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            self.line(f"{self._name}: {self._done} of {self._tasks} tasks")

    def end(self, summary: Summary) -> None:
        """The phase is done."""
        self._bars.remove_task(self._bar)
        seconds = time.monotonic() - self._began
        words = f"{summary.read:,} documents, {summary.kept:,} kept" if summary.read else f"{self._tasks} done"
        self.line(f"{self._name:<22} {words}, {seconds:.1f} s")

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
