"""What every command has in common: how it reads its options, and how it ends."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from qwen_jax.errors import INTERRUPTED, ConfigError, UserError


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ConfigErrors, and which guesses at no option."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; {self.prog} --help lists the options")


def run_command(program: str, main: Callable[[], int]) -> int:
    """The exit code of `main`; a UserError becomes one line on stderr, anything else a traceback and 1."""
    try:
        return main()
    except UserError as error:
        # Messages quote names of files and tensors, and a terminal obeys what stands in them.
        line = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in str(error))
        print(f"{program}: error: {line}", file=sys.stderr)
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
