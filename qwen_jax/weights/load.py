"""The parameters of a model onto the current mesh: every process reads the slices its devices hold, and no more."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.config import DType, ModelConfig, Moe
from qwen_jax.errors import ModelError
from qwen_jax.model import Params, abstract, attach, merge, stack_layers, unstack_layers
from qwen_jax.model.adapter import split_of, tree_of
from qwen_jax.ops.quantized import Quantized
from qwen_jax.weights import hf
from qwen_jax.weights.adapted import AdaptedModel, Adapter
from qwen_jax.weights.hf_quantization import Quantization
from qwen_jax.weights.load_quantized import abstract_quantized, load_quantized
from qwen_jax.weights.source import Model, NativeCheckpoint, PublishedFolder


def load_params(model: Model, *, dtype: DType, stacked: bool) -> Params:
    """The parameters in `dtype`, split over the current mesh as `model.abstract` says.

    An adapter is merged into them, but stays beside what is quantised.

    Args:
      model: where they are. Weights that are quantised there are so here.
      dtype: all others are cast to it.
      stacked: whether layers are one tree of [L, ...] arrays, or one tree each.

    Raises ModelError if the files are damaged, ConfigError if quantised weights cannot be split over the mesh.
    """
    if isinstance(model, AdaptedModel):
        base = load_params(model.base, dtype=dtype, stacked=stacked)
        adapter = load_adapter(model.adapter, dtype=dtype, stacked=stacked)
        return merge(attach(base, adapter, scale=model.adapter.scale))
    if isinstance(model, NativeCheckpoint):
        params = model.checkpoint.load("params", abstract(model.config))
        params = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), params)
        return params if stacked else unstack_layers(params)
    assert isinstance(model, PublishedFolder), "other models are read piece by piece"
    if stacked and model.quantized.names:
        return _stacked(load_params(model, dtype=dtype, stacked=False), model)
    quantized = {name: model.quantized.of(name) for name in model.quantized.names}
    wanted = abstract_params(model.config, model.table, dtype=dtype, stacked=stacked, quantized=quantized)
    found = _parts(model.table)
    read = _reader(model, found)

    def load(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct | Quantized) -> jax.Array | Quantized:
        name = _name(path)
        if isinstance(leaf, Quantized):
            places = _places(found, *_stacked_path(name), model.config.moe)
            return load_quantized(model.quantized, [(tensor.name, rows) for tensor, _, rows in places], leaf)
        part = lambda index: read(name, leaf.shape, index).astype(dtype, copy=False)
        return jax.make_array_from_callback(leaf.shape, cast(jax.sharding.Sharding, leaf.sharding), part)

    return cast(Params, jax.tree.map_with_path(load, wanted, is_leaf=_is_quantized))


def load_adapter(adapter: Adapter, *, dtype: DType, stacked: bool) -> Params:
    """An adapter's tree on the current mesh: its matrices in float32, and what takes the place of tables in `dtype`."""

    def put(path: str, array: np.ndarray) -> jax.Array:
        values = array.astype(jnp.dtype(dtype)) if path.endswith("/w") else array
        split = jax.sharding.NamedSharding(jax.sharding.get_mesh(), split_of(path, array.shape))
        return jax.make_array_from_callback(array.shape, split, lambda index: values[index])

    tree = tree_of({path: put(path, array) for path, array in adapter.arrays.items()})
    return tree if stacked else unstack_layers(tree)


def _stacked(params: Params, model: Model) -> Params:
    layers = [params[f"layers_{i}"] for i in range(model.config.num_layers)]
    if len({jax.tree.structure(layer) for layer in layers}) > 1:
        raise ModelError(f"{model.path} has layers that are not quantised alike, which cannot be stacked")
    return jax.jit(stack_layers)(params)


def abstract_params(
    config: ModelConfig,
    table: Sequence[hf.Tensor],
    *,
    dtype: DType,
    stacked: bool,
    quantized: Mapping[str, Quantization],
) -> Params:
    """Shapes, types and shardings of parameters on the current mesh, as `load_params` gives them.

    Args:
      config, table: of the model.
      dtype, stacked: as for `load_params`.
      quantized: published tensors that are, and how.

    Raises ModelError where some experts are and some are not, ConfigError where they cannot be split over the mesh.
    """
    shapes, found = abstract(config), _parts(table)
    shapes = shapes if stacked else jax.eval_shape(unstack_layers, shapes)

    def one(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct | Quantized:
        places = _places(found, *_stacked_path(_name(path)), config.moe)
        hows = {quantized.get(tensor.name) for tensor, _, _ in places}
        if len(hows) > 1:
            raise ModelError(f"experts such as {places[0][0].name} are not quantised alike, and only that is read")
        if how := next(iter(hows), None):
            tensor, part, rows = places[0]
            outputs, looked_up = hf.output_axes(part, rows), tensor.name == how.embedding
            return abstract_quantized(leaf, shape=part.shape, outputs=outputs, how=how, looked_up=looked_up)
        whole = jax.sharding.NamedSharding(jax.sharding.get_mesh(), leaf.sharding.spec)
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=whole)

    return cast(Params, jax.tree.map_with_path(one, shapes))


def _is_quantized(leaf: object) -> bool:
    return isinstance(leaf, Quantized)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


# An array, or one layer or expert of it, and the rows of the published tensor that it is.
_Place = tuple[hf.Tensor, hf.Part, slice]
_Parts = Mapping[tuple[str, tuple[int, ...]], _Place]


def _parts(table: Sequence[hf.Tensor]) -> _Parts:
    return {
        (part.path, part.stack): (tensor, part, rows)
        for tensor in table
        for part, rows in zip(tensor.parts, tensor.rows, strict=True)
    }


def _stacked_path(path: str) -> tuple[str, tuple[int, ...]]:
    """Where an array is in the stacked tree: its path, and the layer if it is one of several."""
    if single := re.match(r"layers_(\d+)/", path):
        return f"layers/{path[single.end() :]}", (int(single[1]),)
    return path, ()


def _places(found: _Parts, path: str, stack: tuple[int, ...], moe: Moe | None) -> list[_Place]:
    """Where an array is, or those of the experts that it holds; nothing where it is a stack of layers."""
    experts = [(path, (*stack, e)) for e in range(moe.num_experts if moe else 0)]
    return [found[key] for key in [(path, stack), *experts] if key in found]


def _reader(model: PublishedFolder, found: _Parts) -> Callable[[str, tuple[int, ...], tuple[slice, ...]], np.ndarray]:
    """What reads a slice of one of our arrays, stacked or of one layer, from the published tensors it is made of."""

    def gather(path: str, stack: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
        """The slice of an array below the indices `stack`, of which there may be more to come."""
        if (path, stack) not in found:
            return np.stack([gather(path, (*stack, i), index[1:]) for i in range(index[0].start, index[0].stop)])
        tensor, part, rows = found[path, stack]
        values = model.files.read(tensor.name, _published(part, rows, index))
        return values.reshape([s.stop - s.start for s in index])

    def read(path: str, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
        index = tuple(slice(*s.indices(size)[:2]) for s, size in zip(index, shape, strict=True))
        return gather(*_stacked_path(path), index)

    return read


def _published(part: hf.Part, rows: slice, index: tuple[slice, ...]) -> tuple[slice, ...]:
    """The rows and columns of a published tensor, of which `rows` are this part, that are `index` of the part."""
    outputs = hf.output_axes(part, rows)
    row = _joined(part.shape[:outputs], index[:outputs])
    down = slice(rows.start + row.start, rows.start + row.stop)
    return (down,) if outputs == len(part.shape) else (down, _joined(part.shape[outputs:], index[outputs:]))


def _joined(shape: tuple[int, ...], index: tuple[slice, ...]) -> slice:
    """The slice of an axis made of several, of which only the first is cut."""
    inner = math.prod(shape[1:])
    if math.prod(s.stop - s.start for s in index[1:]) != inner:
        raise ValueError(f"{index} of {shape} is not one run: only the first of these dimensions can be split")
    return slice(index[0].start * inner, index[0].stop * inner)
