"""`python -m infer generate RUN_OR_CHECKPOINT --prompt TEXT`; `--help` tells the rest."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from infer.config import parse
from qwen_jax.command import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command line `arguments` (default: this process's)."""
    options = parse(arguments)
    from infer.generate import run  # jax is loaded only now: --help and a mistyped option answer at once

    return run(options)


if __name__ == "__main__":
    sys.exit(run_command("infer", main))
