"""The errors a user can cause, one class per exit code, and the one place that prints them.

Exit codes: 0 done, 1 unexpected, 2 usage or config, 3 bad data or model, 4 missing file or permission,
5 numerical failure, 75 state saved and a restart is asked for, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

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


def run_command(program: str, main: Callable[[], int]) -> int:
    """The exit code of `main`; a UserError becomes one line on stderr, anything else a traceback and 1."""
    try:
        return main()
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has gone: leave quietly, and keep the interpreter from flushing into the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception:  # the last line of defence: a fault of ours keeps its traceback
        traceback.print_exc()
        return 1
