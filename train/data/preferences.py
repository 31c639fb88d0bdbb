"""Completions of a prompt that are judged: documents of several texts, each with marks of what is scored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen_jax.errors import DataError
from qwen_jax.text import Tokenizer, chat
from qwen_jax.text.chat import Format, Piece
from qwen_jax.text.template import JinjaFormat
from train.data import conversations
from train.data.config import MOST_COMPLETIONS, Preferences
from train.data.conversations import Message
from train.data.documents import IS_BAD, IS_GOOD, TRAINED, Document
from train.data.sources import SourceFile, Tally


@dataclass(frozen=True, kw_only=True)
class Side:
    """A text: a prompt with a completion.

    Attributes:
      pieces: of it; those of the completion are trained, or of a solution the ends of its steps.
      ends: whether the end of the text after it is trained as well.
      labels: of the whole text one, or one for each step: whether it is good.
    """

    pieces: Sequence[Piece]
    ends: bool
    labels: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True)
class Judged(Document):
    """Texts that are compared with each other, or one that is judged by steps; in a row they stay side by side.

    Attributes:
      prompt: what they have in common. Its hash decides the side of evaluation that they fall on.
      sides: the texts.
    """

    prompt: str
    sides: tuple[Side, ...]

    @property
    def decides(self) -> str:
        return self.prompt

    def encode(self, tokenizer: Tokenizer) -> tuple[list[int], list[int] | None]:
        ids: list[int] = []
        marks: list[int] = []
        for side in self.sides:
            encoded = chat.encode(tokenizer, side.pieces)
            trained = [*encoded.mask, side.ends]
            # Of a step the last token; of a whole text its own.
            last = [at for at in range(len(encoded.ids)) if trained[at] and not trained[at + 1]]
            places = last if len(side.labels) > 1 else [len(encoded.ids) - 1]
            if len(places) != len(side.labels):
                raise DataError(f"{self.origin}: {len(side.labels)} steps end in {len(places)} places; is one empty?")
            labels = dict(zip(places, side.labels, strict=True))
            marks += [TRAINED * flag | _mark(labels.get(at)) for at, flag in enumerate(trained)]
            ids += [*encoded.ids, tokenizer.end_of_text]
        return ids[:-1], marks


def documents(
    files: Sequence[SourceFile], source: Preferences, form: Format | JinjaFormat, tally: Tally
) -> Iterator[Judged]:
    """The judged texts of `files`. Those that cannot be written, or tell no better from worse, are unreadable."""
    form, judged = conversations.training_format(form, learn="answers"), _steps if source.kind == "steps" else _sides
    return conversations.from_rows(files, source.columns, tally, lambda origin, row: judged(origin, row, source, form))


def _mark(label: bool | None) -> int:
    return 0 if label is None else IS_GOOD if label else IS_BAD


def _sides(origin: str, row: Mapping[str, Any], source: Preferences, form: Format | JinjaFormat) -> Judged:
    prompt, completions, labels = _completions(row)
    if len(labels) > MOST_COMPLETIONS:
        raise DataError(f"{len(labels)} completions are more than {MOST_COMPLETIONS}; leave some out")
    if len({*labels}) < 2:
        raise DataError("all completions have the same label, so there is nothing to prefer; leave the row out")
    if any(completions[i] == completions[j] for i in range(len(labels)) for j in range(i) if labels[i] != labels[j]):
        raise DataError("a preferred completion is the same as one that is not; leave the row out")
    if isinstance(prompt, str):
        texts = [(Piece(text=prompt), Piece(text=text, trained=True)) for text in completions]
        sides = [Side(pieces=p, ends=True, labels=(label,)) for p, label in zip(texts, labels, strict=True)]
        return _judged(origin, prompt, sides)
    prompt = [conversations.untrained(message) for message in _with_system(row, source, prompt)]
    tools = conversations.tools_of(row.get("tools"))
    sides = []
    for messages, label in zip(completions, labels, strict=True):
        if not messages or messages[-1].get("role") != "assistant":
            raise DataError("a completion does not end with a message of the assistant, which is trained")
        pieces = form.render([*prompt, *messages], tools=tools)
        sides.append(Side(pieces=pieces, ends=False, labels=(label,)))
    return _judged(origin, chat.text_of(form.render(prompt, tools=tools)), sides)


def _steps(origin: str, row: Mapping[str, Any], source: Preferences, form: Format | JinjaFormat) -> Judged:
    """One text, of which the ends of its steps are marked."""
    prompt, steps, labels = _labelled(row)
    if not all(isinstance(step, str) for step in steps):
        raise DataError("steps of a solution are texts")
    end = Piece(text=source.step_end, trusted=True, trained=True)
    written = [piece for step in steps for piece in (Piece(text=step), end)]
    if not isinstance(prompt, str):
        # The format writes what stands around the answer; its words are known from their place.
        messages = [*_with_system(row, source, prompt), {"role": "assistant", "content": _HOLE}]
        pieces = [piece for each in form.render(messages) for piece in _filled(each, written)]
        prompt = chat.text_of(form.render(messages[:-1]))
    else:
        pieces = [Piece(text=prompt), *written]
    return _judged(origin, prompt, [Side(pieces=pieces, ends=False, labels=tuple(labels))])


_HOLE = "\N{WHITE SQUARE}"


def _filled(piece: Piece, written: Sequence[Piece]) -> Sequence[Piece]:
    if piece.text == _HOLE and not piece.trusted:
        return written
    return [Piece(text=piece.text, trusted=piece.trusted)]


def _judged(origin: str, prompt: str, sides: Sequence[Side]) -> Judged:
    pieces = [piece for side in sides for piece in side.pieces]
    return Judged(origin=origin, text=chat.text_of(pieces), pieces=pieces, prompt=prompt, sides=tuple(sides))


def _completions(row: Mapping[str, Any]) -> tuple[str | list[Message], list[Any], list[bool]]:
    """The prompt, the completions, the best first, and whether each is good."""
    if "completions" in row:
        prompt, completions, labels = _labelled(row)
        if not isinstance(prompt, str):
            completions = [_messages(each, "completions") for each in completions]
        order = sorted(range(len(labels)), key=lambda i: not labels[i])
        return prompt, [completions[i] for i in order], [labels[i] for i in order]
    if "chosen" not in row or "rejected" not in row:
        raise DataError(
            f"its keys are {sorted(row)[:6]}; want chosen and rejected, with or without prompt, or prompt, completions "
            "and labels (data.source.columns renames)"
        )
    sides = [row["chosen"], row["rejected"]]
    if all(isinstance(side, str) for side in sides) and isinstance(row.get("prompt", ""), str):
        prompt = row["prompt"] if "prompt" in row else _common(*sides)
        return prompt, sides if "prompt" in row else [side[len(prompt) :] for side in sides], [True, False]
    chats = [_messages(side, name) for side, name in zip(sides, ("chosen", "rejected"), strict=True)]
    given = row.get("prompt", row.get("conversations"))
    if given is None:
        count = next((i for i, (a, b) in enumerate(zip(*chats, strict=False)) if a != b), min(map(len, chats)))
        return chats[0][:count], [each[count:] for each in chats], [True, False]
    return (
        _messages([{"role": "user", "content": given}] if isinstance(given, str) else given, "prompt"),
        chats,
        [True, False],
    )


def _labelled(row: Mapping[str, Any]) -> tuple[str | list[Message], list[Any], list[bool]]:
    """The columns `prompt`, `completions` and `labels`."""
    if not {"prompt", "completions", "labels"} <= row.keys():
        raise DataError(f"its keys are {sorted(row)[:6]}; want prompt, completions and labels")
    prompt, completions, labels = row["prompt"], row["completions"], row["labels"]
    if not (isinstance(completions, list) and isinstance(labels, list) and len(completions) == len(labels) > 0):
        raise DataError("completions and labels are not two lists of one length, with one entry or more")
    if not all(label in (True, False) for label in labels):
        raise DataError(f"labels are {labels!r:.40}; want true or false for each")
    return prompt if isinstance(prompt, str) else _messages(prompt, "prompt"), completions, list(map(bool, labels))


def _messages(value: Any, name: str) -> list[Message]:
    """Messages, or a single one, as TRL or ShareGPT have them; a text is the assistant's."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    turns = conversations.as_list([value] if isinstance(value, dict) else value, name)
    return [
        conversations.read_turn(each, f"{name}[{i}]") if "from" in each and "role" not in each else each
        for i, each in enumerate(turns)
    ]


def _with_system(row: Mapping[str, Any], source: Preferences, prompt: list[Message]) -> list[Message]:
    system = row.get("system") or source.system
    if not isinstance(system, str) or prompt and prompt[0].get("role") == "system":
        return prompt
    return [{"role": "system", "content": system}, *prompt]


def _common(a: str, b: str) -> str:
    """What two texts begin with, up to the word in which they differ."""
    count = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[: count - 1] if count and a[count - 1] == " " else a[:count]
