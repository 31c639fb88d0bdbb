"""Byte-level BPE tokenizers: load, train, encode as plain text, decode as a stream.

The family's pipeline (tokenization_qwen.py of QwenLM/Qwen): NFC, a split by `PIECES`, bytes as printable
characters, merges by rank. Encoding runs in the `tokenizers` library. Decoding is a table of bytes per id, so
that whole and streamed decoding are one thing.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import trainers

from qwen_jax.errors import ConfigError, DataError, FileError, ModelError

# The family's split into pieces, literally. One digit per piece; cl100k, where it comes from, has up to three.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>")
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
_SPLIT = {"type": "Split", "pattern": {"Regex": PIECES}, "behavior": "Isolated", "invert": False}
# The pipeline as the family's tokenizer.json files write it, without tokens.
_FAMILY: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [_SPLIT, _BYTE_LEVEL]},
    "post_processor": _BYTE_LEVEL,
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "model": {"type": "BPE", "vocab": {}, "merges": []},
}
# Characters of one to four bytes, and the white space that pipelines treat in special ways.
_PROBE = "Ab é你🙂  \t\r\n x"
# The library needs some 120 bytes per character while it encodes, so it gets no more at once than _BATCH.
_BATCH = 1_000_000
_PART = 100_000
# No piece of PIECES goes on after a newline that something else than white space follows, so text can be cut there.
_CUT = re.compile(r"\n(?=\S)")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's one printable character per byte: itself where printable, else the next free one from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()
# For str.translate: each character of the alphabet to its byte, every other one to what latin-1 cannot encode.
_TO_BYTES = dict.fromkeys(range(256), 0xFFFF) | {ord(character): byte for character, byte in BYTE_OF.items()}


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
        try:
            spec = _parse(data)
            added = {token["content"]: token for token in spec["added_tokens"]}
            self._pieces = _pieces(spec["model"]["vocab"], added)
            self.end_of_text = added[END_OF_TEXT]["id"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(f"not a tokenizer.json of the Qwen family: {type(error).__name__}: {error}") from error
        self.num_tokens = len(self._pieces)
        # Without its added tokens the encoder cannot turn text into a control id, whatever the text holds.
        # A stored truncation or padding would lose text in silence.
        plain = {"added_tokens": [], "truncation": None, "padding": None, "post_processor": None}
        self._cuts = all(spec.get(stage) == _FAMILY[stage] for stage in ("normalizer", "pre_tokenizer"))
        self._encoder = _library_tokenizer(json.dumps(spec | plain))
        self._check_encoder(added)

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
        out: list[list[int]] = [[] for _ in texts]
        for batch in _batches((index, part) for index, text in enumerate(texts) for part in self._parts(text)):
            parts = [part for _, part in batch]
            try:
                encodings = self._encoder.encode_batch_fast(parts, add_special_tokens=False)
            except TypeError:
                _check_encodable(parts)
                raise
            for (index, _), encoding in zip(batch, encodings, strict=True):
                out[index] += encoding.ids
        return out

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

    def _parts(self, text: str) -> Iterator[str]:
        """`text` in parts whose ids, joined, are those of the whole: of some _PART characters where it can be cut."""
        start = 0
        while self._cuts and len(text) - start > _PART and (cut := _CUT.search(text, start + _PART)):
            yield text[start : cut.end()]
            start = cut.end()
        yield text[start:]

    def _check_encoder(self, added: dict[str, Any]) -> None:
        """A ModelError if plain text gives control ids, or does not come back from its ids."""
        control = {token["id"] for token in added.values()}
        for content, ids in zip(added, self.encode_batch(list(added)), strict=True):
            if control.intersection(ids):
                raise ModelError(f"the tokenizer's merges build the added token {content!r} out of plain text")
        if (back := self.decode(self.encode(_PROBE))) != _PROBE:
            raise ModelError(f"the tokenizer turns {_PROBE!r} into {back!r}; only lossless byte-level BPE is read")


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
        raise ConfigError(f"vocab_size={vocab_size} must be at least {MIN_VOCAB_SIZE}: 256 bytes and special tokens")
    tokenizer = _library_tokenizer(json.dumps(_FAMILY))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(BYTE_OF),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    reached = tokenizer.get_vocab_size()
    if reached < vocab_size:
        raise DataError(
            f"the text yields {reached} tokens and vocab_size={vocab_size} wants more; lower it or add text"
        )
    return Tokenizer(tokenizer.to_str().encode())


def _parse(data: bytes) -> dict[str, Any]:
    """The tokenizer.json as a dict; a ModelError unless it is a byte-level BPE that encodes every text in one way."""
    spec = json.loads(data)
    model = spec["model"]
    kinds = model["type"], spec["decoder"]["type"]
    if kinds != ("BPE", "ByteLevel"):
        raise ModelError(f"model and decoder are {kinds}; only byte-level BPE is read: ('BPE', 'ByteLevel')")
    if missing := len(BYTE_OF.keys() - model["vocab"].keys()):
        raise ModelError(f"{missing} of the 256 bytes have no token, so some text could not be encoded")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(option):
            raise ModelError(f"the model has {option}={model[option]!r}; only byte-level BPE without it is read")
    return spec


def _pieces(vocab: dict[str, int], added: dict[str, Any]) -> list[bytes]:
    """The bytes of every id, b"" for special tokens; a ModelError unless the ids are 0..n-1, each once."""
    pieces: dict[int, bytes] = {}
    for token, index in vocab.items():
        if index in pieces:
            raise ModelError(f"the vocabulary gives id {index} to two tokens, one of them {token!r}")
        try:
            pieces[index] = b"" if token in added else token.translate(_TO_BYTES).encode("latin-1")
        except UnicodeEncodeError:
            raise ModelError(f"token {token!r} is not written in the byte-level alphabet") from None
    for content, token in added.items():
        if vocab.get(content, token["id"]) != token["id"] or (content not in vocab and token["id"] in pieces):
            raise ModelError(f"added token {content!r} has id {token['id']}, which the vocabulary contradicts")
        text = content.encode()
        pieces[token["id"]] = b"" if token.get("special") else text
    if pieces.keys() != set(range(len(pieces))):
        raise ModelError(f"{len(pieces)} tokens have ids up to {max(pieces)}; ids must be 0..n-1 without a gap")
    return [pieces[index] for index in range(len(pieces))]


def _library_tokenizer(text: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception for a file it cannot use
        raise ModelError(f"not a tokenizer.json: {error}") from error


def _batches(parts: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """The (index, text) pairs in lists of about _BATCH characters."""
    batch, size = [], 0
    for index, text in parts:
        batch.append((index, text))
        size += len(text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _check_encodable(texts: Iterable[str]) -> None:
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            character = text[error.start]
            raise DataError(f"text has a lone surrogate {character!r}, which UTF-8 cannot hold; replace it") from error
