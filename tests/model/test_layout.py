"""Layers and heads, moved and not computed with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from qwen_jax import sharding
from qwen_jax.errors import ConfigError
from qwen_jax.model import repeat_kv_heads
from qwen_jax.ops.lora import Adapted
from qwen_jax.ops.quantized import Quantized


def test_kv_heads_of_a_quantised_and_adapted_weight_are_counted_by_its_shape():
    """Neither the words of the one nor the rank of the other are heads."""

    def params(heads):
        words, scales = jnp.zeros((3, heads * 8), jnp.int32), jnp.ones((1, heads * 8))
        w = Quantized(values=words, scales=scales, zeros=None, bits=4, shape=(heads, 8, 24))
        w = Adapted(w=w, a=jnp.ones((3, 24)), b=jnp.ones((heads, 8, 3)), scale=1.0)
        return {"layers_0": {"attention": {"k": {"w": w}, "v": {"w": w}}}}

    with jax.set_mesh(sharding.make_mesh(tensor=2, devices=jax.devices()[:2])):
        given = params(2)
        assert jax.tree.all(jax.tree.map(lambda x, y: x is y, repeat_kv_heads(given), given))
        with pytest.raises(ConfigError, match="1 quantised kv heads cannot be split 2 ways"):
            repeat_kv_heads(params(1))
