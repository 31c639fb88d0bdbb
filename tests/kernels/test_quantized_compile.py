"""Quantised products through the TPU compiler: nothing wide is written, and little more is read than the bits."""

from __future__ import annotations

import pytest

PROGRAM = """
from qwen_jax import sharding
from qwen_jax.ops.linear import contract
from qwen_jax.ops.quantized import Quantized, split

D, F, ROWS = 2048, 4096, 16
bits, groups, with_zeros = map(int, arguments)
mesh = sharding.make_mesh(tensor=4, devices=devices)
with jax.set_mesh(mesh):
    like = jax.ShapeDtypeStruct
    w = Quantized(
        values=like((groups, D // groups, F), jnp.int4 if bits == 4 else jnp.int8),
        scales=like((groups, F), jnp.float16),
        zeros=like((groups, F), jnp.int8) if with_zeros else None,
        bits=bits,
        shape=(F, D),
    )
    put = lambda x, spec: like(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
    w = jax.tree.map(put, w, split(sharding.gathered("fd", w.shape), 1, w))
    x = put(like((ROWS, 1, D), jnp.bfloat16), sharding.activation("btd", (ROWS, 1, D)))
    program = jax.jit(lambda x, w: contract("btd,fd->btf", x, w)).lower(x, w).compile()
numbers = D * F * bits // 8 // 4
others = (1 + with_zeros) * groups * F * 4 // 4 + ROWS * (D * 2 + F * 4 // 4)
accessed = program.cost_analysis()["bytes accessed"]
assert accessed < 1.3 * (numbers + others), (accessed, numbers, others)
assert program.memory_analysis().temp_size_in_bytes < numbers / 8
"""


@pytest.mark.parametrize("bits, groups, zeros", [(4, 16, 1), (8, 1, 0)])
def test_compiles(compile_for_tpu, bits, groups, zeros):
    compile_for_tpu(PROGRAM, "v5e:2x2", str(bits), str(groups), str(zeros))
