"""The processes below this one, of which the kernel keeps the account: looking at them, stopping them, ending them."""

from __future__ import annotations

import os

_TICKS = os.sysconf("SC_CLK_TCK")
_SIGKILL, _SIGCONT, _SIGSTOP = 9, 18, 19  # the module signal takes as long to import as the warden to start


def is_visible() -> bool:
    """Whether the processes below this one can be found."""
    return os.path.exists(f"/proc/self/task/{os.getpid()}/children")


def kill_all() -> None:
    """Ends every process below this one; returns when there is none, dead or alive."""
    while True:
        # Children first: their numbers are theirs until we wait for them, and what they leave behind becomes ours.
        _signal(_children(os.getpid()), _SIGKILL)
        try:
            os.wait()
        except ChildProcessError:
            return


def freeze() -> None:
    """Stops every process below this one."""
    stopped: list = []
    while (running := _descendants()) != stopped:  # new ones may have begun meanwhile
        _signal(running, _SIGSTOP)
        stopped = running


def thaw() -> None:
    """Has every process below this one go on."""
    _signal(_descendants(), _SIGCONT)


def usage() -> tuple[int, float]:
    """Bytes in memory that no file backs, and seconds of processor time, of all processes below this one."""
    kilobytes, ticks = 0, 0
    for process in _descendants():
        for line in _read_proc(process, "status").splitlines():
            if line.startswith((b"RssAnon:", b"RssShmem:")):
                kilobytes += int(line.split()[1])
        # Behind the name, which may hold anything: its own seconds, and those of its children that have ended.
        fields = _read_proc(process, "stat").rpartition(b")")[2].split()
        ticks += sum(map(int, fields[11:15]))
    return 1024 * kilobytes, ticks / _TICKS


def _signal(processes: list, number: int) -> None:
    for process in processes:
        try:
            os.kill(process, number)
        except ProcessLookupError:
            continue


def _descendants() -> list:
    found = _children(os.getpid())
    for process in found:
        found += _children(process)
    return found


def _children(process: int) -> list:
    try:
        threads = os.listdir(f"/proc/{process}/task")
    except FileNotFoundError:
        return []
    return [int(child) for thread in threads for child in _read_proc(process, f"task/{thread}/children").split()]


def _read_proc(process: int, name: str) -> bytes:
    """A file of a process; empty if that has ended."""
    try:
        with open(f"/proc/{process}/{name}", "rb") as file:
            return file.read()
    except (FileNotFoundError, ProcessLookupError):
        return b""
