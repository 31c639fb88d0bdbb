"""Tasks: functions of files that leave files, each done once, whoever does it and however often it is begun.

A phase is as many tasks as it has shards. A task writes beside its outputs, gives them their names when all are whole,
and last writes a record: the digest of what it was made of, and those of what it made. A record that still holds is
as good as doing the task again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qwen_jax.errors import DataError, FileError
from qwen_jax.weights.manifest import sync

FORMAT = 1  # raised when the same settings make other bytes than an earlier release
DROPPED = "dropped.jsonl.gz"  # for people alone: no task reads it
EXAMPLES = 3  # of each reason are kept, per task
EXCERPT = 300  # characters of an example


@dataclasses.dataclass
class Summary:
    """What a task did to the documents it read.

    Attributes:
      read, kept: documents.
      characters_read, characters_kept: of their texts.
      dropped: documents by reason.
      counts: anything else worth counting.
      examples: {"id", "reason", "text"} of some that were dropped.
    """

    read: int = 0
    kept: int = 0
    characters_read: int = 0
    characters_kept: int = 0
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)
    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    examples: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def drop(self, reason: str, example: dict[str, Any]) -> None:
        """Counts a document that was dropped."""
        if self.dropped[reason] < EXAMPLES:
            self.examples.append(example)
        self.dropped[reason] += 1

    def __add__(self, other: Summary) -> Summary:
        shown = Counter(example["reason"] for example in self.examples)
        more = []
        for example in other.examples:
            shown[example["reason"]] += 1
            more += [example] * (shown[example["reason"]] <= EXAMPLES)
        sums = {name: getattr(self, name) + getattr(other, name) for name in _SUMS}
        return Summary(**sums, examples=self.examples + more)

    @classmethod
    def of_json(cls, values: dict[str, Any]) -> Summary:
        """What JSON made of `vars`."""
        return cls(**{**values, "dropped": Counter(values["dropped"]), "counts": Counter(values["counts"])})


_SUMS = [field.name for field in dataclasses.fields(Summary) if field.name != "examples"]


@dataclasses.dataclass(frozen=True)
class Input:
    """What the tasks of a phase read: of an earlier phase, the task of the same number, or all `tasks` of it."""

    phase: str
    tasks: int | None = None


@dataclasses.dataclass(frozen=True)
class Phase:
    """Tasks that do not need each other.

    Attributes:
      name: of the folder of its records.
      tasks: how many.
      run: does one of them.
      settings: all that its result depends on besides its inputs.
      inputs: what it reads.
      folder: of its outputs, below the corpus; "" for that of its records.
      alone: whether it wants the machine for itself.
    """

    name: str
    tasks: int
    run: Callable[[Task], Summary]
    settings: str
    inputs: tuple[Input, ...] = ()
    folder: str = ""
    alone: bool = False


class Task:
    """One task of a phase, in the folder of a corpus."""

    def __init__(self, corpus: Path, phase: Phase, index: int) -> None:
        self.corpus, self.phase, self.index = corpus, phase, index
        self._folder = corpus / phase.folder if phase.folder else corpus / "work" / phase.name
        self._outputs: dict[str, Path] = {}

    def input(self, phase: str, suffix: str, index: int | None = None) -> Path:
        """What a task of an earlier phase left, by default that of the same number."""
        return self.corpus / "work" / phase / f"{self.index if index is None else index:05}.{suffix}"

    def output(self, suffix: str) -> Path:
        """Where to write an output, until it is whole."""
        name = f"{self.index:05}.{suffix}"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._outputs[name] = self._folder / f"{name}.partial"
        return self._outputs[name]

    def keep(self, name: str) -> None:
        """Counts a file that is in its place already as an output."""
        self._outputs[name] = self._folder / name

    def perform(self) -> Summary:
        """What the task did, now or in an earlier run. A FileError where it cannot write."""
        path = self.input(self.phase.name, "json")
        try:
            key = self._key()
            record = _read(path)
            if record is None or record["key"] != key or not self._holds(record["outputs"]):
                path.unlink(missing_ok=True)
                summary = self.phase.run(self)
                self._commit(path, key, summary)
                return summary
        except OSError as error:
            raise FileError(f"cannot write {error.filename or self.corpus}: {error.strerror}; make room") from error
        return Summary.of_json(record["summary"])

    def _key(self) -> str:
        """A digest of all that the result depends on."""
        digest = hashlib.sha256(f"{FORMAT} {self.phase.name} {self.phase.settings}".encode())
        for each in self.phase.inputs:
            for index in [self.index] if each.tasks is None else range(each.tasks):
                path = self.input(each.phase, "json", index)
                record = _read(path)
                if record is None:
                    raise DataError(f"{path} is missing: {each.phase} is not done; run the phases in their order")
                made = sorted((name, value) for name, value in record["outputs"].items() if DROPPED not in name)
                digest.update(f"\n{each.phase} {index} {made}".encode())
        return digest.hexdigest()

    def _holds(self, outputs: dict[str, str]) -> bool:
        paths = {name: self._folder / name for name in outputs}
        return all(path.is_file() and _sha256(path) == outputs[name] for name, path in paths.items())

    def _commit(self, path: Path, key: str, summary: Summary) -> None:
        digests = {name: _sha256(partial) for name, partial in self._outputs.items()}
        for name, partial in self._outputs.items():
            sync(partial)  # a record that survives a power cut must not speak of files that do not
            os.replace(partial, self._folder / name)
        for stale in self._folder.glob(f"{self.index:05}.*"):  # of other settings, or of a killed process
            if stale.name not in digests:
                stale.unlink()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".json.partial")
        partial.write_text(json.dumps({"key": key, "outputs": digests, "summary": vars(summary)}, indent=1))
        sync(partial)
        if digests:
            sync(self._folder)
        os.replace(partial, path)
        sync(path.parent)


def summaries(corpus: Path, phase: Phase) -> Iterator[Summary]:
    """What the tasks of a phase did, which are all done."""
    for index in range(phase.tasks):
        record = _read(Task(corpus, phase, index).input(phase.name, "json"))
        if record is None:
            raise DataError(f"task {index} of {phase.name} is not done; run it first")
        yield Summary.of_json(record["summary"])


def _read(path: Path) -> dict[str, Any] | None:
    """A record; None if there is none that can be read."""
    try:
        record = json.loads(path.read_text())
        return record if {"key", "outputs", "summary"} <= record.keys() else None
    except (FileNotFoundError, ValueError, AttributeError):
        return None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
