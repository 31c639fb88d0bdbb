"""A problem of programming, as rows have it: the program in an answer, and the code that checks it."""

from __future__ import annotations

import re

# Possessive: what an answer does not close is given up in one go.
_BLOCK = re.compile(r"^[ \t]*+```[ \t]*+(\w*+)[^\n]*+\n(.*?)^[ \t]*+```", re.DOTALL | re.MULTILINE)
_PYTHON = ("python", "py", "python3")


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
