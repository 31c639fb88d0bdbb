"""Documents of a source, in an order that depends on the file names alone.

Nothing is dropped in silence: what cannot be read is an error that names file and line, or, as far as
`max_bad_fraction` allows, skipped and counted in a `Tally`.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import fnmatch
import gzip
import hashlib
import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, BinaryIO, cast

from qwen_jax.errors import ConfigError, DataError, FileError
from train.data.config import PythonStdlib, Source

MAX_DOCUMENT_BYTES = 100_000_000
# Text rarely shrinks more than 20-fold; a gzip bomb is 1000-fold.
MAX_GZIP_RATIO = 100
_HEAD = 4096  # bytes of a file that tell what it is
LINES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
# Files that would need a library of their own, and what makes files of them that are read.
_NOT_READ = {
    ".parquet": 'write it as JSON lines: pandas.read_parquet(a).to_json(b, orient="records", lines=True)',
    **dict.fromkeys((".zst", ".xz", ".bz2", ".zip", ".tar"), "unpack it, or pack each file with gzip"),
}
# Installed packages are not the standard library.
NOT_STDLIB = ("site-packages", "dist-packages", "__pycache__")


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """A file as it was when the source was listed; `name` is its path below the source, with slashes."""

    path: Path
    name: str
    size: int
    mtime_ns: int


@dataclasses.dataclass
class Tally:
    """What became of the documents read so far. `max_bad_fraction` is the part that may be unreadable."""

    max_bad_fraction: float
    documents: int = 0
    empty: int = 0
    bad: int = 0
    first_bad: str = ""

    def reject(self, fault: str) -> None:
        """Counts an unreadable document; a DataError where none may be."""
        if not self.max_bad_fraction:
            raise DataError(f"{fault}; mend or remove it, or set data.max_bad_fraction to skip some")
        self.bad += 1
        self.first_bad = self.first_bad or fault

    def check(self) -> None:
        """A DataError if too many of the documents were unreadable."""
        total = self.documents + self.bad
        if self.bad > self.max_bad_fraction * total:
            raise DataError(
                f"{self.bad} of {total} documents are unreadable, data.max_bad_fraction={self.max_bad_fraction} allows "
                f"{int(self.max_bad_fraction * total)}; the first: {self.first_bad}"
            )

    def __str__(self) -> str:
        skipped = [f"{self.empty} empty"] * bool(self.empty)
        skipped += [f"{self.bad} unreadable (the first: {self.first_bad})"] * bool(self.bad)
        return f"{self.documents} documents" + (f"; skipped {', '.join(skipped)}" if skipped else "")


def new_tally(source: Source, max_bad_fraction: float) -> Tally:
    """A tally for `source`. The standard library has test files that are not UTF-8 on purpose: all may be skipped."""
    return Tally(1.0 if isinstance(source, PythonStdlib) else max_bad_fraction)


# ---------------------------------------------------------------------------------------------------- files


def find_files(source: Source, report: Callable[[str], None]) -> list[SourceFile]:
    """The files of `source` sorted by name. None is a FileError, and one in a form that is not read a DataError; hidden
    files and devices are skipped and reported.
    """
    root, pattern, excluded = _where(source)
    skipped: list[str] = []
    with _readable(root):
        if root.is_file():
            found = [_describe(root, root.name)]
        elif root.is_dir():
            found = list(_walk(root, pattern, excluded, skipped))
        else:
            given = f'data.source.path="{source.path}"' if not isinstance(source, PythonStdlib) else str(root)
            raise FileError(f"{given} is no file, no directory and no glob that matches one")
    if skipped:
        report(f"source: skipped {len(skipped)} entries: {', '.join(skipped[:3])}{', …' if len(skipped) > 3 else ''}")
    if not found:
        raise FileError(f"no file in {root} matches {'/'.join(pattern)}; check data.source")
    for file in found:
        if remedy := _NOT_READ.get(PurePath(file.name.lower()).suffix):
            raise DataError(
                f"{file.path} is no text and no JSON lines, packed with gzip or not: {remedy}; or leave it out"
            )
    return sorted(found, key=lambda file: file.name)


def _where(source: Source) -> tuple[Path, Sequence[str], Sequence[str]]:
    """Root, pattern below it in parts, and names left out. A glob is split where its first wildcard begins."""
    if isinstance(source, PythonStdlib):
        return Path(sysconfig.get_paths()["stdlib"]), ("**", "*.py"), NOT_STDLIB
    path = Path(source.path).expanduser()
    wild = next((i for i, part in enumerate(path.parts) if set(part) & set("*?[")), None)
    if path.exists() or wild is None:
        if source.pattern and path.is_file():
            raise ConfigError(f'data.source.pattern="{source.pattern}" limits a directory, and {path} is a file')
        return path, PurePath(source.pattern).parts or ("**",), ()
    if source.pattern:
        raise ConfigError(f'data.source.path="{source.path}" is a glob already; leave data.source.pattern empty')
    return Path(*path.parts[:wild]), path.parts[wild:], ()


def _walk(root: Path, pattern: Sequence[str], excluded: Sequence[str], skipped: list[str]) -> Iterator[SourceFile]:
    """Regular files below `root` that match. Links are followed, each real directory is entered once."""
    entered: set[tuple[int, int]] = set()

    def walk(folder: Path, parents: tuple[str, ...]) -> Iterator[SourceFile]:
        status = folder.stat()
        if (status.st_dev, status.st_ino) in entered:
            skipped.append(f"{folder} (a link to a directory already read)")
            return
        entered.add((status.st_dev, status.st_ino))
        for entry in sorted(folder.iterdir()):
            parts = (*parents, entry.name)
            if entry.name in excluded:
                continue
            if entry.name.startswith("."):
                skipped.append(f"{entry} (hidden)")
            elif entry.is_dir():
                if "**" in pattern or len(parts) < len(pattern):
                    yield from walk(entry, parts)
            elif _matches(parts, pattern):
                if entry.is_file():
                    yield _describe(entry, "/".join(parts))
                else:
                    skipped.append(f"{entry} (not a regular file)")

    yield from walk(root, ())


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a relative path matches a glob, both split at slashes; ** stands for any number of parts."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[start:], pattern[1:]) for start in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _describe(path: Path, name: str) -> SourceFile:
    status = path.stat()
    return SourceFile(path, name, status.st_size, status.st_mtime_ns)


def fingerprint(files: Sequence[SourceFile], *, content: bool) -> str:
    """sha256 of the names and sizes of `files`, and of their bytes where `content`."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.size} ".encode() + os.fsencode(file.name) + b"\0")
        if content:
            with _readable(file.path), open(file.path, "rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def check_unchanged(files: Sequence[SourceFile]) -> None:
    """A DataError if a file was written since it was listed: its tokens may be half old, half new."""
    for file in files:
        with _readable(file.path):
            if _describe(file.path, file.name) != file:
                raise DataError(f"{file.path} changed while it was read; start again when it is finished")


# ------------------------------------------------------------------------------------------------ documents


def documents(files: Sequence[SourceFile], *, field: str, tally: Tally) -> Iterator[tuple[str, str]]:
    """(origin, text) of every document of `files`; origin is the path, with `:line` in JSON lines.

    A byte order mark is dropped, CRLF kept. `tally` counts what was skipped; too much of it is a DataError once
    all is read. Whatever the tally allows, a broken gzip file and a document over 100 MB are DataErrors.
    """
    for file in files:
        lines = file.name.lower().endswith(LINES)
        for origin, raw in records(file, lines=lines):
            try:
                # A blank line is an empty document, not broken JSON.
                text = text_of(json_object(raw), field) if lines and raw.strip() else plain_text(raw)
            except ValueError as error:  # what JSON, UTF-8 and the functions below raise
                tally.reject(f"{origin}: {error}")
                continue
            if not text.strip():
                tally.empty += 1
                continue
            tally.documents += 1
            yield origin, text
    tally.check()


def rows(files: Sequence[SourceFile], tally: Tally) -> Iterator[tuple[str, dict[str, Any]]]:
    """(origin, object) of every JSON line of `files`, or of every element of those that are one JSON array.

    Empty lines and what is no object are counted in `tally`, as `documents` does; the caller counts the rest.
    """
    for file in files:
        array = _is_array(file)
        for origin, raw in records(file, lines=not array):
            if not raw.strip():
                tally.empty += 1
                continue
            try:
                values = _json(raw)
            except ValueError as error:
                tally.reject(f"{origin}: {error}")
                continue
            named = (
                [(f"{origin}[{index}]", value) for index, value in enumerate(values)] if array else [(origin, values)]
            )
            for where, value in named:
                if isinstance(value, dict):
                    yield where, value
                else:
                    tally.reject(f"{where}: wanted a JSON object, got a {type(value).__name__}")


def _is_array(file: SourceFile) -> bool:
    """Whether a file is one JSON array, in which no line has an object of its own."""
    with _readable(file.path), _open(file) as stream:
        return stream.read(_HEAD).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def _open(file: SourceFile) -> BinaryIO:
    return cast(BinaryIO, gzip.open(file.path) if _zipped(file) else open(file.path, "rb"))


def _zipped(file: SourceFile) -> bool:
    return file.name.lower().endswith(".gz")


def records(file: SourceFile, *, lines: bool) -> Iterator[tuple[str, bytes]]:
    """The lines of a file, or the whole of it, as (origin, bytes): unzipped, without a byte order mark."""
    zipped = _zipped(file)
    number = total = 0
    with _readable(file.path), _open(file) as stream:
        while raw := _read(stream, line=lines):
            number, total = number + 1, total + len(raw)
            origin = f"{file.path}:{number}" if lines else str(file.path)
            if len(raw) > MAX_DOCUMENT_BYTES:
                raise DataError(f"{origin} is a document of over {MAX_DOCUMENT_BYTES:,} bytes; split it")
            if zipped and total > MAX_DOCUMENT_BYTES + MAX_GZIP_RATIO * file.size:
                raise DataError(
                    f"{file.path} unpacks to over {MAX_GZIP_RATIO} times its size; unpack it if you trust it"
                )
            yield origin, raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
        if not number and not lines:
            yield str(file.path), b""


def _read(stream: BinaryIO, *, line: bool) -> bytes:
    # One byte over the limit is enough to know, and bounds the memory.
    return stream.readline(MAX_DOCUMENT_BYTES + 1) if line else stream.read(MAX_DOCUMENT_BYTES + 1)


def check_text(text: str) -> str:
    """The text; a ValueError for a lone surrogate, or a character that no text has."""
    text.encode("utf-8")
    if "\0" in text:
        raise ValueError("has a NUL character, so it is no text")
    return text


def plain_text(raw: bytes) -> str:
    """UTF-8 bytes as text; a ValueError if they are none."""
    return check_text(raw.decode("utf-8"))


def _json(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None


def json_object(raw: bytes) -> dict[str, Any]:
    """A JSON line; a ValueError if it is no object."""
    record = _json(raw)
    if not isinstance(record, dict):
        raise ValueError(f"wanted a JSON object on one line, got a {type(record).__name__}")
    return record


def text_of(record: dict[str, Any], field: str) -> str:
    """The text in a field of a JSON object; a ValueError if there is none."""
    if field not in record:
        raise ValueError(f'no field "{field}" among {sorted(record)[:5]}')
    if not isinstance(record[field], str):
        raise ValueError(f'field "{field}" holds a {type(record[field]).__name__}, wanted a text')
    return check_text(record[field])


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns what the system and gzip raise about `path` into errors that name it."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is a broken gzip file: {error}; fetch or make it again") from error
    except OSError as error:
        raise FileError(f"cannot read {error.filename or path}: {error.strerror}") from error
