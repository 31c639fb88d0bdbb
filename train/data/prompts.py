"""Prompts of reinforcement learning: what is asked, and the columns that answers are judged by. They stay in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen_jax.errors import DataError
from qwen_jax.text import Tokenizer, chat
from qwen_jax.text.chat import Format
from qwen_jax.text.template import JinjaFormat
from train.data import conversations, sources
from train.data.config import Prompts
from train.data.conversations import Message
from train.data.documents import Document
from train.data.sources import Tally
from train.data.tokenise import share


@dataclass(frozen=True, kw_only=True)
class Prompt(Document):
    """A prompt.

    Attributes:
      asked: a text that goes on, or messages that are answered.
      ids: of it, up to where the completion begins.
      columns: its row.
    """

    asked: str | list[Message]
    ids: list[int]
    columns: Mapping[str, Any]


def read(
    source: Prompts,
    *,
    form: Format | JinjaFormat | None,
    tokenizer: Tokenizer,
    longest: int,
    held_out: float,
    max_bad_fraction: float,
    report: Callable[[str], None],
) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts to train on and those held out, in the order of their files.

    Args:
      source: where they are.
      form: what chats are written in.
      tokenizer: of the model.
      longest: tokens that a prompt may have; longer ones are left out.
      held_out: fraction of them. The content of a prompt decides its side, so copies never fall on both.
      max_bad_fraction: that may be unreadable.
      report: takes lines.

    Raises DataError where none is left of a side that should have some.
    """
    tally = Tally(max_bad_fraction)
    files = sources.find_files(source, report)
    found = list(
        conversations.from_rows(
            files, source.columns, tally, lambda origin, row: _prompt(origin, row, source, form, tokenizer)
        )
    )
    fitting = [prompt for prompt in found if len(prompt.ids) <= longest]
    sides: tuple[list[Prompt], list[Prompt]] = ([], [])
    for prompt in fitting:
        sides[share(prompt.text) < held_out].append(prompt)
    left_out = f"; {len(found) - len(fitting):,} longer than {longest:,} tokens left out" * (len(found) > len(fitting))
    report(f"prompts: {len(sides[0]):,} to train on, {len(sides[1]):,} held out, of {tally}{left_out}")
    if not sides[0] or (held_out and not sides[1]):
        raise DataError(
            f"data.held_out={held_out} splits {len(fitting)} prompts into {len(sides[0])} and {len(sides[1])}{left_out}"
            "; give more, or longer rows, or change it (0 holds out none)"
        )
    return sides


def _prompt(
    origin: str, row: dict[str, Any], source: Prompts, form: Format | JinjaFormat | None, tokenizer: Tokenizer
) -> Prompt:
    asked = row["prompt"] if "prompt" in row else row.get("messages")
    if isinstance(asked, str) and source.chat:
        asked = [{"role": "user", "content": asked}]
    if isinstance(asked, str):
        ids = tokenizer.encode(asked) or [tokenizer.end_of_text]
        return Prompt(origin=origin, text=asked, asked=asked, ids=ids, columns=row)
    if not isinstance(asked, list) or not asked:
        raise DataError(f"its keys are {sorted(row)[:6]}; want prompt or messages (data.source.columns renames)")
    messages = conversations.as_list(asked, "prompt")
    if messages[-1].get("role") == "assistant":
        messages = messages[:-1]
    system = row.get("system") or source.system
    if isinstance(system, str) and messages and messages[0].get("role") != "system":
        messages = [{"role": "system", "content": system}, *messages]
    if form is None:
        raise DataError("there is no chat format to write it in; name data.source.format")
    pieces = form.render(messages, tools=conversations.tools_of(row.get("tools")), add_generation_prompt=True)
    ids = chat.encode(tokenizer, pieces).ids
    return Prompt(origin=origin, text=chat.text_of(pieces), asked=messages, ids=ids, columns=row)


class Order:
    """Which prompts are asked next: all of them once, in an order drawn anew each time, or the most telling first.

    Args:
      count: prompts.
      seed: of the orders.
      by_variance: those first whose rewards differed most when they were last asked; before them those never asked.
    """

    def __init__(self, count: int, *, seed: int, by_variance: bool) -> None:
        self._seed, self._by_variance = seed, by_variance
        self._spread = np.full(count, np.inf)
        self._round, self._place = -1, count
        self._order = np.zeros(0, np.int64)

    def take(self, count: int) -> np.ndarray:
        """The next so many prompts, int64 [count]; after the last of a round another begins."""
        taken = [np.zeros(0, np.int64)]
        while count:
            if self._place >= len(self._spread):
                self._round, self._place = self._round + 1, 0
                self._order = np.random.default_rng([self._seed, self._round, 2]).permutation(len(self._spread))
                if self._by_variance:
                    self._order = self._order[np.argsort(-self._spread[self._order], kind="stable")]
            own = self._order[self._place : self._place + count]
            self._place, count = self._place + len(own), count - len(own)
            taken.append(own)
        return np.concatenate(taken)

    def learn(self, prompts: np.ndarray, spread: np.ndarray) -> None:
        """Takes how much the rewards of prompts differed."""
        self._spread[prompts] = spread

    def arrays(self) -> dict[str, np.ndarray]:
        """All that is remembered."""
        return {"order": self._order, "spread": self._spread, "place": np.array([self._round, self._place])}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Goes on from what `arrays` gave."""
        self._order, self._spread = arrays["order"], arrays["spread"]
        self._round, self._place = arrays["place"].tolist()
