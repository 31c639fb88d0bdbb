"""Probabilities of tokens, in the two shapes OpenAI's API has for them."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from qwen_jax.engine import Token
from qwen_jax.text import Tokenizer

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A token, and the character of the text at which its own begins."""

    start: int
    token: Token


class Logprobs(abc.ABC):
    """The tokens of one completion. Those that end it, or belong to a stop string, are none of its text."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._characters = tokenizer.stream()
        self._entries: list[_Entry] = []
        self._length = 0  # of the text of all tokens, those included that may turn out to be a stop string
        self._told = 0

    def push(self, token: Token) -> None:
        """One more token."""
        if token.id not in self._stop_ids:
            self._entries.append(_Entry(self._length, token))
            self._length += len(self._characters.push(token.id))

    def new(self, text: str, *, ended: bool) -> Json | None:
        """What to say of tokens that `text` shows, all text so far, beyond those told of before; None for none."""
        entries = self._shown(text, ended)[self._told :]
        self._told += len(entries)
        return self._write(entries) if entries else None

    def all(self, text: str) -> Json:
        """What to say of all tokens of a text that has ended."""
        return self._write(self._shown(text, ended=True))

    def _shown(self, text: str, ended: bool) -> Sequence[_Entry]:
        if ended and self._length <= len(text):  # else a stop string has cut it
            return self._entries
        return [entry for entry in self._entries if entry.start < len(text)]

    @abc.abstractmethod
    def _write(self, entries: Sequence[_Entry]) -> Json: ...


class ChatLogprobs(Logprobs):
    """As /v1/chat/completions has them."""

    def _write(self, entries: Sequence[_Entry]) -> Json:
        content = []
        for entry in entries:
            assert entry.token.logprob is not None
            top = [self._token(*each) for each in entry.token.top]
            content.append({**self._token(entry.token.id, entry.token.logprob), "top_logprobs": top})
        return {"content": content}

    def _token(self, token: int, logprob: float) -> Json:
        data = self._tokenizer.pieces[token]
        return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}


class TextLogprobs(Logprobs):
    """As /v1/completions has them."""

    def _write(self, entries: Sequence[_Entry]) -> Json:
        return {
            "tokens": [self._text(entry.token.id) for entry in entries],
            "token_logprobs": [entry.token.logprob for entry in entries],
            "top_logprobs": [{self._text(token): value for token, value in entry.token.top} for entry in entries],
            "text_offset": [entry.start for entry in entries],
        }

    def _text(self, token: int) -> str:
        """As OpenAI writes it: bytes that are no text by themselves are spelled."""
        data = self._tokenizer.pieces[token]
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
