"""Chats in the format of an unknown Jinja template, rendered in a sandbox inside a process that can be killed.

Templates come with models and are untrusted code. Known ones never run: `chat` writes the same natively.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any

from qwen_jax.errors import ConfigError, DataError, ModelError
from qwen_jax.text.chat import Format, Piece, format_of_template

_CHILD = Path(__file__).with_name("template_child.py")
# The child limits its computing to 1 s; this is for a child that waits, on a machine that may be busy.
_WALL_SECONDS = 10
_JINJA = (3, 1, 6)  # earlier sandboxes have known escapes
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_LINE = 200  # characters of a template's own words in an error
# Where the private code points begin that stand for characters of contents.
_FIRST_MARK = 0xF0000


def load_format(
    template: str,
    control: Collection[str],
    *,
    special_tokens: Mapping[str, str] | None = None,
    warn: Callable[[str], None],
) -> Format | JinjaFormat:
    """The native format that writes what `template` writes, or the template itself, with a notice to `warn`."""
    if known := format_of_template(template):
        return known
    warn("the chat template is not a known one: it runs in a sandbox, in a process of its own for every chat")
    return JinjaFormat(source=template, control=control, special_tokens=special_tokens or {})


@dataclass(frozen=True, kw_only=True)
class JinjaFormat:
    """A format that a Jinja template describes; renders as `chat.Format` does, a new process each time.

    Attributes:
      source: text of the template.
      control: texts of the tokenizer's control tokens; those that contents spell out stay plain text.
      special_tokens: `bos_token` and so on, which a template may name.
    """

    source: str
    control: Collection[str]
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    name = "template"

    @property
    def tools(self) -> bool:
        """Whether tools can be written."""
        return "tools" in self.source

    @property
    def thinks(self) -> bool:
        """Whether assistants think, between <think> tags."""
        return "</think>" in self.source

    @property
    def marks_answers(self) -> bool:
        """Whether the template says what the assistant writes."""
        return bool(_GENERATION.search(self.source))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        enable_thinking: bool | None = None,
    ) -> list[Piece]:
        """The chat in pieces; `trained` is None unless the template marks what the assistant writes.

        Raises:
          DataError: the template refuses the chat, or decides by characters of it that control tokens are made of.
          ConfigError: an argument that the template knows nothing of.
          ModelError: the template fails, does something forbidden, or needs too much time, memory or text.
        """
        if continue_final_message:
            raise ConfigError("continue_final_message needs a known chat format; this template is not one")
        if enable_thinking is not None and "enable_thinking" not in self.source:
            raise ConfigError(f"enable_thinking={enable_thinking} means nothing to the chat template; leave it out")
        _check(messages)
        if tools and not self.tools:
            raise DataError("tools were given and the chat template cannot write them")
        options = {**self.special_tokens, "add_generation_prompt": add_generation_prompt}
        if enable_thinking is not None:
            options["enable_thinking"] = enable_thinking
        chat = {"messages": list(messages), "tools": list(tools) if tools else None}
        marks = _marks(self.control)
        try:
            contexts = [chat | options, _marked(chat, marks) | options]
            request = json.dumps({"source": self.source, "contexts": contexts}, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(f"messages or tools cannot be written as JSON: {error}") from error
        (text, spans), (marked, _) = _run(request)
        if marked.translate({mark: character for character, mark in marks.items()}) != text:
            characters = " ".join(map(chr, marks))
            raise DataError(
                f"contents hold characters of control tokens ({characters}) that the chat template acts upon"
            )
        return self._pieces(text, [ord(character) not in marks.values() for character in marked], spans)

    def _pieces(self, text: str, trusted: list[bool], spans: list[list[int]]) -> list[Piece]:
        trained: list[bool | None] = [False if self.marks_answers else None] * len(text)
        for start, end in spans:
            trained[start:end] = [True] * len(text[start:end])
        pieces = []
        for (trust, train), run in groupby(range(len(text)), key=lambda index: (trusted[index], trained[index])):
            indices = list(run)
            pieces.append(Piece(text=text[indices[0] : indices[-1] + 1], trusted=trust, trained=train))
        return pieces


def _check(messages: Sequence[Mapping[str, Any]]) -> None:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise DataError(f"messages is {messages!r:.40}; want a list of at least one message")
    for index, message in enumerate(messages):
        if not (isinstance(message, Mapping) and isinstance(message.get("role"), str)):
            raise DataError(f"messages[{index}] has no role; want an object with role and content")
        if chosen := {"train", "weight"} & message.keys():
            raise DataError(f"messages[{index}].{min(chosen)} needs a known chat format; this template is not one")


def _marks(control: Collection[str]) -> dict[int, int]:
    """A private code point for each character that a control token begins or ends with.

    In contents these stand for the character, so that no control token of the render has an end from there.
    """
    ends = {end for token in control for end in (token[0], token[-1])}
    return {ord(end): _FIRST_MARK + index for index, end in enumerate(sorted(ends))}


def _marked(value: Any, marks: Mapping[int, int]) -> Any:
    """`value` with every string in it marked."""
    if isinstance(value, str):
        return value.translate(marks)
    if isinstance(value, Mapping):
        return {_marked(key, marks): _marked(part, marks) for key, part in value.items()}
    return [_marked(part, marks) for part in value] if isinstance(value, list | tuple) else value


def _run(request: str) -> list[tuple[str, list[list[int]]]]:
    """Text and generated spans for each context of the request, from a child that has no environment."""
    _check_jinja()
    try:
        child = subprocess.run(
            [sys.executable, "-P", str(_CHILD)],
            input=request,
            capture_output=True,
            text=True,
            timeout=_WALL_SECONDS,
            env={},
        )
    except subprocess.TimeoutExpired:
        raise ModelError(f"the chat template was stopped after {_WALL_SECONDS} s") from None
    if child.returncode < 0:
        raise ModelError("the chat template was stopped: it needs more than 1 s, or more memory than a chat takes")
    if child.returncode:
        raise ModelError(f"the chat template's process failed: {_line(child.stderr[-_LINE:])}")
    answer = json.loads(child.stdout)
    if "refused" in answer:
        raise DataError(f"the chat template refuses the chat: {_line(answer['refused'])}")
    if "error" in answer:
        raise ModelError(f"the chat template fails: {_line(answer['error'])}")
    return answer["renders"]


def _line(text: str) -> str:
    return " ".join(text.split())[:_LINE]


def _check_jinja() -> None:
    try:
        version = metadata.version("jinja2")
    except metadata.PackageNotFoundError:
        version = "none"
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < _JINJA:
        raise ModelError(
            f"an unknown chat template needs jinja2 3.1.6 or newer, found {version}: pip install 'qwen-jax[template]'"
        )
