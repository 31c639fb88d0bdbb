"""The optimiser against its definition, and the schedule at the places where schedules go wrong."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import model
from train import optim
from train.config import AdamW, Cosine


@pytest.mark.parametrize(
    "step, expected",
    [(0, 0.25), (2, 0.75), (3, 1.0), (8, 0.55), (13, 0.1), (14, 0.1), (10**6, 0.1)],
    ids=["first", "rising", "peak", "half way", "last", "beyond", "far beyond"],
)
def test_cosine(step, expected):
    learning_rate = optim.cosine(Cosine(warmup_steps=3, final_fraction=0.1), peak=2.0, steps=14)
    assert learning_rate(jnp.int32(step)) == pytest.approx(2 * expected, rel=1e-6)


def test_a_warm_up_may_be_a_part_of_the_steps():
    assert [Cosine(warmup_fraction=0.03).warmup(steps) for steps in (1, 33, 34, 1000)] == [0, 0, 1, 30]
    part, steps = (
        optim.cosine(Cosine(**how), peak=1.0, steps=10) for how in ({"warmup_fraction": 0.35}, {"warmup_steps": 3})
    )
    assert [part(jnp.int32(n)) for n in range(10)] == [steps(jnp.int32(n)) for n in range(10)]


@pytest.mark.parametrize("steps, warmup", [(1, 0), (2, 1)])
def test_shortest_schedules_are_finite(steps, warmup):
    learning_rate = optim.cosine(Cosine(warmup_steps=warmup), peak=1.0, steps=steps)
    assert all(0 < learning_rate(jnp.int32(step)) <= 1 for step in range(steps + 2))


def test_adamw_is_its_definition():
    """Two steps by hand: clip over all parameters, moments with bias correction, decay of `w` alone."""
    config = AdamW(peak_lr=1.0, b1=0.8, b2=0.7, eps=1e-3, weight_decay=0.3, clip_norm=2.0)
    optimizer = optim.adamw(config)
    params = {"w": np.float32([[1.0, -2.0]]), "b": np.float32([3.0])}
    gradients = [
        {"w": np.float32([[3.0, 0.0]]), "b": np.float32([4.0])},
        {"w": np.float32([[0.1, 0.2]]), "b": np.float32([0.3])},
    ]
    state = optimizer.init(params)
    m = v = {"w": 0.0, "b": 0.0}
    for step, gradient in enumerate(gradients, 1):
        change, state = optimizer.update(gradient, state, params, rate=np.float32(0.5))
        scale = min(1, 2.0 / np.sqrt(sum(np.sum(g**2) for g in gradient.values())))
        m = {k: 0.8 * m[k] + 0.2 * scale * g for k, g in gradient.items()}
        v = {k: 0.7 * v[k] + 0.3 * (scale * g) ** 2 for k, g in gradient.items()}
        for k in params:
            adam = m[k] / (1 - 0.8**step) / (np.sqrt(v[k] / (1 - 0.7**step)) + 1e-3)
            np.testing.assert_allclose(change[k], -0.5 * (adam + (0.3 * params[k] if k == "w" else 0)), rtol=1e-5)


@pytest.mark.parametrize("stacked", [True, False])
def test_tables_and_matrices_decay_and_nothing_else(config, mesh, stacked):
    params = model.abstract(config.model_config)
    if not stacked:
        params = jax.eval_shape(model.unstack_layers, params)
    decays = jax.tree_util.tree_leaves_with_path(optim.decays(params))
    kinds = {(path[-2].key, path[-1].key): yes for path, yes in decays}
    assert kinds[("embed", "w")] and kinds[("q", "w")] and kinds[("down", "w")]
    assert not kinds[("q", "b")] and not kinds[("final_norm", "scale")]
    assert {leaf for (_, leaf), yes in kinds.items() if yes} == {"w"}
