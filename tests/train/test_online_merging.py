"""The online merging optimiser against the formulas of its paper, on a toy model, stacked, split and resumed."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qwen_jax import model, sharding
from qwen_jax.errors import ConfigError, ModelError
from qwen_jax.weights.load import load_params
from qwen_jax.weights.source import open_model
from tests.published import publish
from tests.train.test_run import run
from train import frozen, optim
from train.alignment import OnlineMerging
from train.config import AdamW, Cosine, LoRA, Pretrained
from train.data.config import TokenizerFile
from train.optim.online_merging import largest

ROUNDING = dict(rtol=1e-6, atol=1e-9)


def merging(**fields):
    return OnlineMerging(base="x", **fields)


def waves(shape, step):
    return np.float32(np.cos(np.arange(np.prod(shape)) * step + 1)).reshape(shape)


CHANGE = {"embed": {"w": waves((6, 4), 1.3)}, "layers": {"b": waves((3, 5), 2.1)}}
LEARNED = {"embed": {"w": waves((6, 4), 0.7)}, "layers": {"b": waves((3, 5), 1.7)}}


def merge(config, change, learned, *, seed=0, state=None, mesh=None):
    optimizer = optim.online_merging(config, seed=seed)
    with jax.set_mesh(mesh or sharding.make_mesh(devices=jax.devices()[:1])):
        state = optimizer.init(change) if state is None else state
        return jax.jit(lambda c, s, t: optimizer.update(c, s, learned=t))(change, state, learned)


def top(x, reserve):
    return np.where(np.abs(x) >= np.sort(np.abs(x), axis=None)[-max(1, round(reserve * x.size))], x, 0)


def test_ties_takes_the_largest_of_each_matrix_of_each_layer_and_where_signs_differ_the_larger():
    found, _ = merge(merging(method="ties", alpha=0.4, reserve=0.4), CHANGE, LEARNED)
    for kind, name in (("embed", "w"), ("layers", "b")):
        layers = [(CHANGE[kind][name], LEARNED[kind][name], found[kind][name])]
        for a, b, merged in zip(*layers[0], strict=True) if kind == "layers" else layers:
            a, b = 0.6 * top(a, 0.4), 0.4 * top(b, 0.4)
            wanted = np.where(a * b < 0, np.where(abs(a) >= abs(b), a, b), a + b)
            np.testing.assert_allclose(merged, wanted, **ROUNDING)
            assert (wanted != a).any()
    assert (top(CHANGE["embed"]["w"], 0.4) * top(LEARNED["embed"]["w"], 0.4) < 0).any()


def test_dare_draws_from_both_anew_in_each_step_and_makes_nothing_larger():
    config = merging(alpha=0.25, reserve=0.5)
    first, state = merge(config, CHANGE, LEARNED)
    second, _ = merge(config, CHANGE, LEARNED, state=state)
    a, b = (0.75 * CHANGE["embed"]["w"], 0.25 * LEARNED["embed"]["w"])
    near = [np.isclose(first["embed"]["w"], wanted, rtol=1e-5) for wanted in (0 * a, a, b, a + b)]
    assert np.all(np.any(near, axis=0)) and all(each.any() for each in near)
    assert not np.array_equal(first["embed"]["w"], second["embed"]["w"])
    assert not np.array_equal(first["layers"]["b"][0] == 0, first["layers"]["b"][1] == 0)
    other, _ = merge(config, CHANGE, LEARNED, seed=1)
    assert not np.array_equal(first["embed"]["w"], other["embed"]["w"])


@pytest.mark.parametrize("reserve", [0.01, 0.3, 1.0])
def test_the_largest_are_found_without_sorting(reserve):
    x = np.float32(np.random.default_rng(0).standard_normal((7, 11)))
    np.testing.assert_array_equal(jax.jit(functools.partial(largest, reserve=reserve))(x), top(x, reserve))


@pytest.mark.usefixtures("mesh")
@pytest.mark.parametrize("method", ["dare", "ties"])
def test_without_a_share_of_what_was_learned_and_with_all_that_counts_it_is_adamw_bit_for_bit(method):
    """Three steps of the whole way from gradients to parameters."""
    adamw = optim.adamw(AdamW(peak_lr=0.01))
    same = optax.chain(adamw, optim.online_merging(merging(method=method, alpha=0.0, reserve=1.0), seed=0))

    @functools.partial(jax.jit, static_argnums=0)
    def step(optimizer, params, state, gradient):
        change, state = optimizer.update(gradient, state, params, rate=jnp.float32(0.01), learned=LEARNED)
        return optax.apply_updates(params, change), state

    done = []
    for optimizer in (same, adamw):
        params, state = CHANGE, optimizer.init(CHANGE)
        for i in range(3):
            params, state = step(optimizer, params, state, jax.tree.map(lambda x, i=i: np.sin(x * 50 + i), LEARNED))
        done.append(params)
    jax.tree.map(np.testing.assert_array_equal, *done)
    assert not np.array_equal(done[0]["embed"]["w"], CHANGE["embed"]["w"])


def test_of_several_steps_the_sum_is_merged_in_their_place():
    config = merging(method="ties", alpha=0.1, reserve=0.5, every=3)
    changes = [jax.tree.map(lambda x, i=i: x + np.float32(i), CHANGE) for i in range(4)]
    state, done = None, []
    for change in changes:
        made, state = merge(config, change, LEARNED, state=state)
        done.append(made)
    jax.tree.map(np.testing.assert_array_equal, done[:2] + done[3:], changes[:2] + changes[3:])
    total = jax.tree.map(lambda *x: sum(x), *changes[:3])
    wanted, _ = merge(merging(method="ties", alpha=0.1, reserve=0.5), total, LEARNED)
    jax.tree.map(lambda w, *x: np.testing.assert_allclose(sum(x), w, rtol=1e-5, atol=1e-6), wanted, *done[:3])


@pytest.mark.parametrize("method", ["dare", "ties"])
def test_split_and_by_layers_it_is_the_same(method):
    config = merging(method=method, alpha=0.3, reserve=0.4)
    whole, _ = merge(config, CHANGE, LEARNED)
    alone, _ = merge(config, *map(model.unstack_layers, (CHANGE, LEARNED)))
    mesh = sharding.make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        specs = {"embed": {"w": jax.P("tensor", "fsdp")}, "layers": {"b": jax.P(None, None)}}
        split = [jax.tree.map(jax.device_put, tree, specs) for tree in (CHANGE, LEARNED)]
    spread, _ = merge(config, *split, mesh=mesh)
    for other in (model.stack_layers(alone), spread):
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(other), jax.device_get(whole))


@pytest.mark.usefixtures("enough_devices")
def test_a_run_pulls_back_by_what_its_model_had_learned(config, tmp_path):
    """By all of it in each of two steps, and by nothing else."""
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=1))
    for seed, name in enumerate(("base", "tuned")):
        publish(tmp_path / name, config.model_config, "qwen2", seed=seed)
    data = dataclasses.replace(config.data, tokenizer=TokenizerFile(path=str(tmp_path / "base" / "tokenizer.json")))
    config = dataclasses.replace(config, model=Pretrained(path=str(tmp_path / "tuned"), dtype="float32"), data=data)
    with pytest.raises(ConfigError, match="merging and an adapter"):
        dataclasses.replace(config, merging=merging(), adapter=LoRA())
    pulled = OnlineMerging(base=str(tmp_path / "base"), alpha=1.0, reserve=1.0, method="ties")
    assert run(dataclasses.replace(config, steps=2, schedule=Cosine(warmup_steps=0), merging=pulled)) == 0
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        found, base, tuned = (
            load_params(opened, dtype="float32", stacked=True)
            for opened in map(open_model, (config.run_dir, tmp_path / "base", tmp_path / "tuned"))
        )
    wanted = jax.tree.map(lambda tuned, base: 3 * tuned - 2 * base, tuned, base)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, wanted)


def test_what_a_model_was_tuned_from_has_its_shape(config, tmp_path):
    for name, each in (("a", config.model_config), ("b", dataclasses.replace(config.model_config, norm_eps=1e-5))):
        publish(tmp_path / name, each, "qwen2")
    with pytest.raises(ConfigError, match="merging is of a model with weights"):
        frozen.check_weights(dataclasses.replace(config, merging=merging()))
    asked = Pretrained(path=str(tmp_path / "a"), dtype="float32")
    other = dataclasses.replace(config, model=asked, merging=OnlineMerging(base=str(tmp_path / "b")))
    with open_model(tmp_path / "a") as source, pytest.raises(ModelError, match="is of another shape than"):
        frozen.load(other, source, warn=pytest.fail, unroll=True)


@pytest.mark.parametrize(
    "fields, sentence",
    [
        (dict(alpha=1.5), "alpha=1.5 must be between 0 and 1"),
        (dict(reserve=0.0), "reserve=0.0 must be above 0"),
        (dict(every=0), "every=0 must be at least 1"),
    ],
)
def test_refused(fields, sentence):
    with pytest.raises(ConfigError, match=sentence):
        merging(**fields)
