"""How a model is asked and how its answer is read: without tools, or with calls of them in one of three ways."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infer.tools import INTERPRETER, Toolbox
from qwen_jax.engine import ChatCompletion, Completion
from qwen_jax.engine.completion import FinishReason
from qwen_jax.errors import ConfigError
from qwen_jax.text import Tokenizer
from qwen_jax.text.answer import Delta
from qwen_jax.text.chat import Format, Piece
from qwen_jax.text.messages import Call
from qwen_jax.text.template import JinjaFormat
from qwen_jax.text.tools import REACT_STOPS, Answer, parse_react, react_messages

Message = Mapping[str, Any]
Schemas = Sequence[Mapping[str, Any]]

# What Qwen2.5-Math was asked with where its answers have code in them.
_MATH_SYSTEM = (
    "Please integrate natural language reasoning with programs to solve the problem above, and put your final answer "
    "within \\boxed{}."
)
_OUTPUT = "```output"
_LAST_CODE = re.compile(r"```python\n((?:(?!```).)*?)\n?```\s*", re.DOTALL)
# The interpreter as Qwen1 knows it: a code interpreter, which can run Python code; the code to run.
_QWEN1_INTERPRETER = {
    "name_for_human": "代码解释器",
    "name_for_model": INTERPRETER,
    "description_for_model": "代码解释器，可用于执行Python代码。",
    "parameters": [{"name": "code", "type": "string", "description": "待执行的代码"}],
    "args_format": "code",
}


@dataclass(frozen=True)
class Plain:
    """A chat without tools.

    Attributes:
      form: the chat format.
      schemas: of the tools that the prompt tells of.
    """

    form: Format | JinjaFormat
    schemas: Schemas = ()

    def pieces(self, messages: Sequence[Message], thinking: bool | None) -> list[Piece]:
        """The prompt that `messages` make."""
        return self.form.render(messages, add_generation_prompt=True, enable_thinking=thinking)

    def completion(self, tokenizer: Tokenizer, stop_ids: Collection[int], in_thought: bool) -> Completion | _Calling:
        """What the answer grows in."""
        return Completion(tokenizer, stop_ids, ())

    def read(self, completion: Any, in_thought: bool) -> tuple[Message, Sequence[Call]]:
        """The message of an answer, which an interruption may have cut, and what it calls."""
        text = "<think>\n" * in_thought + completion.text
        if not (self.form.thinks and text.startswith("<think>")):
            return _plain(text), ()
        thought, _, content = text.removeprefix("<think>").partition("</think>")
        return {**_plain(content.lstrip("\n")), "reasoning_content": thought.strip("\n")}, ()

    def extended(self, messages: Sequence[Message], answer: Message, results: Sequence[str] = ()) -> list[Message]:
        """The chat with an answer, and the results of its calls."""
        return [*messages, answer, *({"role": "tool", "content": result} for result in results)]


@dataclass(frozen=True)
class Native(Plain):
    """Calls between the control tokens of Qwen2.5 and Qwen3; several at once."""

    def pieces(self, messages: Sequence[Message], thinking: bool | None) -> list[Piece]:
        return self.form.render(messages, tools=self.schemas, add_generation_prompt=True, enable_thinking=thinking)

    def completion(self, tokenizer: Tokenizer, stop_ids: Collection[int], in_thought: bool) -> _Calling:
        return _Calling(tokenizer, stop_ids, thinks=self.form.thinks, in_thought=in_thought)

    def read(self, completion: _Calling, in_thought: bool) -> tuple[Message, Sequence[Call]]:
        calls = tuple(Call(name=name, arguments=arguments) for name, arguments in completion.calls)
        reasoning = completion.reasoning or None
        answer = Answer(content=completion.content, reasoning=reasoning, calls=calls, malformed=())
        return answer.message(), calls


@dataclass(frozen=True)
class React(Plain):
    """Calls in plain words, one at a time, by models whose chats know no tools: Qwen to Qwen2."""

    def pieces(self, messages: Sequence[Message], thinking: bool | None) -> list[Piece]:
        tools = [_QWEN1_INTERPRETER if tool["function"]["name"] == INTERPRETER else tool for tool in self.schemas]
        plain = react_messages(messages, tools)
        goes_on = plain[-1]["role"] == "assistant"
        return self.form.render(plain, add_generation_prompt=not goes_on, continue_final_message=goes_on)

    def completion(self, tokenizer: Tokenizer, stop_ids: Collection[int], in_thought: bool) -> Completion:
        return Completion(tokenizer, stop_ids, REACT_STOPS)

    def read(self, completion: Completion, in_thought: bool) -> tuple[Message, Sequence[Call]]:
        answer = parse_react(completion.text)
        return answer.message(), answer.calls


@dataclass(frozen=True)
class MathCode(Plain):
    """Code in the answer, with what it prints after it: Qwen2.5-Math's reasoning with programs."""

    def pieces(self, messages: Sequence[Message], thinking: bool | None) -> list[Piece]:
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": _MATH_SYSTEM}, *messages]
        goes_on = messages[-1]["role"] == "assistant"
        return self.form.render(messages, add_generation_prompt=not goes_on, continue_final_message=goes_on)

    def completion(self, tokenizer: Tokenizer, stop_ids: Collection[int], in_thought: bool) -> Completion:
        return Completion(tokenizer, stop_ids, [_OUTPUT])

    def read(self, completion: Completion, in_thought: bool) -> tuple[Message, Sequence[Call]]:
        text = completion.text
        code = _LAST_CODE.fullmatch(text, max(text.rfind("```python\n"), 0))
        calls = [Call(name=INTERPRETER, arguments=json.dumps({"code": code[1]}))] if code else []
        return _plain(text), calls

    def extended(self, messages: Sequence[Message], answer: Message, results: Sequence[str] = ()) -> list[Message]:
        """All of it is one message."""
        text = answer["content"]
        for result in results:
            text = f"{text.rstrip()}\n{_OUTPUT}\n{result}\n```\n"
        if messages[-1]["role"] == "assistant":
            *messages, begun = messages
            text = begun["content"] + text
        return [*messages, _plain(text)]


def dialect(form: Format | JinjaFormat, tools: Toolbox) -> Plain:
    """How a model with this chat format is given `tools`. Raises ConfigError if it cannot be."""
    if not tools.schemas:
        return Plain(form)
    if form.name == "qwen2.5-math" and [tool["function"]["name"] for tool in tools.schemas] == [INTERPRETER]:
        return MathCode(form)
    if form.tools:
        return Native(form, tools.schemas)
    if isinstance(form, Format):
        return React(form, tools.schemas)
    raise ConfigError("the model's own chat template cannot write tools; choose a format that can with --format")


class _Calling:
    """A completion that keeps thought, words and calls apart, and has no calls in what it shows.

    Attributes:
      calls: name and arguments of each.
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: Collection[int], *, thinks: bool, in_thought: bool) -> None:
        self._answer = ChatCompletion(tokenizer, stop_ids, (), thinks=thinks, in_thought=in_thought, tools=True)
        self._in_thought = in_thought
        self.content = self.reasoning = ""
        self.calls: list[list[str]] = []

    @property
    def text(self) -> str:
        return self._answer.text

    @property
    def finish_reason(self) -> FinishReason | None:
        return self._answer.finish_reason

    def push(self, token: int) -> str:
        return self._take(self._answer.push(token))

    def end(self, reason: FinishReason) -> str:
        return self._take(self._answer.end(reason))

    def _take(self, deltas: Sequence[Delta]) -> str:
        shown = ""
        for delta in deltas:
            if delta.call is None:
                shown += self._turn(bool(delta.reasoning)) + delta.reasoning + delta.content
                self.reasoning += delta.reasoning
                self.content += delta.content
                continue
            shown += self._turn(False)
            if delta.call.name is not None:
                self.calls.append([delta.call.name, ""])
            self.calls[delta.call.index][1] += delta.call.arguments
        return shown

    def _turn(self, to_thought: bool) -> str:
        """The tag between what is thought and what is not."""
        before, self._in_thought = self._in_thought, to_thought
        return {(False, True): "<think>\n", (True, False): "\n</think>\n\n"}.get((before, to_thought), "")


def _plain(text: str) -> Message:
    return {"role": "assistant", "content": text}
