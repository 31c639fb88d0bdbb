"""Quantised folders: what their numbers stand for, and models that compute with them as they are."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import model, sharding
from qwen_jax.config import Moe
from qwen_jax.errors import ModelError
from qwen_jax.ops.quantized import Quantized
from qwen_jax.weights import hf, load_quantized, quantized
from qwen_jax.weights.hf_quantization import parse
from qwen_jax.weights.load import abstract_params, load_params
from qwen_jax.weights.quantize import Rounding
from qwen_jax.weights.quantized import pack, unpack
from qwen_jax.weights.source import Piece, open_model
from tests.conftest import tiny_config
from tests.ops.quantized import wide
from tests.published import logits, save_safetensors, tree_of
from tests.weights.quantized import AWQ, AWQ_ORDER, GPTQ, change_config, columns_packed, publish_quantised

DENSE = tiny_config(vocab_size=260, num_layers=2, head_dim=8, mlp_width=64, tie_embeddings=False)
EXPERTS = dataclasses.replace(
    DENSE, mlp_width=0, moe=Moe(num_experts=4, top_k=2, expert_width=16, shared_width=32, normalize_top_k=False)
)
TIED = dataclasses.replace(DENSE, tie_embeddings=True)
QWEN1 = dataclasses.replace(DENSE, num_kv_heads=4)
FOLDERS = {
    "gptq": ("qwen2", DENSE, GPTQ, {}),
    "gptq with a head": ("qwen2", DENSE, GPTQ, {"head_bits": 8}),
    "gptq with an embedding": ("qwen2", DENSE, GPTQ, {"embedding": True}),
    "gptq with a tied embedding": ("qwen2", TIED, GPTQ, {"embedding": True}),
    "gptq, both, of Qwen1, its own zeros": ("qwen", QWEN1, GPTQ | {"sym": False}, {"head_bits": 8, "embedding": True}),
    "gptq, 8 bits, a scale for each output": ("qwen2", DENSE, GPTQ | {"bits": 8, "group_size": -1}, {}),
    "gptq, its own zeros": ("qwen2", DENSE, GPTQ | {"sym": False}, {}),
    "gptq, version 2": ("qwen2", DENSE, GPTQ | {"checkpoint_format": "gptq_v2", "sym": False}, {}),
    "gptq of Qwen1": ("qwen", QWEN1, GPTQ, {}),
    "gptq of experts": ("qwen2_moe", EXPERTS, GPTQ, {}),
    "awq": ("qwen2", DENSE, AWQ, {}),
    "awq of experts": ("qwen2_moe", EXPERTS, AWQ, {}),
}
# Of the largest logit: sums in another order.
RELATIVE = 1e-5


@pytest.fixture(params=FOLDERS)
def published(request, tmp_path):
    model_type, config, how, apart = FOLDERS[request.param]
    return tmp_path / "model", publish_quantised(tmp_path / "model", config, model_type, how, **apart)


@pytest.mark.parametrize("sample", [24 * 16, 24 * 32, 24 * 64])
def test_the_sample_that_is_looked_at_has_whole_groups(published, monkeypatch, sample):
    """Weights have any number of outputs: 2 ** 20 numbers of 3584 are 288 inputs, two groups and a quarter."""
    monkeypatch.setattr(quantized, "_SAMPLE", sample)
    with open_model(published[0], warn=pytest.fail) as source:
        for tensor in source.table:
            part, rows = tensor.parts[0], tensor.rows[0]
            assert np.isfinite(source.read(Piece(tensor, part, rows, 0, part.shape[0])).astype(np.float32)).all()


def test_golden_words():
    words = lambda numbers, bits: pack(np.array(numbers)[:, None], bits).view(np.uint32)[0, 0]
    assert words([7] * 8, 4) == 0x77777777 and words([127] * 4, 8) == 0x7F7F7F7F
    assert words(list(range(8)), 4) == 0x76543210
    assert columns_packed(np.arange(8)[None], 4, AWQ_ORDER)[0, 0] == 0x75316420
    numbers = np.random.default_rng(0).integers(0, 16, (24, 5)).astype(np.uint8)
    np.testing.assert_array_equal(unpack(pack(numbers, 4), 4), numbers)


def test_the_numbers_are_those_that_were_published(published):
    folder, named = published
    with open_model(folder) as source:
        for tensor in source.table:
            for part, rows in zip(tensor.parts, tensor.rows, strict=True):
                middle = part.shape[0] // 2
                ratio = (rows.stop - rows.start) // part.shape[0]
                cut = slice(rows.start + middle * ratio, rows.stop)
                got = source.read(Piece(tensor, part, cut, middle, part.shape[0]))
                np.testing.assert_array_equal(got.reshape(-1), named[tensor.name][cut].reshape(-1))


def load(folder):
    """The model's parameters, and the same made wide: one entry per layer."""
    source = open_model(folder)
    params = load_params(source, dtype="float32", stacked=False)
    is_leaf = lambda w: isinstance(w, Quantized)

    def widen(path, w):
        inputs = 2 if "'o'" in jax.tree_util.keystr(path) else 1
        return wide(w, inputs) if is_leaf(w) else np.asarray(w)

    return source, params, jax.tree.map_with_path(widen, params, is_leaf=is_leaf)


@pytest.mark.parametrize("packed", [True, False])
def test_each_array_is_where_the_model_looks_for_it(published, monkeypatch, packed):
    folder, named = published
    monkeypatch.setattr(load_quantized, "is_packed", lambda: packed)
    axes = dict(fsdp=2, expert=2) if any("experts" in name for name in named) else dict(fsdp=2, tensor=2)
    with jax.set_mesh(sharding.make_mesh(**axes, devices=jax.devices()[:4])):
        source, params, found = load(folder)
        want = model.unstack_layers(jax.tree.map(jnp.asarray, tree_of(source.config, source.table, named)))
        jax.tree.map(np.testing.assert_array_equal, found, jax.tree.map(np.asarray, want))
    kinds = {str(x.dtype) for x in jax.tree.leaves(params)}
    assert ("int32" in kinds) == packed


@pytest.mark.parametrize(
    "name, packed",
    [
        ("gptq with a head", True),
        ("awq of experts", False),
        ("gptq with a tied embedding", True),
        ("gptq with a tied embedding", False),
    ],
)
def test_the_model_computes_what_the_wide_one_does(tmp_path, mesh, monkeypatch, name, packed):
    model_type, config, how, apart = FOLDERS[name]
    publish_quantised(tmp_path / "model", config, model_type, how, **apart)
    monkeypatch.setattr(load_quantized, "is_packed", lambda: packed)
    _, params, found = load(tmp_path / "model")
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 260, (2, 5)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(5, dtype=jnp.int32), ids.shape)
    got, want = (logits(config, each, ids, positions) for each in (params, jax.tree.map(jnp.asarray, found)))
    np.testing.assert_allclose(got, want, atol=RELATIVE * float(jnp.abs(want).max()))


@pytest.mark.parametrize("packed", [True, False])
def test_split_over_a_mesh_the_model_computes_the_same(tmp_path, monkeypatch, packed):
    monkeypatch.setattr(load_quantized, "is_packed", lambda: packed)
    config = dataclasses.replace(EXPERTS, num_layers=1, tie_embeddings=True)
    publish_quantised(tmp_path / "model", config, "qwen2_moe", GPTQ, embedding=True)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 260, (2, 5)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(5, dtype=jnp.int32), ids.shape)
    found = []
    for axes in ({}, dict(tensor=2, expert=2)):
        with jax.set_mesh(sharding.make_mesh(**axes, devices=jax.devices()[: 4 if axes else 1])):
            _, params, _ = load(tmp_path / "model")
            found.append(np.asarray(logits(config, params, ids, positions)))
    np.testing.assert_allclose(*found, atol=RELATIVE * np.abs(found[0]).max())


def spoil(folder, name, change):
    """Changes one tensor of a folder; None takes it away."""
    with open_model(folder) as source:
        tensors = {name: source.files.read(name) for name in source.files.tensors}
    tensors[name] = change(tensors[name])
    save_safetensors(folder / "model.safetensors", {name: x for name, x in tensors.items() if x is not None})


def both(folder, name):
    """Puts a weight beside the tensors it is quantised in."""
    with open_model(folder) as source:
        tensors = {name: source.files.read(name) for name in source.files.tensors}
        (tensor,) = (tensor for tensor in source.table if tensor.name == name)
    save_safetensors(folder / "model.safetensors", tensors | {name: np.zeros(tensor.shape, np.float32)})


UP = "model.layers.0.mlp.up_proj"
ONES = 0x11111111  # one in each number of a word


@pytest.mark.parametrize(
    ("how", "spoiled", "words"),
    [
        (GPTQ, lambda f: change_config(f, quantization_config=GPTQ | {"group_size": 32}), r"for int32\[2, 4\]"),
        (
            GPTQ,
            lambda f: change_config(f, quantization_config=GPTQ | {"group_size": 24}),
            "64 inputs, which is no",
        ),
        (GPTQ, lambda f: change_config(f, quantization_config=GPTQ | {"bits": 8}), "are bits and group_size of"),
        (AWQ, lambda f: change_config(f, quantization_config=GPTQ), "are bits and group_size of"),
        (GPTQ, lambda f: change_config(f, quantization_config=GPTQ | {"checkpoint_format": "gptq_v2"}), "not 8"),
        (GPTQ, lambda f: spoil(f, f"{UP}.qzeros", lambda x: x + ONES), "zeros that are not 8"),
        (GPTQ | {"sym": False}, lambda f: change_config(f, quantization_config=GPTQ), "zeros that are not 8"),
        (
            GPTQ | {"sym": False},
            lambda f: change_config(f, quantization_config=GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"}),
            "1.. steps off zero .* checkpoint_format",
        ),
        (GPTQ, lambda f: spoil(f, f"{UP}.g_idx", lambda x: x[::-1].copy()), "desc_act"),
        (GPTQ, lambda f: spoil(f, f"{UP}.scales", lambda x: None), f"{UP}.scales is missing"),
        (GPTQ, lambda f: spoil(f, f"{UP}.scales", lambda x: np.full_like(x, np.inf)), "infinite or no numbers"),
        (GPTQ, lambda f: both(f, f"{UP}.weight"), "is there quantised too"),
        (GPTQ, lambda f: spoil(f, f"{UP}.qweight", lambda x: x.astype(np.float32)), "is float32.* for int32"),
        (GPTQ, lambda f: spoil(f, "model.layers.0.mlp.down_proj.bias", lambda x: x + 1), "is not zero"),
    ],
)
def test_what_the_tensors_do_not_bear_out_is_refused(tmp_path, mesh, how, spoiled, words):
    publish_quantised(tmp_path / "model", dataclasses.replace(DENSE, num_layers=1), "qwen2", how)
    spoiled(tmp_path / "model")
    with pytest.raises(ModelError, match=words):
        load_params(open_model(tmp_path / "model"), dtype="float32", stacked=False)


def test_an_embedding_is_read_only_as_it_is_made_here(tmp_path):
    publish_quantised(tmp_path / "model", TIED, "qwen2", GPTQ, embedding=True)
    said = json.loads((tmp_path / "model/config.json").read_text())["quantization_config"]
    for dynamic, words in (
        ({}, "are bits and group_size of"),
        ({"model.embed_tokens": {"bits": 8}}, "only bits of lm_head, and .* of the embedding, are read"),
        ({"model.embed_tokens": {"bits": 4, "group_size": -1}}, "only bits of lm_head, and"),
    ):
        change_config(tmp_path / "model", quantization_config=said | {"dynamic": dynamic})
        with pytest.raises(ModelError, match=words):
            open_model(tmp_path / "model")
    plain = {"bits": 8, "group_size": -1}  # of all weights, which is not said of the embedding
    publish_quantised(tmp_path / "plain", TIED, "qwen2", GPTQ | plain, embedding=True)
    change_config(tmp_path / "plain", quantization_config=GPTQ | plain)
    with pytest.raises(ModelError, match="embed_tokens.weight is quantised, and .* does not say how"):
        open_model(tmp_path / "plain")


def test_tokens_may_have_a_direction_in_common(tmp_path, mesh):
    """As those of trained models have; zeros that are the middle of the range are right whatever the weights are."""
    publish_quantised(tmp_path / "model", TIED, "qwen2", GPTQ, embedding=True)
    spoil(tmp_path / "model", "model.embed_tokens.qweight", lambda words: words | 0x40404040)
    load_params(open_model(tmp_path / "model"), dtype="float32", stacked=False)


def test_a_second_head_beside_a_quantised_embedding_is_refused(tmp_path):
    named = publish_quantised(tmp_path / "model", TIED, "qwen2", GPTQ, embedding=True)
    with open_model(tmp_path / "model") as source:
        tensors = {name: source.files.read(name) for name in source.files.tensors}
    tensors["lm_head.weight"] = named["model.embed_tokens.weight"].astype(np.float32)
    save_safetensors(tmp_path / "model/model.safetensors", tensors)
    with pytest.raises(ModelError, match="embed_tokens.weight is quantised, and beside it is the same weight"):
        open_model(tmp_path / "model")


def test_groups_that_are_those_of_neighbours_may_be_called_otherwise(tmp_path, mesh):
    publish_quantised(tmp_path / "model", DENSE, "qwen2", GPTQ | {"desc_act": True, "static_groups": True})
    spoil(tmp_path / "model", f"{UP}.g_idx", lambda x: None)
    load_params(open_model(tmp_path / "model"), dtype="float32", stacked=False)


def test_layers_can_be_stacked(tmp_path, mesh):
    publish_quantised(tmp_path / "model", DENSE, "qwen2", GPTQ)
    each, stack = (load_params(open_model(tmp_path / "model"), dtype="float32", stacked=x) for x in (False, True))
    jax.tree.map(np.testing.assert_array_equal, model.unstack_layers(stack), each)


def test_what_decoding_takes_is_a_third(mesh):
    """Parameters and a step of one token, with the shares of Qwen2.5-7B: a seventh of it is embedding and head.

    The head is quantised too, in 8 bits: kept as it is, it would be a fifth of all that is left.
    """
    config = tiny_config(
        vocab_size=392,
        width=256,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=128,
        mlp_width=1408,
        tie_embeddings=False,
        dtype="bfloat16",
        param_dtype="bfloat16",
    )
    table = hf.table(config, "qwen2")
    rounding = Rounding(table, parse("int4-g128"), head=True)
    quantized = {name: rounding.how.of(name) for name in rounding.names}

    def takes(quantized) -> int:
        params = abstract_params(config, table, dtype="bfloat16", stacked=False, quantized=quantized)
        memory = jax.jit(lambda params, ids: logits(config, params, ids, ids)).lower(params, ids).compile()
        return memory.memory_analysis().peak_memory_in_bytes

    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    assert takes(quantized) < 0.35 * takes({})
