"""What a program in the sandbox sees of the machine.

It sees the interpreter, its packages and the shared libraries, all read-only, an empty folder /tmp of its own, which
is memory, and no other file, process, network or variable.
"""

from __future__ import annotations

import functools
import os
import site
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qwen_jax.sandbox import seccomp

EXECUTABLE = os.path.realpath(getattr(sys, "_base_executable", sys.executable))  # not the link in a virtual environment
ROOT = Path(__file__).parents[2]
PYTHON = "/python/bin/python"  # its name inside

_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


def environment(*, python: str, folder: str) -> dict[str, str]:
    """All variables that a program has: nothing of ours, and the same for the same program every time."""
    return {
        "HOME": folder,
        "LANG": "C.UTF-8",
        "PATH": os.path.dirname(python),
        "PYTHONPATH": ":".join(_packages()),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",
        "TMPDIR": folder,
        # A reserve of memory for each thread would reach the limit on addresses long before the memory is used.
        "MALLOC_ARENA_MAX": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


@functools.cache
def view(*, warden: bool) -> dict[str, Any]:
    """What is mounted, at the paths where it is outside: directories and files read-only, devices, links and texts.

    Args:
      warden: whether our own code for the sandbox is seen, too.
    """
    ours = [str(ROOT / "qwen_jax/sandbox"), str(ROOT / "qwen_jax/__init__.py")] if warden else []
    directories = _outermost([*ours, *_LIBRARIES, f"{sys.base_prefix}/lib", sysconfig.get_path("stdlib"), *_packages()])
    # In an environment of its own, Python does not run the start-up files that lie beside the packages.
    environment = f"home = {os.path.dirname(EXECUTABLE)}\ninclude-system-site-packages = false\n"
    return {
        "directories": directories,
        "files": [path for path in (EXECUTABLE, "/etc/ld.so.cache", *ours) if os.path.isfile(path)],
        "devices": list(_DEVICES),
        "links": {
            PYTHON: EXECUTABLE,
            "/dev/shm": "/tmp",
            **{path: os.readlink(path) for path in _LIBRARIES if os.path.islink(path)},
        },
        "texts": {"/python/pyvenv.cfg": environment},
        "pivot_root": seccomp.call_number("pivot_root"),
    }


def _packages() -> list[str]:
    return [os.path.realpath(path) for path in site.getsitepackages() if os.path.isdir(path)]


def _outermost(paths: Iterable[str]) -> list[str]:
    """The real directories among `paths`, without those within others."""
    real = sorted({os.path.realpath(path) for path in paths if os.path.isdir(path)})
    return [path for path in real if not any(path != other and Path(path).is_relative_to(other) for other in real)]
