"""Trains the runs of a sweep that are not yet done, one after another."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from qwen_jax.errors import FileError, NumericalError
from train import directory as run_directory
from train.progress import Report
from train.record import METRICS, rows
from train.run import run
from train.scaling.points import Point

DIVERGED, LOG = "diverged.txt", "log.txt"


class Stopped(Exception):
    """A run was asked to stop and has saved its state; the exit code is the argument."""


def sweep(points: Sequence[Point], report: Report) -> list[float]:
    """The final held-out loss of each run, infinity where it diverged. Runs that are done are not trained again.

    Raises Stopped, and what a run raises.
    """
    losses = []
    for number, point in enumerate(points, 1):
        start, took = time.monotonic(), "done before"
        loss = final_loss(point)
        if loss is None:
            loss = train(point)
            took = f"{time.monotonic() - start:.1f} s"
        losses.append(loss)
        said = f"loss {loss:.4f}" if math.isfinite(loss) else "diverged"
        report.line(f"{number:>4} of {len(points)}  {point.name:<40} {said:<12} {took}")
    return losses


def final_loss(point: Point) -> float | None:
    """What the run of a point came to; None if it is not done. Raises ConfigError if its folder has another run."""
    directory = Path(point.config.run_dir)
    run_directory.check_same_run(directory, point.config)
    if (directory / DIVERGED).exists():
        return math.inf
    if not (directory / METRICS).exists():
        return None
    last = {row["step"]: row["held_out_loss"] for row in rows(directory / METRICS) if "held_out_loss" in row}
    return last.get(point.config.steps)


def train(point: Point) -> float:
    """Trains a run as `python -m train` does, what it says going to a file in its folder."""
    directory = Path(point.config.run_dir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        log = (directory / LOG).open("a")
    except OSError as error:
        raise FileError(f"{directory} cannot be written: {error.strerror}; choose another output") from error
    jax.clear_caches()  # of the run before: its step is no other's
    try:
        with log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            exit_code = run(point.config, point.text)
    except NumericalError as error:
        run_directory.write(directory, {DIVERGED: f"{error}\n".encode()})
        return math.inf
    if exit_code:
        raise Stopped(exit_code)
    loss = final_loss(point)
    assert loss is not None, "a run that is done has evaluated its last step"
    return loss
