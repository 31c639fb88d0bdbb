"""Completions on their way to a client: the choices of OpenAI's API, in pieces as they come, or whole."""

from __future__ import annotations

import secrets
from typing import Any, Protocol

from infer.server.logprobs import ChatLogprobs, TextLogprobs
from qwen_jax.engine import ChatCompletion, Completion, Token
from qwen_jax.engine.completion import FinishReason
from qwen_jax.text.answer import CallDelta, Delta
from qwen_jax.text.tools import parse_react

Json = dict[str, Any]


class ReactCompletion:
    """An answer of Qwen1 to its prompt for tools, which can be read only as a whole; used as `ChatCompletion` is."""

    def __init__(self, completion: Completion) -> None:
        self.calls = 0
        self._completion = completion

    @property
    def text(self) -> str:
        return self._completion.text

    @property
    def num_tokens(self) -> int:
        return self._completion.num_tokens

    @property
    def finish_reason(self) -> FinishReason | None:
        return self._completion.finish_reason

    def push(self, token: int) -> list[Delta]:
        if self.finish_reason:
            return []
        self._completion.push(token)
        return self._read() if self.finish_reason else []

    def end(self, reason: FinishReason) -> list[Delta]:
        if self.finish_reason:
            return []
        self._completion.end(reason)
        return self._read()

    def _read(self) -> list[Delta]:
        answer = parse_react(self.text)
        self.calls = len(answer.calls)
        deltas = [Delta(content=answer.content)] if answer.content else []
        for index, call in enumerate(answer.calls):
            deltas.append(Delta(call=CallDelta(index, f"call_{secrets.token_hex(12)}", call.name, call.arguments)))
        return deltas


class Choice(Protocol):
    """One completion on its way to a client."""

    @property
    def finish_reason(self) -> str | None:
        """In OpenAI's words; None while it grows."""
        ...

    @property
    def num_tokens(self) -> int: ...

    def begin(self) -> list[Json]:
        """What the stream says before the first token: fields of a choice, but for its index."""
        ...

    def push(self, token: Token) -> list[Json]:
        """What the stream says now."""
        ...

    def whole(self) -> Json:
        """All of it."""
        ...


class ChatChoice:
    """A choice of /v1/chat/completions."""

    def __init__(
        self, completion: ChatCompletion | ReactCompletion, logprobs: ChatLogprobs | None, *, one_call: bool
    ) -> None:
        """With `one_call`, the answer ends where a second call of a tool begins."""
        self._completion = completion
        self._logprobs = logprobs
        self._one_call = one_call
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[Json] = []

    @property
    def finish_reason(self) -> str | None:
        reason = self._completion.finish_reason
        return "tool_calls" if self._calls and reason == "stop" else reason

    @property
    def num_tokens(self) -> int:
        return self._completion.num_tokens

    def begin(self) -> list[Json]:
        return [self._piece({"role": "assistant", "content": ""})]

    def push(self, token: Token) -> list[Json]:
        if self._logprobs is not None:
            self._logprobs.push(token)
        deltas = self._completion.push(token.id)
        if token.finish_reason:
            deltas += self._completion.end(token.finish_reason)
        pieces = []
        for delta in deltas:
            if self._one_call and delta.call and delta.call.index:
                self._completion.end("stop")
                break
            pieces.append(self._piece(self._take(delta)))
        if self.finish_reason:
            pieces.append(self._piece({}, self.finish_reason))
        return pieces

    def whole(self) -> Json:
        content = "".join(self._content)
        message: Json = {"role": "assistant", "content": content if content or not self._calls else None}
        if self._reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
        if self._calls:
            message["tool_calls"] = self._calls
        logprobs = self._logprobs and self._logprobs.all(self._completion.text)
        return {"message": message, "logprobs": logprobs, "finish_reason": self.finish_reason}

    def _take(self, delta: Delta) -> Json:
        """Keeps a delta, and gives it as the stream has it."""
        if delta.call is None:
            kept, field, text = (
                (self._reasoning, "reasoning_content", delta.reasoning)
                if delta.reasoning
                else (self._content, "content", delta.content)
            )
            kept.append(text)
            return {field: text}
        call = delta.call
        if call.name is not None:
            head = {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            self._calls.append(head)
            return {"tool_calls": [{"index": call.index, **head, "function": dict(head["function"])}]}
        self._calls[call.index]["function"]["arguments"] += call.arguments
        return {"tool_calls": [{"index": call.index, "function": {"arguments": call.arguments}}]}

    def _piece(self, delta: Json, finish_reason: str | None = None) -> Json:
        logprobs = self._logprobs and self._logprobs.new(self._completion.text, ended=finish_reason is not None)
        return {"delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


class TextChoice:
    """A choice of /v1/completions."""

    def __init__(self, completion: Completion, logprobs: TextLogprobs | None, *, echo: str) -> None:
        """`echo` is what comes before the completion."""
        self._completion = completion
        self._logprobs = logprobs
        self._echo = echo

    @property
    def finish_reason(self) -> str | None:
        return self._completion.finish_reason

    @property
    def num_tokens(self) -> int:
        return self._completion.num_tokens

    def begin(self) -> list[Json]:
        return [{"text": self._echo, "logprobs": None, "finish_reason": None}] if self._echo else []

    def push(self, token: Token) -> list[Json]:
        if self._logprobs is not None:
            self._logprobs.push(token)
        text = self._completion.push(token.id)
        if token.finish_reason:
            text += self._completion.end(token.finish_reason)
        if not (text or self.finish_reason):
            return []
        logprobs = self._logprobs and self._logprobs.new(self._completion.text, ended=self.finish_reason is not None)
        return [{"text": text, "logprobs": logprobs, "finish_reason": self.finish_reason}]

    def whole(self) -> Json:
        text = self._completion.text
        logprobs = self._logprobs and self._logprobs.all(text)
        return {"text": self._echo + text, "logprobs": logprobs, "finish_reason": self.finish_reason}
