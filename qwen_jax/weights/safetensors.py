"""The safetensors format, read strictly and written byte for byte as its own package does.

    8 bytes         length of the header, little endian
    header          JSON: name -> {"dtype", "shape", "data_offsets": [begin, end]}, and "__metadata__": text -> text
    data            the tensors, row by row, without gap or overlap

A header comes from strangers, so nothing in it is believed before it is checked against the size of the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import ml_dtypes
import numpy as np

from qwen_jax.errors import FileError, ModelError
from qwen_jax.weights import strict_json
from qwen_jax.weights.manifest import sync
from qwen_jax.weights.tensors import RegularFile, TensorInfo, quoted

METADATA = "__metadata__"
# In the order of the package, which sorts the tensors of a file by it.
DTYPES: Mapping[str, np.dtype] = MappingProxyType(
    {
        "BOOL": np.dtype(np.bool_),
        "U8": np.dtype(np.uint8),
        "I8": np.dtype(np.int8),
        "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
        "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
        "I16": np.dtype("<i2"),
        "U16": np.dtype("<u2"),
        "F16": np.dtype("<f2"),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "I32": np.dtype("<i4"),
        "U32": np.dtype("<u4"),
        "F32": np.dtype("<f4"),
        "F64": np.dtype("<f8"),
        "I64": np.dtype("<i8"),
        "U64": np.dtype("<u8"),
    }
)
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsFile(RegularFile):
    """A safetensors file (see TensorFile), open until close().

    Attributes:
      tensors: name -> TensorInfo, in the order of the header.
      metadata: what the file says about itself, such as {"format": "pt"}; None if it has no place for it.

    Raises ModelError if any part of the file is not as the format wants it, FileError if it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            header, data_start = self._read_header()
            self.metadata = _checked_metadata(header.pop(METADATA)) if METADATA in header else None
            parsed = {name: _checked_entry(name, entry) for name, entry in header.items()}
            _check_offsets({name: offsets for name, (_, offsets) in parsed.items()}, self.size - data_start)
        except ValueError as error:
            self.close()
            raise ModelError(f"{path} is not a valid safetensors file: {error}; download it again") from error
        except BaseException:
            self.close()
            raise
        self.tensors = {name: info for name, (info, _) in parsed.items()}
        self._offsets = {name: data_start + begin for name, (_, (begin, _)) in parsed.items()}

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        return self.read_array(self._offsets[name], self.tensors[name], index)

    def _read_header(self) -> tuple[dict[str, Any], int]:
        """The header, and where the data starts."""
        if self.size < 8:
            raise ValueError(f"it has {self.size} bytes, not even the 8 of a header's length")
        length = int.from_bytes(self.read_bytes(0, 8), "little")
        if not 2 <= length <= min(self.size - 8, strict_json.MAX_BYTES):
            raise ValueError(
                f"byte 0 says that the header has {length} bytes, where 2 to {strict_json.MAX_BYTES} are allowed "
                f"and {self.size - 8} are left"
            )
        return strict_json.loads(self.read_bytes(8, length)), 8 + length


class SafetensorsWriter:
    """Writes a safetensors file piece by piece; the file appears, whole, when the `with` block ends well.

    The layout is the order of `tensors`, for which package_order() gives the usual one. Until the end the bytes are in
    a hidden file next to `path`; leaving by an exception deletes it. Threads may write at the same time.

    Args:
      path: of the file; one that exists is replaced.
      tensors: name -> type of all that will be written.
      metadata: what the file says about itself; {"format": "pt"} lets transformers load it.

    Raises FileError if the system refuses, for example because the disk is full.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None) -> None:
        self.path = path
        self._partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        self._tensors = dict(tensors)
        self._written: dict[str, list[tuple[int, int]]] = {name: [] for name in tensors}  # rows: first, last + 1
        entries: dict[str, Any] = {} if metadata is None else {METADATA: dict(metadata)}
        begin = 0
        for name, info in tensors.items():
            offsets = [begin, begin := begin + info.nbytes]
            entries[name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": offsets}
        header = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
        header += b" " * (-len(header) % 8)
        self._header = len(header).to_bytes(8, "little") + header
        self._offsets = {name: len(self._header) + entries[name]["data_offsets"][0] for name in tensors}

    def __enter__(self) -> Self:
        try:
            self._descriptor = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        except OSError as error:
            raise self._refused(error) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            os.close(self._descriptor)
            self._partial.unlink(missing_ok=True)  # it has another name by now if all went well

    def write(self, name: str, array: np.ndarray, *, start: int = 0) -> None:
        """Writes rows [start, start + len(array)) of the first axis of a tensor; a scalar is written whole.

        Raises ValueError if the array does not fit the tensor, FileError if the disk is full.
        """
        info = self._tensors[name]
        rows = (start, start + (len(array) if array.ndim else 1))
        if array.dtype != info.dtype or array.shape[1:] != info.shape[1:] or array.ndim != len(info.shape):
            raise ValueError(f"{name} is {info.dtype}{list(info.shape)}, not {array.dtype}{list(array.shape)}")
        if not 0 <= rows[0] <= rows[1] <= _num_rows(info):
            raise ValueError(f"{name} has {_num_rows(info)} rows, not {rows[0]} to {rows[1]}")
        if array.size:
            position = self._offsets[name] + start * (array.nbytes // (rows[1] - rows[0]))
            self._write_bytes(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, position)
            self._written[name].append(rows)

    def _finish(self) -> None:
        for name, info in self._tensors.items():
            rows = sorted(self._written[name])
            starts, ends = [*(first for first, _ in rows), _num_rows(info)], [0, *(last for _, last in rows)]
            if info.nbytes and starts != ends:  # a gap or an overlap
                raise ValueError(f"{self.path}: the rows of {name} were not each written once")
        self._write_bytes(memoryview(self._header), 0)
        try:
            os.fsync(self._descriptor)
            self._partial.replace(self.path)
            sync(self.path.parent)
        except OSError as error:
            raise self._refused(error) from error

    def _write_bytes(self, data: memoryview, offset: int) -> None:
        while data:
            try:
                count = os.pwrite(self._descriptor, data, offset)
            except OSError as error:
                raise self._refused(error) from error
            data, offset = data[count:], offset + count

    def _refused(self, error: OSError) -> FileError:
        return FileError(f"{self.path} cannot be written: {error.strerror}")


def package_order(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """The names in the order in which the safetensors package lays tensors out: wide dtypes first, then by name."""
    ranks = {dtype: -rank for rank, dtype in enumerate(DTYPES.values())}
    return sorted(tensors, key=lambda name: (ranks[tensors[name].dtype], name))


def _num_rows(info: TensorInfo) -> int:
    return info.shape[0] if info.shape else 1


def _checked_metadata(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{METADATA} is not an object of strings")
    return metadata


def _checked_entry(name: str, entry: Any) -> tuple[TensorInfo, tuple[int, int]]:
    """Type and place in the data of a tensor; the two agree."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the entry of {quoted(name)} does not have dtype, shape, data_offsets and nothing else")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise ValueError(f"{quoted(name)} has dtype {quoted(kind)}, and known are {', '.join(DTYPES)}")
    if not isinstance(shape, list):
        raise ValueError(f"{quoted(name)} has a shape that is not a list")
    try:
        info = TensorInfo(shape=tuple(shape), dtype=DTYPES[kind])
    except ValueError as error:
        raise ValueError(f"{quoted(name)}: {error}") from None
    if not isinstance(offsets, list) or [type(offset) for offset in offsets] != [int, int]:
        raise ValueError(f"{quoted(name)} has data_offsets that are not two integers")
    if offsets[1] - offsets[0] != info.nbytes:
        raise ValueError(f"{quoted(name)} takes {info.nbytes} bytes and its data_offsets are {offsets}")
    return info, (offsets[0], offsets[1])


def _check_offsets(offsets: Mapping[str, tuple[int, int]], size: int) -> None:
    """Raises ValueError unless the tensors cover each byte of the data once."""
    position = 0
    for name, (begin, end) in sorted(offsets.items(), key=lambda item: item[1]):
        if begin != position:
            raise ValueError(f"{quoted(name)} starts at byte {begin} of the data where {position} is expected")
        position = end
    if position != size:
        raise ValueError(f"the header describes {position} bytes of data and the file has {size}")
