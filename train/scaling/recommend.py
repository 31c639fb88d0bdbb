"""The config of the run that a sweep was made for, with what its laws say."""

from __future__ import annotations

import os
from pathlib import Path

from qwen_jax import bindings
from train import directory as run_directory
from train.scaling.config import Scaling, Target
from train.scaling.laws import CONFIDENCE
from train.scaling.points import schedule, size_of, target_run
from train.scaling.report import Found

RECOMMENDED = "recommended.gin"


def recommend(config: Scaling, target: Target, found: Found) -> Path:
    """Writes a config that includes the target's and overrides the learning rate, the batch and the steps."""
    run, folder = target_run(target), Path(config.output)
    size, length = size_of(run.model_config), run.data.sequence_length
    whole = run.mesh.row_shards * run.accumulation  # rows that can be split as the run splits them
    rows = max(1, round(found.batch_tokens(size, target.tokens) / (length * whole))) * whole
    steps = max(1, round(target.tokens / (rows * length)))
    peak_lr = float(f"{found.peak_lr(size, target.tokens):.3g}")
    values = schedule(steps, peak_lr, rows, config.warmup) | {"run_dir": str(folder / "recommended")}
    bound = {binding.path: binding.text for binding in bindings.parse_set(target.changes)}
    bound |= {path: repr(value) for path, value in values.items()}
    lines = [f'include "{os.path.relpath(target.run, folder)}"', "", *_notes(found, size, target.tokens), ""]
    text = "\n".join([*lines, *(f"{path} = {value}" for path, value in bound.items())]) + "\n"
    run_directory.write(folder, {RECOMMENDED: text.encode()})
    return folder / RECOMMENDED


def _notes(found: Found, size: int, tokens: int) -> list[str]:
    """What the values rest on, as comments."""
    largest, most = max(cell.size for cell in found.cells), max(cell.tokens for cell in found.cells)
    notes = [f"# N = {size:,} and D = {tokens:,}: {size / largest:.3g} and {tokens / most:.3g} times the sweep's most"]
    for name, law in (("mu_opt", found.peak_lr), ("B_opt in tokens", found.batch_tokens)):
        between = law.interval(size, tokens)
        reach = f", {between[0]:.3g} to {between[1]:.3g} with {CONFIDENCE:.0%} confidence" if between else ""
        notes.append(f"# {name} = {law(size, tokens):.3g}{reach}")
    return notes
