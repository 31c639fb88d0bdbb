"""`python -m train.data.corpus CONFIG.gin`: makes a corpus of raw text, and goes on where an earlier run stopped."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from qwen_jax import bindings
from qwen_jax.command import Parser, run_command
from train.data.corpus.config import Corpus

EPILOG = """\
The output folder gets documents/ (JSON lines), tokens/ if they are asked for, report.txt, report.json, config.gin, and
work/ with what every stage kept and dropped. Progress goes to stderr, the report to stdout. The same command goes on
where the last one stopped; what a changed config does not touch is not done again.

exit codes: 0 done, 1 unexpected, 2 usage or config, 3 data or model, 4 file or permission, 130 interrupted

  python -m train.data.corpus configs/corpus.gin --set source.path='"crawl/**/*.html"' output='"corpus/crawl"'
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command line `arguments` (default: this process's)."""
    parser = Parser(
        prog="python -m train.data.corpus",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG.gin", type=Path, help="what to make, and of what")
    parser.add_argument(
        "--set", metavar="PATH=VALUE", nargs="+", action="extend", default=[], help="bind config fields, after the file"
    )
    parser.add_argument("--print", action="store_true", help="show the resolved config and where each value is from")
    options = parser.parse_args(arguments)
    config, provenance = bindings.resolve(Corpus, [*bindings.read(options.config), *bindings.parse_set(options.set)])
    text = bindings.render(config, provenance)
    if options.print:
        print(text, end="")
        return 0
    from train.data.corpus.run import run  # --help and --print answer at once

    print(run(config, text), end="")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("train.data.corpus", main))
