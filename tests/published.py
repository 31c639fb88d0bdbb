"""Published folders with random weights, written without the code that reads them, and how ours is held to theirs."""

from __future__ import annotations

import functools
import json
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from qwen_jax import model
from qwen_jax.config import ModelConfig
from qwen_jax.ops.loss import chunked_cross_entropy
from qwen_jax.text.tokenizer import Tokenizer, train_bpe
from qwen_jax.weights import hf, hf_config
from tests import paged

QWEN1_OLD_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "ffn_hidden_size",
    "max_position_embeddings": "n_positions",
}

# Of the largest value: float32 on both sides, sums in another order, some layers deep.
RELATIVE = 1e-5

_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int32": "I32"}


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


def tree_of(config, table, named):
    """Arrays under the published names of `table` as the stacked tree of parameters."""
    tree = jax.tree.map(lambda like: np.zeros(like.shape, np.float32), model.abstract(config))
    for tensor in table:
        for part, rows in zip(tensor.parts, tensor.rows, strict=True):
            node = tree
            for key in part.path.split("/"):
                node = node[key]
            node[part.stack] = named[tensor.name][rows].reshape(part.shape)
    return tree


def assert_close(got, want, name=""):
    """Of arrays, or of trees of them: each is that of `want`, but for rounding."""

    def check(path, got, want):
        got, want = np.asarray(got), np.asarray(want)
        where = name + jax.tree_util.keystr(path)
        assert got.shape == want.shape, where
        assert np.abs(got - want).max() <= RELATIVE * np.abs(want).max(), where

    jax.tree.map_with_path(check, got, want)


@functools.partial(jax.jit, static_argnums=0)
def logits(config, params, tokens, positions):
    """The logits [B, T, V]."""
    return model.logits(params, model.forward(config, params, tokens, positions))


@functools.partial(jax.jit, static_argnums=0)
def logits_of_rows(config, params, tokens, positions, rows):
    """Likewise of rows in pages, and the rows."""
    hidden, rows = paged.forward(config, params, tokens, positions, rows)
    return model.logits(params, hidden), rows


def assert_decodes(config, params, ids, expected):
    """In pages, a prompt, single tokens and several at once have the logits that all of `ids` [B, 17] have."""
    rows, at = paged.paged(config, *ids.shape, jnp.full(len(ids), 9, jnp.int32)), 0
    for length in (9, 1, 1, 1, 1, 4):
        tokens = jnp.asarray(ids[:, at : at + length], jnp.int32)
        positions = jnp.broadcast_to(jnp.arange(at, at + length, dtype=jnp.int32), tokens.shape)
        got, rows = logits_of_rows(config, params, tokens, positions, rows)
        assert_close(got, expected[:, at : at + length], f"tokens from {at}")
        at += length


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradients(config, params, ids):
    """((loss, logits [B, T, V]), gradients): the mean cross-entropy of each of `ids` [B, T] given those before it."""
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    # After the last comes nothing that is known.
    targets, weights = jnp.roll(ids, -1, axis=1), jnp.ones(ids.shape, jnp.float32).at[:, -1].set(0)

    def loss(params):
        hidden = model.forward(config, params, ids, positions)
        total = chunked_cross_entropy(hidden, model.head(params), targets, weights)
        return total / weights.sum(), model.logits(params, hidden)

    return jax.value_and_grad(loss, has_aux=True)(params)
