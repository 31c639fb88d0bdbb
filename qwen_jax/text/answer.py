"""An answer as it streams: what each piece of text makes certain of its thought, its words and its calls of tools.

What comes out, joined, is what `tools.parse_ids` reads from the whole, with one difference: a block that turns out to
be no call after its arguments have begun stays one, because they have been given out.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass

from qwen_jax.text.messages import Call
from qwen_jax.text.tools import CALL_TAGS, THOUGHT_TAGS, read_call, split_tags

# A block as models write it, up to its arguments. Any other order of the fields is read when the block is whole.
_HEAD = re.compile(
    r'[ \t\n\r]*\{[ \t\n\r]*"name"[ \t\n\r]*:[ \t\n\r]*("(?:[^"\\]|\\.)*")[ \t\n\r]*,'
    r'[ \t\n\r]*"arguments"[ \t\n\r]*:[ \t\n\r]*(?=\{)'
)
_MAX_HEAD = 4096  # characters; it is looked for with each piece


@dataclass(frozen=True)
class CallDelta:
    """A part of the call number `index`: first its name and an id of ours, then pieces of its arguments.

    The arguments, joined, are JSON text of an object as the model wrote it, unless the answer ended within them or
    they are no JSON.
    """

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True)
class Delta:
    """What one more piece of an answer makes certain: exactly one of the three."""

    content: str = ""
    reasoning: str = ""
    call: CallDelta | None = None


class AnswerStream:
    """Reads the answer of a model of Qwen2.5 or Qwen3 as it comes.

    Attributes:
      calls: how many calls have begun.
    """

    def __init__(self, *, thinks: bool, in_thought: bool, tools: bool, spelled: Collection[str] = ()) -> None:
        """
        Args:
          thinks: whether the chat format has thoughts; else <think> is text.
          in_thought: whether the prompt ended inside a thought.
          tools: whether calls are wanted; else <tool_call> is text.
          spelled: tags that the tokenizer has no token for, so that their characters are the tag.
        """
        self.calls = 0
        self._tags = frozenset((*(THOUGHT_TAGS if thinks else ()), *(CALL_TAGS if tools else ())))
        self._spelled = self._tags.intersection(spelled)
        self._tag_begun = ""
        self._held = ""  # what the state keeps for itself until more is known
        self._block: list[str] = []
        self._block_size = 0
        self._read: Callable[[str, bool], list[Delta]] = self._content
        if thinks:
            self._read = self._before_thought if in_thought else self._before_all

    def push(self, text: str, control: bool = False) -> list[Delta]:
        """What more text makes certain; `control`: it is one control token, whole."""
        if control and text in self._tags:
            return [*self._flush(), *self._read(text, True)]
        parts = split_tags(self._tag_begun + text, self._spelled)
        certain = len(parts[-1]) - _begun(parts[-1], self._spelled)
        parts[-1], self._tag_begun = parts[-1][:certain], parts[-1][certain:]
        return [delta for n, part in enumerate(parts) if part for delta in self._read(part, n % 2 == 1)]

    def finish(self) -> list[Delta]:
        """What was held back, now that no text follows."""
        deltas = self._flush()
        if self._read == self._head:
            deltas += self._end_block("")
        if self._read != self._thought:
            deltas += self._words(self._take())
        return deltas

    def _flush(self) -> list[Delta]:
        """Gives on what was held back because it might have become a tag."""
        text, self._tag_begun = self._tag_begun, ""
        return self._read(text, False) if text else []

    # The states of reading: each takes text, or a tag, and leaves the state that takes what comes next in `_read`.

    def _before_all(self, text: str, tag: bool) -> list[Delta]:
        """White space before a thought is none of the answer; without a thought it is."""
        if tag and text == "<think>":
            self._held, self._read = "", self._before_thought
            return []
        if not tag and not text.strip():
            self._held += text
            return []
        self._read = self._content
        return [*self._content(self._take(), False), *self._content(text, tag)]

    def _before_thought(self, text: str, tag: bool) -> list[Delta]:
        text = text.lstrip("\n")
        if text:
            self._read = self._thought
        return self._thought(text, tag)

    def _thought(self, text: str, tag: bool) -> list[Delta]:
        """Newlines are held back: those at the end are none of the thought."""
        if tag and text == "</think>":
            self._held, self._read = "", self._after_thought
            return []
        text = self._take() + text
        thought = text.rstrip("\n")
        self._held = text[len(thought) :]
        return [Delta(reasoning=thought)] if thought else []

    def _after_thought(self, text: str, tag: bool) -> list[Delta]:
        text = text.lstrip("\n")
        if not text:
            return []
        self._read = self._content
        return self._content(text, tag)

    def _content(self, text: str, tag: bool) -> list[Delta]:
        """One newline is held back: before a call it is none of the content."""
        if tag and text == "<tool_call>":
            self._block, self._block_size, self._read = [], 0, self._head
            return []
        text = self._take() + text
        words = text.removesuffix("\n")
        self._held = text[len(words) :]
        return self._words(words)

    def _head(self, text: str, tag: bool) -> list[Delta]:
        """A block before its arguments: all of it is held back, since it may be no call."""
        if tag and text == "</tool_call>":
            return self._end_block(text)
        self._block.append(text)
        self._block_size += len(text)
        if self._block_size > _MAX_HEAD or not (match := _HEAD.match("".join(self._block))):
            return []
        try:
            call = read_call(match[0] + "{}}")
        except ValueError:
            return []
        self._read, self._object = self._arguments, _Object()
        return [*self._begin_call(call), *self._arguments(match.string[match.end() :], False)]

    def _arguments(self, text: str, tag: bool) -> list[Delta]:
        if tag and text == "</tool_call>":
            self._read = self._content
            return []
        text = text[: self._object.push(text)]
        if self._object.ended:
            self._read = self._after_arguments
        return [Delta(call=CallDelta(self.calls - 1, arguments=text))]

    def _after_arguments(self, text: str, tag: bool) -> list[Delta]:
        """The brace that closes the call is left out, and so is whatever stands in its place."""
        if tag and text == "</tool_call>":
            self._read = self._content
        return []

    def _end_block(self, tag: str) -> list[Delta]:
        """The call that a whole block makes, or else its text."""
        block = "".join(self._block)
        self._read = self._content
        try:
            call = read_call(block)
        except (ValueError, RecursionError):
            return self._content(f"<tool_call>{block}{tag}", False)
        return [*self._begin_call(call), Delta(call=CallDelta(self.calls - 1, arguments=call.arguments))]

    def _begin_call(self, call: Call) -> list[Delta]:
        self._held = ""
        self.calls += 1
        return [Delta(call=CallDelta(self.calls - 1, id=f"call_{secrets.token_hex(12)}", name=call.name))]

    def _take(self) -> str:
        held, self._held = self._held, ""
        return held

    def _words(self, text: str) -> list[Delta]:
        return [Delta(content=text)] if text else []


class _Object:
    """Finds the end of a JSON object in text that arrives in pieces, by its quotes and brackets."""

    def __init__(self) -> None:
        self.ended = False
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def push(self, text: str) -> int:
        """How many characters of `text` belong to the object."""
        for position, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.ended = True
                    return position + 1
        return len(text)


def _begun(text: str, tags: Collection[str]) -> int:
    """How many characters at the end of `text` may be the beginning of one of `tags`."""
    sizes = range(min(len(text), max(map(len, tags), default=0)), 0, -1)
    return next((size for size in sizes if any(tag.startswith(text[-size:]) for tag in tags)), 0)
