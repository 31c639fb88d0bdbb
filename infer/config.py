"""The command line of `python -m infer`, as data. Nothing here loads jax: --help answers at once."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from qwen_jax.command import Parser
from qwen_jax.config import DType
from qwen_jax.text.chat import FORMATS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What every command is told of the model and of how it chooses tokens; the names are those of the options.

    Attributes:
      model: a published folder, a run or checkpoint folder of ours, or the name of a published model.
      allow_pickle_format: whether weights in PyTorch's own format are read.
      dtype: type of parameters and computation; None for the checkpoint's.
      mesh: how many ways the mesh axes split the model, over the first devices, and with `data` how many copies of it
        there are; axes that are not named have size 1.
      kv_cache: type of keys and values in the cache; None for that of the computation.
      sparse_prefill: prompts of more tokens are taken in with sparse attention; None for full attention.
      format: name of a chat format; None for the model's own.
      thinking: False closes an empty thought before every answer.
      max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty,
        frequency_penalty: None for the model's own default; otherwise as in `qwen_jax.engine.Sampling`.
      prompt_lookup: tokens to guess at from the text so far, in each step; None for no such guesses.
      draft: a smaller model that guesses at tokens, named as `model`; None for none.
      draft_tokens: tokens that it guesses in each step.
    """

    model: str
    allow_pickle_format: bool
    dtype: DType | None
    mesh: Mapping[str, int]
    kv_cache: Literal["int8"] | None
    sparse_prefill: int | None
    format: str | None
    thinking: bool
    max_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    prompt_lookup: int | None
    draft: str | None
    draft_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(Options):
    """What `python -m infer generate` was asked for.

    Attributes:
      prompt: prompts given on the command line.
      input: a file of prompts, "-" for standard input, None for neither.
      output: file for the completions, as JSON lines; None for standard output.
      overwrite: whether what is in that file is removed; otherwise those that are there are kept.
      control_tokens: whether control tokens spelled out in a prompt become their ids.
      stop: strings that end a completion.
      n: completions per prompt.
      batch_size: completions made together.
      seed: of the random numbers.
    """

    prompt: Sequence[str]
    input: str | None
    output: Path | None
    overwrite: bool
    control_tokens: bool
    stop: Sequence[str]
    n: int
    batch_size: int
    seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat(Options):
    """What `python -m infer chat` was asked for.

    Attributes:
      max_length: tokens that a chat and its answers have room for; None for what the model has positions for, up to
        DEFAULT_LENGTH.
      system: text of the system message; None for the format's own default.
      load: a saved chat to go on with.
      seed: of the random numbers.
      tools: a Python file of functions that the model may call.
      code_interpreter: whether the model may run Python code.
      max_tool_rounds: answers in a row that may call tools; None for DEFAULT_TOOL_ROUNDS.
      allow_weak_sandbox: whether tools run on a machine that cannot hide its files from them.
    """

    max_length: int | None
    system: str | None
    load: Path | None
    seed: int
    tools: Path | None
    code_interpreter: bool
    max_tool_rounds: int | None
    allow_weak_sandbox: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serve(Options):
    """What `python -m infer serve` was asked for.

    Attributes:
      host, port: where it listens; port 0 is any that is free.
      api_key, api_key_env, api_key_file: the key clients have to know, or where it is; at most one is not None.
      served_model_name: what clients call the model; None for the name of its folder.
      max_rows: completions made together.
      max_waiting: completions that may wait; what comes when as many do is refused.
      max_length: tokens of a prompt and its completion; None for what the model has positions for, up to
        DEFAULT_LENGTH.
      cache_tokens: tokens the cache has room for; None for FULL_ROWS completions of `max_length` tokens.
      drain_seconds: what running answers get to end in, once the server is told to stop.
    """

    host: str
    port: int
    api_key: str | None
    api_key_env: str | None
    api_key_file: Path | None
    served_model_name: str | None
    max_rows: int
    max_waiting: int
    max_length: int | None
    cache_tokens: int | None
    drain_seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """What `python -m infer score` was asked for.

    Attributes:
      model, allow_pickle_format, dtype, format: as in Options.
      prompt, input, output, overwrite: as in Generate; of texts and of conversations with their answers.
      step_end: text that ends a step, at each of which is scored; None for the end of the whole alone.
      batch_size: texts scored together.
    """

    model: str
    allow_pickle_format: bool
    dtype: DType | None
    format: str | None
    prompt: Sequence[str]
    input: str | None
    output: Path | None
    overwrite: bool
    step_end: str | None
    batch_size: int


# Tokens that there is room for unless more is asked for: some models have more positions than a device has memory.
DEFAULT_LENGTH = 32768
# Completions of full length that a server's cache has room for unless more is asked for; most are a fraction as long.
FULL_ROWS = 4

DEFAULT_TOOL_ROUNDS = 8

MESH_AXES = ("tensor", "expert", "data")  # those that make a step faster, and copies of the model

MOST_GUESSES = 64  # as one step is as wide as its guesses for every row

EXIT_CODES = (
    "exit codes: 0 done, 1 unexpected, 2 usage, 3 prompts or model, 4 file or permission, 5 numerical failure, "
    "130 interrupted"
)


def parse(arguments: Sequence[str] | None = None) -> Generate | Chat | Serve | Score:
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
    generate.set_defaults(command=Generate)
    _add_model(generate)
    _add_prompts(generate)
    _add_seed(_add_sampling(generate))
    _add_guesses(generate)
    chat = commands.add_parser(
        "chat",
        help="talk to a model",
        description="Talk to a model. Each line is a message; one that ends in \\ goes on in the next line. /help "
        "lists the commands. Ctrl-C stops an answer, or leaves; Ctrl-D leaves. Lines piped in are answered in turn.",
        epilog=EXIT_CODES,
    )
    chat.set_defaults(command=Chat)
    _add_model(chat)
    _add_length(chat)
    _add_start(chat)
    _add_tools(chat)
    _add_seed(_add_sampling(chat))
    _add_guesses(chat)
    serve = commands.add_parser(
        "serve",
        help="answer requests over HTTP",
        description="Answer the requests of OpenAI's API over HTTP, and show a page to chat on. SIGTERM and Ctrl-C let "
        "running answers end first; a second one does not.",
        epilog=EXIT_CODES,
    )
    serve.set_defaults(command=Serve)
    _add_model(serve)
    _add_address(serve)
    _add_length(serve)
    _add_limits(serve)
    _add_sampling(serve)
    _add_guesses(serve)
    score = commands.add_parser(
        "score",
        help="score texts with a reward model",
        description="Score texts, and conversations that end with an answer, with a reward model: JSON lines come out.",
        epilog=EXIT_CODES,
    )
    score.set_defaults(command=Score)
    _add_scored(score)
    options = vars(parser.parse_args(arguments))
    return options.pop("command")(**options)


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        help="a published folder, a run or checkpoint folder of ours, or the name of a published model",
    )
    _add_weights(parser)
    add(
        "--mesh",
        metavar="AXES",
        type=_mesh,
        default={},
        help="how many ways to split the model, and so how many devices to take: tensor=4, or tensor=4,expert=2 for a "
        "mixture of experts; data=2 has two copies of it, each with as many rows (default: one device)",
    )
    add("--kv-cache", choices=["int8"], help="keep keys and values in int8, for twice as many (default: as computed)")
    add(
        "--sparse-prefill",
        metavar="TOKENS",
        type=_integer(64),
        help="take in prompts of more than TOKENS with vertical-slash sparse attention, an approximation that is "
        "faster where they have tens of thousands (published: 32768; default: off)",
    )
    add(
        "--format",
        metavar="NAME",
        choices=FORMATS,
        help=f"format of chats: {', '.join(FORMATS)} (default: the model's own)",
    )
    add("--no-thinking", dest="thinking", action="store_false", help="have a thinking model answer at once")


def _add_weights(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--allow-pickle-format", action="store_true", help="read weights in PyTorch's own format, too")
    add("--dtype", choices=["float32", "bfloat16"], help="type to compute in (default: the checkpoint's)")


def _add_scored(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="a reward model: a published folder, a run, a checkpoint, or a published name")
    _add_weights(parser)
    add("--format", metavar="NAME", choices=FORMATS, help="format of chats (default: the model's own)")
    add("--prompt", metavar="TEXT", action="append", default=[], help="a text; may be given several times")
    add(
        "--input",
        metavar="FILE",
        help='more, - for standard input: JSON lines {"prompt": the whole text} or {"messages": [...]}, whose last is '
        "the assistant's, or one text per line",
    )
    _add_output(parser)
    add("--step-end", metavar="TEXT", help="of a process-reward model: score wherever this text ends a step")
    add("--batch-size", metavar="N", type=_integer(1), default=8, help="texts scored together (default: 8)")


def _add_length(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-length",
        metavar="N",
        type=_integer(2),
        help="tokens to have room for, of a prompt and its answer "
        f"(default: what the model can, at most {DEFAULT_LENGTH})",
    )


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--prompt", metavar="TEXT", action="append", default=[], help="may be given several times")
    add(
        "--input",
        metavar="FILE",
        help='more prompts, - for standard input: JSON lines {"prompt": ...} or {"messages": [...], "tools": [...]} if '
        "the name ends in .jsonl or the first line begins with {, else one prompt per line; empty lines are skipped",
    )
    _add_output(parser)
    add(
        "--control-tokens",
        action="store_true",
        help="take <|fim_prefix|>, <|im_start|> and the like in prompts for the tokens they name; without it, for "
        "plain text",
    )
    add("--stop", metavar="TEXT", action="append", default=[], help="end before this text; may be given several times")
    add("--n", metavar="N", type=_integer(1), default=1, help="completions per prompt (default: 1)")
    add("--batch-size", metavar="N", type=_integer(1), default=8, help="completions made together (default: 8)")


def _add_output(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--output",
        metavar="FILE",
        type=Path,
        help="write JSON lines to this file; after an interruption, the same command makes what is missing there",
    )
    add("--overwrite", action="store_true", help="begin the file of --output anew, whatever is in it")


def _add_start(parser: argparse.ArgumentParser) -> None:
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--system", metavar="TEXT", help="the system message (default: the format's own)")
    start.add_argument("--load", metavar="FILE", type=Path, help="go on with a saved chat")


def _add_tools(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "tools", "What the model calls runs in a sandbox: no network, none of your files."
    )
    add = group.add_argument
    add(
        "--tools",
        metavar="FILE",
        type=Path,
        help="a Python file; the model may call its functions, which need type hints and docstrings",
    )
    add("--code-interpreter", action="store_true", help="the model may run Python code, whose variables stay")
    add(
        "--max-tool-rounds",
        metavar="N",
        type=_integer(1),
        help=f"answers in a row that may call tools (default: {DEFAULT_TOOL_ROUNDS})",
    )
    add(
        "--allow-weak-sandbox",
        action="store_true",
        help="run tools even where this machine cannot hide your files from them",
    )


def _add_address(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on; one others can reach needs a key (127.0.0.1)")
    add("--port", metavar="N", type=_integer(0, 65535), default=8000, help="0 for any that is free (8000)")
    add("--served-model-name", metavar="NAME", help="what clients call the model (default: the name of its folder)")
    key = parser.add_mutually_exclusive_group()
    key.add_argument("--api-key", metavar="KEY", help="what clients must send; other users of this machine can see it")
    key.add_argument("--api-key-env", metavar="NAME", help="environment variable that holds the key")
    key.add_argument("--api-key-file", metavar="FILE", type=Path, help="file that holds the key")


def _add_limits(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--max-rows", metavar="N", type=_integer(1), default=16, help="completions made together (16)")
    add(
        "--max-waiting",
        metavar="N",
        type=_integer(0),
        default=128,
        help="completions that may wait for their turn; more are refused with 429 (128)",
    )
    add(
        "--cache-tokens",
        metavar="N",
        type=_integer(1),
        help=f"tokens the cache has room for (default: {FULL_ROWS} times --max-length)",
    )
    add(
        "--drain-seconds",
        metavar="S",
        type=_integer(0),
        default=30,
        help="what running answers get to end in when the server is stopped (30)",
    )


def _add_sampling(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group(
        "how tokens are chosen", "Defaults are the model's own, in its generation_config.json; without one, as shown."
    )
    add = group.add_argument
    add(
        "--max-new-tokens",
        metavar="N",
        type=_integer(1),
        help="most tokens to make (generate: 256; chat and serve: what there is room for)",
    )
    add("--temperature", metavar="T", type=float, help="0 takes the likeliest token (1)")
    add("--top-k", metavar="K", type=int, help="keep the K likeliest tokens (0: all)")
    add("--top-p", metavar="P", type=float, help="keep the likeliest that reach P together (1: all)")
    add("--min-p", metavar="P", type=float, help="keep those P times as likely as the best (0: all)")
    add("--repetition-penalty", metavar="X", type=float, help="above 1 against repetition (1: none)")
    add("--presence-penalty", metavar="X", type=float, help="against tokens made before, -2 to 2 (0: none)")
    add("--frequency-penalty", metavar="X", type=float, help="the same for each time they were made (0: none)")
    return group


def _add_seed(group: argparse._ArgumentGroup) -> None:
    seeds = _integer(0, 2**32 - 1)
    group.add_argument("--seed", metavar="N", type=seeds, default=0, help="of the random numbers (default: 0)")


def _add_guesses(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "how tokens are guessed",
        "The model checks several guesses in one step. They make it faster or slower, and change no token.",
    )
    either = group.add_mutually_exclusive_group()
    either.add_argument(
        "--prompt-lookup",
        metavar="N",
        type=_integer(1, MOST_GUESSES),
        help="guess that what followed the last tokens before comes again, N tokens of it: for answers that repeat "
        "much of their prompts",
    )
    either.add_argument(
        "--draft", metavar="MODEL", help="have a smaller model of the same tokenizer guess; named as MODEL is"
    )
    group.add_argument(
        "--draft-tokens",
        metavar="N",
        type=_integer(1, MOST_GUESSES),
        default=4,
        help="tokens that it guesses at a time (default: 4)",
    )


def _integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """A parser of integers from `least` to `most`."""

    def integer(text: str) -> int:
        value = int(text)
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"{text} must be {least} or more{f', at most {most}' if most else ''}")
        return value

    return integer


def _mesh(text: str) -> dict[str, int]:
    """AXIS=SIZE,AXIS=SIZE as sizes by axis."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in MESH_AXES or axis in sizes or not (size.isdecimal() and int(size)):
            wanted = ", ".join(f"{name}=N" for name in MESH_AXES[:-1]) + f" or {MESH_AXES[-1]}=N"
            raise argparse.ArgumentTypeError(f"{part!r} in {text!r}: wanted {wanted}, each once, N at least 1")
        sizes[axis] = int(size)
    return sizes
