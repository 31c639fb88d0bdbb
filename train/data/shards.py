"""Token shards on disk: written document by document, read by position through memory maps."""

from __future__ import annotations

import bisect
import hashlib
from array import array
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from qwen_jax.errors import DataError, FileError
from train.data.documents import IS_BAD, IS_GOOD, TRAINED
from train.data.manifest import Manifest, Shard, Split, to_disk

MAX_SHARD_TOKENS = 2**28


class ShardWriter:
    """Writes one split. A document that does not fit starts the next shard, so none lies in two.

    A context manager: what was not finished when it ends is abandoned.
    """

    def __init__(
        self, folder: Path, split: str, *, dtype: str, end_of_text: int, masked: bool = False, judged: bool = False
    ) -> None:
        """A split in `folder`; `masked` if documents may mark their tokens, `judged` if some are marked as labels."""
        self._folder, self._split, self._masked, self._judged = folder, split, masked, judged
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._end_of_text = end_of_text
        self._shards: list[Shard] = []
        self._open: _OpenShard | None = None
        self._characters = self._bytes = self._trained = self._labels = 0

    def add(self, ids: list[int], text: str, marks: Sequence[int] | None = None) -> None:
        """Appends one document: `ids`, the tokens of `text`, and end_of_text, with marks of all; None: all trained."""
        tokens = np.array([*ids, self._end_of_text], self._dtype)
        flags = np.full(len(tokens), TRAINED, np.uint8) if marks is None else np.array(marks, np.uint8)
        if self._open and self._open.tokens + len(tokens) > MAX_SHARD_TOKENS:
            self._shards.append(self._open.finish())
            self._open = None
        if self._open is None:
            self._open = _OpenShard(self._folder, f"{self._split}-{len(self._shards):05}.bin", self._masked)
        self._open.add(tokens, flags)
        self._trained += int(np.sum(flags & TRAINED))
        self._labels += int(np.sum(flags & (IS_BAD | IS_GOOD) > 0))
        self._characters += len(text)
        self._bytes += len(text.encode())

    def finish(self) -> Split:
        """The split as it was written; all of it is on disk."""
        if self._open:
            self._shards.append(self._open.finish())
            self._open = None
        return Split(
            shards=tuple(self._shards),
            characters=self._characters,
            bytes=self._bytes,
            trained=self._trained if self._masked else None,
            judged=self._labels if self._judged else None,
        )

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        if self._open:  # not finished: what is on disk so far counts for nothing
            self._open.file.close()


class _OpenShard:
    """A shard that still grows. What is small beside its ids stays in memory until the end."""

    def __init__(self, folder: Path, name: str, masked: bool) -> None:
        self._folder, self._name = folder, name
        self.file = open(folder / name, "wb")
        self._sha256 = hashlib.sha256()
        self._ends = array("q")
        self._trained = bytearray() if masked else None
        self.tokens = 0

    def add(self, tokens: np.ndarray, trained: np.ndarray) -> None:
        raw = tokens.tobytes()
        self.file.write(raw)
        self._sha256.update(raw)
        self.tokens += len(tokens)
        self._ends.append(self.tokens)
        if self._trained is not None:
            self._trained += trained.tobytes()

    def finish(self) -> Shard:
        with self.file:
            to_disk(self.file)
            size = self.file.tell()
        ends, trained = np.array(self._ends, "<i8").tobytes(), self._trained
        shard = Shard(
            name=self._name,
            tokens=self.tokens,
            documents=len(self._ends),
            bytes=size,
            sha256=self._sha256.hexdigest(),
            documents_sha256=hashlib.sha256(ends).hexdigest(),
            trained_sha256=None if trained is None else hashlib.sha256(trained).hexdigest(),
        )
        for name, content in ((shard.documents_name, ends), (shard.trained_name, trained)):
            if content is not None:
                with open(self._folder / name, "wb") as file:
                    file.write(content)
                    to_disk(file)
        return shard


class TokenShards:
    """The tokens of one split, read by position over all shards, as if they were one array.

    Attributes:
      path: the folder and split, for messages.
      num_documents: documents in the split.
      vocab_size: every id is below it.
      end_of_text: the id that ends each document.
      num_characters, num_bytes: of the text the tokens stand for, end_of_text not counted.
      num_trained: tokens that are trained; None where all are.
      num_labels: tokens that something is judged at; None where nothing is.
    """

    def __init__(self, folder: Path, split: str, manifest: Manifest) -> None:
        """The split of a folder whose `manifest` was read, and verified where that matters."""
        record = manifest.splits[split]
        self.path = folder / split
        self.num_documents, self.num_trained, self.num_labels = record.documents, record.trained, record.judged
        self.vocab_size, self.end_of_text = manifest.vocab_size, manifest.end_of_text
        self.num_characters, self.num_bytes = record.characters, record.bytes
        self.dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self._tokens = [_map(folder / shard.name, self.dtype, shard.tokens) for shard in record.shards]
        self._ends = [_map(folder / s.documents_name, np.dtype("<i8"), s.documents) for s in record.shards]
        masks = record.shards if record.trained is not None else ()
        self._marks = [_map(folder / shard.trained_name, np.dtype(np.uint8), shard.tokens) for shard in masks]
        self._first_token = list(accumulate((len(tokens) for tokens in self._tokens), initial=0))
        self._first_document = list(accumulate((len(ends) for ends in self._ends), initial=0))

    def __len__(self) -> int:
        """Tokens in the split."""
        return self._first_token[-1]

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop-1 of the split, [stop - start], in the type they have on disk."""
        return self._read(self._tokens, self.dtype, start, stop)

    def trained(self, start: int, stop: int) -> np.ndarray:
        """Whether each of the tokens start..stop-1 is trained, bool [stop - start]."""
        if self.num_trained is None:
            return np.ones(stop - start, bool)
        return self._read(self._marks, np.dtype(np.uint8), start, stop) & TRAINED > 0

    def labels(self, start: int, stop: int) -> np.ndarray:
        """What is judged at each of the tokens start..stop-1, int32 [stop - start]: 1 for bad, 2 for good, else 0."""
        if self.num_labels is None:
            return np.zeros(stop - start, np.int32)
        return (self._read(self._marks, np.dtype(np.uint8), start, stop) & (IS_BAD | IS_GOOD)).astype(
            np.int32
        ) // IS_BAD

    def ends(self) -> np.ndarray:
        """Where each document ends in the split, int64 [num_documents]."""
        parts = [np.empty(0, np.int64)]
        return np.concatenate(
            parts + [first + ends for first, ends in zip(self._first_token, self._ends, strict=False)]
        )

    def _read(self, shards: list[np.ndarray], dtype: np.dtype, start: int, stop: int) -> np.ndarray:
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start}..{stop} of {self.path}, which has {len(self)}")
        shard = bisect.bisect_right(self._first_token, start) - 1
        parts = []
        while start < stop:
            first = self._first_token[shard]
            parts.append(shards[shard][start - first : stop - first])
            start, shard = first + len(shards[shard]), shard + 1
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, dtype), *parts])

    def document(self, index: int) -> tuple[int, int]:
        """Positions (start, stop) of one document in the split; stop - 1 is its end_of_text."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.path}, which has {self.num_documents}")
        shard = bisect.bisect_right(self._first_document, index) - 1
        first, local = self._first_token[shard], index - self._first_document[shard]
        start = int(self._ends[shard][local - 1]) if local else 0
        return first + start, first + int(self._ends[shard][local])


def _map(path: Path, dtype: np.dtype, length: int) -> np.ndarray:
    try:
        return np.memmap(path, dtype, mode="r", shape=(length,))
    except ValueError as error:  # the file is shorter than its manifest says
        raise DataError(f"{path} has not the {length} numbers its manifest gives it; delete {path.parent}") from error
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}") from error
