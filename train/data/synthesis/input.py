"""The rows of a file of JSON lines, checked once and then read one by one as they are needed."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen_jax.errors import DataError, FileError
from train.data.synthesis.rows import Row

MAX_BYTES = 100 << 20  # of a line


class Input:
    """Rows by number; blank lines are none. A context manager.

    Attributes:
      digest: of the bytes of the file.
    """

    def __init__(self, path: Path, check: Callable[[Row], None]) -> None:
        """Reads the file once. `check` raises ValueError for a row that cannot be used.

        Raises DataError with the line, or FileError.
        """
        self._path, self._starts = path, array("q")
        digest, end = hashlib.sha256(), 0
        try:
            with path.open("rb") as file:
                number = 0
                while line := file.readline(MAX_BYTES + 1):
                    number, start, end = number + 1, end, end + len(line)
                    digest.update(line)
                    if not line.strip():
                        continue
                    self._starts.append(start)
                    try:
                        check(_parse(line, first=start == 0))
                    except ValueError as error:
                        raise DataError(f"{path}:{number}: {error}") from error
        except OSError as error:
            raise FileError(f"cannot read {path}: {error.strerror}") from error
        if not self._starts:
            raise DataError(f"{path} has no rows; JSON lines are wanted")
        self.digest = digest.hexdigest()
        self._file = path.open("rb")

    def __enter__(self) -> Input:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self._file.seek(self._starts[index])
        try:
            return _parse(self._file.readline(), first=self._starts[index] == 0)
        except ValueError as error:
            raise DataError(f"{self._path} changed while it was read; start again when it is finished") from error


def _parse(line: bytes, *, first: bool) -> dict[str, Any]:
    if len(line) > MAX_BYTES:
        raise ValueError(f"a line of over {MAX_BYTES:,} bytes")
    try:
        row = json.loads(line.decode("utf-8-sig" if first else "utf-8"))
        json.dumps(row, ensure_ascii=False, allow_nan=False).encode()  # finds lone surrogates
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("holds a lone surrogate, which is no text") from None
    if not isinstance(row, dict):
        raise ValueError(f"wanted a JSON object, got a {type(row).__name__}")
    return row
