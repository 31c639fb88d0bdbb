"""What a run leaves for other programs: its best checkpoint as a published folder, or its adapter as PEFT has them."""

from __future__ import annotations

from pathlib import Path

import jax

from qwen_jax.weights.adapted import AdaptedModel
from qwen_jax.weights.convert import convert, write_adapter
from qwen_jax.weights.source import open_model
from train.config import Export
from train.progress import Report

EXPORT = "export"


def export(config: Export, checkpoint: Path, target: Path, report: Report) -> None:
    """Writes a checkpoint to the folder `target`, which appears when all of it is there; one that is there stays."""
    if target.exists():
        report.line(f"{target} is there already, and stays")
        return
    # By all processes, which verify together; the first writes.
    with open_model(checkpoint, warn=report.warn) as source:
        if jax.process_index():
            return
        if isinstance(source, AdaptedModel) and not config.merged:
            write_adapter(source, target)
        else:
            convert(source, target, to="hf", dtype=config.dtype, say=report.line)
    report.line(f"exported: {target}, of {checkpoint}")
