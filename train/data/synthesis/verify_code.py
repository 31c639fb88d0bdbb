"""Execution feedback for code: a program is kept if it passes its tests, in the sandbox."""

from __future__ import annotations

import re

from qwen_jax.sandbox.grade import grade
from train.data.synthesis import rows
from train.data.synthesis.config import VerifyCode
from train.data.synthesis.rows import Row
from train.data.synthesis.sandboxes import limits
from train.data.synthesis.stages import Outcome, Stage, Work

_BLOCK = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
_PYTHON = ("python", "py", "python3")


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
        verdict = grade(program, checker, limits=limits(config.sandbox), allow_weak=config.sandbox.allow_weak)
        if verdict.passed:
            outcome.kept.append(row)
        else:
            outcome.dropped["tests failed" if verdict.reason == "error" else verdict.reason] += 1
        return outcome


def problem(answer: str, *, prompt: str, test: str, entry_point: str) -> tuple[str, str]:
    """A program, and the code that checks it, as `sandbox.grade` takes them.

    Args:
      answer: the program, or words with it in the last block of Python; or what goes on after the prompt.
      prompt: the code that it goes on from, whose helpers it may use; words that are no code are none.
      test: code with a function `check(candidate)`, or, without an entry point, code that calls `program`.
      entry_point: name of the function that the test is given.
    """
    code = code_of(answer)
    is_code = bool(entry_point) and re.search(rf"^\s*(?:async )?def {re.escape(entry_point)}\b", prompt, re.MULTILINE)
    start = prompt if is_code else ""
    whole = bool(re.search(rf"^(?:async )?def {re.escape(entry_point)}\b", code, re.MULTILINE))
    program = f"{start}\n    pass\n\n{code}" if start and whole else start + code
    if not entry_point:
        return program, test
    return program, f"{start}\n    pass\n\n{test}\nfrom program import {entry_point}\ncheck({entry_point})".lstrip()


def code_of(answer: str) -> str:
    """The last block of Python in an answer, or of no language; without any, all of it."""
    blocks = [code for language, code in _BLOCK.findall(answer) if language.lower() in ("", *_PYTHON)]
    return blocks[-1] if blocks else answer
