"""The held-out text: how well a model predicts it, and how well the simplest models could."""

from __future__ import annotations

import functools
import math

from qwen_jax.errors import NumericalError
from qwen_jax.model import Params
from train.config import TrainConfig
from train.data import Rows, TokenShards, ngram_entropy
from train.feed import put_batch
from train.objectives import Objective
from train.step import make_eval_step


class HeldOut:
    """The held-out split of a corpus, in the rows and micro-batches of the training step."""

    def __init__(self, config: TrainConfig, objective: Objective, shards: TokenShards) -> None:
        self._config, self._shards = config, shards
        self._eval_step = make_eval_step(objective)
        self._rows = Rows(
            shards,
            sequence_length=config.data.sequence_length,
            batch_size=config.batch_size,
            seed=config.seed,
            shuffle=False,
        )

    def loss(self, params: Params, *, whole: bool) -> float:
        """Mean loss over the targets, in nats per token: of the whole split, or of the batches the config asks for.

        A part is spread evenly over the split: neighbouring rows are of one document. NumericalError if the loss is
        not finite.
        """
        total, asked = self._rows.num_batches, self._config.evaluation.batches
        count = total if whole or not asked else min(total, asked)
        chosen = [i * total // count for i in range(count)]
        sums = [self._eval_step(params, put_batch(self._rows, i, self._config)) for i in chosen]
        loss = sum(float(total) for total, _ in sums) / sum(float(weight) for _, weight in sums)
        if not math.isfinite(loss):
            raise NumericalError(
                f"the held-out loss is {loss} although the training loss was finite; lower the peak_lr"
            )
        return loss

    def bits_per_byte(self, loss: float) -> float:
        """A loss in nats per token as bits per byte of text, which does not depend on the tokenizer.

        Every token is charged, also the first of a document, which is never a target.
        """
        return loss / math.log(2) * len(self._shards) / self._shards.num_bytes

    @functools.cached_property
    def entropies(self) -> tuple[float, float]:
        """What a model of single tokens, and one of adjacent pairs, could reach at best, in nats per token."""
        tokens = self._shards.tokens(0, len(self._shards))
        return ngram_entropy(tokens, self._shards.vocab_size, end_of_text=self._shards.end_of_text)

    def summary(self, loss: float) -> str:
        """A held-out loss beside what it should be compared with, as lines of text."""
        unigram, bigram = self.entropies
        lines = [
            f"{'':<20}{'this model':>12}{'bigram':>12}{'unigram':>12}",
            f"{'nats per token':<20}{loss:>12.3f}{bigram:>12.3f}{unigram:>12.3f}",
            f"{'perplexity':<20}{math.exp(loss):>12.2f}{math.exp(bigram):>12.2f}{math.exp(unigram):>12.2f}",
            f"{'bits per byte':<20}" + "".join(f"{self.bits_per_byte(x):>12.3f}" for x in (loss, bigram, unigram)),
            "bigram, unigram: the least that any model of token pairs, or of single tokens, can reach on this text",
        ]
        return "\n".join(lines)
