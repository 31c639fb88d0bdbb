"""config.json both ways: strict in, complete out, and nothing else of a file changes."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax import zoo
from qwen_jax.config import DualChunk, DynamicNTK, Linear, ModelConfig, Moe, QwenNTK, Rope, Score, Yarn
from qwen_jax.errors import ModelError
from qwen_jax.weights import hf, hf_config
from qwen_jax.weights.hf_quantization import Quantization, read_quantization
from tests.conftest import tiny_config
from tests.published import QWEN1_OLD_NAMES
from tests.weights.quantized import AWQ, GPTQ

CONFIGS = Path(__file__).parents[3] / "shared" / "data" / "hf-configs"
needs_published = pytest.mark.skipif(not CONFIGS.is_dir(), reason="needs ../shared/data with published configs")

# As published, every key of the kind: at values that no default would give.
QWEN1 = {
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"},
    "attn_dropout_prob": 0.0,
    "bf16": False,
    "fp16": True,
    "hidden_size": 32,
    "intermediate_size": 80,
    "kv_channels": 8,
    "layer_norm_epsilon": 3e-05,
    "max_position_embeddings": 640,
    "model_type": "qwen",
    "no_bias": True,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "padded_vocab_size": 96,
    "rotary_emb_base": 12345,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 64,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "vocab_size": 96,
}
QWEN1_OLD = {QWEN1_OLD_NAMES.get(name, name): value for name, value in QWEN1.items()}
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 90,
    "eos_token_id": [91, 90],
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "max_window_layers": 3,
    "model_type": "qwen2",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 3e-05,
    "rope_scaling": None,
    "rope_theta": 12345.0,
    "sliding_window": 17,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 96,
}
QWEN3 = QWEN2 | {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 10,
    "model_type": "qwen3",
}
EXPERTS = {
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 12,
    "norm_topk_prob": True,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "router_aux_loss_coef": 0.001,
}
QWEN2_MOE = (
    QWEN2
    | EXPERTS
    | {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "norm_topk_prob": False,
        "qkv_bias": True,
        "shared_expert_intermediate_size": 20,
    }
)
QWEN3_MOE = QWEN3 | EXPERTS | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
# As transformers 5 writes it.
QWEN3_LOCAL = {"num_local_experts" if name == "num_experts" else name: value for name, value in QWEN3_MOE.items()}
FILES = {
    "qwen": QWEN1,
    "qwen old": QWEN1_OLD,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen2_moe": QWEN2_MOE,
    "qwen3_moe": QWEN3_MOE,
    "qwen3 local": QWEN3_LOCAL,
}

BFLOAT16 = dict(param_dtype="bfloat16", dtype="bfloat16")
MODELS = {
    "qwen": tiny_config(
        num_kv_heads=4,
        head_dim=8,
        tie_embeddings=False,
        max_position=512,
        logn=64,
        rope=Rope(theta=12345.0, scaling=QwenNTK(original_positions=64)),
        **BFLOAT16,
    ),  # fmt: skip
    "qwen2": tiny_config(head_dim=8, **BFLOAT16),
    "qwen3": tiny_config(qkv_bias=False, qk_norm=True, **BFLOAT16),
}
MODELS["qwen old"] = MODELS["qwen"]
_MOE = Moe(num_experts=6, top_k=3, expert_width=12, shared_width=0, normalize_top_k=True)
MODELS["qwen2_moe"] = dataclasses.replace(
    MODELS["qwen2"], mlp_width=0, moe=dataclasses.replace(_MOE, shared_width=20, normalize_top_k=False)
)
MODELS["qwen3_moe"] = MODELS["qwen3 local"] = dataclasses.replace(MODELS["qwen3"], mlp_width=0, moe=_MOE)


def read(values) -> ModelConfig:
    return hf_config.from_hf(values, where="m/config.json")


def without(values, *names):
    return {name: value for name, value in values.items() if name not in names}


@pytest.mark.parametrize("kind", FILES)
def test_each_key_set_is_read(kind):
    assert read(FILES[kind]) == MODELS[kind]


@pytest.mark.parametrize("name", zoo.names())
def test_every_published_model_makes_the_way_there_and_back(name):
    config = zoo.published(name)
    kinds = [hf.model_type_of(config), *(["qwen"] if name.startswith("Qwen-") else [])]
    for kind in kinds:
        assert read(json.loads(json.dumps(hf_config.to_hf(config, kind)))) == config


# What the collection of shapes says otherwise than the zoo: another program's limits, the first Qwen-7B, a guess.
OTHERWISE = {
    "Qwen1.5-1.8B-Chat": ["max_position"],
    "Qwen-7B(-Chat, Aug 2023)": ["rope", "logn"],
    "Qwen1.5-4B": ["rope"],
}


@needs_published
def test_published_shapes_are_those_of_the_zoo():
    shapes = without(json.loads((CONFIGS / "qwen_shapes.json").read_text()), "_note")
    assert len(shapes) == 22
    for name, values in shapes.items():
        values = without(values, "attention_bias")  # in words
        if values["model_type"] == "qwen":
            values |= {"kv_channels": 128, "layer_norm_epsilon": 1e-6, "seq_length": values["max_position_embeddings"]}
        config, known = read(values), zoo.published(name.split("(")[0])
        for field in OTHERWISE.get(name, []):
            assert getattr(config, field) != getattr(known, field)
            config = dataclasses.replace(config, **{field: getattr(known, field)})
        assert config == known, name
        tensors = hf.table(config, values["model_type"])
        assert config.num_parameters == sum(math.prod(t.shape) for t in tensors) == values["params_total"]


@needs_published
@pytest.mark.parametrize(
    ("folder", "name", "changes"),
    [
        ("Qwen-72B", "Qwen-72B", {}),
        # The original of August 2023; later ones have 8192.
        (
            "Qwen-7B-Chat",
            "Qwen-7B-Chat",
            dict(max_position=16384, logn=2048, rope=Rope(theta=10000.0, scaling=QwenNTK(original_positions=2048))),
        ),
        ("Qwen2-1.5B-Instruct-finetune", "Qwen2-1.5B-Instruct", BFLOAT16),
    ],
)
def test_published_files_are_read_and_given_back_unchanged(folder, name, changes):
    values = json.loads((CONFIGS / folder / "config.json").read_text())
    config = read(values)
    assert config == dataclasses.replace(zoo.published(name), **changes)
    assert hf_config.to_hf(config, values["model_type"], keep=values) == values


@needs_published
def test_a_published_quantised_model_of_images_is_refused_for_its_images():
    values = json.loads((CONFIGS / "Qwen-VL-Chat-Int4" / "config.json").read_text())
    with pytest.raises(ModelError, match="only models of text"):
        read(values)
    found = read_quantization(values, where="config.json")
    assert found == Quantization(method="gptq", bits=4, group=128, symmetric=True, offset=1, head_bits=4)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("rope", "theta"),
    [
        ({"rope_theta": 777}, 777.0),
        ({"rope_theta": 777, "rope_scaling": {"type": "default"}}, 777.0),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}}, 777.0),
        ({"rope_theta": 777, "rope_parameters": {"rope_type": "default", "rope_theta": 777.0}}, 777.0),
    ],
)
def test_plain_rotary_embeddings_in_every_spelling(kind, rope, theta):
    values = without(FILES[kind], "rope_theta", "rope_scaling") | rope
    assert read(values).rope == Rope(theta=theta)


YARN = {"factor": 4.0, "original_max_position_embeddings": 50}
PAPER = Yarn(factor=4.0, original_positions=50, beta_fast=32.0, beta_slow=1.0, attention_factor=0.1 * math.log(4.0) + 1)
SCALINGS = [
    ({"type": "linear", "factor": 3}, Linear(factor=3.0), 64),
    ({"rope_type": "dynamic", "factor": 2.5}, DynamicNTK(factor=2.5, original_positions=64), 160),
    ({"type": "yarn"} | YARN, PAPER, 200),
    ({"type": "yarn", "rope_type": "yarn", "truncate": True, "mscale": 0.7} | YARN, PAPER, 200),
    ({"type": "yarn"} | YARN | {"factor": 1.25}, dataclasses.replace(
        PAPER, factor=1.25, attention_factor=0.1 * math.log(1.25) + 1), 64),
    (
        {"type": "yarn", "beta_fast": 9, "beta_slow": 0.5, "attention_factor": 2.5, "mscale": 1, "mscale_all_dim": 1}
        | YARN,
        dataclasses.replace(PAPER, beta_fast=9.0, beta_slow=0.5, attention_factor=2.5),
        200,
    ),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.parametrize(("written", "scaling", "max_position"), SCALINGS)
def test_rope_scalings_in_every_spelling(kind, written, scaling, max_position):
    new = {"rope_parameters": written | {"rope_theta": 12345.0}, "rope_theta": None}
    for values in (FILES[kind] | {"rope_scaling": written}, FILES[kind] | new):
        config = read(values)
        assert (config.rope, config.max_position) == (Rope(theta=12345.0, scaling=scaling), max_position)
        assert hf_config.to_hf(config, kind, keep=values) == values
        assert read(hf_config.to_hf(config, kind)) == config


@pytest.mark.parametrize("ntk", [True, False])
@pytest.mark.parametrize("logn", [True, False])
def test_qwen1_is_extended_as_its_file_says(ntk, logn):
    config = read(QWEN1 | {"use_dynamic_ntk": ntk, "use_logn_attn": logn})
    assert config.rope.scaling == (QwenNTK(original_positions=64) if ntk else None)
    assert (config.logn, config.max_position) == (64 if logn else 0, 512 if ntk else 64)
    assert read(hf_config.to_hf(config, "qwen")) == config


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({"use_sliding_window": True, "max_window_layers": 1}, (0, 17, 17)),
        ({"use_sliding_window": True, "max_window_layers": 0}, (17, 17, 17)),
        ({"use_sliding_window": True, "max_window_layers": 70}, ()),
        ({"use_sliding_window": None, "max_window_layers": 1}, ()),
        ({"use_sliding_window": True, "max_window_layers": None, "layer_types": "sfs"}, (17, 0, 17)),
        ({"use_sliding_window": True, "max_window_layers": 2, "layer_types": "ffs"}, (0, 0, 17)),
        ({"use_sliding_window": False, "sliding_window": None, "layer_types": "fff"}, ()),
    ],
)
def test_windows(fields, windows):
    if "layer_types" in fields:
        kinds = {"s": "sliding_attention", "f": "full_attention"}
        fields = fields | {"layer_types": [kinds[letter] for letter in fields["layer_types"]]}
    config = read(QWEN2 | fields)
    assert config.windows == windows
    assert read(hf_config.to_hf(config, "qwen2")).windows == windows


CHUNKS = {"chunk_size": 40, "local_size": 8, "original_max_position_embeddings": 50}


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.parametrize("sparse", [{}, {"sparse_attention_config": [{"0": ["vertical_and_slash", 9, 9, 1.0]}]}])
def test_dual_chunk_attention(kind, sparse):
    scaling = DualChunk(chunk_size=40, local_size=8, original_positions=50)
    # Which keys another program leaves out to be faster is kept while the chunks stay what they are.
    values = FILES[kind] | {"rope_scaling": None, "dual_chunk_attention_config": CHUNKS | sparse}
    config = read(values)
    assert (config.rope, config.max_position) == (Rope(theta=12345.0, scaling=scaling), 64)
    assert hf_config.to_hf(config, kind, keep=values) == values
    assert read(hf_config.to_hf(config, kind)) == config
    changed = dataclasses.replace(config, rope=Rope(theta=9.0, scaling=dataclasses.replace(scaling, local_size=7)))
    written = hf_config.to_hf(changed, kind, keep=values)
    assert written["dual_chunk_attention_config"] == CHUNKS | {"local_size": 7} and read(written) == changed
    plain = dataclasses.replace(config, rope=Rope(theta=12345.0))
    assert "dual_chunk_attention_config" not in hf_config.to_hf(plain, kind, keep=values)


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({"torch_dtype": "float32"}, "float32"),
        ({"torch_dtype": "float16"}, "float32"),
        ({"torch_dtype": None}, "float32"),
        ({"torch_dtype": None, "dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "bfloat16"}, "bfloat16"),
    ],
)
def test_dtypes(fields, dtype):
    config = read(QWEN2 | fields)
    assert (config.param_dtype, config.dtype) == (dtype, dtype)


@pytest.mark.parametrize(
    ("fields", "score"),
    [
        ({"architectures": None}, None),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, Score(labels=2, hidden=False)),
        ({"architectures": ["Qwen2ForSequenceClassification"], "num_labels": 7}, Score(labels=7, hidden=False)),
        (
            {"architectures": ["Qwen2ForSequenceClassification"], "id2label": {"0": "LABEL_0"}},
            Score(labels=1, hidden=False),
        ),
        ({"architectures": ["Qwen2ForRewardModel"]}, Score(labels=1, hidden=True)),
        ({"architectures": ["Qwen2ForProcessRewardModel"]}, Score(labels=2, hidden=True)),
    ],
)
def test_scores(fields, score):
    config = read(QWEN2 | fields)
    assert config.score == score
    assert read(hf_config.to_hf(config, "qwen2")) == config


# Each a change of one file, and what the message must say besides the file's name.
BAD = [
    # Missing, or of another type or range.
    *[("qwen2", {name: None}, f"{name} is missing") for name in (
        "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "intermediate_size", "max_position_embeddings", "rms_norm_eps", "rope_theta", "tie_word_embeddings",
    )],
    ("qwen3", {"head_dim": None}, "head_dim is missing"),
    *[("qwen", {name: None}, f"{name} is missing") for name in ("kv_channels", "seq_length", "layer_norm_epsilon")],
    ("qwen", {"hidden_size": None}, "hidden_size or n_embd is missing"),
    ("qwen", {"rotary_emb_base": None}, "rotary_emb_base or rope_theta is missing"),
    *[("qwen2", {"num_hidden_layers": value}, f"num_hidden_layers is {shown}; a whole number from 1 to 1000")
      for value, shown in [("3", "'3'"), (-3, "-3"), (0, "0"), (10**9, "1000000000"), (3.0, "3.0"), (True, "True"),
                           ([3], r"\[3\]"), ({}, "{}")]],
    ("qwen2", {"vocab_size": 10**9}, "vocab_size is 1000000000; a whole number from 1 to 10000000"),
    ("qwen2", {"rope_theta": "1e6"}, "rope_theta is '1e6'; a positive number"),
    ("qwen2", {"rope_theta": True}, "rope_theta is True; a positive number"),
    ("qwen2", {"rope_theta": math.nan}, "rope_theta is nan; a positive number"),
    ("qwen2", {"rope_theta": 10**400}, "rope_theta is 1000.*; a positive number"),
    ("qwen2", {"rope_theta": 0.5}, "theta=0.5 must be above 1"),
    ("qwen2", {"rms_norm_eps": 5}, "norm_eps=5.0 must be between 0 and 1"),
    ("qwen2", {"tie_word_embeddings": "true"}, "tie_word_embeddings is 'true'; true or false"),
    ("qwen2", {"num_key_value_heads": 3}, "num_heads=4 must be a multiple of num_kv_heads=3"),
    ("qwen2", {"num_attention_heads": 5}, "hidden_size 32 is not a multiple"),
    ("qwen3", {"head_dim": 9}, "head_dim=9 must be even"),
    ("qwen", {"intermediate_size": 81}, "intermediate_size is 81; an even number"),
    ("qwen", {"kv_channels": 10}, "kv_channels is 10; times 4 heads it must be the width 32"),
    ("qwen", {"padded_vocab_size": 128}, "padded_vocab_size is 128; it must equal vocab_size, 96"),
    ("qwen", {"rope_theta": 10000}, "rope_theta is 10000; it must equal rotary_emb_base, 12345"),
    # Another architecture.
    ("qwen2", {"model_type": "llama"}, "model_type is 'llama'; 'qwen', 'qwen2', 'qwen2_moe', 'qwen3', 'qwen3_moe' are"),
    ("qwen2", {"model_type": ["qwen2"]}, r"model_type is \['qwen2'\]"),
    ("qwen2", {"model_type": "qwen2_moe"}, "num_experts or num_local_experts is missing"),
    ("qwen3", {"num_experts": 128}, "num_experts is 128; model_type 'qwen3' is that of a dense model"),
    # Mixtures of experts.
    *[("qwen2_moe", {name: None}, f"{name} is missing") for name in (
        "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size", "norm_topk_prob",
    )],
    ("qwen3_moe", {"num_experts_per_tok": 7}, "top_k=7 must not exceed num_experts=6"),
    ("qwen3_moe", {"num_local_experts": 7}, "num_local_experts is 7; it must equal num_experts, 6"),
    ("qwen3_moe", {"num_experts": 10**6}, "num_experts is 1000000; a whole number from 1 to 33333"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2; only 1 is read"),
    ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]; only \[\] is read"),
    ("qwen2_moe", {"qkv_bias": False}, "qkv_bias is False; only True is read"),
    ("qwen2_moe", {"architectures": ["Qwen2ForCausalLM"]}, "one name is wanted: Qwen2MoeForCausalLM"),
    ("qwen", {"visual": {"width": 1}}, "only models of text are read"),
    *(
        ("qwen2", {"quantization_config": changes}, f"quantization_config: {message}")
        for changes, message in (
            ({"bits": 4}, "quant_method is missing"),
            ({"quant_method": "fp8"}, "quant_method is 'fp8'; 'gptq' and 'awq' are read"),
            (GPTQ | {"bits": 3}, "bits is 3; 4 and 8 are read"),
            (GPTQ | {"group_size": 100}, "group_size is 100; a multiple of 8 is wanted"),
            (GPTQ | {"group_size": 0}, "group_size is 0; a whole number from 1"),
            (GPTQ | {"sym": None}, "sym is missing"),
            (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'; gptq and gptq_v2 are read"),
            (GPTQ | {"is_marlin_format": True}, "is_marlin_format is True; false is read"),
            (GPTQ | {"dynamic": {"-:.*down.*": {}}}, "dynamic is .*; only bits of lm_head, and .* are read"),
            (AWQ | {"version": "gemv"}, "version is 'gemv'; 'gemm' is read"),
            (AWQ | {"zero_point": False}, "zero_point is False; true is read"),
            (AWQ | {"bits": 8}, "bits is 8; 4 is read"),
        )
    ),
    ("qwen2", {"architectures": ["Qwen2ForTokenClassification"]}, "architectures is .*Qwen2ForCausalLM, Qwen2ForSeq"),
    ("qwen2", {"architectures": "Qwen2ForCausalLM"}, "architectures is 'Qwen2ForCausalLM'; a list of one name"),
    ("qwen2", {"architectures": ["Qwen3ForCausalLM"]}, "architectures is "),
    ("qwen", {"architectures": ["QwenForSequenceClassification"]}, "one name is wanted: QWenLMHeadModel$"),
    # What the code cannot honour.
    ("qwen2", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is read"),
    ("qwen3", {"attention_bias": True}, "attention_bias is True; only False is read"),
    ("qwen", {"no_bias": False}, "no_bias is False; only True is read"),
    ("qwen", {"rotary_pct": 0.25}, "rotary_pct is 0.25; only 1.0 is read"),
    ("qwen", {"scale_attn_weights": False}, "scale_attn_weights is False"),
    ("qwen2", {"use_mrope": True}, "use_mrope is True"),
    *[("qwen", {name: None}, f"{name} is missing") for name in ("use_dynamic_ntk", "use_logn_attn")],
    ("qwen", {"use_logn_attn": 1}, "use_logn_attn is 1; true or false"),
    *[("qwen2", {"rope_scaling": scaling}, f"rope_scaling: {message}") for scaling, message in [
        ({"type": "yarn", "factor": 4.0}, "original_max_position_embeddings is missing; write the length before YaRN"),
        ({"type": "yarn"}, "factor is missing"),
        ({"type": "linear"}, "factor is missing"),
        ({"type": "dynamic", "factor": None}, "factor is missing"),
        ({"type": "linear", "factor": "2"}, "factor is '2'; a positive number"),
        ({"type": "dynamic", "factor": 1e9}, "factor is 1000000000.0; at most 1000000000 positions"),
        ({"type": "dynamic", "factor": 2.0} | YARN, "it has a 'original_max_position_embeddings', which is not known"),
        ({"rope_type": "default", "factor": 4.0}, "it has a 'factor', which is not known of the type 'default'"),
        ({"type": "linear", "rope_type": "yarn"} | YARN, "type is 'linear'; it must equal rope_type, 'yarn'"),
        ({"type": "llama3", "factor": 8.0}, "type is 'llama3'; one of default, linear, dynamic, yarn is wanted"),
        ({"rope_type": ["yarn"]}, r"rope_type is \['yarn'\]"),
        ({"type": "yarn", "truncate": False} | YARN, "truncate is False; only true"),
        ({"type": "yarn", "truncate": None} | YARN, "truncate is None; only true"),
        ({"type": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0} | YARN, "mscale is 1.0; write the attention_factor"),
        ({"type": "yarn", "beta_fast": 0} | YARN, "beta_fast is 0; a positive number"),
        ({"type": "yarn", "betafast": 9} | YARN, "it has a 'betafast', which is not known of the type 'yarn'"),
    ]],
    ("qwen2", {"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor=0.5 must be at least 1"),
    ("qwen2", {"rope_scaling": {"type": "yarn", "beta_fast": 1} | YARN}, "beta_slow=1.0 must be above 0 and below"),
    ("qwen2", {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "default"}},
     "rope_parameters is .*; it must say the same as rope_scaling"),
    ("qwen2", {"rope_scaling": {"type": "yarn"} | YARN, "original_max_position_embeddings": 64},
     "original_max_position_embeddings is 64; it must equal that of YaRN, 50"),
    ("qwen2", {"rope_scaling": {"type": "yarn"} | YARN, "dual_chunk_attention_config": CHUNKS},
     "dual_chunk_attention_config is .*; beside a rope_scaling"),
    ("qwen2", {"rope_scaling": "yarn"}, "rope_scaling is 'yarn'; an object is wanted"),
    ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, r"given as \[12345.0, 1000000.0\]"),
    ("qwen2", {"rope_parameters": {"rope_theta": "x"}}, "rope_parameters: rope_theta is 'x'"),
    ("qwen2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ("qwen2", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0; what it does"),
    ("qwen2", {"logits_scaling": 8}, "logits_scaling is 8; what it does"),
    ("qwen2", {"rope_local_base_freq": 1e4}, "rope_local_base_freq is 10000.0; what it does"),
    *[("qwen2", {"dual_chunk_attention_config": CHUNKS | change}, message) for change, message in [
        *[({name: None}, f"dual_chunk_attention_config: {name} is missing") for name in CHUNKS],
        ({"chunk_size": "40"}, "chunk_size is '40'; a whole number"),
        ({"local_size": 40}, "local_size=40 must be above 0 and below chunk_size=40"),
        ({"chunksize": 9}, "dual_chunk_attention_config: it has a 'chunksize', which is not known"),
    ]],
    ("qwen2", {"dual_chunk_attention_config": CHUNKS, "use_sliding_window": True, "max_window_layers": 0},
     r"windows=\(17, 17, 17\) and DualChunk cannot be combined"),
    ("qwen2", {"dual_chunk_attention_config": True}, "dual_chunk_attention_config is True; an object"),
    ("qwen2", {"use_sliding_window": "yes"}, "use_sliding_window is 'yes'"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": None}, "sliding_window is missing"),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": None}, "max_window_layers is missing"),
    ("qwen2", {"layer_types": ["full_attention"] * 2}, "layer_types is .* for each of 3 layers"),
    ("qwen2", {"layer_types": ["full_attention", "linear_attention", 3]}, "layer_types is "),
    ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "use_sliding_window says that no layer slides"),
    ("qwen2", {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 3}, "max_window_layers 3 says other"),
    # Two answers to one question, or none that is known.
    ("qwen2", {"torch_dtype": "float64"}, "torch_dtype is 'float64'; 'float32', 'bfloat16' or 'float16'"),
    ("qwen2", {"torch_dtype": "int8"}, "torch_dtype is 'int8'"),
    ("qwen2", {"dtype": "float16"}, "dtype is 'float16'; it must equal torch_dtype, 'bfloat16'"),
    ("qwen2", {"architectures": ["Qwen2ForSequenceClassification"], "num_labels": 3, "id2label": {"0": "a"}},
     "num_labels is 3; id2label has 1"),
    ("qwen2", {"architectures": ["Qwen2ForSequenceClassification"], "id2label": {}}, "labels=0 must be at least 1"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "change", "message"), BAD, ids=[f"{kind} {change}"[:60] for kind, change, _ in BAD])
def test_what_cannot_be_honoured_is_refused_in_one_line(kind, change, message):
    with pytest.raises(ModelError, match=rf"^m/config\.json: .*{message}") as error:
        read(FILES[kind] | change)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_code_is_not_run_and_other_programs_fields_are_not_looked_at():
    values = QWEN2 | {"auto_map": {"AutoConfig": "../../x.py"}, "transformers_version": 3, "attention_sink": False}
    assert read(values) == MODELS["qwen2"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


MORE = {"dual_chunk_attention_config", "head_dim", "id2label", "layer_types", "num_labels", "rope_parameters"}
ROPE = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["default", "linear", "dynamic", "yarn"])},
    optional={name: JSON | st.floats(0.5, 99) for name in ("rope_theta", "beta_fast", "attention_factor", "mscale")}
    | {"factor": st.floats(0.5, 1e9), "original_max_position_embeddings": JSON | st.integers(1, 99)},
)

CHUNK_SIZES = st.fixed_dictionaries({name: JSON | st.integers(0, 99) for name in CHUNKS})


@given(st.sampled_from(sorted(FILES)), st.data())
def test_any_value_of_any_field_is_read_or_refused(kind, data):
    name = data.draw(st.sampled_from(sorted(FILES[kind].keys() | QWEN2.keys() | MORE)))
    known = ROPE if name.startswith("rope_") else CHUNK_SIZES if name.startswith("dual_") else st.nothing()
    values = FILES[kind] | {name: data.draw(JSON | known)}
    try:
        config = read(values)
    except ModelError as error:
        assert str(error).startswith("m/config.json: ") and "\n" not in str(error)
    else:
        assert hf_config.to_hf(config, values["model_type"], keep=values) == values


CHANGES = [
    dict(vocab_size=97),
    dict(width=64, head_dim=16),
    dict(num_heads=8, num_kv_heads=8, head_dim=4),
    dict(num_layers=5),
    dict(mlp_width=44),
    dict(norm_eps=1e-3),
    dict(rope=Rope(theta=54321.5), max_position=64),
    dict(param_dtype="float32", dtype="float32"),
    dict(tie_embeddings=True),
    dict(tie_embeddings=False),
]
QWEN1_ONLY = [
    dict(logn=0),
    dict(rope=Rope(theta=54321.5), max_position=80, logn=80),
    dict(rope=Rope(theta=12345.0, scaling=QwenNTK(original_positions=5000)), max_position=32768, logn=5000),
]
NOT_QWEN1 = [
    dict(max_position=128),
    dict(rope=Rope(theta=12345.0, scaling=PAPER), max_position=200),
    dict(rope=Rope(theta=54321.5, scaling=PAPER), max_position=1000),
    dict(rope=Rope(theta=12345.0, scaling=Linear(factor=2.0)), max_position=128),
    dict(rope=Rope(theta=12345.0, scaling=DynamicNTK(factor=2.0, original_positions=40)), max_position=80),
    dict(rope=Rope(theta=12345.0, scaling=DualChunk(chunk_size=40, local_size=8, original_positions=0))),
    dict(windows=(0, 5, 5)),
    dict(windows=(5, 0, 5)),
    dict(num_kv_heads=1),
    dict(head_dim=12),
    dict(score=Score(labels=1, hidden=False)),
    dict(score=Score(labels=1, hidden=True)),
    dict(score=Score(labels=2, hidden=True)),
]


@pytest.mark.parametrize("kind", FILES)
def test_a_change_is_written_and_the_rest_of_the_file_is_kept(kind):
    original = FILES[kind] | {"eos_token_id": [7, 8], "something_else": {"a": [1]}}
    model_type = original["model_type"]
    for changes in CHANGES + (QWEN1_ONLY if model_type == "qwen" else NOT_QWEN1):
        if MODELS[kind].moe and "mlp_width" in changes:
            changes = dict(moe=dataclasses.replace(MODELS[kind].moe, num_experts=7, top_k=2))
        config = dataclasses.replace(MODELS[kind], **changes)
        written = hf_config.to_hf(config, model_type, keep=original)
        assert read(json.loads(json.dumps(written))) == config, changes
        assert read(hf_config.to_hf(config, model_type)) == config, changes
        assert {name: written[name] for name in ("eos_token_id", "something_else", "model_type")} == {
            name: original[name] for name in ("eos_token_id", "something_else", "model_type")
        }
        same = [name for name in original if name in written]
        assert list(written)[: len(same)] == same


def test_a_change_elsewhere_keeps_what_the_model_is_read_without():
    original = QWEN2 | {"dual_chunk_attention_config": CHUNKS | {"sparse_attention_enabled": False}}
    config = dataclasses.replace(read(original), num_layers=2)
    assert hf_config.to_hf(config, "qwen2", keep=original) == without(
        original, "max_window_layers", "sliding_window"
    ) | {"num_hidden_layers": 2}


def test_a_file_of_another_architecture_gives_only_its_ids_of_tokens():
    original = QWEN1 | {"eos_token_id": 9, "pad_token_id": None, "use_dynamic_ntk": False, "use_logn_attn": False}
    config = read(original)
    written = hf_config.to_hf(config, "qwen2", keep=original)
    assert written == hf_config.to_hf(config, "qwen2") | {"eos_token_id": 9, "pad_token_id": None}
    assert read(written) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(windows=(2, 3, 4)), r"one size for all windows, and this model has \[2, 3, 4\]"),
        (dict(score=Score(labels=3, hidden=True)), "hidden score of 3 labels"),
        (dict(qkv_bias=False), "'qwen2' has qkv_bias=True"),
        (dict(logn=64), "'qwen2' has logn=0, and this model 64"),
        (dict(rope=MODELS["qwen"].rope), "'qwen2' has no rope scaling of the kind QwenNTK"),
        (dict(rope=Rope(theta=12345.0, scaling=PAPER)), r"cannot say max_position=64: with Yarn\(.* 200 positions"),
    ],
)
def test_a_model_that_config_json_cannot_say_is_refused(changes, message):
    with pytest.raises(ModelError, match=message):
        hf_config.to_hf(tiny_config(**changes), "qwen2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(logn=32), "one training length, and this model logn=32 beside 64"),
        (dict(max_position=64), "cannot say max_position=64: with QwenNTK.* 512 positions"),
        (dict(rope=Rope(theta=12345.0, scaling=PAPER)), "'qwen' has no rope scaling of the kind Yarn"),
    ],
)
def test_a_qwen1_that_config_json_cannot_say_is_refused(changes, message):
    with pytest.raises(ModelError, match=message):
        hf_config.to_hf(dataclasses.replace(MODELS["qwen"], **changes), "qwen")


def test_a_scaling_that_is_taken_off_leaves_nothing_behind():
    extended = QWEN2 | {"rope_scaling": {"type": "yarn"} | YARN, "original_max_position_embeddings": 50}
    config = dataclasses.replace(read(extended), rope=Rope(theta=12345.0))
    written = hf_config.to_hf(config, "qwen2", keep=extended)
    assert written == without(QWEN2, "rope_scaling") | {"max_position_embeddings": 200}
    theta = dataclasses.replace(read(extended), rope=Rope(theta=2.0, scaling=PAPER))
    assert hf_config.to_hf(theta, "qwen2", keep=extended)["max_position_embeddings"] == 64
