"""A model wherever it is kept, behind one interface: a published folder, or a checkpoint of this library.

Everything is read in pieces: some rows of a published tensor, which are a slice of one of our arrays (`hf.table`).
"""

from __future__ import annotations

import abc
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.errors import FileError, ModelError
from qwen_jax.text import Tokenizer
from qwen_jax.weights import hf, hf_config, hub, manifest, strict_json
from qwen_jax.weights.checkpoint import Checkpoint, open_checkpoint
from qwen_jax.weights.folder import open_folder
from qwen_jax.weights.stored import StoredArrays

INDEX = "model.safetensors.index.json"
PIECE_BYTES = 8 * 2**20  # small enough for the allocator to use the same memory again

# What lies beside the weights of a published model and says how it is used. Kept, word for word, in both directions.
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "qwen.tiktoken",
    "chat_template.jinja",
    INDEX,
    "LICENSE",
    "NOTICE",
)
SIDE_FILE_BYTES = 100 * 2**20


@dataclasses.dataclass(frozen=True)
class Piece:
    """Rows of a published tensor that are `start:stop` of the first axis of one of our arrays, within its layer."""

    tensor: hf.Tensor
    part: hf.Part
    rows: slice
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        """In our layout, without a layer axis."""
        return (self.stop - self.start, *self.part.shape[1:])

    @property
    def index(self) -> tuple[slice, ...]:
        """Of our array; of the stacked one where it has a layer."""
        here = slice(self.start, self.stop)
        return (here,) if self.part.layer is None else (slice(self.part.layer, self.part.layer + 1), here)


def pieces(tensor: hf.Tensor, itemsize: int) -> Iterator[Piece]:
    """The whole of a tensor in order, PIECE_BYTES or less at a time (but at least one row of ours)."""
    for part, rows in zip(tensor.parts, tensor.rows, strict=True):
        ratio = (rows.stop - rows.start) // part.shape[0]  # [N, H, D] of ours is published as [N * H, D]
        step = piece_rows(part.shape, itemsize)
        for start in range(0, part.shape[0], step):
            stop = min(start + step, part.shape[0])
            yield Piece(tensor, part, slice(rows.start + start * ratio, rows.start + stop * ratio), start, stop)


def piece_rows(shape: Sequence[int], itemsize: int) -> int:
    """How much of the first axis of an array of this shape goes into a piece."""
    return max(1, min(shape[0], PIECE_BYTES // max(1, itemsize * math.prod(shape[1:]))))


class Model(abc.ABC):
    """What there is to know of a model without its weights, and its weights piece by piece.

    Attributes:
      path: folder it is in.
      config: shape and constants, dtypes as stored.
      model_type: of the published form.
      table: its published tensors.
      layout: of the safetensors files it is or was published in: file -> {"metadata", "tensors": names in order}; None
        where there are none.
      chat: whether it was tuned here to answer in turns.
    """

    path: Path
    config: ModelConfig
    model_type: hf.ModelType
    table: Sequence[hf.Tensor]
    layout: Mapping[str, Any] | None
    chat: bool

    @abc.abstractmethod
    def dtype(self, tensor: hf.Tensor) -> np.dtype:
        """Type it is stored in."""

    @abc.abstractmethod
    def read(self, piece: Piece) -> np.ndarray:
        """The values of a piece, in its shape. Thread-safe."""

    @abc.abstractmethod
    def side_files(self) -> dict[str, bytes]:
        """The contents of those SIDE_FILES there are."""

    @abc.abstractmethod
    def tokenizer(self) -> Tokenizer:
        """Raises FileError if there is none."""

    @property
    def nbytes(self) -> int:
        """Of all weights as stored."""
        return sum(self.dtype(tensor).itemsize * math.prod(tensor.shape) for tensor in self.table)


class PublishedFolder(Model):
    """A folder as published: config.json, safetensors or PyTorch files, the tokenizer's files."""

    def __init__(self, path: Path, *, allow_pickle_format: bool = False) -> None:
        self.path = path
        values = read_json(path / "config.json")
        self.config = hf_config.from_hf(values, where=str(path / "config.json"))
        self.model_type = values["model_type"]
        self.table = hf.table(self.config, self.model_type)
        self.files = open_folder(path, allow_pickle_format=allow_pickle_format)
        shapes = {name: info.shape for name, info in self.files.tensors.items()}
        second = hf.match(self.table, shapes, where=str(path))
        for name, same in second.items():
            self._check_equal(name, same)
        self.chat = False
        self.layout = self.files.layout
        if len(shapes) != len(self.table) + len(second):
            self.layout = None  # a file of ours would lack the buffers that are in these

    def dtype(self, tensor: hf.Tensor) -> np.dtype:
        return self.files.tensors[tensor.name].dtype

    def read(self, piece: Piece) -> np.ndarray:
        return self.files.read(piece.tensor.name, (piece.rows,)).reshape(piece.shape)

    def side_files(self) -> dict[str, bytes]:
        return {name: _read(self.path / name) for name in SIDE_FILES if (self.path / name).is_file()}

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.path)

    def _check_equal(self, name: str, same: str) -> None:
        """Some files store a tied head beside the embedding. It must not say something else."""
        rows = self.files.tensors[name].shape[0]
        step = piece_rows(self.files.tensors[name].shape, self.files.tensors[name].dtype.itemsize)
        for start in range(0, rows, step):
            index = (slice(start, min(start + step, rows)),)
            if self.files.read(name, index).tobytes() != self.files.read(same, index).tobytes():
                raise ModelError(
                    f"{self.path}: config.json ties the head to the embedding, and {name} differs from {same}; "
                    f'set "tie_word_embeddings" to false, or remove {name}'
                )


class NativeCheckpoint(Model):
    """A checkpoint of this library: of a training run, or made by convert."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.path = checkpoint.path
        self.config = ModelConfig.from_json(checkpoint.read("model.json").decode())
        # What convert noted of the published folder that the weights came from.
        origin: dict[str, Any] = checkpoint.meta.get("published", {})
        self.model_type = origin.get("model_type") or hf.model_type_of(self.config)
        self.layout = origin.get("layout")
        self.chat = checkpoint.meta.get("chat", False)
        self.table = hf.table(self.config, self.model_type)
        self._arrays = StoredArrays(checkpoint.path, "params")

    def dtype(self, tensor: hf.Tensor) -> np.dtype:
        return np.dtype(self.config.param_dtype)

    def read(self, piece: Piece) -> np.ndarray:
        return self._arrays.read(piece.part.path, piece.index).reshape(piece.shape)

    def side_files(self) -> dict[str, bytes]:
        return {name: self.checkpoint.read(name) for name in self.checkpoint.files if name in SIDE_FILES}

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_bytes(self.checkpoint.read("tokenizer.json"))


def open_model(
    reference: str | Path, *, allow_pickle_format: bool = False, warn: Callable[[str], None] = warnings.warn
) -> PublishedFolder | NativeCheckpoint:
    """The model that a reference names.

    Args:
      reference: a published folder; a run folder, checkpoints folder or step folder of ours; or, with the `hub` extra,
        the name of a published model such as "Qwen/Qwen2.5-0.5B-Instruct", optionally with @revision.
      allow_pickle_format: whether weights in PyTorch's own format are read.
      warn: takes one line about what was survived.

    Raises FileError if there is nothing of that name, ModelError if it cannot be used.
    """
    path = Path(reference).expanduser()
    # "runs/mine" reads as a name too; where there is a folder "runs", it is a run that is not there.
    if not path.exists() and not path.parent.is_dir() and hub.is_name(str(reference)):
        path = hub.download(str(reference), allow_pickle_format=allow_pickle_format)
    if (path / "config.json").is_file() and not (path / manifest.FILE_NAME).exists():
        return PublishedFolder(path.absolute(), allow_pickle_format=allow_pickle_format)
    return NativeCheckpoint(open_checkpoint(path, warn=warn))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises FileError, or ModelError if there is none."""
    try:
        return strict_json.loads(_read(path))
    except ValueError as error:
        raise ModelError(f"{path}: {error}") from error


def _read(path: Path) -> bytes:
    """The contents of a file that lies beside weights."""
    try:
        if not path.is_file():
            raise ModelError(f"{path} is not a file")
        if (size := path.stat().st_size) > SIDE_FILE_BYTES:
            raise ModelError(f"{path} has {size} bytes; at most {SIDE_FILE_BYTES} are read")
        return path.read_bytes()
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from error
