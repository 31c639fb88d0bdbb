"""The log-probabilities that DPO's reference gives, computed once for all rows and kept beside the run's tokens."""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import jax
import numpy as np

from qwen_jax import sharding
from qwen_jax.errors import FileError
from qwen_jax.model import Params
from train import hosts, objectives
from train.alignment import DPO
from train.config import TrainConfig
from train.data import Rows
from train.feed import put_rows

FOLDER = "reference"


def is_wanted(config: TrainConfig) -> bool:
    """Whether a run computes them beforehand, and has no reference in memory then."""
    return isinstance(config.objective, DPO) and not config.compares


def attach(
    config: TrainConfig,
    rows: Mapping[str, Rows],
    directory: Path,
    load: Callable[[], Params],
    *,
    report: Callable[[str], None],
) -> None:
    """Gives rows a `reference` each, from a file of the run, which is made where there is none.

    Args:
      config: of the run, whose rows are the same at every start.
      rows: by the name of their file.
      directory: of the run.
      load: gives the parameters of the reference, which are let go of at the end.
      report: takes a line.

    All hosts compute them together, and the first writes. Raises FileError where a file cannot be written.
    """
    paths = {name: directory / FOLDER / f"{name}.npy" for name in rows}
    (missing, *_) = hosts.together(lambda: [name for name, path in paths.items() if not path.exists()])
    if missing:
        report(f"reference: what it says of {sum(rows[name].num_rows for name in missing):,} rows is computed once")
        params, compute = load(), objectives.log_probs(config)
        for name in missing:
            hosts.together(lambda name=name: _make(config, rows[name], paths[name], lambda x: compute(params, x)))
    for name, path in paths.items():
        rows[name].reference = np.load(path, mmap_mode="r")


def _make(config: TrainConfig, rows: Rows, path: Path, compute: Callable[[objectives.Batch], jax.Array]) -> None:
    """Writes the file, whole or not at all; what it holds is computed by all hosts."""
    said = _said(config, rows, compute)
    if jax.process_index():
        collections.deque(said, maxlen=0)
        return
    temporary = path.with_suffix(".partial")
    try:
        path.parent.mkdir(exist_ok=True)
        with temporary.open("wb") as file:
            shape = (rows.num_rows, config.data.sequence_length)
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for found in said:
                file.write(found.tobytes())
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError as error:
        if jax.process_count() > 1:  # the others compute what is left together with this one, and hear of it then
            collections.deque(said, maxlen=0)
        raise FileError(f"cannot write {path}: {error.strerror}; make room") from error


def _said(config: TrainConfig, rows: Rows, compute: Callable[[objectives.Batch], jax.Array]) -> Iterable[np.ndarray]:
    """What the reference says of all rows, in order, a micro-batch at a time."""
    order, size = sharding.balanced_columns(config.data.sequence_length), config.micro_batch_size
    names = ("tokens", "targets", "positions", "segments")
    for start in range(0, rows.num_rows, size):
        read = rows.of_epoch(range(start, min(start + size, rows.num_rows)))
        batch = put_rows({name: read[name] for name in names}, config, accumulation=1)
        values = np.asarray(compute(jax.tree.map(lambda x: x[0], batch)))[: len(read["tokens"])]
        found = np.empty_like(values)
        found[:, order] = values
        yield found
