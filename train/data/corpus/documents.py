"""Documents on disk: JSON lines in gzip, the same bytes for the same documents."""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from qwen_jax.errors import DataError


@dataclasses.dataclass
class Document:
    """A text, where it is from (`file:line`, relative to the source), and what is known about it."""

    text: str
    id: str
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        """One line."""
        return json.dumps({"text": self.text, "id": self.id, **self.notes}, ensure_ascii=False) + "\n"


def read_documents(path: Path) -> Iterator[Document]:
    """The documents of a shard; a DataError if it is not one."""
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
            for line in file:
                record = json.loads(line)
                yield Document(record.pop("text"), record.pop("id"), record)
    except (EOFError, OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} is no shard of documents: {error}; delete it to make it again") from error


class LinesWriter:
    """Writes lines to a .gz file, as a context manager; neither name nor time of the file is in its bytes."""

    def __init__(self, path: Path, *, level: int) -> None:
        self._file = open(path, "wb")
        self._zipped = gzip.GzipFile("", "wb", level, self._file, mtime=0)

    def write(self, line: str) -> None:
        """Appends a line, which ends with its line break."""
        self._zipped.write(line.encode())

    def __enter__(self) -> LinesWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._zipped.close()
        self._file.close()
