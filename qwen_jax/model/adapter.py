"""Adapters as trees of their own: made, put beside the parameters they adapt, and merged into them.

Such a tree has, where the parameters have a matrix `w`, the two arrays `lora_a` [r, inputs] and `lora_b` [outputs, r];
and for tables that are trained as they are, `w`. Its layers are stacked, or one by one, as those of the parameters.
"""

from __future__ import annotations

import functools
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Key, PRNGKeyArray

from qwen_jax import sharding
from qwen_jax.config import ModelConfig
from qwen_jax.model.transformer import Params, abstract
from qwen_jax.ops.dropout import Dropout
from qwen_jax.ops.lora import Adapted, merged
from qwen_jax.ops.quantized import Quantized

A, B = "lora_a", "lora_b"

# The letters of the outputs and of the inputs of each matrix that can be adapted, by its path in the stacked tree.
LETTERS = {
    "layers/attention/q": ("nh", "d"),
    "layers/attention/k": ("kh", "d"),
    "layers/attention/v": ("kh", "d"),
    "layers/attention/o": ("d", "nh"),
    "layers/mlp/gate": ("f", "d"),
    "layers/mlp/up": ("f", "d"),
    "layers/mlp/down": ("d", "f"),
    "layers/mlp/shared/gate": ("f", "d"),
    "layers/mlp/shared/up": ("f", "d"),
    "layers/mlp/shared/down": ("d", "f"),
}
TABLES = ("embed", "head")


def split_of(path: str, shape: Sequence[int]) -> P:
    """How an array of a stacked adapter is split, such as "layers/attention/q/lora_a" or "embed/w"."""
    module, kind = path.rsplit("/", 1)
    if module in TABLES:
        return sharding.weight("vd", shape)
    outputs, inputs = LETTERS[module]
    return P(None, *sharding.weight("r" + inputs if kind == A else outputs + "r", shape[1:]))


def init_adapter(config: ModelConfig, paths: Sequence[str], *, rank: int, key: PRNGKeyArray) -> Params:
    """An adapter that changes nothing yet, in float32, layers stacked, split over the current mesh.

    As in PEFT, `lora_a` is uniform within 1 / sqrt(inputs), and `lora_b` zero. The numbers are the same on any mesh.

    Args:
      config: of the model.
      paths: of the matrices, out of LETTERS.
      rank: r.
      key: of the random numbers.
    """
    params, arrays = abstract(config), {}
    for path in paths:
        layers, *shape = functools.reduce(lambda node, name: node[name], path.split("/"), params)["w"].shape
        outputs = len(LETTERS[path][0])
        a, b = (layers, rank, *shape[outputs:]), (layers, *shape[:outputs], rank)
        bound = math.prod(shape[outputs:]) ** -0.5
        random = functools.partial(jax.random.uniform, _for_path(key, path), minval=-bound, maxval=bound)
        arrays[f"{path}/{A}"] = random(a, jnp.float32, out_sharding=split_of(f"{path}/{A}", a))
        arrays[f"{path}/{B}"] = jnp.zeros(b, jnp.float32, out_sharding=split_of(f"{path}/{B}", b))
    return tree_of(arrays)


def tree_of(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The tree that has these leaves at these paths."""
    tree: dict[str, Any] = {}
    for path, leaf in arrays.items():
        *names, last = path.split("/")
        functools.reduce(lambda node, name: node.setdefault(name, {}), names, tree)[last] = leaf
    return tree


def attach(
    params: Params, adapter: Params, *, scale: float, dropout: float = 0.0, key: PRNGKeyArray | None = None
) -> Params:
    """The parameters with those that an adapter has adapted, or replaced; no number is computed.

    Args:
      params: stacked as the adapter is; tables that it replaces may be left out.
      adapter: its tree.
      scale: of its products.
      dropout: part of each adapter's inputs that is left out, in training.
      key: of what is left out, which is the same however layers are stored; None for no dropout.
    """

    def joined(params: Any, adapter: Mapping[str, Any], path: str) -> Any:
        if A in adapter:
            drop = Dropout(key=_of_layers(key, path, adapter[A]), rate=dropout) if dropout and key is not None else None
            return {**params, "w": Adapted(w=params["w"], a=adapter[A], b=adapter[B], dropout=drop, scale=scale)}
        below = lambda name, node: joined(params.get(name, {}), node, f"{path}{name}/")
        return {**params, **{k: below(k, node) if isinstance(node, Mapping) else node for k, node in adapter.items()}}

    return joined(params, adapter, "")


def merge(params: Params) -> Params:
    """Parameters in which nothing is adapted any more but what is quantised; the adapted ones given are used up."""

    def one(w: Any) -> Any:
        if not isinstance(w, Adapted):
            return w
        below = one(w.w)
        if isinstance(below, Quantized | Adapted):
            return Adapted(w=below, a=w.a, b=w.b, scale=w.scale)
        return _merged(below, w.a, w.b, w.scale)

    return jax.tree.map(one, params, is_leaf=lambda w: isinstance(w, Adapted))


# A matrix at a time, in its own place: there is no room for two models.
_merged = jax.jit(merged, static_argnums=3, donate_argnums=0)


def _for_path(key: PRNGKeyArray, path: str) -> PRNGKeyArray:
    return jax.random.fold_in(key, zlib.crc32(path.encode()) >> 1)


def _of_layers(key: PRNGKeyArray, path: str, a: Array) -> Key[Array, "..."]:
    """The key of a matrix of one layer, or those of a stack of them."""
    if single := re.match(r"layers_(\d+)/", path):
        return jax.random.fold_in(_for_path(key, f"layers/{path[single.end() :]}"), int(single[1]))
    return jax.vmap(jax.random.fold_in, (None, 0))(_for_path(key, path), jnp.arange(a.shape[0]))
