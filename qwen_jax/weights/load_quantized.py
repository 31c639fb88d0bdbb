"""A quantised weight on the current mesh: every process reads the slices its devices hold, and no more."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from qwen_jax import sharding
from qwen_jax.ops.quantized import Quantized, is_packed, split
from qwen_jax.weights.hf_quantization import Quantization
from qwen_jax.weights.quantized import QuantizedTensors, unpack

Index = tuple[slice, ...]
Place = tuple[str, slice]  # a published tensor, and the rows of it that are meant


def abstract_quantized(
    leaf: jax.ShapeDtypeStruct, *, shape: Sequence[int], outputs: int, how: Quantization, looked_up: bool
) -> Quantized:
    """Shapes, types and shardings of a weight, or those of the experts.

    Args:
      leaf: its shape, with a first axis of experts, and how it would be split if it were not quantised.
      shape: without experts.
      outputs: how many of these axes are outputs.
      how: it is stored.
      looked_up: whether its outputs are, one by one.
    """
    assert isinstance(leaf.sharding, NamedSharding)
    stack, inputs = leaf.shape[: len(leaf.shape) - len(shape)], math.prod(shape[outputs:])
    groups, width = how.groups(inputs), math.prod(shape[:outputs])
    like = lambda dtype, *inner: jax.ShapeDtypeStruct((*stack, *inner, width), dtype)
    if is_packed():
        values = like(jnp.int32, inputs // how.count)
    elif looked_up:
        values = jax.ShapeDtypeStruct((width, inputs), jnp.int8)
    else:
        values = like(jnp.int4 if how.bits == 4 else jnp.int8, groups, inputs // groups)
    arrays: dict[str, Any] = {"values": values, "scales": like(jnp.dtype(how.scales), groups)}
    arrays["zeros"] = None if how.symmetric else like(jnp.int8, groups)
    found = Quantized(**arrays, bits=how.bits, shape=leaf.shape)
    splits = split(sharding.whole_along_fsdp(leaf.sharding.spec), outputs, found)
    mesh = jax.sharding.get_mesh()
    put = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
    return jax.tree.map(put, found, splits)


def load_quantized(tensors: QuantizedTensors, places: Sequence[Place], like: Quantized) -> Quantized:
    """A weight, or those of the experts.

    Args:
      tensors: of the folder.
      places: where the weight is, or that of each expert.
      like: what `abstract_quantized` gives.
    """
    how = tensors.of(places[0][0])

    def numbers(name: str, index: Index) -> np.ndarray:
        of_groups, in_group, columns = index
        size = like.values.shape[-2]
        start, stop = of_groups.start * size + in_group.start, (of_groups.stop - 1) * size + in_group.stop
        found = unpack(tensors.words(name, slice(start, stop), columns), how.bits).astype(np.int16) - how.middle
        return found.reshape(of_groups.stop - of_groups.start, -1, found.shape[1])

    def rows(name: str, index: Index) -> np.ndarray:
        outputs, inputs = index
        return numbers(name, (slice(0, 1), inputs, outputs))[0].T

    def words(name: str, index: Index) -> np.ndarray:
        return tensors.words(name, slice(index[0].start * how.count, index[0].stop * how.count), index[1])

    stacked = like.scales.ndim == 3
    array = lambda like, read: _array(places, stacked, like, read)
    return dataclasses.replace(
        like,
        values=array(like.values, words if like.packed else rows if like.is_table else numbers),
        scales=array(like.scales, lambda name, index: tensors.scales(name, *index)),
        zeros=None if like.zeros is None else array(like.zeros, lambda name, index: tensors.zeros(name, *index)),
    )


def _array(
    places: Sequence[Place], stacked: bool, like: jax.ShapeDtypeStruct, read: Callable[[str, Index], np.ndarray]
) -> jax.Array:
    """One array of the weight, of which `read(name, index)` is a slice of one tensor."""

    def of_place(place: Place, index: Index) -> np.ndarray:
        name, rows = place
        columns = slice(rows.start + index[-1].start, rows.start + index[-1].stop)
        return read(name, (*index[:-1], columns)).astype(like.dtype, copy=False)

    def part(cut: Index | None) -> np.ndarray:
        index = tuple(slice(*s.indices(size)[:2]) for s, size in zip(cut or (), like.shape, strict=True))
        if not stacked:
            return of_place(places[0], index)
        return np.stack([of_place(place, index[1:]) for place in places[index[0]]])

    return jax.make_array_from_callback(like.shape, like.sharding, part)
