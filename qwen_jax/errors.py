"""The errors a user can cause, one class per exit code.

Exit codes: 0 done, 1 unexpected, 2 usage or config, 3 bad data or model, 4 missing file or permission,
5 numerical failure, 75 state saved and a restart is asked for, 130 interrupted.
"""

from __future__ import annotations

SAVED_PLEASE_RESTART = 75
INTERRUPTED = 130


class UserError(Exception):
    """A mistake outside the program. The message says what was given, what was wanted, the way out."""

    exit_code = 1


class ConfigError(UserError, ValueError):
    """A config or a command line that cannot be honoured."""

    exit_code = 2


class DataError(UserError):
    """Text, token files or prompts that cannot be used."""

    exit_code = 3


class ModelError(UserError):
    """A checkpoint, tokenizer or set of weights that cannot be used."""

    exit_code = 3


class FileError(UserError):
    """A file that is missing, unreadable or unwritable, or a disk that is full."""

    exit_code = 4


class NumericalError(UserError):
    """A loss or gradient that is no longer finite."""

    exit_code = 5


class SandboxError(UserError):
    """A machine that cannot lock untrusted code in, or a sandbox that broke."""

    exit_code = 4
