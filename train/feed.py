"""The way of a batch from the host to the mesh."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from qwen_jax import sharding
from train.config import TrainConfig
from train.data import Rows
from train.data.mixture import MixedRows
from train.objectives import Batch, inputs


class Reading:
    """The batches of a run on text, which are the same whatever its weights are."""

    def __init__(self, rows: Rows | MixedRows, config: TrainConfig) -> None:
        self._rows, self._config = rows, config

    def batch(self, step: int, state: Any, frozen: Any) -> tuple[Batch, Mapping[str, float]]:
        """Batch `step` on the current mesh, and what is known of it beforehand, which is nothing."""
        return put_batch(self._rows, step, self._config), {}

    def files(self, step: int) -> Mapping[str, bytes]:
        """What a checkpoint keeps of it."""
        return {}


def put_batch(rows: Rows | MixedRows, step: int, config: TrainConfig) -> Batch:
    """Batch `step` on the current mesh, every array [accumulation, rows of a micro-batch, T].

    Columns are in the order of `sharding.balanced_columns`. Each host reads only the rows that its devices hold.
    """
    size, accumulation, types = config.micro_batch_size, config.accumulation, inputs(config)

    @functools.cache  # devices that differ only in context or tensor hold the same rows, and there are five arrays
    def read(start: int, stop: int) -> dict[str, np.ndarray]:
        parts = [rows.batch(step, slice(i * size + start, i * size + stop)) for i in range(accumulation)]
        return {name: np.stack([part[name] for part in parts]) for name in types}

    return _put(read, (accumulation, size, config.data.sequence_length), types)


def put_rows(rows: Mapping[str, np.ndarray], config: TrainConfig, *, accumulation: int) -> Batch:
    """Rows [rows, T] of this process as a batch, in as few micro-batches as hold them.

    Their number is `accumulation`, or that divided by 2, 4, ...: few shapes are compiled.
    """
    size, count = config.micro_batch_size, len(rows["tokens"])
    while accumulation % 2 == 0 and accumulation // 2 * size >= count:
        accumulation //= 2
    shape = (accumulation, size, config.data.sequence_length)
    whole = {name: np.zeros((accumulation * size, shape[2]), x.dtype) for name, x in rows.items()}
    for name, x in rows.items():
        whole[name][:count] = x
    parts = {name: x.reshape(shape) for name, x in whole.items()}
    types = {name: x.dtype.type for name, x in rows.items()}
    return _put(lambda start, stop: {name: x[:, start:stop] for name, x in parts.items()}, shape, types)


def _put(
    read: Callable[[int, int], Mapping[str, np.ndarray]], shape: tuple[int, int, int], types: Mapping[str, type]
) -> Batch:
    """Arrays of a shape, of which `read` gives some rows of every micro-batch."""
    order = sharding.balanced_columns(shape[2])

    def part(name: str, index: tuple[slice, ...]) -> np.ndarray:
        micro_batches, own, columns = index
        start, stop, _ = own.indices(shape[1])
        return read(start, stop)[name][micro_batches][..., order[columns]]

    # No axis splits "a": every device goes through all micro-batches.
    return {name: sharding.put(shape, dtype, "abt", functools.partial(part, name)) for name, dtype in types.items()}


def abstract_batch(config: TrainConfig) -> dict[str, Any]:
    """Shapes, dtypes and shardings of what `put_batch` returns, with what is read beside completions as "text"."""
    shape = (config.accumulation, config.micro_batch_size, config.data.sequence_length)
    split = jax.NamedSharding(jax.sharding.get_mesh(), sharding.activation("abt", shape))
    batch: dict[str, Any] = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=split) for name, dtype in inputs(config).items()
    }
    return batch | ({"text": abstract_batch(config.text_config)} if config.text_config else {})
