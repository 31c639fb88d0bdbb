"""`python -m train.scaling CONFIG.gin`: small models over learning rates and batches, and the laws they follow."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from qwen_jax import bindings
from qwen_jax.command import run_command
from train import directory as run_directory
from train.command import ConfigParser, resolve
from train.scaling.config import Scaling
from train.scaling.points import Point, points, target_run

EPILOG = """\
The output folder gets runs/ (each an ordinary run), report.json, report.txt, scaling.png and, for a target,
recommended.gin, which `python -m train` and `python -m train.plan` take. The same command goes on where the last one
stopped; with more learning rates, batch sizes, models or tokens in the config, only the new runs are trained.

exit codes: 0 done, 1 unexpected, 2 usage or config, 3 no law in these runs, 4 file or permission, 75 stopped by
SIGTERM and 130 interrupted, both with the state saved

  python -m train.scaling configs/scaling.gin --dry-run
  python -m train.scaling configs/scaling.gin
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command line `arguments` (default: this process's)."""
    parser = ConfigParser("train.scaling", description=__doc__, epilog=EPILOG, config="what to sweep")
    parser.add_print()
    parser.add_argument("--dry-run", action="store_true", help="list the runs and what they take, and train none")
    options = parser.parse_args(arguments)
    config, provenance = resolve(Scaling, options)
    if options.print:
        print(bindings.render(config, provenance), end="")
        return 0
    runs = points(config)
    if config.target:
        target_run(config.target)  # whatever is wrong with it is said before hours of training
    for line in _listing(runs, options):
        print(line, file=sys.stdout if options.dry_run else sys.stderr)
    return 0 if options.dry_run else _run(config, runs)


def _listing(runs: Sequence[Point], options: argparse.Namespace) -> list[str]:
    flops, tokens = (sum(each) for each in zip(*((run.flops, run.tokens) for run in runs), strict=True))
    lines = [f"{run.name:<40} {run.config.steps:>9,} steps {run.flops:>9.2e} FLOPs" for run in runs]
    return (lines if options.dry_run else []) + [f"{len(runs)} runs, {tokens:,} tokens, {flops:.2e} FLOPs"]


def _run(config: Scaling, runs: Sequence[Point]) -> int:
    from train.progress import Report
    from train.scaling import report as reports  # with what follows, loaded only now: jax and matplotlib
    from train.scaling.recommend import recommend
    from train.scaling.sweep import Stopped, sweep

    report, folder = Report(), Path(config.output)
    with run_directory.claim(folder, warn=report.warn):
        try:
            found = reports.find(runs, sweep(runs, report))
        except Stopped as stopped:
            report.line("stopped, the state of the run saved; the same command goes on from there")
            return stopped.args[0]
        reports.write(folder, found)
        print(reports.table(found), end="")
        reports.check(found)
        if config.target:
            print(f"try  python -m train {recommend(config, config.target, found)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("scaling", main))
