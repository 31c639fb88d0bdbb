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
    put_rows = lambda letters, size: put(
        like((ROWS, 1, size), jnp.bfloat16), sharding.activation(letters, (ROWS, 1, size))
    )
    x, dy = put_rows("btd", D), put_rows("btf", F)
    product = lambda x, w: contract("btd,fd->btf", x, w)
    back = lambda x, w, dy: jax.vjp(lambda x: product(x, w), x)[1](dy)
    programs = jax.jit(product).lower(x, w).compile(), jax.jit(back).lower(x, w, dy).compile()
numbers = D * F * bits // 8 // 4
others = (1 + with_zeros) * groups * F * 4 // 4 + ROWS * (D * 2 + F * 4 // 4)
accessed, to_go_back = (program.cost_analysis()["bytes accessed"] for program in programs)
assert accessed < 1.3 * (numbers + others), (accessed, numbers, others)
assert to_go_back < D * F * 2 // 4, (to_go_back, numbers)  # a wide weight alone, written once
assert all(program.memory_analysis().temp_size_in_bytes < numbers / 8 for program in programs)
"""


@pytest.mark.parametrize("bits, groups, zeros", [(4, 16, 1), (8, 1, 0)])
def test_compiles(compile_for_tpu, bits, groups, zeros):
    compile_for_tpu(PROGRAM, "v5e:2x2", str(bits), str(groups), str(zeros))
