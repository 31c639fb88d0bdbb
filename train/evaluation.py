"""The held-out text: how well a model predicts it, and how well the simplest models could."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

from qwen_jax.errors import NumericalError
from qwen_jax.model import Params
from train.config import TrainConfig
from train.data import Corpus, Rows, ngram_entropy
from train.feed import put_batch
from train.objectives import Objective
from train.step import make_eval_step
from train.stream import layout


class HeldOut:
    """The held-out text of every part of a corpus, in the rows and micro-batches of the training step."""

    def __init__(self, config: TrainConfig, objective: Objective, corpus: Corpus) -> None:
        self._config = config
        self._eval_step = make_eval_step(objective)
        data = config.data
        self._parts = {
            part.name: Rows(
                tokens.held_out,
                sequence_length=data.sequence_length,
                batch_size=config.batch_size,
                seed=config.seed,
                layout=layout(tokens.held_out, part, data, seed=config.seed),
                shuffle=False,
            )
            for tokens, part in zip(corpus.parts, data.parts, strict=True)
            if len(tokens.held_out)
        }
        self._shards = {tokens.part.name: tokens.held_out for tokens in corpus.parts}
        self._weights = {part.name: part.weight for part in data.parts}

    def losses(self, params: Params, *, whole: bool) -> dict[str, float]:
        """Mean loss over the targets of each part, in nats per token: of all, or of the batches the config asks for.

        Of a part that is read in part the batches are spread evenly: neighbouring rows are of one document.
        NumericalError if a loss is not finite.
        """
        found = {name: self._loss(params, rows, whole) for name, rows in self._parts.items()}
        for name, loss in found.items():
            if not math.isfinite(loss):
                raise NumericalError(
                    f"the held-out loss of {name} is {loss} although the training loss was finite; lower the peak_lr"
                )
        return found

    def _loss(self, params: Params, rows: Rows, whole: bool) -> float:
        total, asked = rows.num_batches, self._config.evaluation.batches
        count = total if whole or not asked else min(total, asked)
        chosen = [i * total // count for i in range(count)]
        sums = [self._eval_step(params, put_batch(rows, i, self._config)) for i in chosen]
        return sum(float(total) for total, _ in sums) / sum(float(weight) for _, weight in sums)

    def measures(self, losses: Mapping[str, float]) -> dict[str, Any]:
        """What the record keeps of them: their mean by the weights that the parts are trained with, and each part's."""
        weights = {name: self._weights[name] for name in losses}
        weights = weights if any(weights.values()) else dict.fromkeys(losses, 1.0)
        mean = sum(weights[name] * loss for name, loss in losses.items()) / sum(weights.values())
        if len(losses) > 1:
            return {"loss": mean, "bits_per_byte": None, "parts": losses}
        return {"loss": mean, "bits_per_byte": self.bits_per_byte(*next(iter(losses.items())))}

    def bits_per_byte(self, name: str, loss: float) -> float | None:
        """The loss of a part in nats per token as bits per byte of its text, which does not depend on the tokenizer.

        Every token is charged, also the first of a document, which is never a target. None where not all are trained.
        """
        shards = self._shards[name]
        return loss / math.log(2) * len(shards) / shards.num_bytes if shards.num_trained is None else None

    @functools.cached_property
    def entropies(self) -> tuple[float, float] | None:
        """What a model of single tokens, and one of adjacent pairs, could reach at best, in nats per token.

        None of a mixture, or where not all tokens are trained.
        """
        name, *others = self._parts
        shards = self._shards[name]
        if others or shards.num_trained is not None:
            return None
        tokens = shards.tokens(0, len(shards))
        return ngram_entropy(tokens, shards.vocab_size, end_of_text=shards.end_of_text)

    def summary(self, losses: Mapping[str, float]) -> str:
        """Held-out losses beside what they should be compared with, as lines of text."""
        columns = {"this model" if len(losses) == 1 else name: loss for name, loss in losses.items()}
        bits = [self.bits_per_byte(name, loss) for name, loss in losses.items()]
        lines = []
        if self.entropies:
            unigram, bigram = self.entropies
            columns |= {"bigram": bigram, "unigram": unigram}
            (name,) = losses
            bits += [self.bits_per_byte(name, bigram), self.bits_per_byte(name, unigram)]
            lines = [
                "bigram, unigram: the least that any model of token pairs, or of single tokens, can reach on this text"
            ]
        width = max(12, *(len(name) + 2 for name in columns))
        shown = ["" if value is None else f"{value:.3f}" for value in bits]
        return "\n".join(
            [
                f"{'':<20}" + "".join(f"{name:>{width}}" for name in columns),
                f"{'nats per token':<20}" + "".join(f"{loss:>{width}.3f}" for loss in columns.values()),
                f"{'perplexity':<20}" + "".join(f"{math.exp(loss):>{width}.2f}" for loss in columns.values()),
                *([f"{'bits per byte':<20}" + "".join(f"{text:>{width}}" for text in shown)] if any(shown) else []),
                *lines,
            ]
        )
