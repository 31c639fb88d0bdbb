"""What a run reads: the schema of the `data` part of a config. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
from pathlib import PurePath

from qwen_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """Text files and JSON lines.

    Attributes:
      path: a file, a directory (read recursively) or a glob such as "corpus/**/*.jsonl.gz". Files that end in
        .jsonl or .json, .gz or not, hold one JSON object per line; any other file is one document.
      pattern: limits a directory, e.g. "**/*.py"; empty for every file.
      field: the key of the text in a JSON object.
    """

    path: str
    pattern: str = ""
    field: str = "text"

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError('path="" names no text; give a file, a directory or a glob')
        if not self.field:
            raise ConfigError('field="" names no key of a JSON line; the usual one is "text"')
        if PurePath(self.pattern).is_absolute() or ".." in PurePath(self.pattern).parts:
            raise ConfigError(f'pattern="{self.pattern}" must stay inside path, like "**/*.py"')


@dataclasses.dataclass(frozen=True, kw_only=True)
class PythonStdlib:
    """The .py files of the Python that runs: a real corpus of some 30 MB that needs no download."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainBPE:
    """A byte-level BPE trained on the training split.

    Attributes:
      vocab_size: its tokens: 256 bytes, the merges, 3 special tokens.
    """

    vocab_size: int

    def __post_init__(self) -> None:
        if self.vocab_size < 256 + 3:
            raise ConfigError(f"vocab_size={self.vocab_size} must be at least 259: 256 bytes and 3 special tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerFile:
    """An existing tokenizer.

    Attributes:
      path: a folder as published (tokenizer.json, or vocab.json and merges.txt, or qwen.tiktoken), or one such file.
    """

    path: str

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError('path="" names no tokenizer; give a published folder or a tokenizer.json')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Text, how it becomes tokens, and how long the rows are.

    Attributes:
      source: where the documents come from.
      tokenizer: what makes them tokens.
      sequence_length: predicted tokens per row.
      full_length: fraction of the rows that are `sequence_length` tokens of the text as they follow each other. Each
        other row is cut, as if documents ended there, into pieces of one of `shorter_lengths`, drawn for it.
      shorter_lengths: those lengths.
      held_out: fraction of the documents kept for evaluation. The content of a document decides its side, so
        copies never fall on both. 0 for none.
      tokens: folder of token shards, used as it is where one exists, made there otherwise; empty for one
        inside the run directory, which is checked against the source at each start.
      max_bad_fraction: fraction of the documents that may be unreadable; they are skipped and counted.
    """

    source: Text | PythonStdlib
    tokenizer: TrainBPE | TokenizerFile
    sequence_length: int
    full_length: float = 1.0
    shorter_lengths: tuple[int, ...] = ()
    held_out: float = 0.02
    tokens: str = ""
    max_bad_fraction: float = 0.0

    def __post_init__(self) -> None:
        if self.sequence_length < 1:
            raise ConfigError(f"sequence_length={self.sequence_length} must be at least 1")
        if not 0 <= self.full_length <= 1:
            raise ConfigError(f"full_length={self.full_length} must be a fraction of the rows: between 0 and 1")
        if self.full_length < 1 and not self.shorter_lengths:
            raise ConfigError(f"full_length={self.full_length} leaves rows for shorter_lengths, and there are none")
        for length in self.shorter_lengths:
            if not 1 <= length < self.sequence_length:
                raise ConfigError(
                    f"shorter_lengths={self.shorter_lengths} must be at least 1 and below "
                    f"sequence_length={self.sequence_length}"
                )
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"held_out={self.held_out} must be a fraction of the documents: 0 or more and below 1")
        if not 0 <= self.max_bad_fraction < 1:
            raise ConfigError(f"max_bad_fraction={self.max_bad_fraction} must be a fraction: 0 or more and below 1")
