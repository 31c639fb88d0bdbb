"""`python -m infer generate`: prompts in, completions out."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from infer.config import Generate
from infer.model import Opened, open_for
from infer.prompts import Prompt, encode_chat, encode_text, read_prompts
from infer.terminal import faint, safe, warn
from qwen_jax.engine import Capacity, Completion, Request, StopStrings, generate
from qwen_jax.errors import INTERRUPTED, ConfigError, DataError, FileError
from qwen_jax.weights.usage import turn_ends

DEFAULT_NEW_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class Wanted:
    """One completion to make: the `sample`-th of prompt number `index`. `row` numbers all completions of the input."""

    row: int
    index: int
    sample: int
    prompt: Prompt
    ids: Sequence[int]
    stop_ids: frozenset[int]


Show = Callable[[int, str], None]  # takes the number of a completion, and the next piece of it
Write = Callable[[Wanted, Completion], None]  # takes a completion that has ended, in the order of the input


def run(options: Generate) -> int:
    """Does what `options` ask for; the exit code."""
    StopStrings(options.stop)  # what cannot be one is refused before the weights are read
    prompts, jsonl = read_prompts(options)
    opened = open_for(options)
    wanted = _wanted(prompts, opened, options)
    limit = _limit(wanted, opened, options.max_new_tokens)
    longest = max(len(one.ids) for one in wanted) + limit
    engine = opened.load(Capacity(max_rows=min(options.batch_size, len(wanted)), max_length=longest))
    opened.report()
    clock, code = _Clock(), 0
    completions = [Completion(opened.tokenizer, one.stop_ids, options.stop) for one in wanted]
    requests = [
        Request(
            prompt=one.ids,
            max_new_tokens=limit,
            sampling=opened.sampling,
            seed=options.seed,
            row=one.row,
            stop_ids=one.stop_ids,
        )
        for one in wanted
    ]
    with _sink(options, wanted, jsonl) as (show, write):
        in_order = _InOrder(lambda row: write(wanted[row], completions[row]))

        def done(row: int) -> None:
            in_order.done(row)
            if options.output is not None or not sys.stdout.isatty():
                clock.tick(in_order.count, len(wanted))

        try:
            generate(engine, requests, completions, show=clock.watch(show), done=done)
        except KeyboardInterrupt:
            code = INTERRUPTED
            for row, completion in enumerate(completions):
                if completion.num_tokens and completion.finish_reason is None:
                    show(row, completion.end("interrupted"))
                    in_order.done(row)
            in_order.rest()
    clock.report([completion for completion in completions if completion.finish_reason])
    return code


class _InOrder:
    """Hands on completions in the order of the input, whenever those before them are done."""

    def __init__(self, write: Callable[[int], None]) -> None:
        self.count = 0
        self._write = write
        self._held: set[int] = set()
        self._next = 0

    def done(self, row: int) -> None:
        self.count += 1
        self._held.add(row)
        while self._next in self._held:
            self._held.remove(self._next)
            self._write(self._next)
            self._next += 1

    def rest(self) -> None:
        """Those too that come after others which will never be done."""
        for row in sorted(self._held):
            self._write(row)


def _wanted(prompts: Sequence[Prompt], opened: Opened, options: Generate) -> list[Wanted]:
    """`n` completions per prompt."""
    tokenizer, stop_ids = opened.tokenizer, opened.usage.stop_ids
    encoders = {False: functools.partial(encode_text, tokenizer=tokenizer, control_tokens=options.control_tokens)}
    if any(prompt.is_chat for prompt in prompts):
        form = opened.chat_format()
        encoders[True] = functools.partial(encode_chat, tokenizer=tokenizer, form=form, thinking=options.thinking)
    elif options.format or not options.thinking:
        raise ConfigError("--format and --no-thinking are for rows with messages, and there are none; leave them out")
    if not options.control_tokens:
        _warn_of_control_tokens(prompts, opened)
    ids = [encoders[prompt.is_chat](prompt) for prompt in prompts]
    ends = [stop_ids | turn_ends(tokenizer) if prompt.is_chat else stop_ids for prompt in prompts]
    return [
        Wanted(index * options.n + sample, index, sample, prompts[index], ids[index], ends[index])
        for index in range(len(prompts))
        for sample in range(options.n)
    ]


def _warn_of_control_tokens(prompts: Sequence[Prompt], opened: Opened) -> None:
    """Says once that a prompt spells out a token and does not get it."""
    for prompt in prompts:
        for token in opened.tokenizer.control:
            if token in prompt.row.get("prompt", ""):
                warn(f"{prompt.where}: {token} is taken for plain text; --control-tokens takes it for the token")
                return


def _limit(wanted: Sequence[Wanted], opened: Opened, asked: int | None) -> int:
    """Tokens a completion may have. DataError if a prompt leaves no room for that many."""
    max_position = opened.model.config.max_position
    longest = max(wanted, key=lambda one: len(one.ids))
    room = max_position - len(longest.ids)
    if room < (asked or 1):
        way_out = (
            f"ask for at most {room} new tokens" if room > 0 else f"prompts of up to {max_position - 1} tokens fit"
        )
        raise DataError(
            f"{longest.prompt.where}: a prompt of {len(longest.ids)} tokens and {asked or 1} new ones do not "
            f"fit into the model's {max_position} positions; {way_out}"
        )
    return asked or min(opened.usage.max_new_tokens or DEFAULT_NEW_TOKENS, room)


@contextmanager
def _sink(options: Generate, wanted: Sequence[Wanted], jsonl: bool) -> Iterator[tuple[Show, Write]]:
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
    elif len(wanted) == 1:
        sys.stdout.reconfigure(errors="replace")
        if sys.stdout.isatty():
            print(faint(safe(wanted[0].prompt.row["prompt"])), end="", flush=True)
        yield lambda number, piece: print(safe(piece), end="", flush=True), lambda one, completion: print(flush=True)
    else:
        sys.stdout.reconfigure(errors="replace")
        yield quiet, functools.partial(_write_sections, options.n)


def _write_json(file: TextIO, seed: int, wanted: Wanted, completion: Completion) -> None:
    row = {
        "index": wanted.index,
        "sample": wanted.sample,
        **wanted.prompt.row,
        "completion": completion.text,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": len(wanted.ids),
        "completion_tokens": completion.num_tokens,
        "seed": seed,
    }
    print(json.dumps(row, ensure_ascii=False), file=file, flush=True)


def _write_sections(n: int, wanted: Wanted, completion: Completion) -> None:
    number = f"{wanted.index + 1}.{wanted.sample + 1}" if n > 1 else f"{wanted.index + 1}"
    begin = " ".join(wanted.prompt.row["prompt"][:200].split())
    print(faint(safe(f"== {number}: {begin[:60]}{'…' if len(begin) > 60 else ''}")))
    print(f"{safe(completion.text)}\n", flush=True)


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
