"""Answers from tokens: the thought, the words and the calls of tools of a completion, told apart as it grows."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from qwen_jax.engine.completion import Completion, FinishReason
from qwen_jax.text import Tokenizer
from qwen_jax.text.answer import AnswerStream, Delta
from qwen_jax.text.tools import tag_tokens


class ChatCompletion:
    """The answer of one row, which grows with its tokens.

    Stop strings are looked for in all of its text: thought, tags and calls.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_ids: Collection[int],
        stops: Sequence[str],
        *,
        thinks: bool,
        in_thought: bool,
        tools: bool,
    ) -> None:
        """Arguments are those of `Completion` and of `text.answer.AnswerStream`."""
        tags, spelled = tag_tokens(tokenizer)
        self._completion = Completion(tokenizer, stop_ids, stops, tags=tags)
        self._answer = AnswerStream(thinks=thinks, in_thought=in_thought, tools=tools, spelled=spelled)
        self._num_read = 0

    @property
    def text(self) -> str:
        """See `Completion.text`; the tags are in it."""
        return self._completion.text

    @property
    def num_tokens(self) -> int:
        """See `Completion.num_tokens`."""
        return self._completion.num_tokens

    @property
    def finish_reason(self) -> FinishReason | None:
        """See `Completion.finish_reason`."""
        return self._completion.finish_reason

    @property
    def calls(self) -> int:
        """How many calls of tools have begun."""
        return self._answer.calls

    def push(self, token: int) -> list[Delta]:
        """What one more token makes certain; nothing once the answer has ended."""
        if self.finish_reason:
            return []
        self._completion.push(token)
        return self._read()

    def end(self, reason: FinishReason) -> list[Delta]:
        """What was held back, now that no token follows; nothing if the answer had ended before."""
        if self.finish_reason:
            return []
        self._completion.end(reason)
        return self._read()

    def _read(self) -> list[Delta]:
        """Reads the text that is new, but no part of a tag that a stop string may yet cut."""
        text, spans, deltas = self.text, self._completion.tag_spans, []
        while spans and spans[0][1] <= len(text):
            start, end = spans.popleft()
            deltas += self._answer.push(text[self._num_read : start])
            deltas += self._answer.push(text[start:end], control=True)
            self._num_read = end
        if self.finish_reason:
            return [*deltas, *self._answer.push(text[self._num_read :]), *self._answer.finish()]
        end = min(len(text), spans[0][0] if spans else len(text))
        new, self._num_read = text[self._num_read : end], end
        return [*deltas, *self._answer.push(new)]
