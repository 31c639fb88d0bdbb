"""`python -m infer generate`: prompts in, completions out."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import sys
from array import array
from collections.abc import Iterator, Sequence

from infer.config import Generate
from infer.model import Opened, open_for
from infer.output import Output, Wanted, open_output
from infer.progress import Report
from infer.prompts import Prompt, encode_chat, encode_text, read_prompts
from infer.terminal import warn
from qwen_jax.engine import Capacity, Completion, Request, StopStrings, generate
from qwen_jax.errors import INTERRUPTED, ConfigError, DataError
from qwen_jax.weights.usage import turn_ends

DEFAULT_NEW_TOKENS = 256


def run(options: Generate) -> int:
    """Does what `options` ask for; the exit code."""
    StopStrings(options.stop)  # what cannot be one is refused before the weights are read
    if options.overwrite and options.output is None:
        raise ConfigError("--overwrite is for the file of --output, and there is none; leave it out")
    prompts, jsonl = read_prompts(options)
    opened = open_for(options)
    wanted = _wanted(prompts, opened, options)
    limit = _limit(wanted, opened, options.max_new_tokens)
    with open_output(options, wanted, jsonl=jsonl, digest=_digest(options, opened, limit)) as output:
        if not output.missing:
            print(f"all {len(wanted)} completions are in {options.output}", file=sys.stderr)
        code = _make(options, opened, wanted, limit, output) if output.missing else 0
        if code == 0:
            output.finish()
    return code


def _make(options: Generate, opened: Opened, wanted: Sequence[Wanted], limit: int, output: Output) -> int:
    """Makes what the output misses; the exit code."""
    engine = opened.load(_capacity([len(wanted[row].ids) + limit for row in output.missing], options.batch_size))
    opened.report()
    begun: dict[int, Completion] = {}

    def jobs() -> Iterator[tuple[Request, Completion]]:
        for row in output.missing:
            one = wanted[row]
            begun[row] = Completion(opened.tokenizer, one.stop_ids, options.stop)
            how = dict(sampling=opened.sampling, seed=options.seed, row=row, stop_ids=one.stop_ids)
            yield Request(prompt=one.ids, max_new_tokens=limit, **how), begun[row]

    def show(index: int, piece: str) -> None:
        report.step()
        output.show(output.missing[index], piece)

    def done(index: int) -> None:
        row = output.missing[index]
        completion = begun.pop(row)
        report.done(completion)
        output.done(row, completion)

    code = 0
    # Where completions appear on the terminal as they come, they are the progress.
    quiet = options.output is None and sys.stdout.isatty()
    with Report(engine, len(wanted), done=len(wanted) - len(output.missing), quiet=quiet) as report:
        try:
            generate(engine, jobs(), show=show, done=done)
        except KeyboardInterrupt:
            code = INTERRUPTED
            output.interrupt(begun)
    report.close()
    return code


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
    # As array: a list of integers takes ten times the memory, and there may be millions of prompts.
    ids = [array("i", encoders[prompt.is_chat](prompt)) for prompt in prompts]
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


def _capacity(lengths: Sequence[int], max_rows: int) -> Capacity:
    """Of an engine for completions of these lengths, prompts included.

    The cache has room for `max_rows` of the mean length, but at least for the longest: a few that are much longer than
    the others do not multiply it. Where those meet, some wait, or give way and are computed again.
    """
    max_rows, longest = min(max_rows, len(lengths)), max(lengths)
    mean = -(-sum(lengths) // len(lengths))
    return Capacity(max_rows=max_rows, max_length=longest, cache_tokens=max(longest, max_rows * mean))


def _digest(options: Generate, opened: Opened, limit: int) -> str:
    """Of all that completions depend on beside their prompts."""
    names = ("n", "seed", "stop", "control_tokens", "dtype", "kv_cache", "sparse_prefill", "format", "thinking")
    what = {name: getattr(options, name) for name in names}
    what |= dict(model=str(opened.model.path), limit=limit, sampling=dataclasses.asdict(opened.sampling))
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
