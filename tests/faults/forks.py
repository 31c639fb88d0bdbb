"""Commands in processes of their own, to be limited, killed and measured.

jax takes seconds to import. One server does it once and is forked for each command; it has no threads that a fork
would lose.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(ROOT),
    "XLA_FLAGS": "",  # compiled as users compile
    "OPENBLAS_NUM_THREADS": "1",  # NumPy would start them when it is imported
    "MALLOC_ARENA_MAX": "1",  # each arena reserves 64 MiB of addresses, which count against a limit on them
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Done:
    """How a command ended.

    Attributes:
      code: of its exit; -9 if it was killed.
      lines: what it wrote to stdout and stderr.
      seconds: by the clock.
      cpu_seconds: of processor time.
      memory: largest resident set, in bytes.
    """

    code: int
    lines: list[str]
    seconds: float
    cpu_seconds: float
    memory: int


class Forks:
    """Runs `python -m qwen_jax.weights.NAME`, one at a time. A context manager."""

    def __enter__(self) -> Self:
        self._server = subprocess.Popen(
            [sys.executable, __file__], env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate(timeout=60)

    def run(
        self, name: str, *arguments: object, first: str = "", delay: float | None = None, number: int = signal.SIGKILL
    ) -> Done:
        """The outcome of a command.

        Args:
          name: "convert" or "verify".
          arguments: of the command line.
          first: Python that its process runs before; "" is nothing.
          delay: seconds after which the signal `number` is sent; None for never.
        """
        request = dict(name=name, arguments=[*map(str, arguments)], first=first, delay=delay, number=int(number))
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return Done(**json.loads(self._server.stdout.readline()))


def serve() -> None:
    from qwen_jax.weights import convert, verify

    mains = {"convert": convert.main, "verify": verify.main}
    assert len(os.listdir("/proc/self/task")) == 1, "a thread would be lost in a fork"
    for line in sys.stdin:
        print(json.dumps(_run(mains, **json.loads(line))), flush=True)


def _run(
    mains: dict[str, Any], *, name: str, arguments: list[str], first: str, delay: float | None, number: int
) -> dict[str, Any]:
    reads, writes = os.pipe()  # not a file, to which a limit on the size of files would apply
    start = time.monotonic()
    process = os.fork()
    if not process:
        os.dup2(writes, 1)
        os.dup2(writes, 2)
        os.close(reads)
        os.close(writes)
        os._exit(_command(name, lambda: mains[name](arguments), first))
    os.close(writes)
    if delay is not None:
        time.sleep(delay)
        os.kill(process, number)
    with open(reads, encoding="utf-8") as output:
        lines = output.read().splitlines()
    _, status, used = os.wait4(process, 0)
    return dict(
        code=os.waitstatus_to_exitcode(status),
        lines=lines,
        seconds=time.monotonic() - start,
        cpu_seconds=used.ru_utime + used.ru_stime,
        memory=used.ru_maxrss * 1024,
    )


def _command(name: str, main: Any, first: str) -> int:
    from qwen_jax.command import run_command

    try:
        exec(first, {})
        code = run_command(name, main)
        sys.stdout.flush()
        return code
    except BaseException:
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    serve()
