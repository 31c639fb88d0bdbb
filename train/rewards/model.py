"""The score of a reward model as a reward, computed on the mesh of the training."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from qwen_jax.engine.scoring import Scorer, Text, closed, encode_row
from qwen_jax.errors import ModelError, NumericalError, UserError
from qwen_jax.text import Tokenizer
from qwen_jax.text.chat import Format
from qwen_jax.text.template import JinjaFormat
from qwen_jax.weights.source import open_model
from qwen_jax.weights.usage import read_usage
from train.data.conversations import tools_of
from train.rewards.config import RewardModel
from train.rewards.verdicts import Sample, Verdicts

_NOT_FINITE = "gave no finite score"


class ModelReward:
    """A reward model, loaded once; texts are what `infer score` and its training have of the same messages."""

    def __init__(
        self,
        config: RewardModel,
        *,
        form: Format | JinjaFormat | None,
        tokenizer: Tokenizer,
        mesh: Mesh,
        warn: Callable[[str], None],
    ) -> None:
        """
        Args:
          form: of conversations, where the model has none of its own.
          tokenizer: that it must have.

        Raises ModelError if it gives no score, or more than one, or has another tokenizer.
        """
        self._path, self._batch_size, self._mesh, self._tokenizer = config.path, config.batch_size, mesh, tokenizer
        with open_model(config.path, warn=warn) as source:
            labels = source.config.score.labels if source.config.score else 0
            if labels != 1:
                raise ModelError(f"{source.path} gives {labels} scores of a text; want a reward model, which gives one")
            if source.tokenizer().fingerprint != tokenizer.fingerprint:
                raise ModelError(f"{source.path} has another tokenizer than the policy; take a reward model with it")
            form = read_usage(source, tokenizer, warn=lambda _: None).chat_format(tokenizer, warn=warn) or form
            self._form = closed(form) if form else None
            with jax.set_mesh(mesh):
                self._scorer = Scorer(source)

    def check(self, columns: Mapping[str, Any]) -> None:
        """Any row will do."""

    def __call__(self, samples: Sequence[Sample]) -> Verdicts:
        """The scores; no verdict where a text cannot be written, or is too long for the model.

        Raises NumericalError where no score is finite.
        """
        values, failures = np.full(len(samples), math.nan), Counter[str]()
        texts: dict[int, Text] = {}
        for i, sample in enumerate(samples):
            try:
                text = self._encode(sample)
            except UserError:
                failures["cannot be written in the model's format"] += 1
                continue
            if len(text.ids) > self._scorer.config.max_position:
                failures["too long for the model"] += 1
            else:
                texts[i] = text
        numbers = list(texts)
        with jax.set_mesh(self._mesh):
            for at, score in self._scorer(list(texts.values()), batch_size=self._batch_size):
                if np.isfinite(score).all():
                    values[numbers[at]] = score.item()
                else:
                    failures[_NOT_FINITE] += 1
        if texts and failures[_NOT_FINITE] == len(texts):
            raise NumericalError(
                f"none of the {len(texts)} scores that {self._path} gave is finite; its weights may be damaged"
            )
        return Verdicts(values, failures)

    def close(self) -> None:
        """Lets go of the weights."""
        del self._scorer

    def _encode(self, sample: Sample) -> Text:
        if isinstance(sample.prompt, str):
            return encode_row({"prompt": sample.prompt + sample.completion}, self._tokenizer, None)
        messages = [*sample.prompt, {"role": "assistant", "content": sample.completion}]
        row = {"messages": messages, "tools": tools_of(sample.columns.get("tools"))}
        return encode_row(row, self._tokenizer, self._form)
