"""Sparse prefill beside full attention: how much of its probability is kept, for which share of its work, in what time.

    python benchmarks/sparse_prefill.py [MODEL --text FILE] [--lengths 8192 16384] [--vertical 1000] [--slash 6096]

Without a model it is a small random one reading random tokens, whose recall says nothing of a trained model's.
Recall is exp(lse_sparse - lse_full), the mean over queries, with the activations of full attention. The loss is that of
the prompt's own tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from side_by_side import median_seconds

from qwen_jax import model, sharding
from qwen_jax.config import ModelConfig, Rope
from qwen_jax.model import attention as attention_module
from qwen_jax.ops.attention import attention
from qwen_jax.ops.dual_chunk import dual_chunk_attention
from qwen_jax.ops.loss import chunked_cross_entropy
from qwen_jax.ops.pages import Rows
from qwen_jax.ops.vertical_slash import BLOCK, VerticalSlash, recall
from qwen_jax.weights.load import load_params
from qwen_jax.weights.source import open_model

PAGE = 64

RANDOM = ModelConfig(
    vocab_size=512, width=256, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64, mlp_width=512,
    max_position=32768, norm_eps=1e-6, qkv_bias=True, qk_norm=False, tie_embeddings=True, rope=Rope(theta=1e6),
)  # fmt: skip


def main() -> None:
    options = arguments()
    budgets = dict(vertical=options.vertical, slash=options.slash)
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        config, params, ids = opened(options)
        print(f"{config.num_layers} layers, {config.num_heads} heads of {config.head_dim}, {config.dtype}; {budgets}")
        print("| tokens | recall by layer: mean (least head) | scores | loss, full | sparse | seconds, full | sparse |")
        print("|---|---|---|---|---|---|---|")
        for length in options.lengths:
            if length > len(ids):
                raise SystemExit(f"{options.text} has {len(ids)} tokens; --lengths {length} needs as many")
            prompt = jnp.asarray(ids[:length], jnp.int32)[None]
            sparse = VerticalSlash(threshold=BLOCK, **budgets)
            heads = recalls(config, params, prompt, sparse)
            layers = ", ".join(f"{layer.mean():.3f} ({layer.min():.3f})" for layer in heads)
            (loss, seconds), (loss_sparse, seconds_sparse) = (
                of_prompt(config, params, prompt, kind) for kind in (None, sparse)
            )
            print(
                f"| {length} | {layers} | {share(length, sparse):.2f} | {loss:.4f} | {loss_sparse:.4f} "
                f"| {seconds:.2f} | {seconds_sparse:.2f} |",
                flush=True,
            )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a checkpoint or a published folder")
    parser.add_argument("--text", type=Path, help="what the model reads")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384])
    parser.add_argument("--vertical", type=int, default=VerticalSlash.vertical)
    parser.add_argument("--slash", type=int, default=VerticalSlash.slash)
    options = parser.parse_args()
    if (options.model is None) != (options.text is None):
        parser.error("a model needs a --text to read, and a text a model")
    return options


def opened(options: argparse.Namespace) -> tuple[ModelConfig, model.Params, Any]:
    """The config, the parameters and the ids of the text."""
    if options.model is None:
        print("a random model and random tokens")
        params = jax.jit(lambda key: model.unstack_layers(model.init(RANDOM, key)))(jax.random.key(0))
        return RANDOM, params, np.random.default_rng(0).integers(0, RANDOM.vocab_size, max(options.lengths))
    source = open_model(options.model)
    config = dataclasses.replace(source.config, param_dtype=source.config.dtype)
    params = load_params(source, dtype=config.dtype, stacked=False)
    return config, params, source.tokenizer().encode(options.text.read_text("utf-8"))


def forward(config: ModelConfig, params: model.Params, tokens: jax.Array, sparse: VerticalSlash | None) -> jax.Array:
    """The hidden states of a prompt in an empty cache."""
    length = tokens.shape[1]
    pages = -(-length // PAGE)
    table = jnp.arange(pages, dtype=jnp.int32)[None]
    lengths = jnp.array([length], jnp.int32)
    rows = Rows(lengths=lengths, counts=lengths, table=table, width=length)
    batch = model.Batch(rows=(rows,), prompts=jnp.full(length, length, jnp.int32))
    cache = model.make_cache(config, pages, PAGE)
    return model.forward_cached(config, params, tokens[0], batch, cache, sparse=sparse)[0][None]


def recalls(config: ModelConfig, params: model.Params, tokens: jax.Array, sparse: VerticalSlash) -> np.ndarray:
    """[layers, heads]. Where the model would compute sparse attention, it is measured, and full attention computed."""
    found: list[jax.Array] = []

    def measured(queries, search, k, v, mask, *, sparse, chunk, implementation):
        found.append(recall(queries, search, k, v, mask, sparse=sparse, chunk=chunk)[0])
        if chunk is None:
            return attention(queries[0], k, v, mask, implementation=implementation)
        return dual_chunk_attention(queries, k, v, mask, chunk=chunk, implementation=implementation)

    def run(params, tokens):
        hidden = forward(config, params, tokens, sparse)
        return hidden[:, -1], jnp.stack(found)

    computed, attention_module.vertical_slash_attention = attention_module.vertical_slash_attention, measured
    try:
        return np.asarray(jax.jit(run)(params, tokens)[1])
    finally:
        attention_module.vertical_slash_attention = computed


def of_prompt(
    config: ModelConfig, params: model.Params, tokens: jax.Array, sparse: VerticalSlash | None
) -> tuple[float, float]:
    """The mean loss of a prompt's tokens after the first, and the seconds until its hidden states are there."""
    run = jax.jit(lambda params, tokens: forward(config, params, tokens, sparse))
    seconds = median_seconds(lambda: run(params, tokens).block_until_ready(), times=3)
    hidden, targets = run(params, tokens)[:, :-1], tokens[:, 1:]
    total = jax.jit(chunked_cross_entropy)(hidden, model.head(params), targets, jnp.ones(targets.shape))
    return float(total) / targets.size, seconds


def share(length: int, sparse: VerticalSlash) -> float:
    """Scores that are computed for a head, with those of padding and of the search, per pair of causal attention."""
    blocks = -(-length // BLOCK)
    kept = min(sparse.vertical, length) + BLOCK * min(sparse.blocks, blocks)
    return BLOCK * (blocks * kept + length) / (length * (length + 1) / 2)


if __name__ == "__main__":
    main()
