"""Where converted weights go: a published folder, or a checkpoint of this library. Both are written in pieces."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.errors import FileError
from qwen_jax.weights import hf, manifest
from qwen_jax.weights.safetensors import SafetensorsWriter
from qwen_jax.weights.source import INDEX, Piece, piece_rows, stacked_shapes
from qwen_jax.weights.stored import ArrayWriter
from qwen_jax.weights.tensors import TensorInfo

SHARD_BYTES = 5 * 10**9  # of one file, as other tools have it


class Sink(Protocol):
    """Takes every piece of a model once, from any thread.

    A context manager: what is written is complete when the `with` block has ended well, and nothing stays open if not.
    """

    def write(self, piece: Piece, values: np.ndarray) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None: ...


class PublishedSink:
    """Writes safetensors files, their index, and the files beside them.

    Args:
      folder: empty.
      table: the tensors.
      dtypes: of each tensor, by name.
      layout: file -> {"metadata": ..., "tensors": names in order}, to write the same files again; None for our own.
      side_files: name -> contents.
    """

    def __init__(
        self,
        folder: Path,
        table: Sequence[hf.Tensor],
        dtypes: Mapping[str, np.dtype],
        *,
        layout: Mapping[str, Mapping[str, Any]] | None,
        side_files: Mapping[str, bytes],
    ) -> None:
        self._folder, self._side_files = folder, dict(side_files)
        infos = {tensor.name: TensorInfo(shape=tensor.shape, dtype=dtypes[tensor.name]) for tensor in table}
        if layout is None:
            layout = default_layout(infos)
            self._side_files.pop(INDEX, None)
            if len(layout) > 1:
                self._side_files[INDEX] = _index(layout, infos)
        # A file may hold the head of a model whose head is its embedding: the same values under a second name.
        self._second = {name: table[0] for file in layout.values() for name in file["tensors"] if name not in infos}
        infos |= {name: infos[tensor.name] for name, tensor in self._second.items()}
        self._writers: dict[str, SafetensorsWriter] = {}
        for file, contents in layout.items():
            here = {name: infos[name] for name in contents["tensors"]}
            writer = SafetensorsWriter(folder / file, here, contents["metadata"])
            self._writers |= dict.fromkeys(here, writer)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as opened:
            for writer in dict.fromkeys(self._writers.values()):
                opened.enter_context(writer)
            self._opened = opened.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        self._opened.__exit__(kind, *rest)
        if kind is None:
            write_files(self._folder, self._side_files)

    def write(self, piece: Piece, values: np.ndarray) -> None:
        rows = values.reshape(-1, *piece.tensor.shape[1:])
        for name in (piece.tensor.name, *(name for name, first in self._second.items() if first is piece.tensor)):
            self.put(name, rows, start=piece.rows.start)

    def put(self, name: str, rows: np.ndarray, *, start: int = 0) -> None:
        """Writes rows of a tensor, from `start` on."""
        self._writers[name].write(name, rows, start=start)


class NativeSink:
    """Writes a checkpoint.

    Args:
      folder: empty.
      table: the tensors.
      config: of the model; its param_dtype is the type of every array.
      meta: kept in the manifest.
      files: name -> contents, stored beside the arrays.
    """

    def __init__(
        self,
        folder: Path,
        table: Sequence[hf.Tensor],
        config: ModelConfig,
        *,
        meta: Mapping[str, Any],
        files: Mapping[str, bytes],
    ) -> None:
        self._folder, self._meta, self._files = folder, dict(meta), dict(files)
        self._dtype = np.dtype(config.param_dtype)
        self._shapes = stacked_shapes(table)
        arrays = {}
        for part in {part.path: part for tensor in table for part in tensor.parts}.values():
            rows = (piece_rows(part.shape, self._dtype.itemsize), *part.shape[1:])
            arrays[part.path] = (self._shapes[part.path], self._dtype, (*(1 for _ in part.stack), *rows))
        self._arrays = ArrayWriter(folder, "params", arrays)

    def write(self, piece: Piece, values: np.ndarray) -> None:
        stack = tuple(1 for _ in piece.part.stack)
        self._arrays.write(piece.part.path, piece.index, values.reshape(stack + piece.shape))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        if kind is not None:
            return
        write_files(self._folder, self._files)
        arrays = {path: {"shape": list(shape), "dtype": str(self._dtype)} for path, shape in self._shapes.items()}
        manifest.Manifest.seal(self._folder, step=0, meta=self._meta, arrays={"params": arrays})


def default_layout(infos: Mapping[str, TensorInfo]) -> dict[str, dict[str, Any]]:
    """One file, or as many as are needed for none to be larger than SHARD_BYTES."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, info in infos.items():
        if shards[-1] and size + info.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += info.nbytes
    last = len(shards)
    names = (
        ["model.safetensors"] if last == 1 else [f"model-{n:05d}-of-{last:05d}.safetensors" for n in range(1, last + 1)]
    )
    return {
        file: {"metadata": {"format": "pt"}, "tensors": sorted(shard)}
        for file, shard in zip(names, shards, strict=True)
    }


def _index(layout: Mapping[str, Mapping[str, Any]], infos: Mapping[str, TensorInfo]) -> bytes:
    where = {name: file for file, contents in layout.items() for name in contents["tensors"]}
    size = sum(info.nbytes for info in infos.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes small files; on return they are on the disk. Raises FileError."""
    try:
        for name, contents in files.items():
            (folder / name).write_bytes(contents)
            manifest.sync(folder / name)
        manifest.sync(folder)
    except OSError as error:
        raise FileError(f"{folder} cannot be written: {error.strerror}") from error
