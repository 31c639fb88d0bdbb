"""One table between the tensors of published checkpoints and the arrays of this library.

Both keep a weight outputs first, so a published tensor is one or more of our arrays on top of each other, each with
its outputs made one axis and its inputs another; layers and experts, which are stacked here, are tensors of their own
there. The table says which; read backwards it is the way out.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from qwen_jax.config import ModelConfig, QwenNTK, Score
from qwen_jax.errors import ModelError

ModelType = Literal["qwen", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"]
Shape = tuple[int, ...]

# Buffers that old files carry and every reader computes anew.
IGNORED = ("*rotary_emb.inv_freq", "*logn_tensor", "*attn.masked_bias")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One array of ours, or one layer of it, or one expert in one layer.

    Attributes:
      path: in the stacked tree, such as "layers/attention/q/w".
      stack: indices into its first axes: none, (layer,) or (layer, expert).
      shape: without those axes.
    """

    path: str
    stack: tuple[int, ...]
    shape: Shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """One published tensor: the rows of its parts, one below the other."""

    name: str
    shape: Shape
    parts: tuple[Part, ...]

    @property
    def rows(self) -> tuple[slice, ...]:
        """The rows of each part."""
        columns = math.prod(self.shape[1:])
        ends = list(itertools.accumulate((math.prod(part.shape) // columns for part in self.parts), initial=0))
        return tuple(itertools.starmap(slice, itertools.pairwise(ends)))


def output_axes(part: Part, rows: slice) -> int:
    """How many of the axes of a part, which is `rows` of its tensor, are rows of it."""
    return next(n for n in range(1, len(part.shape) + 1) if math.prod(part.shape[:n]) == rows.stop - rows.start)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Names:
    """Where a layer's name has "*", there is one tensor for each expert."""

    embed: str
    layers: str
    layer: tuple[tuple[str, tuple[str, ...]], ...]
    final_norm: str


_QWEN = _Names(
    embed="transformer.wte.weight",
    layers="transformer.h.{}.",
    layer=(
        ("ln_1.weight", ("attention_norm/scale",)),
        ("attn.c_attn.weight", ("attention/q/w", "attention/k/w", "attention/v/w")),
        ("attn.c_attn.bias", ("attention/q/b", "attention/k/b", "attention/v/b")),
        ("attn.c_proj.weight", ("attention/o/w",)),
        ("ln_2.weight", ("mlp_norm/scale",)),
        ("mlp.w1.weight", ("mlp/up/w",)),
        ("mlp.w2.weight", ("mlp/gate/w",)),
        ("mlp.c_proj.weight", ("mlp/down/w",)),
    ),
    final_norm="transformer.ln_f.weight",
)
_QWEN2_AND_3 = _Names(
    embed="model.embed_tokens.weight",
    layers="model.layers.{}.",
    layer=(
        ("self_attn.q_proj.weight", ("attention/q/w",)),
        ("self_attn.q_proj.bias", ("attention/q/b",)),
        ("self_attn.k_proj.weight", ("attention/k/w",)),
        ("self_attn.k_proj.bias", ("attention/k/b",)),
        ("self_attn.v_proj.weight", ("attention/v/w",)),
        ("self_attn.v_proj.bias", ("attention/v/b",)),
        ("self_attn.o_proj.weight", ("attention/o/w",)),
        ("self_attn.q_norm.weight", ("attention/q_norm/scale",)),
        ("self_attn.k_norm.weight", ("attention/k_norm/scale",)),
        ("mlp.gate_proj.weight", ("mlp/gate/w",)),
        ("mlp.up_proj.weight", ("mlp/up/w",)),
        ("mlp.down_proj.weight", ("mlp/down/w",)),
        ("mlp.gate.weight", ("mlp/router/w",)),
        ("mlp.experts.*.gate_proj.weight", ("mlp/experts/gate/w",)),
        ("mlp.experts.*.up_proj.weight", ("mlp/experts/up/w",)),
        ("mlp.experts.*.down_proj.weight", ("mlp/experts/down/w",)),
        ("mlp.shared_expert.gate_proj.weight", ("mlp/shared/gate/w",)),
        ("mlp.shared_expert.up_proj.weight", ("mlp/shared/up/w",)),
        ("mlp.shared_expert.down_proj.weight", ("mlp/shared/down/w",)),
        ("mlp.shared_expert_gate.weight", ("mlp/shared_gate/w",)),
        ("input_layernorm.weight", ("attention_norm/scale",)),
        ("post_attention_layernorm.weight", ("mlp_norm/scale",)),
    ),
    final_norm="model.norm.weight",
)
_NAMES: Mapping[ModelType, _Names] = {
    "qwen": _QWEN,
    "qwen2": _QWEN2_AND_3,
    "qwen2_moe": _QWEN2_AND_3,
    "qwen3": _QWEN2_AND_3,
    "qwen3_moe": _QWEN2_AND_3,
}
EMBEDDINGS = frozenset(names.embed for names in _NAMES.values())
_HEAD = "lm_head.weight"
_PLAIN_SCORE = {"score.weight": "score/output/w"}
_HIDDEN_SCORE = {
    "score.0.weight": "score/hidden/w",
    "score.0.bias": "score/hidden/b",
    "score.2.weight": "score/output/w",
    "score.2.bias": "score/output/b",
}

# What a difference between names means, by a pattern of the names that differ.
_MISSING_HINTS = {
    _HEAD: "without it the config should say tie_word_embeddings: true",
    "*_proj.bias": "Qwen2 has these biases and Qwen3 has not: is model_type right?",
    "*_norm.weight": "Qwen3 has these norms and Qwen2 has not: is model_type right?",
}
_UNKNOWN_HINTS = {
    "*.qweight": "these weights are quantised, and config.json has no quantization_config, which says how",
    "*mlp.experts.gate_up_proj": "experts are read one by one, as they are published, and these are joined",
    "*mlp.experts.[0-9]*": "this is a mixture of experts: is model_type right?",
    "*.lora_[AB].*": "this is an adapter, and has a config.json beside it as a model has: remove that",
}


def model_type_of(config: ModelConfig) -> ModelType:
    """The newest architecture name that `config` fits."""
    if config.moe:
        return "qwen3_moe" if config.qk_norm else "qwen2_moe"
    if config.logn or isinstance(config.rope.scaling, QwenNTK):
        return "qwen"
    return "qwen3" if config.qk_norm else "qwen2"


def check_model_type(config: ModelConfig, model_type: ModelType) -> None:
    """Raises ModelError where the architecture of that name cannot compute what `config` says."""
    if model_type not in list(_NAMES):
        raise ModelError(f"model_type is {model_type!r}, and known are {', '.join(_NAMES)}")
    is_qwen3 = model_type.startswith("qwen3")
    wanted = {"qkv_bias": not is_qwen3, "qk_norm": is_qwen3}
    if model_type == "qwen":
        wanted |= {"num_kv_heads": config.num_heads, "width": config.num_heads * config.head_dim}
        wanted |= {"windows": (), "score": None}
    else:
        wanted |= {"logn": 0}
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise ModelError(f"model_type {model_type!r} has {name}={value}, and this model {getattr(config, name)}")
    scaling = config.rope.scaling
    if scaling is not None and isinstance(scaling, QwenNTK) != (model_type == "qwen"):
        raise ModelError(f"model_type {model_type!r} has no rope scaling of the kind {type(scaling).__name__}")
    if model_type.endswith("_moe") != (config.moe is not None):
        kinds = ["a dense model", "a mixture of experts"]
        raise ModelError(
            f"model_type {model_type!r} is that of {kinds[config.moe is None]}, and this is the other kind"
        )
    if config.moe and bool(config.moe.shared_width) == is_qwen3:
        has = "no shared expert" if is_qwen3 else "a shared expert"
        raise ModelError(f"model_type {model_type!r} has {has}, and this model shared_width={config.moe.shared_width}")


def table(config: ModelConfig, model_type: ModelType) -> tuple[Tensor, ...]:
    """Every published tensor of a model, in the order of its modules, and every array of ours exactly once.

    Raises ModelError where the architecture of that name cannot hold such a model.
    """
    check_model_type(config, model_type)
    names, arrays = _NAMES[model_type], _layer_arrays(config)
    width = ((config.width,), ())
    vectors = ((config.vocab_size,), (config.width,))
    tensors = [_tensor(names.embed, {"embed/w": vectors})]
    for i in range(config.num_layers):
        tensors.extend(_layer_tensors(names, arrays, config.moe.num_experts if config.moe else 0, i))
    tensors.append(_tensor(names.final_norm, {"final_norm/scale": width}))
    if config.score:
        tensors.extend(_score_tensors(config.score, config.width))
    elif not config.tie_embeddings:
        tensors.append(_tensor(_HEAD, {"head/w": vectors}))
    return tuple(tensors)


def match(tensors: Sequence[Tensor], shapes: Mapping[str, Shape], *, where: str) -> dict[str, str]:
    """Checks that the names and shapes of a checkpoint are those of the table, buffers in `IGNORED` aside.

    Returns the names that repeat another tensor, mapped to its name: `lm_head.weight` beside a tied embedding.
    The caller checks that their values are equal.

    Raises ModelError, beginning with `where`, that lists what is missing, not known or of another shape.
    """
    wanted = {tensor.name: tensor.shape for tensor in tensors}
    given = {name: shape for name, shape in shapes.items() if not _like(name, IGNORED)}
    tied = not any(tensor.name == _HEAD or tensor.name.startswith("score.") for tensor in tensors)
    aliases = {_HEAD: tensors[0].name} if tied and _HEAD in given else {}
    wanted |= {name: wanted[original] for name, original in aliases.items()}
    missing = [name for name in wanted if name not in given]
    unknown = sorted(given.keys() - wanted.keys())
    wrong = [f"{n} {list(given[n])} for {list(wanted[n])}" for n in wanted if n in given and given[n] != wanted[n]]
    problems = {"missing": missing, "not known": unknown, "wrong shape": wrong}
    if any(problems.values()):
        listed = "; ".join(f"{kind}: {_few(items)}" for kind, items in problems.items() if items)
        hints = list(dict.fromkeys([*_hints(missing, _MISSING_HINTS), *_hints(unknown, _UNKNOWN_HINTS)]))
        raise ModelError(f"{where}: " + "; ".join(["the weights are not those of the config", listed, *hints]))
    return aliases


# An array of ours as its outputs and its inputs; a vector has no inputs.
_Sides = tuple[Shape, Shape]


def _layer_tensors(names: _Names, arrays: Mapping[str, _Sides], num_experts: int, layer: int) -> Iterator[Tensor]:
    """Experts one after the other, each with all its tensors."""
    prefix, found = names.layers.format(layer), [each for each in names.layer if arrays.keys() >= set(each[1])]
    for of_experts, group in itertools.groupby(found, lambda each: "*" in each[0]):
        group = [(name, {path: arrays[path] for path in paths}) for name, paths in group]
        for stack in [(layer, e) for e in range(num_experts)] if of_experts else [(layer,)]:
            for name, sides in group:
                yield _tensor(prefix + name.replace("*", str(stack[-1])), sides, stack)


def _layer_arrays(config: ModelConfig) -> dict[str, _Sides]:
    width, mlp, head = (config.width,), (config.mlp_width,), (config.head_dim,)
    heads, kv_heads = (config.num_heads, config.head_dim), (config.num_kv_heads, config.head_dim)
    arrays: dict[str, _Sides] = {"attention_norm/scale": (width, ()), "mlp_norm/scale": (width, ())}
    for name, outputs in {"q": heads, "k": kv_heads, "v": kv_heads}.items():
        arrays[f"attention/{name}/w"] = (outputs, width)
        if config.qkv_bias:
            arrays[f"attention/{name}/b"] = (outputs, ())
    arrays["attention/o/w"] = (width, heads)
    if config.qk_norm:
        arrays |= {"attention/q_norm/scale": (head, ()), "attention/k_norm/scale": (head, ())}
    if config.moe is None:
        return arrays | _mlp_arrays("mlp", width, mlp)
    arrays |= {"mlp/router/w": ((config.moe.num_experts,), width)}
    arrays |= _mlp_arrays("mlp/experts", width, (config.moe.expert_width,))
    if config.moe.shared_width:
        arrays |= _mlp_arrays("mlp/shared", width, (config.moe.shared_width,)) | {"mlp/shared_gate/w": ((1,), width)}
    return arrays


def _mlp_arrays(path: str, width: Shape, inner: Shape) -> dict[str, _Sides]:
    return {f"{path}/gate/w": (inner, width), f"{path}/up/w": (inner, width), f"{path}/down/w": (width, inner)}


def _score_tensors(score: Score, width: int) -> Iterator[Tensor]:
    outputs = {"hidden": (width,), "output": (score.labels,)}
    for name, path in (_HIDDEN_SCORE if score.hidden else _PLAIN_SCORE).items():
        _, module, kind = path.split("/")
        yield _tensor(name, {path: (outputs[module], (width,) if kind == "w" else ())})


def _tensor(name: str, arrays: Mapping[str, _Sides], stack: tuple[int, ...] = ()) -> Tensor:
    prefix = "layers/" if stack else ""
    parts = tuple(Part(path=prefix + path, stack=stack, shape=outs + ins) for path, (outs, ins) in arrays.items())
    rows = sum(math.prod(outs) for outs, _ in arrays.values())
    _, inputs = next(iter(arrays.values()))
    return Tensor(name=name, shape=(rows, math.prod(inputs)) if inputs else (rows,), parts=parts)


def _like(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _hints(names: Sequence[str], hints: Mapping[str, str]) -> Iterator[str]:
    return (hint for pattern, hint in hints.items() if any(_like(name, (pattern,)) for name in names))


def _few(items: Sequence[str]) -> str:
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return ", ".join(repr(item)[1:-1][:200] for item in items[:3]) + more  # a name may hold anything
