"""A file of JSON lines that a run which was killed goes on with: rows are appended as they are done.

The end of each row is a digest of what it depends on beside its input. Once all rows are there, they are put into the
order of the input.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qwen_jax.errors import DataError, FileError

_NUMBERS = re.compile(rb'\{"index": (\d{1,15}), "sample": (\d{1,15}), ')


class ResumableFile:
    """Rows by number, in a file. A context manager, which holds the file for this process.

    Attributes:
      total: rows there will be.
      missing: numbers of the rows that are still to be made, in order.
    """

    def __init__(
        self, path: Path, total: int, n: int, head: Callable[[int], bytes], *, digest: str, overwrite: bool
    ) -> None:
        """Reads what is there; what is left of a row that was being written is removed.

        Args:
          path: of the file, which is made if there is none.
          total: rows there will be.
          n: row i is sample i % n of the input i // n.
          head: what the line of a row begins with.
          digest: see above.
          overwrite: whether all that is there is removed.

        Raises DataError if there is a row of something else, FileError or OSError.
        """
        self._path, self.total, self._n, self._head = path.expanduser().resolve(), total, n, head
        self._end = f'"run": "{digest}"}}\n'
        self._file = self._path.open("a+b")
        try:
            self._hold()
            if overwrite:
                self._file.truncate(0)
            self._places = self._read()
        except BaseException:
            self._file.close()
            raise
        self.missing = [number for number in range(total) if number not in self._places]

    def __enter__(self) -> ResumableFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, number: int, row: Mapping[str, Any]) -> None:
        """Adds a row, which begins with its head."""
        self._places[number] = self._file.seek(0, os.SEEK_END)
        self._file.write((json.dumps(row, ensure_ascii=False)[:-1] + ", " + self._end).encode())
        self._file.flush()

    def read(self, number: int) -> dict[str, Any]:
        """A row that is there."""
        self._file.seek(self._places[number])
        return json.loads(self._file.readline())

    def sort(self) -> None:
        """Puts the rows, all of which must be there, into their order; the file is the old or the new one, whole."""
        places = [self._places[number] for number in range(self.total)]
        if places == sorted(places):
            return
        partial = self._path.with_name(f".{self._path.name}.partial")
        with partial.open("wb") as file:
            for place in places:
                self._file.seek(place)
                file.write(self._file.readline())
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(self._path, partial)
        os.replace(partial, self._path)
        folder = os.open(self._path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

    def _hold(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileError(f"{self._path} is being written by another process; wait for it to end") from None

    def _read(self) -> dict[int, int]:
        """Where the line of each row begins."""
        places: dict[int, int] = {}
        end = 0
        self._file.seek(0)
        for count, line in enumerate(self._file, 1):
            number, wrong = self._row(line)
            if wrong is None and number in places:
                wrong = "is there twice"
            if wrong is not None:
                raise DataError(
                    f"{self._path}:{count}: this row {wrong}; choose another output, or --overwrite this one"
                )
            if line.endswith(b"\n"):
                places[number] = end
                end += len(line)
        self._file.truncate(end)
        return places

    def _row(self, line: bytes) -> tuple[int, str | None]:
        """The number of the row that a line holds, or what is wrong with it; of a cut one only its beginning counts."""
        whole = line.endswith(b"\n")
        found = _NUMBERS.match(line)
        if found is None:
            ours = not whole and any(self._head(number).startswith(line) for number in range(self.total))
            return -1, None if ours else "is none of such a file"
        index, sample = map(int, found.groups())
        number = index * self._n + sample
        if sample >= self._n or number >= self.total:
            return -1, f"is for sample {sample} of input {index}, and there is none"
        head = self._head(number)
        if not (line.startswith(head) or not whole and head.startswith(line)):
            return number, f"is for another input than number {index}"
        if whole and not line.endswith(self._end.encode()):
            return number, "was made by another model, with another seed or other options"
        return number, None
