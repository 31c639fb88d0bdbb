"""Texts as answers: the model writes what each would have been asked with (instruction back-translation)."""

from __future__ import annotations

import re
from typing import Any

from train.data.synthesis import rows
from train.data.synthesis.config import Repurpose
from train.data.synthesis.prompts import Prompt
from train.data.synthesis.rows import Row
from train.data.synthesis.stages import Answer, Ask, Outcome, Stage, Work

_COPIED = 12  # words in a row that an instruction has from the text give the answer away
_POINTING = re.compile(
    r"\b(?:the|this|given|following|provided) (?:text|passage|excerpt) (?:above|below)\b|上文|以下文本"
)
_SCORE: dict[str, Any] = {
    "type": "object",
    "properties": {"score": {"enum": [1, 2, 3, 4, 5]}},
    "required": ["score"],
    "additionalProperties": False,
}


class RepurposeStage(Stage):
    """Gives `messages`, an instruction and a part of the text, with the number of the part."""

    def __init__(self, config: Repurpose) -> None:
        super().__init__()
        self._config = config
        self._prompt = Prompt(config.prompt, ["text"])
        self._judge = Prompt(config.judge, ["instruction", "text"]) if config.min_score else None
        self.prompts = [prompt for prompt in (self._prompt, self._judge) if prompt]

    def check(self, row: Row) -> None:
        rows.text(row, self._config.field)

    def work(self, row: Row, index: int) -> Work:
        config, outcome = self._config, Outcome()
        pieces = [part.strip() for part in parts(rows.text(row, config.field), config.max_characters)]
        numbered = [(n, part) for n, part in enumerate(pieces) if len(part) >= config.min_characters]
        outcome.dropped["part too short"] += len(pieces) - len(numbered)
        answers = yield [Ask.user(self._prompt.fill(text=part)) for _, part in numbered]
        made = []
        for (number, part), answer in zip(numbered, answers, strict=True):
            instruction = answer.text.strip()
            if fault := answer.fault or fault_of(instruction, part):
                outcome.dropped[fault] += 1
            else:
                made.append((number, part, instruction))
        if self._judge and made:
            fits = [Ask.user(self._judge.fill(instruction=text, text=part), _SCORE) for _, part, text in made]
            scores = yield fits
            good = [_score(answer) >= config.min_score for answer in scores]
            outcome.dropped["score too low"] += good.count(False)
            made = [one for one, is_good in zip(made, good, strict=True) if is_good]
        rest = {name: value for name, value in row.items() if name != config.field}
        for number, part, instruction in made:
            chat = [{"role": "user", "content": instruction}, {"role": "assistant", "content": part}]
            outcome.kept.append({**rest, "messages": chat, "part": number})
        outcome.dropped = +outcome.dropped
        return outcome


def parts(text: str, most: int) -> list[str]:
    """A text in parts of at most `most` characters, which joined are the text.

    It is cut where a paragraph ends, or else a line, a sentence, a word, as late as possible.
    """
    found = []
    while len(text) > most:
        ends = (text.rfind(mark, 1, most - len(mark) + 1) + len(mark) for mark in ("\n\n", "\n", ". ", "。", " "))
        end = next((end for end in ends if end > most // 2), most)
        found.append(text[:end])
        text = text[end:]
    return [*found, text]


def fault_of(instruction: str, text: str) -> str | None:
    """Why an instruction cannot stand before a text."""
    if len(instruction) > len(text):
        return "longer than the text"
    if _POINTING.search(instruction.casefold()):
        return "speaks of the text"
    words = instruction.split()
    whole = f" {' '.join(text.split())} "
    runs = (f" {' '.join(words[start : start + _COPIED])} " for start in range(len(words) - _COPIED + 1))
    return "copies the text" if any(run in whole for run in runs) else None


def _score(answer: Answer) -> int:
    try:
        return int(answer.json()["score"])
    except (ValueError, TypeError, KeyError):
        return 0
