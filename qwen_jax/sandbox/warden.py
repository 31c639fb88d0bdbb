"""The process between ours and a program that is not trusted: starts it, watches it, and ends it with all its children.

A bare interpreter runs `main`, alone in its process, and never runs what it is sent. Messages are marshal, which needs
no import: on standard input a request, and for a program that takes cells one after another; on standard output a
report of each. When the input ends, everything ends.

    warden -> launcher, which moves to new namespaces -> init, the first process there -> the program -> what it starts
"""

from __future__ import annotations

import fcntl
import marshal
import os
import select
import sys
import time

from qwen_jax.sandbox import namespaces, tree

_PERIOD = 0.05  # seconds between two looks at the tree of processes
_CHUNK = 1 << 16
_CELL_BYTES = 1 << 20  # a pipe holds a cell whole, so that giving it never waits for the program
_OUT_OF_THE_WAY = 64  # descriptors first move up here, then down to where the program wants them


def main() -> None:
    """Serves the request on standard input."""
    namespaces.adopt_orphans()
    try:
        if (request := _read_message()) is not None:
            _serve(request)
    except BrokenPipeError:
        pass  # nobody wants to know any more
    tree.kill_all()
    os._exit(0)


def init(request: dict, descriptors: list, status: int) -> None:
    """The rest of a process that is locked in: runs the program and says on `status` how it ended."""
    try:
        namespaces.die_with_parent()
        os.setsid()  # signals to the program's group shall not reach the warden's
        for name, contents in request["files"].items():
            os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
            with open(name, "wb") as file:
                file.write(contents)
        namespaces.filter_calls(request["filter"])
        program = os.fork()
        if program == 0:
            _run_program(request, descriptors, status)
        ended, outcome = os.wait()
        while ended != program:
            ended, outcome = os.wait()
        os.write(status, marshal.dumps(outcome))
    except Exception as error:  # also of ours: whoever waits shall hear of it
        os.write(status, marshal.dumps(f"{type(error).__name__}: {error}"))
    finally:
        os._exit(0)


def init_inside() -> None:
    """`init` as a program of its own, which finds its arguments in the descriptor that is its last argument."""
    with open(int(sys.argv[-1]), "rb") as file:
        init(*marshal.load(file))


def _serve(request: dict) -> None:
    if not tree.is_visible():
        return _write_message({"failed": "the kernel does not tell which process started which (PROC_CHILDREN)"})
    guest = _Guest(request)
    while (report := guest.watch()) is not None:
        tree.freeze()  # or what a cell left behind would go on unwatched
        _write_message(report)
        if not report["alive"] or (cell := _read_message()) is None:
            return
        guest.begin(cell)


class _Guest:
    """A program in its sandbox, and what came of it since the last report."""

    def __init__(self, request: dict) -> None:
        self._limits, self._answers = request["limits"], request["answers"]
        out, err, answers, status, cells = (os.pipe() for _ in range(5))
        stdin = namespaces.in_memory(request["stdin"])
        descriptors = [stdin, out[1], err[1], cells[0], answers[1], *request["descriptors"]]
        self._restart()
        if os.fork() == 0:
            _launch(request, descriptors, status[1])
        for descriptor in (*descriptors, status[1]):
            os.close(descriptor)
        self._outcome = b""
        self._cells, self._status = cells[1], status[0]
        self._outputs = {out[0]: "stdout", err[0]: "stderr", answers[0]: "answer"}
        self._poll = select.poll()
        for reader in (0, self._status, *self._outputs):
            self._poll.register(reader, select.POLLIN)
        for descriptor in (self._cells, *self._outputs):
            os.set_blocking(descriptor, False)
        try:
            fcntl.fcntl(self._cells, fcntl.F_SETPIPE_SZ, _CELL_BYTES)
        except PermissionError:
            pass  # a user with very many pipes gets no large ones; a cell that is too large then ends the program

    def begin(self, cell: bytes) -> None:
        """Gives the program its next cell, which has all the limits for itself."""
        tree.thaw()
        self._restart()
        message = len(cell).to_bytes(8, "little") + cell
        try:
            listens = os.write(self._cells, message) == len(message)
        except (BlockingIOError, BrokenPipeError):
            listens = False
        if not listens:
            tree.kill_all()

    def watch(self) -> dict | None:
        """Waits for the program's end, an answer, or a limit; None if our input says that nobody waits any more."""
        next_look = self._start
        while True:
            for descriptor, _ in self._poll.poll(1000 * _PERIOD):
                if descriptor == 0:
                    return None
                if descriptor == self._status:
                    self._outcome = os.read(descriptor, _CHUNK)
                    return self._end(None)
                self._read(descriptor)
            if self._output_bytes() > self._limits["output_bytes"]:
                return self._end("output")
            if self._has_answered():
                self._drain()
                return self._report("ok", None, alive=True)
            if (now := time.monotonic()) >= next_look:
                next_look = now + _PERIOD
                if reason := self._exceeded(now):
                    return self._end(reason)

    def _restart(self) -> None:
        self._start = time.monotonic()
        self._cpu_before = tree.usage()[1]
        self._output = {name: bytearray() for name in ("stdout", "stderr", "answer")}

    def _read(self, descriptor: int) -> bool:
        """Takes what a pipe has; whether it had anything."""
        try:
            piece = os.read(descriptor, _CHUNK)
        except BlockingIOError:
            return False
        if not piece:
            self._poll.unregister(descriptor)
        self._output[self._outputs[descriptor]] += piece
        return bool(piece)

    def _drain(self) -> None:
        for descriptor in self._outputs:
            while self._output_bytes() <= self._limits["output_bytes"] and self._read(descriptor):
                continue

    def _output_bytes(self) -> int:
        return sum(map(len, self._output.values()))

    def _has_answered(self) -> bool:
        answer = self._output["answer"]
        return self._answers and len(answer) >= 8 and len(answer) - 8 >= int.from_bytes(answer[:8], "little")

    def _exceeded(self, now: float) -> str | None:
        memory, cpu = tree.usage()
        if now - self._start > self._limits["wall_seconds"] or cpu - self._cpu_before > self._limits["cpu_seconds"]:
            return "timeout"
        return "memory" if memory > self._limits["memory_bytes"] else None

    def _end(self, reason: str | None) -> dict:
        """Ends all there is of the program; the last report."""
        tree.kill_all()
        self._drain()
        outcome = marshal.loads(self._outcome) if self._outcome else None
        if isinstance(outcome, str):
            return {"failed": outcome, "alive": False}
        code = None if outcome is None else os.waitstatus_to_exitcode(outcome)
        if reason is None and self._output_bytes() > self._limits["output_bytes"]:
            reason = "output"
        return self._report(reason or self._reason(code), code, alive=False)

    def _reason(self, code: int | None) -> str:
        """Why a program that no limit of ours has stopped has ended."""
        if code is None or code < 0:
            return "killed"
        if code and self._output["stderr"].rstrip().rpartition(b"\n")[2].startswith(b"MemoryError"):
            return "memory"
        return "error" if code else "ok"

    def _report(self, reason: str, code: int | None, *, alive: bool) -> dict:
        most = self._limits["output_bytes"]
        output = {name: bytes(written[:most]) for name, written in self._output.items()}
        seconds = time.monotonic() - self._start
        return {**output, "reason": reason, "exit_code": code, "alive": alive, "seconds": seconds}


def _launch(request: dict, descriptors: list, status: int) -> None:
    """The rest of the child that becomes what the program runs in."""
    try:
        isolation, view = request["isolation"], request["view"]
        if isolation == "bubblewrap":
            namespaces.die_with_parent()
            message = namespaces.in_memory(marshal.dumps((request, descriptors, status)))
            for descriptor in (*descriptors, status):
                os.set_inheritable(descriptor, True)
            options = namespaces.bubblewrap_options(view, request["limits"]["file_bytes"])
            program = request["bubblewrap"]
            os.execv(program, [program, *options, "--", *request["inside"], f"{message}"])
        if isolation == "namespaces":
            namespaces.enter(view, request["limits"]["file_bytes"])
        else:
            os.chdir(request["folder"])
            if os.geteuid() == 0:
                namespaces.become_nobody()
        namespaces.die_with_parent()  # only now: it is forgotten when a process changes its user
        if os.fork() == 0:
            init(request, descriptors, status)
        os.wait()
    except Exception as error:  # also of ours: whoever waits shall hear of it
        os.write(status, marshal.dumps(f"{type(error).__name__}: {error}"))
    finally:
        os._exit(0)


def _run_program(request: dict, descriptors: list, status: int) -> None:
    """The rest of the child that becomes the program."""
    try:
        namespaces.limit(request["resources"])
        status = fcntl.fcntl(status, fcntl.F_DUPFD_CLOEXEC, _OUT_OF_THE_WAY)
        high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, _OUT_OF_THE_WAY) for descriptor in descriptors]
        for number, descriptor in enumerate(high):
            os.dup2(descriptor, number)
        os.closerange(len(high), status)
        os.closerange(status + 1, os.sysconf("SC_OPEN_MAX"))
        try:
            os.execvpe(request["command"][0], request["command"], request["environment"])
        except OSError as error:
            os.write(2, f"cannot run {request['command'][0]}: {error.strerror}\n".encode())
            os._exit(127)
    except Exception as error:  # also of ours: whoever waits shall hear of it
        os.write(status, marshal.dumps(f"{type(error).__name__}: {error}"))
    finally:
        os._exit(126)


def _read_message():
    """The next message on standard input; None at its end."""
    if len(header := _read_exactly(8)) < 8:
        return None
    size = int.from_bytes(header, "little")
    return marshal.loads(message) if len(message := _read_exactly(size)) == size else None


def _read_exactly(size: int) -> bytes:
    pieces = []
    while size and (piece := os.read(0, min(size, 1 << 20))):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def _write_message(report: dict) -> None:
    message = marshal.dumps(report)
    with open(1, "wb", closefd=False) as file:
        file.write(len(message).to_bytes(8, "little") + message)
