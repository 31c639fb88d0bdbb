"""Documents to token shards: trains or loads the tokenizer, encodes in batches, writes both splits."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from qwen_jax.errors import DataError, FileError
from qwen_jax.text import Tokenizer, train_bpe
from train.data import sources
from train.data.config import Data, PythonStdlib, Text, TokenizerFile
from train.data.manifest import MANIFEST, SPLITS, TOKENIZER, Manifest, Source, Split, to_disk
from train.data.shards import ShardWriter
from train.data.sources import SourceFile

# Merges hardly change with more text than this, and training keeps a count for every distinct piece of it.
MAX_TRAINING_BYTES = 200_000_000
# Enough to keep all cores busy.
BATCH_CHARACTERS = 4_000_000
MAX_UINT16_TOKENS = 2**16
REPORT_SECONDS = 30.0

Report = Callable[[str], None]


def make(config: Data, folder: Path, seed: int, report: Report) -> None:
    """Fills `folder` with token shards, the manifest last. What a killed process left there is made anew."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder, report):
            if not (folder / MANIFEST).exists():  # whoever held the lock may have made it
                _remove_leftovers(folder)
                _write(config, folder, seed, report)
    except OSError as error:
        raise FileError(f"cannot write {folder}: {error.strerror}; make room or choose another data.tokens") from error


def describe(source: Text | PythonStdlib, files: Sequence[SourceFile], *, content: bool = True) -> Source:
    """What the manifest says of the source; without `content` the bytes are not read, and `Source.content` is ""."""
    return Source(
        description=repr(source),
        field=field_of(source),
        files=len(files),
        bytes=sum(file.size for file in files),
        listing=sources.fingerprint(files, content=False),
        content=sources.fingerprint(files, content=True) if content else "",
    )


def _write(config: Data, folder: Path, seed: int, report: Report) -> None:
    files = sources.find_files(config.source, report)
    source = describe(config.source, files)
    report(f"source: {source.files:,} files, {source.bytes / 1e6:.1f} MB, {source.description}")
    tokenizer = _tokenizer(config, files, seed, report)
    dtype = "uint16" if tokenizer.num_tokens <= MAX_UINT16_TOKENS else "uint32"
    splits = _write_shards(config, folder, files, tokenizer, dtype, report)
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
        held_out=config.held_out,
        splits=splits,
    ).write(folder)


def _write_shards(
    config: Data, folder: Path, files: Sequence[SourceFile], tokenizer: Tokenizer, dtype: str, report: Report
) -> dict[str, Split]:
    """The splits, written; a DataError if one that should hold documents has none."""
    tally = sources.new_tally(config.source, config.max_bad_fraction)
    documents = sources.documents(files, field=field_of(config.source), tally=tally)
    reported = time.monotonic()
    with contextlib.ExitStack() as stack:
        open_writer = functools.partial(ShardWriter, folder, dtype=dtype, end_of_text=tokenizer.end_of_text)
        writers = {split: stack.enter_context(open_writer(split)) for split in SPLITS}
        for texts in _batches(documents):
            for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
                writers["held_out" if _share(text) < config.held_out else "train"].add(ids, text)
            if time.monotonic() - reported > REPORT_SECONDS:
                report(f"tokens: {tally.documents:,} documents so far")
                reported = time.monotonic()
        splits = {split: writer.finish() for split, writer in writers.items()}
    report(f"source: {tally}")
    if not splits["train"].tokens or (config.held_out and not splits["held_out"].tokens):
        numbers = ", ".join(f"{split} {record.documents}" for split, record in splits.items())
        raise DataError(
            f"data.held_out={config.held_out} splits {tally.documents} documents into {numbers}; "
            "give more documents, or change it (0 holds out none)"
        )
    return splits


def field_of(source: Text | PythonStdlib) -> str:
    """The key of the text in JSON lines; a source without any has ""."""
    return "" if isinstance(source, PythonStdlib) else source.field


def _tokenizer(config: Data, files: Sequence[SourceFile], seed: int, report: Report) -> Tokenizer:
    if isinstance(config.tokenizer, TokenizerFile):
        return Tokenizer.load(Path(config.tokenizer.path).expanduser())
    report(f"tokenizer: training a byte-level BPE of {config.tokenizer.vocab_size:,} tokens")
    return train_bpe(_training_texts(config, files, seed), vocab_size=config.tokenizer.vocab_size)


def _training_texts(config: Data, files: Sequence[SourceFile], seed: int) -> Iterator[str]:
    """Documents of the training split: all of them, or a sample drawn by `seed` of about MAX_TRAINING_BYTES."""
    keep = min(1.0, MAX_TRAINING_BYTES / max(1, sum(file.size for file in files)))
    tally = sources.new_tally(config.source, config.max_bad_fraction)
    taken = 0
    for _, text in sources.documents(files, field=field_of(config.source), tally=tally):
        if _share(text) < config.held_out or _share(text, key=str(seed)) >= keep:
            continue
        taken += len(text)
        if taken > MAX_TRAINING_BYTES:  # the files were compressed
            return
        yield text


def _share(text: str, *, key: str = "") -> float:
    """A number in [0, 1) that depends on the text and `key` alone and is uniform over texts."""
    digest = hashlib.blake2b(text.encode(), digest_size=6, key=key.encode()).digest()
    return int.from_bytes(digest, "little") / 2**48


def _batches(documents: Iterator[tuple[str, str]]) -> Iterator[list[str]]:
    """Texts in lists of about BATCH_CHARACTERS, enough for all cores and little enough for memory."""
    batch, size = [], 0
    for _, text in documents:
        batch.append(text)
        size += len(text)
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
