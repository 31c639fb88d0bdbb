"""What a folder of token shards holds: the record that is written last and checked first.

A folder has, per split, `{split}-00000.bin` (ids, little-endian uint16 or uint32) and beside it
`{split}-00000.documents.bin` (where each document of that shard ends, little-endian int64) and, where not every token
is trained, `{split}-00000.trained.bin` (a byte of marks for each token: 1 where it is, and where something is judged
2 for bad or 4 for good), then `tokenizer.json` and
`manifest.json`. Each document ends with end_of_text and lies in one shard.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path
from typing import IO, Any

import numpy as np

from qwen_jax.errors import DataError, FileError

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
SPLITS = ("train", "held_out")
FORMAT = 2  # raised when an older release could not read what this one writes
# Hashing a gigabyte at each start takes a second or two; beyond that the sizes have to do.
MAX_DIGEST_BYTES = 2**30
_SHARD_NAME = re.compile(rf"({'|'.join(SPLITS)})-\d{{5}}\.bin")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of ids, `bytes` long, its file of document ends, and that of what is trained where it has one."""

    name: str
    tokens: int
    documents: int
    bytes: int
    sha256: str
    documents_sha256: str
    trained_sha256: str | None = None

    def __post_init__(self) -> None:
        # A name such as "../x" would read outside the folder.
        if not _SHARD_NAME.fullmatch(self.name):
            raise ValueError(f"{self.name!r} is no name of a shard")

    @property
    def documents_name(self) -> str:
        """Name of the file of document ends."""
        return self.name.removesuffix(".bin") + ".documents.bin"

    @property
    def trained_name(self) -> str:
        """Name of the file of what is trained."""
        return self.name.removesuffix(".bin") + ".trained.bin"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """The shards of one split in order; `characters` and UTF-8 `bytes` of the text they came from.

    `trained` is the number of tokens that are trained, None where all are; `judged` that of labels, None where there
    are none.
    """

    shards: tuple[Shard, ...]
    characters: int
    bytes: int
    trained: int | None = None
    judged: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens of all shards, end_of_text included."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        """Documents of all shards."""
        return sum(shard.documents for shard in self.shards)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """What the documents were read from.

    Attributes:
      description: the source as the config names it, for people to read.
      options: what else makes tokens of the same files, by field of the config, as JSON.
      files: how many.
      bytes: their sizes together.
      listing: sha256 of their names and sizes.
      content: sha256 of names, sizes and bytes.
    """

    description: str
    options: dict[str, str]
    files: int
    bytes: int
    listing: str
    content: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """One folder of token shards.

    Attributes:
      dtype: of the ids on disk, "uint16" or "uint32".
      vocab_size: num_tokens of the tokenizer; every id is below.
      end_of_text: the id that ends each document.
      tokenizer: fingerprint of the tokenizer.
      source: what the documents were read from.
      held_out: fraction of the documents that was held out.
      splits: "train" and "held_out".
    """

    dtype: str
    vocab_size: int
    end_of_text: int
    tokenizer: str
    source: Source
    held_out: float
    splits: dict[str, Split]

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of `folder`; a DataError if it is not one that `write` wrote."""
        path = folder / MANIFEST
        try:
            return cls._from_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise FileError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"{path} is no manifest of token shards ({reason}); delete {folder}") from error

    @classmethod
    def _from_json(cls, text: str) -> Manifest:
        values = json.loads(text)
        if (version := values.pop("format")) not in (1, FORMAT):
            raise ValueError(f"its format is {version}, this release reads 1 and {FORMAT}")
        if version == 1:
            field = values["source"].pop("field")
            values["source"]["options"] = {"field": json.dumps(field)} if field else {}
        if values["dtype"] not in ("uint16", "uint32"):
            raise ValueError(f"dtype {values['dtype']!r}")
        splits = {
            name: Split(**{**split, "shards": tuple(Shard(**shard) for shard in split["shards"])})
            for name, split in values["splits"].items()
        }
        if tuple(splits) != SPLITS:
            raise ValueError(f"splits {list(splits)}")
        return cls(**{**values, "source": Source(**values["source"]), "splits": splits})

    def write(self, folder: Path) -> None:
        """Writes the manifest so that it is there whole or not at all; what it speaks of must be on disk before."""
        partial = folder / (MANIFEST + ".partial")
        with open(partial, "w", encoding="utf-8") as file:
            json.dump({"format": FORMAT, **dataclasses.asdict(self)}, file, indent=1)
            to_disk(file)
        os.replace(partial, folder / MANIFEST)
        directory = os.open(folder, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)

    def verify(self, folder: Path) -> None:
        """A DataError unless every file has its size and, up to 1 GB in all, its sha256."""
        shards = [shard for split in self.splits.values() for shard in split.shards]
        small = sum(shard.bytes for shard in shards) <= MAX_DIGEST_BYTES
        for shard in shards:
            if shard.bytes != shard.tokens * np.dtype(self.dtype).itemsize:
                raise DataError(f"{folder / MANIFEST} gives {shard.name} {shard.tokens} tokens in {shard.bytes} bytes")
            _verify(folder / shard.name, shard.bytes, shard.sha256 if small else None)
            _verify(folder / shard.documents_name, shard.documents * 8, shard.documents_sha256 if small else None)
            if shard.trained_sha256:
                _verify(folder / shard.trained_name, shard.tokens, shard.trained_sha256 if small else None)


def to_disk(file: IO[Any]) -> None:
    """Returns when what was written to `file` survives a power cut."""
    file.flush()
    os.fsync(file.fileno())


def _verify(path: Path, size: int, sha256: str | None) -> None:
    remedy = f"delete {path.parent} to make it again"
    try:
        with open(path, "rb") as file:
            found = os.fstat(file.fileno()).st_size
            if found != size:
                raise DataError(f"{path} has {found} bytes, its manifest says {size}; {remedy}")
            if sha256 is not None and hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise DataError(f"{path} is not what was written: its sha256 differs; {remedy}")
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing, its manifest lists it; {remedy}") from error
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}") from error
