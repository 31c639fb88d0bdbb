"""`python -m infer score`: texts and conversations in, what a reward model thinks of them out."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from infer.config import Score
from infer.prompts import Prompt, read_prompts
from infer.terminal import warn
from qwen_jax import model
from qwen_jax.errors import ConfigError, DataError, FileError, ModelError, UserError
from qwen_jax.resumable import ResumableFile
from qwen_jax.sharding import make_mesh
from qwen_jax.text import Tokenizer
from qwen_jax.text.chat import FORMATS, Format, Piece, encode
from qwen_jax.text.template import JinjaFormat
from qwen_jax.weights.load import load_params
from qwen_jax.weights.source import Model, open_model
from qwen_jax.weights.usage import read_usage

LENGTHS = 64  # texts are filled up to a multiple of this, so that few shapes are compiled


@dataclasses.dataclass(frozen=True)
class Text:
    """Ids of a text, and at which of them it is scored."""

    ids: Sequence[int]
    places: Sequence[int]


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
    """Scores texts by their rows, those of about a length together."""
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        config = dataclasses.replace(source.config, dtype=options.dtype or source.config.dtype)
        params = load_params(source, dtype=config.dtype, stacked=False)
        # The longest first: if there is no room for them, that is said at once.
        order = sorted(missing, key=lambda row: -len(texts[row].ids))
        for start in range(0, len(order), options.batch_size):
            rows = order[start : start + options.batch_size]
            length = -(-max(len(texts[row].ids) for row in rows) // LENGTHS) * LENGTHS
            tokens, real = np.zeros((2, options.batch_size, length), np.int32)
            for i, row in enumerate(rows):
                tokens[i, : len(texts[row].ids)], real[i, : len(texts[row].ids)] = texts[row].ids, 1
            found = np.asarray(_scores(config, params, tokens, real))
            for i, row in enumerate(rows):
                write(row, _row(found[i, list(texts[row].places)], steps=options.step_end is not None))


@functools.partial(jax.jit, static_argnums=0)
def _scores(config: Any, params: model.Params, tokens: jax.Array, real: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return model.scores(config, params, model.forward(config, params, tokens, positions, segments=real))


def _row(scores: np.ndarray, *, steps: bool) -> dict[str, Any]:
    """Scores [places, labels] as they are written: of two labels, how likely the second is."""
    if steps and scores.shape[1] == 2:
        return {"scores": [float(p) for p in 1 / (1 + np.exp(scores[:, 0] - scores[:, 1]))]}
    values = scores if steps else scores[0]
    return {"scores": values.tolist()} if values.size > 1 else {"score": float(values.ravel()[0])}


def _form(options: Score, source: Model, tokenizer: Tokenizer) -> Format | JinjaFormat:
    form = FORMATS[options.format] if options.format else None
    form = form or read_usage(source, tokenizer, warn=lambda _: None).chat_format(tokenizer, warn=warn)
    if form is None:
        raise ConfigError(f"{source.path} has no chat template; choose a format with --format: {', '.join(FORMATS)}")
    # A text is scored when it has ended, as in training.
    return dataclasses.replace(form, open_end=False) if isinstance(form, Format) else form


def _encode(prompt: Prompt, tokenizer: Tokenizer, form: Format | JinjaFormat | None, step_end: str | None) -> Text:
    """A text, or a conversation up to the end of its last answer."""
    try:
        if form is not None and prompt.is_chat:
            if prompt.row["messages"][-1]["role"] != "assistant":
                raise DataError("the last message is not the assistant's, which is what is scored")
            pieces = form.render(prompt.row["messages"], tools=prompt.row.get("tools"))
        else:
            pieces = [Piece(text=prompt.row["prompt"], trained=True)]
        encoded = encode(tokenizer, [part for piece in pieces for part in _parts(piece, step_end)])
    except UserError as error:
        raise type(error)(f"{prompt.where}: {error}") from error
    flags = [*(encoded.trained or []), False]
    places = [at for at in range(len(encoded.ids)) if flags[at] and not flags[at + 1]]
    if step_end is None:
        places = [len(encoded.ids) - 1]
    if not encoded.ids or not places:
        raise DataError(f"{prompt.where}: nothing to score" + (f"; no step ends with {step_end!r}" if step_end else ""))
    return Text(encoded.ids, places)


def _parts(piece: Piece, step_end: str | None) -> Iterator[Piece]:
    """A piece of which nothing is marked but the ends of steps."""
    if step_end is None or piece.trusted or not piece.trained:
        yield dataclasses.replace(piece, trained=False)
        return
    *steps, rest = piece.text.split(step_end)
    for step in steps:
        yield Piece(text=step)
        yield Piece(text=step_end, trusted=True, trained=True)
    yield Piece(text=rest)


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
