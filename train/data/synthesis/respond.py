"""Rejection sampling: several answers to each instruction, of which those are kept that end in the right one."""

from __future__ import annotations

from qwen_jax.text.final_answer import final_answer, marked_answer, reference_answer, same_answer
from train.data.synthesis import rows
from train.data.synthesis.config import Respond
from train.data.synthesis.rows import Row
from train.data.synthesis.stages import Answer, Ask, Outcome, Stage, Work


class RespondStage(Stage):
    """Gives each kept answer as `messages` to train on, with `samples` and how many of them were `right`."""

    def __init__(self, config: Respond) -> None:
        super().__init__()
        self._config = config

    def check(self, row: Row) -> None:
        rows.chat(row, self._config.field)
        if self._config.reference:
            self._reference(row)

    def work(self, row: Row, index: int) -> Work:
        config, outcome = self._config, Outcome()
        chat = rows.chat(row, config.field, config.system)
        answers = yield [Ask(messages=chat)] * config.samples
        reference = self._reference(row) if config.reference else None
        right, kept = 0, {}
        for answer in answers:
            if fault := answer.fault or self._wrong(answer, reference):
                outcome.dropped[fault] += 1
                continue
            right += 1
            text = " ".join(answer.text.split())
            if text in kept:
                outcome.dropped["duplicate"] += 1
            elif config.keep and len(kept) == config.keep:
                outcome.dropped["more than keep"] += 1
            else:
                kept[text] = answer
        numbers = {"samples": config.samples} | ({"right": right} if config.reference else {})
        outcome.kept = [{**row, "messages": [*chat, _message(answer)], **numbers} for answer in kept.values()]
        return outcome

    def _wrong(self, answer: Answer, reference: str | None) -> str | None:
        if reference is None:
            return None
        final = (marked_answer if self._config.marked else final_answer)(answer.text)
        if final is None:
            return "no final answer"
        return None if same_answer(final, reference) else "wrong"

    def _reference(self, row: Row) -> str:
        value = row.get(self._config.reference)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return reference_answer(value)
        return reference_answer(rows.text(row, self._config.reference))


def _message(answer: Answer) -> dict[str, str]:
    thought = {"reasoning_content": answer.thought} if answer.thought else {}
    return {"role": "assistant", **thought, "content": answer.text}
