"""The published weights in a folder: one file or several with an index, safetensors or PyTorch's own format.

An index comes from strangers like everything else in the folder. It can only name files in the folder itself, and the
names it gives must be exactly those that the files hold.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import numpy as np

from qwen_jax.errors import FileError, ModelError
from qwen_jax.weights import strict_json
from qwen_jax.weights.safetensors import SafetensorsFile
from qwen_jax.weights.tensors import RegularFile, TensorInfo, quoted
from qwen_jax.weights.torch_bin import TorchFile

Reader = SafetensorsFile | TorchFile


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Format:
    """A kind of tensor file and the names under which it is published."""

    open: Callable[[Path], Reader]
    suffix: str
    single: str
    index: str


# No separator, no "..", no hidden file, nothing that a terminal or a shell would read in its own way.
_PLAIN_NAME = re.compile(r"\w[\w.+-]{,200}")
_SAFETENSORS = _Format(
    open=SafetensorsFile, suffix=".safetensors", single="model.safetensors", index="model.safetensors.index.json"
)
_TORCH = _Format(open=TorchFile, suffix=".bin", single="pytorch_model.bin", index="pytorch_model.bin.index.json")


class Tensors:
    """All tensors of a folder (see TensorFile), open until close(). Made by open_folder().

    Attributes:
      shards: file name -> the open file, in the order of the index.
      weight_map: tensor -> file name, in the order of the index.
      tensors: tensor -> TensorInfo, file by file.
      layout: what SafetensorsWriter needs to write the same files again, as JSON values:
        file name -> {"metadata": ..., "tensors": [names in order]}; None for PyTorch's format, which is not written.
    """

    def __init__(self, *, shards: Mapping[str, Reader], weight_map: Mapping[str, str]) -> None:
        self.shards = MappingProxyType(dict(shards))
        self.weight_map = MappingProxyType(dict(weight_map))
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            {name: info for shard in shards.values() for name, info in shard.tensors.items()}
        )
        self.layout: dict[str, dict[str, Any]] | None = {
            name: {"metadata": shard.metadata, "tensors": list(shard.tensors)}
            for name, shard in shards.items()
            if isinstance(shard, SafetensorsFile)
        } or None

    @property
    def files(self) -> list[Path]:
        return [shard.path for shard in self.shards.values()]

    def where(self, name: str) -> str:
        """The file of a tensor and the tensor, for messages."""
        return f"{self.shards[self.weight_map[name]].path}: {quoted(name)}"

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        return self.shards[self.weight_map[name]].read(name, index)

    def close(self) -> None:
        for shard in self.shards.values():
            shard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_folder(folder: Path, *, allow_pickle_format: bool) -> Tensors:
    """The weights in `folder`; safetensors are preferred.

    Args:
      folder: as published, or a snapshot in a Hugging Face cache.
      allow_pickle_format: read PyTorch `.bin` files, if there is nothing else.

    Raises:
      ModelError: there are no weights, or files and index do not agree, or one of them is not to be trusted.
      FileError: the system cannot read the folder or a file.
    """
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise FileError(f"{folder} cannot be listed: {error.strerror}") from error
    kind, name = _choose(folder, names)
    if kind is _TORCH and not allow_pickle_format:
        raise ModelError(
            f"{folder / name} is in PyTorch's pickle format: use weights in safetensors, or pass --allow-pickle-format"
        )
    if name != kind.index:
        shard = kind.open(inside(folder, name))
        return Tensors(shards={name: shard}, weight_map=dict.fromkeys(shard.tensors, name))
    return _open_index(folder, kind, names)


def is_plain_name(name: object, suffix: str) -> bool:
    """Whether a name that comes from strangers is that of a file in the folder itself, of this kind."""
    return isinstance(name, str) and _PLAIN_NAME.fullmatch(name) is not None and name.endswith(suffix)


def _choose(folder: Path, names: set[str]) -> tuple[_Format, str]:
    """The format of the weights in a folder and the file to start from: the index, or the only file."""
    for kind in (_SAFETENSORS, _TORCH):
        found = [name for name in (kind.index, kind.single) if name in names]
        if not found and kind is _SAFETENSORS:
            found = sorted(name for name in names if name.endswith(kind.suffix) and not name.startswith("."))
            if len(found) == 1 and not is_plain_name(found[0], kind.suffix):
                raise ModelError(f"{folder}: its weights are in {quoted(found[0])}; rename it to {kind.single}")
        if len(found) > 1:
            both = " and ".join(name if name.isprintable() else quoted(name) for name in found[:2])
            raise ModelError(f"{folder} has {both}, and one is wanted: take away what is not current")
        if found:
            return kind, found[0]
    raise ModelError(f"{folder} has no weights: {_SAFETENSORS.single} or {_SAFETENSORS.index} is wanted")


def _open_index(folder: Path, kind: _Format, names: set[str]) -> Tensors:
    weight_map = _read_weight_map(inside(folder, kind.index), kind)
    holds = {shard: name for name, shard in weight_map.items()}  # one tensor of each file
    for shard, name in holds.items():
        if shard not in names:
            raise ModelError(f"{folder / shard} is missing, and {kind.index} says that it holds {quoted(name)}")
    with contextlib.ExitStack() as stack:
        shards = {shard: stack.enter_context(kind.open(inside(folder, shard))) for shard in holds}
        _check_agreement(weight_map, shards, kind.index)
        stack.pop_all()
    return Tensors(shards=shards, weight_map=weight_map)


def _read_weight_map(path: Path, kind: _Format) -> dict[str, str]:
    """Tensor -> file name, from an index. Raises ModelError unless all are plain names of the right kind."""
    with RegularFile(path) as file:
        try:
            if file.size > strict_json.MAX_BYTES:
                raise ValueError(f"{file.size} bytes, where {strict_json.MAX_BYTES} is the limit")
            index = strict_json.loads(file.read_bytes(0, file.size))
        except ValueError as error:
            raise ModelError(f"{path} is not a valid index: {error}; download it again") from error
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{path} has no weight_map of tensors to files; download it again")
    for name, shard in weight_map.items():
        if not is_plain_name(shard, kind.suffix):
            raise ModelError(
                f"{path}: the file of {quoted(name)} is {quoted(shard)}, "
                f"not a plain name of a {kind.suffix} file beside the index; do not use these weights"
            )
    return weight_map


def _check_agreement(weight_map: Mapping[str, str], shards: Mapping[str, Reader], index: str) -> None:
    for shard, file in shards.items():
        for name in file.tensors:
            if name not in weight_map:
                raise ModelError(f"{file.path} holds {quoted(name)}, which is not in {index}; download both again")
            if weight_map[name] != shard:
                raise ModelError(
                    f"{file.path} holds {quoted(name)}, which {index} places in {weight_map[name]}; download them again"
                )
    for name, shard in weight_map.items():
        if name not in shards[shard].tensors:
            raise ModelError(f"{shards[shard].path} does not hold {quoted(name)}, as {index} says; download both again")


def inside(folder: Path, name: str) -> Path:
    """The path of a file of a folder; links may not leave it, other than to where the Hugging Face cache keeps files.

    There, `models--X/snapshots/REVISION/NAME` is a link to `models--X/blobs/DIGEST`.

    Raises ModelError for any other link, FileError if the system does not let it be followed.
    """
    try:
        home = folder.resolve()
        target = (folder / name).resolve(strict=True).parent
    except PermissionError as error:
        raise FileError(f"{folder / name} cannot be read: {error.strerror}") from error
    except (OSError, RuntimeError) as error:  # a link to nothing, or to itself
        raise ModelError(f"{folder / name} is a link that leads nowhere: download it again") from error
    cached = home.parent.name == "snapshots" and target == home.parents[1] / "blobs"
    if target != home and not cached:
        raise ModelError(f"{folder / name} is a link out of the folder: give the folder it leads to, or copy the file")
    return folder / name
