"""The first generation, whose code transformers does not have, against a plain reference of its own."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.config import QwenNTK, Rope
from qwen_jax.weights.load import load_params
from qwen_jax.weights.source import open_model
from tests.conftest import tiny_config
from tests.parity import qwen1_reference
from tests.published import (
    QWEN1_OLD_NAMES,
    assert_close,
    assert_decodes,
    logits,
    loss_and_gradients,
    publish,
    save_safetensors,
    tree_of,
)

CONFIG = tiny_config(num_kv_heads=4, head_dim=8, tie_embeddings=False)
# Trained for 5 tokens: 9 are a prompt of up to twice as many, 17 one of up to four times.
EXTENDED = dataclasses.replace(
    CONFIG, rope=Rope(theta=12345.0, scaling=QwenNTK(original_positions=5)), logn=5, max_position=40
)
IDS = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (2, 17)).astype(np.int32)


@pytest.fixture
def config():
    return CONFIG


@pytest.fixture
def published(tmp_path, config):
    """A folder and its tensors by name; the matrices are small enough that no softmax saturates."""
    drawn = publish(tmp_path / "qwen1", config, "qwen")
    tensors = {name: 0.3 * array if array.ndim == 2 else array for name, array in drawn.items()}
    save_safetensors(tmp_path / "qwen1/model.safetensors", tensors)
    return tmp_path / "qwen1", tensors


@functools.partial(jax.jit, static_argnums=0, static_argnames="prompt")
def reference(constants, tensors, ids, prompt=None):
    """The logits [B, T, V]."""
    return jax.vmap(functools.partial(qwen1_reference.logits, constants, tensors, prompt=prompt))(ids)


def constants_of(folder):
    return qwen1_reference.constants(json.loads((folder / "config.json").read_text()))


def our_logits(folder):
    opened = open_model(folder)
    params = load_params(opened, dtype="float32", stacked=True)
    positions = np.tile(np.arange(IDS.shape[1], dtype=np.int32), (2, 1))
    return np.asarray(logits(opened.config, params, IDS, positions))


def test_logits_loss_and_gradients(mesh, published):
    folder, tensors = published
    opened = open_model(folder)

    def loss(tensors):
        logits = reference(constants_of(folder), tensors, IDS)
        scores = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(scores, IDS[:, 1:, None], axis=-1).mean(), logits

    outputs, gradients = jax.device_get(jax.jit(jax.value_and_grad(loss, has_aux=True))(tensors))
    params = load_params(opened, dtype="float32", stacked=True)
    assert_close(
        loss_and_gradients(opened.config, params, IDS), (outputs, tree_of(opened.config, opened.table, gradients))
    )


def test_decoding_with_a_cache(mesh, published):
    folder, tensors = published
    opened = open_model(folder)
    params = load_params(opened, dtype="float32", stacked=False)
    assert_decodes(opened.config, params, IDS, reference(constants_of(folder), tensors, IDS))


@pytest.mark.parametrize("config", [EXTENDED], ids=["extended"])
def test_dynamic_ntk_and_logn_attention(mesh, published):
    """A sequence goes by all that came at once: of the whole row that is more than of its first 9 tokens."""
    folder, tensors = published
    opened = open_model(folder)
    assert opened.config == EXTENDED
    whole, begun = (np.asarray(reference(constants_of(folder), tensors, IDS, prompt=n)) for n in (17, 9))
    assert np.abs(whole - begun).max() > 0.01 * np.abs(whole).max()
    assert_close(our_logits(folder), whole)
    assert_decodes(opened.config, load_params(opened, dtype="float32", stacked=False), IDS, begun)


def test_both_key_sets_of_config_json_say_the_same(published):
    folder, _ = published
    values = json.loads((folder / "config.json").read_text())
    assert values.keys() >= QWEN1_OLD_NAMES.keys()
    constants = constants_of(folder)
    old = {QWEN1_OLD_NAMES.get(name, name): value for name, value in values.items()}
    (folder / "config.json").write_text(json.dumps(old))
    assert open_model(folder).config == CONFIG
    assert constants_of(folder) == constants


def reordered(order):
    """What gives query, key and value each other's rows."""

    def reorder(array):
        parts = np.split(array, 3)
        return np.concatenate([parts["qkv".index(letter)] for letter in order])

    return lambda tensors: {name: reorder(x) if ".c_attn." in name else x for name, x in tensors.items()}


def exchanged(tensors):
    """With w1 and w2 exchanged."""
    other = {"w1": "w2", "w2": "w1"}
    return {".".join(other.get(part, part) for part in name.split(".")): x for name, x in tensors.items()}


CHANGES = {"kqv": reordered("kqv"), "vkq": reordered("vkq"), "qvk": reordered("qvk"), "w2 w1": exchanged}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_each_part_has_a_role_of_its_own(mesh, published, change):
    """A reader that took one part for another would compute the logits of a changed file, and these are far off."""
    folder, tensors = published
    want = np.asarray(reference(constants_of(folder), tensors, IDS))
    save_safetensors(folder / "model.safetensors", change(tensors))
    got = our_logits(folder)
    assert np.abs(got - want).max() > 0.1 * np.abs(want).max()
    assert_close(got, reference(constants_of(folder), change(tensors), IDS))
