"""Byte-level BPE tokenizers: load, train, encode text, decode as a stream.

The family's pipeline (tokenization_qwen.py of QwenLM/Qwen): NFC, a split by `PIECES`, bytes as printable
characters, merges by rank. Encoding runs in the `tokenizers` library. Decoding is a table of bytes per id, so
that whole and streamed decoding are one thing.

Text is plain unless the caller says that it trusts it: only `encode_trusted` gives control ids.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tokenizers
from tokenizers import trainers

from qwen_jax.errors import ConfigError, DataError, ModelError
from qwen_jax.text import vocabulary
from qwen_jax.text.vocabulary import ADDED_TOKEN_FLAGS, BYTE_OF, END_OF_TEXT, FAMILY, SPECIAL_TOKENS

MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
# Characters of one to four bytes, and the white space that pipelines treat in special ways.
_PROBE = "Ab é你🙂  \t\r\n x"
# The library needs some 120 bytes per character while it encodes, so it gets no more at once than _BATCH.
_BATCH = 1_000_000
_PART = 100_000
# The library aborts after ten million steps back in one match; a run of spaces takes one per character.
MAX_PART = 6_000_000
# No piece of PIECES has a newline before a character that is not white space, or such a character before a space, and
# none looks further: text can be cut there.
_CUT = re.compile(r"\n(?=\S)|\S(?= )")
_MAX_PATTERNS = 10_000  # characters of the stages around the model; the family's have 700
_MAX_MARKS = 2_000_000  # three times those of the largest published one; each may become a list of 60 bytes and more
# For str.translate: each character of the alphabet to its byte, every other one to what latin-1 cannot encode.
_TO_BYTES = dict.fromkeys(range(256), 0xFFFF) | {ord(character): byte for character, byte in BYTE_OF.items()}


class Tokenizer:
    """A byte-level BPE tokenizer, as a `tokenizer.json` describes it.

    Attributes:
      num_tokens: largest id + 1; every id below has a token.
      end_of_text: id of <|endoftext|>, which ends each document.
      control: text to id of every added token; these ids never come from plain text.
      special: ids of those control tokens that `decode` leaves out unless asked.
    """

    num_tokens: int
    end_of_text: int
    control: Mapping[str, int]
    special: frozenset[int]

    def __init__(self, data: bytes) -> None:
        """`data` is the content of a tokenizer.json; anything but a byte-level BPE is a ModelError."""
        self._data = data
        try:
            spec = _parse(data)
            added = _added(spec["added_tokens"])
            self._pieces = _pieces(spec["model"]["vocab"], added)
            self.end_of_text = added[END_OF_TEXT]["id"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(f"not a tokenizer.json of the Qwen family: {type(error).__name__}: {error}") from error
        self.num_tokens = len(self._pieces)
        self.control = MappingProxyType({content: token["id"] for content, token in added.items()})
        self.special = frozenset(token["id"] for token in added.values() if token.get("special"))
        # Of two control tokens that begin at the same place the longer one is meant.
        longest_first = sorted(added, key=len, reverse=True)
        self._control_pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        # Without its added tokens the encoder cannot turn text into a control id, whatever the text holds.
        # A stored truncation or padding would lose text in silence.
        plain = {"added_tokens": [], "truncation": None, "padding": None, "post_processor": None}
        self._cuts = all(spec.get(stage) == FAMILY[stage] for stage in ("normalizer", "pre_tokenizer"))
        self._encoder = _library_tokenizer(json.dumps(spec | plain))
        self._check_encoder()

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """The tokenizer of a folder in any form it is published in, or of its main file.

        The forms are tokenizer.json, vocab.json with merges.txt, and qwen.tiktoken; the first that is there is read.
        Raises FileError where there is none, ModelError where files are damaged or contradict each other.
        """
        data = vocabulary.read(path)
        try:
            tokenizer = cls(data)
        except ModelError as error:
            raise ModelError(f"{path}: {error}") from error
        for token in vocabulary.added_tokens(path) if path.is_dir() else ():
            content, index = token["content"], token["id"]
            if (known := tokenizer.control.get(content)) != index:
                here = "lacks it" if known is None else f"says {known}"
                raise ModelError(f"{path}: added token {content!r} is configured with id {index}, its tokenizer {here}")
        return tokenizer

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

    @property
    def pieces(self) -> Sequence[bytes]:
        """The bytes of every id; those of a control token are its text."""
        return self._pieces

    def check_fits(self, vocab_size: int) -> None:
        """A ModelError unless a model of `vocab_size` embeddings has one for every id."""
        if self.num_tokens > vocab_size:
            raise ModelError(
                f"the tokenizer has {self.num_tokens} tokens and the model a vocabulary of {vocab_size}; "
                "give the tokenizer that the model was trained with"
            )

    def encode(self, text: str) -> list[int]:
        """Ids of `text` taken as plain text: `<|im_end|>` in it gives the ids of its characters."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, as `encode` gives them, on all cores. A lone surrogate is a DataError."""
        out: list[list[int]] = [[] for _ in texts]
        for index, _, encoding in self._encodings(texts, self._encoder.encode_batch_fast):
            out[index] += encoding.ids
        return out

    def encode_trusted(self, text: str) -> list[int]:
        """Ids of text that the program or its user vouches for: control tokens in it become their ids.

        This is what Hugging Face tokenizers do with every text. What others wrote belongs into `encode`.
        """
        runs = self._control_pattern.split(text)  # plain, control, plain, … plain
        ids = self.encode_batch(runs[::2])
        for before, control in zip(ids, runs[1::2], strict=False):
            before.append(self.control[control])
        return list(chain.from_iterable(ids))

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of `text` as `encode` gives them, and of each the characters `text[start:end]` that it stands for.

        Spans leave no character out. They overlap where one character, or a letter and its marks that NFC makes
        one, becomes several tokens: each of these has the span of the whole.
        """
        ids, starts, ends = [], [], []
        for _, part, encoding in self._encodings([text], self._encoder.encode_batch):
            ids += encoding.ids
            starts += [part + start for start, _ in encoding.offsets]
            ends += [part + end for _, end in encoding.offsets]
        # NFC joins characters into the first of them, and the library leaves the others out of its spans: a span goes
        # on to the start of the first token that reaches further.
        starts.append(len(text))
        further = [starts[bisect_right(ends, end)] for end in ends]
        return ids, [(start, max(end, later)) for start, end, later in zip(starts, ends, further, strict=False)]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of `ids`, without special tokens unless asked; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self._piece(token, skip_special) for token in ids).decode("utf-8", errors="replace")

    def stream(self, *, skip_special: bool = True) -> StreamDecoder:
        """A decoder that takes ids one by one."""
        return StreamDecoder(self, skip_special=skip_special)

    def _piece(self, token: int, skip_special: bool) -> bytes:
        if not 0 <= token < self.num_tokens:
            raise DataError(f"token id {token} is outside 0..{self.num_tokens - 1} of this tokenizer")
        return b"" if skip_special and token in self.special else self._pieces[token]

    def _encodings(
        self, texts: Sequence[str], encode: Callable[..., list[tokenizers.Encoding]]
    ) -> Iterator[tuple[int, int, tokenizers.Encoding]]:
        """What the library's `encode` makes of each part of `texts`: index of the text, start of the part, result."""
        for batch in _batches((index, *part) for index, text in enumerate(texts) for part in self._parts(text)):
            parts = [part for _, _, part in batch]
            if (longest := max(map(len, parts))) > MAX_PART:
                raise DataError(
                    f"{longest:,} characters of the text come without a space or line break that ends a word; "
                    f"at most {MAX_PART:,} can be encoded: break them up"
                )
            try:
                encodings = encode(parts, add_special_tokens=False)
            except TypeError:
                _check_encodable(parts)
                raise
            for (index, start, _), encoding in zip(batch, encodings, strict=True):
                yield index, start, encoding

    def _parts(self, text: str) -> Iterator[tuple[int, str]]:
        """Start and text of parts whose ids, joined, are those of the whole; of some _PART characters if possible."""
        start = 0
        while self._cuts and len(text) - start > _PART and (cut := _CUT.search(text, start + _PART)):
            yield start, text[start : cut.end()]
            start = cut.end()
        yield start, text[start:]

    def _check_encoder(self) -> None:
        """A ModelError if plain text gives control ids, or does not come back from its ids."""
        control = set(self.control.values())
        for content, ids in zip(self.control, self.encode_batch(list(self.control)), strict=True):
            if control.intersection(ids):
                raise ModelError(f"the tokenizer's merges build the added token {content!r} out of plain text")
        if (back := self.decode(self.encode(_PROBE))) != _PROBE:
            raise ModelError(f"the tokenizer turns {_PROBE!r} into {back!r}; only lossless byte-level BPE is read")


class StreamDecoder:
    """Text of ids pushed one at a time; what it returns, joined, is `decode` of all of them."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that `token` completes: whole characters, "" while one is still open."""
        return self._utf8.decode(self._tokenizer._piece(token, self._skip_special))

    def finish(self) -> str:
        """What is left: "", or U+FFFD for a character that never was completed."""
        return self._utf8.decode(b"", final=True)


def train_bpe(texts: Iterable[str], *, vocab_size: int, extra_tokens: Sequence[str] = ()) -> Tokenizer:
    """A byte-level BPE of exactly `vocab_size` tokens: 256 bytes, merges learnt from `texts`, special tokens last.

    The result depends on the texts alone. Too few of them for that many merges is a DataError. After the special tokens
    come `extra_tokens`: control tokens that `decode` shows, as Qwen2.5 has them for tools and code.
    """
    least = MIN_VOCAB_SIZE + len(extra_tokens)
    if vocab_size < least:
        raise ConfigError(f"vocab_size={vocab_size} must be at least {least}: 256 bytes and special tokens")
    tokenizer = _library_tokenizer(json.dumps(FAMILY))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS) - len(extra_tokens),
        initial_alphabet=sorted(BYTE_OF),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in extra_tokens])
    reached = tokenizer.get_vocab_size()
    if reached < vocab_size:
        raise DataError(
            f"the text yields {reached} tokens and vocab_size={vocab_size} wants more; lower it or add text"
        )
    return Tokenizer(tokenizer.to_str().encode())


def _parse(data: bytes) -> dict[str, Any]:
    """The tokenizer.json as a dict; a ModelError unless it is a byte-level BPE that encodes every text in one way."""
    if (marks := sum(map(data.count, (b"{", b"[", b",")))) > _MAX_MARKS:
        raise ModelError(
            f"a tokenizer.json with {marks:,} braces, brackets and commas; at most {_MAX_MARKS:,} are read"
        )
    spec = json.loads(data)
    model = spec["model"]
    kinds = model["type"], (spec["decoder"] or {}).get("type")
    if kinds != ("BPE", "ByteLevel"):
        raise ModelError(f"model and decoder are {kinds}; only byte-level BPE is read: ('BPE', 'ByteLevel')")
    if missing := len(BYTE_OF.keys() - model["vocab"].keys()):
        raise ModelError(f"{missing} of the 256 bytes have no token, so some text could not be encoded")
    patterns = len(json.dumps([spec.get(stage) for stage in ("normalizer", "pre_tokenizer", "decoder")]))
    if patterns > _MAX_PATTERNS:
        raise ModelError(
            f"normalizer, pre_tokenizer and decoder take {patterns:,} characters; at most {_MAX_PATTERNS:,}"
        )
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(option):
            raise ModelError(f"the model has {option}={model[option]!r}; only byte-level BPE without it is read")
    return spec


def _added(tokens: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The added tokens by content; a ModelError for one that is not found in text exactly as it is written."""
    added: dict[str, dict[str, Any]] = {}
    for token in tokens:
        content, index = token["content"], token["id"]
        if type(index) is not int or not content or content in added:
            raise ModelError(f"added token {content!r} with id {index!r} is empty, comes twice or has no integer id")
        for flag in ADDED_TOKEN_FLAGS:
            # `normalized` changes nothing but whether a mark right after the token, which NFC joins to it, hides it.
            allowed = (False, True) if flag in ("normalized", "special") else (False,)
            if (value := token.get(flag, False)) not in allowed:
                raise ModelError(f"added token {content!r} has {flag}={value!r}; only {allowed} is read")
        added[content] = token
    return added


def _pieces(vocab: dict[str, int], added: dict[str, dict[str, Any]]) -> list[bytes]:
    """The bytes of every id; a ModelError unless the ids are 0..n-1, each once."""
    pieces: dict[int, bytes] = {}
    for token, index in vocab.items():
        if index in pieces:
            raise ModelError(f"the vocabulary gives id {index} to two tokens, one of them {token!r}")
        try:
            pieces[index] = b"" if token in added else token.translate(_TO_BYTES).encode("latin-1")
        except UnicodeEncodeError:
            raise ModelError(f"token {token!r} is not written in the byte-level alphabet") from None
    for content, token in added.items():
        index = token["id"]
        if vocab.get(content, index) != index:
            raise ModelError(f"added token {content!r} has id {index}, and {vocab[content]} in the vocabulary")
        if content not in vocab and index in pieces:
            raise ModelError(f"added token {content!r} has id {index}, which another token has")
        pieces[index] = content.encode()
    if pieces.keys() != set(range(len(pieces))):
        raise ModelError(f"{len(pieces)} tokens have ids up to {max(pieces)}; ids must be 0..n-1 without a gap")
    return [pieces[index] for index in range(len(pieces))]


def _library_tokenizer(text: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception for a file it cannot use
        raise ModelError(f"not a tokenizer.json: {error}") from error


def _batches(parts: Iterable[tuple[int, int, str]]) -> Iterator[list[tuple[int, int, str]]]:
    """The (index, start, text) triples in lists of about _BATCH characters."""
    batch, size = [], 0
    for part in parts:
        batch.append(part)
        size += len(part[-1])
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
