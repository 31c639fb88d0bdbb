"""What a person sees of a run, on stderr: lines of text, and a live bar where stderr is a terminal."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

SECONDS_BETWEEN_LINES = 10.0


class Report:
    """Prints lines, and follows the steps of a run; does nothing at all when `quiet` (all hosts but the first).

    Used as a context manager around the training loop: inside it a terminal shows a live bar below the lines, and
    anything else (a log file, a pipe) gets one plain line about every ten seconds.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        # Text is printed as it is: no markup, no guessing at what a number or a path should look like.
        self._console = Console(stderr=True, quiet=quiet, markup=False, highlight=False, emoji=False, soft_wrap=True)
        self._bar: Progress | None = None

    def line(self, text: str) -> None:
        """Prints `text`, above the bar if there is one."""
        self._console.print(text)

    def fact(self, name: str, text: str) -> None:
        """Prints one aligned `name  text` line of the summary at start-up."""
        self._console.print(f"{name:<8}", end=" ", style="bold")
        self._console.print(text)

    def warn(self, text: str) -> None:
        """Prints `text` as a warning."""
        self._console.print("warning:", end=" ", style="bold yellow")
        self._console.print(text)

    def follow(self, start: int, total: int, *, tokens_per_step: int | None) -> Report:
        """This report, told the length of the run; use it as the context manager around the loop.

        Where steps have no number of tokens, their time is shown.
        """
        self._start, self._total, self._tokens_per_step = start, total, tokens_per_step
        self._first: tuple[int, float] | None = None
        self._next_line = 0.0
        return self

    def __enter__(self) -> Report:
        if self._console.is_terminal and not self._console.quiet:
            self._bar = Progress(
                TextColumn("{task.completed}/{task.total}", style="bold"),
                BarColumn(bar_width=None),
                TextColumn("{task.description}"),
                console=self._console,
            )
            self._task = self._bar.add_task("compiling", total=self._total, completed=self._start)
            self._bar.start()
            # A second Ctrl-C ends the process without any clean-up; the cursor must not stay hidden then.
            self._console.show_cursor(True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None

    def busy(self, text: str) -> None:
        """Shows what goes on before the next step."""
        now = time.monotonic()
        if self._bar:
            self._bar.update(self._task, description=text)
        elif now >= self._next_line:
            self._next_line = now + SECONDS_BETWEEN_LINES
            self.line(text)

    def step(self, step: int, text: str) -> None:
        """Shows that `step` steps are done and what is said of the last one."""
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)  # speed is counted from here: the first step is mostly compilation
        first, since = self._first
        if step > first:
            steps_per_second = (step - first) / (now - since)
            if self._tokens_per_step is None:
                text += f"  {1 / steps_per_second:.3g} s/step"
            else:
                text += f"  {_thousands(steps_per_second * self._tokens_per_step)} tokens/s"
            text += f"  {_duration((self._total - step) / steps_per_second)} left"
        if self._bar:
            self._bar.update(self._task, completed=step, description=text)
        elif now >= self._next_line or step == self._total:
            self._next_line = now + SECONDS_BETWEEN_LINES
            self.line(f"step {step}/{self._total}  {text}")


def _thousands(number: float) -> str:
    for unit in ("", "k", "M"):
        if number < 1000:
            return f"{number:.0f}{unit}" if number >= 100 else f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}G"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
