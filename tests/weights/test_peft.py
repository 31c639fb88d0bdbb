"""Adapters in PEFT's form: there and back, what they make of a model, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from qwen_jax.config import Moe
from qwen_jax.errors import ConfigError, FileError, ModelError
from qwen_jax.model.adapter import LETTERS
from qwen_jax.weights import hf, peft
from qwen_jax.weights.adapted import AdaptedModel, Adapter
from qwen_jax.weights.convert import main as convert
from qwen_jax.weights.load import load_params
from qwen_jax.weights.source import open_model, pieces
from qwen_jax.weights.targets import select
from tests.conftest import tiny_config
from tests.published import publish, save_safetensors
from tests.weights.quantized import publish_quantised

SHAPE = dict(vocab_size=260, num_layers=2)
MODELS = {
    "qwen1": ("qwen", tiny_config(**SHAPE, head_dim=8, num_kv_heads=4, tie_embeddings=False)),
    "qwen2 tied": ("qwen2", tiny_config(**SHAPE)),
    "qwen2 experts": (
        "qwen2_moe",
        tiny_config(
            **SHAPE,
            mlp_width=0,
            tie_embeddings=False,
            moe=Moe(num_experts=2, top_k=1, expert_width=12, shared_width=20, normalize_top_k=False),
        ),
    ),
}


def make(base, targets=("all-linear",), *, rank=3, tables=False, scale=0.25) -> AdaptedModel:
    """A random adapter of a base."""
    rng = np.random.default_rng(5)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)
    arrays = {}
    parts = {
        part.path: (part, rows) for tensor in base.table for part, rows in zip(tensor.parts, tensor.rows, strict=True)
    }
    for path in select(base.table, targets):
        part, rows = parts[f"{path}/w"]
        outputs = hf.output_axes(part, rows)
        arrays[f"{path}/lora_a"] = draw(base.config.num_layers, rank, *part.shape[outputs:])
        arrays[f"{path}/lora_b"] = draw(base.config.num_layers, *part.shape[:outputs], rank)
    for path in [path for path in ("embed/w", "head/w") if tables and path in parts]:
        arrays[path] = draw(*parts[path][0].shape)
    adapter = Adapter(base=str(base.path), scale=scale, dropout=0.0, arrays=arrays)
    return AdaptedModel(base, adapter, path=base.path)


def weights(model) -> dict[str, np.ndarray]:
    """All tensors of a model under their published names."""
    return {tensor.name: np.concatenate([model.read(p).ravel() for p in pieces(tensor, 4)]) for tensor in model.table}


@pytest.fixture(params=MODELS)
def adapted(request, tmp_path):
    model_type, config = MODELS[request.param]
    publish(tmp_path / "base", config, model_type)
    return make(open_model(tmp_path / "base"), tables=True)


def edit(folder, **fields):
    values = json.loads((folder / "adapter_config.json").read_text()) | fields
    (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in values.items() if v != "absent"}))


def write(model, folder):
    folder.mkdir()
    peft.write(model, folder)
    return folder


def test_what_is_written_is_read_as_the_same_model(adapted, tmp_path):
    opened = open_model(write(adapted, tmp_path / "peft"))
    assert isinstance(opened, AdaptedModel) and opened.config == adapted.config
    if adapted.model_type != "qwen":  # whose q, k and v are one matrix there
        assert opened.adapter.scale == adapted.adapter.scale
        assert {k: v.tobytes() for k, v in opened.adapter.arrays.items()} == {
            k: v.tobytes() for k, v in adapted.adapter.arrays.items()
        }
    ours, theirs, base = weights(adapted), weights(opened), weights(adapted.base)
    for name, want in ours.items():
        np.testing.assert_allclose(theirs[name], want, rtol=1e-5, atol=1e-5)
    changed = {name for name in ours if not np.array_equal(ours[name], base[name])}
    unchanged = {name for name in ours if "norm" in name or "bias" in name or ".ln_" in name}
    unchanged |= {name for name in ours if ".experts." in name or "mlp.gate.weight" in name or "expert_gate" in name}
    assert changed == ours.keys() - unchanged


def test_a_shared_a_stays_shared(tmp_path):
    """Of the fused matrix of Qwen1: PEFT's own have one lora_A for all three parts of it."""
    publish(tmp_path / "base", MODELS["qwen1"][1], "qwen")
    made = make(open_model(tmp_path / "base"), ("c_attn",))
    first = write(made, tmp_path / "first")
    block = json.loads((first / "adapter_config.json").read_text())
    assert (block["r"], block["lora_alpha"], block["target_modules"]) == (9, 9 / 4, ["c_attn"])
    once = open_model(first)
    second = write(once, tmp_path / "second")
    assert (first / peft.WEIGHTS).read_bytes() == (second / peft.WEIGHTS).read_bytes()


def test_ranks_and_scales_may_differ_from_module_to_module(tmp_path):
    publish(tmp_path / "base", MODELS["qwen2 tied"][1], "qwen2")
    folder = write(make(open_model(tmp_path / "base"), ("q_proj", "k_proj")), tmp_path / "peft")
    tensors = dict(np.load(_npz(folder, tmp_path)))
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
    tensors[key.format("A")], tensors[key.format("B")] = tensors[key.format("A")][:2], tensors[key.format("B")][:, :2]
    del tensors["base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"]
    del tensors["base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight"]
    save_safetensors(folder / peft.WEIGHTS, tensors)
    edit(folder, rank_pattern={"layers.1.self_attn.q_proj": 2}, alpha_pattern={"^model.layers.1.self_attn.k_proj$": 8})
    model = open_model(folder)
    found, base = weights(model), weights(model.base)
    none = {"A": np.zeros((1, 32)), "B": np.zeros((20, 1))}
    for layer, name, scale in [
        (0, "q_proj", 0.75 / 3),
        (1, "q_proj", 0.75 / 2),
        (1, "k_proj", 8 / 3),
        (0, "k_proj", 0),
    ]:
        name = f"model.layers.{layer}.self_attn.{name}"
        a, b = (tensors.get(f"base_model.model.{name}.lora_{x}.weight", none) for x, none in none.items())
        np.testing.assert_allclose(found[f"{name}.weight"] - base[f"{name}.weight"], scale * (b @ a).ravel(), atol=1e-5)


def _npz(folder, tmp_path):
    from qwen_jax.weights.safetensors import SafetensorsFile

    with SafetensorsFile(folder / peft.WEIGHTS) as file:
        np.savez(tmp_path / "tensors.npz", **{name: file.read(name) for name in file.tensors})
    return tmp_path / "tensors.npz"


def test_convert_merges_and_writes_adapters_alone(tmp_path):
    publish(tmp_path / "base", MODELS["qwen2 tied"][1], "qwen2")
    made = make(open_model(tmp_path / "base"), ("q_proj",))
    folder = write(made, tmp_path / "peft")
    assert convert([str(folder), str(tmp_path / "merged")]) == 0
    with open_model(tmp_path / "merged") as merged:
        assert {k: v.tobytes() for k, v in weights(merged).items()} == {
            k: v.tobytes() for k, v in weights(made).items()
        }
    assert convert([str(folder), str(tmp_path / "again"), "--to", "peft"]) == 0
    assert (tmp_path / "again" / peft.WEIGHTS).read_bytes() == (folder / peft.WEIGHTS).read_bytes()
    with pytest.raises(ModelError, match="whole model and no adapter"):
        convert([str(tmp_path / "base"), str(tmp_path / "no"), "--to", "peft"])


WRONG = {
    "peft_type is 'VERA', and LORA is read": dict(peft_type="VERA"),
    "use_dora is True; this is no plain LoRA": dict(use_dora=True),
    "some_new_kind is {'x': 1}; this is no plain LoRA": dict(some_new_kind={"x": 1}),
    "bias is 'all'; biases that were trained are not read": dict(bias="all"),
    "init_lora_weights is 'pissa'; this changes the base too": dict(init_lora_weights="pissa"),
    r"lora_A and lora_B of model.layers.0.self_attn.q_proj are \[3, 32\] .* \[4, 32\]": dict(r=4),
    "lora_alpha is -1; a positive number": dict(lora_alpha=-1),
    "base_model_name_or_path is missing": dict(base_model_name_or_path="absent"),
    "rank_pattern: '(a+)+b' is read where it is the name": dict(rank_pattern={"(a+)+b": 3}),
    "is an adapter of /no, which is not there: /no does not exist": dict(base_model_name_or_path="/no"),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_what_is_no_plain_adapter_of_its_base_is_refused(message, tmp_path):
    publish(tmp_path / "base", MODELS["qwen2 tied"][1], "qwen2")
    folder = write(make(open_model(tmp_path / "base"), ("q_proj",)), tmp_path / "peft")
    edit(folder, **WRONG[message])
    pattern = message.replace("(a+)+b", r"\(a\+\)\+b").replace("{'x': 1}", r"\{'x': 1\}")
    with pytest.raises((ModelError, FileError), match=pattern) as refused:
        open_model(folder)
    assert "\n" not in str(refused.value)


def test_tensors_without_a_place_are_refused(tmp_path):
    publish(tmp_path / "base", MODELS["qwen2 tied"][1], "qwen2")
    folder = write(make(open_model(tmp_path / "base"), ("q_proj",), tables=True), tmp_path / "peft")
    tensors = dict(np.load(_npz(folder, tmp_path)))
    head = "base_model.model.lm_head.weight"
    for changed, message in [
        ({"base_model.model.lm_head.lora_A.weight": np.ones((3, 32), np.float32)}, "lm_head.lora_A.weight'"),
        ({head: tensors[head] + 1}, "one table as embedding and as head, and this makes two of it"),
    ]:
        save_safetensors(folder / peft.WEIGHTS, tensors | changed)
        with pytest.raises(ModelError, match=message):
            open_model(folder)
    edit(folder, base_model_name_or_path=str(folder))
    with pytest.raises(ModelError, match="an adapter of itself"):
        open_model(folder)


def test_targets_are_names_that_users_know():
    tables = {name: hf.table(config, kind) for name, (kind, config) in MODELS.items()}
    attention = [f"layers/attention/{name}" for name in "qkvo"]
    assert select(tables["qwen2 tied"], ["v_proj", "q_proj"]) == ("layers/attention/v", "layers/attention/q")
    assert set(select(tables["qwen1"], ["c_attn", "c_proj", "w1", "w2"])) == {
        *attention, "layers/mlp/gate", "layers/mlp/up", "layers/mlp/down"
    }  # fmt: skip
    everything = {path for table in tables.values() for path in select(table, ["all-linear"])}
    assert everything == set(LETTERS)
    shared = [f"layers/mlp/shared/{name}" for name in ("gate", "up", "down")]
    assert set(select(tables["qwen2 experts"], ["all-linear"])) == {*attention, *shared}
    for target in ("gate_proj", "mlp.gate", "embed_tokens"):
        with pytest.raises(ConfigError, match="cannot be adapted.*such as q_proj"):
            select(tables["qwen2 experts"], [target])
    with pytest.raises(ConfigError, match="names no matrix.*q_proj, k_proj, v_proj, o_proj, gate_proj"):
        select(tables["qwen2 tied"], ["c_attn"])


@pytest.mark.usefixtures("mesh")
def test_beside_a_quantised_base_an_adapter_does_what_it_does_merged(tmp_path):
    import jax.numpy as jnp

    from qwen_jax.ops.lora import Adapted
    from tests.published import assert_close, logits, tree_of

    how = dict(quant_method="gptq", bits=4, group_size=8, sym=True, desc_act=False)
    config = tiny_config(vocab_size=260, num_layers=1, head_dim=8, tie_embeddings=False)
    publish_quantised(tmp_path / "base", config, "qwen2", how)
    model = make(open_model(tmp_path / "base"), ("q_proj", "down_proj"), scale=0.1)
    params = load_params(model, dtype="float32", stacked=False)
    assert isinstance(params["layers_0"]["attention"]["q"]["w"], Adapted)
    merged = {t.name: weights(model)[t.name].reshape(t.shape) for t in model.table}
    tokens = jnp.arange(12, dtype=jnp.int32)[None] * 5
    positions = jnp.arange(12, dtype=jnp.int32)[None]
    want = logits(config, tree_of(config, model.table, merged), tokens, positions)
    assert_close(logits(config, params, tokens, positions), want)
