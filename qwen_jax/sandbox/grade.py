"""Whether a program passes its tests, when it would rather pretend.

The program and the code that checks it run in two sandboxes with a pipe between them. On the checker's side,
`from program import f` gives a stand-in for every function `f`; calling it runs the function on the program's side.
Only plain values pass, by value. docs/sandbox.md says what that stops and what it does not.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from qwen_jax.sandbox.process import Limits, Warden, isolate
from qwen_jax.sandbox.run import Reason, encoded

_CHILD = Path(__file__).with_name("grade_child.py")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What came of the tests.

    Attributes:
      passed: whether the checker ran to its end.
      reason: "ok" if so; "error" if it raised something; else what ended the program, or the checker, as in `Result`.
      detail: what was raised, in one line.
      seconds: on the clock.
    """

    passed: bool
    reason: Reason
    detail: str
    seconds: float


def grade(program: str, checker: str, *, limits: Limits | None = None, allow_weak: bool = False) -> Verdict:
    r"""Runs `checker`, Python that calls functions of `program` and raises if they do wrong. Raises as `run` does.

    A problem of HumanEval has the checker f"{prompt}\n{test}\nfrom program import {entry_point}\ncheck({entry_point})",
    in which helpers of the prompt are the prompt's own, and not the program's.
    """
    limits = limits or Limits()
    if len(text := encoded(program)) > limits.file_bytes:
        detail = f"the program has {len(text)} bytes; {limits.file_bytes} are allowed"
        return Verdict(passed=False, reason="error", detail=detail, seconds=0)
    nonce = secrets.token_hex(16)
    side: dict[str, Any] = {"isolation": isolate(allow_weak=allow_weak), "limits": limits}
    child = ["python", "-c", _CHILD.read_text("utf-8")]
    with ExitStack() as stack:
        with _pipe() as (called, call), _pipe() as (answered, answer):
            callee = Warden([*child, "program"], stdin=text, descriptors=[called, answer], **side)
            stack.enter_context(callee)
            question = encoded(nonce + checker)
            judge = Warden([*child, "checker"], stdin=question, descriptors=[answered, call], answers=True, **side)
            stack.enter_context(judge)
        report = judge.receive()
        says = _read_answer(report, nonce)
        if says["ended"]:  # how, is for the program's own warden to say
            end = callee.receive()
            last_line = end["stderr"].decode("utf-8", "replace").rstrip().rpartition("\n")[2]
            says |= {"reason": "error" if end["reason"] == "ok" else end["reason"]}
            says |= {"detail": last_line or says["detail"]}
    passed = says["reason"] == "ok"
    return Verdict(passed=passed, reason=says["reason"], detail=says["detail"], seconds=report["seconds"])


def _read_answer(report: Mapping[str, Any], nonce: str) -> dict[str, Any]:
    """What the checker's side has answered, of which the last line of its code knows the nonce."""
    try:
        answer = json.loads(report["answer"][8:])
        if answer["nonce"] == nonce:
            return answer
    except (ValueError, KeyError):
        pass
    reason = "error" if report["reason"] == "ok" else report["reason"]
    return {"reason": reason, "detail": f"the checker ended without a verdict ({reason})", "ended": False}


@contextmanager
def _pipe() -> Iterator[tuple[int, int]]:
    """A pipe whose ends we close when others have them."""
    ends = os.pipe()
    try:
        yield ends
    finally:
        for end in ends:
            os.close(end)
