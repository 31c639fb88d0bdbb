"""An engine that follows the weights being trained: it answers with them as they are, on the mesh they are on."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qwen_jax.config import ModelConfig
from qwen_jax.engine import Capacity, Engine
from qwen_jax.errors import ConfigError
from qwen_jax.model import Params, unstack_layers
from qwen_jax.ops.lora import Adapted, merged
from qwen_jax.ops.quantized import Quantized
from train.adapter import NOTHING, Frozen, join
from train.config import LoRA


class Follower:
    """One engine for a whole run: what it computes with is compiled once, and takes memory only while it is asked.

        follower = Follower(config.model_config, num_tokens=tokenizer.num_tokens, mesh=mesh, capacity=Capacity(...))
        with follower.at(state.params) as engine:
            generate(engine, jobs)

    An adapter is merged into what it adapts, as in the model that the run leaves, and stays beside what is quantised.
    """

    def __init__(
        self, config: ModelConfig, *, num_tokens: int, mesh: Mesh, capacity: Capacity, adapter: LoRA | None = None
    ) -> None:
        """
        Args:
          config: of the model; the engine computes in its dtype.
          num_tokens: tokens the tokenizer has.
          mesh: that of the training.
          capacity: how much the engine does at a time.
          adapter: what is trained, where it is not the whole model.

        Raises ConfigError where there is more than one process: an engine has one.
        """
        if jax.process_count() > 1:
            raise ConfigError(
                f"{jax.process_count()} processes train together, and answers are made by one alone; set "
                "evaluation.samples = 0, and ask the checkpoints"
            )
        self._config = dataclasses.replace(config, param_dtype=config.dtype)
        self._num_tokens, self._capacity = num_tokens, capacity
        self._trained_on, self._mesh = mesh, _without_context(mesh)
        self._ready = prepare(config, adapter)
        self._engine: Engine | None = None

    @contextlib.contextmanager
    def at(self, params: Params, frozen: Frozen = NOTHING) -> Iterator[Engine]:
        """The engine with these weights; what is asked of it must be done, or cancelled, when this ends.

        Args:
          params: that are trained, on the mesh; their layers stacked or one by one. They stay.
          frozen: what is beside them.
        """
        with jax.set_mesh(self._trained_on):
            ready = self._ready(params, Frozen(base=frozen.base))
        here = lambda x: jax.device_put(x, jax.NamedSharding(self._mesh, jax.typeof(x).sharding.spec))
        with jax.set_mesh(self._mesh):  # which has the devices in another order than the loop's, that is current
            ready = jax.tree.map(here, ready)
        if self._engine is None:
            self._engine = Engine(
                self._config, ready, num_tokens=self._num_tokens, mesh=self._mesh, capacity=self._capacity
            )
        else:
            self._engine.swap(ready)
        del ready
        try:
            yield self._engine
        finally:
            self._engine.release()


def _without_context(mesh: Mesh) -> Mesh:
    """The mesh with `context` as a part of `data`: a decoded token cannot be split, and no weight is split by either.

    Every device keeps the weights that it has.
    """
    grid = np.moveaxis(mesh.devices, 2, 1)
    data, context, fsdp, expert, tensor = grid.shape
    return Mesh(grid.reshape(data * context, fsdp, 1, expert, tensor), mesh.axis_names, axis_types=mesh.axis_types)


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
