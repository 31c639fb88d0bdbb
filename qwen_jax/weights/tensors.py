"""What every kind of tensor file offers, and how a part of a tensor is read.

Files are read by position, not mapped into memory: a file that shrinks under a map kills the process, here it is an
error; and pages of a map count against a memory limit. Positional reads need no lock, so threads can share a file.
"""

from __future__ import annotations

import dataclasses
import math
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, Self

import numpy as np

from qwen_jax.errors import FileError, ModelError

MAX_RANK = 32  # of every NumPy
MAX_BYTES = 2**63 - 1
PAGE_BYTES = 4096  # the disk gives no less, so shorter runs are read together with what lies between them
BLOCK_BYTES = 16 * 2**20  # and no more than this of it at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """The type of one tensor. Raises ValueError if no array can have that shape.

    Attributes:
      shape: sizes of its axes, none for a scalar.
      dtype: of NumPy, or of ml_dtypes for bfloat16 and float8.
    """

    shape: tuple[int, ...]
    dtype: np.dtype

    def __post_init__(self) -> None:
        if len(self.shape) > MAX_RANK:
            raise ValueError(f"a shape has {len(self.shape)} axes and {MAX_RANK} is the limit")
        if not all(type(size) is int and size >= 0 for size in self.shape):
            raise ValueError("a shape holds something other than integers >= 0")
        # Sizes of 0 count as 1, since NumPy computes strides for empty arrays too.
        if math.prod(max(size, 1) for size in self.shape) * self.dtype.itemsize > MAX_BYTES:
            raise ValueError("a shape has more elements than fit in memory")

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile(Protocol):
    """Named tensors on disk."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The type of every tensor by name, in the order of the file."""
        ...

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A tensor, or the part of it that `index` selects, as a new contiguous array.

        Args:
          name: a key of `tensors`.
          index: slices of step 1, one per axis; the last axes may be left out and are then whole.

        Raises:
          ModelError: the file has become shorter since it was opened.
          FileError: the system cannot read it.
        """
        ...


class RegularFile:
    """A file that is open for reads by position; threads may share it.

    Raises FileError if it cannot be opened, ModelError if it is a folder, a pipe or a device.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # else the open waits for a pipe's writer
        except OSError as error:
            raise FileError(f"{path} cannot be read: {error.strerror}") from error
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise ModelError(f"{path} is not a regular file, and only those can hold weights")
        self.size = status.st_size

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1  # so that a late read cannot hit a descriptor that was given out again

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read_bytes(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset` on. Raises ModelError if the file ends before."""
        buffer = bytearray(count)
        self._read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def read_array(self, offset: int, info: TensorInfo, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The part `index` of the tensor whose elements lie row by row from `offset` on, as a new array."""
        width = info.dtype.itemsize
        bounds = _bounds(info.shape, index)
        # Bytes become a last axis: not every dtype has a buffer that can be read into.
        out = np.empty((*(stop - start for start, stop in bounds), width), np.uint8)
        if out.size:
            self._read_part(out, offset, (*info.shape, width), (*bounds, (0, width)))
        return out.view(info.dtype).reshape(out.shape[:-1])

    def _read_part(self, out: np.ndarray, offset: int, shape: Sequence[int], bounds: Sequence[tuple[int, int]]) -> None:
        """Fills `out` with the part `bounds` of the array of bytes that has `shape` and starts at `offset`."""
        row = math.prod(shape[1:])
        offset += bounds[0][0] * row
        if out[0].nbytes == row:
            self._read_into(out.data.cast("B"), offset)
        elif len(out) == 1 or row > BLOCK_BYTES or _run(shape[1:], bounds[1:]) >= PAGE_BYTES:
            for part, position in zip(out, range(offset, offset + len(out) * row, row), strict=True):
                self._read_part(part, position, shape[1:], bounds[1:])
        else:
            rows = BLOCK_BYTES // row
            cut = tuple(slice(*pair) for pair in bounds[1:])
            for first in range(0, len(out), rows):
                part = out[first : first + rows]
                block = np.empty((len(part), *shape[1:]), np.uint8)
                self._read_into(block.data.cast("B"), offset + first * row)
                part[...] = block[:, *cut]

    def _read_into(self, buffer: memoryview, offset: int) -> None:
        while buffer:
            try:
                count = os.preadv(self._descriptor, [buffer], offset)
            except OSError as error:
                raise FileError(f"{self.path} cannot be read: {error.strerror}") from error
            if count == 0:
                raise ModelError(f"{self.path} ends at byte {offset}, {len(buffer)} bytes early: download it again")
            buffer, offset = buffer[count:], offset + count


def quoted(name: object) -> str:
    """A name out of a file, fit for one line of a message."""
    text = repr(name)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _bounds(shape: Sequence[int], index: Sequence[slice]) -> list[tuple[int, int]]:
    """First and last + 1 of what `index` selects on each axis."""
    if len(index) > len(shape):
        raise ValueError(f"{len(index)} slices for a tensor of {len(shape)} axes")
    bounds = []
    for size, part in zip(shape, (*index, *[slice(None)] * (len(shape) - len(index))), strict=True):
        start, stop, step = part.indices(size)
        if step != 1:
            raise ValueError(f"a slice of step {step}; tensor files are read with step 1")
        bounds.append((start, max(start, stop)))
    return bounds


def _run(shape: Sequence[int], bounds: Sequence[tuple[int, int]]) -> int:
    """Length of the stretches without a gap that `bounds` selects in an array of bytes."""
    run = 1
    for size, (start, stop) in zip(reversed(shape), reversed(bounds), strict=True):
        run *= stop - start
        if stop - start < size:
            break
    return run
