"""The table of published tensors: total, reversible, and clear about weights that are not those of a config."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from qwen_jax import model, zoo
from qwen_jax.config import Moe, Score
from qwen_jax.errors import ModelError
from qwen_jax.weights import hf
from tests.conftest import tiny_config

CONFIGS = Path(__file__).parents[3] / "shared" / "data" / "hf-configs"

QWEN1 = dict(num_kv_heads=4, head_dim=8, tie_embeddings=False)
QWEN3 = dict(qkv_bias=False, qk_norm=True)
MOE = dict(mlp_width=0, moe=Moe(num_experts=3, top_k=2, expert_width=12, shared_width=0, normalize_top_k=True))
SHARED = dict(mlp_width=0, moe=Moe(num_experts=3, top_k=2, expert_width=12, shared_width=20, normalize_top_k=False))
MODELS = {
    "qwen": ("qwen", tiny_config(**QWEN1)),
    "qwen2 tied": ("qwen2", tiny_config()),
    "qwen2 untied": ("qwen2", tiny_config(tie_embeddings=False)),
    "qwen3": ("qwen3", tiny_config(**QWEN3)),
    "score": ("qwen2", tiny_config(tie_embeddings=False, score=Score(labels=5, hidden=False))),
    "qwen2 experts": ("qwen2_moe", tiny_config(**SHARED, num_layers=2)),
    "qwen3 experts": ("qwen3_moe", tiny_config(**QWEN3, **MOE, num_layers=2)),
    "hidden score": ("qwen3", tiny_config(**QWEN3, score=Score(labels=2, hidden=True))),
}


@pytest.fixture(params=MODELS)
def case(request):
    return MODELS[request.param]


def shapes_of(table):
    return {tensor.name: tensor.shape for tensor in table}


def test_every_array_is_in_the_table_once_and_fills_its_rows(mesh, case):
    model_type, config = case
    table = hf.table(config, model_type)
    wanted = {}
    for path, array in jax.tree_util.tree_leaves_with_path(model.abstract(config)):
        name = "/".join(key.key for key in path)
        axes = name.startswith("layers/") + ("/experts/" in name)
        for stack in np.ndindex(array.shape[:axes]):
            wanted[name, stack] = array.shape[axes:]
    parts = [part for tensor in table for part in tensor.parts]
    assert {(part.path, part.stack): part.shape for part in parts} == wanted
    assert len(parts) == len(wanted)
    assert len(shapes_of(table)) == len(table)
    assert sum(math.prod(tensor.shape) for tensor in table) == config.num_parameters
    for tensor in table:
        columns = math.prod(tensor.shape[1:])
        assert [(rows.stop - rows.start) * columns for rows in tensor.rows] == [
            math.prod(p.shape) for p in tensor.parts
        ]
        assert (tensor.rows[0].start, tensor.rows[-1].stop) == (0, tensor.shape[0])


def test_qwen1_fuses_query_key_and_value_and_calls_the_gate_w2():
    by_name = {tensor.name: tensor for tensor in hf.table(*MODELS["qwen"][::-1])}
    fused = by_name["transformer.h.2.attn.c_attn.weight"]
    assert fused.shape == (96, 32)
    assert [(p.path, p.stack, p.shape) for p in fused.parts] == [
        (f"layers/attention/{name}/w", (2,), (4, 8, 32)) for name in "qkv"
    ]
    assert fused.rows == (slice(0, 32), slice(32, 64), slice(64, 96))
    assert by_name["transformer.h.2.attn.c_attn.bias"].rows == fused.rows
    only = lambda name: [part.path for part in by_name[f"transformer.h.0.mlp.{name}.weight"].parts]
    assert (only("w1"), only("w2")) == (["layers/mlp/up/w"], ["layers/mlp/gate/w"])


def test_heads_are_consecutive_rows_of_a_projection_and_consecutive_columns_of_the_output():
    config = tiny_config()
    by_name = {tensor.name: tensor for tensor in hf.table(config, "qwen2")}
    (q,) = by_name["model.layers.0.self_attn.q_proj.weight"].parts
    (o,) = by_name["model.layers.0.self_attn.o_proj.weight"].parts
    published = np.arange(40 * 32).reshape(40, 32)
    np.testing.assert_array_equal(published.reshape(q.shape)[1], published[10:20])
    np.testing.assert_array_equal(published.T.reshape(o.shape)[:, 1], published.T[:, 10:20])


@pytest.mark.skipif(not CONFIGS.is_dir(), reason="needs ../shared/data with a published index")
def test_names_and_bytes_of_qwen_72b_are_the_published_ones():
    index = json.loads((CONFIGS / "Qwen-72B" / "model.safetensors.index.json").read_text())
    table = hf.table(zoo.published("Qwen-72B"), "qwen")
    assert shapes_of(table).keys() == index["weight_map"].keys()
    assert 2 * sum(math.prod(tensor.shape) for tensor in table) == index["metadata"]["total_size"]


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("qwen2", QWEN3, "'qwen2' has qkv_bias=True, and this model False"),
        ("qwen2", dict(qk_norm=True), "'qwen2' has qk_norm=False, and this model True"),
        ("qwen3", {}, "'qwen3' has qkv_bias=False, and this model True"),
        ("qwen", QWEN1 | dict(num_kv_heads=2), "'qwen' has num_kv_heads=4, and this model 2"),
        ("qwen", QWEN1 | dict(head_dim=10), "'qwen' has width=40, and this model 32"),
        ("qwen", QWEN1 | dict(windows=(0, 0, 4)), "'qwen' has windows=()"),
        ("qwen", QWEN1 | dict(score=Score(labels=1, hidden=False)), "'qwen' has score=None"),
        ("qwen2", SHARED, "'qwen2' is that of a dense model, and this is the other kind"),
        ("qwen2_moe", {}, "'qwen2_moe' is that of a mixture of experts, and this is the other kind"),
        ("qwen2_moe", MOE, "'qwen2_moe' has a shared expert, and this model shared_width=0"),
        ("qwen3_moe", QWEN3 | SHARED, "'qwen3_moe' has no shared expert, and this model shared_width=20"),
    ],
)
def test_an_architecture_that_cannot_hold_the_model_is_refused(model_type, changes, message):
    with pytest.raises(ModelError) as error:
        hf.table(tiny_config(**changes), model_type)
    assert message in str(error.value)


def test_the_newest_architecture_is_chosen():
    assert hf.model_type_of(tiny_config(**QWEN3)) == "qwen3"
    assert hf.model_type_of(tiny_config(**QWEN1)) == "qwen2"
    assert hf.model_type_of(tiny_config(**QWEN3, **MOE)) == "qwen3_moe"
    assert hf.model_type_of(tiny_config(**SHARED)) == "qwen2_moe"


def test_weights_of_the_table_match_it_with_old_buffers_beside_them(case):
    model_type, config = case
    table = hf.table(config, model_type)
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": (5,),
        "transformer.rotary_emb.inv_freq": (5,),
        "transformer.h.0.attn.logn_tensor": (1, 64, 1, 1),
        "transformer.h.0.attn.masked_bias": (),
    }
    assert hf.match(table, shapes_of(table) | buffers, where="x") == {}


def test_each_tensor_is_missed_and_its_shape_checked(case):
    model_type, config = case
    table = hf.table(config, model_type)
    shapes = shapes_of(table)
    for name, shape in shapes.items():
        with pytest.raises(ModelError, match=rf"^x: the weights are .* config; missing: {name}(; |$)"):
            hf.match(table, {k: v for k, v in shapes.items() if k != name}, where="x")
        with pytest.raises(
            ModelError, match=rf"^x: .*; wrong shape: {name} \[.*\] for \[{', '.join(map(str, shape))}\]$"
        ):
            hf.match(table, shapes | {name: (*shape, 1)}, where="x")
        with pytest.raises(ModelError, match=rf"^x: .*; not known: {name}s(; |$)"):
            hf.match(table, shapes | {name + "s": shape}, where="x")


def test_a_head_beside_a_tied_embedding_is_an_alias():
    table = hf.table(tiny_config(), "qwen2")
    shapes = shapes_of(table)
    alias = {"lm_head.weight": "model.embed_tokens.weight"}
    assert hf.match(table, shapes | {"lm_head.weight": (96, 32)}, where="x") == alias
    with pytest.raises(ModelError, match=r"wrong shape: lm_head.weight \[95, 32\] for \[96, 32\]"):
        hf.match(table, shapes | {"lm_head.weight": (95, 32)}, where="x")


def test_a_head_beside_a_score_is_not_known():
    table = hf.table(tiny_config(score=Score(labels=5, hidden=False)), "qwen2")
    with pytest.raises(ModelError, match="not known: lm_head.weight$"):
        hf.match(table, shapes_of(table) | {"lm_head.weight": (96, 32)}, where="x")


def test_every_difference_is_in_one_line_that_stays_short():
    table = hf.table(tiny_config(), "qwen2")
    given = {f"{tensor.name}.x": tensor.shape for tensor in table} | {"model.norm.weight": (31,)}
    with pytest.raises(ModelError) as error:
        hf.match(table, given, where="x")
    message = str(error.value)
    assert "missing: model.embed_tokens.weight, model.layers.0" in message
    assert f"and {len(table) - 4} more; not known: " in message
    assert f"and {len(table) - 3} more; wrong shape: model.norm.weight [31] for [32]; " in message
    assert "\n" not in message and len(message) < 700


@pytest.mark.parametrize(
    ("given", "wanted", "hint"),
    [
        ("qwen2 tied", "qwen2 untied", "tie_word_embeddings: true"),
        ("qwen3", "qwen2 tied", "Qwen2 has these biases"),
        ("qwen2 tied", "qwen3", "Qwen3 has these norms"),
    ],
)
def test_weights_of_another_model_come_with_a_hint(given, wanted, hint):
    shapes = shapes_of(hf.table(*MODELS[given][::-1]))
    with pytest.raises(ModelError, match=f"; .*{hint}"):
        hf.match(hf.table(*MODELS[wanted][::-1]), shapes, where="x")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("model.layers.0.mlp.up_proj.qweight", "quantised, and config.json has no quantization_config"),
        ("model.layers.0.mlp.experts.3.up_proj.weight", "mixture of experts"),
        ("model.layers.0.mlp.experts.gate_up_proj", "experts are read one by one"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "adapter"),
    ],
)
def test_weights_of_another_kind_come_with_a_hint(name, hint):
    table = hf.table(tiny_config(), "qwen2")
    with pytest.raises(ModelError, match=f"not known: {name}; .*{hint}"):
        hf.match(table, shapes_of(table) | {name: (1,)}, where="x")
