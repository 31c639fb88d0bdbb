"""What a run writes down: metrics.jsonl, one object for each logged step, and the same numbers for TensorBoard."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

METRICS = "metrics.jsonl"


class Record:
    """The record of a run up to `step`, open for more.

    Rows are `{"step": 7, "loss": 3.2, ...}` after an optimiser step and `{"step": 7, "held_out_loss": 3.3, ...}`
    after an evaluation, in order of step. A run that resumes first drops what lies beyond its checkpoint, so the record
    of a broken run equals an unbroken one's except for timings. A disk that is full does not end the run: rows wait in
    memory until they can be written.

    Args:
      directory: the run directory.
      step: steps done so far. Kept are rows up to it, less its evaluation, which a resumed run does again.
      tokens_after: of a step, the tokens seen up to it; None where steps do not tell.
      warn: told once when the disk takes no more.
      writes: False on every host but the first, where nothing is read or written.
    """

    def __init__(
        self,
        directory: Path,
        *,
        step: int,
        tokens_after: Callable[[int], int] | None,
        warn: Callable[[str], None],
        writes: bool = True,
    ) -> None:
        self._writes, self._warn, self._warned = writes, warn, False
        self._tokens_after = tokens_after
        self.restart_clock(step)
        if not writes:
            return
        self._path = directory / METRICS
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        self._size = _length_up_to(self._path, step)
        os.ftruncate(self._file, self._size)
        self._unwritten = b""
        # The plain writer, not SummaryWriter: that one writes from a thread and blocks for ever once the disk is full.
        self._events: EventsWriter | None = EventsWriter(str(directory / "events"), filename_suffix=f".{step}")
        # TensorBoard then hides what an attempt that got further wrote from here on.
        self._event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def restart_clock(self, step: int) -> None:
        """Times what comes after `step` steps: called when something else than training has taken time."""
        self._since = (step, time.monotonic())

    def train(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds the row of an optimiser step: its metrics, tokens seen in all, and the speed since the row before."""
        (before, start), now = self._since, time.monotonic()
        self._since = (step, now)
        row = {"step": step, "loss": metrics["loss"], **metrics}
        if self._tokens_after:
            row["tokens"] = self._tokens_after(step)
            row["tokens_per_second"] = (row["tokens"] - self._tokens_after(before)) / (now - start)
        self._add("train", row | {"seconds": (now - start) / (step - before)})

    def held_out(
        self,
        step: int,
        *,
        loss: float | None = None,
        bits_per_byte: float | None = None,
        parts: Mapping[str, float] | None = None,
        **others: float,
    ) -> None:
        """Adds the row of an evaluation after `step` steps: nats per token, also of each part, and bits per byte.

        `others` are what else the objective measures; where answers are judged that is all.
        """
        own = {} if loss is None else {"held_out_loss": loss}
        bits = {} if bits_per_byte is None else {"bits_per_byte": bits_per_byte}
        each = {f"held_out_loss_{name}": value for name, value in (parts or {}).items()}
        more = {f"held_out_{name}": value for name, value in others.items()}
        self._add("held_out", {"step": step, **own, **each, **bits, **more})

    def checkpoint_failed(self, step: int, times: int) -> None:
        """Adds a row saying that `times` saves in a row have failed, the last one noticed at `step`."""
        self._add("train", {"step": step, "checkpoint_failed": times})

    def sync(self) -> None:
        """Puts all rows on the disk, so that no checkpoint is newer than the record."""
        if self._writes:
            self._append(b"")
            os.fsync(self._file)

    def close(self) -> None:
        """Ends the record."""
        if self._writes:
            self._append(b"")
            os.close(self._file)
            if self._events:
                self._events.close()

    def _add(self, kind: str, row: dict[str, Any]) -> None:
        if not self._writes:
            return
        self._append(json.dumps(row).encode() + b"\n")
        values = [
            summary.scalar(f"{kind}/{name.removeprefix('held_out_')}", value).value[0]
            for name, value in row.items()
            if name not in ("step", "tokens")
        ]
        self._event(Event(step=row["step"], wall_time=time.time(), summary=summary.Summary(value=values)))

    def _append(self, line: bytes) -> None:
        self._unwritten += line
        try:
            while self._unwritten:
                written = os.pwrite(self._file, self._unwritten, self._size)
                self._size += written
                self._unwritten = self._unwritten[written:]
        except OSError as error:
            self._complain(f"{self._path}: {error.strerror}; the rows wait in memory and training goes on")

    def _event(self, event: Event) -> None:
        try:
            if self._events:
                self._events.write_event(event)
                self._events.flush()
        except OSError as error:
            self._events = None  # half a record may be in the file: nothing after it could be read
            self._complain(f"TensorBoard events end here: {error.strerror}; {METRICS} has them all")

    def _complain(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            self._warn(text)


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line cut off by a crash is left out."""
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            yield json.loads(line)


def _length_up_to(path: Path, step: int) -> int:
    """Bytes of the rows to keep when a run goes on from `step`."""
    length = 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            row = None
        if (
            row is None
            or row["step"] > step
            or (row["step"] == step and any(name.startswith("held_out_") for name in row))
        ):
            break
        length += len(line)
    return length
