"""Runs a program that is not trusted, once."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, Literal

from qwen_jax.errors import DataError
from qwen_jax.sandbox.process import Limits, Warden, isolate

__all__ = ["Limits", "Reason", "Result", "result", "run"]

Reason = Literal["ok", "error", "timeout", "memory", "output", "killed"]

_PROGRAM = "main.py"
_BLOCK = 4096  # memory comes in pages, so a file takes whole ones


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What a program did.

    Attributes:
      stdout, stderr: what it wrote, as far as the limit; bytes that are not UTF-8 are replaced.
      exit_code: as it ended itself, minus the signal if one ended it; None if we ended it or it goes on.
      reason: "ok"; "error" if it says so or raised something; "timeout", "memory" or "output", the limit that ended it;
        "killed" by another signal.
      seconds: on the clock.
      value: repr of a cell's last expression.
    """

    stdout: str
    stderr: str
    exit_code: int | None
    reason: Reason
    seconds: float
    value: str | None = None


def run(
    program: str | Sequence[str],
    *,
    stdin: str | bytes = b"",
    files: Mapping[str, str | bytes] | None = None,
    limits: Limits | None = None,
    allow_weak: bool = False,
) -> Result:
    """Runs a program to its end or to a limit.

    Args:
      program: text of a Python program, or a command, in which "python" is this interpreter.
      stdin: its standard input.
      files: contents by path, in the folder that it starts in.
      allow_weak: also on a machine that cannot hide its files from the program.

    Raises:
      SandboxError: the machine cannot lock the program in.
      DataError: a path of `files` leads out of the folder.
    """
    limits = limits or Limits()
    contents = {_checked(path): encoded(text) for path, text in (files or {}).items()}
    command = program
    if isinstance(program, str):
        command, contents[_PROGRAM] = ["python", _PROGRAM], encoded(program)
    size = sum(-(-len(content) // _BLOCK) * _BLOCK for content in contents.values())
    if size > limits.file_bytes:
        return refused(f"the program and its files take {size} bytes of the {limits.file_bytes} that it may have")
    isolation = isolate(allow_weak=allow_weak)
    with Warden(command, isolation=isolation, limits=limits, stdin=encoded(stdin), files=contents) as warden:
        return result(warden.receive())


def encoded(text: str | bytes) -> bytes:
    """UTF-8, in which what no text can hold is left for Python to complain about."""
    return text.encode("utf-8", "surrogatepass") if isinstance(text, str) else bytes(text)


def refused(complaint: str) -> Result:
    """Of a program that is not even begun."""
    return Result(stdout="", stderr=complaint, exit_code=None, reason="error", seconds=0)


def result(report: Mapping[str, Any], **changes: Any) -> Result:
    """What a report of `Warden.receive` says."""
    return Result(
        stdout=report["stdout"].decode("utf-8", "replace"),
        stderr=report["stderr"].decode("utf-8", "replace"),
        exit_code=report["exit_code"],
        reason=report["reason"],
        seconds=report["seconds"],
        **changes,
    )


def _checked(path: str) -> str:
    if "\0" in path or os.path.isabs(path) or ".." in PurePosixPath(path).parts or not PurePosixPath(path).name:
        raise DataError(f"files[{path!r}]: want a path within the program's folder")
    return path
