"""What a finished checkpoint holds: every file with its size and checksum, every array with its shape and dtype.

Orbax reports a file that is cut or gone, but loads one with a flipped bit as if nothing had happened, and takes an
empty folder for a checkpoint. So every checkpoint ends with `manifest.json`, written last: a folder without one is
not a checkpoint, and one whose files differ from it is not loaded.

Checksums are CRC-32 (ISO 3309), which is against accidents and not against forgers: it sees every burst of errors up to
32 bits and all but one in four thousand million others, several times as fast as any hash of hashlib, and every save
and every load waits for it. Files are read in threads, which works because zlib releases the interpreter lock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from qwen_jax.errors import FileError, ModelError

FILE_NAME = "manifest.json"
FORMAT = 1  # raised when an older release could not read what this one writes


class Broken(ModelError):
    """A checkpoint whose files are not those of its manifest."""

    def __init__(self, folder: Path, reason: str) -> None:
        super().__init__(f"checkpoint {folder} is broken: {reason}")
        self.reason = reason


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of one checkpoint.

    Attributes:
      step: training step the arrays are from.
      meta: what the caller wants back with them, JSON values only.
      arrays: item ("params", "optimizer") -> path in the tree -> {"shape": [...], "dtype": "..."}.
      files: path inside the folder, with slashes -> {"size": bytes, "crc32": 8 hex digits}.
      versions: library -> version, for people to read.
    """

    step: int
    meta: dict[str, Any]
    arrays: dict[str, dict[str, dict[str, Any]]]
    files: dict[str, dict[str, Any]]
    versions: dict[str, str]

    @classmethod
    def seal(cls, folder: Path, *, step: int, meta: dict[str, Any], arrays: dict[str, Any]) -> None:
        """Writes the manifest of what lies in `folder`; on return all of it is on the disk."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        with ThreadPoolExecutor() as pool:
            entries = list(pool.map(_describe, paths))
            list(pool.map(sync, paths))
        files = {path.relative_to(folder).as_posix(): entry for path, entry in zip(paths, entries, strict=True)}
        versions = {name: importlib.metadata.version(name) for name in ("jax", "orbax-checkpoint", "tensorstore")}
        versions["python"] = platform.python_version()
        manifest = cls(step=step, meta=meta, arrays=arrays, files=files, versions=versions)
        contents = {"format": FORMAT, **dataclasses.asdict(manifest)}
        text = json.dumps({"crc32": _checksum(contents), **contents}, indent=1)
        (folder / FILE_NAME).write_text(text, encoding="utf-8")
        sync(folder / FILE_NAME)
        for directory in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
            sync(directory)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest in `folder`, its own checksum checked.

        Raises Broken if there is none or it is damaged, ModelError if a newer release wrote it.
        """
        with _reading(folder, FILE_NAME) as path:
            text = path.read_bytes()
        try:
            contents = json.loads(text)
            if contents.pop("crc32") != _checksum(contents):
                raise ValueError("the checksum differs")
            version = contents.pop("format")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Broken(folder, f"{FILE_NAME} is damaged") from error
        if version != FORMAT:
            raise ModelError(f"{folder} has checkpoint format {version} and this release reads {FORMAT}: update it")
        return cls(**contents)

    def check(self, folder: Path, wanted: Callable[[str], bool]) -> None:
        """Raises Broken unless every file has its size, and those that `wanted` chooses by name their checksum."""
        for name, entry in self.files.items():
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise Broken(folder, f"{FILE_NAME} lists {name}, which is outside the checkpoint")
            with _reading(folder, name) as path:
                size = path.stat().st_size
            if size != entry["size"]:
                raise Broken(folder, f"{name} has {size} bytes instead of {entry['size']}")

        def check_file(name: str) -> None:
            with _reading(folder, name) as path:
                if _describe(path) != self.files[name]:
                    raise Broken(folder, f"{name} is damaged: its checksum is not the one in {FILE_NAME}")

        with ThreadPoolExecutor() as pool:
            list(pool.map(check_file, filter(wanted, self.files)))


def sync(path: Path) -> None:
    """Returns once the bytes of a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _describe(path: Path) -> dict[str, Any]:
    with open(path, "rb", buffering=0) as file:
        value, block = 0, memoryview(bytearray(2**20))
        while count := file.readinto(block):
            value = zlib.crc32(block[:count], value)
        return {"size": file.tell(), "crc32": f"{value:08x}"}


def _checksum(contents: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(contents, sort_keys=True).encode()):08x}"


@contextlib.contextmanager
def _reading(folder: Path, name: str) -> Iterator[Path]:
    """The path of a file to read; what the system refuses becomes the reason why the checkpoint is broken."""
    try:
        yield folder / name
    except FileNotFoundError as error:
        raise Broken(folder, f"{name} is missing") from error
    except PermissionError as error:  # nothing is wrong with the bytes: no reason to fall back to older ones
        raise FileError(f"{folder / name} cannot be read: permission denied") from error
    except OSError as error:
        raise Broken(folder, f"{name} cannot be read: {error.strerror}") from error
