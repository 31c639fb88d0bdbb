"""What is compiled: a step of the model over rows and pieces of prompts, and the choice of the tokens that follow.

Two programs, so that how tokens are chosen compiles nothing of the model anew. Both are launched without waiting for
what they compute: the last token of each row stays on the device, where the next step finds it.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key, UInt

from qwen_jax import sharding
from qwen_jax.config import ModelConfig
from qwen_jax.model import Batch, Cache, Params, forward_cached, logits
from qwen_jax.ops.pages import Rows
from qwen_jax.ops.sampling import Seen, Stages, logprobs, sample
from qwen_jax.ops.vertical_slash import VerticalSlash


@typing.no_type_check  # at run time: the host makes them of NumPy's arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a step of the model takes in: the last tokens of some rows, pieces of prompts, or both.

    Attributes:
      rows: the rows that decode; None for none.
      places: [R], which of the engine's rows they are; idle ones have a place that no row has.
      known: [R, width], their tokens, where the host knows the last ones and guesses at more; None for the last ones,
        as they are on the device.
      pieces: the rows whose prompts they are of; None for none.
      tokens: [C], the pieces, each padded to whole blocks.
      ends: [E], the last of `tokens` of each piece; more of them stand for nothing.
      prompts: [T], tokens of the prompt of each token's row, where they matter; None elsewhere.
    """

    rows: Rows | None = None
    places: Int[Array, " R"] | None = None
    known: Int[Array, "R W"] | None = None
    pieces: Rows | None = None
    tokens: Int[Array, " C"] | None = None
    ends: Int[Array, " E"] | None = None
    prompts: Int[Array, " T"] | None = None

    def whole(self, last: Int[Array, " places"]) -> tuple[Int[Array, " T"], tuple[Rows, ...]]:
        """All the tokens, one group of rows after another, and the groups; `last` are the last tokens of all places."""
        tokens: list[Any] = []
        groups: list[Rows] = []
        if self.rows is not None:
            tokens.append(last[self.places] if self.known is None else self.known.reshape(-1))
            groups.append(self.rows)
        if self.pieces is not None:
            tokens.append(self.tokens)
            groups.append(self.pieces)
        return jnp.concatenate(tokens), tuple(groups)

    def with_guesses(self, guesses: Int[Array, "R ahead"]) -> Inputs:
        """The same with tokens that may follow the `known` of rows."""
        assert self.rows is not None
        ahead, prompts, count = guesses.shape[1], self.prompts, len(self.rows.lengths)
        more = self.rows.counts * np.int32(ahead)
        lengths, counts = self.rows.lengths + more, self.rows.counts + more
        rows = dataclasses.replace(self.rows, lengths=lengths, counts=counts, width=1 + ahead)
        if prompts is not None:
            prompts = jnp.concatenate([jnp.repeat(prompts[:count], 1 + ahead), prompts[count:]])
        known = jnp.concatenate([jnp.asarray(self.known), jnp.asarray(guesses)], axis=1)
        return dataclasses.replace(self, rows=rows, known=known, prompts=prompts)

    def without_pieces(self) -> Inputs:
        """The rows alone."""
        prompts = None if self.prompts is None or self.rows is None else self.prompts[: len(self.rows.lengths)]
        return dataclasses.replace(self, pieces=None, tokens=None, ends=None, prompts=prompts)

    def without_rows(self) -> Inputs:
        """The pieces alone."""
        prompts = self.prompts if self.rows is None or self.prompts is None else self.prompts[len(self.rows.lengths) :]
        return Inputs(pieces=self.pieces, tokens=self.tokens, ends=self.ends, prompts=prompts)


@typing.no_type_check  # at run time: the host makes them of NumPy's arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """How the tokens after S of a step's tokens are chosen.

    Attributes:
      places: whose last tokens they become; a place that no row has for what nobody asked for.
      seeds, rows: of the requests: with the positions, the keys of their random numbers.
      positions: where the new tokens will stand.
      stages: what is done to the logits.
      tempers: the temperatures that probabilities are told at; None for 1.
      allowed: words of a bit for each token that grammars allow; None for all.
    """

    places: Int[Array, " S"]
    seeds: UInt[Array, " S"]
    rows: UInt[Array, " S"]
    positions: Int[Array, " S"]
    stages: Stages
    tempers: Float[Array, " S"] | None = None
    allowed: UInt[Array, "S words"] | None = None


@typing.no_type_check  # and reads them so
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chosen:
    """The tokens, -1 where logits were not finite; and what `ops.sampling.logprobs` tells of them, if asked."""

    tokens: Int[Array, " S"]
    own: tuple[Float[Array, " S"], Int[Array, "S top"], Float[Array, "S top"]] | None = None


@functools.partial(jax.jit, static_argnames=("config", "sparse"), donate_argnames=("cache",))
def compute(
    config: ModelConfig,
    params: Params,
    cache: Cache,
    last: Int[Array, " places"],
    inputs: Inputs,
    *,
    sparse: VerticalSlash | None = None,
) -> tuple[Float[Array, "S V"], Cache]:
    """The logits after every token of the rows, then those after the `ends` of pieces; and the cache with it all.

    Each device gets the logits of some rows, S being a multiple of `sharding.ROWS`, to choose from.
    """
    tokens, groups = inputs.whole(last)
    batch = Batch(rows=groups, prompts=inputs.prompts)
    hidden, cache = forward_cached(config, params, tokens, batch, cache, sparse=sparse)
    hidden = jax.sharding.reshard(hidden, P(None, None))
    if inputs.tokens is not None and inputs.ends is not None:
        decoded = len(hidden) - len(inputs.tokens)
        hidden = jnp.concatenate([hidden[:decoded], hidden[decoded + inputs.ends]])
    rows = jax.sharding.reshard(hidden, sharding.activation("b_", hidden.shape))
    return jax.sharding.reshard(logits(params, rows[:, None])[:, 0], P(sharding.ROWS)), cache


@functools.partial(jax.jit, static_argnames=("num_tokens", "top"), donate_argnames=("last", "seen"))
def choose(
    logits: Float[Array, "S V"],
    last: Int[Array, " places"],
    seen: Seen | None,
    choice: Choice,
    *,
    num_tokens: int,
    top: int | None,
) -> tuple[Chosen, Int[Array, " places"], Seen | None]:
    """The tokens after each row of logits, and the engine's last tokens and statistics with them.

    Args:
      logits: of `compute`.
      last: the last token of each of the engine's rows, and of the place that no row has.
      seen: the statistics of their tokens; None where no stage looks at them.
      choice: how.
      num_tokens: tokens the tokenizer has.
      top: how many of the likeliest tokens are told; None for no probabilities at all.
    """

    def local(logits, seen, choice):
        keys = jax.vmap(_key)(choice.seeds, choice.rows, choice.positions)
        own = None if seen is None else jax.tree.map(lambda x: x[choice.places], seen)
        tokens = sample(logits, keys, choice.stages, num_tokens=num_tokens, seen=own, allowed=choice.allowed)
        if top is None:
            return Chosen(tokens)
        logits = logits if choice.tempers is None else logits / choice.tempers[:, None]
        return Chosen(tokens, logprobs(logits, tokens, num_tokens=num_tokens, top=top))

    # Each device for its own rows: a threshold takes tens of passes over the logits.
    split = P(sharding.ROWS)
    arguments, specs = (logits, seen, choice), (split, P(), split)
    chosen = jax.shard_map(local, in_specs=specs, out_specs=split, check_vma=False)(
        *jax.sharding.reshard(arguments, specs)
    )
    chosen = jax.sharding.reshard(chosen, P())
    last = last.at[choice.places].set(jnp.maximum(chosen.tokens, 0))
    if seen is not None:
        seen = dataclasses.replace(seen, generated=seen.generated.at[choice.places, last[choice.places]].add(1))
    return chosen, last, seen


@functools.partial(jax.jit, donate_argnames=("seen",))
def remember(seen: Seen, place: Int[Array, ""], prompt: Int[Array, " V"], generated: Int[Array, " V"]) -> Seen:
    """The statistics with those of a row that begins, or goes on, at `place`: how often each token is in it."""
    return Seen(
        prompt=seen.prompt.at[place].set(prompt > 0),
        generated=seen.generated.at[place].set(generated.astype(seen.generated.dtype)),
    )


def _key(seed: UInt[Array, ""], row: UInt[Array, ""], position: Int[Array, ""]) -> Key[Array, ""]:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), position)
