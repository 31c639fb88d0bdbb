"""Annotations hold: the tests run with a check of every call (tests/conftest.py), which is shown to be in force."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from qwen_jax.engine.steps import remember
from qwen_jax.kernels import reference as kernel
from qwen_jax.model import logits
from qwen_jax.ops.norm import rms_norm
from qwen_jax.ops.sampling import Seen

X = jnp.ones((1, 2, 8, 4))
SEEN = Seen(prompt=jnp.zeros((2, 4), bool), generated=jnp.zeros((2, 4), jnp.int32))


@pytest.mark.parametrize(
    "call",
    [
        lambda: rms_norm(X, jnp.ones(5), eps=1e-6),
        lambda: logits({}, X),
        lambda: kernel.reference(X, X, jnp.ones((1, 2, 9, 4)), scale=1.0),
        lambda: jax.eval_shape(lambda x: rms_norm(x, x, eps=1e-6), X),
        lambda: remember(SEEN, jnp.int32(0), jnp.zeros(4, jnp.int32), jnp.zeros(5, jnp.int32)),
    ],
)
def test_what_no_annotation_allows_is_an_error(call):
    with pytest.raises(TypeCheckError):
        call()
