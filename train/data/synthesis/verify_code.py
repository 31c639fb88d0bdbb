"""Execution feedback for code: a program is kept if it passes its tests, in the sandbox."""

from __future__ import annotations

from qwen_jax.sandbox.grade import grade
from qwen_jax.sandbox.problem import problem
from train.data.synthesis import rows
from train.data.synthesis.config import VerifyCode
from train.data.synthesis.rows import Row
from train.data.synthesis.stages import Outcome, Stage, Work


class VerifyCodeStage(Stage):
    """Gives the rows whose program passes, as they are."""

    def __init__(self, config: VerifyCode) -> None:
        super().__init__()
        self._config = config

    def check(self, row: Row) -> None:
        rows.answer(row, self._config.field)
        rows.text(row, self._config.test)
        if not isinstance(row.get("entry_point", ""), str):
            raise ValueError('field "entry_point" is not the name of a function')

    def work(self, row: Row, index: int) -> Work:
        yield from ()
        config, outcome = self._config, Outcome()
        given = row.get(config.prompt)
        program, checker = problem(
            rows.answer(row, config.field),
            prompt=given if isinstance(given, str) else "",
            test=row[config.test],
            entry_point=row.get("entry_point", ""),
        )
        verdict = grade(program, checker, limits=config.sandbox.limits, allow_weak=config.sandbox.allow_weak)
        if verdict.passed:
            outcome.kept.append(row)
        else:
            outcome.dropped["tests failed" if verdict.reason == "error" else verdict.reason] += 1
        return outcome
