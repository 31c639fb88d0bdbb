"""A quantised weight onto the current mesh: every process reads the slices its devices hold, and no more."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_jax import sharding
from qwen_jax.ops.quantized import Quantized, is_packed, split
from qwen_jax.weights.quantized import QuantizedTensors, unpack

Index = tuple[slice, ...]
Place = tuple[str, slice]  # a published tensor, and the rows of it that are meant


def load_quantized(
    tensors: QuantizedTensors,
    places: Sequence[Place],
    leaf: jax.ShapeDtypeStruct,
    *,
    shape: Sequence[int],
    outputs: int,
) -> Quantized:
    """A weight, or those of the experts.

    Args:
      tensors: of the folder.
      places: where the weight is, or that of each expert.
      leaf: its shape, and how it would be split if it were not quantised.
      shape: of one of `places`.
      outputs: how many of its axes are outputs.
    """
    (name, rows), size = places[0], math.prod(shape[outputs:])
    stack, how, packed = leaf.shape[: len(leaf.shape) - len(shape)], tensors.of(name), is_packed()
    groups = how.groups(size)

    def numbers(name: str, index: Index) -> np.ndarray:
        of_groups, in_group, columns = index
        start, stop = (i * (size // groups) for i in (of_groups.start, of_groups.stop - 1))
        words = tensors.words(name, slice(start + in_group.start, stop + in_group.stop), columns)
        found = unpack(words, how.bits).astype(np.int16) - how.middle
        return found.reshape(of_groups.stop - of_groups.start, -1, found.shape[1])

    def words(name: str, index: Index) -> np.ndarray:
        return tensors.words(name, slice(index[0].start * how.count, index[0].stop * how.count), index[1])

    readers: dict[str, Callable[[str, Index], np.ndarray]] = {
        "values": words if packed else numbers,
        "scales": lambda name, index: tensors.scales(name, *index),
        "zeros": lambda name, index: tensors.zeros(name, *index),
    }
    kind = np.dtype(np.int32) if packed else np.dtype(jnp.int4 if how.bits == 4 else jnp.int8)
    of_values = (size // how.count,) if packed else (groups, size // groups)
    like = lambda dtype, *inner: jax.ShapeDtypeStruct((*stack, *inner, rows.stop - rows.start), dtype)
    arrays: dict[str, Any] = {"values": like(kind, *of_values), "scales": like(tensors.scales_dtype(name), groups)}
    arrays["zeros"] = None if how.symmetric else like(np.dtype(np.int8), groups)
    assert isinstance(leaf.sharding, NamedSharding)
    whole = sharding.whole_along_fsdp(leaf.sharding.spec)
    splits = split(whole, outputs, Quantized(**arrays, bits=how.bits, shape=leaf.shape))
    for field in [field for field, array in arrays.items() if array is not None]:
        arrays[field] = _array(places, bool(stack), arrays[field], getattr(splits, field), readers[field])
    return Quantized(**arrays, bits=how.bits, shape=leaf.shape)


def _array(
    places: Sequence[Place],
    stacked: bool,
    like: jax.ShapeDtypeStruct,
    split: P,
    read: Callable[[str, Index], np.ndarray],
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

    return jax.make_array_from_callback(like.shape, NamedSharding(jax.sharding.get_mesh(), split), part)
