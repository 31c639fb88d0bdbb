"""Quantised folders as others publish them, number by number, without the code that reads them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.weights import hf
from tests.published import publish, save_safetensors

# Column 8c + AWQ_ORDER[i] of a matrix is in the bits 4i .. 4i + 3 of a word, in AutoAWQ.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# As Qwen publishes.
GPTQ = dict(quant_method="gptq", bits=4, group_size=16, sym=True, desc_act=False, damp_percent=0.01)
AWQ = dict(quant_method="awq", bits=4, group_size=16, zero_point=True, version="gemm", modules_to_not_convert=None)


def word(numbers: list[int], bits: int) -> int:
    """Numbers in one word, the first in the lowest bits, as a signed one."""
    value = sum(int(number) << bits * i for i, number in enumerate(numbers))
    return value - 2**32 if value >= 2**31 else value


def rows_packed(numbers: np.ndarray, bits: int) -> np.ndarray:
    n = 32 // bits
    return np.array([[word(c, bits) for c in numbers[r : r + n].T] for r in range(0, len(numbers), n)], np.int32)


def columns_packed(numbers: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    n = 32 // bits
    order = order or tuple(range(n))
    words = [[word(row[c : c + n][list(order)], bits) for c in range(0, len(row), n)] for row in numbers]
    return np.array(words, np.int32)


def quantised(rng: np.random.Generator, stem: str, outputs: int, inputs: int, how: dict) -> tuple[dict, np.ndarray]:
    """The tensors of a weight of random numbers, and the weight [outputs, inputs]."""
    bits, group = how["bits"], inputs if how["group_size"] == -1 else how["group_size"]
    groups, middle = inputs // group, 2 ** (bits - 1)
    q = np.clip(np.round(rng.normal(middle, middle / 3, (inputs, outputs))), 0, 2 * middle - 1).astype(int)
    zeros = np.full((groups, outputs), middle)
    if not how.get("sym"):
        zeros = np.clip(zeros + rng.integers(-1, 2, zeros.shape), 1, 2 * middle - 1)
    scales = rng.uniform(0.05, 0.1, zeros.shape).astype(np.float16)
    weight = (q - zeros.repeat(group, 0)) * scales.repeat(group, 0).astype(np.float32)
    if how["quant_method"] == "awq":
        tensors = {"qweight": columns_packed(q, 4, AWQ_ORDER), "qzeros": columns_packed(zeros, 4, AWQ_ORDER)}
    else:
        stored = zeros - (how.get("checkpoint_format") != "gptq_v2")
        tensors = {"qweight": rows_packed(q, bits), "qzeros": columns_packed(stored, bits)}
        tensors["g_idx"] = np.arange(inputs, dtype=np.int32) // group
    tensors["scales"] = scales
    return {f"{stem}.{suffix}": array for suffix, array in tensors.items()}, weight.T


def publish_quantised(
    folder: Path,
    config: ModelConfig,
    model_type: hf.ModelType,
    how: dict,
    *,
    head_bits: int = 0,
    embedding: bool = False,
) -> dict[str, np.ndarray]:
    """Writes a folder whose linear layers are quantised, and returns what its tensors stand for."""
    table = hf.table(config, model_type)[0].name
    apart = {"lm_head.weight": {"bits": head_bits}} if head_bits else {}
    apart |= {table: {"bits": 8, "group_size": -1}} if embedding else {}
    named, rng = publish(folder, config, model_type), np.random.default_rng(1)
    stored = dict(named)
    for name, array in named.items():
        router = name.endswith(("mlp.gate.weight", "shared_expert_gate.weight"))
        if (array.ndim == 2 and (".layers." in name or ".h." in name) and not router) or name in apart:
            own = how | apart.get(name, {})
            tensors, named[name] = quantised(rng, name.removesuffix(".weight"), *array.shape, own)
            del stored[name]
            stored |= tensors
            if name.endswith("down_proj.weight"):  # as AutoGPTQ leaves them behind
                stored[name.replace("weight", "bias")] = np.zeros(array.shape[0], np.float16)
    save_safetensors(folder / "model.safetensors", stored)
    if apart:
        dynamic = {name.removesuffix(".weight"): own for name, own in apart.items()}
        how = how | {"lm_head": bool(head_bits), "dynamic": dynamic}
    change_config(folder, quantization_config=how)
    return named


def change_config(folder: Path, **fields: object) -> None:
    values = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(values))
