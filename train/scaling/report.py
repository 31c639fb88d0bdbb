"""What a sweep says: the best of each cell, the laws, a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.figure import Figure

from qwen_jax.errors import DataError
from train import directory as run_directory
from train.scaling import laws
from train.scaling.laws import Law, Optimum, Run
from train.scaling.points import Point

REPORT, TABLE, IMAGE = "report.json", "report.txt", "scaling.png"
_COLORS = ("#7a9cc6", "#b8323a", "#5a8f5a", "#c68b3a", "#6b6b6b")


@dataclass(frozen=True)
class Cell:
    """The runs of one size on one number of tokens, and the best there is between them."""

    size: int
    tokens: int
    runs: tuple[Run, ...]
    best: Optimum


@dataclass(frozen=True)
class Found:
    """All cells, and the laws through those that are beyond doubt; None where these are too few."""

    cells: tuple[Cell, ...]
    peak_lr: Law | None
    batch_tokens: Law | None


def find(points: Sequence[Point], losses: Sequence[float]) -> Found:
    """The cells and laws of runs. Raises DataError if all runs of a cell diverged."""
    runs: dict[tuple[int, int], list[Run]] = {}
    for point, loss in zip(points, losses, strict=True):
        run = Run(point.config.optimizer.peak_lr, point.config.tokens_per_step, loss)
        runs.setdefault((point.size, point.tokens), []).append(run)
    cells = []
    for (size, tokens), each in sorted(runs.items()):
        try:
            cells.append(Cell(size, tokens, tuple(sorted(each)), laws.optimum(each)))
        except ValueError as error:
            raise DataError(f"N = {size:,}, D = {tokens:,}: {error}; lower peak_lrs") from error
    sure = [cell for cell in cells if not cell.best.doubt]
    where = [cell.size for cell in sure], [cell.tokens for cell in sure]
    try:
        each = (laws.fit(*where, [getattr(cell.best, name) for cell in sure]) for name in ("peak_lr", "batch_tokens"))
        return Found(tuple(cells), *each)
    except ValueError:
        return Found(tuple(cells), None, None)


def check(found: Found) -> None:
    """Raises DataError, saying what to do, if there are no laws."""
    if found.peak_lr is None:
        doubts = [cell.best.doubt for cell in found.cells if cell.best.doubt]
        raise DataError(
            f"{len(doubts)} of {len(found.cells)} cells have no certain optimum ({'; '.join(dict.fromkeys(doubts))}), "
            f"and the others give no law; widen peak_lrs and batch_sizes and run again: what is trained stays"
        )


def as_json(found: Found) -> str:
    """Everything, for programs."""
    cells = [asdict(cell) | {"best": cell.best._asdict()} for cell in found.cells]
    for cell, values in zip(found.cells, cells, strict=True):
        finite = lambda loss: loss if math.isfinite(loss) else None
        values["runs"] = [run._asdict() | {"loss": finite(run.loss)} for run in cell.runs]
    fitted = {name: _law_json(getattr(found, name)) for name in ("peak_lr", "batch_tokens")}
    return json.dumps({"cells": cells, "laws": fitted, "confidence": laws.CONFIDENCE}, indent=1) + "\n"


def _law_json(law: Law | None) -> dict[str, object] | None:
    if law is None:
        return None
    names = ("log_coefficient", "n_exponent", "d_exponent")
    values: dict[str, object] = {name: getattr(law, name) for name in names}
    return (
        values
        | {"intervals": law.intervals and dict(zip(names, law.intervals, strict=True))}
        | {"residuals": law.residuals}
    )


def table(found: Found) -> str:
    """The cells and the laws, for people."""
    lines = [f"{'N':>12} {'D':>14} {'mu_opt':>10} {'B_opt':>9} {'loss':>8} {'error of mu':>12} {'of B':>7}"]
    errors = iter(zip(found.peak_lr.residuals, found.batch_tokens.residuals, strict=True)) if found.peak_lr else None
    for cell in found.cells:
        best = cell.best
        shown = (
            f"{cell.size:>12,} {cell.tokens:>14,} {best.peak_lr:>10.2e} {best.batch_tokens:>9,.0f} {best.loss:>8.4f}"
        )
        if best.doubt:
            shown += f"   in doubt: {best.doubt}"
        elif errors:
            shown += "".join(
                f"{math.expm1(error):>+{width}.0%}" for error, width in zip(next(errors), (13, 8), strict=True)
            )
        lines.append(shown)
    for name, law in (("mu_opt", found.peak_lr), ("B_opt", found.batch_tokens)):
        if law:
            lines.append(f"{name} = {_spell(law)}")
    return "\n".join(lines) + "\n"


def _spell(law: Law) -> str:
    text = f"{math.exp(law.log_coefficient):.3g} N^{law.n_exponent:.3f} D^{law.d_exponent:.3f}"
    if law.intervals:
        (_, n, d) = (f"{low:.3f} to {high:.3f}" for low, high in law.intervals)
        text += f"   ({laws.CONFIDENCE:.0%}: N^ {n}, D^ {d})"
    return text


def draw(found: Found, path: Path) -> None:
    """Both laws over the number of tokens, a line and its cells per size; open circles are in doubt."""
    figure = Figure(figsize=(9, 4.2), layout="constrained", dpi=150)
    for place, name, title in ((1, "peak_lr", "learning rate"), (2, "batch_tokens", "batch, tokens")):
        axes = figure.add_subplot(1, 2, place)
        for number, size in enumerate(sorted({cell.size for cell in found.cells})):
            color, cells = _COLORS[number % len(_COLORS)], [cell for cell in found.cells if cell.size == size]
            for doubt in (False, True):
                at = [(cell.tokens, getattr(cell.best, name)) for cell in cells if bool(cell.best.doubt) == doubt]
                face = "none" if doubt else color
                axes.plot(*zip(*at, strict=True) if at else ((), ()), "o", color=color, markerfacecolor=face)
            if law := getattr(found, name):
                span = [min(cell.tokens for cell in cells), max(cell.tokens for cell in cells)]
                axes.plot(span, [law(size, tokens) for tokens in span], color=color, label=f"N = {size:,}")
        axes.set(xscale="log", yscale="log", xlabel="D, tokens", ylabel=title)
        axes.set_title(f"best {title}", loc="left", fontweight="bold")
        axes.grid(color="#e6e6e6")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    if found.peak_lr:
        axes.legend(frameon=False)
    figure.savefig(path)


def write(folder: Path, found: Found) -> None:
    """Writes the report, for programs and for people, and the picture."""
    run_directory.write(folder, {REPORT: as_json(found).encode(), TABLE: table(found).encode()})
    draw(found, folder / IMAGE)
