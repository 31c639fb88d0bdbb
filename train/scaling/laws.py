"""The mathematics of a sweep: the best learning rate and batch of each cell, and power laws through them.

A cell is all runs of one model size N and one number of tokens D. Around its best run the loss is a quadratic in the
logarithms of both; over cells, log mu_opt = log c + n log N + d log D, and log B_opt likewise. The Qwen2.5 report
(arXiv 2412.15115, section 3.2) studies these two as functions of N and D; it publishes neither form nor coefficients.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95


class Run(NamedTuple):
    """What a run of a cell came to; a loss that is not finite is that of a run that diverged."""

    peak_lr: float
    batch_tokens: float
    loss: float


class Optimum(NamedTuple):
    """The best of a cell: the minimum of its quadratic or, where `doubt` says what speaks against it, its best run."""

    peak_lr: float
    batch_tokens: float
    loss: float
    doubt: str


@dataclass(frozen=True)
class Law:
    """c N^n D^d, fitted in logarithms.

    Attributes:
      log_coefficient, n_exponent, d_exponent: the fit.
      intervals: (low, high) of these three, with CONFIDENCE; None if there are no more cells than numbers.
      residuals: of each cell, log(found) - log(fitted).
      covariance: of the three numbers; None as above.
    """

    log_coefficient: float
    n_exponent: float
    d_exponent: float
    intervals: tuple[tuple[float, float], ...] | None
    residuals: tuple[float, ...]
    covariance: np.ndarray | None

    def __call__(self, size: float, tokens: float) -> float:
        """What it gives for a model of `size` parameters and so many tokens."""
        return math.exp(self.log_coefficient + self.n_exponent * math.log(size) + self.d_exponent * math.log(tokens))

    def interval(self, size: float, tokens: float) -> tuple[float, float] | None:
        """(low, high) of the fitted value there, with CONFIDENCE."""
        if self.covariance is None:
            return None
        at = np.array([1.0, math.log(size), math.log(tokens)])
        reach = student(len(self.residuals) - 3) * math.sqrt(at @ self.covariance @ at)
        return self(size, tokens) * math.exp(-reach), self(size, tokens) * math.exp(reach)


def optimum(runs: Sequence[Run]) -> Optimum:
    """The best learning rate and batch of a cell, between the runs next to its best one.

    Raises ValueError if all runs diverged.
    """
    there = [run for run in runs if math.isfinite(run.loss)]
    if not there:
        raise ValueError("every run diverged")
    best = min(there, key=lambda run: run.loss)
    axes = [sorted({run[axis] for run in runs}) for axis in (0, 1)]
    places = [axis.index(value) for axis, value in zip(axes, best, strict=False)]
    for name, axis, place in zip(("peak_lr", "batch"), axes, places, strict=True):
        if place in (0, len(axis) - 1):
            end = "lowest" if place == 0 else "highest"
            return Optimum(*best, doubt=f"the {end} {name} is the best")
    near = [axis[place - 1 : place + 2] for axis, place in zip(axes, places, strict=True)]
    used = np.array([run for run in there if run.peak_lr in near[0] and run.batch_tokens in near[1]])
    if len(used) < len(near[0]) * len(near[1]):
        return Optimum(*best, doubt="a run next to the best diverged or is missing")
    return _minimum(used, best)


def _minimum(used: np.ndarray, best: Run) -> Optimum:
    """That of the quadratic through the runs [m, 3] around the best one, in units of the logarithm's grid."""
    x, y = np.log(used[:, :2] / best[:2]).T
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=1)
    c, gx, gy, xx, xy, yy = np.linalg.lstsq(terms, used[:, 2], rcond=None)[0]
    curvature = np.array([[2 * xx, xy], [xy, 2 * yy]])
    if np.linalg.eigvalsh(curvature)[0] <= 0:
        return Optimum(*best, doubt="the loss around the best run has no minimum")
    at = -np.linalg.solve(curvature, [gx, gy])
    if not (x.min() <= at[0] <= x.max() and y.min() <= at[1] <= y.max()):
        return Optimum(*best, doubt="the minimum lies beyond the runs next to the best")
    loss = c + (gx * at[0] + gy * at[1]) / 2
    return Optimum(best.peak_lr * math.exp(at[0]), best.batch_tokens * math.exp(at[1]), float(loss), doubt="")


def fit(sizes: Sequence[float], tokens: Sequence[float], values: Sequence[float]) -> Law:
    """The law through `values` of cells, by least squares of logarithms, each cell with the same weight.

    Raises ValueError if the cells cannot tell size and tokens apart.
    """
    terms = np.stack([np.ones(len(sizes)), np.log(sizes), np.log(tokens)], axis=1)
    logs = np.log(values)
    # Centred: whether cells differ in both does not depend on how large both are.
    if len(sizes) < 3 or np.linalg.matrix_rank(terms[:, 1:] - terms[:, 1:].mean(axis=0), tol=1e-6) < 2:
        raise ValueError(f"{len(sizes)} cells that do not differ in both size and tokens give no law")
    numbers = np.linalg.lstsq(terms, logs, rcond=None)[0]
    residuals = logs - terms @ numbers
    free = len(sizes) - 3
    covariance, intervals = None, None
    if free:
        covariance = np.linalg.inv(terms.T @ terms) * (residuals @ residuals / free)
        reach = student(free) * np.sqrt(np.diag(covariance))
        intervals = tuple((float(a - r), float(a + r)) for a, r in zip(numbers, reach, strict=True))
    return Law(*map(float, numbers), intervals, tuple(map(float, residuals)), covariance)


@functools.cache
def student(freedom: int) -> float:
    """How many standard errors an interval with CONFIDENCE reaches to each side: a quantile of Student's t.

    With t = sqrt(freedom) tan(a), the density of the angle a is proportional to cos(a) ** (freedom - 1).
    """
    angles = np.linspace(0, math.pi / 2, 100_001)
    density = np.cos(angles) ** (freedom - 1)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(float(np.interp(CONFIDENCE * mass[-1], mass, angles)))
