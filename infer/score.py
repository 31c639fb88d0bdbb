"""`python -m infer score`: texts and conversations in, what a reward model thinks of them out."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from infer.config import Score
from infer.prompts import Prompt, read_prompts
from infer.terminal import warn
from qwen_jax.engine.scoring import Scorer, Text, closed, encode_row
from qwen_jax.errors import ConfigError, DataError, FileError, ModelError, UserError
from qwen_jax.resumable import ResumableFile
from qwen_jax.sharding import make_mesh
from qwen_jax.text import Tokenizer
from qwen_jax.text.chat import FORMATS, Format
from qwen_jax.text.template import JinjaFormat
from qwen_jax.weights.source import Model, open_model
from qwen_jax.weights.usage import read_usage


def run(options: Score) -> int:
    """Does what `options` ask for; the exit code."""
    prompts, _ = read_prompts(options)
    with open_model(options.model, allow_pickle_format=options.allow_pickle_format, warn=warn) as source:
        if source.config.score is None:
            raise ModelError(f"{source.path} is a language model and scores nothing; take a reward model")
        tokenizer = source.tokenizer()
        form = _form(options, source, tokenizer) if any(prompt.is_chat for prompt in prompts) else None
        texts = [_encode(prompt, tokenizer, form, options.step_end) for prompt in prompts]
        for prompt, text in zip(prompts, texts, strict=True):
            if len(text.ids) > source.config.max_position:
                raise DataError(
                    f"{prompt.where}: {len(text.ids)} tokens do not fit into the model's {source.config.max_position}"
                )
        with _output(options, prompts, str(source.path)) as (missing, write):
            if missing:
                _score(options, source, texts, missing, write)
    return 0


def _score(
    options: Score, source: Model, texts: Sequence[Text], missing: Sequence[int], write: Callable[[int, dict], None]
) -> None:
    """Scores texts by their rows."""
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        scorer = Scorer(source, dtype=options.dtype)
        for number, scores in scorer([texts[row] for row in missing], batch_size=options.batch_size):
            write(missing[number], _row(scores, steps=options.step_end is not None))


def _row(scores: np.ndarray, *, steps: bool) -> dict[str, Any]:
    """Scores [places, labels] as they are written: of steps with two labels, how likely the second is."""
    if steps and scores.shape[1] == 2:
        return {"scores": [float(p) for p in 1 / (1 + np.exp(scores[:, 0] - scores[:, 1]))]}
    if scores.shape[1] == 1:
        return {"scores": scores[:, 0].tolist()} if steps else {"score": float(scores[0, 0])}
    return {"scores": (scores if steps else scores[0]).tolist()}


def _form(options: Score, source: Model, tokenizer: Tokenizer) -> Format | JinjaFormat:
    form = FORMATS[options.format] if options.format else None
    form = form or read_usage(source, tokenizer, warn=lambda _: None).chat_format(tokenizer, warn=warn)
    if form is None:
        raise ConfigError(f"{source.path} has no chat template; choose a format with --format: {', '.join(FORMATS)}")
    return closed(form)


def _encode(prompt: Prompt, tokenizer: Tokenizer, form: Format | JinjaFormat | None, step_end: str | None) -> Text:
    try:
        return encode_row(prompt.row, tokenizer, form, step_end=step_end)
    except UserError as error:
        raise type(error)(f"{prompt.where}: {error}") from error


@contextlib.contextmanager
def _output(
    options: Score, prompts: Sequence[Prompt], path: str
) -> Iterator[tuple[Sequence[int], Callable[[int, dict[str, Any]], None]]]:
    """Rows that are to be scored, and what takes them; without --output they are printed in order at the end."""
    head = lambda row: {"index": row, "sample": 0, **prompts[row].row}
    if options.output is None:
        found: dict[int, Mapping[str, Any]] = {}
        yield range(len(prompts)), found.__setitem__
        for row in sorted(found):
            print(json.dumps({**head(row), **found[row]}, ensure_ascii=False))
        return
    digest = hashlib.sha256(json.dumps([path, options.dtype, options.format, options.step_end]).encode()).hexdigest()[
        :16
    ]
    begins = lambda row: (json.dumps(head(row), ensure_ascii=False)[:-1] + ", ").encode()
    how = dict(total=len(prompts), n=1, head=begins, digest=digest, overwrite=options.overwrite)
    try:
        with ResumableFile(options.output, **how) as file:
            yield file.missing, lambda row, scores: file.append(row, {**head(row), **scores})
            file.sort()
    except OSError as error:
        raise FileError(f"cannot write scores to {options.output}: {error.strerror}") from error
    print(f"{len(prompts)} scores are in {options.output}", file=sys.stderr)
