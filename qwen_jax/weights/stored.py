"""The arrays of a checkpoint, a slice at a time: for what must not hold a whole array in memory.

Orbax keeps an array as Zarr 3, which TensorStore reads and writes; it has no way of its own to save an array in parts.
A checkpoint written here is one that Orbax loads: it writes the skeleton, and each array of it is then put in place of
a placeholder, uncompressed and in chunks of whole rows, one file each.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from orbax.checkpoint import v1 as ocp

from qwen_jax.errors import FileError, ModelError
from qwen_jax.weights.checkpoint import reason
from qwen_jax.weights.steps import ARRAYS

_OCDBT = "manifest.ocdbt"  # Orbax's default puts all arrays into one key-value store with this at its root


class StoredArrays:
    """Reads the arrays of an item of a checkpoint folder. Thread-safe.

    Args:
      folder: of the checkpoint.
      item: such as "params".
      shapes: path in the tree -> shape.
      dtype: of every array.
    """

    def __init__(self, folder: Path, item: str, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype) -> None:
        self._root, self._shapes, self._dtype = folder / ARRAYS / item, shapes, dtype
        self._packed = (self._root / _OCDBT).exists()
        self._open: dict[str, Any] = {}

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of the array at `path` in the tree. Raises ModelError if it cannot be read, or is another array."""
        try:
            if path not in self._open:
                array = ts.open({"driver": "zarr3", "kvstore": self._store(path)}, read=True).result()
                found, wanted = (array.dtype.numpy_dtype, array.shape), (self._dtype, self._shapes[path])
                if found != wanted:
                    raise ModelError(f"{self._root}: {path} is {_type(*found)}, and the model has {_type(*wanted)}")
                self._open[path] = array
            return self._open[path][index].read().result()
        except ValueError as error:  # TensorStore's errors have no class of their own
            raise ModelError(f"{self._root}: {path} cannot be read: {reason(error)}") from error

    def close(self) -> None:
        """Lets go of what has been opened."""
        self._open.clear()

    def _store(self, path: str) -> dict[str, Any]:
        if self._packed:
            return {"driver": "ocdbt", "base": {"driver": "file", "path": f"{self._root}/"}, "path": f"{path}/"}
        return {"driver": "file", "path": f"{self._root / path}/"}


class ArrayWriter:
    """Writes the arrays of an item of a new checkpoint folder, slice by slice. Thread-safe.

    Args:
      folder: of the checkpoint; its arrays are not there yet.
      item: such as "params".
      arrays: path in the tree -> (shape, dtype, chunk shape). A slice that is written covers whole chunks.
    """

    def __init__(
        self, folder: Path, item: str, arrays: Mapping[str, tuple[tuple[int, ...], np.dtype, tuple[int, ...]]]
    ) -> None:
        root = folder / ARRAYS
        context = ocp.Context()
        context.array.saving.use_ocdbt = False  # a plain file per chunk: nothing is rewritten as slices arrive
        context.array.saving.use_compression = False
        placeholders = {path: np.zeros((1,) * len(shape), dtype) for path, (shape, dtype, _) in arrays.items()}
        try:
            with context:
                ocp.save_checkpointables(str(root), {item: placeholders})
            self._open = {
                path: ts.open(_spec(root / item / path, *array), create=True, delete_existing=True).result()
                for path, array in arrays.items()
            }
        except ValueError as error:
            raise FileError(f"{root} cannot be written: {reason(error)}") from error

    def write(self, path: str, index: tuple[slice, ...], values: np.ndarray) -> None:
        """Puts a slice of the array at `path` on the disk. Raises FileError if there is no room."""
        try:
            self._open[path][index].write(values, can_reference_source_data_indefinitely=True).result()
        except ValueError as error:
            raise FileError(f"{path} cannot be written: {reason(error)}") from error


def _type(dtype: np.dtype, shape: tuple[int, ...]) -> str:
    return f"{dtype}{list(shape)}"


def _spec(path: Path, shape: tuple[int, ...], dtype: np.dtype, chunk: tuple[int, ...]) -> dict[str, Any]:
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{path}/"},
        "metadata": {
            "shape": shape,
            "data_type": str(dtype),
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        },
        "store_data_equal_to_fill_value": True,
        "context": {"file_io_sync": False},  # whoever seals the folder syncs each file, once
    }
