"""Byte-level BPE tokenizers: load, train, encode as plain text, decode as a stream.

The pipeline is the Qwen family's (tokenization_qwen.py of QwenLM/Qwen): NFC, a split by `PIECES`, bytes as
printable characters, merges by rank. Encoding runs in the `tokenizers` library. Decoding is a table of bytes
per id, so that whole and streamed decoding are one thing.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from qwen_jax.errors import ConfigError, DataError, FileError, ModelError

# The family's split into pieces, literally. One digit per piece; cl100k, where it comes from, has up to three.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>")
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's one printable character per byte: itself where printable, else the next free one from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()


class Tokenizer:
    """A byte-level BPE tokenizer, as a `tokenizer.json` describes it.

    Attributes:
      num_tokens: largest id + 1; every id below has a token.
      end_of_text: id of <|endoftext|>, which ends each document.
    """

    num_tokens: int
    end_of_text: int

    def __init__(self, data: bytes) -> None:
        """`data` is the content of a tokenizer.json; anything but a byte-level BPE is a ModelError."""
        self._data = data
        spec = _parse(data)
        added = {token["content"]: token for token in spec["added_tokens"]}
        self._pieces = _pieces(spec["model"]["vocab"], added)
        self.num_tokens = len(self._pieces)
        if END_OF_TEXT not in added:
            raise ModelError(f"the tokenizer has no added token {END_OF_TEXT}; give a tokenizer.json of the Qwen family")
        self.end_of_text = added[END_OF_TEXT]["id"]
        # Without its added tokens the encoder cannot turn text into a control id, whatever the text holds.
        # A stored truncation or padding would lose text in silence.
        plain = {"added_tokens": [], "truncation": None, "padding": None, "post_processor": None}
        self._encoder = _library_tokenizer(json.dumps(spec | plain))
        self._check_injection(added)

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """The tokenizer of a tokenizer.json, or of the directory that holds one."""
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            return cls(file.read_bytes())
        except OSError as error:
            raise FileError(f"cannot read tokenizer {file}: {error.strerror}; give a tokenizer.json") from error
        except ModelError as error:
            raise ModelError(f"{file}: {error}") from error

    @classmethod
    def from_bytes(cls, data: bytes) -> Tokenizer:
        """The tokenizer whose `to_bytes` gave `data`: the content of a tokenizer.json."""
        return cls(data)

    def to_bytes(self) -> bytes:
        """The tokenizer.json, byte for byte as it was given."""
        return self._data

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of `to_bytes()` in hex: equal fingerprints, equal ids."""
        return hashlib.sha256(self._data).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of `text` taken as plain text: `<|im_end|>` in it gives the ids of its characters."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, as `encode` gives them, on all cores. A lone surrogate is a DataError."""
        try:
            return [e.ids for e in self._encoder.encode_batch_fast(list(texts), add_special_tokens=False)]
        except TypeError:
            for text in texts:
                _check_encodable(text)
            raise

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self._piece, ids)).decode("utf-8", errors="replace")

    def stream(self) -> StreamDecoder:
        """A decoder that takes ids one by one."""
        return StreamDecoder(self)

    def _piece(self, token: int) -> bytes:
        if not 0 <= token < self.num_tokens:
            raise DataError(f"token id {token} is outside 0..{self.num_tokens - 1} of this tokenizer")
        return self._pieces[token]

    def _check_injection(self, added: dict[str, Any]) -> None:
        control = {token["id"] for token in added.values()}
        for content, ids in zip(added, self.encode_batch(list(added)), strict=True):
            if control.intersection(ids):
                raise ModelError(f"the tokenizer's merges build the added token {content!r} out of plain text")


class StreamDecoder:
    """Text of ids pushed one at a time; what it returns, joined, is `Tokenizer.decode` of all of them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that `token` completes: whole characters, "" while one is still open."""
        return self._utf8.decode(self._tokenizer._piece(token))

    def finish(self) -> str:
        """What is left: "", or U+FFFD for a character that never was completed."""
        return self._utf8.decode(b"", final=True)


def train_bpe(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """A byte-level BPE of exactly `vocab_size` tokens: 256 bytes, merges learnt from `texts`, special tokens last.

    The result depends on the texts alone. Too few of them for that many merges is a DataError.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(f"vocab_size={vocab_size} must be at least {MIN_VOCAB_SIZE}: 256 bytes and the special tokens")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(BYTE_OF),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    reached = tokenizer.get_vocab_size()
    if reached < vocab_size:
        raise DataError(f"the text yields {reached} tokens, vocab_size={vocab_size} were asked for; lower it or give more text")
    return Tokenizer(tokenizer.to_str().encode())


def _parse(data: bytes) -> dict[str, Any]:
    """The tokenizer.json as a dict; a ModelError unless it is a byte-level BPE that encodes every text in one way."""
    try:
        spec = json.loads(data)
        model, vocab = spec["model"], spec["model"]["vocab"]
        kinds = model["type"], (spec["decoder"] or {}).get("type")
        for token in spec["added_tokens"]:
            if not isinstance(token["content"], str) or not isinstance(token["id"], int):
                raise TypeError(f"added token {token} needs a text and a number")
        missing = len(BYTE_OF.keys() - vocab.keys())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"not a tokenizer.json: {type(error).__name__}: {error}") from error
    if kinds != ("BPE", "ByteLevel"):
        raise ModelError(f"model and decoder are {kinds}; only byte-level BPE is read: ('BPE', 'ByteLevel')")
    if missing:
        raise ModelError(f"{missing} of the 256 bytes have no token, so some text could not be encoded")
    if model.get("dropout"):
        raise ModelError(f"dropout={model['dropout']} makes encoding random; set it to null")
    return spec


def _pieces(vocab: dict[str, int], added: dict[str, Any]) -> list[bytes]:
    """The bytes of every id, b"" for special tokens; a ModelError unless the ids are 0..n-1, each once."""
    pieces: dict[int, bytes] = {}
    for token, index in vocab.items():
        if index in pieces:
            raise ModelError(f"the vocabulary gives id {index} to two tokens, one of them {token!r}")
        if token not in added and not BYTE_OF.keys() >= set(token):
            raise ModelError(f"token {token!r} is not written in the byte-level alphabet")
        pieces[index] = b"" if token in added else bytes(BYTE_OF[character] for character in token)
    for content, token in added.items():
        if vocab.get(content, token["id"]) != token["id"] or (content not in vocab and token["id"] in pieces):
            raise ModelError(f"added token {content!r} has id {token['id']}, which the vocabulary contradicts")
        pieces[token["id"]] = b"" if token.get("special") else content.encode()
    if pieces.keys() != set(range(len(pieces))):
        raise ModelError(f"{len(pieces)} tokens have ids up to {max(pieces)}; ids must be 0..n-1 without a gap")
    return [pieces[index] for index in range(len(pieces))]


def _library_tokenizer(text: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception for a file it cannot use
        raise ModelError(f"not a tokenizer.json: {error}") from error


def _check_encodable(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"text has a lone surrogate at character {error.start}, which no UTF-8 can hold") from error
