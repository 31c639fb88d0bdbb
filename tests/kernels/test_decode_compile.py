"""A decoding step through the TPU compiler, split over `tensor` by more devices than there are kv heads."""

from __future__ import annotations

import pytest

PROGRAM = """
import dataclasses, re
from qwen_jax import model, sharding
from qwen_jax.config import ModelConfig, Rope
from qwen_jax.engine.steps import Inputs, compute
from qwen_jax.ops.pages import Rows, kv_heads
from train.plan.hlo import read

LAYERS, ROWS, PIECE, NUM_PAGES = 2, 8, 64, 640
config = ModelConfig(
    vocab_size=2048, width=512, num_layers=LAYERS, num_heads=8, num_kv_heads=2, head_dim=128, mlp_width=1024,
    max_position=4096, norm_eps=1e-6, qkv_bias=True, qk_norm=False, tie_embeddings=False, rope=Rope(theta=1e6),
    dtype="bfloat16", param_dtype="bfloat16",
)
int8 = arguments == ["int8"]
size = 128 if int8 else 32
mesh = sharding.make_mesh(tensor=4, devices=devices)
with jax.set_mesh(mesh):
    stored = jax.eval_shape(lambda: model.unstack_layers(model.init(config, jax.random.key(0))))
    params = jax.eval_shape(model.repeat_kv_heads, stored)
    config = dataclasses.replace(config, num_kv_heads=kv_heads(config.num_kv_heads))
    cache = jax.eval_shape(lambda: model.make_cache(config, NUM_PAGES, size, int8=int8))
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    rows = lambda count, width: Rows(lengths=ints(count), table=ints(count, 64), counts=ints(count), width=width)
    pieces = dict(pieces=rows(PIECE // 32, 32), tokens=ints(PIECE), ends=ints(4))
    inputs = Inputs(rows=rows(ROWS, 1), places=ints(ROWS), **pieces)
    program = compute.lower(config, params, cache, ints(ROWS + 1), inputs).compile()
memory, text = program.memory_analysis(), program.as_text()
held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)) // 4

# One kernel for the rows and one for the pieces.
found = read(text)
assert sum(found.kernels.values()) == 2 * LAYERS, found.kernels
# The cache is updated where it is, and is nowhere else: not even in VMEM, where the pages of so few rows have room.
assert memory.alias_size_in_bytes == held, (memory, held)
assert memory.temp_size_in_bytes < held / 10, memory
moved = re.findall(rf"\\n.*= .*\\[{NUM_PAGES},[^=]* (?:copy|copy-start|slice-start|transpose|all-gather)\\(.*", text)
assert not moved, moved
# Two sums per layer and that of the embedding, of all tokens; logits go to where they are chosen from.
sent = [(c.kind, c.bytes) for c in found.collectives]
sums = [("all-reduce", (ROWS + PIECE) * config.width * 2)] * (2 * LAYERS + 1)
assert sorted(sent) == sums + [("all-to-all", (ROWS + 4) // 4 * config.vocab_size * 4)], sent
"""


@pytest.mark.parametrize("topology, pages", [("v5e:2x2", "bfloat16"), ("v6e:2x2", "int8")])
def test_compiles(compile_for_tpu, topology, pages):
    compile_for_tpu(PROGRAM, topology, pages)
