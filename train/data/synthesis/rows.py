"""Where the instruction of a row stands: in a text, or in messages.

What is wrong with a row is a ValueError, to which the reader adds its line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen_jax.errors import DataError
from qwen_jax.text.messages import read_messages

Row = Mapping[str, Any]
Chat = list[Mapping[str, Any]]


def text(row: Row, field: str) -> str:
    """The text in a field."""
    if not isinstance(value := row.get(field), str) or not value.strip():
        raise ValueError(f'field "{field}" holds {_kind(row, field)}; want a text')
    return value


def chat(row: Row, field: str, system: str = "") -> Chat:
    """What a model is asked: messages up to the last of the user, or a text of the user's."""
    if not isinstance(row.get(field), list):
        first = [{"role": "system", "content": system}] if system else []
        return [*first, {"role": "user", "content": text(row, field)}]
    messages = _messages(row, field)
    asked = [index for index, message in enumerate(messages) if message["role"] == "user"]
    if not asked:
        raise ValueError(f'field "{field}" holds no message of the user')
    return messages[: asked[-1] + 1]


def instruction(row: Row, field: str) -> str:
    """What is asked for: all that the user says, where there are messages."""
    said = [_content(message) for message in chat(row, field) if message["role"] == "user"]
    return "\n\n".join(said)


def answer(row: Row, field: str) -> str:
    """What was answered: the text of the last message, where there are messages."""
    if not isinstance(row.get(field), list):
        return text(row, field)
    last = _messages(row, field)[-1]
    if last["role"] != "assistant":
        raise ValueError(f'the last message of field "{field}" is by the {last["role"]}; want an answer')
    return _content(last)


def with_instruction(row: Row, field: str, words: str) -> dict[str, Any]:
    """A row that asks for something else, and holds no answer; a system message stays."""
    if not isinstance(row.get(field), list):
        return {**row, field: words}
    system = [message for message in row[field][:1] if message["role"] == "system"]
    return {**row, field: [*system, {"role": "user", "content": words}]}


def _messages(row: Row, field: str) -> Chat:
    try:
        read_messages(row[field])
    except DataError as error:
        raise ValueError(str(error)) from error
    return row[field]


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _kind(row: Row, field: str) -> str:
    if field not in row:
        return f"nothing (there are {', '.join(sorted(row)[:6])})"
    return "an empty text" if isinstance(row[field], str) else f"a {type(row[field]).__name__}"
