"""The command line of `python -m infer`, as data. Nothing here loads jax: --help answers at once."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from qwen_jax.command import Parser
from qwen_jax.config import DType


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate:
    """What `python -m infer generate` was asked for; the names are those of the options.

    Attributes:
      model: a run folder, a checkpoints folder, or the folder of one step.
      prompt: prompts given on the command line.
      input: a file of prompts, "-" for standard input, None for neither.
      output: file for the completions, as JSON lines; None for standard output.
      max_new_tokens: None for up to 256, as far as max_position has room.
      temperature, top_k, top_p, min_p, repetition_penalty: as in `qwen_jax.engine.Sampling`.
      seed: of the random numbers.
      stop: strings that end a completion.
      n: completions per prompt.
      dtype: type of parameters and computation; None for the checkpoint's.
      batch_size: completions made together.
    """

    model: Path
    prompt: Sequence[str]
    input: str | None
    output: Path | None
    max_new_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int
    stop: Sequence[str]
    n: int
    dtype: DType | None
    batch_size: int


EXIT_CODES = (
    "exit codes: 0 done, 1 unexpected, 2 usage, 3 prompts or model, 4 file or permission, 5 numerical failure, "
    "130 interrupted"
)


def parse(arguments: Sequence[str] | None = None) -> Generate:
    """The options in `arguments` (default: those of the process). Raises ConfigError for any it does not know."""
    parser = Parser(prog="python -m infer", description="Run a trained model.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    generate = commands.add_parser(
        "generate",
        help="continue prompts",
        description="Continue prompts. One prompt streams to standard output as it is made; several are printed when "
        "done; JSON lines come out with --output, or when JSON lines came in.",
        epilog=EXIT_CODES,
    )
    _add_files(generate)
    _add_sampling(generate)
    return Generate(**vars(parser.parse_args(arguments)))


def _add_files(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "model", metavar="RUN_OR_CHECKPOINT", type=Path, help="a run folder, a checkpoints folder, or one step's folder"
    )
    add("--prompt", metavar="TEXT", action="append", default=[], help="may be given several times")
    add(
        "--input",
        metavar="FILE",
        help='more prompts, - for standard input: JSON lines {"prompt": ...} if the name ends in .jsonl or the first '
        "line begins with {, else one prompt per line; empty lines are skipped",
    )
    add("--output", metavar="FILE", type=Path, help="write JSON lines to this file")
    add("--batch-size", metavar="N", type=_integer(1), default=8, help="completions made together (default: 8)")
    add("--dtype", choices=["float32", "bfloat16"], help="type to compute in (default: the checkpoint's)")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--max-new-tokens",
        metavar="N",
        type=_integer(1),
        help="longest completion (default: 256, or what max_position leaves beside the longest prompt)",
    )
    add("--temperature", metavar="T", type=float, default=1.0, help="0 takes the likeliest token (default: 1)")
    add("--top-k", metavar="K", type=int, default=0, help="keep the K likeliest tokens (default: 0, keep all)")
    add("--top-p", metavar="P", type=float, default=1.0, help="keep the likeliest that reach P together (default: 1)")
    add("--min-p", metavar="P", type=float, default=0.0, help="keep those P times as likely as the best (default: 0)")
    add("--repetition-penalty", metavar="X", type=float, default=1.0, help="above 1 against repetition (default: 1)")
    add("--seed", metavar="N", type=_integer(0, 2**32 - 1), default=0, help="of the random numbers (default: 0)")
    add("--stop", metavar="TEXT", action="append", default=[], help="end before this text; may be given several times")
    add("--n", metavar="N", type=_integer(1), default=1, help="completions per prompt (default: 1)")


def _integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """A parser of integers from `least` to `most`."""

    def integer(text: str) -> int:
        value = int(text)
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"{text} must be {least} or more{f', at most {most}' if most else ''}")
        return value

    return integer
