"""From the `data` part of a config to tokens on disk, made once and checked at each start."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path

from qwen_jax.errors import DataError, FileError
from qwen_jax.text import Tokenizer
from train.data import sources, tokenise
from train.data.config import Data, Mixture, Part, TokenizerFile, TrainBPE
from train.data.conversations import ChatFormat
from train.data.manifest import MANIFEST, MAX_DIGEST_BYTES, SPLITS, TOKENIZER, Manifest
from train.data.shards import TokenShards
from train.data.tokenise import Report

# How long processes that do not write wait for the one that does.
WAIT_SECONDS = 3600.0
POLL_SECONDS = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """The tokens of a part, in two splits."""

    part: Part
    train: TokenShards
    held_out: TokenShards


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """A tokenizer and the tokens it made of each part."""

    tokenizer: Tokenizer
    parts: tuple[Tokens, ...]


def prepare(
    config: Data,
    directory: Path,
    *,
    seed: int,
    report: Report,
    chat: ChatFormat | None = None,
    is_writer: bool = True,
) -> Corpus:
    """The corpus that `config` describes, from folders of token shards; the writer makes them if need be.

    Args:
      config: what to read and how.
      directory: the run directory, which holds each folder that the config does not name: `tokens`, and in a mixture
        `tokens/NAME` for each part.
      seed: draws the documents the tokenizer is trained on where there is over 200 MB of text.
      report: takes a line about what happens, a few in all.
      chat: what conversations are written in, where there are any.
      is_writer: false in every process but one; the others wait for the folders.

    A folder without a manifest was not finished and is made anew. One that the config names may outlive its source and
    is not checked against it.

    Raises:
      DataError: unreadable documents, an empty split, damaged shards, or shards of another source or tokenizer.
      FileError: no source, or a folder that cannot be written.
      ModelError: a tokenizer that cannot be used.
    """
    reading = tokenise.Reading(config=config, chat=chat, seed=seed, report=report)
    folders = [folder_of(config, part, directory) for part in config.parts]
    tokenizer = functools.cache(lambda: _tokenizer(reading, folders))
    parts, tokenizers = [], []
    for part, folder in zip(config.parts, folders, strict=True):
        if not is_writer:
            _wait_for(folder / MANIFEST)
        elif not (folder / MANIFEST).exists():
            tokenise.make(reading, part, folder, tokenizer)
        else:
            _check_source(reading, part, folder)
        manifest = Manifest.read(folder)
        manifest.verify(folder)
        tokenizers.append(_matching_tokenizer(config, folder, manifest))
        if tokenizers[-1].fingerprint != tokenizers[0].fingerprint:
            raise DataError(f"{folder} was made with another tokenizer than {folders[0]}; delete one to make it again")
        train, held_out = (TokenShards(folder, split, manifest) for split in SPLITS)
        parts.append(Tokens(part=part, train=train, held_out=held_out))
        trained = "" if train.num_trained is None else f" ({train.num_trained / len(train):.0%} trained)"
        report(
            f"tokens: {len(train):,} to train on{trained}, {len(held_out):,} held out, "
            f"{train.num_characters / len(train):.2f} characters each; of {manifest.source.description}, in {folder}"
        )
    return Corpus(tokenizer=tokenizers[0] if tokenizers else tokenise.make_tokenizer(reading), parts=tuple(parts))


def folder_of(config: Data, part: Part, directory: Path) -> Path:
    """Where the tokens of a part are."""
    if part.tokens:
        return Path(part.tokens).expanduser()
    return directory / "tokens" / part.name if isinstance(config.source, Mixture) else directory / "tokens"


def _tokenizer(reading: tokenise.Reading, folders: Sequence[Path]) -> Tokenizer:
    """The tokenizer of parts that are to be made: one that was trained for the others is not trained again."""
    made = [folder for folder in folders if (folder / MANIFEST).exists()]
    if made and isinstance(reading.config.tokenizer, TrainBPE):
        return Tokenizer.load(made[0] / TOKENIZER)
    return tokenise.make_tokenizer(reading)


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise FileError(
                f"{path} did not appear within {WAIT_SECONDS / 60:.0f} minutes; "
                "the first process makes it: see its messages, and that the directory is shared"
            )
        time.sleep(POLL_SECONDS)


def _check_source(reading: tokenise.Reading, part: Part, folder: Path) -> None:
    """A DataError that says what differs if the source is not the one `folder` was made from.

    Of a folder that the config names only the chat format counts: the model is served with it.
    """
    before, options = Manifest.read(folder).source, reading.options(part.source)
    # What a folder says nothing of is of a later release, and was as it is by default.
    fields = dataclasses.fields(part.source)
    default = {field.name: json.dumps(field.default) for field in fields if field.default is not dataclasses.MISSING}
    was = options | {name: value for name, value in default.items() if name in options} | before.options
    changed = [name for name in (["format"] if part.tokens else list(options)) if was.get(name) != options.get(name)]
    if changed:
        change = f"their {changed[0]} was {was[changed[0]]} and is {options[changed[0]]}"
    elif part.tokens:
        return
    else:
        files = sources.find_files(part.source, reading.report)
        now = reading.describe(part.source, files, content=before.bytes <= MAX_DIGEST_BYTES)
        if now.listing != before.listing:
            change = f"{before.files} files of {before.bytes} bytes are now {now.files} of {now.bytes}, or names differ"
        elif now.content and now.content != before.content:
            change = "some file has other bytes than it had"
        else:
            return
    keep = "" if part.tokens else f', or set data.tokens = "{folder}" to keep it as it is'
    raise DataError(
        f"the documents changed since {folder} was made from them: {change}; delete it to make it again{keep}"
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
    elif missing := [token for token in wanted.extra_tokens if token not in tokenizer.control]:
        raise DataError(f"the tokenizer of {folder} has no token {missing[0]}; {remedy}")
    elif wanted.vocab_size != manifest.vocab_size:
        raise DataError(
            f"{folder} was made with a tokenizer of {manifest.vocab_size} tokens, "
            f"data.tokenizer.vocab_size is {wanted.vocab_size}; {remedy}"
        )
    if config.held_out != manifest.held_out:
        raise DataError(f"{folder} was made with held_out={manifest.held_out}, not {config.held_out}; {remedy}")
    return tokenizer
