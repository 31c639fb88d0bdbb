"""What the tests of the sandbox share: short limits, and a look at what is left of a program."""

from __future__ import annotations

import os
import re
import time
import uuid
from pathlib import Path

import pytest

from qwen_jax.errors import SandboxError
from qwen_jax.sandbox.process import isolate

# Time for the kernel to take away what has been killed, on a machine that is busy.
GONE_SECONDS = 20


@pytest.fixture(autouse=True, scope="session")
def isolation():
    try:
        return isolate(allow_weak=False)
    except SandboxError as error:
        if not re.search(r"Error: .*(unshare|mount)", str(error)):  # what a machine may forbid; the rest is our fault
            raise
        pytest.skip(str(error))


class Traces:
    """Finds the processes of a program by a word in their command lines."""

    def __init__(self) -> None:
        self.word = f"program_{uuid.uuid4().hex}"

    def processes(self) -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if self.word.encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                    found.append(int(path.parent.name))
            except OSError:
                continue
        return found

    def vanish(self) -> bool:
        """Whether all of them end."""
        return wait_for(lambda: not self.processes())

    def states(self) -> set[str]:
        return {Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] for process in self.processes()}


def wait_for(condition) -> bool:
    deadline = time.monotonic() + GONE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.fixture
def traces():
    return Traces()
