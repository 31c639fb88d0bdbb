"""The two shapes a tree of layers has, and the way from one to the other.

Stacked: `{"layers": tree of [L, ...]}`: what a scan over layers trains, and the one layout on disk.
One entry per layer: `{"layers_0": tree, "layers_1": tree, …}`: what decoding and training on CPU run, where slicing
a layer out of a stack costs a copy of its weights in every step. For decoding, kv heads may be repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from qwen_jax import sharding
from qwen_jax.errors import ConfigError
from qwen_jax.ops.attention import one_kv_head_per_device
from qwen_jax.ops.lora import Adapted
from qwen_jax.ops.quantized import Quantized

_PREFIX = "layers_"


def unstack_layers(tree: Any) -> Any:
    """Every `layers` entry in the tree (of parameters, or an optimiser's state of their shape) split by layer."""

    def split(node: dict) -> dict:
        stack = node["layers"]
        layers = range(jax.tree.leaves(stack)[0].shape[0])
        return {k: v for k, v in node.items() if k != "layers"} | {
            f"{_PREFIX}{i}": jax.tree.map(lambda x, i=i: x[i], stack) for i in layers
        }

    return _replace(tree, lambda node: "layers" in node, split)


def stack_layers(tree: Any) -> Any:
    """The inverse of `unstack_layers`."""

    def join(node: dict) -> dict:
        names = sorted((k for k in node if k.startswith(_PREFIX)), key=lambda name: int(name[len(_PREFIX) :]))
        stack = jax.tree.map(lambda *xs: jnp.stack(xs), *(node[name] for name in names))
        return {k: v for k, v in node.items() if not k.startswith(_PREFIX)} | {"layers": stack}

    return _replace(tree, lambda node: f"{_PREFIX}0" in node, join)


def repeat_kv_heads(params: Any) -> Any:
    """Parameters of one entry per layer, with at least one kv head for each device along `tensor`.

    Where a model has fewer, each is repeated for the devices that share it: a device then stores and reads its own
    alone, where those that cannot be split are whole on every device.

    Raises ConfigError where quantised heads would have to be repeated.
    """
    ways = sharding.axis_size("tensor")
    whole = lambda x: isinstance(x, Quantized | Adapted)

    def repeat(x: jax.Array | Quantized | Adapted) -> jax.Array | Quantized | Adapted:
        heads = x.shape[0]
        if heads % ways == 0:
            return x
        if isinstance(x, Quantized | Adapted):
            raise ConfigError(f"{heads} quantised kv heads cannot be split {ways} ways over mesh axis tensor")
        return jax.sharding.reshard(one_kv_head_per_device(x[None])[0], P("tensor", *jax.typeof(x).sharding.spec[1:]))

    def of_layer(layer: dict) -> dict:
        attention = layer["attention"]
        repeated = {name: jax.tree.map(repeat, attention[name], is_leaf=whole) for name in ("k", "v")}
        return {**layer, "attention": {**attention, **repeated}}

    return {name: of_layer(node) if name.startswith(_PREFIX) else node for name, node in params.items()}


def _replace(tree: Any, found: Callable[[dict], bool], change: Callable[[dict], dict]) -> Any:
    is_leaf = lambda node: isinstance(node, dict) and found(node)
    return jax.tree.map(lambda node: change(node) if is_leaf(node) else node, tree, is_leaf=is_leaf)
