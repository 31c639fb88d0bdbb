"""What a step needs besides the pages."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

from qwen_jax import model
from qwen_jax.model.cache import Cache, LayerCache
from qwen_jax.ops.pages import Rows
from tests.conftest import tiny_config


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_copies_no_pages(mesh, dtype):
    """Though two groups of rows share them; nor does it make them float32, nor anything of the size of the rows."""
    config, slots, size = tiny_config(num_layers=1, dtype=dtype), 2**15, 16
    shaped = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    group = lambda num, width: Rows(
        lengths=shaped(num), table=shaped(num, slots // size), counts=shaped(num), width=width
    )
    params = jax.eval_shape(model.unstack_layers, model.abstract(config))
    pages = model.make_cache(config, 4 * slots // size, size).layers[0].pages

    @functools.partial(jax.jit, donate_argnums=0)
    def step(pages, params, tokens, groups):
        cache = Cache((LayerCache(pages),))
        return model.forward_cached(config, params, tokens, model.Batch(rows=groups), cache)

    compiled = step.lower(pages, params, shaped(4 + 32), (group(4, 1), group(1, 32))).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < pages.nbytes / 10
