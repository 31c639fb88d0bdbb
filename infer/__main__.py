"""`python -m infer generate | chat | serve | score MODEL`; `--help` tells the rest."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from infer.config import Chat, Score, Serve, parse
from qwen_jax.command import run_command
from qwen_jax.errors import ConfigError


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command line `arguments` (default: this process's)."""
    options = parse(arguments)
    # jax is loaded only now: --help and a mistyped option answer at once.
    if isinstance(options, Chat):
        from infer import chat

        return chat.run(options)
    if isinstance(options, Serve):
        try:
            from infer.server import run as serve
        except ModuleNotFoundError as error:
            raise ConfigError(f"serving needs more packages ({error}): pip install 'qwen-jax[serve]'") from error
        return serve.run(options)
    if isinstance(options, Score):
        from infer import score

        return score.run(options)
    from infer import generate

    return generate.run(options)


if __name__ == "__main__":
    sys.exit(run_command("infer", main))
