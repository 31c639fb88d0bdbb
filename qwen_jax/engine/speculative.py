"""Speculative decoding: tokens are guessed beforehand, and one step of the model checks several.

A guess is kept where it is the very token that the model chooses there, with the random numbers of that position. So
the tokens of a request are those that it has without any guesses, greedy or random, however good the guesses are; the
rejection sampling of Leviathan et al. (2023) has the same distribution, but another meaning of a seed.
"""

from __future__ import annotations

import dataclasses
import functools
from array import array
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from qwen_jax.config import ModelConfig
from qwen_jax.engine.steps import Choice, Inputs, choose, compute
from qwen_jax.model import Batch, Cache, Params, forward_cached, make_cache, repeat_kv_heads
from qwen_jax.ops.pages import kv_heads

_LOOK_BACK = 8192  # tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptLookup:
    """Guesses that what followed the last few tokens before will follow them again (Saxena, 2023, prompt lookup).

    Attributes:
      num_guesses: tokens that a step looks ahead.
      ngram: the most of the last tokens that are looked for; failing that, fewer.
    """

    num_guesses: int = 4
    ngram: int = 3

    def guess(
        self, rows: Sequence[Sequence[int]], usable: Sequence[int], count: int
    ) -> tuple[np.ndarray | None, list[int]]:
        """Guesses [count, num_guesses] at what follows `rows`, and how many of each row's are any.

        No array if there are none at all. A row takes at most `usable`.
        """
        guesses = np.zeros((count, self.num_guesses), np.int32)
        found = []
        for row, most, into in zip(rows, usable, guesses, strict=False):
            following = self.follow(row)[:most] if most else []
            into[: len(following)] = following
            found.append(len(following))
        return (guesses, found) if any(found) else (None, found)

    def follow(self, tokens: Sequence[int]) -> list[int]:
        """What came after the latest earlier occurrence of the last tokens; at most `num_guesses`."""
        text = array("i", tokens[-_LOOK_BACK:])
        data, width = text.tobytes(), text.itemsize
        for size in range(min(self.ngram, len(text) - 1), 0, -1):
            wanted, end = data[-size * width :], len(data) - 1
            # What is found between the tokens is none.
            while (found := data.rfind(wanted, 0, end)) % width and found >= 0:
                end = found + len(wanted) - 1
            if found >= 0:
                start = found // width + size
                return text[start : start + self.num_guesses].tolist()
        return []


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftModel:
    """Guesses what a smaller model with the same tokenizer makes.

    Attributes:
      config: of the smaller model.
      params: its parameters, one entry per layer, in the config's dtype, on the engine's mesh.
      num_guesses: tokens that a step looks ahead.
    """

    config: ModelConfig
    params: Params
    num_guesses: int = 4


class Drafter:
    """A draft model at work: it has the engine's pages, by the same numbers, with keys and values of its own."""

    def __init__(self, draft: DraftModel, *, num_pages: int, page_size: int, num_tokens: int) -> None:
        config = dataclasses.replace(draft.config, num_kv_heads=kv_heads(draft.config.num_kv_heads))
        self._draft = dataclasses.replace(draft, config=config, params=repeat_kv_heads(draft.params))
        self._cache, self._num_tokens = make_cache(config, num_pages, page_size), num_tokens

    def follow(self, inputs: Inputs) -> None:
        """Takes in what the engine's model takes in, with `known` tokens of rows."""
        if inputs.rows is not None or inputs.pieces is not None:
            self._cache = _absorb(self._draft.config, self._draft.params, self._cache, inputs)

    def guess(self, inputs: Inputs, choice: Choice) -> Int[Array, "R guesses"]:
        """What may follow the last tokens of rows.

        Args:
          inputs: the rows with their last tokens, `known` [R, 1]; pieces wait until `follow`.
          choice: how the tokens after these are chosen, with no penalties.
        """
        inputs = inputs.without_pieces()
        guesses, nobody, first = [], jnp.zeros(1, jnp.int32), inputs.rows
        assert first is not None
        # Once more than there are guesses: if all are right, the keys of the last are wanted too.
        for ahead in range(self._draft.num_guesses + 1):
            inputs = dataclasses.replace(
                inputs, rows=dataclasses.replace(first, lengths=first.lengths + np.int32(ahead))
            )
            scores, self._cache = compute(self._draft.config, self._draft.params, self._cache, nobody, inputs)
            at = dataclasses.replace(choice, positions=choice.positions + np.int32(ahead))
            chosen, nobody, _ = choose(scores, nobody, None, at, num_tokens=self._num_tokens, top=None)
            guesses.append(jnp.maximum(chosen.tokens, 0))
            inputs = dataclasses.replace(inputs, known=guesses[-1][:, None])
        return jnp.stack(guesses[:-1], axis=1)


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("cache",))
def _absorb(config: ModelConfig, params: Params, cache: Cache, inputs: Inputs) -> Cache:
    tokens, groups = inputs.whole(jnp.zeros(1, jnp.int32))
    return forward_cached(config, params, tokens, Batch(rows=groups, prompts=inputs.prompts), cache)[1]
