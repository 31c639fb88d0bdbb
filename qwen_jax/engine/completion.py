"""Text from prompts: the engine's tokens, decoded as they come, up to a token or a string that ends it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Literal

from qwen_jax.engine.decode import Engine
from qwen_jax.engine.stop import StopStrings
from qwen_jax.ops.sampling import Sampling
from qwen_jax.text import Tokenizer

FinishReason = Literal["stop", "length", "interrupted"]


class Completion:
    """The text of one row, which grows with its tokens.

    Attributes:
      text: the completion so far, without the stop string.
      num_tokens: tokens made so far, with those of the stop string or the stop token that ended it.
      finish_reason: None while it grows; then "stop" at a stop token or a stop string, "length" at the token limit,
        "interrupted" when the user stopped it.
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: Collection[int], stops: Sequence[str]) -> None:
        """`stop_ids` are the tokens, `stops` the strings that end the text; neither is part of it."""
        self.text = ""
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None
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
        piece = self._stops.push(self._characters.push(token))
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


def generate(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Completion],
    sampling: Sampling,
    *,
    seed: int,
    rows: Sequence[int],
    max_new_tokens: int,
    show: Callable[[int, str], None] = lambda row, piece: None,
) -> None:
    """Fills `completions`, one for each of `prompts`, in one batch; interrupted, they hold what was made.

    Args:
      engine: the model.
      prompts: token ids, at least one each.
      completions: fresh ones.
      sampling, seed, rows, max_new_tokens: as for `Engine.decode`.
      show: takes the index of a prompt and the next piece of its completion; called for each token, though some
        make no text certain.
    """
    for tokens in engine.decode(prompts, sampling, seed=seed, rows=rows, max_new_tokens=max_new_tokens):
        for index, (completion, token) in enumerate(zip(completions, tokens.tolist(), strict=True)):
            if completion.finish_reason is None:
                show(index, completion.push(token))
        if all(completion.finish_reason for completion in completions):
            return
    for index, completion in enumerate(completions):
        show(index, completion.end("length"))
