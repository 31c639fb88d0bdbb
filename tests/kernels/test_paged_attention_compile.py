"""Paged attention, and the writing of pages, through the TPU compiler."""

from __future__ import annotations

import pytest

# Writing must not copy the pages, nor their scales.
PROGRAM = """
import functools
from qwen_jax.kernels.paged_attention import paged_attention
from qwen_jax.ops.pages import Rows, write
from qwen_jax.sharding import make_mesh

generation, shape = arguments
attend = jax.jit(functools.partial(paged_attention, scale=0.1, generation=generation))
write = jax.jit(write, donate_argnames=("pages", "scales"))
ints = functools.partial(array, jnp.int32)
batch = ints(64), ints(64, 64), ints(64), ints(64)
heads, kv_heads, dim, *bits = map(int, shape.split())
q, kv = (array(jnp.bfloat16, 128, count, dim) for count in (heads, kv_heads))
pages, scales = array(jnp.bfloat16, 4096, kv_heads, 32, 2 * dim), None
if bits:
    pages, scales = ints(4096, kv_heads, 32, 2 * dim), array(jnp.float32, 4096, kv_heads, 2, 128)
program = attend.lower(q, pages, *batch, scales=scales, window=ints()).compile()
assert "tpu_custom_call" in program.as_text()
with jax.set_mesh(make_mesh(devices=devices[:1])):
    here = NamedSharding(jax.sharding.get_mesh(), PartitionSpec())
    put = lambda x: x if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)
    rows = Rows(lengths=put(ints(64)), table=put(ints(64, 64)), counts=put(ints(64)), width=2)
    memory = write.lower(put(pages), put(kv), put(kv), rows, put(scales)).compile().memory_analysis()
assert memory.temp_size_in_bytes < memory.alias_size_in_bytes / 50, memory
"""

# Nor must attention that is left to XLA.
DUAL_CHUNKS = """
import functools
from qwen_jax.ops.paged_attention import attend
from qwen_jax.ops.pages import Rows
from qwen_jax.sharding import make_mesh

with jax.set_mesh(make_mesh(devices=devices[:1])):
    here = NamedSharding(jax.sharding.get_mesh(), PartitionSpec())
    array = functools.partial(jax.ShapeDtypeStruct, sharding=here)
    ints = functools.partial(array, dtype=jnp.int32)
    rows = Rows(lengths=ints((2,)), counts=ints((2,)), table=ints((2, 1024)), width=2)
    pages, q = array((4096, 4, 32, 256), jnp.bfloat16), array((4, 28, 128), jnp.bfloat16)
    compute = jax.jit(functools.partial(attend, chunk=4096, implementation="auto"))
    memory = compute.lower((q, q, q), pages, rows).compile().memory_analysis()
assert memory.temp_size_in_bytes < pages.size * 2 / 20, memory
"""

# Heads, kv heads, head_dim, and bits where they are not 16. Groups of 7 are no multiple of any tile; without groups the
# queries of a block are most.
QWEN25_7B, QWEN25_05B_INT8, QWEN_7B = "28 4 128", "14 2 64 8", "32 32 128"


@pytest.mark.parametrize(
    "topology, generation, shape",
    [
        ("v5e:2x2", "v5e", QWEN25_05B_INT8),
        ("v5p:2x2x1", "v5p", QWEN25_05B_INT8),
        ("v6e:2x2", "v6e", QWEN25_7B),
        pytest.param("v4:2x2x1", "v4", QWEN25_7B, marks=pytest.mark.slow),
        pytest.param("v5e:2x2", "v5e", QWEN_7B, marks=pytest.mark.slow),
        pytest.param("tpu7x:2x2x1", "v7x", QWEN25_05B_INT8, marks=pytest.mark.slow),
    ],
)
def test_compiles(compile_for_tpu, topology, generation, shape):
    compile_for_tpu(PROGRAM, topology, generation, shape)


def test_dual_chunks_in_pages_compile(compile_for_tpu):
    compile_for_tpu(DUAL_CHUNKS, "v5e:2x2")
