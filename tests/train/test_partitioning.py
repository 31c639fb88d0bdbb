"""How XLA splits the training step over a mesh: what must not be in the compiled program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_jax import sharding
from tests.conftest import tiny_config
from train import objectives, optim
from train.config import Mesh
from train.step import abstract_state, make_train_step

WARNING = "nvoluntary full rematerialization"


def compile_step(config) -> None:
    """The training step on 8 devices, compiled from shapes alone."""
    optimizer = optim.adamw(config.optimizer)
    mesh = sharding.make_mesh(**vars(config.mesh))
    with jax.set_mesh(mesh):
        shape = (1, config.batch_size, config.data.sequence_length)
        rows = NamedSharding(mesh, P(None, *sharding.activation("bt", shape[1:])))
        batch = {
            name: jax.ShapeDtypeStruct(shape, jnp.float32 if name == "weights" else jnp.int32, sharding=rows)
            for name in ("tokens", "targets", "positions", "segments", "weights")
        }
        step = make_train_step(objectives.make(config), optimizer, optim.cosine(config.schedule, peak=1.0, steps=9))
        step.lower(abstract_state(config.model_config, optimizer), batch).compile()


@pytest.mark.parametrize(
    "sizes", [dict(fsdp=4, tensor=2), dict(data=2, fsdp=2, tensor=2), dict(fsdp=2, context=2, tensor=2)]
)
def test_nothing_is_rebuilt_whole_on_every_device(config, change, capfd, sizes):
    config = change(change(config, "model", tiny_config(vocab_size=264)), "mesh", Mesh(**sizes))
    compile_step(config)
    assert WARNING not in capfd.readouterr().err


def test_the_compiler_would_say_so(capfd):
    """The gradient of a look-up that is left to the partitioner: if this is silent, so is the test above."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    split = NamedSharding(mesh, P("tensor", "fsdp"))
    table = jax.ShapeDtypeStruct((96, 32), jnp.float32, sharding=split)
    tokens = jax.ShapeDtypeStruct((8, 16), jnp.int32, sharding=NamedSharding(mesh, P(("fsdp", "tensor"))))
    gradient = jax.grad(lambda table, tokens: (table[tokens] ** 2).sum())
    jax.jit(gradient, out_shardings=split).lower(table, tokens).compile()
    assert WARNING in capfd.readouterr().err
