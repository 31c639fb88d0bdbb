"""Files to documents: text as it is, JSON lines by field, HTML as the text that a reader sees."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.errors import DataError, FileError
from train.data import sources
from train.data.corpus.documents import Document
from train.data.corpus.filtering import write
from train.data.corpus.tasks import Summary, Task
from train.data.sources import LINES, SourceFile

FILES = "files.json"
UNREADABLE, EMPTY, NO_TEXT, TOO_DEEP = "unreadable", "empty", "HTML without text", "HTML nested too deeply"
# As browsers; the time that extraction takes grows with the square of it.
MAX_DEPTH = 512
_NO_TAGS = re.compile(r"<!--.*?-->|<(script|style)\b.*?</\1\s*>", re.DOTALL | re.IGNORECASE)
_TAG = re.compile(r"<(/?)([a-z][a-z0-9-]*)", re.IGNORECASE)
# Those that never have an end, and those that the next one of them ends.
_FLAT = frozenset("area base br col embed hr img input link meta source track wbr p li td th tr dd dt option".split())
_HTML_NAMES = (".html", ".htm", ".html.gz", ".htm.gz")
_HTML_BEGINS = re.compile(r"\ufeff?\s*(<\?xml[^>]*>\s*)?(<!doctype\s+html|<html)\b", re.IGNORECASE)


def shard_files(files: Sequence[SourceFile], megabytes: int) -> list[list[SourceFile]]:
    """Files in order, in groups of up to so many megabytes, at least one in each."""
    shards: list[list[SourceFile]] = []
    size = 0
    for file in files:
        if not shards or size + file.size > megabytes * 1_000_000:
            shards.append([])
            size = 0
        shards[-1].append(file)
        size += file.size
    return shards


def run_files(task: Task, *, shards: Sequence[Sequence[SourceFile]]) -> Summary:
    """Writes down which files are in a shard."""
    rows = [[str(file.path), file.name, file.size, file.mtime_ns] for file in shards[task.index]]
    task.output(FILES).write_text(json.dumps(rows))
    return Summary()


def run_read(task: Task, *, previous: str, field: str, fields: tuple[str, ...], bad: bool) -> Summary:
    """Reads the files of a shard.

    Args:
      previous: the phase that listed them.
      field, fields: of JSON lines: the key of the text, and those that are kept beside it.
      bad: whether unreadable documents are dropped; else the first is a DataError.
    """
    rows = json.loads(task.input(previous, FILES).read_text())
    files = [SourceFile(Path(path), name, size, time) for path, name, size, time in rows]
    summary = Summary()

    def documents() -> Iterator[tuple[Document, str]]:
        for id, parse in _records(files, field, fields):
            summary.read += 1
            try:
                text, notes = parse()
            except ValueError as error:  # what JSON, UTF-8 and `sources` raise
                if not bad:
                    raise DataError(f"{id}: {error}; mend or remove it, or set max_bad_fraction to skip some") from None
                yield Document("", id), f"{UNREADABLE}: {error}"
                continue
            summary.characters_read += len(text)
            yield _document(text, id, notes, summary)

    write(task, documents(), summary)
    sources.check_unchanged(files)
    return summary


def run_check(task: Task, *, previous: str, tasks: int, max_bad_fraction: float) -> Summary:
    """A DataError if too many of all documents were unreadable."""
    done = [Summary.of_json(json.loads(task.input(previous, "json", i).read_text())["summary"]) for i in range(tasks)]
    total = sum(done, Summary())
    bad = total.dropped[UNREADABLE]
    if bad > max_bad_fraction * total.read:
        first = next(example for example in total.examples if example["reason"] == UNREADABLE)
        raise DataError(
            f"{bad} of {total.read} documents are unreadable, max_bad_fraction={max_bad_fraction} allows "
            f"{int(max_bad_fraction * total.read)}; the first: {first['id']}: {first['detail']}"
        )
    return Summary()


Parsed = Callable[[], tuple[str, dict[str, Any]]]  # text and notes; a ValueError if there are none


def _records(files: Sequence[SourceFile], field: str, fields: tuple[str, ...]) -> Iterator[tuple[str, Parsed]]:
    """Where each document of some files is, and what reads it."""
    for file in files:
        name = file.name.lower()
        lines = name.endswith(LINES)
        for number, (_, raw) in enumerate(sources.records(file, lines=lines), 1):
            if lines:
                yield f"{file.name}:{number}", functools.partial(_of_line, raw, field, fields)
            elif name.endswith(_HTML_NAMES):
                yield file.name, functools.partial(_of_html, raw)
            else:
                yield file.name, lambda raw=raw: (sources.plain_text(raw), {})


def _of_line(raw: bytes, field: str, fields: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    if not raw.strip():  # a blank line is an empty document, not broken JSON
        return "", {}
    record = sources.json_object(raw)
    return sources.text_of(record, field), {name: record[name] for name in fields if name in record}


def _of_html(raw: bytes) -> tuple[str, dict[str, Any]]:
    """The markup of a page in whatever encoding it has."""
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding

    return bytes_to_str(raw, detect_encoding(raw, from_html_meta=True) or "utf-8"), {}


def _document(text: str, id: str, notes: dict[str, Any], summary: Summary) -> tuple[Document, str]:
    """The document, and why it is dropped."""
    if not text.strip():
        return Document(text, id, notes), EMPTY
    if not _HTML_BEGINS.match(text):
        return Document(text, id, notes), ""
    summary.counts["HTML"] += 1
    if depth(text) > MAX_DEPTH:
        return Document(text, id, notes), TOO_DEEP
    found = extract(text)
    return (Document(found, id, notes), "") if found.strip() else (Document(text, id, notes), NO_TEXT)


def depth(html: str) -> int:
    """How deep the tags of a page are nested, about."""
    level = most = 0
    for tag in _TAG.finditer(_NO_TAGS.sub("", html)):
        if tag[2].lower() not in _FLAT:
            level = max(0, level - 1) if tag[1] else level + 1
            most = max(most, level)
    return most


def extract(html: str) -> str:
    """The main text of a page, without navigation, scripts and the like. A FileError without resiliparse."""
    try:
        from resiliparse.extract.html2text import extract_plain_text
    except ImportError:
        raise FileError("HTML needs the package resiliparse: pip install 'qwen-jax[corpus]'") from None
    return extract_plain_text(html, main_content=True, alt_texts=False, preserve_formatting=True)
