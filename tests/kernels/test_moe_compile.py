"""Experts through the TPU compiler, over a mesh that splits them: what a step takes does not grow with their number,
and what goes over `expert` is what the formula says."""

from __future__ import annotations

PROGRAM = """
from qwen_jax import sharding
from qwen_jax.ops.moe import apply_experts
from train.plan.hlo import read as program_of

E, T, K, D, F = 32, 1024, 4, 512, 256
mesh = sharding.make_mesh(expert=2, fsdp=2, devices=devices)
with jax.set_mesh(mesh):
    array = lambda split, dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, split))
    rows = sharding.activation("btd", (4, T, D))
    x, weights = (array(rows, jnp.bfloat16, 4, T, size) for size in (D, K))
    chosen = array(rows, jnp.int32, 4, T, K)
    matrices = [
        array(sharding.weight(letters, shape), jnp.float32, *shape)
        for letters, shape in (("efd", (E, F, D)), ("efd", (E, F, D)), ("edf", (E, D, F)))
    ]
    loss = lambda x, weights, chosen, *matrices: apply_experts(x, weights, chosen, *matrices).astype(jnp.float32).sum()
    step = jax.jit(jax.grad(loss, argnums=(0, 1, 3, 4, 5))).lower(x, weights, chosen, *matrices).compile()
memory = step.memory_analysis()
# Gathered weights in bfloat16 and their gradients, 13 MiB each; every token with every expert would be 200 MiB.
assert memory.temp_size_in_bytes < 64 * 2**20, memory.temp_size_in_bytes

# The tokens of both devices along `expert` in bfloat16, and this device's part of the sums over experts in float32.
found = {(c.kind, c.bytes) for c in program_of(step.as_text()).collectives if len(c.group) == 2}
for sent in ("all-gather", 2 * T * D * 2), ("reduce-scatter", T * D * 4):
    assert sent in found, (sent, found)
"""


def test_compiles(compile_for_tpu):
    compile_for_tpu(PROGRAM, "v5e:2x2")
