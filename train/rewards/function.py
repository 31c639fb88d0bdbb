"""A reward function of a user's, in a process of its own: whatever it does, it costs verdicts and nothing else."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.errors import DataError, FileError
from train.rewards.config import Function
from train.rewards.verdicts import Sample, Verdicts

_CHILD = Path(__file__).with_name("function_child.py")
_START_SECONDS = 120  # that the file may take to be read: it may import large libraries
_PATIENCE = 4  # times the seconds of a call, for all calls that look for the samples that fail
_EXIT_SECONDS = 1  # that a process which says no more may take to be gone, before it is ended
_RESERVED = ("prompt", "prompts", "completion", "completions", "completion_ids")  # columns that are no arguments


class FunctionReward:
    """The function of a file, called as TRL calls it; docs/alignment.md says how."""

    def __init__(self, config: Function, *, warn: Callable[[str], None]) -> None:
        """FileError where there is no such file, DataError where it cannot be read or has no such function."""
        self._config, self._warn = config, warn
        self._path = Path(config.path).expanduser()
        if not self._path.is_file():
            raise FileError(f"{self._path} is no file; objective.rewards wants one with a function {config.name}")
        self._process = _Process(self._path, config.name)
        try:
            self._process.start()
        except _Failure as failure:
            self.close()
            raise DataError(f"{self._path} cannot be used: {failure}; mend it") from None

    def check(self, columns: Mapping[str, Any]) -> None:
        """Any row will do."""

    def __call__(self, samples: Sequence[Sample]) -> Verdicts:
        """The rewards. A call that fails is made again in halves, so that what fails is found, as far as time allows.

        Raises DataError where more than the config's fraction has no verdict.
        """
        values, failures = np.full(len(samples), math.nan), Counter[str]()
        deadline, details = time.monotonic() + _PATIENCE * self._config.seconds, []
        parts = [range(len(samples))] if samples else []
        while parts:
            part = parts.pop(0)
            seconds = min(self._config.seconds, deadline - time.monotonic())
            try:
                rewards = self._rewards([samples[i] for i in part], seconds)
            except _Failure as failure:
                details.append(str(failure))
                if len(part) == 1 or seconds <= 0:
                    failures[failure.kind] += len(part)
                else:
                    middle = len(part) // 2
                    parts += [part[:middle], part[middle:]]
                continue
            for i, reward in zip(part, rewards, strict=True):
                if isinstance(reward, str):
                    failures[reward] += 1
                else:
                    values[i] = reward
        self._tell(failures, details, len(samples))
        return Verdicts(values, failures)

    def close(self) -> None:
        self._process.end()

    def _rewards(self, samples: Sequence[Sample], seconds: float) -> list[float | str]:
        if seconds <= 0:
            raise _Failure("took too long", "no time is left to look for what fails")
        names = dict.fromkeys(name for sample in samples for name in sample.columns if name not in _RESERVED)
        call = {
            "prompts": [sample.prompt for sample in samples],
            "completions": [_as_trl(sample) for sample in samples],
            "columns": {name: [sample.columns.get(name) for sample in samples] for name in names},
        }
        return self._process.ask(call, seconds)

    def _tell(self, failures: Counter[str], details: Sequence[str], total: int) -> None:
        if not (count := failures.total()):
            return
        why = details[0] if details else f"it {failures.most_common(1)[0][0]}"
        said = f"{self._path}: {self._config.name} judged {total - count} of {total} completions: {why}"
        if count > self._config.fraction * total:
            raise DataError(
                f"{said}; mend it, or allow for more without a verdict than fraction={self._config.fraction}"
            )
        self._warn(f"{said}; the others are left out")


class _Failure(Exception):
    """Why a call has no answer: `kind` is of a few words, to be counted, and the message says more."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(detail or f"it {kind}")
        self.kind = kind


def _as_trl(sample: Sample) -> str | list[dict[str, str]]:
    chat = not isinstance(sample.prompt, str)
    return [{"role": "assistant", "content": sample.completion}] if chat else sample.completion


class _Process:
    """The process. One that fails is ended, with all that it has started, and begun anew for the next call."""

    def __init__(self, path: Path, name: str) -> None:
        self._arguments = [str(path), name]
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        """A _Failure if the file cannot be read."""
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-u", str(_CHILD), str(theirs.fileno()), *self._arguments],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what it prints is for people, and no output of ours
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for us alone
            )
        try:
            self._receive(_START_SECONDS)
        except _Failure:
            self.end()
            raise

    def ask(self, call: Mapping[str, Any], seconds: float) -> list[float | str]:
        """A reward for each completion, or why there is none; a _Failure for all of them."""
        if self._process is None:
            self.start()
        with contextlib.suppress(OSError):  # what became of it is for `_receive` to say
            self._socket.settimeout(seconds)
            self._socket.sendall(json.dumps(call).encode() + b"\n")
        return self._receive(seconds)["rewards"]

    def end(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._socket.close()
        self._process = None

    def _receive(self, seconds: float) -> dict[str, Any]:
        assert self._process
        deadline, line = time.monotonic() + seconds, bytearray()
        try:
            while not line.endswith(b"\n"):
                self._socket.settimeout(max(1e-3, deadline - time.monotonic()))
                if not (piece := self._socket.recv(1 << 16)):
                    raise ConnectionResetError
                line += piece
            answer = json.loads(line)
        except TimeoutError:
            self.end()
            raise _Failure("took too long", f"it took more than {seconds:.3g} s") from None
        except (ConnectionError, ValueError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_EXIT_SECONDS)
            code = self._process.returncode
            self.end()
            raise _Failure("ended its process", f"it ended its process (exit code {code})") from None
        if "fault" in answer:
            raise _Failure(answer["fault"], answer.get("detail", ""))
        return answer
