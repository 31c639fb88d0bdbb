"""Published folders with random weights, written without the code that reads them."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.text.tokenizer import Tokenizer, train_bpe
from qwen_jax.weights import hf, hf_config

_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def tiny_tokenizer() -> Tokenizer:
    """260 tokens: the bytes, one merge, and the special tokens of chats."""
    return train_bpe(["the the the"], vocab_size=260)


def save_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """The format by its definition: length, header, data."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, array in tensors.items():
        offsets = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": _NAMES[str(array.dtype)], "shape": list(array.shape), "data_offsets": offsets}
        data += array.tobytes()
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def publish(
    folder: Path,
    config: ModelConfig,
    model_type: hf.ModelType,
    *,
    files: int = 1,
    seed: int = 0,
    dtype: str | None = None,
) -> dict[str, np.ndarray]:
    """Writes a folder as published, and returns its tensors by name."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    kind = np.dtype(dtype or config.param_dtype) if dtype != "bfloat16" else np.dtype(ml_dtypes.bfloat16)
    names = {tensor.name: tensor.shape for tensor in hf.table(config, model_type)}
    tensors = {name: rng.standard_normal(shape, np.float32).astype(kind) for name, shape in names.items()}
    (folder / "config.json").write_text(json.dumps(hf_config.to_hf(config, model_type)))
    (folder / "tokenizer.json").write_bytes(tiny_tokenizer().to_bytes())
    (folder / "generation_config.json").write_text('{"eos_token_id": 257}')
    if files == 1:
        save_safetensors(folder / "model.safetensors", tensors)
        return tensors
    where = {
        name: f"model-{i * files // len(tensors) + 1:05d}-of-{files:05d}.safetensors" for i, name in enumerate(tensors)
    }
    for file in set(where.values()):
        save_safetensors(folder / file, {name: tensors[name] for name in tensors if where[name] == file})
    size = sum(array.nbytes for array in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return tensors
