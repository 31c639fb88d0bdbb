"""One optimiser step: however it is cut into micro-batches and layers, it is the same step."""

from __future__ import annotations

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qwen_jax import sharding
from train import objectives, optim
from train.config import LM
from train.run import watch
from train.step import State, initial_state, make_train_step

# The same sums in float32 in another order. Gradients are compared by Adam's first moment, a tenth of them: the step
# itself is g / |g| at first, which for a gradient that is zero but for rounding (the keys' bias) is anything.
LOSS, MOMENT = 1e-6, 1e-7

pytestmark = pytest.mark.usefixtures("compiled", "mesh")


def batch(config, accumulation) -> dict[str, jax.Array]:
    """Eight random rows, of which each next one has fewer targets that count."""
    rng = np.random.default_rng(0)
    shape = (8, config.data.sequence_length)
    tokens, targets = rng.integers(0, config.model_config.vocab_size, (2, *shape), dtype=np.int32)
    columns = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    weights = (columns < np.arange(1, 9)[:, None]).astype(np.float32)
    arrays = {"tokens": tokens, "targets": targets, "positions": columns, "segments": np.ones(shape, np.int32)}
    spec = jax.P(None, ("data", "fsdp", "expert"), "context")
    put = lambda x: jax.device_put(
        x.reshape(accumulation, -1, shape[1]), jax.NamedSharding(jax.sharding.get_mesh(), spec)
    )
    return jax.tree.map(put, arrays | {"weights": weights})


def one_step(config, *, accumulation=1, unroll=False, weights=None):
    optimizer = optim.adamw(config.optimizer)
    state = initial_state(config.model_config, optimizer, seed=0, unroll=unroll)
    step = make_train_step(objectives.make(config), optimizer, lambda step: jnp.float32(0.01))
    inputs = batch(config, accumulation)
    if weights is not None:
        inputs["weights"] = jnp.full_like(inputs["weights"], weights)
    state, metrics = step(state, inputs)
    return state, {name: float(value) for name, value in metrics.items()}


def test_micro_batches_of_unequal_weight_add_up_to_the_whole(config):
    whole, expected = one_step(config)
    parts, metrics = one_step(config, accumulation=4)
    assert expected["weight"] == 36
    assert metrics == pytest.approx(expected, rel=LOSS * 10)
    moments = [optax.tree_utils.tree_get(state.optimizer, "mu") for state in (parts, whole)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=LOSS * 10, atol=MOMENT), *moments)


def test_losses_of_the_router_are_minimised_and_measured_but_no_part_of_the_loss(mixture):
    params = initial_state(mixture.model_config, optim.adamw(mixture.optimizer), seed=0, unroll=False).params
    micro = jax.tree.map(lambda x: x[0], batch(mixture, 1))
    without = dataclasses.replace(mixture, objective=LM())
    (total, sums), (plain, same) = (jax.jit(objectives.make(each))(params, micro) for each in (mixture, without))
    assert float(plain) == float(same["loss"]) == float(sums["loss"])
    assert float(total - plain) == pytest.approx(float(0.02 * sums["balance"] + 0.003 * sums["z"]), rel=1e-4)
    weight = float(sums["weight"])
    assert 2 < sums["balance"] / weight < 2.5 and 1 < sums["max_load"] / weight < 2 and 1 < sums["z"] / weight < 4


def test_losses_of_the_router_are_the_same_on_a_mesh(mixture):
    def run():
        params = initial_state(mixture.model_config, optim.adamw(mixture.optimizer), seed=0, unroll=False).params
        micro = jax.tree.map(lambda x: x[0], batch(mixture, 1))
        return jax.jit(jax.value_and_grad(objectives.make(mixture), has_aux=True))(params, micro)

    alone = jax.device_get(run())
    with jax.set_mesh(sharding.make_mesh(fsdp=2, expert=2, tensor=2)):
        spread = jax.device_get(run())
    # Sums over 36 tokens: what is zero but for rounding is no nearer.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=36e-6), spread, alone)


def test_micro_batches_of_a_mixture_add_up(mixture):
    """The balance over rows does; that over a micro-batch is another for each size of one."""
    by_row = dataclasses.replace(mixture, objective=LM(balance=0.02, balance_over="sequence", z=0.003))
    _, expected = one_step(by_row, weights=1.0)
    assert expected.keys() >= {"loss", "balance", "z", "max_load", "grad_norm"}
    _, metrics = one_step(by_row, accumulation=4, unroll=True, weights=1.0)
    assert metrics.pop("max_load") > expected.pop("max_load")  # fewer tokens are less even
    assert metrics == pytest.approx(expected, rel=LOSS * 10)


def test_scanned_and_unrolled_layers_take_the_same_step(config):
    _, scanned = one_step(config)
    _, unrolled = one_step(config, unroll=True)
    assert unrolled == pytest.approx(scanned, rel=LOSS * 10)


def test_a_batch_without_targets_only_decays(config):
    before = initial_state(config.model_config, optim.adamw(config.optimizer), seed=0, unroll=False).params
    after, metrics = one_step(config, weights=0.0)
    assert (metrics["loss"], metrics["grad_norm"], metrics["weight"]) == (0, 0, 0)
    factor = jax.tree.map(lambda decays: 1 - 0.01 * 0.1 if decays else 1, optim.decays(before))
    jax.tree.map(lambda a, b, f: np.testing.assert_allclose(a, b * f, rtol=1e-6), after.params, before, factor)


def test_a_batch_without_targets_is_told_of(config):
    said = []
    record, report = (
        types.SimpleNamespace(train=lambda *a: None),
        types.SimpleNamespace(warn=said.append, step=lambda *a: None),
    )
    watch((3, {"loss": 0.0, "grad_norm": 0.0, "weight": 0.0}), config, record, report)
    assert said == ["step 3: no token of this batch counts, so nothing was learned from it"]


def test_state_is_float32_when_activations_are_not(config):
    half = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16"))
    optimizer = optim.adamw(half.optimizer)
    state = jax.eval_shape(lambda: initial_state(half.model_config, optimizer, seed=0, unroll=False))
    step = make_train_step(objectives.make(half), optimizer, lambda step: jnp.float32(0.01))
    after, metrics = jax.eval_shape(step, state, batch(half, 1))
    moments = [x for x in jax.tree.leaves((state.optimizer, after.optimizer)) if x.ndim]
    assert {x.dtype for x in jax.tree.leaves((after.params, metrics, moments))} == {jnp.dtype("float32")}


def test_text_beside_adds_its_own_mean(mesh):
    """Micro-batches of unequal weight, and of another number than the objective's."""

    def of(params, batch):
        sums = {"loss": jnp.sum(batch["weights"] * jnp.sin(batch["tokens"] * params["w"]))}
        return sums["loss"], sums | {"weight": jnp.sum(batch["weights"])}

    follow = optax.GradientTransformationExtraArgs(
        lambda params: (), lambda gradient, state, params, **_: (jax.tree.map(jnp.negative, gradient), state)
    )
    rng = np.random.default_rng(0)
    made = lambda *shape: {name: jnp.asarray(rng.random(shape, np.float32)) for name in ("tokens", "weights")}
    batch, text = made(2, 4, 3), made(3, 8, 3)

    def step(batch, beside=None):
        state = State(jnp.zeros((), jnp.int32), {"w": jnp.float32(0.7)}, ())
        state, metrics = make_train_step(of, follow, lambda step: jnp.float32(1), beside=beside)(state, batch)
        return float(state.params["w"]) - 0.7, metrics

    alone, of_alone = step(batch)
    other, of_other = step(text)
    both, of_both = step({**batch, "text": text}, (of, 0.25))
    assert both == pytest.approx(alone + 0.25 * other, rel=1e-5) and abs(other) > 0.1
    assert of_both["text_loss"] == pytest.approx(float(of_other["loss"]), rel=LOSS * 10)
    assert of_both["loss"] == of_alone["loss"] and of_both["weight"] == of_alone["weight"]
    assert step({**batch, "text": text}, (of, 0.0))[0] == pytest.approx(alone, rel=1e-6)
