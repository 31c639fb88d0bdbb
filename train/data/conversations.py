"""Conversations in the forms they are kept in, as documents of which the assistant's words are trained."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from qwen_jax.errors import ConfigError, DataError
from qwen_jax.text import chat
from qwen_jax.text.chat import Format, Piece
from qwen_jax.text.template import JinjaFormat
from qwen_jax.text.tools import read_call
from train.data import sources
from train.data.config import Conversations
from train.data.documents import Document
from train.data.sources import SourceFile, Tally

# ShareGPT's names of who speaks. A function_call is an assistant's, an observation what a tool gave back.
_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "function_call",
    "observation": "tool",
    "tool": "tool",
}
Message = dict[str, Any]
D = TypeVar("D", bound=Document)

_MARKS = re.compile(r"(<\|im_start\|>|<\|im_end\|>\n?)")


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """How the conversations of a run are written; `template` is what a program that serves the model writes them by."""

    form: Format | JinjaFormat
    template: str

    @property
    def name(self) -> str:
        """What token shards remember of it: the same name, the same text."""
        return self.form.name if isinstance(self.form, Format) else f"the template {self.template}"


def documents(
    files: Sequence[SourceFile], source: Conversations, form: Format | JinjaFormat, tally: Tally
) -> Iterator[Document]:
    """The conversations of `files`. One that cannot be written, or has nothing to train, is unreadable to `tally`."""
    form = training_format(form, learn=source.learn)
    return from_rows(files, source.columns, tally, lambda origin, row: _document(origin, row, source, form))


def from_rows(
    files: Sequence[SourceFile], columns: Mapping[str, str], tally: Tally, read: Callable[[str, dict[str, Any]], D]
) -> Iterator[D]:
    """What `read` makes of the rows of `files`, under our names of columns; what it refuses, `tally` counts."""
    for origin, row in sources.rows(files, tally):
        try:
            document = read(origin, {ours: row[name] for ours, name in columns.items() if name in row} | row)
            sources.check_text(document.text)
        except (DataError, ValueError) as error:
            tally.reject(f"{origin}: {error}")
            continue
        tally.documents += 1
        yield document
    tally.check()


def training_format(form: Format | JinjaFormat, *, learn: str) -> Format | JinjaFormat:
    """The format as training has it: every message is closed, and Qwen1 does not learn the newline of a header."""
    if isinstance(form, JinjaFormat):
        if not form.marks_answers:
            raise ConfigError(
                "the chat template of the model does not mark what the assistant writes; name data.source.format, or "
                "mark it there with {% generation %}"
            )
        return form
    return replace(form, open_end=False, header_newline=form.header_newline and learn != "qwen1")


def _document(origin: str, row: Mapping[str, Any], source: Conversations, form: Format | JinjaFormat) -> Document:
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        pieces = [Piece(text=row["prompt"]), Piece(text=row["completion"], trained=True)]
        return Document(origin=origin, text=chat.text_of(pieces), pieces=pieces)
    messages = _messages(row)
    roles = [message.get("role") for message in messages]
    if roles[-1] != "assistant":
        raise DataError(f"the last message is of role {roles[-1]!r}; it must be the assistant's, which is trained")
    if "system" in roles[1:]:
        raise DataError(f"messages[{roles.index('system', 1)}] is of the system, which speaks first and once")
    if source.system is not None and roles[0] != "system":
        messages = [{"role": "system", "content": source.system}, *messages]
    if source.learn == "last_answer":
        messages = [untrained(message) for message in messages[:-1]] + messages[-1:]
    pieces = form.render(messages, tools=tools_of(row.get("tools")))
    if not any(piece.trained and piece.text for piece in pieces):
        raise DataError("no message of the assistant is trained; leave the conversation out")
    if source.learn == "qwen1":
        pieces = [part for piece in pieces for part in _with_marks(piece)]
    return Document(origin=origin, text=chat.text_of(pieces), pieces=pieces, ends=False)


def _messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of a row in any of its forms, as `text.messages` reads them."""
    if "messages" in row:
        messages = as_list(row["messages"], "messages")
    elif "conversations" in row:
        turns = as_list(row["conversations"], "conversations")
        messages = [read_turn(turn, f"conversations[{index}]") for index, turn in enumerate(turns)]
    elif "instruction" in row and "output" in row:
        messages = _alpaca(row)
    elif "prompt" in row and "completion" in row:
        prompt, completion = (as_list(row[name], name) for name in ("prompt", "completion"))
        messages = [*map(untrained, prompt), *completion]
    else:
        raise DataError(
            f"its keys are {sorted(row)[:6]}; want messages, conversations, instruction and output, or prompt and "
            "completion (data.source.columns renames)"
        )
    system = row.get("system")
    if isinstance(system, str) and system and messages[0].get("role") != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return messages


def as_list(value: Any, name: str) -> list[dict[str, Any]]:
    if not (isinstance(value, list) and value and all(isinstance(each, dict) for each in value)):
        raise DataError(f"{name} is {value!r:.40}; want a list of at least one message")
    return value


def read_turn(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A message of ShareGPT. Its flags stay."""
    said, value = turn.get("from"), turn.get("value")
    role = _ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise DataError(f"{where}.from is {said!r}; want one of {', '.join(_ROLES)}")
    if not isinstance(value, str):
        raise DataError(f"{where}.value is a {type(value).__name__}; want a string")
    flags = {name: turn[name] for name in ("train", "weight") if name in turn}
    if role != "function_call":
        return {"role": role, "content": value} | flags
    try:
        calls = json.loads(value)
        if not isinstance(calls, list):
            call = read_call(value)  # whose arguments stay as they are spelled
            calls = [{"name": call.name, "arguments": call.arguments}]
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}.value is no call of a function: {error}") from error
    return {"role": "assistant", "content": "", "tool_calls": calls} | flags


def _alpaca(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    pairs = row.get("history") or []
    if not (isinstance(pairs, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)):
        raise DataError(f"history is {pairs!r:.40}; want a list of pairs of question and answer")
    for name in ("instruction", "input", "output"):
        if not isinstance(row.get(name) or "", str):
            raise DataError(f"{name} is a {type(row[name]).__name__}; want a string")
    question = f"{row['instruction']}\n{row['input']}" if row.get("input") else row["instruction"]
    return [
        {"role": role, "content": text}
        for pair in [*pairs, [question, row["output"]]]
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def tools_of(tools: Any) -> list[Any] | None:
    """Tools as OpenAI writes them, also where they are text of JSON, or functions alone."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise DataError(f"tools is no JSON: {error}") from error
    if not tools:
        return None
    if not isinstance(tools, list):
        raise DataError(f"tools is a {type(tools).__name__}; want a list of function schemas")
    bare = lambda tool: isinstance(tool, dict) and "function" not in tool and "name" in tool
    return [{"type": "function", "function": tool} if bare(tool) else tool for tool in tools]


def untrained(message: dict[str, Any]) -> dict[str, Any]:
    return message | {"train": False} if message.get("role") == "assistant" else message


def _with_marks(piece: Piece) -> list[Piece]:
    """The piece, with what opens and closes a message trained."""
    if not piece.trusted:
        return [piece]
    return [
        replace(piece, text=text, trained=piece.trained or bool(_MARKS.fullmatch(text)))
        for text in _MARKS.split(piece.text)
        if text
    ]
