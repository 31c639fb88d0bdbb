"""The parameters of a model onto the current mesh: every process reads the slices its devices hold, and no more."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.config import DType
from qwen_jax.model import Params, abstract, unstack_layers
from qwen_jax.weights import hf
from qwen_jax.weights.source import NativeCheckpoint, PublishedFolder


def load_params(model: PublishedFolder | NativeCheckpoint, *, dtype: DType, stacked: bool) -> Params:
    """The parameters in `dtype`, split over the current mesh as `model.abstract` says.

    Args:
      model: where they are.
      dtype: they are cast to it.
      stacked: whether layers are one tree of [L, ...] arrays, or one tree each.

    Raises ModelError if the files are damaged.
    """
    if isinstance(model, NativeCheckpoint):
        params = model.checkpoint.load("params", abstract(model.config))
        params = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), params)
        return params if stacked else unstack_layers(params)
    shapes = abstract(model.config)
    shapes = shapes if stacked else jax.eval_shape(unstack_layers, shapes)
    read = _reader(model)

    def load(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        part = lambda index: read(name, leaf.shape, index).astype(dtype, copy=False)
        sharding = jax.sharding.NamedSharding(jax.sharding.get_mesh(), leaf.sharding.spec)
        return jax.make_array_from_callback(leaf.shape, sharding, part)

    return cast(Params, jax.tree.map_with_path(load, shapes))


def _reader(model: PublishedFolder) -> Callable[[str, tuple[int, ...], tuple[slice, ...]], np.ndarray]:
    """What reads a slice of one of our arrays, stacked or of one layer, from the published tensors it is made of."""
    found: dict[tuple[str, tuple[int, ...]], tuple[hf.Tensor, hf.Part, slice]] = {}
    for tensor in model.table:
        for part, rows in zip(tensor.parts, tensor.rows, strict=True):
            found[part.path, part.stack] = (tensor, part, rows)

    def gather(path: str, stack: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
        """The slice of an array below the indices `stack`, of which there may be more to come."""
        if (path, stack) not in found:
            return np.stack([gather(path, (*stack, i), index[1:]) for i in range(index[0].start, index[0].stop)])
        tensor, part, rows = found[path, stack]
        values = model.files.read(tensor.name, _published(part, rows, index))
        return values.reshape([s.stop - s.start for s in index])

    def read(path: str, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
        index = tuple(slice(*s.indices(size)[:2]) for s, size in zip(index, shape, strict=True))
        if single := re.match(r"layers_(\d+)/", path):
            return gather(f"layers/{path[single.end() :]}", (int(single[1]),), index)
        return gather(path, (), index)

    return read


def _published(part: hf.Part, rows: slice, index: tuple[slice, ...]) -> tuple[slice, ...]:
    """The rows and columns of a published tensor, of which `rows` are this part, that are `index` of the part."""
    outputs = next(n for n in range(1, len(part.shape) + 1) if math.prod(part.shape[:n]) == rows.stop - rows.start)
    row = _joined(part.shape[:outputs], index[:outputs])
    down = slice(rows.start + row.start, rows.start + row.stop)
    return (down,) if outputs == len(part.shape) else (down, _joined(part.shape[outputs:], index[outputs:]))


def _joined(shape: tuple[int, ...], index: tuple[slice, ...]) -> slice:
    """The slice of an axis made of several, of which only the first is cut."""
    inner = math.prod(shape[1:])
    if math.prod(s.stop - s.start for s in index[1:]) != inner:
        raise ValueError(f"{index} of {shape} is not one run: only the first of these dimensions can be split")
    return slice(index[0].start * inner, index[0].stop * inner)
