"""PyTorch `.bin` files of version 1.6 and later, read without PyTorch and without running what they hold.

torch.save writes a zip archive: `NAME/data.pkl` is a pickle that describes the tensors, `NAME/data/KEY` are their
storages, little endian. The pickle is read by torch_pickle, the archive by zip_directory; both know no more than
dictionaries of dense tensors need. What lies outside that is refused, and never tried in a weaker way.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np

from qwen_jax.errors import ModelError
from qwen_jax.weights.tensors import RegularFile, TensorInfo, quoted
from qwen_jax.weights.torch_pickle import Storage, StoredTensor, parse_state
from qwen_jax.weights.zip_directory import ZipEntry, data_offset, read_directory

MAX_PICKLE_BYTES = 8 * 2**20  # 10,000 tensors take 2
_ENTRY_NAME = re.compile(
    r"data\.pkl|data/[0-9]+|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id", re.ASCII
)


class TorchFile(RegularFile):
    """A state dict in a file of torch.save (see TensorFile), open until close().

    Attributes:
      tensors: name -> TensorInfo, in the order of the state dict. Tied tensors are there under each of their names.

    Raises ModelError if the file holds anything but dense tensors by name, FileError if it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            if self.size < 4 or self.read_bytes(0, 4) != b"PK\3\4":
                raise ValueError("it is not a zip archive, so PyTorch before 1.6 wrote it or no PyTorch at all")
            entries = _strip_folder(read_directory(self))
            self._stored = parse_state(self._read_pickle(entries))
            storages = {tensor.storage for tensor in self._stored.values()}
            self._starts = {storage: self._find(storage, entries) for storage in storages}
        except ValueError as error:
            self.close()
            message = f"{path} cannot be read as PyTorch weights: {error}; use these weights as safetensors"
            raise ModelError(message) from error
        except BaseException:
            self.close()
            raise
        self.tensors = {name: tensor.info for name, tensor in self._stored.items()}

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        tensor = self._stored[name]
        dtype = tensor.info.dtype
        start = self._starts[tensor.storage] + tensor.offset * dtype.itemsize
        if _is_row_major(tensor):
            return self.read_array(start, tensor.info, index)
        # Another order of the axes is rare in published files, so all that the tensor spans is read for any part of it.
        last = sum((size - 1) * stride for size, stride in zip(tensor.info.shape, tensor.strides, strict=True))
        span = self.read_array(start, TensorInfo(shape=(last + 1,), dtype=dtype))
        strides = [stride * dtype.itemsize for stride in tensor.strides]
        return np.lib.stride_tricks.as_strided(span, tensor.info.shape, strides)[index].copy("C")

    def _read_pickle(self, entries: dict[str, ZipEntry]) -> bytes:
        if "data.pkl" not in entries:
            raise ValueError("the archive has no data.pkl")
        if "byteorder" in entries and self._contents(entries["byteorder"], 6) != b"little":
            raise ValueError("its numbers are not little endian")
        return self._contents(entries["data.pkl"], MAX_PICKLE_BYTES)

    def _contents(self, entry: ZipEntry, limit: int) -> bytes:
        if entry.size > limit:
            raise ValueError(f"{entry.name} has {entry.size} bytes, where {limit} is the limit")
        return self.read_bytes(data_offset(self, entry), entry.size)

    def _find(self, storage: Storage, entries: dict[str, ZipEntry]) -> int:
        """Where a storage starts in the file."""
        entry = entries.get(f"data/{storage.key}")
        if entry is None:
            raise ValueError(f"the archive has no storage {quoted(storage.key)}")
        if storage.size * storage.dtype.itemsize != entry.size:
            raise ValueError(
                f"storage {storage.key} has {entry.size} bytes, not {storage.size} elements of {storage.dtype}"
            )
        return data_offset(self, entry)


def _strip_folder(entries: dict[str, ZipEntry]) -> dict[str, ZipEntry]:
    """The entries by their names inside the one top folder of the archive."""
    folders = {name.partition("/")[0] for name in entries}
    if len(folders) != 1:
        raise ValueError(f"the archive has {len(folders)} folders at its top and torch.save makes one")
    inside = {name.partition("/")[2]: entry for name, entry in entries.items()}
    for name, entry in inside.items():
        if not _ENTRY_NAME.fullmatch(name):
            raise ValueError(f"the archive has an entry {quoted(entry.name)}, which a state dict does not need")
    return inside


def _is_row_major(tensor: StoredTensor) -> bool:
    shape = tensor.info.shape
    dense = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    # The stride of an axis of one element says nothing, and neither does any stride of an empty tensor.
    return not tensor.info.nbytes or all(
        size == 1 or stride == wanted for size, stride, wanted in zip(shape, tensor.strides, dense, strict=True)
    )
