"""The way of a batch from the host to the mesh."""

from __future__ import annotations

import functools

import numpy as np

from qwen_jax import sharding
from train.data.rows import Rows
from train.objectives import Batch

TYPES = {"tokens": np.int32, "targets": np.int32, "positions": np.int32, "segments": np.int32, "weights": np.float32}


def put_batch(rows: Rows, step: int, *, accumulation: int) -> Batch:
    """Batch `step` on the current mesh, every array [accumulation, rows / accumulation, T].

    Micro-batch i holds rows [i, i + 1) * rows / accumulation, split over the mesh; each host reads only those that
    its devices hold.
    """
    size = rows.batch_size // accumulation

    @functools.cache  # devices that differ only in context or tensor hold the same rows
    def read(start: int, stop: int) -> dict[str, np.ndarray]:
        parts = [rows.batch(step, slice(i * size + start, i * size + stop)) for i in range(accumulation)]
        return {name: np.stack([part[name] for part in parts]) for name in TYPES}

    def part(name: str, index: tuple[slice, ...]) -> np.ndarray:
        micro, own, columns = index
        start, stop, _ = own.indices(size)
        return read(start, stop)[name][micro, :, columns]

    shape = (accumulation, size, rows.sequence_length)
    # "a" is no letter that is split: every device goes through all micro-batches.
    return {
        name: sharding.put(shape, dtype, "abt", functools.partial(part, name)) for name, dtype in TYPES.items()
    }
