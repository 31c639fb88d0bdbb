"""The heads of reward and classification models."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import model, sharding
from qwen_jax.config import ModelConfig, Score
from qwen_jax.errors import ConfigError, ModelError
from tests.conftest import tiny_config

PLAIN, HIDDEN = Score(labels=3, hidden=False), Score(labels=2, hidden=True)

# float32 sums taken in another order.
ROUNDING = dict(rtol=1e-5, atol=1e-5)


def parameters(config):
    """Parameters far from their start, biases included."""
    rng = np.random.default_rng(0)
    draw = lambda x: np.asarray(0.3 * rng.normal(size=x.shape), x.dtype)
    return jax.tree.map(draw, model.abstract(config))


def hidden_states(config, dtype=np.float32):
    """Hidden states, split as `forward` leaves them."""
    x = np.random.default_rng(1).normal(size=(4, 4, config.width))
    return jax.device_put(jnp.asarray(x, dtype), sharding.activation("btd", x.shape))


def expected(config, params, hidden):
    own = jax.tree.map(lambda x: np.asarray(x, np.float64), params["score"])
    x = np.asarray(hidden, np.float64)
    if config.score.hidden:
        x = np.maximum(x @ own["hidden"]["w"].T + own["hidden"]["b"], 0)
        return x @ own["output"]["w"].T + own["output"]["b"]
    return x @ own["output"]["w"].T


@pytest.mark.parametrize("score", [PLAIN, HIDDEN])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_are_computed_in_float32_whatever_the_dtype(mesh, score, dtype):
    config = tiny_config(score=score, dtype=dtype)
    params, hidden = parameters(config), hidden_states(config, dtype)
    got = jax.jit(model.scores, static_argnums=0)(config, params, hidden)
    assert (got.dtype, got.shape) == (jnp.float32, (4, 4, score.labels))
    np.testing.assert_allclose(got, expected(config, params, hidden), **ROUNDING)


@pytest.mark.parametrize("score", [PLAIN, HIDDEN])
def test_a_split_head_scores_as_a_whole_one(score):
    config = tiny_config(score=score)
    with jax.set_mesh(sharding.make_mesh(data=2, fsdp=2, tensor=2)):
        place = lambda x, like: jax.device_put(x, like.sharding.spec)
        params = jax.tree.map(place, parameters(config), model.abstract(config))
        hidden = hidden_states(config)
        got = jax.jit(model.scores, static_argnums=0)(config, params, hidden)
    np.testing.assert_allclose(got, expected(config, params, hidden), **ROUNDING)


@pytest.mark.parametrize("score", [PLAIN, HIDDEN])
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_a_score_stands_in_place_of_the_output_head(mesh, score, tie_embeddings):
    config = tiny_config(score=score, tie_embeddings=tie_embeddings)
    tree = model.abstract(config)
    assert tree.keys() == {"embed", "layers", "final_norm", "score"}
    assert sum(x.size for x in jax.tree.leaves(tree)) == config.num_parameters
    with pytest.raises(ValueError, match="no output head"):
        model.head(tree)


def test_a_score_does_not_change_the_hidden_states(mesh):
    config = tiny_config(score=HIDDEN)
    params = parameters(config)
    without = {name: value for name, value in params.items() if name != "score"}
    tokens = np.arange(6, dtype=np.int32)[None]
    forward = jax.jit(model.forward, static_argnums=0)
    got = forward(config, params, tokens, tokens)
    want = forward(tiny_config(), without, tokens, tokens)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("score", [PLAIN, HIDDEN])
def test_every_parameter_of_the_head_and_the_hidden_states_below_it_learn(mesh, score):
    config = tiny_config(score=score, dtype="bfloat16")
    params, hidden = parameters(config), hidden_states(config, "bfloat16")

    def loss(head, hidden):
        return (model.scores(config, params | {"score": head}, hidden) ** 2).sum()

    gradient, below = jax.jit(jax.grad(loss, argnums=(0, 1)))(params["score"], hidden)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(gradient))
    assert below.dtype == jnp.bfloat16 and np.abs(below.astype(jnp.float32)).max() > 0


def test_a_model_without_a_score_has_no_scores(mesh):
    config = tiny_config()
    with pytest.raises(ValueError, match="score=None"):
        model.scores(config, parameters(config), hidden_states(config))


@pytest.mark.parametrize("score", [None, PLAIN, HIDDEN])
def test_a_config_keeps_its_score_as_json(score):
    config = tiny_config(score=score, windows=(0, 4, 4))
    assert ModelConfig.from_json(config.to_json()) == config


def test_a_config_written_before_there_were_scores_has_none():
    values = json.loads(tiny_config().to_json())
    del values["score"]
    assert ModelConfig.from_json(json.dumps(values)) == tiny_config()


@pytest.mark.parametrize("score", [3, {}, {"labels": 1}, {"labels": 0, "hidden": True}])
def test_a_config_with_a_malformed_score_is_refused(score):
    values = json.loads(tiny_config().to_json()) | {"score": score}
    with pytest.raises(ModelError, match="not a model config"):
        ModelConfig.from_json(json.dumps(values))


def test_a_score_has_labels():
    with pytest.raises(ConfigError, match="labels=0"):
        Score(labels=0, hidden=False)
