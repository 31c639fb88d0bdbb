"""Adapters in the form of PEFT, in and out: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.errors import ModelError
from qwen_jax.model.adapter import A, B
from qwen_jax.weights import hf
from qwen_jax.weights.adapted import AdaptedModel, Adapter
from qwen_jax.weights.fields import Fields
from qwen_jax.weights.folder import inside
from qwen_jax.weights.safetensors import SafetensorsFile, SafetensorsWriter
from qwen_jax.weights.sinks import write_files
from qwen_jax.weights.source import PEFT_CONFIG, SIDE_FILES_BYTES, Model, parse_json
from qwen_jax.weights.targets import modules, paths_of, short_name
from qwen_jax.weights.tensors import RegularFile, TensorInfo, quoted

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TABLES = {"embed/w": 0, "head/w": -1}  # where in the table of tensors

# What may stand in a config without a meaning for what is computed from the adapter; anything else that is set has one.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "eva_config", "ensure_weight_tying", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "megatron_core",
    "modules_to_save", "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
_READ = {"alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "peft_type", "r", "rank_pattern", "use_rslora"}
# Ways to begin that leave the base as it is; others change it, and a file does not say how.
_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")
# Names, with dots for any character and maybe ends: no expression that could take long.
_PATTERN = re.compile(r"\^?[\w.]+\$?")


def base_of(folder: Path) -> str:
    """What a folder with an adapter calls its base. Raises ModelError where it does not say."""
    return _config(folder).text("base_model_name_or_path")


def read(folder: Path, base: Model) -> Adapter:
    """The adapter in a folder, for a base.

    Ranks that differ from layer to layer are filled up with zeros, and so are layers without any; scales that differ
    are put into the matrices.

    Raises ModelError for what is not LoRA, and for what the base has no place for.
    """
    fields = _checked(_config(folder))
    with SafetensorsFile(inside(folder, WEIGHTS)) as file:
        found = {name: (info, name) for name, info in file.tensors.items()}
        take = lambda name: file.read(found.pop(name)[1]).astype(np.float32) if name in found else None
        common = _scale(fields, None)
        arrays: dict[str, np.ndarray] = {}
        matrices = {module: tensor for module, tensor in modules(base.table).items() if paths_of(tensor)}
        pairs = {m: (take(f"{_PREFIX}{m}.lora_A.weight"), take(f"{_PREFIX}{m}.lora_B.weight")) for m in matrices}
        ranks = _ranks(matrices, pairs)
        for module, (a, b) in pairs.items():
            if a is None and b is None:
                continue
            tensor = matrices[module]
            a, b = _checked_pair(folder, module, tensor, a, b, fields)
            b = b * (_scale(fields, module) / common)
            for part, rows in zip(tensor.parts, tensor.rows, strict=True):
                _put(arrays, part, rows, a, b[rows], base.config.num_layers, ranks[part.path])
        for path, array in _tables(folder, base, take).items():
            arrays[path] = array
        if found:
            raise ModelError(
                f"{inside(folder, WEIGHTS)} has {quoted(next(iter(found)))}, and adapters are read of the matrices of "
                "attention, MLPs and shared experts, and whole embeddings and heads: merge it with PEFT first"
            )
    if not arrays:
        raise ModelError(f"{inside(folder, WEIGHTS)} has no adapter of any matrix of {base.path}")
    dropout = fields.number("lora_dropout") if fields.values.get("lora_dropout") else 0.0
    return Adapter(base=fields.text("base_model_name_or_path"), scale=common, dropout=dropout, arrays=arrays)


def _ranks(matrices: Mapping[str, hf.Tensor], pairs: Mapping[str, tuple[Any, Any]]) -> dict[str, int]:
    """The highest rank of each of our arrays."""
    ranks: dict[str, int] = {}
    for module, (a, _) in pairs.items():
        for part in matrices[module].parts:
            ranks[part.path] = max(ranks.get(part.path, 0), 0 if a is None else len(a))
    return ranks


def _checked_pair(
    folder: Path, module: str, tensor: hf.Tensor, a: np.ndarray | None, b: np.ndarray | None, fields: Fields
) -> tuple[np.ndarray, np.ndarray]:
    rank = _pattern(fields, "rank_pattern", module) or fields.integer("r")
    outputs, inputs = tensor.shape
    shapes = [None if x is None else list(x.shape) for x in (a, b)]
    if a is None or b is None or shapes != [[rank, inputs], [outputs, rank]]:
        raise ModelError(
            f"{folder / WEIGHTS}: lora_A and lora_B of {module} are {shapes[0]} and {shapes[1]}, and [{rank}, {inputs}]"
            f" and [{outputs}, {rank}] are wanted: is it an adapter of this base?"
        )
    return a, b


def _put(
    arrays: dict[str, np.ndarray], part: hf.Part, rows: slice, a: np.ndarray, b: np.ndarray, layers: int, rank: int
) -> None:
    """Puts the adapter of one layer into the stacks of all."""
    module, outputs = part.path.removesuffix("/w"), hf.output_axes(part, rows)
    wide_a = arrays.setdefault(f"{module}/{A}", np.zeros((layers, rank, *part.shape[outputs:]), np.float32))
    wide_b = arrays.setdefault(f"{module}/{B}", np.zeros((layers, *part.shape[:outputs], rank), np.float32))
    (layer,) = part.stack
    wide_a[layer, : len(a)] = a.reshape(len(a), *part.shape[outputs:])
    wide_b[layer, ..., : len(a)] = b.reshape(*part.shape[:outputs], len(a))


def _tables(folder: Path, base: Model, take: Any) -> dict[str, np.ndarray]:
    """Tables that were trained whole."""
    names = {path: base.table[place].name for path, place in _TABLES.items()}
    tied = base.table[-1].parts[0].path != "head/w"
    if tied:
        names["head/w"] = "lm_head.weight"
    found = {path: take(_PREFIX + name) for path, name in names.items()}
    found = {path: array for path, array in found.items() if array is not None}
    if tied and found:
        if len(found) < 2 or not np.array_equal(found["embed/w"], found.pop("head/w")):
            raise ModelError(
                f"{folder / WEIGHTS}: the base has one table as embedding and as head, and this makes two of it; merge "
                "it with PEFT first"
            )
    return found


def _config(folder: Path) -> Fields:
    path = inside(folder, PEFT_CONFIG)
    with RegularFile(path) as file:
        return Fields(parse_json(file.read_bytes(0, min(file.size, SIDE_FILES_BYTES)), path), str(path))


def _checked(fields: Fields) -> Fields:
    """Raises ModelError for an adapter of another kind."""
    if fields.values.get("peft_type") != "LORA":
        raise ModelError(f"{fields.where}: peft_type is {quoted(fields.values.get('peft_type'))}, and LORA is read")
    if fields.values.get("bias", "none") != "none":
        raise fields.refusal("bias", "biases that were trained are not read: merge it with PEFT first")
    if fields.values.get("init_lora_weights") not in _BEGINNINGS:
        raise fields.refusal("init_lora_weights", "this changes the base too: save it with PEFT as plain LoRA first")
    for name, value in fields.values.items():
        if value and name not in _HARMLESS | _READ:
            raise fields.refusal(name, "this is no plain LoRA: merge it with PEFT first")
    return fields


def _scale(fields: Fields, module: str | None) -> float:
    """By which the product is multiplied; without a module, of most."""
    rank = fields.integer("r") if module is None else _pattern(fields, "rank_pattern", module) or fields.integer("r")
    alpha = (module and _pattern(fields, "alpha_pattern", module)) or fields.number("lora_alpha")
    return alpha / (math.sqrt(rank) if fields.values.get("use_rslora") else rank)


def _pattern(fields: Fields, name: str, module: str) -> Any:
    """What a pattern of the config has for a module; None where it has nothing."""
    if not fields.values.get(name):
        return None
    patterns = fields.mapping(name)
    for pattern in patterns.values:
        if not _PATTERN.fullmatch(pattern):
            raise ModelError(f"{patterns.where}: {quoted(pattern)} is read where it is the name of a module")
        if re.match(rf"(.*\.)?({pattern})$", module):
            return patterns.integer(pattern) if name == "rank_pattern" else patterns.number(pattern)
    return None


def write(model: AdaptedModel, folder: Path) -> None:
    """Writes the adapter of a model into an empty folder, as PEFT does."""
    tensors, ranks = _tensors(model)
    infos = {name: TensorInfo(shape=array.shape, dtype=array.dtype) for name, array in sorted(tensors.items())}
    with SafetensorsWriter(folder / WEIGHTS, infos, {"format": "pt"}) as writer:
        for name in infos:
            writer.write(name, tensors[name])
    tables = [name.split(".")[-2] for name in tensors if not name.endswith(("lora_A.weight", "lora_B.weight"))]
    config = _to_config(model.adapter, ranks, tables)
    write_files(folder, {PEFT_CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()})


def _tensors(model: AdaptedModel) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """The tensors that PEFT stores, and the rank of each kind of module."""
    arrays, tensors, ranks = model.adapter.arrays, {}, {}
    names: dict[tuple[str, ...], str] = {}
    for module, tensor in modules(model.table).items():
        stems = paths_of(tensor)
        if not stems or f"{stems[0]}/{A}" not in arrays:
            continue
        (layer,) = tensor.parts[0].stack
        pairs = [(arrays[f"{stem}/{A}"][layer], arrays[f"{stem}/{B}"][layer]) for stem in stems]
        a, b = _joined([(a.reshape(len(a), -1), b.reshape(-1, len(a))) for a, b in pairs])
        tensors |= {f"{_PREFIX}{module}.lora_A.weight": a, f"{_PREFIX}{module}.lora_B.weight": b}
        if stems not in names:
            names[stems] = short_name(model.table, module)
        ranks[names[stems]] = len(a)
    if "embed/w" in arrays:
        tensors[_PREFIX + model.table[0].name] = arrays["embed/w"]
        tensors[_PREFIX + "lm_head.weight"] = arrays.get("head/w", arrays["embed/w"])
    return tensors, ranks


def _joined(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """One adapter of matrices that are published on top of each other: with one lora_A if it is the same for all."""
    first = pairs[0][0]
    if all(np.array_equal(a, first) for a, _ in pairs):
        return first, np.concatenate([b for _, b in pairs])
    ranks, rows = [len(a) for a, _ in pairs], [len(b) for _, b in pairs]
    wide = np.zeros((sum(rows), sum(ranks)), np.float32)
    for i, (_, b) in enumerate(pairs):
        wide[sum(rows[:i]) : sum(rows[: i + 1]), sum(ranks[:i]) : sum(ranks[: i + 1])] = b
    return np.concatenate([a for a, _ in pairs]), wide


def _to_config(adapter: Adapter, ranks: Mapping[str, int], tables: Sequence[str]) -> dict[str, Any]:
    """The config: the commonest rank, and the others by module, each with the alpha that gives the same scale."""
    found = list(ranks.values())
    rank = max(set(found), key=found.count)
    others = {module: of_module for module, of_module in ranks.items() if of_module != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "r": rank,
        "lora_alpha": _number(adapter.scale * rank),
        "lora_dropout": adapter.dropout,
        "target_modules": sorted(ranks),
        "modules_to_save": sorted(tables) or None,
        "rank_pattern": others,
        "alpha_pattern": {module: _number(adapter.scale * of_module) for module, of_module in others.items()},
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": False,
    }


def _number(alpha: float) -> float | int:
    near = round(alpha)
    return near if math.isclose(alpha, near, rel_tol=1e-9) else alpha
