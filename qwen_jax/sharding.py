"""Where arrays live: the mesh axes, and which axis each letter of an einsum is split over.

The letters are the ones the einsums of the model use; this file alone knows what they mean on a mesh.

  b batch      t query position   s key position   d width (residual stream)
  n heads      k kv heads         h head dim       f mlp width     e experts
  v vocabulary l layers

A run chooses only the sizes of the five axes. Every axis is Explicit: the sharding of an array is part of its
type, and an operation whose result could be laid out in two ways is an error until the code says which.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_jax.errors import ConfigError

AXES = ("data", "fsdp", "context", "expert", "tensor")

# Every axis that splits neither the sequence nor a head splits the batch, so no device repeats another's rows.
BATCH = ("data", "fsdp", "expert")

# Rows that any device may take: as many ways as there are devices, but for those along the sequence.
ROWS = (*BATCH, "tensor")

# Whatever splits tokens: a gradient of a parameter is summed over these.
TOKENS = (*BATCH, "context")

_WEIGHT = {"n": "tensor", "k": "tensor", "f": "tensor", "v": "tensor", "e": "expert"}
_ACTIVATION = {"b": BATCH, "t": "context", "n": "tensor", "k": "tensor", "f": "tensor", "v": "tensor", "e": "expert"}

# What JAX calls the chips, and what everybody else does.
_GENERATIONS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU7x": "v7x"}

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
    """A mesh with the five axes of `AXES`, all Explicit, over `devices` (default: all there are).

    TPU slices, between which the network is slower, are put along `data`, which must be a multiple of their number.
    """
    sizes = (data, fsdp, context, expert, tensor)
    devices = jax.devices() if devices is None else devices
    if math.prod(sizes) != len(devices):
        shape = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
        raise ConfigError(
            f"a mesh of {shape} needs {math.prod(sizes)} devices, and there are {len(devices)}; "
            f"choose sizes whose product is {len(devices)}"
        )
    slices: dict[int, list[jax.Device]] = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", 0), []).append(device)
    if data % len(slices):
        raise ConfigError(f"data={data} must be a multiple of the {len(slices)} TPU slices: no other axis spans them")
    within = (data // len(slices), *sizes[1:])
    grid = np.concatenate([_on_torus(within, of_slice) for of_slice in slices.values()])
    return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def _on_torus(sizes: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices of one slice in the shape `sizes`, so that the rings of each axis are lines of the torus."""
    rings = [_rings(size, devices[0].device_kind) for size in sizes]
    grid = mesh_utils.create_device_mesh(
        [ring for of_axis in rings for ring in of_axis], devices, allow_split_physical_axes=True
    )
    return grid.reshape(sizes)


def _rings(size: int, device_kind: str) -> tuple[int, ...]:
    """The sizes, whose product is `size`, of the rings that a collective over an axis goes round, one after the other.

    The compiler for TPU turns a reduce-scatter over more than one dimension of the torus into an all-reduce, which
    moves twice the bytes, and some all-gathers too; along one dimension they stay what they are. So the axis is taken
    apart like the torus of that many chips: into two powers of two for chips in a plane (v5e, v6e), three for others.
    """
    if not device_kind.startswith("TPU") or size & (size - 1) or size < 8:
        return (size,)
    dimensions = 2 if "lite" in device_kind else 3
    exponent = size.bit_length() - 1
    return tuple(2 ** ((exponent + i) // dimensions) for i in range(dimensions))


def axis_size(axis: Axis) -> int:
    """How many ways `axis` of the current mesh splits a dimension."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[name] for name in names_of(axis))


def platform() -> str:
    """What the current mesh is of: "tpu", "cpu", "gpu" or "cuda"; the mesh may be of devices that are not there."""
    return _abstract_device().platform


def tpu_generation() -> str | None:
    """Of the current mesh's chips: "v5e", "v5p" and so on; None if they are no TPU that we have kernels for."""
    return _GENERATIONS.get(_abstract_device().device_kind)


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
    """How a stored parameter is split.

    fsdp takes the first of vocabulary, mlp width and width that it divides: what a device holds is then one run of
    rows wherever that is possible, and neither a gather nor a scatter has to turn anything around.
    """
    axes = [names_of(axis) for axis in gathered(letters, shape)]
    for i, letter in enumerate(letters):
        if letter in "vfd" and shape[i] % axis_size((*axes[i], "fsdp")) == 0:
            axes[i] = (*axes[i], "fsdp")
            break
    else:
        if "d" in letters:
            ways, sizes = axis_size("fsdp"), " x ".join(map(str, shape))
            raise ConfigError(
                f"mesh axis fsdp of size {ways} divides no dimension of a parameter of {sizes} ({letters})"
            )
    return P(*axes)


def gathered(letters: str, shape: Sequence[int]) -> P:
    """How a parameter is split while a layer uses it: as stored, but whole along fsdp."""
    return _split(_WEIGHT, letters, shape)


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
    """A parameter made whole along fsdp. The way back is for `scatter`, not for autodiff."""
    spec = weight(letters, param.shape)
    whole = functools.partial(all_gather, axis=fsdp_dimension(spec))
    whole = jax.shard_map(whole, in_specs=spec, out_specs=gathered(letters, param.shape), check_vma=False)
    return whole(jax.sharding.reshard(param, spec))


def scatter(gradient: jax.Array, letters: str) -> jax.Array:
    """The sum over all tokens of the gradient of a parameter, split as the parameter is.

    Args:
      gradient: of type `unreduced_gradient(letters)`: each device has the sum over its own tokens.
    """
    spec = weight(letters, gradient.shape)
    whole = functools.partial(reduce_scatter, axis=fsdp_dimension(spec))
    kind = unreduced_gradient(letters, gradient.shape)
    return jax.shard_map(whole, in_specs=kind, out_specs=spec, check_vma=False)(gradient)


def fsdp_dimension(spec: P) -> int | None:
    """The dimension that fsdp splits, if any."""
    return next((i for i, axis in enumerate(spec) if "fsdp" in names_of(axis)), None)


def whole_along_fsdp(spec: P) -> P:
    """A way to split, without the axis fsdp."""
    return P(*(tuple(name for name in names_of(axis) if name != "fsdp") for axis in spec))


def names_of(axis: Axis) -> tuple[str, ...]:
    """The mesh axes that split a dimension, as an entry of a PartitionSpec has them."""
    return (axis,) if isinstance(axis, str) else axis or ()


def unreduced_gradient(letters: str, shape: Sequence[int]) -> P:
    """The type of a product that is the gradient of a parameter before it is summed over the devices."""
    return P(*gathered(letters, shape), unreduced=frozenset(TOKENS))


def all_gather(param: jax.Array, axis: int | None) -> jax.Array:
    """Inside shard_map: a parameter made whole along fsdp, by which its `axis` is split, or none."""
    # Between one device and itself the CPU backend would still copy it, turned around where need be.
    if axis is None or axis_size("fsdp") == 1:
        return param
    for groups in reversed(_groups()):
        param = jax.lax.all_gather(param, "fsdp", axis=axis, axis_index_groups=groups, tiled=True)
    return param


def reduce_scatter(gradient: jax.Array, axis: int | None, over: Sequence[str] = TOKENS) -> jax.Array:
    """Inside shard_map: the sum over all tokens of a gradient, its `axis` split by fsdp, or none.

    `over` are the mesh axes along which devices have other tokens' parts of it.
    """
    if axis is None or axis_size("fsdp") == 1:
        return jax.lax.psum(gradient, over)
    for groups in _groups():
        gradient = jax.lax.psum_scatter(gradient, "fsdp", scatter_dimension=axis, axis_index_groups=groups, tiled=True)
    return jax.lax.psum(gradient, [axis for axis in over if axis != "fsdp"])


def _groups() -> list[list[list[int]] | None]:
    """For each ring of fsdp, the indices along fsdp of the devices that it joins; None for all of them."""
    rings = _rings(axis_size("fsdp"), _abstract_device().device_kind)
    if len(rings) == 1:
        return [None]
    index = np.arange(math.prod(rings)).reshape(rings)
    return [np.moveaxis(index, i, -1).reshape(-1, ring).tolist() for i, ring in enumerate(rings)]


def whole(x: jax.Array) -> jax.Array:
    """The array on every device, so that each host can read all of it."""
    return jax.sharding.reshard(x, P(*[None] * x.ndim))


def put(
    shape: Sequence[int], dtype: np.dtype | type, letters: str, read: Callable[[tuple[slice, ...]], np.ndarray]
) -> jax.Array:
    """A global array of `shape`; `read(index)` is called on each host only for the parts its devices hold."""
    sharding = NamedSharding(jax.sharding.get_mesh(), activation(letters, shape))
    part = lambda index: np.asarray(read(index), dtype)
    return jax.make_array_from_callback(tuple(shape), sharding, part)
