"""Where completions go: to standard output in the order of the input, or to a file that a later run goes on with."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from infer.config import Generate
from infer.prompts import Prompt
from infer.terminal import faint, safe, warn
from qwen_jax.engine import Completion
from qwen_jax.errors import FileError
from qwen_jax.resumable import ResumableFile


@dataclasses.dataclass(frozen=True)
class Wanted:
    """One completion to make: the `sample`-th of prompt number `index`. `row` numbers all completions of the input."""

    row: int
    index: int
    sample: int
    prompt: Prompt
    ids: Sequence[int]
    stop_ids: frozenset[int]

    @property
    def head(self) -> dict[str, Any]:
        """What its row in JSON begins with."""
        return {"index": self.index, "sample": self.sample, **self.prompt.row}


class Output:
    """Takes completions by their rows.

    Attributes:
      missing: rows of those that are to be made.
    """

    missing: Sequence[int]

    def show(self, row: int, piece: str) -> None:
        """Takes the next piece of a completion, while it is made."""

    def done(self, row: int, completion: Completion) -> None:
        """Takes a completion that has ended."""

    def finish(self) -> None:
        """All are done."""

    def interrupt(self, begun: Mapping[int, Completion]) -> None:
        """No more are done; these have been begun."""


class InOrder(Output):
    """Hands on completions in the order of the input, whenever those before them are done."""

    def __init__(
        self,
        total: int,
        write: Callable[[int, Completion], None],
        show: Callable[[str], None] = lambda piece: None,
    ) -> None:
        """`write` takes completions that have ended, `show` the pieces of the only one there is."""
        self.missing = range(total)
        self._write, self._show = write, show
        self._held: dict[int, Completion] = {}
        self._next = 0

    def show(self, row: int, piece: str) -> None:
        self._show(piece)

    def done(self, row: int, completion: Completion) -> None:
        self._held[row] = completion
        while self._next in self._held:
            self._write(self._next, self._held.pop(self._next))
            self._next += 1

    def interrupt(self, begun: Mapping[int, Completion]) -> None:
        for row, completion in begun.items():
            if completion.num_tokens:
                self._show(completion.end("interrupted"))
                self._held[row] = completion
        # Those too that come after others which will never be done.
        for row in sorted(self._held):
            self._write(row, self._held[row])


class ToFile(Output):
    """Keeps completions in a file as soon as they are done; what was only begun is made anew by the next run."""

    def __init__(self, file: ResumableFile, row: Callable[[int, Completion], Mapping[str, Any]]) -> None:
        self.missing = file.missing
        self._file, self._row = file, row

    def done(self, row: int, completion: Completion) -> None:
        self._file.append(row, self._row(row, completion))

    def finish(self) -> None:
        self._file.sort()

    def interrupt(self, begun: Mapping[int, Completion]) -> None:
        warn("not all completions are there; the same command makes the others")


@contextmanager
def open_output(options: Generate, wanted: Sequence[Wanted], *, jsonl: bool, digest: str) -> Iterator[Output]:
    """Where the options have completions go.

    Args:
      options: of the command line.
      wanted: all completions there will be.
      jsonl: whether the prompts came as JSON lines.
      digest: of all that completions depend on beside their prompts.

    Raises FileError, or DataError if a file has other rows in it.
    """
    if options.output is None:
        yield _standard_output(options, wanted, jsonl)
        return
    path = options.output.expanduser()
    as_json = lambda row, completion: _json(wanted[row], completion, options.seed)
    try:
        if path.exists() and not path.is_file():  # a pipe or a device: what it was given is gone
            with path.open("w", encoding="utf-8") as pipe:
                yield InOrder(len(wanted), lambda row, completion: _print_json(as_json(row, completion), pipe))
            return
        head = lambda row: (json.dumps(wanted[row].head, ensure_ascii=False)[:-1] + ", ").encode()
        rows = dict(total=len(wanted), n=options.n, head=head)
        with ResumableFile(path, **rows, digest=digest, overwrite=options.overwrite) as file:
            yield ToFile(file, as_json)
    except OSError as error:
        raise FileError(f"cannot write completions to {options.output}: {error.strerror}") from error


def _standard_output(options: Generate, wanted: Sequence[Wanted], jsonl: bool) -> Output:
    total = len(wanted)
    if jsonl:
        sys.stdout.reconfigure(encoding="utf-8")  # JSON is UTF-8, whatever the terminal is
        return InOrder(total, lambda row, completion: _print_json(_json(wanted[row], completion, options.seed)))
    sys.stdout.reconfigure(errors="replace")
    if total > 1:
        return InOrder(total, lambda row, completion: _print_section(options.n, wanted[row], completion))
    if sys.stdout.isatty():
        print(faint(safe(wanted[0].prompt.row["prompt"])), end="", flush=True)
    show = lambda piece: print(safe(piece), end="", flush=True)
    return InOrder(total, lambda row, completion: print(flush=True), show)


def _json(wanted: Wanted, completion: Completion, seed: int) -> dict[str, Any]:
    return {
        **wanted.head,
        "completion": completion.text,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": len(wanted.ids),
        "completion_tokens": completion.num_tokens,
        "seed": seed,
    }


def _print_json(row: Mapping[str, Any], file: TextIO | None = None) -> None:
    print(json.dumps(row, ensure_ascii=False), file=file, flush=True)


def _print_section(n: int, wanted: Wanted, completion: Completion) -> None:
    number = f"{wanted.index + 1}.{wanted.sample + 1}" if n > 1 else f"{wanted.index + 1}"
    begin = " ".join(wanted.prompt.row["prompt"][:200].split())
    print(faint(safe(f"== {number}: {begin[:60]}{'…' if len(begin) > 60 else ''}")))
    print(f"{safe(completion.text)}\n", flush=True)
