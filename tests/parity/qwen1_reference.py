"""Qwen1 in its plainest form: one row, one layer, one head at a time, tensors by their published names.

Shares nothing with the library, so that an error would have to be made twice.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constants:
    """What config.json says and the shapes of the tensors do not."""

    num_layers: int
    num_heads: int
    head_dim: int
    norm_eps: float
    rotary_base: float
    seq_length: int
    use_dynamic_ntk: bool
    use_logn_attn: bool


def constants(config: Mapping[str, Any]) -> Constants:
    """Of a config.json with the names of August 2023, or with the later ones."""
    old = "n_embd" in config
    return Constants(
        num_layers=config["n_layer" if old else "num_hidden_layers"],
        num_heads=config["n_head" if old else "num_attention_heads"],
        head_dim=config["kv_channels"],
        norm_eps=config["layer_norm_epsilon"],
        rotary_base=config["rotary_emb_base"],
        **{name: config[name] for name in ("seq_length", "use_dynamic_ntk", "use_logn_attn")},
    )


def logits(c: Constants, tensors: Mapping[str, jax.Array], ids: jax.Array, prompt: int | None = None) -> jax.Array:
    """The logits [T, V] of one row of token ids [T], in float32; the first `prompt` of them, or all, came at once."""
    alpha = 1
    if c.use_dynamic_ntk:
        context_value = math.log((prompt or len(ids)) / c.seq_length, 2) + 1
        alpha = max(2 ** math.ceil(context_value) - 1, 1)
    # Dynamic NTK is a larger base.
    c = dataclasses.replace(c, rotary_base=c.rotary_base * alpha ** (c.head_dim / (c.head_dim - 2)))
    x = tensors["transformer.wte.weight"][ids]
    for i in range(c.num_layers):
        prefix = f"transformer.h.{i}."
        layer = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        x = x + _attention(c, layer, _norm(c, x, layer["ln_1.weight"]))
        x = x + _mlp(layer, _norm(c, x, layer["ln_2.weight"]))
    return _norm(c, x, tensors["transformer.ln_f.weight"]) @ tensors["lm_head.weight"].T


def _norm(c, x, weight):
    return weight * (x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + c.norm_eps))


def _attention(c, layer, x):
    q, k, v = jnp.split(x @ layer["attn.c_attn.weight"].T + layer["attn.c_attn.bias"], 3, axis=-1)
    logn = [math.log(i, c.seq_length) if i > c.seq_length and c.use_logn_attn else 1 for i in range(1, len(x) + 1)]
    causal = jnp.tril(jnp.ones((len(x), len(x)), bool))
    heads = []
    for i in range(c.num_heads):
        own = slice(i * c.head_dim, (i + 1) * c.head_dim)
        scores = (
            (_rotate(c, q[:, own]) * jnp.array(logn, jnp.float32)[:, None])
            @ _rotate(c, k[:, own]).T
            / math.sqrt(c.head_dim)
        )
        heads.append(jax.nn.softmax(jnp.where(causal, scores, -jnp.inf)) @ v[:, own])
    return jnp.concatenate(heads, axis=-1) @ layer["attn.c_proj.weight"].T


def _rotate(c, x):
    inv_freq = 1 / c.rotary_base ** (jnp.arange(0, c.head_dim, 2, dtype=jnp.float32) / c.head_dim)
    angles = jnp.outer(jnp.arange(len(x), dtype=jnp.float32), jnp.concatenate([inv_freq, inv_freq]))
    turned = jnp.concatenate([-x[:, c.head_dim // 2 :], x[:, : c.head_dim // 2]], axis=-1)
    return x * jnp.cos(angles) + turned * jnp.sin(angles)


def _mlp(layer, x):
    return (x @ layer["mlp.w1.weight"].T * jax.nn.silu(x @ layer["mlp.w2.weight"].T)) @ layer["mlp.c_proj.weight"].T
