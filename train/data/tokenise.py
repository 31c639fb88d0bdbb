"""Documents to token shards: trains or loads the tokenizer, encodes in batches, writes both splits."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.errors import ConfigError, DataError, FileError
from qwen_jax.text import Tokenizer, train_bpe
from qwen_jax.text.tools import CALL_TAGS, THOUGHT_TAGS
from train.data import code, conversations, manifest, preferences, sources
from train.data.config import Chats, Data, Part, Preferences, PythonStdlib, Source, Text, TokenizerFile
from train.data.conversations import ChatFormat
from train.data.documents import Document, encode
from train.data.manifest import MANIFEST, SPLITS, TOKENIZER, Manifest, Split, to_disk
from train.data.shards import ShardWriter
from train.data.sources import SourceFile, Tally

# Merges hardly change with more text than this, and training keeps a count for every distinct piece of it.
MAX_TRAINING_BYTES = 200_000_000
# Enough to keep all cores busy.
BATCH_CHARACTERS = 4_000_000
MAX_UINT16_TOKENS = 2**16
REPORT_SECONDS = 30.0
# Fields of a source that do not say what becomes of its files: which they are is known, and rows are made later.
NOT_OPTIONS = ("path", "pattern", "too_long")

Report = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """How the documents of a run are read.

    Attributes:
      config: the run's.
      chat: what conversations are written in; None where there are none.
      seed: draws what is drawn.
      report: takes a line about what happens.
    """

    config: Data
    chat: ChatFormat | None
    seed: int
    report: Report

    def documents(self, source: Source, files: Sequence[SourceFile], tally: Tally) -> Iterator[Document]:
        """The documents of a source."""
        if isinstance(source, Chats):
            assert self.chat is not None, "a run with conversations has a format for them"
            if isinstance(source, Preferences):
                return preferences.documents(files, source, self.chat.form, tally)
            return conversations.documents(files, source, self.chat.form, tally)
        field = "" if isinstance(source, PythonStdlib) else source.field
        texts = sources.documents(files, field=field, tally=tally)
        if isinstance(source, Text) and (source.fim or source.repositories):
            return code.documents(texts, files, source, seed=self.seed)
        return (Document(origin=origin, text=text) for origin, text in texts)

    def tally(self, source: Source) -> Tally:
        """A new count of the documents of a source."""
        return sources.new_tally(source, self.config.max_bad_fraction)

    def describe(self, source: Source, files: Sequence[SourceFile], *, content: bool = True) -> manifest.Source:
        """What the manifest says of a source; without `content` the bytes are not read, and that field is ""."""
        return manifest.Source(
            description=_words(source),
            options=self.options(source),
            files=len(files),
            bytes=sum(file.size for file in files),
            listing=sources.fingerprint(files, content=False),
            content=sources.fingerprint(files, content=True) if content else "",
        )

    def options(self, source: Source) -> dict[str, str]:
        """What else makes tokens of the same files, as JSON."""
        fields = dataclasses.asdict(source).items()
        options = {"source": type(source).__name__} | {name: value for name, value in fields if name not in NOT_OPTIONS}
        if isinstance(source, Chats) and self.chat:
            options["format"] = self.chat.name
        return {name: json.dumps(value) for name, value in options.items()}


def _words(section: Any) -> str:
    """A section as the config names it: what is not as it is by default."""
    if not dataclasses.is_dataclass(section):
        return repr(section)
    given = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
    default = {field.name: field.default for field in dataclasses.fields(section)} | {"columns": {}}
    changed = [f"{name}={_words(value)}" for name, value in given.items() if value != default[name]]
    return f"{type(section).__name__}({', '.join(changed)})"


def make(reading: Reading, part: Part, folder: Path, tokenizer: Callable[[], Tokenizer]) -> None:
    """Fills `folder` with token shards, the manifest last. What a killed process left there is made anew."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder, reading.report):
            if not (folder / MANIFEST).exists():  # whoever held the lock may have made it
                _remove_leftovers(folder)
                _write(reading, part, folder, tokenizer())
    except OSError as error:
        raise FileError(f"cannot write {folder}: {error.strerror}; make room or choose another data.tokens") from error


def make_tokenizer(reading: Reading) -> Tokenizer:
    """The tokenizer that the config names, or one trained on the training split of all parts that are read."""
    wanted = reading.config.tokenizer
    if isinstance(wanted, TokenizerFile):
        return Tokenizer.load(Path(wanted.path).expanduser())
    reading.report(f"tokenizer: training a byte-level BPE of {wanted.vocab_size:,} tokens")
    return train_bpe(_training_texts(reading), vocab_size=wanted.vocab_size, extra_tokens=wanted.extra_tokens)


def _write(reading: Reading, part: Part, folder: Path, tokenizer: Tokenizer) -> None:
    files = sources.find_files(part.source, reading.report)
    source = reading.describe(part.source, files)
    reading.report(f"source: {source.files:,} files, {source.bytes / 1e6:.1f} MB, {source.description}")
    check_tokens(part.source, reading, tokenizer)
    dtype = "uint16" if tokenizer.num_tokens <= MAX_UINT16_TOKENS else "uint32"
    splits = _write_shards(reading, part, folder, files, tokenizer, dtype)
    sources.check_unchanged(files)
    with open(folder / TOKENIZER, "wb") as file:
        file.write(tokenizer.to_bytes())
        to_disk(file)
    Manifest(
        dtype=dtype,
        vocab_size=tokenizer.num_tokens,
        end_of_text=tokenizer.end_of_text,
        tokenizer=tokenizer.fingerprint,
        source=source,
        held_out=reading.config.held_out,
        splits=splits,
    ).write(folder)


def check_tokens(source: Source, reading: Reading, tokenizer: Tokenizer) -> None:
    """Raises ConfigError for a tokenizer without a token that is written; tags that can be spelled are reported."""
    needed = code.control_tokens(source) if isinstance(source, Text) else ()
    if missing := [token for token in needed if token not in tokenizer.control]:
        raise ConfigError(
            f"the tokenizer has no token {missing[0]}, which data.source writes; take one that has it, or with "
            f"@TrainBPE set data.tokenizer.extra_tokens = {needed}"
        )
    if isinstance(source, Chats) and reading.chat:
        form = reading.chat.form
        tags = (*(CALL_TAGS if form.tools else ()), *(THOUGHT_TAGS if form.thinks else ()))
        if spelled := [tag for tag in tags if tag not in tokenizer.control]:
            reading.report(f"tokens: {', '.join(spelled)} are no tokens of the tokenizer and are spelled in characters")


def _write_shards(
    reading: Reading, part: Part, folder: Path, files: Sequence[SourceFile], tokenizer: Tokenizer, dtype: str
) -> dict[str, Split]:
    """The splits, written; a DataError if one that should hold documents has none."""
    tally, held_out_fraction = reading.tally(part.source), reading.config.held_out
    documents = reading.documents(part.source, files, tally)
    how = dict(
        dtype=dtype,
        end_of_text=tokenizer.end_of_text,
        masked=isinstance(part.source, Chats),
        judged=isinstance(part.source, Preferences),
    )
    reported = time.monotonic()
    with contextlib.ExitStack() as stack:
        writers = {split: stack.enter_context(ShardWriter(folder, split, **how)) for split in SPLITS}
        for batch in _batches(documents):
            for document, (ids, marks) in zip(batch, encode(tokenizer, batch), strict=True):
                split = "held_out" if share(document.decides) < held_out_fraction else "train"
                writers[split].add(ids, document.text, marks)
            if time.monotonic() - reported > REPORT_SECONDS:
                reading.report(f"tokens: {tally.documents:,} documents so far")
                reported = time.monotonic()
        splits = {split: writer.finish() for split, writer in writers.items()}
    reading.report(f"source: {tally}")
    if not splits["train"].tokens or (held_out_fraction and not splits["held_out"].tokens):
        numbers = ", ".join(f"{split} {record.documents}" for split, record in splits.items())
        raise DataError(
            f"data.held_out={held_out_fraction} splits {tally.documents} documents into {numbers}; "
            "give more documents, or change it (0 holds out none)"
        )
    return splits


def _training_texts(reading: Reading) -> Iterator[str]:
    """Documents of the training split: all of them, or a sample drawn by the seed of about MAX_TRAINING_BYTES."""
    found = [(part.source, sources.find_files(part.source, lambda _: None)) for part in reading.config.parts]
    keep = min(1.0, MAX_TRAINING_BYTES / max(1, sum(file.size for _, files in found for file in files)))
    taken = 0
    for source, files in found:
        for document in reading.documents(source, files, reading.tally(source)):
            if share(document.decides) < reading.config.held_out or share(document.text, key=str(reading.seed)) >= keep:
                continue
            taken += len(document.text)
            if taken > MAX_TRAINING_BYTES:  # the files were compressed
                return
            yield document.plain


def share(text: str, *, key: str = "") -> float:
    """A number in [0, 1) that depends on the text and `key` alone and is uniform over texts."""
    digest = hashlib.blake2b(text.encode(), digest_size=6, key=key.encode()).digest()
    return int.from_bytes(digest, "little") / 2**48


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Documents in lists of about BATCH_CHARACTERS, enough for all cores and little enough for memory."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@contextlib.contextmanager
def _locked(folder: Path, report: Report) -> Iterator[None]:
    """Holds the folder for this process; the system frees the lock of one that dies."""
    with open(folder / "lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"tokens: another process makes {folder}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_leftovers(folder: Path) -> None:
    """Removes what a killed process left, and nothing that is not ours."""
    for pattern in (*(f"{split}-*.bin" for split in SPLITS), TOKENIZER, MANIFEST + ".partial"):
        for path in folder.glob(pattern):
            path.unlink()
