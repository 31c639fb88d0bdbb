"""`python -m train.data.corpus CONFIG.gin`: makes a corpus of raw text, and goes on where an earlier run stopped."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from qwen_jax import bindings
from qwen_jax.command import run_command
from train.command import ConfigParser, resolve
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
    parser = ConfigParser("train.data.corpus", description=__doc__, epilog=EPILOG, config="what to make, and of what")
    parser.add_print()
    options = parser.parse_args(arguments)
    config, provenance = resolve(Corpus, options)
    text = bindings.render(config, provenance)
    if options.print:
        print(text, end="")
        return 0
    from train.data.corpus.run import run  # --help and --print answer at once

    print(run(config, text), end="")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("train.data.corpus", main))
