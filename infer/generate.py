"""`python -m infer generate`: prompts in, completions out."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import jax

from infer.config import Generate
from qwen_jax.engine import Completion, Sampling, StopStrings, generate, load
from qwen_jax.errors import INTERRUPTED, ConfigError, DataError, FileError
from qwen_jax.sharding import make_mesh
from qwen_jax.text import Tokenizer

DEFAULT_NEW_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt, and the place it came from, for messages."""

    text: str
    where: str


@dataclasses.dataclass(frozen=True)
class Request:
    """One completion to make: the `sample`-th of prompt number `index`. `row` numbers all completions of the input."""

    row: int
    index: int
    sample: int
    prompt: str
    ids: Sequence[int]


Show = Callable[[int, str], None]  # takes the number of a completion within its batch, and the next piece of it
Write = Callable[[Sequence[Request], Sequence[Completion]], None]  # takes a batch when it is done


def run(options: Generate) -> int:
    """Does what `options` ask for; the exit code."""
    sampling = Sampling(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Sampling)})
    StopStrings(options.stop)  # what cannot be one is refused before the weights are read
    prompts, jsonl = _prompts(options)
    engine, tokenizer = load(options.model, mesh=make_mesh(devices=jax.devices()[:1]), dtype=options.dtype, warn=_warn)
    requests = _requests(prompts, tokenizer, options.n)
    limit = _limit(prompts, requests, options.max_new_tokens, engine.config.max_position)
    clock, made, code = _Clock(), [], 0
    with _sink(options, requests, jsonl) as (show, write):
        while len(made) < len(requests) and code == 0:
            batch = requests[len(made) : len(made) + options.batch_size]
            completions = [Completion(tokenizer, options.stop) for _ in batch]
            ids, rows = [request.ids for request in batch], [request.row for request in batch]
            try:
                if options.output is not None or not sys.stdout.isatty():
                    clock.tick(len(made), len(requests))
                generate(
                    engine, ids, completions, sampling,
                    seed=options.seed, rows=rows, max_new_tokens=limit, show=clock.watch(show),
                )  # fmt: skip
            except KeyboardInterrupt:
                code = INTERRUPTED
                for number, completion in enumerate(completions):
                    show(number, completion.end("interrupted"))
            write(batch, completions)
            made += completions
    clock.report(made)
    return code


def _prompts(options: Generate) -> tuple[list[Prompt], bool]:
    """The prompts of the command line and of the input, and whether the input was JSON lines."""
    prompts = [Prompt(text, f"--prompt {number}") for number, text in enumerate(options.prompt, 1)]
    jsonl = False
    if options.input is not None:
        more, jsonl = _read(options.input)
        prompts += more
    elif not prompts:
        raise ConfigError('no prompt; give --prompt "TEXT", --input FILE, or --input - for standard input')
    for prompt in prompts:
        try:
            prompt.text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{prompt.where}: character {error.start + 1} of the prompt is not valid UTF-8") from error
    return prompts, jsonl


def _read(source: str) -> tuple[list[Prompt], bool]:
    """The prompts in a file, or "-" for standard input, and whether they are JSON lines."""
    name = "standard input" if source == "-" else source
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).expanduser().read_bytes()
    except OSError as error:
        raise FileError(f"cannot read prompts from {name}: {error.strerror}") from error
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{name}:{line}: not UTF-8 ({error.reason}); convert the file to UTF-8") from error
    numbered = [(f"{name}:{number}", line.rstrip("\r")) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise DataError(f'{name} has no prompts; one per line, or JSON lines {{"prompt": ...}}, are wanted')
    jsonl = source.endswith(".jsonl") or numbered[0][1].lstrip().startswith("{")
    return [Prompt(_row(line, where) if jsonl else line, where) for where, line in numbered], jsonl


def _row(line: str, where: str) -> str:
    """The prompt of a JSON line."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f'{where}: not JSON ({error}); rows such as {{"prompt": "..."}} are wanted') from error
    if not isinstance(row, dict) or "prompt" not in row:
        found = f"keys {', '.join(row)}" if isinstance(row, dict) else type(row).__name__
        raise DataError(f'{where}: the row has {found}; an object with the key "prompt" is wanted')
    if not isinstance(row["prompt"], str):
        raise DataError(f"{where}: the prompt is {type(row['prompt']).__name__}; a string is wanted")
    return row["prompt"]


def _requests(prompts: Sequence[Prompt], tokenizer: Tokenizer, n: int) -> list[Request]:
    """`n` requests per prompt. Documents follow <|endoftext|>, so that is what an empty prompt starts from."""
    ids = [tokenizer.encode(prompt.text) or [tokenizer.end_of_text] for prompt in prompts]
    return [
        Request(index * n + sample, index, sample, prompts[index].text, ids[index])
        for index in range(len(prompts))
        for sample in range(n)
    ]


def _limit(prompts: Sequence[Prompt], requests: Sequence[Request], asked: int | None, max_position: int) -> int:
    """Tokens a completion may have. DataError if a prompt leaves no room for that many."""
    longest = max(requests, key=lambda request: len(request.ids))
    room = max_position - len(longest.ids)
    if room < (asked or 1):
        way_out = (
            f"ask for at most {room} new tokens" if room > 0 else f"prompts of up to {max_position - 1} tokens fit"
        )
        raise DataError(
            f"{prompts[longest.index].where}: a prompt of {len(longest.ids)} tokens and {asked or 1} new ones do not "
            f"fit into the model's {max_position} positions; {way_out}"
        )
    return asked or min(DEFAULT_NEW_TOKENS, room)


@contextmanager
def _sink(options: Generate, requests: Sequence[Request], jsonl: bool) -> Iterator[tuple[Show, Write]]:
    """Where completions go, while they are made and when they are done."""
    quiet = lambda number, piece: None
    if options.output is not None:
        try:
            with options.output.expanduser().open("w", encoding="utf-8") as file:
                yield quiet, functools.partial(_write_json, file, options.seed)
        except OSError as error:
            raise FileError(f"cannot write completions to {options.output}: {error.strerror}") from error
    elif jsonl:
        sys.stdout.reconfigure(encoding="utf-8")  # JSON is UTF-8, whatever the terminal is
        yield quiet, functools.partial(_write_json, sys.stdout, options.seed)
    elif len(requests) == 1:
        sys.stdout.reconfigure(errors="replace")
        if sys.stdout.isatty():
            print(_dim(requests[0].prompt), end="", flush=True)
        yield lambda number, piece: print(piece, end="", flush=True), lambda batch, completions: print(flush=True)
    else:
        sys.stdout.reconfigure(errors="replace")
        yield quiet, functools.partial(_write_sections, options.n)


def _write_json(file: TextIO, seed: int, batch: Sequence[Request], completions: Sequence[Completion]) -> None:
    for request, completion in zip(batch, completions, strict=True):
        row = {
            "index": request.index,
            "sample": request.sample,
            "prompt": request.prompt,
            "completion": completion.text,
            "finish_reason": completion.finish_reason,
            "prompt_tokens": len(request.ids),
            "completion_tokens": completion.num_tokens,
            "seed": seed,
        }
        print(json.dumps(row, ensure_ascii=False), file=file)
    file.flush()


def _write_sections(n: int, batch: Sequence[Request], completions: Sequence[Completion]) -> None:
    for request, completion in zip(batch, completions, strict=True):
        number = f"{request.index + 1}.{request.sample + 1}" if n > 1 else f"{request.index + 1}"
        begin = " ".join(request.prompt[:200].split())
        print(_dim(f"== {number}: {begin[:60]}{'…' if len(begin) > 60 else ''}"))
        print(f"{completion.text}\n", flush=True)


def _dim(text: str) -> str:
    """`text` in faint letters where a terminal shows them and the user has not said NO_COLOR."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not sys.stdout.isatty()
    return text if plain else f"\033[2m{text}\033[0m"


def _warn(line: str) -> None:
    print(f"infer: warning: {line}", file=sys.stderr)


class _Clock:
    """Says on stderr how far the work is and how fast it went."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._first: float | None = None

    def watch(self, show: Show) -> Show:
        """`show`, with the time of its first call remembered: that is when the first token was there."""

        def watched(number: int, piece: str) -> None:
            self._first = self._first or time.perf_counter()
            show(number, piece)

        return watched

    def tick(self, done: int, total: int) -> None:
        """On a terminal, how many completions are done; the next line printed takes its place."""
        if sys.stderr.isatty() and done:
            print(f"{done}/{total} completions", end="\r", file=sys.stderr, flush=True)

    def report(self, completions: Sequence[Completion]) -> None:
        """One line: how many tokens, how long, and how fast after the first."""
        now, tokens = time.perf_counter(), sum(completion.num_tokens for completion in completions)
        line = f"{tokens} tokens in {now - self._start:.1f} s"
        if self._first is not None and tokens > 1:
            rate = (tokens - 1) / (now - self._first)
            line += f": the first after {self._first - self._start:.1f} s, then {rate:.1f} tokens/s"
        if len(completions) == 1:
            line += f"; {completions[0].finish_reason}"
        print(line, file=sys.stderr)
