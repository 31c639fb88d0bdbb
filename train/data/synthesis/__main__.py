"""`python -m train.data.synthesis CONFIG.gin`: one stage of making or sifting a dataset, from a file to a file."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from qwen_jax import bindings
from qwen_jax.command import run_command
from qwen_jax.errors import SAVED_PLEASE_RESTART
from train.command import ConfigParser, resolve
from train.data.synthesis.config import Synthesis

EPILOG = """\
The output named by the config is a file of JSON lines; beside it, OUTPUT.report.json says what was kept and dropped.
After a kill, the same command goes on where it was, and ends with the file of an unbroken run.

exit codes: 0 done, 1 unexpected, 2 usage or config, 3 data or model, 4 file or permission, 5 numerical failure,
75 stopped by SIGTERM (run the same command again), 130 interrupted

  python -m train.data.synthesis configs/synthesis.gin
  python -m train.data.synthesis configs/synthesis.gin --set stage.samples=32
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command line `arguments` (default: this process's)."""
    parser = ConfigParser("train.data.synthesis", description=__doc__, epilog=EPILOG, config="what to do")
    parser.add_print()
    parser.add_argument("--overwrite", action="store_true", help="begin the output anew, whatever is in it")
    options = parser.parse_args(arguments)
    config, provenance = resolve(Synthesis, options)
    if options.print:
        print(bindings.render(config, provenance), end="")
        return 0
    from train.data.synthesis.run import run  # jax is loaded only now: --help and --print answer at once

    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        return run(config, overwrite=options.overwrite)
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    """What is done is in the file already."""
    del number, frame
    raise SystemExit(SAVED_PLEASE_RESTART)


if __name__ == "__main__":
    sys.exit(run_command("train.data.synthesis", main))
