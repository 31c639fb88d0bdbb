"""Runs of a config with some fields changed, for benchmarks that compare what was really trained."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qwen_jax import bindings
from qwen_jax.weights.checkpoint import Checkpoints
from train import directory as run_directory
from train.config import TrainConfig
from train.run import run

QUICKSTART = Path("configs/quickstart.gin")
GREY = "#6b6b6b"


def train(run_dir: Path, changes: Mapping[str, object], config_file: Path = QUICKSTART) -> None:
    """Trains as `python -m train CONFIG.gin --set ...` does, unless all steps of that very run are done."""
    spell = lambda value: value if isinstance(value, str) and value.startswith("@") else repr(value)
    lines = [f"{path} = {spell(value)}" for path, value in {"run_dir": str(run_dir), **changes}.items()]
    config, origins = bindings.resolve(TrainConfig, [*bindings.read(config_file), *bindings.parse_set(lines)])
    run_directory.check_same_run(run_dir, config)
    if config.steps in Checkpoints(run_dir / "checkpoints", warn=print).steps():
        return
    if exit_code := run(config, bindings.render(config, origins)):
        sys.exit(exit_code)


def picture() -> tuple[Figure, Axes]:
    """An empty picture in the style of loss.png."""
    figure = Figure(figsize=(8, 4.5), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    axes.grid(axis="y", color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def write_measured(page: Path, measured: str, heading: str = "Measured") -> None:
    """Puts what was measured in the place of what stands under a heading of a page, up to the next heading."""
    before, title, rest = page.read_text().partition(f"## {heading}\n")
    assert title, f"{page} has no heading {heading}"
    _, following, after = rest.partition("\n## ")
    page.write_text(before + title + measured + following + after)
