"""The Online Merging Optimizer (arXiv 2405.17931): every step of alignment is merged with what came before it.

What the model had learned from its base before the run, `learned` (tau_r of the paper), pulls it a little back in each
step, and of both only a part counts: theta <- theta + (1 - alpha) F(change) + alpha F(learned).
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from train.alignment import OnlineMerging


class MergingState(NamedTuple):
    """What is carried from step to step.

    Attributes:
      count: int32 scalar, steps done.
      changes: the sum of those since the last merge, shaped and split like the parameters; None where each is merged.
    """

    count: Int[Array, ""]
    changes: Any


def online_merging(config: OnlineMerging, *, seed: int) -> optax.GradientTransformationExtraArgs:
    """Merges the changes of any optimiser, which come before it in a chain; the learning rate is in them.

    `update` takes `learned`, shaped and split like the parameters. Numbers are drawn anew in each step, as a function
    of the seed, the step and the place in the model; the largest are those of one matrix of one layer. With `every`
    above 1, steps between are the optimiser's own, and then their sum is merged in their place. With alpha = 0 and
    reserve = 1 the changes stay as they are, bit for bit.
    """

    def init(params: Any) -> MergingState:
        changes = jax.tree.map(jnp.zeros_like, params) if config.every > 1 else None
        return MergingState(jnp.zeros((), jnp.int32), changes)

    def update(change: Any, state: MergingState, params: Any = None, *, learned: Any, **_: Any) -> Any:
        del params
        key, count = jax.random.fold_in(jax.random.key(seed), state.count), state.count + 1
        merged = lambda total: _over_tensors(lambda k, a, b: _merged(config, k, a, b), key, total, learned)
        if state.changes is None:
            return merged(change), MergingState(count, None)
        before, total = state.changes, jax.tree.map(jnp.add, state.changes, change)
        due = count % config.every == 0
        change = jax.lax.cond(due, lambda: jax.tree.map(jnp.subtract, merged(total), before), lambda: change)
        return change, MergingState(count, jax.tree.map(lambda x: jnp.where(due, 0, x), total))

    return optax.GradientTransformationExtraArgs(init, update)


def _merged(
    config: OnlineMerging, key: PRNGKeyArray, change: Float[Array, "..."], learned: Float[Array, "..."]
) -> Float[Array, "..."]:
    """One matrix's part of the sum. Where they have opposite signs, `ties` takes the larger alone."""
    if config.method == "dare":
        first, second = jax.random.split(key)
        return (1 - config.alpha) * drawn(first, change, config.reserve) + config.alpha * drawn(
            second, learned, config.reserve
        )
    a = (1 - config.alpha) * largest(change, config.reserve)
    b = config.alpha * largest(learned, config.reserve)
    larger = jnp.where(jnp.abs(a) >= jnp.abs(b), a, b)
    return jnp.where(jnp.sign(a) * jnp.sign(b) < 0, larger, a + b)


def drawn(key: PRNGKeyArray, x: Float[Array, "..."], reserve: float) -> Float[Array, "..."]:
    """Each number with probability `reserve`, else 0; as in the paper's formula, what stays is not made larger."""
    chance = jax.random.uniform(key, x.shape, jnp.float32, out_sharding=jax.typeof(x).sharding.spec)
    return jnp.where(chance < reserve, x, 0)


def largest(x: Float[Array, "..."], reserve: float) -> Float[Array, "..."]:
    """The fraction `reserve` of the numbers that are furthest from 0, at least one, and 0 for the others.

    Those that are as far as the last of them stay as well. It is found bit by bit, as sizes of floats sort like their
    bits: 31 counts of an array that stays split, where sorting would gather it.
    """
    keep = max(1, round(reserve * x.size))
    bits = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32)

    def lower(i: jax.Array, least: jax.Array) -> jax.Array:
        candidate = least | (1 << (30 - i))
        return jnp.where(jnp.sum(bits >= candidate, dtype=jnp.int32) >= keep, candidate, least)

    return jnp.where(bits >= jax.lax.fori_loop(0, 31, lower, jnp.int32(0)), x, 0)


def _over_tensors(of_one: Callable[..., jax.Array], key: PRNGKeyArray, *trees: Any) -> Any:
    """`of_one(key, *leaves)` of each matrix of each layer, whether they are stacked or not: the same numbers."""

    def leaf(path: tuple[Any, ...], *leaves: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        layer = re.match(r"layers_(\d+)/", name)
        own = jax.random.fold_in(key, zlib.crc32((f"layers/{name[layer.end() :]}" if layer else name).encode()) >> 1)
        if layer:
            return of_one(jax.random.fold_in(own, int(layer[1])), *leaves)
        if not name.startswith("layers/"):
            return of_one(own, *leaves)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(own, jnp.arange(leaves[0].shape[0]))
        return jax.lax.map(lambda each: of_one(*each), (keys, *leaves))

    return jax.tree_util.tree_map_with_path(leaf, *trees)
