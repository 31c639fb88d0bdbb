"""The MLP in pieces against the MLP at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import sharding
from qwen_jax.config import ModelConfig, Rope
from qwen_jax.model.mlp import MLP
from qwen_jax.ops import mlp
from tests.ops.quantized import random

WIDTH, INNER = 16, 48
CONFIG = ModelConfig(
    vocab_size=8,
    width=WIDTH,
    num_layers=2,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    mlp_width=INNER,
    max_position=8,
    norm_eps=1e-6,
    qkv_bias=False,
    qk_norm=False,
    tie_embeddings=True,
    rope=Rope(theta=1e4),
)
MESHES = [{}, dict(fsdp=2, context=2, tensor=2)]


def values(batch, length, *, mesh):
    """What the layer makes of some tokens, and the gradients of a weighted sum of it."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = {"gate": draw(INNER, WIDTH), "up": draw(INNER, WIDTH), "down": draw(WIDTH, INNER)}
    devices = jax.devices()[: int(np.prod(list(mesh.values())))]
    with jax.set_mesh(sharding.make_mesh(**mesh, devices=devices)):
        put = lambda x, spec: jax.device_put(x, jax.NamedSharding(jax.sharding.get_mesh(), spec))
        params = {
            name: {"w": put(w, sharding.weight("df" if name == "down" else "fd", w.shape))}
            for name, w in params.items()
        }
        x, weights = (put(draw(batch, length, WIDTH), sharding.activation("btd", (batch, length, WIDTH))) for _ in "xw")

        def loss(params, x):
            y = MLP(CONFIG, INNER).apply({"params": params}, x)
            return jnp.sum(y * weights), y

        (_, y), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x)
    return jax.tree.map(np.asarray, (y, gradients))


@pytest.mark.parametrize("length", [96, 90])
def test_pieces_add_up_to_the_whole_on_every_mesh(monkeypatch, length):
    expected = values(2, length, mesh={})
    monkeypatch.setattr(mlp, "PIECE", 16)
    for mesh in MESHES:
        found = values(2, length, mesh=mesh)
        for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6 * np.abs(want).max())


def test_quantised_matrices_pass_gradients_on(monkeypatch, mesh):
    monkeypatch.setattr(mlp, "PIECE", 16)
    rng = np.random.default_rng(0)
    shapes = (INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER)
    quantised, wide = zip(*(random(rng, shape, 1, bits=4, group=8, zeros=True) for shape in shapes), strict=True)
    x = jnp.asarray(rng.normal(size=(2, 20, WIDTH)), jnp.float32)
    gradient = jax.jit(jax.grad(lambda x, matrices: jnp.sum(jnp.sin(mlp.mlp(x, *matrices)))))
    want = gradient(x, wide)
    np.testing.assert_allclose(gradient(x, quantised), want, atol=1e-5 * np.abs(want).max())


def memory(length: int) -> int:
    """Bytes that the gradient of the layer takes beside arguments and results, for so many tokens."""
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        loss = lambda params, x: MLP(CONFIG, INNER).apply({"params": params}, x).sum()
        shape = (1, length, WIDTH)
        rows = jax.NamedSharding(jax.sharding.get_mesh(), sharding.activation("btd", shape))
        x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rows)
        params = jax.eval_shape(MLP(CONFIG, INNER).init, jax.random.key(0), x)["params"]
        return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x).compile().memory_analysis().temp_size_in_bytes


def test_what_is_between_the_matrices_does_not_grow_with_the_tokens(monkeypatch):
    monkeypatch.setattr(mlp, "PIECE", 256)
    per_token = (memory(4096) - memory(2048)) / 2048
    # In float32; x and dy may be copied, and dx.
    assert per_token <= 4 * 3 * WIDTH
    monkeypatch.setattr(mlp, "PIECE", 4096)
    assert (memory(4096) - memory(2048)) / 2048 >= 4 * 2 * INNER, "so it would, at once"
