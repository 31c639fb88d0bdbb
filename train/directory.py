"""The run directory: one process at a time, one config for ever."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qwen_jax import bindings
from qwen_jax.errors import ConfigError, FileError
from train.config import TrainConfig

CONFIG = "config.gin"
LOCK = "lock"
TOKENS = "tokens"

# What may change when a run goes on: where it lives and how it is computed and watched, not what is computed.
MAY_CHANGE = (
    "run_dir",
    "mesh",
    "remat",
    "attention",
    "layers",
    "checkpoint",
    "evaluation",
    "export",
    "log_every",
    "profile",
)
_STAGE = re.compile(r"stages\.\d+\.")  # in which the same may change


@contextlib.contextmanager
def claim(directory: Path, *, warn: Callable[[str], None]) -> Iterator[None]:
    """Makes `directory` if need be and holds it for this process, which also proves that it can be written.

    The lock belongs to the open file, so the system frees it when a process dies in any way; the process id inside
    tells people who holds it.

    Raises:
      FileError: it cannot be written, or another process holds it.
    """
    path = directory / LOCK
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = _lock(path)
        left_by = os.pread(file, 32, 0).decode(errors="replace").strip()
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
    except OSError as error:
        raise FileError(f"run_dir {directory} cannot be written: {error.strerror}; choose another run_dir") from error
    if left_by:
        warn(f"{path} was left by process {left_by}, which is gone; taking over")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def _lock(path: Path) -> int:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(file, 32, 0).decode(errors="replace").strip()
            os.close(file)
            raise FileError(
                f"run_dir {path.parent} is in use by process {holder}; wait for it to end or choose another run_dir"
            ) from None
        # A holder that left in between has removed the file: what is locked then is no longer the one at `path`.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(file).st_ino == path.stat().st_ino:
                return file
        os.close(file)


def check_empty(directory: Path) -> None:
    """Raises ConfigError if `directory` holds anything but our lock and tokens, which are checked on their own."""
    held = sorted(entry.name for entry in directory.iterdir() if entry.name not in (LOCK, TOKENS))
    if held:
        raise ConfigError(
            f"--fresh starts in an empty directory, and {directory} holds {', '.join(held[:4])}"
            f"{' …' if len(held) > 4 else ''}; choose another run_dir or remove this one"
        )


def check_same_run(directory: Path, config: TrainConfig) -> None:
    """Raises ConfigError, naming each field, if the run in `directory` was made with another config."""
    path = directory / CONFIG
    if not path.exists():
        return
    before, now = (_flat(c) for c in (bindings.resolve(TrainConfig, bindings.read(path))[0], config))
    absent = "nothing"
    changed = [
        f"{name} was {before.get(name, absent)} and is now {now.get(name, absent)}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name) and _STAGE.sub("", name).split(".")[0] not in MAY_CHANGE
    ]
    if changed:
        raise ConfigError(
            f"{directory} holds a run made with another config: {'; '.join(changed)}; "
            f"choose another run_dir, or undo the change to go on with that run"
        )


def write(directory: Path, files: Mapping[str, bytes]) -> None:
    """Writes each file whole or not at all. Raises FileError."""
    for name, content in files.items():
        new = directory / f".{name}.tmp"
        try:
            new.write_bytes(content)
            new.replace(directory / name)
        except OSError as error:
            raise FileError(f"cannot write {directory / name}: {error.strerror}") from error


def _flat(config: Any, prefix: str = "") -> dict[str, str]:
    """Every field of a config by its path, sections by the name of their class, and several of them by number."""
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, path = getattr(config, field.name), prefix + field.name
        several = isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value))
        fields |= {f"{path}.{n}": each for n, each in enumerate(value, 1)} if several else {path: value}
    out: dict[str, str] = {}
    for path, value in fields.items():
        if dataclasses.is_dataclass(value):
            out |= {path: f"@{type(value).__name__}"} | _flat(value, path + ".")
        else:
            out[path] = repr(value)
    return out
