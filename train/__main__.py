"""`python -m train CONFIG.gin`: trains what the config says, and goes on where an earlier run of it stopped."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from typing import NoReturn

from qwen_jax import bindings
from qwen_jax.command import run_command
from train.command import ConfigParser, resolve
from train.config import TrainConfig
from train.reinforcement import ROLLOUT

EPILOG = """\
The run directory named by the config gets config.gin, tokenizer.json, metrics.jsonl, TensorBoard events, loss.png and
checkpoints/. The same command goes on where the last one stopped.

exit codes: 0 done, 1 unexpected, 2 usage or config, 3 data or model, 4 file or permission, 5 numerical failure,
75 stopped by SIGTERM with the state saved (run the same command again), 130 interrupted with the state saved

  python -m train configs/quickstart.gin
  python -m train configs/quickstart.gin --set steps=200 run_dir='"runs/short"'
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command line `arguments` (default: this process's)."""
    parser = ConfigParser("train", description=__doc__, epilog=EPILOG, config="what to train")
    parser.add_print()
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="fail if there is no checkpoint to go on from")
    start.add_argument("--fresh", action="store_true", help="fail if the run directory holds anything")
    options = parser.parse_args(arguments)

    config, provenance = resolve(TrainConfig, options)
    text = bindings.render(config, provenance)
    if options.print:
        print(text, end="")
        return 0
    from train.run import run  # jax is loaded only now: --help and --print answer at once

    return run(config, text, resume=options.resume, fresh=options.fresh)


def leave(code: int) -> NoReturn:
    """Ends the process, and with it a rollout that was left behind, which the interpreter's end would crash."""
    if any(thread.name == ROLLOUT for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    leave(run_command("train", main))
