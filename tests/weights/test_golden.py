"""What transformers computed once, for where it is not installed: `tests/golden/make.py` wrote the files."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from qwen_jax import model
from qwen_jax.weights.load import load_params
from qwen_jax.weights.safetensors import SafetensorsFile
from qwen_jax.weights.source import open_model
from tests.published import assert_close, loss_and_gradients, tree_of

GOLDEN = Path(__file__).parents[1] / "golden"


def load(name):
    """A golden model, its parameters, what transformers computed, and the gradients of that as a tree."""
    opened = open_model(GOLDEN / name)
    with SafetensorsFile(GOLDEN / name / "expected.safetensors") as file:
        expected = {name: file.read(name) for name in file.tensors}
    named = {tensor.name: expected[f"gradient.{tensor.name}"] for tensor in opened.table}
    gradients = tree_of(opened.config, opened.table, named)
    return opened, load_params(opened, dtype="float32", stacked=True), expected, gradients


@pytest.mark.parametrize("name", ["qwen2-tied", "qwen2-untied", "qwen2-windows", "qwen3"])
def test_a_language_model(mesh, name):
    opened, params, expected, gradients = load(name)
    ids = expected["input_ids"].astype(np.int32)
    outputs = (expected["loss"], expected["logits"])
    assert_close(loss_and_gradients(opened.config, params, ids), (outputs, gradients))


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.value_and_grad, argnums=1, has_aux=True)
def classify(config, params, ids, labels):
    """The mean cross-entropy of the last token's scores, and these scores."""
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    hidden = model.forward(config, params, ids, positions)
    # Made whole: a slice of a split axis has no gradient.
    scores = jax.sharding.reshard(model.scores(config, params, hidden), P())[:, -1]
    return -(jax.nn.one_hot(labels, config.score.labels) * jax.nn.log_softmax(scores)).sum(-1).mean(), scores


def test_a_classifier(mesh):
    opened, params, expected, gradients = load("qwen2-classifier")
    ids, labels = (expected[name].astype(np.int32) for name in ("input_ids", "labels"))
    outputs = (expected["loss"], expected["logits"])
    assert_close(classify(opened.config, params, ids, labels), (outputs, gradients))
