"""Our end of a sandbox: the limits, how well this machine locks a program in, and the process that does it."""

from __future__ import annotations

import dataclasses
import functools
import marshal
import math
import os
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self

from qwen_jax.errors import ConfigError, SandboxError
from qwen_jax.sandbox import seccomp
from qwen_jax.sandbox.view import EXECUTABLE, PYTHON, ROOT, environment, view

# Namespaces of our own making; the same made by bubblewrap, which some machines allow and us not; or neither.
Isolation = Literal["namespaces", "bubblewrap", "none"]

_START = f"import sys; sys.path.append({str(ROOT)!r}); from qwen_jax.sandbox import warden; warden"
# The warden keeps the time. This is how long it may take to start and to clean up, on a machine that is very busy.
_PATIENCE_SECONDS = 60
_OPEN_FILES = 256
_OURS = 2  # processes within the limit that are not the program's: the launcher and init
_MESSAGE = 8  # bytes of the length before each message


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may use, with all the processes it starts.

    Attributes:
      wall_seconds, cpu_seconds: time on the clock, and of all processors together.
      memory_bytes: what any process may ask for, and what all together may use.
      output_bytes: on standard output and standard error together.
      processes: at a time, threads included.
      file_bytes: in its folder, which is memory besides `memory_bytes`.
    """

    wall_seconds: float = 10
    cpu_seconds: float = 10
    memory_bytes: int = 1 << 30
    output_bytes: int = 1 << 20
    processes: int = 64
    file_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not 0 < value < math.inf:
                raise ConfigError(f"Limits.{name} is {value}; want a number above 0")


class Warden:
    """A sandbox with one program in it. When it is closed, or this process dies, so does all that the program started.

    A program that `answers` gets messages on descriptor 3 and writes one answer to each on 4, and one before any; in
    both directions that is a length in 8 bytes, little end first, and as many bytes. It stands still after an answer.

    Args:
      command: what runs; "python" is the interpreter.
      stdin: its standard input.
      files: contents by path in the folder that it starts in.
      descriptors: pipes of ours that it gets as descriptors 5, 6, ...
      answers: whether it answers; of another, what it writes to 4 is thrown away.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        isolation: Isolation,
        limits: Limits,
        stdin: bytes = b"",
        files: Mapping[str, bytes] | None = None,
        descriptors: Sequence[int] = (),
        answers: bool = False,
    ) -> None:
        weak = isolation == "none"
        python = EXECUTABLE if weak else PYTHON
        self._patience = limits.wall_seconds + _PATIENCE_SECONDS
        self._folder = _open_folder() if weak else None
        request = {
            "isolation": isolation,
            "view": view(warden=isolation == "bubblewrap"),
            "bubblewrap": shutil.which("bwrap") or "bwrap",
            "inside": [python, "-I", "-S", "-c", f"{_START}.init_inside()"],
            "folder": self._folder,
            "filter": seccomp.filter_program(unix_sockets=not weak),
            "resources": _resources(limits),
            "limits": dataclasses.asdict(limits),
            "command": [python if part == "python" else part for part in command[:1]] + list(command[1:]),
            "environment": environment(python=python, folder=self._folder or "/tmp"),
            "stdin": stdin,
            "files": dict(files or {}),
            "descriptors": list(descriptors),
            "answers": answers,
        }
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", f"{_START}.main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={},
            pass_fds=descriptors,
            start_new_session=True,  # Ctrl-C is for us alone
        )
        self.send(request)

    def send(self, message: Any) -> None:
        """Sends the program a message, which is bytes."""
        assert self._process.stdin
        data = marshal.dumps(message)
        view = memoryview(len(data).to_bytes(_MESSAGE, "little") + data)
        try:
            while view:
                view = view[self._process.stdin.write(view) :]
        except BrokenPipeError:
            pass  # what became of it is for `receive` to say

    def receive(self) -> dict[str, Any]:
        """The next report: why the program answered or ended, what it wrote, and whether it is alive.

        Raises SandboxError if the program could not be locked in, or nothing is heard.
        """
        deadline = time.monotonic() + self._patience
        size = int.from_bytes(self._read(_MESSAGE, deadline), "little")
        report = marshal.loads(self._read(size, deadline))
        if "failed" in report:
            raise SandboxError(report["failed"])
        return report

    def close(self) -> None:
        """Ends the program, if it has not ended, and waits until nothing is left of it."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()  # with it, the kernel kills what it has started
            self._process.wait()
        if self._folder is not None:
            # Not shutil: a program can nest folders deeper than Python can follow, and close them.
            subprocess.run(["chmod", "-R", "u+rwX", self._folder], stderr=subprocess.DEVNULL)
            subprocess.run(["rm", "-rf", self._folder], stderr=subprocess.DEVNULL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _read(self, size: int, deadline: float) -> bytes:
        assert self._process.stdout
        data = bytearray()
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN)
        while len(data) < size:
            if not poll.poll(1000 * max(0.0, deadline - time.monotonic())):
                raise SandboxError(
                    f"a sandbox gave no answer for {self._patience:.0f} s; the machine may be overloaded"
                )
            if not (piece := self._process.stdout.read(size - len(data))):
                raise SandboxError("a sandbox's process died; the machine may have run out of memory")
            data += piece
        return bytes(data)


def isolate(*, allow_weak: bool) -> Isolation:
    """The best isolation that this machine has.

    Raises SandboxError if it has none, unless `allow_weak`: then a program has limits, no network, and no rights of
    root, but can read what we can read, and write where we can.
    """
    best, reasons = _probe()
    if best == "none" and not allow_weak:
        raise SandboxError(
            f"this machine cannot lock untrusted code in ({reasons}); allow user namespaces, install bubblewrap, or "
            "let the code read your files: --allow-weak-sandbox, or allow_weak = True in a config"
        )
    return best


@functools.cache
def _probe() -> tuple[Isolation, str]:
    """The first isolation in which a program starts, and what is wrong with those before it."""
    if sys.platform != "linux":
        raise SandboxError(f"untrusted code runs on Linux only, this is {sys.platform}")
    candidates: list[Isolation] = ["namespaces"]
    if os.geteuid() != 0 and shutil.which("bwrap"):  # root stays root in it, and no limit on processes holds root
        candidates.append("bubblewrap")
    reasons = []
    for isolation in candidates:
        try:
            with Warden(["python", "-c", "pass"], isolation=isolation, limits=Limits(wall_seconds=60)) as warden:
                report = warden.receive()
        except SandboxError as error:
            reasons.append(f"{isolation}: {error}")
        else:
            if report["reason"] == "ok":
                return isolation, ""
            reasons.append(f"{isolation}: {report['stderr'].decode(errors='replace').strip() or report['reason']}")
    return "none", "; ".join(reasons)


def _resources(limits: Limits) -> dict[int, int]:
    """Limits that the kernel keeps, by the numbers that `resource` has for them."""
    return {
        resource.RLIMIT_AS: limits.memory_bytes,
        resource.RLIMIT_NPROC: limits.processes + _OURS,
        resource.RLIMIT_FSIZE: limits.file_bytes,
        resource.RLIMIT_NOFILE: _OPEN_FILES,
        resource.RLIMIT_CORE: 1,  # none; at 0, a kernel that pipes dumps to a program would still do so
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }


def _open_folder() -> str:
    """A folder that the program can use, whichever user it is."""
    folder = tempfile.mkdtemp()
    if os.geteuid() == 0:
        os.chmod(folder, 0o777)
    return folder
