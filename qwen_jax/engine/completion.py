"""Text from prompts: the engine's tokens, decoded as they come, up to a token or a string that ends it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

from qwen_jax.engine.engine import Engine
from qwen_jax.engine.replicas import Replicas
from qwen_jax.engine.request import Request
from qwen_jax.engine.stop import StopStrings
from qwen_jax.errors import NumericalError
from qwen_jax.text import Tokenizer

FinishReason = Literal["stop", "length", "interrupted"]

_AHEAD = 8  # requests that wait in the engine, so that no place is ever empty


class Completion:
    """The text of one row, which grows with its tokens.

    Attributes:
      text: the completion so far, without the stop string.
      num_tokens: tokens made so far, with those of the stop string or the stop token that ended it.
      finish_reason: None while it grows; then "stop" at a stop token or a stop string, "length" at the token limit,
        "interrupted" when the user stopped it.
      tag_spans: where the tags stand in the text, in order, of those too that it does not hold yet. A reader takes
        out what it has read.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_ids: Collection[int],
        stops: Sequence[str],
        *,
        tags: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        """
        Args:
          stop_ids, stops: the tokens and the strings that end the text; neither is part of it.
          tags: control tokens, with their text, that a reader has to tell from the same text in other tokens.
        """
        self.text = ""
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.tag_spans: deque[tuple[int, int]] = deque()
        self._tags = tags
        self._num_decoded = 0
        self._stop_ids = stop_ids
        self._characters = tokenizer.stream()
        self._stops = StopStrings(stops)

    def push(self, token: int) -> str:
        """The text that one more token makes certain; none once it has ended."""
        if self.finish_reason:
            return ""
        self.num_tokens += 1
        if token in self._stop_ids:
            return self.end("stop")
        piece = self._stops.push(self._decode(token))
        self.text += piece
        if self._stops.found:
            self.finish_reason = "stop"
        return piece

    def end(self, reason: FinishReason) -> str:
        """The text that was held back, now that no token follows; none if it had ended before."""
        if self.finish_reason:
            return ""
        piece = self._stops.push(self._characters.finish()) + self._stops.finish()
        self.text += piece
        self.finish_reason = "stop" if self._stops.found else reason
        return piece

    def _decode(self, token: int) -> str:
        """The text that `token` completes; characters open before a tag never are."""
        tag = self._tags.get(token, "")
        text = self._characters.finish() + tag if tag else self._characters.push(token)
        self._num_decoded += len(text)
        if tag:
            self.tag_spans.append((self._num_decoded - len(tag), self._num_decoded))
        return text


def generate(
    engine: Engine | Replicas,
    jobs: Iterable[tuple[Request, Completion]],
    *,
    show: Callable[[int, str], None] = lambda index, piece: None,
    done: Callable[[int], None] = lambda index: None,
) -> None:
    """Fills completions; interrupted, they hold what was made.

    Args:
      engine: the model, or several of it.
      jobs: requests, each with a fresh completion, which ends where the first of the two says so. They are taken one
        by one, when the engine has room for more: there may be any number.
      show: takes the index of a job and the next piece of its completion; called for each token, though some make no
        text certain.
      done: takes the index of a job whose completion has ended, after all of it was shown.

    Raises NumericalError when the model's logits are not finite.
    """
    running: dict[int, tuple[int, Completion]] = {}
    waiting = enumerate(jobs)
    try:
        while True:
            while engine.stats.num_waiting < _AHEAD and (job := next(waiting, None)):
                index, (request, completion) = job
                running[engine.add(request)] = index, completion
            if not running:
                return
            for token in engine.step():
                if token.request not in running:
                    continue  # of a completion that ended at a stop string
                index, completion = running[token.request]
                if token.finish_reason == "error":
                    raise NumericalError(
                        "the model's logits are not finite (NaN or inf); the weights or the dtype cannot be used"
                    )
                show(index, completion.push(token.id))
                if token.finish_reason == "length":
                    show(index, completion.end("length"))
                if completion.finish_reason:
                    engine.cancel(token.request)
                    del running[token.request]
                    done(index)
    finally:
        for number in running:
            engine.cancel(number)
