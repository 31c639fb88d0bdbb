"""What every stage is: what it does with one row, and what it makes of all of them in the end."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, Literal

from train.data.synthesis.prompts import Prompt
from train.data.synthesis.rows import Chat, Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
    """A chat for the model to answer.

    Attributes:
      schema: a JSON schema that the answer is held to; None for any text.
    """

    messages: Chat
    schema: Mapping[str, Any] | None = None

    @classmethod
    def user(cls, content: str, schema: Mapping[str, Any] | None = None) -> Ask:
        return cls(messages=[{"role": "user", "content": content}], schema=schema)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model has answered.

    Attributes:
      text: without its thought.
      thought: "" for none.
      finish_reason: "length" where it was cut, "no room" where the question was too long to be asked.
    """

    text: str
    thought: str = ""
    finish_reason: Literal["stop", "length", "no room"] = "stop"

    @property
    def fault(self) -> str | None:
        """Why it cannot be used, if so."""
        if self.finish_reason != "stop":
            return "cut at max_new_tokens" if self.finish_reason == "length" else "question too long"
        return None if self.text.strip() else "empty"

    def json(self) -> Any:
        """What it says as JSON, made of valid text. Raises ValueError."""
        try:
            value = json.loads(self.text)
            json.dumps(value, ensure_ascii=False).encode()  # an escape may stand for half a character
        except RecursionError as error:
            raise ValueError("JSON nested too deeply") from error
        return value


@dataclasses.dataclass
class Outcome:
    """What comes of one row: rows that are kept, and how many things were dropped for which reason."""

    kept: list[Row] = dataclasses.field(default_factory=list)
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)


# Of all rows, in order, read from a file as they are asked for.
Outcomes = Sequence[Outcome]
Work = Generator[Sequence[Ask], Sequence[Answer], Outcome]


class Stage:
    """A stage. What it makes of a row depends on the row, its number and the config alone.

    Attributes:
      prompts: what it asks with.
      facts: what the report says beside the numbers of rows, once `collect` is through.
    """

    prompts: Sequence[Prompt] = ()

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}

    def check(self, row: Row) -> None:
        """A ValueError for a row that the stage cannot read; it is called for all before anything is done."""
        raise NotImplementedError

    def work(self, row: Row, index: int) -> Work:
        """Asks the model, as often as it likes, several things at a time; not in the main thread."""
        raise NotImplementedError

    def collect(self, outcomes: Outcomes) -> Iterator[Row]:
        """The rows of the output."""
        for outcome in outcomes:
            yield from outcome.kept
