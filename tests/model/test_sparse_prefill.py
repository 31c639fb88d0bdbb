"""Sparse prefill through the whole model, which with budgets for everything is full attention."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import model
from qwen_jax.config import DualChunk, Rope
from qwen_jax.ops.rope import rotate, rotation
from qwen_jax.ops.vertical_slash import VerticalSlash
from tests import paged
from tests.conftest import tiny_config
from tests.model.test_transformer import ids, parameters

CHUNKS = DualChunk(chunk_size=60, local_size=20, original_positions=50)
CONFIG = tiny_config(num_layers=1, rope=Rope(theta=12345.0, scaling=CHUNKS))
LENGTH, LENGTHS = 180, np.array([180, 150, 60], np.int32)
EVERYTHING = VerticalSlash(threshold=64, vertical=LENGTH)


@functools.partial(jax.jit, static_argnames=("sparse",))
def run(params, tokens, positions, rows, *, sparse):
    hidden, rows = paged.forward(CONFIG, params, tokens, positions, rows, sparse=sparse)
    return model.logits(params, hidden), rows


def prefill(params, *, pieces, sparse):
    rows = paged.paged(CONFIG, 3, LENGTH, jnp.asarray(LENGTHS))
    tokens, logits = ids(3, LENGTH), []
    for at in np.split(np.tile(np.arange(LENGTH, dtype=np.int32), (3, 1)), pieces, axis=1):
        found, rows = run(params, tokens[:, at[0]], at, rows, sparse=sparse)
        logits.append(found)
    return np.concatenate(logits, axis=1)


def test_in_pieces_and_chunks_with_everything_kept_it_is_full_attention(mesh):
    params = model.unstack_layers(parameters(CONFIG))
    full, sparse = prefill(params, pieces=1, sparse=None), prefill(params, pieces=2, sparse=EVERYTHING)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(sparse[row, :length], full[row, :length], rtol=0, atol=1e-4)


def test_search_turns_are_true_distances_to_the_chunk_before_and_go_on_from_there():
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 10)).astype(np.float32).repeat(130, axis=2)

    @jax.jit
    def scores(q, k):
        turn = functools.partial(rotation, head_dim=10, logn=0, dtype=jnp.dtype(jnp.float32))
        chunks, at = DualChunk(chunk_size=60, local_size=20, original_positions=0), jnp.arange(130)[None]
        plain = turn(Rope(theta=50.0), at, None)
        by = turn(Rope(theta=50.0, scaling=chunks), at, None, search=True)
        dots = lambda q, k: jnp.einsum("btnh,bsnh->ts", q, k)
        return dots(rotate(q, plain), rotate(k, plain)), [dots(rotate(q, x), rotate(k, by)) for x in by.search]

    true, (before, earlier) = scores(q, k)
    np.testing.assert_allclose(before[40:80, :40], true[40:80, :40], atol=1e-4)
    # Of the chunk before that, distances begin at the local size past a chunk.
    np.testing.assert_allclose(earlier[80:120, :40], true[60:100, :40], atol=1e-4)
