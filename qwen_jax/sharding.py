"""Where arrays live: the mesh axes, and which axis each letter of an einsum is split over.

The letters are the ones the einsums of the model use; this file alone knows what they mean on a mesh.

  b batch      t query position   s key position   d width (residual stream)
  n heads      k kv heads         h head dim       f mlp width     e experts
  v vocabulary l layers

A run chooses only the sizes of the five axes. Every axis is Explicit: the sharding of an array is part of its
type, and an operation whose result could be laid out in two ways is an error until the code says which.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_jax.errors import ConfigError

AXES = ("data", "fsdp", "context", "expert", "tensor")

# Every axis that splits neither the sequence nor a head splits the batch, so no device repeats another's rows.
BATCH = ("data", "fsdp", "expert")

_WEIGHT = {"d": "fsdp", "n": "tensor", "k": "tensor", "f": "tensor", "v": "tensor", "e": "expert"}
_ACTIVATION = {"b": BATCH, "t": "context", "n": "tensor", "k": "tensor", "f": "tensor", "v": "tensor", "e": "expert"}

Axis = str | tuple[str, ...] | None


def make_mesh(
    *,
    data: int = 1,
    fsdp: int = 1,
    context: int = 1,
    expert: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh with the five axes of `AXES`, all Explicit, over `devices` (default: all there are)."""
    sizes = (data, fsdp, context, expert, tensor)
    devices = jax.devices() if devices is None else devices
    if math.prod(sizes) != len(devices):
        shape = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
        raise ConfigError(
            f"a mesh of {shape} needs {math.prod(sizes)} devices, and there are {len(devices)}; "
            f"choose sizes whose product is {len(devices)}"
        )
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Explicit,) * len(AXES), devices=devices)


def axis_size(axis: Axis) -> int:
    """How many ways `axis` of the current mesh splits a dimension."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[name] for name in ((axis,) if isinstance(axis, str) else axis or ()))


def platform() -> str:
    """What the current mesh is of: "tpu", "cpu", "gpu" or "cuda"; the mesh may be of devices that are not there."""
    return _abstract_device().platform


def device_kind() -> str:
    """The model of the current mesh's devices, such as "TPU v5 lite"."""
    return _abstract_device().device_kind


def _abstract_device():
    # Asked of the mesh, since what a program is compiled for need not be what it is compiled on.
    return jax.sharding.get_abstract_mesh().abstract_device


def balanced_columns(length: int) -> np.ndarray:
    """Which token of a sequence stands in each column of a batch, int [length].

    The sequence is cut into 2 C pieces, C being the size of `context`, and device i has pieces i and 2 C - 1 - i
    (zig-zag; The Llama 3 Herd of Models, 2024, section 3.3.2): late tokens see many keys and early ones few, and so
    every device has the same share of causal attention. Without a context axis the order is that of the sequence.
    """
    columns, ways = np.arange(length), axis_size("context")
    if ways == 1:
        return columns
    pieces = columns.reshape(2 * ways, -1)
    return np.stack([pieces[:ways], pieces[: -ways - 1 : -1]], axis=1).ravel()


def sequence_order(x: jax.Array, axis: int) -> jax.Array:
    """The inverse: an array whose `axis` has the columns of `balanced_columns`, in the order of the sequence."""
    ways, shape = axis_size("context"), x.shape
    pieces = x.reshape(*shape[:axis], ways, 2, -1, *shape[axis + 1 :])
    first, second = jnp.moveaxis(pieces, axis + 1, 0)
    return jnp.concatenate([first, jnp.flip(second, axis)], axis).reshape(shape)


def weight(letters: str, shape: Sequence[int]) -> P:
    """How a stored parameter is split."""
    return _split(_WEIGHT, letters, shape)


def gathered(letters: str, shape: Sequence[int]) -> P:
    """How a parameter is split while a layer uses it: as stored, but whole along fsdp."""
    return P(*(None if axis == "fsdp" else axis for axis in weight(letters, shape)))


def activation(letters: str, shape: Sequence[int]) -> P:
    """How an activation is split."""
    return _split(_ACTIVATION, letters, shape)


def _split(table: Mapping[str, Axis], letters: str, shape: Sequence[int]) -> P:
    axes: list[Axis] = []
    for letter, size in zip(letters, shape, strict=True):
        axis, ways = table.get(letter), axis_size(table.get(letter))
        if size % ways == 0:
            axes.append(axis)
        elif letter == "k":
            # The one place that allows it: with fewer kv heads than `tensor`, each device keeps all of them.
            axes.append(None)
        else:
            raise ConfigError(f"dimension {letter!r} of size {size} cannot be split {ways} ways over mesh axis {axis}")
    return P(*axes)


def gather(param: jax.Array, letters: str) -> jax.Array:
    """A parameter made whole along fsdp; its gradient is summed and split again on the way back."""
    return jax.sharding.reshard(param, gathered(letters, param.shape))


def put(
    shape: Sequence[int], dtype: np.dtype | type, letters: str, read: Callable[[tuple[slice, ...]], np.ndarray]
) -> jax.Array:
    """A global array of `shape`; `read(index)` is called on each host only for the parts its devices hold."""
    sharding = NamedSharding(jax.sharding.get_mesh(), activation(letters, shape))
    part = lambda index: np.asarray(read(index), dtype)
    return jax.make_array_from_callback(tuple(shape), sharding, part)
