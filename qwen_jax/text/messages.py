"""Messages of a chat as OpenAI and TRL write them, checked once: what comes out of here needs no second look."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen_jax.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
# `name` and `tool_call_id` tie a result to its call; no format of the family writes them.
_FIELDS = {"role", "content", "reasoning_content", "tool_calls", "name", "tool_call_id", "train", "weight"}


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call of a tool; `arguments` is JSON text, since its spelling is part of what a model reads and writes."""

    name: str
    arguments: str


@dataclass(frozen=True, kw_only=True)
class Message:
    """One message.

    Attributes:
      content: "" where an assistant only thinks or calls tools.
      reasoning: what the assistant thought; None where the message does not say.
      calls: the tools an assistant calls.
      trained: whether an assistant's words are trained on.
    """

    role: str
    content: str
    reasoning: str | None
    calls: tuple[Call, ...]
    trained: bool


def read_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The messages of a chat, checked; a DataError names the message and the field.

    A message has a `role` and a `content`: a string, or a list of {"type": "text", "text": ...}. An assistant's may
    also have `reasoning_content` and `tool_calls` (nested as OpenAI does it, or flat), and with either no content;
    `train: false` or `weight: 0` leaves its words out of training. Other fields must be empty.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise DataError(f"messages is a {type(messages).__name__}; want a list of messages")
    if not messages:
        raise DataError("messages is empty; a chat has at least one message")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def to_json(value: Any, where: str) -> str:
    """JSON text of `value` as the published templates write it: not escaped, ", " and ": " between parts."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{where} cannot be written as JSON: {error}") from error


def _message(message: Mapping[str, Any], where: str) -> Message:
    if not isinstance(message, Mapping):
        raise DataError(f"{where} is a {type(message).__name__}; want an object with role and content")
    role = message.get("role")
    if role not in ROLES:
        raise DataError(f"{where}.role is {role!r}; want one of {', '.join(ROLES)}")
    calls, reasoning = message.get("tool_calls") or (), message.get("reasoning_content")
    given = {field for field, value in message.items() if value or field in ("train", "weight")}
    if unknown := given - (_FIELDS if role == "assistant" else {"role", "content", "name", "tool_call_id"}):
        raise DataError(f"{where}.{min(unknown)} is not a field of {role} messages; leave it out")
    if not (reasoning is None or isinstance(reasoning, str)):
        raise DataError(f"{where}.reasoning_content is a {type(reasoning).__name__}; want a string")
    if isinstance(calls, str | Mapping) or not isinstance(calls, Sequence):
        raise DataError(f"{where}.tool_calls is a {type(calls).__name__}; want a list of calls")
    content = message.get("content")
    if content is None and (calls or reasoning):
        content = ""
    return Message(
        role=role,
        content=_content(content, f"{where}.content"),
        reasoning=reasoning,
        calls=tuple(_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)),
        trained=role == "assistant" and _trained(message, where),
    )


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        raise DataError(f"{where} is missing; want a string")
    if not isinstance(content, Sequence):
        raise DataError(f"{where} is a {type(content).__name__}; want a string or a list of text parts")
    for index, part in enumerate(content):
        if not (isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise DataError(f'{where}[{index}] is not {{"type": "text", "text": ...}}; only text is read')
    return "".join(part["text"] for part in content)


def _call(call: Any, where: str) -> Call:
    if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping):
        call, where = call["function"], f"{where}.function"
    if not (isinstance(call, Mapping) and isinstance(call.get("name"), str) and call["name"]):
        raise DataError(f"{where}.name is missing; a call has a name and arguments")
    arguments = call.get("arguments")
    if not isinstance(arguments, str | Mapping):
        raise DataError(f"{where}.arguments is {arguments!r}; want an object, or a string of JSON")
    text = arguments if isinstance(arguments, str) else to_json(arguments, f"{where}.arguments")
    return Call(name=call["name"], arguments=text)


def _trained(message: Mapping[str, Any], where: str) -> bool:
    train, weight = message.get("train", True), message.get("weight", 1)
    if not isinstance(train, bool):
        raise DataError(f"{where}.train is {train!r}; want true or false")
    if weight not in (0, 1):
        raise DataError(f"{where}.weight is {weight!r}; want 0 or 1")
    return train and bool(weight)
