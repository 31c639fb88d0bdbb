"""The way of a batch from the host to the mesh."""

from __future__ import annotations

import functools

import jax
import numpy as np

from qwen_jax import sharding
from train.config import LM, TrainConfig
from train.data import Rows
from train.data.mixture import MixedRows
from train.objectives import Batch

_TYPES = {"tokens": np.int32, "targets": np.int32, "positions": np.int32, "segments": np.int32, "weights": np.float32}
_OF_JUDGED = {"labels": np.int32, "groups": np.int32}


def _types(config: TrainConfig) -> dict[str, type]:
    return _TYPES if isinstance(config.objective, LM) else _TYPES | _OF_JUDGED


def put_batch(rows: Rows | MixedRows, step: int, config: TrainConfig) -> Batch:
    """Batch `step` on the current mesh, every array [accumulation, rows of a micro-batch, T].

    Columns are in the order of `sharding.balanced_columns`. Each host reads only the rows that its devices hold.
    """
    size, accumulation, types = config.micro_batch_size, config.accumulation, _types(config)
    order = sharding.balanced_columns(config.data.sequence_length)

    @functools.cache  # devices that differ only in context or tensor hold the same rows, and there are five arrays
    def read(start: int, stop: int) -> dict[str, np.ndarray]:
        parts = [rows.batch(step, slice(i * size + start, i * size + stop)) for i in range(accumulation)]
        return {name: np.stack([part[name] for part in parts]) for name in types}

    def part(name: str, index: tuple[slice, ...]) -> np.ndarray:
        micro_batches, own, columns = index
        start, stop, _ = own.indices(size)
        return read(start, stop)[name][micro_batches][..., order[columns]]

    shape = (accumulation, size, config.data.sequence_length)
    # No axis splits "a": every device goes through all micro-batches.
    return {name: sharding.put(shape, dtype, "abt", functools.partial(part, name)) for name, dtype in types.items()}


def abstract_batch(config: TrainConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of what `put_batch` returns."""
    shape = (config.accumulation, config.micro_batch_size, config.data.sequence_length)
    split = jax.NamedSharding(jax.sharding.get_mesh(), sharding.activation("abt", shape))
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=split) for name, dtype in _types(config).items()}
