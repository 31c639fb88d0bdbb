"""The forms in which the family's vocabulary is published, each read strictly and given as a tokenizer.json.

tokenizer.json                  everything
vocab.json, merges.txt          and the added tokens in tokenizer_config.json or added_tokens.json
qwen.tiktoken                   Qwen's first generation: the rank of every token; merges and added tokens follow
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from qwen_jax.errors import FileError, ModelError

# The family's split into pieces, literally. One digit per piece; cl100k, where it comes from, has up to three.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>")
ADDED_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
MAX_BYTES = 50_000_000  # of a file; the largest published tokenizer.json has 11 million

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
_SPLIT = {"type": "Split", "pattern": {"Regex": PIECES}, "behavior": "Isolated", "invert": False}
# The pipeline as the family's tokenizer.json files write it, without tokens.
FAMILY: dict[str, Any] = {
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


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's one printable character per byte: itself where printable, else the next free one from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()
_CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}


def read(path: Path) -> bytes:
    """The tokenizer.json that `path` holds or amounts to: a folder with one of the three forms, or its main file.

    Raises FileError where nothing can be read, ModelError for a file that contradicts itself.
    """
    if not path.is_dir():
        return _FORMS.get(path.name, _read)(path)
    for name, form in _FORMS.items():
        if (path / name).exists():
            return form(path / name)
    raise FileError(f"no tokenizer in {path}; give tokenizer.json, vocab.json with merges.txt, or qwen.tiktoken")


def added_tokens(folder: Path) -> list[dict[str, Any]]:
    """The added tokens of tokenizer_config.json, else of added_tokens.json, as a tokenizer.json writes them."""
    file = folder / "tokenizer_config.json"
    try:
        if file.exists() and (decoder := _read_json(file).get("added_tokens_decoder")):
            flags = lambda token: {flag: token[flag] for flag in ADDED_TOKEN_FLAGS if flag in token}
            added = [_added_token(token["content"], int(index), **flags(token)) for index, token in decoder.items()]
        else:
            file = folder / "added_tokens.json"
            ids = _read_json(file) if file.exists() else {}
            # This older file has no flags: special are the tokens that every generation has.
            added = [_added_token(content, index, special=content in SPECIAL_TOKENS) for content, index in ids.items()]
        # Libraries give added tokens the next id each, and so want them in the order of ids.
        return sorted(added, key=lambda token: token["id"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file}: added tokens cannot be read: {type(error).__name__}: {error}") from error


def _added_token(content: str, index: int, **flags: bool) -> dict[str, Any]:
    return {"id": index, "content": content, **dict.fromkeys(ADDED_TOKEN_FLAGS, False), **flags}


def _from_tiktoken(file: Path) -> bytes:
    """The tokenizer.json of a qwen.tiktoken: `base64(token) rank` per line, ranks 0, 1, 2 … in order.

    A token of rank r is merged from the two parts that r's predecessors leave of it. The ids after the last rank
    are <|endoftext|>, <|im_start|>, <|im_end|>, <|extra_0|> … <|extra_204|>.
    """
    ranks = _ranks(file)
    merges = []
    for token, rank in ranks.items():
        parts = _merged(token, ranks, rank)
        if len(parts) > 2:
            raise ModelError(f"{file}:{rank + 1}: {token!r} is left in {len(parts)} parts by the ranks before; want 2")
        if len(parts) == 2:
            merges.append([_written(part) for part in parts])
    contents = (*SPECIAL_TOKENS, *(f"<|extra_{n}|>" for n in range(205)))
    added = [_added_token(content, len(ranks) + n, special=True) for n, content in enumerate(contents)]
    return _tokenizer_json({_written(token): rank for token, rank in ranks.items()}, merges, added)


def _from_vocab(file: Path) -> bytes:
    vocab, added = _read_json(file), added_tokens(file.parent)
    if not added:
        raise ModelError(f"{file} has no control tokens with it; give its tokenizer_config.json or added_tokens.json")
    return _tokenizer_json(vocab, list(_merges(file.with_name("merges.txt"), vocab)), added)


def _merges(file: Path, vocab: Mapping[str, int]) -> Iterator[list[str]]:
    """The pairs of a merges.txt in order; a ModelError for a line that is no pair of tokens, or comes twice."""
    seen = set()
    for number, line in enumerate(_decode(file).rstrip("\n").split("\n"), 1):
        if number == 1 and line.startswith("#version"):
            continue
        pair = line.split(" ")
        if len(pair) != 2 or any(token not in vocab for token in (*pair, "".join(pair))):
            raise ModelError(f"{file}:{number}: {line[:80]!r} does not merge two tokens of vocab.json into a third")
        if line in seen:
            raise ModelError(f"{file}:{number}: {line[:80]!r} comes twice")
        seen.add(line)
        yield pair


def _ranks(file: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(_read(file).splitlines(), 1):
        try:
            encoded, rank = line.split(b" ")
            token = base64.b64decode(encoded, validate=True)
        except ValueError as error:
            raise ModelError(f"{file}:{number}: {line[:80]!r} is not `base64 rank`: {error}") from error
        if rank != b"%d" % len(ranks):
            raise ModelError(f"{file}:{number}: rank {rank[:20].decode(errors='replace')!r}, expected {len(ranks)}")
        if not token or token in ranks:
            raise ModelError(f"{file}:{number}: token {token[:80]!r} is empty or has rank {ranks.get(token)} already")
        ranks[token] = len(ranks)
    return ranks


def _merged(token: bytes, ranks: Mapping[bytes, int], limit: int) -> list[bytes]:
    """The parts that remain of `token` when only tokens of ranks below `limit` are merged, lowest first."""
    parts = [token[i : i + 1] for i in range(len(token))]
    of_pairs = [ranks.get(a + b, limit) for a, b in pairwise(parts)]
    while of_pairs and (lowest := min(of_pairs)) < limit:
        i = of_pairs.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        del of_pairs[i]
        if i > 0:
            of_pairs[i - 1] = ranks.get(parts[i - 1] + parts[i], limit)
        if i < len(of_pairs):
            of_pairs[i] = ranks.get(parts[i] + parts[i + 1], limit)
    return parts


def _written(token: bytes) -> str:
    return token.decode("latin-1").translate(_CHARACTER_OF)


def _tokenizer_json(vocab: Mapping[str, int], merges: list[list[str]], added: list[dict[str, Any]]) -> bytes:
    model = FAMILY["model"] | {"vocab": vocab, "merges": merges}
    return json.dumps(FAMILY | {"added_tokens": added, "model": model}).encode()


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(_decode(file))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not JSON: {type(error).__name__}: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds a {type(content).__name__}; want an object")
    return content


def _decode(file: Path) -> str:
    try:
        return _read(file).decode()
    except UnicodeDecodeError as error:
        raise ModelError(f"{file} is not UTF-8: {error}") from error


def _read(file: Path) -> bytes:
    try:
        if (size := file.stat().st_size) > MAX_BYTES:
            raise ModelError(f"{file} has {size:,} bytes, more than the {MAX_BYTES:,} read of a tokenizer's file")
        return file.read_bytes()
    except OSError as error:
        raise FileError(f"cannot read tokenizer {file}: {error.strerror}; give a tokenizer.json") from error


_FORMS = {"tokenizer.json": _read, "vocab.json": _from_vocab, "qwen.tiktoken": _from_tiktoken}
