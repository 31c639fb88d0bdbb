"""loss.png: the curves of a run, a loss beside what the simplest models reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from train.record import METRICS, rows

IMAGE = "loss.png"
# Of reinforcement learning the first four that there are: name, title, unit.
_PANELS = (
    ("reward", "reward", ""),
    ("completion_tokens", "length of completions", "tokens"),
    ("kl", "divergence from the reference", "nats per token"),
    ("entropy", "entropy", "nats per token"),
    ("log_ratio", "log-ratio to the reference", "nats per token"),
    ("margin", "margin of preferred completions", ""),
)
_TRAIN, _HELD_OUT, _GREY = "#7a9cc6", "#b8323a", "#6b6b6b"
_SMOOTHED_POINTS = 100  # the training curve is averaged to about this many: a single batch says little


def draw(directory: Path, *, entropies: tuple[float, float] | None) -> None:
    """Draws the metrics.jsonl of a run directory to loss.png there.

    Args:
      directory: the run directory.
      entropies: (unigram, bigram) of the held-out text in nats per token; None if there is no such text.
    """
    table = list(rows(directory / METRICS))
    if any("reward" in row for row in table):
        figure = Figure(figsize=(12, 7), layout="constrained", dpi=150)
        _draw_rewards(figure, table)
        figure.suptitle(directory.resolve().name, x=0.01, ha="left", fontweight="bold")
        return _save(figure, directory)
    train = np.array([(row["step"], row["loss"]) for row in table if "loss" in row]).reshape(-1, 2)
    held_out = np.array([(row["step"], row["held_out_loss"]) for row in table if "held_out_loss" in row]).reshape(-1, 2)
    accuracy = [(row["step"], row["held_out_accuracy"]) for row in table if "held_out_accuracy" in row]
    figure = Figure(figsize=(12 if accuracy else 8, 4.5), layout="constrained", dpi=150)
    axes = figure.add_subplot(1, 2 if accuracy else 1, 1)
    axes.plot(*train.T, color=_TRAIN, alpha=0.3, linewidth=0.8)
    axes.plot(*_averaged(train).T, color=_TRAIN, linewidth=2, label="training")
    axes.plot(*held_out.T, color=_HELD_OUT, linewidth=2, marker="o", markersize=4, label="held out")
    if len(held_out):
        step, loss = held_out[-1]
        axes.annotate(f"{loss:.2f}", (step, loss), (6, 0), textcoords="offset points", va="center", color=_HELD_OUT)
    if entropies:
        for name, entropy in zip(("unigram", "bigram"), entropies, strict=True):
            axes.axhline(entropy, color=_GREY, linewidth=1, linestyle=(0, (5, 4)))
            axes.text(
                1.01,
                entropy,
                f"{name}\nentropy\n{entropy:.2f}",
                transform=axes.get_yaxis_transform(),
                va="center",
                color=_GREY,
            )
    axes.set_title(f"{directory.resolve().name}: loss", loc="left", fontweight="bold")
    axes.set(xlabel="step", ylabel="nats" if accuracy else "nats per token", xlim=(0, None))
    axes.legend(frameon=False, loc="upper right")
    if accuracy:
        _draw_accuracy(figure.add_subplot(1, 2, 2), np.array(accuracy))
    _save(figure, directory)


def _save(figure: Figure, directory: Path) -> None:
    for each in figure.axes:
        each.grid(axis="y", color="#e6e6e6")
        each.set_axisbelow(True)
        each.spines[["top", "right"]].set_visible(False)
    figure.savefig(directory / IMAGE)


def _draw_rewards(figure: Figure, table: Sequence[Mapping[str, float]]) -> None:
    """What is watched in reinforcement learning: rewards, and whether the model stays what it was."""
    there = [panel for panel in _PANELS if any(panel[0] in row for row in table)][:4]
    for place, (name, title, unit) in enumerate(there, 1):
        axes = figure.add_subplot(2, 2, place)
        points = lambda key: np.array([(row["step"], row[key]) for row in table if key in row]).reshape(-1, 2)
        train, held_out = points(name), points(f"held_out_{name}")
        axes.plot(*train.T, color=_TRAIN, alpha=0.3, linewidth=0.8)
        axes.plot(*_averaged(train).T, color=_TRAIN, linewidth=2, label="training")
        if len(held_out):
            axes.plot(*held_out.T, color=_HELD_OUT, linewidth=2, marker="o", markersize=4, label="held out")
            axes.legend(frameon=False)
        axes.set_title(title, loc="left", fontweight="bold")
        axes.set(xlabel="step", ylabel=unit, xlim=(0, None))


def _draw_accuracy(axes: Axes, points: np.ndarray) -> None:
    """How often what is preferred has the higher value, beside chance."""
    axes.plot(*points.T, color=_HELD_OUT, linewidth=2, marker="o", markersize=4, label="held out")
    axes.axhline(0.5, color=_GREY, linewidth=1, linestyle=(0, (5, 4)))
    axes.set_title("accuracy", loc="left", fontweight="bold")
    axes.set(xlabel="step", xlim=(0, None), ylim=(0, 1.02))


def _averaged(points: np.ndarray) -> np.ndarray:
    """Means of equally many neighbouring points [n, 2], each at the mean of their steps."""
    size = max(1, len(points) // _SMOOTHED_POINTS)
    return np.array([points[i : i + size].mean(axis=0) for i in range(0, len(points), size)]).reshape(-1, 2)
