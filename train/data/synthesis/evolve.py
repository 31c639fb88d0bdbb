"""Evolution of instructions, as WizardLM (Xu et al. 2023) has it, and what is eliminated."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from train.data.synthesis import rows
from train.data.synthesis.config import Evolve
from train.data.synthesis.prompts import Prompt
from train.data.synthesis.rows import Row
from train.data.synthesis.stages import Ask, Outcome, Stage, Work

_COPIED = 6  # words in a row that an instruction shares with our prompt by no accident
_SHORT_ANSWER = 80  # words; of WizardLM: an apology below them is a refusal
_APOLOGIES = ("sorry", "i cannot", "i can't", "i can’t", "unable to", "抱歉", "无法回答", "不能回答")


class EvolveStage(Stage):
    """Gives the new instructions, each with `evolution`: the way, the round, and what it came from."""

    def __init__(self, config: Evolve, *, seed: int) -> None:
        super().__init__()
        self._config = config
        self._seed = seed
        self._ways = [Prompt(way, ["instruction"]) for way in config.ways]
        self.prompts = self._ways

    def check(self, row: Row) -> None:
        rows.instruction(row, self._config.field)

    def work(self, row: Row, index: int) -> Work:
        draw, outcome = random.Random(f"{self._seed}/{index}"), Outcome()
        old = rows.instruction(row, self._config.field)
        for round_number in range(1, self._config.rounds + 1):
            way = draw.choice(self._ways)
            [answer] = yield [Ask.user(way.fill(instruction=old))]
            new = answer.text.strip()
            fault = answer.fault or fault_of(old, new, way, self._config.max_characters)
            if fault is None and self._config.answered:
                [reply] = yield [Ask.user(new)]
                # An answer that is cut is one.
                fault = "no answer" if refuses(reply.text) else None
            if fault:
                outcome.dropped[fault] += 1
                break
            evolution = {"way": way.name, "round": round_number, "from": old}
            outcome.kept.append({**rows.with_instruction(row, self._config.field, new), "evolution": evolution})
            old = new
        return outcome


def fault_of(old: str, new: str, way: Prompt, max_characters: int) -> str | None:
    """Why a new instruction is none."""
    if len(new) > max_characters:
        return "too long"
    said = _words(new)
    if said == _words(old) or not said:
        return "unchanged"
    # What the old one says already is no word of the prompt's.
    ours = _runs(_words(way.words)) - _runs(_words(old))
    return "copies the prompt" if _runs(said) & ours or _headings(way.words) & _headings(new) else None


def refuses(answer: str) -> bool:
    """Whether an answer is an apology, or nothing."""
    words = _words(answer)
    return not words or (len(words) < _SHORT_ANSWER and any(sign in answer.casefold() for sign in _APOLOGIES))


def _words(text: str) -> Sequence[str]:
    """Words in small letters; of scripts without spaces, letters."""
    return re.findall(r"[一-鿿぀-ヿ]|[^\W一-鿿぀-ヿ]+", text.casefold())


def _runs(words: Sequence[str]) -> set[tuple[str, ...]]:
    return {tuple(words[start : start + _COPIED]) for start in range(len(words) - _COPIED + 1)}


def _headings(text: str) -> set[str]:
    """Lines that name what follows."""
    lines = (line.strip().casefold() for line in text.splitlines())
    return {line.strip("#*: ") for line in lines if line.startswith("#")}
