"""Programs of models, as stages run them: limits, and verifiers of answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from qwen_jax.sandbox.process import Limits
from qwen_jax.sandbox.run import run
from train.data.synthesis.config import Sandbox

_CHILD = Path(__file__).with_name("verifier_child.py")


def limits(config: Sandbox) -> Limits:
    return Limits(wall_seconds=config.seconds, cpu_seconds=config.seconds, memory_bytes=config.memory_mib << 20)


def evaluate(verifier: str, responses: Sequence[str], config: Sandbox) -> list[bool | None] | None:
    """What a program's `evaluate(response)` says of each response.

    None in place of what it raises or is no boolean; None for all where it has no such function, or meets a limit.
    """
    given = json.dumps({"verifier": verifier, "responses": list(responses)})
    command = ["python", "-c", _CHILD.read_text("utf-8")]
    done = run(command, stdin=given, limits=limits(config), allow_weak=config.allow_weak)
    try:
        said = json.loads(done.stdout.rstrip().rpartition("\n")[2])
    except (ValueError, RecursionError):
        return None
    if done.reason != "ok" or not isinstance(said, list) or len(said) != len(responses):
        return None
    return [value if isinstance(value, bool) else None for value in said]
