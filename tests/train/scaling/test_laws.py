"""Laws that were planted are found again, and what is no optimum is not taken for one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.scaling.laws import Run, fit, optimum, student

LRS, BATCHES = [1e-3 * 2**i for i in range(6)], [256 * 2**i for i in range(5)]
CELLS = [(size, tokens) for size in (1e5, 4e5, 2e6) for tokens in (1e6, 3e6, 2e7)]
exponents = st.floats(-1, 1)


def bowl(peak_lr, batch, *, across=0.0):
    """The runs of a cell whose loss is a quadratic in logarithms around an optimum."""
    runs = []
    for lr in LRS:
        for rows in BATCHES:
            x, y = math.log(lr / peak_lr), math.log(rows / batch)
            runs.append(Run(lr, rows, 2 + 0.05 * x * x + 0.02 * y * y + across * x * y))
    return runs


@given(st.floats(0.3, 0.7), st.floats(0.3, 0.7), st.floats(-0.03, 0.03))
@settings(max_examples=30)
def test_a_planted_optimum_is_found(x, y, across):
    lr, batch = LRS[0] * (LRS[-1] / LRS[0]) ** x, BATCHES[0] * (BATCHES[-1] / BATCHES[0]) ** y
    runs = bowl(lr, batch, across=across)
    best = optimum(runs)
    if not best.doubt:  # a tilted bowl may have its best run further off
        assert best[:3] == pytest.approx((lr, batch, 2.0), rel=1e-6)
    else:
        assert best[:3] == min(runs, key=lambda run: run.loss) and abs(across) > 0.01


def test_what_is_no_optimum_is_doubted():
    highest = bowl(LRS[-1] * 4, BATCHES[2])
    assert optimum(highest).doubt == "the highest peak_lr is the best"
    assert optimum(bowl(LRS[2], BATCHES[0] / 4)).doubt == "the lowest batch is the best"
    runs = bowl(LRS[2], BATCHES[2])
    diverged = [run._replace(loss=math.nan) if run.peak_lr > LRS[2] else run for run in runs]
    assert "diverged" in optimum(diverged).doubt and optimum(diverged).peak_lr == LRS[2]
    far = [run._replace(loss=math.inf) if run.peak_lr > LRS[3] else run for run in runs]
    assert not optimum(far).doubt, "what diverges elsewhere says nothing"
    # Next to the best run, which alone is low, it falls in two directions and rises in two.
    twist = lambda run: math.log(run[0] / LRS[2]) * math.log(run[1] / BATCHES[2])
    saddle = [run._replace(loss=-0.5 if run[:2] == (LRS[2], BATCHES[2]) else max(-0.49, twist(run))) for run in runs]
    assert optimum(saddle).doubt == "the loss around the best run has no minimum"
    with pytest.raises(ValueError, match="every run diverged"):
        optimum([run._replace(loss=math.inf) for run in runs])


@given(st.floats(1e-3, 1e3), exponents, exponents)
@settings(max_examples=30)
def test_a_planted_law_is_found_with_no_residual(coefficient, n, d):
    law = fit(*zip(*CELLS, strict=True), [coefficient * size**n * tokens**d for size, tokens in CELLS])
    assert (law.log_coefficient, law.n_exponent, law.d_exponent) == pytest.approx(
        (math.log(coefficient), n, d), abs=1e-8
    )
    assert np.abs(law.residuals).max() < 1e-8
    assert law(3e7, 1e9) == pytest.approx(coefficient * 3e7**n * 1e9**d, rel=1e-6)


def test_intervals_hold_what_was_planted_as_often_as_they_say():
    draw, sizes, tokens = np.random.default_rng(0), *zip(*CELLS, strict=True)
    inside = []
    for _ in range(400):
        law = fit(sizes, tokens, [size**-0.3 * count**0.2 * math.exp(draw.normal(0, 0.1)) for size, count in CELLS])
        low, high = law.interval(1e8, 1e9)
        held = [
            low < 1e8**-0.3 * 1e9**0.2 < high,
            *(a < x < b for (a, b), x in zip(law.intervals, (0, -0.3, 0.2), strict=True)),
        ]
        inside.append(held)
    # Four standard errors of a share of 95 % in 400 draws.
    assert np.abs(np.mean(inside, axis=0) - 0.95).max() < 4 * math.sqrt(0.95 * 0.05 / 400)


def test_cells_that_cannot_tell_size_from_tokens_give_no_law():
    for cells in (CELLS[:2], [(size, 20 * size) for size, _ in CELLS], [(1e5, tokens) for _, tokens in CELLS]):
        with pytest.raises(ValueError, match="give no law"):
            fit(*zip(*cells, strict=True), [1.0] * len(cells))
    exact = fit(*zip(*(CELLS[0], CELLS[1], CELLS[3]), strict=True), [1.0, 2.0, 3.0])
    assert exact.intervals is None and exact.interval(1e6, 1e6) is None


@pytest.mark.parametrize(("freedom", "value"), [(1, 12.7062), (2, 4.30265), (10, 2.22814), (1000, 1.96234)])
def test_quantiles_are_those_of_the_tables(freedom, value):
    assert student(freedom) == pytest.approx(value, rel=1e-5)
