"""Engines that follow the weights being trained: they answer with them as they are, on the devices they are on."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qwen_jax import sharding
from qwen_jax.config import ModelConfig
from qwen_jax.engine import Capacity, Engine, Replicas
from qwen_jax.errors import ConfigError
from qwen_jax.model import Params, unstack_layers
from qwen_jax.ops.lora import Adapted, merged
from qwen_jax.ops.quantized import Quantized
from train.adapter import NOTHING, Frozen, join
from train.config import LoRA


class Follower:
    """The engines of a run: what they compute with is compiled once, and takes memory only while they are asked.

        follower = Follower(config.model_config, num_tokens=tokenizer.num_tokens, mesh=mesh, capacity=Capacity(...))
        with follower.at(state.params) as replicas:
            generate(replicas, jobs)

    An adapter is merged into what it adapts, as in the model that the run leaves, and stays beside what is quantised.
    Each host has engines of its own, on its own devices, and no step of theirs waits for another host.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_tokens: int,
        mesh: Mesh,
        capacity: Capacity,
        adapter: LoRA | None = None,
        tensor: int | None = None,
    ) -> None:
        """
        Args:
          config: of the model; the engines compute in its dtype.
          num_tokens: tokens the tokenizer has.
          mesh: that of the training.
          capacity: how much an engine does at a time.
          adapter: what is trained, where it is not the whole model.
          tensor: devices of an engine, as `engines_mesh` has it.
        """
        self._config = dataclasses.replace(config, param_dtype=config.dtype)
        self._num_tokens, self._capacity = num_tokens, capacity
        self._trained_on, self._all = mesh, engines_mesh(mesh, config, tensor)
        meshes = (engine_mesh(self._all, number) for number in range(self._all.shape["data"]))
        self._meshes = [own for own in meshes if own.devices.flat[0].process_index == jax.process_index()]
        self._ready = prepare(config, adapter)
        self._engines: list[Engine] = []

    @contextlib.contextmanager
    def at(self, params: Params, frozen: Frozen = NOTHING) -> Iterator[Replicas]:
        """This host's engines with these weights; what is asked must be done, or cancelled, when this ends.

        Args:
          params: that are trained, on the mesh; their layers stacked or one by one. They stay.
          frozen: what is beside them.
        """
        with jax.set_mesh(self._trained_on):
            ready = self._ready(params, Frozen(base=frozen.base))
        with jax.set_mesh(self._all):  # which has the devices in another order than the loop's, that is current
            whole = jax.tree.map(lambda x: jax.device_put(x, along_tensor(jax.typeof(x), self._all)), ready)
        del ready
        for number, mesh in enumerate(self._meshes):
            own = jax.tree.map(functools.partial(_part, mesh=mesh), whole)
            if number < len(self._engines):
                self._engines[number].swap(own)
            else:
                shape = dict(num_tokens=self._num_tokens, mesh=mesh, capacity=self._capacity)
                self._engines.append(Engine(self._config, own, **shape))
        # What is timed from here on is the engines' work alone, and not what is left of the step before.
        jax.block_until_ready(whole)
        del whole, own
        try:
            yield Replicas(self._engines)
        finally:
            for engine in self._engines:
                engine.release()


def engines_mesh(mesh: Mesh, config: ModelConfig, tensor: int | None) -> Mesh:
    """The devices of a mesh with one engine after the other along `data`, and what an engine has along `tensor`.

    Args:
      mesh: of the training.
      config: of the model.
      tensor: devices of an engine, all of one host; None for as many as share its kv heads evenly.

    Raises ConfigError where a host's devices, or the model, cannot be split so.
    """
    of_host: dict[int, list[jax.Device]] = {}
    for device in mesh.devices.flat:
        of_host.setdefault(device.process_index, []).append(device)
    count = math.gcd(*map(len, of_host.values()))
    fitting = [size for size in config.tensor_sizes if count % size == 0]
    if tensor is None:
        tensor = max(size for size in fitting if config.num_kv_heads % size == 0)
    elif tensor not in fitting:
        can_be = ", ".join(map(str, fitting))
        raise ConfigError(
            f"objective.rollout.tensor={tensor} devices cannot share this model, of the {count} that a host has; it "
            f"can be {can_be}"
        )
    grid = np.array([device for host in sorted(of_host) for device in of_host[host]]).reshape(-1, 1, 1, 1, tensor)
    return Mesh(grid, mesh.axis_names, axis_types=mesh.axis_types)


def engine_mesh(mesh: Mesh, number: int) -> Mesh:
    """The devices of one of the engines of `engines_mesh`."""
    return Mesh(mesh.devices[number : number + 1], mesh.axis_names, axis_types=mesh.axis_types)


def along_tensor(x: Any, mesh: Mesh) -> jax.NamedSharding:
    """How a parameter of a type is split on the mesh of the engines: along `tensor` where it was and can be."""
    ways, spec = mesh.shape["tensor"], x.sharding.spec
    axes = (
        "tensor" if "tensor" in sharding.names_of(axis) and size % ways == 0 else None
        for axis, size in zip(spec, x.shape[: len(spec)], strict=True)
    )
    return jax.NamedSharding(mesh, jax.P(*axes))


def _part(x: jax.Array, mesh: Mesh) -> jax.Array:
    """The copy of an array that the devices of one engine have, which is theirs already."""
    parts = {shard.device: shard.data for shard in x.addressable_shards}
    split = jax.NamedSharding(mesh, x.sharding.spec)
    return jax.make_array_from_single_device_arrays(x.shape, split, [parts[d] for d in mesh.devices.flat])


def prepare(config: ModelConfig, adapter: LoRA | None) -> Callable[[Params, Frozen], Params]:
    """Of what is trained and what is not, the parameters that an engine takes; nothing given is used up."""
    joined, dtype = join(adapter), jnp.dtype(config.dtype)
    whole = lambda w: isinstance(w, Adapted | Quantized)

    def ready(w: jax.Array | Adapted | Quantized) -> jax.Array | Adapted | Quantized:
        if isinstance(w, Adapted) and isinstance(w.w, jax.Array):
            return merged(w.w, w.a, w.b, w.scale)
        return w.astype(dtype) if isinstance(w, jax.Array) else w

    def prepare(params: Params, frozen: Frozen) -> Params:
        tree = jax.tree.map(ready, joined(params, frozen, None), is_leaf=whole)
        return unstack_layers(tree) if "layers" in tree else tree

    return jax.jit(prepare)
