"""The `config.json` of published checkpoints, read strictly and written back.

What changes the function a model computes is required, or refused where it cannot be honoured; nothing is guessed.
Fields that only matter to training or to other programs are not looked at.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from typing import Any, cast

from qwen_jax.config import DType, ModelConfig, Moe, QwenNTK, Rope, Score
from qwen_jax.errors import ConfigError, ModelError
from qwen_jax.weights.fields import MAX_POSITION, Fields
from qwen_jax.weights.hf import ModelType, check_model_type
from qwen_jax.weights.hf_quantization import read_quantization
from qwen_jax.weights.hf_rope import length_of, read_rope, scaling_fields, served

# Far above every published model, as the limits of other sizes.
_MAX_LAYERS = 1000
_MAX_EXPERTS = 10**5  # in all layers

# Which fields of the file say what ours say. They go when ours change, and stay as they were written otherwise.
_FIELDS = [
    (ours.split(), theirs.split())
    for ours, theirs in (
        ("vocab_size", "vocab_size padded_vocab_size"),
        (
            "width num_heads num_kv_heads head_dim",
            "hidden_size n_embd num_attention_heads n_head num_key_value_heads head_dim kv_channels",
        ),
        (
            "num_layers windows",
            "num_hidden_layers n_layer use_sliding_window sliding_window max_window_layers layer_types",
        ),
        ("mlp_width", "intermediate_size ffn_hidden_size"),
        (
            "moe",
            "num_experts num_local_experts num_experts_per_tok moe_intermediate_size shared_expert_intermediate_size "
            "norm_topk_prob decoder_sparse_step mlp_only_layers",
        ),
        ("max_position rope.scaling", "max_position_embeddings n_positions seq_length"),
        ("norm_eps", "rms_norm_eps layer_norm_epsilon"),
        (
            "rope logn",
            "rope_theta rotary_emb_base rope_scaling rope_parameters original_max_position_embeddings "
            "use_dynamic_ntk use_logn_attn",
        ),
        ("rope.scaling", "dual_chunk_attention_config"),
        ("tie_embeddings", "tie_word_embeddings"),
        ("score", "architectures auto_map num_labels id2label label2id"),
        ("param_dtype", "torch_dtype dtype params_dtype bf16 fp16 fp32"),
    )
]
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

# Architectures begin with the name of a family; those of Qwen1 have no score.
_FAMILY = {"qwen": "QWen", "qwen2": "Qwen2", "qwen2_moe": "Qwen2Moe", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe"}
_CAUSAL = {kind: family + ("LMHeadModel" if kind == "qwen" else "ForCausalLM") for kind, family in _FAMILY.items()}
_PLAIN_SCORE = "ForSequenceClassification"
_HIDDEN_SCORES = {"ForRewardModel": 1, "ForProcessRewardModel": 2}  # and how many labels they have

# Fields with one value that this library computes; absent, they have it.
_FIXED = {
    "hidden_act": "silu",
    "activation": "swiglu",
    "attention_bias": False,
    "mlp_bias": False,
    "no_bias": True,
    "pos_emb": "rotary",
    "rotary_pct": 1.0,
    "partial_rotary_factor": 1.0,
    "scale_attn_weights": True,
    "apply_residual_connection_post_layernorm": False,
    "use_mrope": False,
}
# Likewise in mixtures of experts, every layer of which is one.
_FIXED_MOE = {"decoder_sparse_step": 1, "mlp_only_layers": [], "qkv_bias": True}
_REFUSED = {
    "visual": "only models of text are read",
    "vision_config": "only models of text are read",
}
# An unknown field of such a name may well change the function; null and false say that it does not.
_SUSPECT = re.compile(r"(rope|rotary|attention|attn|logits?)_\w{,50}|\w{,50}_(scaling|softcap|softcapping|multiplier)")
_HARMLESS = {"attention_dropout", "attn_dropout_prob", "attn_pdrop", "attn_implementation"}
_KNOWN = _HARMLESS | _FIXED.keys() | {name for _, names in _FIELDS for name in names}


def from_hf(values: Mapping[str, Any], *, where: str) -> ModelConfig:
    """The model that a `config.json` describes.

    A model with YaRN, dynamic scaling or Qwen1's dynamic NTK serves as many positions as that extends it to, or
    `max_position_embeddings` where it is larger; one with linear scaling or dual chunk attention serves
    `max_position_embeddings`. float16 becomes float32, which holds its every value; so does a dtype that is not given.

    Args:
      values: the file's content.
      where: the file's name, with which every error begins.

    Raises ModelError for a field that is missing, not of its type or range, or cannot be honoured.
    """
    fields = Fields(values, where)
    model_type = _model_type(fields)
    for name, reason in _REFUSED.items():
        if values.get(name):
            raise ModelError(f"{where}: it has a {name}, and {reason}")
    read_quantization(values, where=where)  # says nothing of the function, but may be of a kind that is not read
    fixed = _FIXED | (_FIXED_MOE if model_type.endswith("_moe") else {})
    for name, wanted in fixed.items():
        if values.get(name) not in (None, wanted):
            raise fields.refusal(name, f"only {wanted!r} is read")
    for name, value in values.items():
        if _SUSPECT.fullmatch(name) and name not in _KNOWN and value not in (None, False):
            raise fields.refusal(name, "what it does to the model is not known here")
    try:
        return _qwen1(fields) if model_type == "qwen" else _qwen2_or_3(fields, model_type)
    except ConfigError as error:
        raise ModelError(f"{where}: {error}") from error


def to_hf(config: ModelConfig, model_type: ModelType, *, keep: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The `config.json` of a model, as transformers reads it.

    Its dtype is that of the parameters, the weights' in the file. Ids of tokens are not part of a model: they come from
    `keep`, or the caller sets them.

    Args:
      config: the model.
      model_type: the architecture's name.
      keep: the `config.json` that the model came from. Of its fields those that still hold, or say nothing about the
        function, stay as they are; of one with another `model_type`, only the ids of tokens.

    Raises ModelError where the architecture cannot compute what `config` says.
    """
    check_model_type(config, model_type)
    fields = _qwen1_fields(config) if model_type == "qwen" else _qwen2_or_3_fields(config, model_type)
    if keep is None:
        return fields
    if keep.get("model_type") != model_type:
        return fields | {name: keep[name] for name in _TOKEN_IDS if name in keep}
    old = from_hf(keep, where="the config.json to keep")
    changed = lambda ours: any(operator.attrgetter(name)(old) != operator.attrgetter(name)(config) for name in ours)
    stale = {name for ours, theirs in _FIELDS if changed(ours) for name in theirs}
    kept = {name: value for name, value in keep.items() if name not in stale or name in fields}
    return kept | {name: value for name, value in fields.items() if name in stale}


def _model_type(fields: Fields) -> ModelType:
    value = fields.values[fields.name_of("model_type")]
    if value not in list(_FAMILY):
        raise fields.refusal("model_type", f"{', '.join(map(repr, _FAMILY))} are read")
    if not value.endswith("_moe") and fields.values.get("num_experts"):
        raise fields.refusal("num_experts", f"model_type {value!r} is that of a dense model")
    return cast(ModelType, value)


def _qwen1(fields: Fields) -> ModelConfig:
    width = fields.integer("hidden_size", "n_embd")
    heads = fields.integer("num_attention_heads", "n_head")
    mlp = fields.name_of("intermediate_size", "ffn_hidden_size")
    if fields.integer(mlp) % 2:
        raise fields.refusal(mlp, "an even number is wanted, twice the width of the MLP")
    # Qwen1's own code does nothing with max_position_embeddings.
    length = fields.integer("seq_length", high=MAX_POSITION)
    ntk = QwenNTK(original_positions=length) if fields.flag("use_dynamic_ntk") else None
    config = ModelConfig(
        vocab_size=fields.integer("vocab_size", "padded_vocab_size"),
        width=width,
        num_layers=fields.integer("num_hidden_layers", "n_layer", high=_MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=fields.integer("kv_channels"),
        mlp_width=fields.integer(mlp) // 2,
        max_position=served(length, ntk),
        norm_eps=fields.number("layer_norm_epsilon"),
        qkv_bias=True,
        qk_norm=False,
        tie_embeddings=fields.flag("tie_word_embeddings"),
        rope=Rope(theta=fields.number("rotary_emb_base", "rope_theta"), scaling=ntk),
        logn=length if fields.flag("use_logn_attn") else 0,
        **_head_and_dtype(fields, "qwen"),
    )
    if width != heads * config.head_dim:
        raise fields.refusal("kv_channels", f"times {heads} heads it must be the width {width}")
    return config


def _qwen2_or_3(fields: Fields, model_type: ModelType) -> ModelConfig:
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if model_type.startswith("qwen3") or fields.has("head_dim"):
        head_dim = fields.integer("head_dim")
    elif width % heads:
        raise fields.refusal("num_attention_heads", f"hidden_size {width} is not a multiple of it")
    else:
        head_dim = width // heads
    num_layers = fields.integer("num_hidden_layers", high=_MAX_LAYERS)
    rope = read_rope(fields)
    moe = _moe(fields, model_type, num_layers)
    return ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        width=width,
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads"),
        head_dim=head_dim,
        mlp_width=0 if moe else fields.integer("intermediate_size"),
        max_position=served(fields.integer("max_position_embeddings", high=MAX_POSITION), rope.scaling),
        norm_eps=fields.number("rms_norm_eps"),
        qkv_bias=model_type.startswith("qwen2"),
        qk_norm=model_type.startswith("qwen3"),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        rope=rope,
        windows=_windows(fields, num_layers),
        moe=moe,
        **_head_and_dtype(fields, model_type),
    )


def _moe(fields: Fields, model_type: ModelType, num_layers: int) -> Moe | None:
    if not model_type.endswith("_moe"):
        return None
    # transformers 5 calls them local in Qwen3, though there are no others.
    return Moe(
        num_experts=fields.integer("num_experts", "num_local_experts", high=_MAX_EXPERTS // num_layers),
        top_k=fields.integer("num_experts_per_tok"),
        expert_width=fields.integer("moe_intermediate_size"),
        shared_width=fields.integer("shared_expert_intermediate_size") if model_type == "qwen2_moe" else 0,
        normalize_top_k=fields.flag("norm_topk_prob"),
    )


def _windows(fields: Fields, num_layers: int) -> tuple[int, ...]:
    layer_types = fields.values.get("layer_types")
    kinds = ["full_attention", "sliding_attention"]
    if layer_types is not None and (
        not isinstance(layer_types, list) or len(layer_types) != num_layers or any(t not in kinds for t in layer_types)
    ):
        raise fields.refusal("layer_types", f"a list of {' or '.join(kinds)} for each of {num_layers} layers is wanted")
    if not (fields.has("use_sliding_window") and fields.flag("use_sliding_window")):
        if layer_types and kinds[1] in layer_types:
            raise fields.refusal("layer_types", "use_sliding_window says that no layer slides")
        return ()
    window = fields.integer("sliding_window", high=MAX_POSITION)
    if layer_types is None or fields.has("max_window_layers"):
        # The name misleads: it is the layers above that number that have a window.
        first = fields.integer("max_window_layers", low=0)
        above = [kinds[i >= first] for i in range(num_layers)]
        if layer_types not in (None, above):
            raise fields.refusal("layer_types", f"max_window_layers {first} says otherwise")
        layer_types = above
    windows = tuple(window if kind == kinds[1] else 0 for kind in layer_types)
    return windows if any(windows) else ()


def _head_and_dtype(fields: Fields, model_type: ModelType) -> dict[str, Any]:
    dtype = "float32"
    if fields.has("torch_dtype") or fields.has("dtype"):
        name = fields.name_of("torch_dtype", "dtype")
        dtype = fields.values[name]
        if dtype not in ("float32", "bfloat16", "float16"):
            raise fields.refusal(name, "'float32', 'bfloat16' or 'float16' is wanted")
    dtype = cast(DType, "float32" if dtype == "float16" else dtype)
    return {"score": _score(fields, model_type), "param_dtype": dtype, "dtype": dtype}


def _score(fields: Fields, model_type: ModelType) -> Score | None:
    if not fields.has("architectures"):
        return None
    names, prefix, known = fields.values["architectures"], _FAMILY[model_type], [_CAUSAL[model_type]]
    if model_type != "qwen":
        known += [prefix + kind for kind in (_PLAIN_SCORE, *_HIDDEN_SCORES)]
    if not isinstance(names, list) or len(names) != 1 or names[0] not in known:
        raise fields.refusal("architectures", f"a list of one name is wanted: {', '.join(known)}")
    kind = names[0].removeprefix(prefix)
    if kind == _PLAIN_SCORE:
        return Score(labels=_labels(fields), hidden=False)
    return Score(labels=_HIDDEN_SCORES[kind], hidden=True) if kind in _HIDDEN_SCORES else None


def _labels(fields: Fields) -> int:
    counts = [fields.integer("num_labels")] if fields.has("num_labels") else []
    if fields.has("id2label"):
        counts.append(len(fields.mapping("id2label").values))
    if len(set(counts)) > 1:
        raise fields.refusal("num_labels", f"id2label has {counts[1]} labels")
    # transformers leaves two labels unsaid.
    return counts[0] if counts else 2


def _qwen1_fields(config: ModelConfig) -> dict[str, Any]:
    length = length_of(config)
    if config.logn not in (0, length):
        raise ModelError(f"config.json has one training length, and this model logn={config.logn} beside {length}")
    return {
        **_common_fields(config, "qwen"),
        "intermediate_size": 2 * config.mlp_width,
        "kv_channels": config.head_dim,
        "layer_norm_epsilon": config.norm_eps,
        "no_bias": True,
        "rotary_emb_base": config.rope.theta,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": length,
        "use_dynamic_ntk": config.rope.scaling is not None,
        "use_logn_attn": bool(config.logn),
    }


def _qwen2_or_3_fields(config: ModelConfig, model_type: ModelType) -> dict[str, Any]:
    return {
        **_common_fields(config, model_type),
        **({"attention_bias": False} if model_type.startswith("qwen3") else {}),
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        **_mlp_fields(config),
        "max_position_embeddings": length_of(config),
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        **scaling_fields(config.rope.scaling),
        **_window_fields(config.windows),
    }


def _mlp_fields(config: ModelConfig) -> dict[str, Any]:
    if (moe := config.moe) is None:
        return {"intermediate_size": config.mlp_width}
    return {
        "decoder_sparse_step": 1,
        "intermediate_size": moe.top_k * moe.expert_width,  # as in most published files; nothing has that size
        "mlp_only_layers": [],
        "moe_intermediate_size": moe.expert_width,
        "norm_topk_prob": moe.normalize_top_k,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        **({"shared_expert_intermediate_size": moe.shared_width} if moe.shared_width else {}),
    }


def _common_fields(config: ModelConfig, model_type: ModelType) -> dict[str, Any]:
    return {
        **_head_fields(config.score, model_type),
        "hidden_size": config.width,
        "max_position_embeddings": config.max_position,
        "model_type": model_type,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": config.param_dtype,
        "vocab_size": config.vocab_size,
    }


def _head_fields(score: Score | None, model_type: ModelType) -> dict[str, Any]:
    if score is None:
        return {"architectures": [_CAUSAL[model_type]]}
    prefix = _FAMILY[model_type]
    if not score.hidden:
        labels = {f"LABEL_{i}": i for i in range(score.labels)}
        names = {str(i): label for label, i in labels.items()}
        return {"architectures": [prefix + _PLAIN_SCORE], "id2label": names, "label2id": labels}
    for kind, labels in _HIDDEN_SCORES.items():
        if score.labels == labels:
            return {"architectures": [prefix + kind]}
    raise ModelError(f"no published architecture has a hidden score of {score.labels} labels; they have 1 or 2")


def _window_fields(windows: tuple[int, ...]) -> dict[str, Any]:
    sizes = sorted(set(windows) - {0})
    if not sizes:
        return {"use_sliding_window": False}
    if len(sizes) > 1:
        raise ModelError(f"config.json has one size for all windows, and this model has {sizes}")
    fields: dict[str, Any] = {"use_sliding_window": True, "sliding_window": sizes[0]}
    first = windows.index(sizes[0])
    if all(windows[first:]):
        return fields | {"max_window_layers": first}
    return fields | {"layer_types": ["sliding_attention" if window else "full_attention" for window in windows]}
