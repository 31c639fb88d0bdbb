"""The held-out text: how well a model predicts it, and how well the simplest models could."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

from qwen_jax.errors import NumericalError
from qwen_jax.model import Params
from train import adapter, objectives
from train.adapter import Frozen
from train.config import LM, TrainConfig
from train.data import Corpus, Rows, ngram_entropy
from train.feed import put_batch
from train.step import State, make_eval_step
from train.stream import layout


class HeldOut:
    """The held-out text of every part of a corpus, in the rows and micro-batches of the training step."""

    def __init__(self, config: TrainConfig, corpus: Corpus, frozen: Frozen) -> None:
        self._config, self._frozen = config, frozen
        self._eval_step = make_eval_step(objectives.make(config), objectives.refer(config))
        self._join, self._last = adapter.join(config.adapter), dict[str, float]()
        self._means: dict[str, dict[str, float]] = {}  # of each part, what else its objective measures
        data = config.data
        self.parts = {
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
        found = {name: self._loss(name, params, rows, whole) for name, rows in self.parts.items()}
        for name, loss in found.items():
            if not math.isfinite(loss):
                raise NumericalError(
                    f"the held-out loss of {name} is {loss} although the training loss was finite; lower the peak_lr"
                )
        return found

    def evaluate(self, state: State, *, whole: bool) -> tuple[dict[str, Any], str]:
        """What the record keeps of a state, and a line about it."""
        losses = self._last = self.losses(self._join(state.params, self._frozen, None), whole=whole)
        measures = self.measures(losses)
        line = f"held-out loss {measures['loss']:.3f}"
        line += "".join(f", {name} {loss:.3f}" for name, loss in losses.items()) if len(losses) > 1 else ""
        return measures, line + (f", accuracy {measures['accuracy']:.1%}" if "accuracy" in measures else "")

    def _loss(self, name: str, params: Params, rows: Rows, whole: bool) -> float:
        total, asked = rows.num_batches, self._config.evaluation.batches
        count = total if whole or not asked else min(total, asked)
        chosen = [i * total // count for i in range(count)]
        sums = [self._eval_step(params, put_batch(rows, i, self._config), self._frozen) for i in chosen]
        total = {measure: sum(float(each[measure]) for each in sums) for measure in sums[0]}
        self._means[name] = {m: value / total["weight"] for m, value in total.items() if m not in ("loss", "weight")}
        return total["loss"] / total["weight"]

    def measures(self, losses: Mapping[str, float]) -> dict[str, Any]:
        """What the record keeps of them: their mean by the weights that the parts are trained with, and each part's."""
        weights = {name: self._weights[name] for name in losses}
        weights = weights if any(weights.values()) else dict.fromkeys(losses, 1.0)
        mean = lambda of: sum(weights[name] * of[name] for name in losses) / sum(weights.values())
        first, *_ = losses
        judged = {m: mean({name: self._means[name][m] for name in losses}) for m in self._judged(first)}
        if len(losses) > 1:
            return {"loss": mean(losses), "bits_per_byte": None, "parts": losses, **judged}
        return {"loss": mean(losses), "bits_per_byte": self.bits_per_byte(first, losses[first]), **judged}

    def _judged(self, name: str) -> list[str]:
        """What of preferences is measured beside the loss; of language nothing is."""
        return [] if isinstance(self._config.objective, LM) else list(self._means[name])

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
        name, *others = self.parts
        shards = self._shards[name]
        if others or shards.num_trained is not None:
            return None
        tokens = shards.tokens(0, len(shards))
        return ngram_entropy(tokens, shards.vocab_size, end_of_text=shards.end_of_text)

    def summary(self) -> str:
        """The losses that were evaluated last, beside what they should be compared with, as lines of text."""
        losses = self._last
        if not isinstance(self._config.objective, LM):
            measures = self.measures(losses)
            shown = {name: measures[name] for name in ("loss", "accuracy", "margin") if name in measures}
            return "\n".join(f"{f'held-out {name}':<20}{value:>12.4f}" for name, value in shown.items())
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
