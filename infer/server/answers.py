"""Responses of OpenAI's API: the envelope around the choices, in chunks of a stream or whole."""

from __future__ import annotations

import dataclasses
import time
import uuid
from typing import Any

from infer.server.errors import ApiError
from infer.server.prepare import Prepared
from qwen_jax.engine import Token
from qwen_jax.engine.structured import GrammarConstraint

NOT_FINITE = "the model's logits are not finite (NaN or inf); the weights or the dtype cannot be used"

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Kind:
    """How OpenAI's API names the objects of a route: the prefix of ids, a whole response, a chunk of a stream."""

    prefix: str
    whole: str
    chunk: str


CHAT = Kind("chatcmpl", "chat.completion", "chat.completion.chunk")
COMPLETION = Kind("cmpl", "text_completion", "text_completion")


class Answer:
    """The response to one request, which grows with its tokens."""

    def __init__(self, kind: Kind, model: str, prepared: Prepared, *, with_usage: bool) -> None:
        """`model` is the name clients know; `with_usage` has a stream end with the count of its tokens."""
        self._kind = kind
        self._prepared = prepared
        self._with_usage = with_usage
        self._common = {"id": f"{kind.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def begin(self) -> list[Json]:
        """The chunks before the first token."""
        choices = self._prepared.choices
        return [self._chunk(row, piece) for row, choice in enumerate(choices) for piece in choice.begin()]

    def push(self, row: int, token: Token) -> list[Json]:
        """The chunks of one more token. Raises ApiError where no answer can come of it."""
        if token.finish_reason == "error":
            raise ApiError(500, NOT_FINITE)
        pieces = self._prepared.choices[row].push(token)
        constraint = self._prepared.requests[row].constraint
        if isinstance(constraint, GrammarConstraint) and constraint.error:
            raise ApiError(400, constraint.error)
        return [self._chunk(row, piece) for piece in pieces]

    def ended(self, row: int) -> bool:
        """Whether a completion has all it wants."""
        return self._prepared.choices[row].finish_reason is not None

    def end(self) -> list[Json]:
        """The chunks after the last token."""
        if not self._with_usage:
            return []
        return [self._common | {"object": self._kind.chunk, "choices": [], "usage": self._usage()}]

    def whole(self) -> Json:
        """The response, once all have ended."""
        choices = [{"index": row, **choice.whole()} for row, choice in enumerate(self._prepared.choices)]
        return self._common | {"object": self._kind.whole, "choices": choices, "usage": self._usage()}

    def _chunk(self, row: int, piece: Json) -> Json:
        usage = {"usage": None} if self._with_usage else {}
        return self._common | {"object": self._kind.chunk, "choices": [{"index": row, **piece}], **usage}

    def _usage(self) -> Json:
        prompt, completion = self._prepared.num_prompt_tokens, sum(c.num_tokens for c in self._prepared.choices)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
