"""Dual chunk attention through the whole model: however a prompt is taken in, the logits are the same."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import model
from qwen_jax.config import DualChunk, Rope
from tests import paged
from tests.conftest import tiny_config
from tests.model.test_transformer import ids, parameters

CLOSE = dict(rtol=0, atol=1e-4)
CHUNK = 12
# One and a half, two and a half, six and a half chunks.
LENGTHS = np.array([18, 30, 78], np.int32)
TOKENS = ids(3, 78)


def config_of(original_positions):
    chunks = DualChunk(chunk_size=20, local_size=20 - CHUNK, original_positions=original_positions)
    return tiny_config(num_layers=2, rope=Rope(theta=12345.0, scaling=chunks))


@functools.partial(jax.jit, static_argnames=("config", "attention"))
def run(config, params, tokens, positions, rows, *, attention="auto"):
    if rows is None:
        hidden = model.forward(config, params, tokens, positions, attention=attention)
    else:
        hidden, rows = paged.forward(config, params, tokens, positions, rows, attention=attention)
    return model.logits(params, hidden), rows


def prefill(params, lengths, *, pieces=1, attention="auto", slots=78):
    """Logits [3, 78, V] of all tokens, when prompts have `lengths`, and the cache."""
    config = config_of(9)
    cache, logits = paged.paged(config, 3, slots, jnp.asarray(lengths)), []
    for at in np.split(np.tile(np.arange(78, dtype=np.int32), (3, 1)), pieces, axis=1):
        found, cache = run(config, params, TOKENS[:, at[0]], at, cache, attention=attention)
        logits.append(found)
    return np.concatenate(logits, axis=1), cache


def at_prompts(logits, lengths=LENGTHS):
    return np.concatenate([row[:length] for row, length in zip(logits, lengths, strict=True)])


def test_prefill_in_pieces_or_at_once_and_decoding_are_dense_masked_attention(mesh):
    params = model.unstack_layers(parameters(config_of(9)))
    dense, _ = prefill(params, LENGTHS, attention="reference")
    at_once, _ = prefill(params, LENGTHS)
    # In a cache that is longer than the prompt too.
    in_pieces, _ = prefill(params, LENGTHS, pieces=3, slots=90)
    np.testing.assert_allclose(at_prompts(at_once), at_prompts(dense), **CLOSE)
    np.testing.assert_allclose(at_prompts(in_pieces), at_prompts(dense), **CLOSE)

    # Of a shorter prompt the rest is decoded: what it becomes goes by the length that each token makes.
    prompts = LENGTHS // 2
    dense, _ = prefill(params, prompts, attention="reference")
    in_pieces, cache = prefill(params, prompts, pieces=3, slots=90)
    np.testing.assert_allclose(at_prompts(in_pieces, prompts), at_prompts(dense, prompts), **CLOSE)
    for step in range(39):
        # A row that is done decodes its last token again.
        at = np.minimum(prompts + step, LENGTHS - 1)[:, None]
        decoded, cache = run(config_of(9), params, np.take_along_axis(TOKENS, at, axis=1), at, cache)
        np.testing.assert_allclose(decoded[:, 0], dense[np.arange(3), at[:, 0]], **CLOSE)


def test_a_row_of_a_batch_is_what_it_is_alone(mesh):
    params = parameters(config_of(9))
    logits, _ = prefill(model.unstack_layers(params), LENGTHS)
    alone, _ = run(config_of(9), params, TOKENS[1:2, :30], np.arange(30, dtype=np.int32)[None], None)
    np.testing.assert_allclose(alone[0], logits[1, :30], **CLOSE)


def test_it_is_plain_attention_up_to_one_token_more_than_the_chunk_size(mesh):
    params = parameters(config_of(0))
    at = np.arange(30, dtype=np.int32)[None]
    chunked, plain = (
        run(config, params, TOKENS[:1, :30], at, None)[0] for config in (config_of(0), tiny_config(num_layers=2))
    )
    np.testing.assert_allclose(chunked[0, :21], plain[0, :21], **CLOSE)
    assert (np.abs(chunked - plain)[0, 21:].max(axis=-1) > 1e-3).all()
