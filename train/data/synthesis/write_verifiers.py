"""Verifiers of instructions, as AutoIF (Dong et al. 2024) has them: programs and test cases that check each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qwen_jax.sandbox.verify import evaluate
from train.data.synthesis import rows
from train.data.synthesis.config import WriteVerifiers
from train.data.synthesis.prompts import Prompt
from train.data.synthesis.rows import Row
from train.data.synthesis.stages import Answer, Ask, Outcome, Stage, Work

_CASE = {
    "type": "object",
    "properties": {"response": {"type": "string"}, "follows": {"type": "boolean"}},
    "required": ["response", "follows"],
    "additionalProperties": False,
}
_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {"program": {"type": "string"}, "cases": {"type": "array", "items": _CASE, "maxItems": 8}},
    "required": ["program", "cases"],
    "additionalProperties": False,
}

Said = Sequence[bool | None]


class WriteVerifiersStage(Stage):
    """Adds `verifiers` to the rows that have some."""

    def __init__(self, config: WriteVerifiers) -> None:
        super().__init__()
        self._config = config
        self._prompt = Prompt(config.prompt, ["instruction"])
        self.prompts = [self._prompt]

    def check(self, row: Row) -> None:
        rows.instruction(row, self._config.field)

    def work(self, row: Row, index: int) -> Work:
        config, sandbox, outcome = self._config, self._config.sandbox, Outcome()
        question = self._prompt.fill(instruction=rows.instruction(row, config.field))
        answers = yield [Ask.user(question, _SCHEMA)] * config.samples
        programs: dict[str, None] = {}
        cases: dict[tuple[str, bool], None] = {}
        for answer in answers:
            if fault := answer.fault or _read(answer, programs, cases):
                outcome.dropped[f"verifier: {fault}"] += 1
        said: dict[str, Said] = {}
        responses = [response for response, _ in cases]
        for program in programs:
            values = evaluate(program, responses, limits=sandbox.limits, allow_weak=sandbox.allow_weak)
            if values is None:
                outcome.dropped["verifier: does not run"] += 1
            else:
                said[program] = values
        kept = agreeing(said, [follows for _, follows in cases], config.min_accuracy)
        outcome.dropped["verifier: does not agree"] += len(said) - len(kept)
        if len(kept) >= config.min_programs:
            outcome.kept.append({**row, "verifiers": kept})
        else:
            outcome.dropped["instruction: too few verifiers"] += 1
        outcome.dropped = +outcome.dropped
        return outcome


def agreeing(said: Mapping[str, Said], follows: Sequence[bool], min_accuracy: float) -> list[str]:
    """The programs that can be trusted.

    Args:
      said: what each program says of the response of each case.
      follows: what each case says itself.
      min_accuracy: of the cases that some program gets right, the fraction that a program must.

    None can where these cases are not of both kinds: a program that always says the same would do.
    """
    some = [n for n, want in enumerate(follows) if any(values[n] is want for values in said.values())]
    if len({follows[n] for n in some}) < 2:
        return []
    right = {program: sum(values[n] is follows[n] for n in some) for program, values in said.items()}
    return [program for program in said if right[program] >= min_accuracy * len(some)]


def _read(answer: Answer, programs: dict[str, None], cases: dict[tuple[str, bool], None]) -> str | None:
    """Adds what an answer holds, or says what is wrong with it."""
    try:
        said = answer.json()
        new = [(case["response"], case["follows"]) for case in said["cases"]]
        program = said["program"]
    except (ValueError, TypeError, KeyError):
        return "no program with cases"
    if not isinstance(program, str) or "def evaluate" not in program:
        return "no function evaluate"
    if not all(isinstance(response, str) and isinstance(follows, bool) for response, follows in new):
        return "no program with cases"
    programs[program] = None
    cases.update(dict.fromkeys(new))
    return None
