"""What a published `config.json` says of rotary embeddings: their scaling, and the positions that follow from it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from qwen_jax.config import DualChunk, DynamicNTK, Linear, ModelConfig, QwenNTK, Rope, Scaling, Yarn
from qwen_jax.errors import ModelError
from qwen_jax.weights.fields import MAX_POSITION, Fields

_DUAL_CHUNK = "dual_chunk_attention_config"
# How vLLM skips keys that matter little: it approximates attention to all of them, which is what is computed here.
_SPARSE = "sparse_attention_"
# Kinds of rope_scaling, and their fields; mscale and mscale_all_dim are read as far as they change nothing.
_KINDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor",
        "mscale", "mscale_all_dim", "truncate",
    ),
}  # fmt: skip


def served(length: int, scaling: Scaling | None) -> int:
    """Positions that a model serves whose file has `length` of them.

    Of a model with YaRN that length is the one before in some published files (Qwen2.5-Instruct: 32768) and the one
    after in others (131072); both mean what YaRN extends it to. Of linear scaling files say either, and nothing tells
    which: the length is taken as it stands. With dual chunk attention it is what the model serves.
    """
    return length if scaling is None or isinstance(scaling, Linear | DualChunk) else max(length, scaling.reach)


def read_rope(fields: Fields) -> Rope:
    """The rotary embedding: at top level, in rope_scaling, or in rope_parameters, where transformers 5 writes it; and
    dual chunk attention."""
    found, scalings = [fields] if fields.has("rope_theta") else [], []
    for name in ("rope_scaling", "rope_parameters"):
        if fields.has(name):
            rope = fields.mapping(name)
            scalings.append(_scaling(rope, fields))
            found += [rope] if rope.has("rope_theta") else []
    if not found:
        raise ModelError(f"{fields.where}: rope_theta is missing")
    thetas = [rope.number("rope_theta") for rope in found]
    if len(set(thetas)) > 1:
        raise ModelError(f"{fields.where}: rope_theta is given as {thetas}; they must agree")
    if len(set(scalings)) > 1:
        raise fields.refusal("rope_parameters", "it must say the same as rope_scaling")
    scaling = scalings[0] if scalings else None
    if fields.has(_DUAL_CHUNK):
        if scaling is not None:
            raise fields.refusal(_DUAL_CHUNK, "beside a rope_scaling its meaning is not known here")
        scaling = _dual_chunk(fields.mapping(_DUAL_CHUNK))
    return Rope(theta=thetas[0], scaling=scaling)


def _dual_chunk(chunks: Fields) -> DualChunk:
    """vLLM has defaults for what a file leaves out, which are no published model's: here it is asked for."""
    names = ("chunk_size", "local_size", "original_max_position_embeddings")
    for key in chunks.values:
        if key not in names and not key.startswith(_SPARSE) and chunks.has(key):
            raise ModelError(f"{chunks.where}: it has a {key!r:.60}, which is not known")
    size, local, original = (chunks.integer(name, low=0, high=MAX_POSITION) for name in names)
    return DualChunk(chunk_size=size, local_size=local, original_positions=original)


def _scaling(rope: Fields, fields: Fields) -> Scaling | None:
    """What `rope`, a rope_scaling or rope_parameters among `fields`, says besides theta."""
    kind = "default"
    if rope.has("rope_type") or rope.has("type"):
        name = rope.name_of("rope_type", "type")
        kind = rope.values[name]
        if kind not in list(_KINDS):
            raise rope.refusal(name, f"one of {', '.join(_KINDS)} is wanted")
    for key in rope.values:
        if key not in ("type", "rope_type", "rope_theta", *_KINDS[kind]) and rope.has(key):
            raise ModelError(f"{rope.where}: it has a {key!r:.60}, which is not known of the type {kind!r}")
    if kind == "default":
        return None
    if kind == "linear":
        return Linear(factor=rope.number("factor"))
    if kind == "yarn":
        scaling = _yarn(rope, fields)
    else:
        # transformers, which defined it, takes this length for the original one.
        original = fields.integer("max_position_embeddings", high=MAX_POSITION)
        scaling = DynamicNTK(factor=rope.number("factor"), original_positions=original)
    if scaling.reach > MAX_POSITION:
        raise rope.refusal("factor", f"at most {MAX_POSITION} positions are read")
    return scaling


def _yarn(rope: Fields, fields: Fields) -> Yarn:
    factor, original = rope.number("factor"), "original_max_position_embeddings"
    if not rope.has(original):
        # transformers takes max_position_embeddings, which is this length in some files and the extended one in others.
        raise ModelError(f"{rope.where}: {original} is missing; write the length before YaRN (Qwen2.5: 32768)")
    length = rope.integer(original, high=MAX_POSITION)
    if fields.has(original) and fields.values[original] != length:
        raise fields.refusal(original, f"it must equal that of YaRN, {length}")
    if rope.values.get("truncate", True) is not True:
        raise rope.refusal("truncate", "only true is read")
    if rope.has("attention_factor"):
        attention_factor = rope.number("attention_factor")
    elif rope.values.get("mscale") and rope.values.get("mscale_all_dim"):
        raise rope.refusal("mscale", "write the attention_factor that it makes together with mscale_all_dim")
    else:
        attention_factor = 0.1 * math.log(max(factor, 1)) + 1
    return Yarn(
        factor=factor,
        original_positions=length,
        beta_fast=rope.number("beta_fast") if rope.has("beta_fast") else 32.0,
        beta_slow=rope.number("beta_slow") if rope.has("beta_slow") else 1.0,
        attention_factor=attention_factor,
    )


def length_of(config: ModelConfig) -> int:
    """The length in the file of a model that serves `max_position`: the inverse of `served`.

    Raises ModelError where no length says so.
    """
    scaling = config.rope.scaling
    length = scaling.original_positions if isinstance(scaling, DynamicNTK | QwenNTK) else config.max_position
    if served(length, scaling) != config.max_position:
        raise ModelError(
            f"config.json cannot say max_position={config.max_position}: with {scaling} a model serves "
            f"{served(length, scaling)} positions"
        )
    return length


def scaling_fields(scaling: Scaling | None) -> dict[str, Any]:
    """The fields besides theta, for every architecture but Qwen1."""
    match scaling:
        case Linear(factor=factor):
            return {"rope_scaling": {"rope_type": "linear", "factor": factor}}
        case DynamicNTK(factor=factor):
            return {"rope_scaling": {"rope_type": "dynamic", "factor": factor}}
        case DualChunk(chunk_size=size, local_size=local, original_positions=original):
            chunks = {"chunk_size": size, "local_size": local, "original_max_position_embeddings": original}
            return {_DUAL_CHUNK: chunks}
        case Yarn():
            values = dataclasses.asdict(scaling)
            original = {"original_max_position_embeddings": values.pop("original_positions")}
            return {"rope_scaling": {"rope_type": "yarn", **original, **values}}
    return {}
