"""An interpreter in a sandbox that keeps its variables from one cell to the next."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Self

from qwen_jax.sandbox.process import Isolation, Limits, Warden, isolate
from qwen_jax.sandbox.run import Result, encoded, refused, result

_CHILD = Path(__file__).with_name("session_child.py")
_CELL_BYTES = 1 << 19  # what a pipe surely holds at once, with the length before it


class Session:
    """A code interpreter. Not for two threads at a time.

    Every cell has all of `limits` for itself. A cell that meets one takes the interpreter with it: the next begins
    in a new one, without variables and files; so it does after "killed", where a cell has ended the interpreter.
    Between cells nothing runs. Raises as `run` does.
    """

    def __init__(self, *, limits: Limits | None = None, allow_weak: bool = False) -> None:
        self._limits = limits or Limits()
        self._isolation: Isolation = isolate(allow_weak=allow_weak)
        self._warden: Warden | None = None

    @property
    def alive(self) -> bool:
        """Whether there is an interpreter, with what cells have left in it."""
        return self._warden is not None

    def run(self, code: str) -> Result:
        """Runs a cell; `value` is what its last line comes to, if that is an expression, as in a notebook.

        A cell that raises has the reason "error", its traceback in `stderr`, and leaves the interpreter alive.
        """
        if len(cell := encoded(code)) > _CELL_BYTES:
            return refused(f"the cell has {len(cell)} bytes; {_CELL_BYTES} are allowed")
        try:
            if self._warden is None:
                self._warden = Warden(
                    ["python", "-c", _CHILD.read_text("utf-8"), f"{self._limits.output_bytes // 2}"],
                    isolation=self._isolation,
                    limits=self._limits,
                    answers=True,
                )
                started = self._warden.receive()
                if not started["alive"]:
                    self.close()
                    return result(started)
            self._warden.send(cell)
            report = self._warden.receive()
        except BaseException:  # Ctrl-C, too: nobody knows where the interpreter is
            self.close()
            raise
        if report["alive"]:
            ok, value = _read_answer(report["answer"])
            return result(report | {"reason": "ok" if ok else "error"}, value=value)
        self.close()
        ended_itself = report["reason"] in ("ok", "error")  # os._exit(0) is no way to end a cell
        return result(report | ({"reason": "killed"} if ended_itself else {}))

    def close(self) -> None:
        """Ends the interpreter; another cell would begin a new one."""
        if self._warden is not None:
            self._warden.close()
            self._warden = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def _read_answer(answer: bytes) -> tuple[bool, str | None]:
    """Whether a cell ran through, and its value. Cells can write here what they want, to nobody's harm."""
    try:
        ok, value = json.loads(answer[8:])
    except (ValueError, TypeError, RecursionError):
        return False, None
    return ok is True, value if isinstance(value, str) else None
