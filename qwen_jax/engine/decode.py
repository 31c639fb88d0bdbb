"""Prompts to tokens: one prefill, then one compiled step per token, over a batch of rows of any lengths.

Token ids in, token ids out: nothing here knows of text, end-of-text or stop strings. The reader of the tokens stops
when it has enough.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from qwen_jax import sharding
from qwen_jax.config import ModelConfig
from qwen_jax.errors import ConfigError, NumericalError
from qwen_jax.model import Cache, Params, forward, logits, make_cache
from qwen_jax.ops.sampling import Sampling, Stages, sample
from qwen_jax.ops.vertical_slash import VerticalSlash

# Lengths are rounded up to powers of two from here, so that few shapes are ever compiled.
SHORTEST = 64

# Tokens a cache has room for beyond the prompt at first. Each growth compiles the step anew, so not too few;
# each step reads all of the cache, so not too many.
HEADROOM = 256


class Engine:
    """A model ready to decode.

    Attributes:
      config: shape and constants; `dtype` is the type of its parameters and of the computation.
      mesh: the devices it runs on.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        *,
        num_tokens: int,
        mesh: Mesh,
        sparse: VerticalSlash | None = None,
    ) -> None:
        """
        Args:
          config: shape and constants.
          params: one entry per layer (`unstack_layers`), in the config's dtype, on `mesh`.
          num_tokens: tokens the tokenizer has; later rows of the embedding are padding.
          mesh: the devices.
          sparse: how long prompts are taken in; None for full attention, which is what the model computes.
        """
        self.config = config
        self.mesh = mesh
        self._params = params
        self._num_tokens = num_tokens
        self._sparse = sparse

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seed: int,
        rows: Sequence[int],
        max_new_tokens: int,
    ) -> Iterator[np.ndarray]:
        """The next token of every prompt, [len(prompts)] int32, `max_new_tokens` times unless the caller stops.

        A row's tokens depend on its prompt, `sampling`, `seed` and its number in `rows`, not on the rows beside it
        (up to rounding: a matmul may add in another order in another batch).

        Args:
          prompts: token ids, at least one each.
          sampling: how tokens are chosen.
          seed: of the random numbers, 0 to 2**32 - 1.
          rows: a number for each prompt, which tells it from others with the same seed.
          max_new_tokens: tokens at most; with the longest prompt they must fit into max_position.

        Raises NumericalError when the model's logits are not finite.
        """
        longest, count = max(map(len, prompts)), len(prompts)
        if longest + max_new_tokens > self.config.max_position:
            raise ConfigError(
                f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} exceed the model's "
                f"max_position={self.config.max_position}; ask for at most {self.config.max_position - longest}"
            )
        more = self._batch(count) - count
        prompts, rows = [*prompts, *[[0]] * more], [*rows, *[0] * more]
        with jax.set_mesh(self.mesh):
            tokens, positions = _pad(prompts)
            stages = jax.tree.map(lambda x: _split(x, "b"), Stages.of([sampling] * len(prompts)))
            seen = None if stages.repetition_penalty is None else _seen(prompts, self.config.vocab_size)
            keys = row_keys(jax.random.key(np.uint32(seed)), _split(np.array(rows, np.uint32), "b"))
            choice = dict(keys=keys, stages=stages, num_tokens=self._num_tokens)
            tokens, cache = prefill(self.config, self._params, tokens, positions, seen, sparse=self._sparse, **choice)
            cache = cache.grow(bucket(longest + min(max_new_tokens, HEADROOM)))
        for written in range(longest, longest + max_new_tokens - 1):
            with jax.set_mesh(self.mesh):
                if written == cache.length:
                    cache = cache.grow(2 * cache.length)
                # Step n + 1 is launched before the tokens of step n are read: the device never waits for the host.
                following, positions, cache, seen = step(
                    self.config, self._params, tokens, positions, cache, seen, **choice
                )
            yield _read(tokens, count)
            tokens = following
        yield _read(tokens, count)

    def _batch(self, count: int) -> int:
        """Rows to compute for `count` prompts."""
        # XLA on CPU multiplies one row of bfloat16 some ten times slower than two.
        return bucket(count, least=2 if self.config.dtype == "bfloat16" else 1)


def bucket(size: int, *, least: int = SHORTEST) -> int:
    """The smallest power of two that is at least `size` and at least `least`."""
    return max(least, 1 << (size - 1).bit_length())


def _pad(prompts: Sequence[Sequence[int]]) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """The prompts padded on the right, and their lengths."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), bucket(max(map(len, prompts)))), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return _split(tokens, "bt"), _split(lengths, "b")


def _seen(prompts: Sequence[Sequence[int]], vocab_size: int) -> Bool[Array, "B V"]:
    """Which tokens each prompt has."""
    seen = np.zeros((len(prompts), vocab_size), bool)
    for row, prompt in zip(seen, prompts, strict=True):
        row[list(prompt)] = True
    return _split(seen, "b_")


@jax.jit
def row_keys(key: Key[Array, ""], rows: UInt[Array, " B"]) -> Key[Array, " B"]:
    """A key for each number in `rows`."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)


def _read(tokens: Int[Array, " B"], count: int) -> np.ndarray:
    """The first `count` tokens, once they are computed."""
    found = np.asarray(tokens)[:count]
    if (found < 0).any():
        raise NumericalError("the model's logits are not finite (NaN or inf); the weights or the dtype cannot be used")
    return found


@functools.partial(jax.jit, static_argnames=("config", "num_tokens", "sparse"))
def prefill(
    config: ModelConfig,
    params: Params,
    prompts: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    seen: Bool[Array, "B V"] | None,
    *,
    keys: Key[Array, " B"],
    stages: Stages,
    num_tokens: int,
    sparse: VerticalSlash | None = None,
) -> tuple[Int[Array, " B"], Cache]:
    """The token after each prompt, and a cache of T slots that holds the prompts.

    Slots after a prompt's end hold padding: no query sees a slot past its own position, and by the time a row
    has come to a slot, it has written it.
    """
    positions = jnp.broadcast_to(jnp.arange(prompts.shape[1], dtype=jnp.int32), prompts.shape)
    positions = _split(positions, "bt")
    cache = make_cache(config, *prompts.shape, lengths=lengths, sparse=sparse)
    hidden, cache = forward(config, params, prompts, positions, cache=cache, sparse=sparse)
    # One position per prompt goes to the head: all of them would make [B, T, V] logits. Picked by a sum with one
    # term, which is exact, and has one meaning however the positions are split.
    last = jnp.where((positions == lengths[:, None] - 1)[..., None], hidden, 0).sum(axis=1, keepdims=True)
    return _choose(params, last, seen, keys, lengths, stages, num_tokens), cache


@functools.partial(jax.jit, static_argnames=("config", "num_tokens"), donate_argnames=("cache", "seen"))
def step(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, " B"],
    positions: Int[Array, " B"],
    cache: Cache,
    seen: Bool[Array, "B V"] | None,
    *,
    keys: Key[Array, " B"],
    stages: Stages,
    num_tokens: int,
) -> tuple[Int[Array, " B"], Int[Array, " B"], Cache, Bool[Array, "B V"] | None]:
    """The token after `tokens`, which stand at `positions`; and positions, cache and seen for the next step."""
    if seen is not None:
        seen |= jnp.arange(seen.shape[1]) == tokens[:, None]
    columns = (_split(x[:, None], "bt") for x in (tokens, positions))
    hidden, cache = forward(config, params, *columns, cache=cache)
    positions += 1
    return _choose(params, hidden, seen, keys, positions, stages, num_tokens), positions, cache, seen


def _choose(
    params: Params,
    hidden: Float[Array, "B 1 D"],
    seen: Bool[Array, "B V"] | None,
    keys: Key[Array, " B"],
    positions: Int[Array, " B"],
    stages: Stages,
    num_tokens: int,
) -> Int[Array, " B"]:
    """The token for each row at `positions`; its random numbers are a function of the row's key and the position."""
    scores = _split(logits(params, hidden)[:, 0], "b_")
    return sample(scores, jax.vmap(jax.random.fold_in)(keys, positions), stages, num_tokens=num_tokens, seen=seen)


def _split(x: Array | np.ndarray, letters: str) -> Array:
    """x with the sharding of its letters; "_" is a dimension that is whole everywhere."""
    return jax.sharding.reshard(jnp.asarray(x), sharding.activation(letters, x.shape))
