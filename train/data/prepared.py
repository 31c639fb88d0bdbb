"""From the `data` part of a config to tokens on disk, made once and checked at each start."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from qwen_jax.errors import DataError, FileError
from qwen_jax.text import Tokenizer
from train.data import sources, tokenise
from train.data.config import Data, TokenizerFile
from train.data.manifest import MANIFEST, MAX_DIGEST_BYTES, SPLITS, TOKENIZER, Manifest
from train.data.shards import TokenShards
from train.data.tokenise import Report

# How long processes that do not write wait for the one that does.
WAIT_SECONDS = 3600.0
POLL_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A tokenizer and the tokens it made of a source."""

    tokenizer: Tokenizer
    train: TokenShards
    held_out: TokenShards


def prepare(config: Data, directory: Path, *, seed: int, report: Report, is_writer: bool = True) -> Corpus:
    """The corpus that `config` describes, from its folder of token shards; the writer makes the folder if need be.

    Args:
      config: what to read and how.
      directory: the run directory, which holds the folder unless `config.tokens` names one.
      seed: draws the documents the tokenizer is trained on where there is over 200 MB of text.
      report: takes a line about what happens, a few in all.
      is_writer: false in every process but one; the others wait for the folder.

    A folder without a manifest was not finished and is made anew. One that `config.tokens` names may outlive its
    source and is not checked against it.

    Raises:
      DataError: unreadable documents, an empty split, damaged shards, or shards of another source or tokenizer.
      FileError: no source, or a folder that cannot be written.
      ModelError: a tokenizer that cannot be used.
    """
    folder = Path(config.tokens).expanduser() if config.tokens else directory / "tokens"
    if not is_writer:
        _wait_for(folder / MANIFEST)
    elif not (folder / MANIFEST).exists():
        tokenise.make(config, folder, seed, report)
    elif not config.tokens:
        _check_source(config, folder, report)
    manifest = Manifest.read(folder)
    manifest.verify(folder)
    tokenizer = _matching_tokenizer(config, folder, manifest)
    train, held_out = (TokenShards(folder, split, manifest) for split in SPLITS)
    report(
        f"tokens: {len(train):,} to train on, {len(held_out):,} held out, {train.num_characters / len(train):.2f} "
        f"characters each; of {manifest.source.description}, in {folder}"
    )
    return Corpus(tokenizer, train, held_out)


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise FileError(
                f"{path} did not appear within {WAIT_SECONDS / 60:.0f} minutes; "
                "the first process makes it: see its messages, and that the directory is shared"
            )
        time.sleep(POLL_SECONDS)


def _check_source(config: Data, folder: Path, report: Report) -> None:
    """A DataError that says what differs if the source is not the one `folder` was made from."""
    before = Manifest.read(folder).source
    files = sources.find_files(config.source, report)
    now = tokenise.describe(config.source, files, content=before.bytes <= MAX_DIGEST_BYTES)
    if now.field != before.field:
        change = f'their field was "{before.field}" and is "{now.field}"'
    elif now.listing != before.listing:
        change = (
            f"{before.files} files of {before.bytes} bytes are now {now.files} of {now.bytes}, or their names differ"
        )
    elif now.content and now.content != before.content:
        change = "some file has other bytes than it had"
    else:
        return
    raise DataError(
        f"the documents changed since {folder} was made from them: {change}; "
        f'delete it to make it again, or set data.tokens = "{folder}" to keep it as it is'
    )


def _matching_tokenizer(config: Data, folder: Path, manifest: Manifest) -> Tokenizer:
    """The tokenizer in `folder`; a DataError unless it made the shards and is the one, and the split, asked for."""
    tokenizer, wanted = Tokenizer.load(folder / TOKENIZER), config.tokenizer
    remedy = f"delete {folder} to make it again, or choose another data.tokens"
    if tokenizer.fingerprint != manifest.tokenizer:
        raise DataError(f"{folder / TOKENIZER} is not the tokenizer that made the shards beside it; {remedy}")
    if isinstance(wanted, TokenizerFile):
        if Tokenizer.load(Path(wanted.path).expanduser()).fingerprint != manifest.tokenizer:
            raise DataError(f"{folder} was made with another tokenizer than {wanted.path}; {remedy}")
    elif wanted.vocab_size != manifest.vocab_size:
        raise DataError(
            f"{folder} was made with a tokenizer of {manifest.vocab_size} tokens, "
            f"data.tokenizer.vocab_size is {wanted.vocab_size}; {remedy}"
        )
    if config.held_out != manifest.held_out:
        raise DataError(f"{folder} was made with held_out={manifest.held_out}, not {config.held_out}; {remedy}")
    return tokenizer
