"""Flash attention through the TPU compiler, forward and backward, with every mask there is."""

from __future__ import annotations

import pytest

PROGRAM = """
from qwen_jax.kernels.flash_attention import flash_attention

def loss(qkv, ids, window, offset):
    masks = dict(query_segments=ids, key_segments=ids, window=window, query_offset=offset)
    out, lse = flash_attention(*qkv, scale=0.1, generation=generation, **masks)
    return out.astype(jnp.float32).sum() + lse.sum()

generation, *shapes = arguments
for shape in shapes:
    length, heads, kv_heads, dim, dtype = shape.split()
    qkv = [array(dtype, 2, int(count), int(length), int(dim)) for count in (heads, kv_heads, kv_heads)]
    ids, window, offset = (array(jnp.int32, *shape) for shape in [(2, int(length)), (), (2,)])
    text = jax.jit(jax.grad(loss)).lower(qkv, ids, window, offset).compile().as_text()
    assert "flash_attention_forward" in text and "flash_attention_backward" in text
"""

# Length, heads, kv heads, head_dim, dtype: two blocks of keys of the table, which takes more memory than one.
LARGE = "8192 4 2 128 bfloat16"
# Lengths and heads that fit nothing.
ODD = ["300 7 1 64 bfloat16", "2100 2 2 72 float32"]


@pytest.mark.parametrize(
    "topology, generation, shapes",
    [
        ("v4:2x2x1", "v4", [LARGE]),
        ("v5e:2x2", "v5e", [LARGE, *ODD]),
        ("v5p:2x2x1", "v5p", [LARGE]),
        ("v6e:2x2", "v6e", [LARGE]),
        ("tpu7x:2x2x1", "v7x", [LARGE]),
    ],
)
def test_compiles(compile_for_tpu, topology, generation, shapes):
    compile_for_tpu(PROGRAM, topology, generation, *shapes)


DUAL_CHUNK = """
from qwen_jax import sharding
from qwen_jax.ops.dual_chunk import dual_chunk_attention
from qwen_jax.ops.mask import Mask

def loss(queries, k, v, positions):
    mask = Mask(query_positions=positions, key_positions=positions, aligned=True)
    out = dual_chunk_attention(queries, k, v, mask, chunk=2048, implementation="auto")
    return out.astype(jnp.float32).sum()

mesh = sharding.make_mesh(devices=devices[:1])
whole = NamedSharding(mesh, PartitionSpec())
with jax.set_mesh(mesh):
    q, k = (array(jnp.bfloat16, *shape) for shape in [(1, 6144, 28, 128), (1, 4, 6144, 128)])
    text = jax.jit(jax.grad(loss)).lower((q,) * 3, k, k, array(jnp.int32, 1, 6144)).compile().as_text()
assert "flash_attention_forward" in text and "flash_attention_backward" in text
"""


@pytest.mark.slow
def test_dual_chunk_attention_compiles(compile_for_tpu):
    """Three chunks of Qwen2.5-7B's heads: the kernels of its parts, in one program with their gradients."""
    compile_for_tpu(DUAL_CHUNK, "v5e:2x2")
