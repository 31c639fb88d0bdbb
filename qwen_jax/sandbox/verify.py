"""Verifiers that a model has written: programs with a function `evaluate(response)`, which says true or false."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from qwen_jax.sandbox.run import Limits, run

_CHILD = Path(__file__).with_name("verify_child.py")


def evaluate(
    verifier: str, responses: Sequence[str], *, limits: Limits | None = None, allow_weak: bool = False
) -> list[bool | None] | None:
    """What a verifier says of each response. Raises as `run` does.

    None in place of what it raises or is no boolean; None for all where it has no such function, or meets a limit.
    """
    given = json.dumps({"verifier": verifier, "responses": list(responses)})
    command = ["python", "-c", _CHILD.read_text("utf-8")]
    done = run(command, stdin=given, limits=limits, allow_weak=allow_weak)
    try:
        said = json.loads(done.stdout.rstrip().rpartition("\n")[2])
    except (ValueError, RecursionError):
        return None
    if done.reason != "ok" or not isinstance(said, list) or len(said) != len(responses):
        return None
    return [value if isinstance(value, bool) else None for value in said]


def fraction_passed(verifiers: Sequence[str], response: str, **sandbox) -> float | None:
    """The fraction of verifiers that pass a response; None where none of them says anything. Raises as `run` does."""
    said = [(evaluate(program, [response], **sandbox) or [None])[0] for program in verifiers]
    return None if set(said) == {None} else sum(value is True for value in said) / len(said)
