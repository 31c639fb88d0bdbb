"""Execution feedback for instructions: an answer is kept if the verifiers of its row pass it, in the sandbox."""

from __future__ import annotations

from collections.abc import Sequence

from qwen_jax.sandbox.verify import fraction_passed
from train.data.synthesis import rows
from train.data.synthesis.config import VerifyInstructions
from train.data.synthesis.rows import Row
from train.data.synthesis.stages import Outcome, Stage, Work


class VerifyInstructionsStage(Stage):
    """Gives the rows whose answer passes, with `passed`: the fraction of the verifiers that pass it."""

    def __init__(self, config: VerifyInstructions) -> None:
        super().__init__()
        self._config = config

    def check(self, row: Row) -> None:
        rows.answer(row, self._config.field)
        self._verifiers(row)

    def work(self, row: Row, index: int) -> Work:
        yield from ()
        config, outcome = self._config, Outcome()
        response = rows.answer(row, config.field)
        limits, allow_weak = config.sandbox.limits, config.sandbox.allow_weak
        passed = fraction_passed(self._verifiers(row), response, limits=limits, allow_weak=allow_weak)
        if (passed or 0) >= config.min_passed:
            outcome.kept.append({**row, "passed": round(passed or 0, 3)})
        else:
            outcome.dropped["verifiers do not run" if passed is None else "not followed"] += 1
        return outcome

    def _verifiers(self, row: Row) -> Sequence[str]:
        found = row.get(self._config.verifiers)
        found = [found] if isinstance(found, str) else found
        if not isinstance(found, list) or not found or not all(isinstance(program, str) for program in found):
            raise ValueError(f'field "{self._config.verifiers}" holds no programs; stage @WriteVerifiers adds some')
        return found
