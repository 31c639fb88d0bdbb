"""What a reward model thinks of texts: how they are written, as in its training, and their scores."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from qwen_jax import model
from qwen_jax.config import DType, ModelConfig
from qwen_jax.errors import DataError
from qwen_jax.sharding import BATCH, axis_size, put, whole
from qwen_jax.text import Tokenizer
from qwen_jax.text.chat import Format, Piece, encode
from qwen_jax.text.template import JinjaFormat
from qwen_jax.weights.load import load_params
from qwen_jax.weights.source import Model

LENGTHS = 64  # texts are filled up to a multiple of this, so that few shapes are compiled


@dataclasses.dataclass(frozen=True)
class Text:
    """Ids of a text, and at which of them it is scored."""

    ids: Sequence[int]
    places: Sequence[int]


class Scorer:
    """A reward model on the mesh that is current, which must be so again when it is asked."""

    def __init__(self, source: Model, *, dtype: DType | None = None) -> None:
        """`dtype` is that of the computation; None for the model's own."""
        self.config = dataclasses.replace(source.config, dtype=dtype or source.config.dtype)
        self._params = load_params(source, dtype=self.config.dtype, stacked=False)

    def __call__(
        self, texts: Sequence[Text], *, batch_size: int
    ) -> Iterator[tuple[int, Float32[np.ndarray, "places labels"]]]:
        """Number and scores of each text, of which those of about a length are computed together, the longest first.

        If there is no room for them, that is said at once. A batch has as many more as the mesh makes rows of it.
        """
        ways = axis_size(BATCH)
        size, multiple = -(-batch_size // ways) * ways, math.lcm(LENGTHS, axis_size("context"))
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i].ids))
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            length = -(-len(texts[rows[0]].ids) // multiple) * multiple
            tokens, real = np.zeros((2, size, length), np.int32)
            for row, i in enumerate(rows):
                tokens[row, : len(texts[i].ids)], real[row, : len(texts[i].ids)] = texts[i].ids, 1
            batch = (put(x.shape, np.int32, "bt", x.__getitem__) for x in (tokens, real))
            found = np.asarray(_scores(self.config, self._params, *batch))
            for row, i in enumerate(rows):
                yield i, found[row, list(texts[i].places)]


@functools.partial(jax.jit, static_argnums=0)
def _scores(
    config: ModelConfig, params: model.Params, tokens: Int32[Array, "B T"], real: Int32[Array, "B T"]
) -> Float[Array, "B T C"]:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    found = model.scores(config, params, model.forward(config, params, tokens, positions, segments=real))
    return whole(found)


def closed(form: Format | JinjaFormat) -> Format | JinjaFormat:
    """The format as reward models are trained with it: a text is scored when it has ended."""
    return dataclasses.replace(form, open_end=False) if isinstance(form, Format) else form


def encode_row(
    row: Mapping[str, Any], tokenizer: Tokenizer, form: Format | JinjaFormat | None, *, step_end: str | None = None
) -> Text:
    """A text, or a conversation up to the end of its last answer, scored there or at the ends of its steps.

    Args:
      row: {"prompt": text}, or {"messages": [...]} with or without "tools".
      tokenizer: of the reward model.
      form: of conversations; None where the row is none.
      step_end: what ends a step, a control token; None for a whole text.

    Raises DataError where there is nothing to score.
    """
    if "messages" in row:
        assert form is not None
        if row["messages"][-1]["role"] != "assistant":
            raise DataError("the last message is not the assistant's, which is what is scored")
        pieces = form.render(row["messages"], tools=row.get("tools"))
    else:
        pieces = [Piece(text=row["prompt"], trained=True)]
    encoded = encode(tokenizer, [part for piece in pieces for part in _parts(piece, step_end)])
    flags = [*(encoded.trained or []), False]
    places = [at for at in range(len(encoded.ids)) if flags[at] and not flags[at + 1]]
    if step_end is None:
        places = [len(encoded.ids) - 1]
    if not encoded.ids or not places:
        raise DataError("nothing to score" + (f"; no step ends with {step_end!r}" if step_end else ""))
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
