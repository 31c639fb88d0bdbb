"""A model wherever it is kept, behind one interface: a published folder, or a checkpoint of this library.

Everything is read in pieces: some rows of a published tensor, which are a slice of one of our arrays (`hf.table`).
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.errors import FileError, ModelError
from qwen_jax.text import Tokenizer
from qwen_jax.weights import hf, hf_config, hub, manifest, strict_json
from qwen_jax.weights.checkpoint import Checkpoint, open_checkpoint
from qwen_jax.weights.folder import inside, is_plain_name, open_folder
from qwen_jax.weights.hf_quantization import Quantization, read_quantization
from qwen_jax.weights.quantized import QuantizedTensors
from qwen_jax.weights.stored import StoredArrays
from qwen_jax.weights.tensors import RegularFile, quoted

PEFT_CONFIG = "adapter_config.json"
ADAPTER = "adapter.json"  # of a checkpoint that holds an adapter, and not a model
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
# Of these, what an adapter changes: how the model is talked to, and where its answers end.
ADAPTER_FILES = ("chat_template.jinja", "generation_config.json")
SIDE_FILES_BYTES = 64 * 2**20  # of all together; the largest published have 20 million
_Kind = Literal["published", "native", "peft"]
_FLOATS = ("float32", "bfloat16", "float16", "float64")


@dataclasses.dataclass(frozen=True)
class Piece:
    """Rows of a published tensor that are `start:stop` of the first axis of one of our arrays, within its stack."""

    tensor: hf.Tensor
    part: hf.Part
    rows: slice
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        """In our layout, without the axes of a stack."""
        return (self.stop - self.start, *self.part.shape[1:])

    @property
    def index(self) -> tuple[slice, ...]:
        """Of our array, with its stack."""
        return (*(slice(i, i + 1) for i in self.part.stack), slice(self.start, self.stop))


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


def stacked_shapes(table: Sequence[hf.Tensor]) -> dict[str, tuple[int, ...]]:
    """Path -> shape of each of our arrays that these tensors are made of, its layers and experts stacked."""
    # The last part of an array has the highest indices.
    last = {part.path: part for tensor in table for part in tensor.parts}
    return {path: (*(i + 1 for i in part.stack), *part.shape) for path, part in last.items()}


class Model(abc.ABC):
    """What there is to know of a model without its weights, and its weights piece by piece. Open until close().

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

    @abc.abstractmethod
    def close(self) -> None:
        """No weights can be read afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def nbytes(self) -> int:
        """Of all weights as stored."""
        return sum(self.dtype(tensor).itemsize * math.prod(tensor.shape) for tensor in self.table)


class PublishedFolder(Model):
    """A folder as published: config.json, safetensors or PyTorch files, the tokenizer's files.

    Quantised weights are read as the numbers they stand for; `quantized` reads them as they are.
    """

    def __init__(self, path: Path, *, allow_pickle_format: bool = False) -> None:
        self.path = path
        self.chat = False
        self._side_files = _read_side_files(path)
        self.config, self.model_type = _published_config(self._side_files["config.json"], path / "config.json")
        self.table = hf.table(self.config, self.model_type)
        self.files = open_folder(path, allow_pickle_format=allow_pickle_format)
        try:
            self.quantized = QuantizedTensors(self.files, _quantization(self._side_files["config.json"], path))
            second = self._check_tensors()
        except BaseException:
            self.close()
            raise
        self.layout = self.files.layout
        if self.quantized.names or len(self.files.tensors) != len(self.table) + len(second):
            self.layout = None  # a file of ours would lack the buffers that are in these

    def dtype(self, tensor: hf.Tensor) -> np.dtype:
        if tensor.name in self.quantized.names:
            return np.dtype(np.float32)  # which holds what they stand for
        return self.files.tensors[tensor.name].dtype

    def read(self, piece: Piece) -> np.ndarray:
        if piece.tensor.name in self.quantized.names:
            return self.quantized.dequantize(piece.tensor.name, piece.rows).reshape(piece.shape)
        return self.files.read(piece.tensor.name, (piece.rows,)).reshape(piece.shape)

    def side_files(self) -> dict[str, bytes]:
        return dict(self._side_files)

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.path)

    def close(self) -> None:
        self.files.close()

    def _check_tensors(self) -> dict[str, str]:
        """What hf.match returns. Raises ModelError unless the tensors are those of the table, in types that we read."""
        shapes = self.quantized.shapes({tensor.name for tensor in self.table})
        second = hf.match(self.table, shapes, where=str(self.path))
        for tensor in self.table:
            if str(self.dtype(tensor)) not in _FLOATS:
                raise ModelError(
                    f"{self.files.where(tensor.name)} is {self.dtype(tensor)}, and {', '.join(_FLOATS)} are read: "
                    "take the unquantised model, or one in the form of GPTQ or AWQ"
                )
        embedding = self.table[0].name
        if embedding in self.quantized.names and self.quantized.of(embedding).embedding != embedding:
            raise ModelError(
                f"{self.path}: {embedding} is quantised, and quantization_config does not say how: "
                "an embedding is read as convert --quantize-embedding makes it"
            )
        for name in (*second, *second.values()):
            if name in self.quantized.names:
                raise ModelError(
                    f"{self.path}: {name} is quantised, and beside it is the same weight; remove the other"
                )
        for name, same in second.items():
            self._check_equal(name, same)
        return second

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
        self.config = _native_config(checkpoint)
        # What convert noted of the published folder that the weights came from.
        origin: dict[str, Any] = checkpoint.meta.get("published", {})
        self.model_type = origin.get("model_type") or hf.model_type_of(self.config)
        self.layout = origin.get("layout")
        self.chat = checkpoint.meta.get("chat", False)
        self.table = hf.table(self.config, self.model_type)
        if self.layout is not None:
            _check_layout(self.layout, self.table, self.path / manifest.FILE_NAME)
        shapes = stacked_shapes(self.table)
        self._arrays = StoredArrays(checkpoint.path, "params", shapes, np.dtype(self.config.param_dtype))

    def dtype(self, tensor: hf.Tensor) -> np.dtype:
        return np.dtype(self.config.param_dtype)

    def read(self, piece: Piece) -> np.ndarray:
        return self._arrays.read(piece.part.path, piece.index).reshape(piece.shape)

    def side_files(self) -> dict[str, bytes]:
        return {name: self.checkpoint.read(name) for name in self.checkpoint.files if name in SIDE_FILES}

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_bytes(self.checkpoint.read("tokenizer.json"))

    def close(self) -> None:
        self._arrays.close()


def open_model(
    reference: str | Path,
    *,
    allow_pickle_format: bool = False,
    warn: Callable[[str], None] = warnings.warn,
    within: tuple[Path, ...] = (),
) -> Model:
    """The model that a reference names.

    Args:
      reference: a published folder; a run folder, checkpoints folder or step folder of ours; or, with the `hub` extra,
        the name of a published model such as "Qwen/Qwen2.5-0.5B-Instruct", optionally with @revision. A run that has
        trained an adapter, or a folder of PEFT's with one, is the model that it names with the adapter merged into it.
      allow_pickle_format: whether weights in PyTorch's own format are read.
      warn: takes one line about what was survived.
      within: the adapters of which this is the base.

    Raises FileError if there is nothing of that name, ModelError if it cannot be used.
    """
    from qwen_jax.weights import adapted, peft  # whose models are made of those here

    with _located(reference, allow_pickle_format=allow_pickle_format) as (path, kind):
        if path in within:
            raise ModelError(f"{path} is an adapter of itself; name its base in it")
        if kind == "published":
            return PublishedFolder(path, allow_pickle_format=allow_pickle_format)
        checkpoint = None if kind == "peft" else open_checkpoint(path, warn=warn)
        if checkpoint and ADAPTER not in checkpoint.files:
            return NativeCheckpoint(checkpoint)
        made = adapted.Adapter.of_checkpoint(checkpoint) if checkpoint else None
        name = made.base if made else peft.base_of(path)
        try:
            base = open_model(name, allow_pickle_format=allow_pickle_format, warn=warn, within=(*within, path))
        except FileError as error:
            raise FileError(f"{path} is an adapter of {name}, which is not there: {error}") from error
        try:
            if checkpoint and made:
                about = dict(config=_native_config(checkpoint), chat=checkpoint.meta.get("chat"))
                files = {name: checkpoint.read(name) for name in checkpoint.files if name in ADAPTER_FILES}
                return adapted.AdaptedModel(base, made, path=checkpoint.path, files=files, **about)
            files = {name: contents for name, contents in _read_side_files(path).items() if name in ADAPTER_FILES}
            return adapted.AdaptedModel(base, peft.read(path, base), path=path, files=files)
        except BaseException:
            base.close()
            raise


def read_config(reference: str | Path) -> ModelConfig:
    """The config of the model that a reference names, dtypes as stored; its weights are not verified.

    Takes and raises what `open_model` does.
    """
    with _located(reference) as (path, kind):
        if kind == "peft":
            from qwen_jax.weights import peft

            return read_config(peft.base_of(path))
        if kind == "native":
            return _native_config(open_checkpoint(path, items=(), warn=lambda _: None))
        with RegularFile(inside(path, "config.json")) as file:
            return _published_config(file.read_bytes(0, min(file.size, SIDE_FILES_BYTES)), file.path)[0]


@contextlib.contextmanager
def _located(reference: str | Path, *, allow_pickle_format: bool = False) -> Iterator[tuple[Path, _Kind]]:
    """The folder that a reference names, and what kind it is of; what the system refuses is a FileError."""
    path = Path(os.path.expanduser(reference)).absolute()  # Path.expanduser raises where there is no such user
    try:
        # "runs/mine" reads as a name too; where there is a folder "runs", it is a run that is not there.
        if not path.exists() and not path.parent.is_dir() and hub.is_name(str(reference)):
            path = hub.download(str(reference), allow_pickle_format=allow_pickle_format)
        published = os.path.lexists(path / "config.json") and not (path / manifest.FILE_NAME).exists()
        if not published and os.path.lexists(path / PEFT_CONFIG):
            yield path, "peft"
            return
        if not published and any(itertools.chain(path.glob("*.safetensors"), path.glob("*.bin"))):
            raise FileError(f"{path} has weights and no config.json, which says what they are; put it beside them")
        yield path, "published" if published else "native"
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from error


def _published_config(contents: bytes, path: Path) -> tuple[ModelConfig, hf.ModelType]:
    values = parse_json(contents, path)
    return hf_config.from_hf(values, where=str(path)), values["model_type"]


def _quantization(contents: bytes, path: Path) -> Quantization | None:
    return read_quantization(parse_json(contents, path / "config.json"), where=str(path / "config.json"))


def _native_config(checkpoint: Checkpoint) -> ModelConfig:
    return ModelConfig.from_json(checkpoint.read("model.json").decode())


def parse_json(contents: bytes, path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ModelError, with its path, if there is none."""
    try:
        return strict_json.loads(contents)
    except ValueError as error:
        raise ModelError(f"{path}: {error}") from error


def _read_side_files(folder: Path) -> dict[str, bytes]:
    """The contents of those SIDE_FILES there are: like weights, no pipes and no links that lead elsewhere."""
    contents: dict[str, bytes] = {}
    left = SIDE_FILES_BYTES
    for name in SIDE_FILES:
        if os.path.lexists(folder / name):
            with RegularFile(inside(folder, name)) as file:
                if file.size > left:
                    raise ModelError(
                        f"{file.path} has {file.size} bytes; all files beside weights may have {SIDE_FILES_BYTES}"
                    )
                contents[name] = file.read_bytes(0, file.size)
                left -= file.size
    return contents


def _check_layout(layout: Any, table: Sequence[hf.Tensor], where: Path) -> None:
    """Raises ModelError unless a layout puts each tensor of a table once into files of plain names.

    It names files that will be written, and a checkpoint may be a stranger's.
    """
    shapes = {tensor.name: tensor.shape for tensor in table}
    try:
        for file, contents in layout.items():
            if not is_plain_name(file, ".safetensors") or not isinstance(contents["metadata"], dict | None):
                raise ValueError(quoted(file))
        names = [name for contents in layout.values() for name in contents["tensors"]]
        second = hf.match(table, {name: shapes.get(name, table[0].shape) for name in names}, where=str(where))
        if sorted(names) != sorted([*shapes, *second]):
            raise ValueError("a tensor comes twice, or is none")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{where}: its layout is not one of safetensors files ({error}); do not use this checkpoint"
        ) from error
