"""The engine against the plain forward pass, and rows against themselves in other company."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import model, sharding
from qwen_jax.config import Moe
from qwen_jax.engine import Sampling, decode
from qwen_jax.errors import ConfigError, NumericalError
from tests.conftest import tiny_config

GREEDY = Sampling(temperature=0)
RANDOM = Sampling(temperature=1.5, top_k=50, top_p=0.95, min_p=0.001, repetition_penalty=1.1)

# float32 sums over a few hundred terms, taken in another order.
ROUNDING = dict(rtol=1e-4, atol=1e-4)

PROMPTS = [np.random.default_rng(n).integers(0, 90, n).tolist() for n in (5, 33, 1, 50)]


def parameters(config):
    """Numbers far from an initialisation, so that logits differ clearly between tokens."""
    random = np.random.default_rng(0)

    def draw(leaf):
        values = random.normal(0, 0.3, leaf.shape) + (leaf.ndim == 1)
        return jax.device_put(values.astype(leaf.dtype), leaf.sharding.spec)

    return jax.tree.map(draw, jax.eval_shape(model.unstack_layers, model.abstract(config)))


def make_engine(mesh=None, num_tokens=90, **changes):
    config = tiny_config(**{"num_layers": 1} | changes)
    mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        return decode.Engine(config, parameters(config), num_tokens=num_tokens, mesh=mesh)


@pytest.fixture(scope="module")
def engine():
    return make_engine()


def tokens_of(engine, prompts, sampling, *, rows=None, count=12, seed=7):
    rows = range(len(prompts)) if rows is None else rows
    steps = engine.decode(prompts, sampling, seed=seed, rows=list(rows), max_new_tokens=count)
    return np.stack(list(steps), axis=1).tolist()


def test_cached_decoding_is_the_full_forward_pass(monkeypatch):
    # Prompts of mixed lengths, a window in one layer, and a cache that grows on the way.
    seen, count = [], 20

    def recording(logits, *args, **kwargs):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), logits, ordered=True)
        return decode_sample(logits, *args, **kwargs)

    decode_sample = decode.sample
    monkeypatch.setattr(decode, "sample", recording)
    monkeypatch.setattr(decode, "HEADROOM", 4)
    engine = make_engine(num_layers=2, max_position=90, windows=(0, 9), tie_embeddings=False, qk_norm=True)
    made = tokens_of(engine, PROMPTS, GREEDY, count=count)
    jax.effects_barrier()
    cached = np.stack(seen, axis=1)

    longest = max(map(len, PROMPTS)) + count
    whole = np.zeros((len(PROMPTS), longest), np.int32)
    for row, (prompt, completion) in enumerate(zip(PROMPTS, made, strict=True)):
        whole[row, : len(prompt) + count] = prompt + completion

    @jax.jit
    def full(params, tokens):
        positions = jnp.broadcast_to(jnp.arange(longest, dtype=jnp.int32), tokens.shape)
        return model.logits(params, model.forward(engine.config, params, tokens, positions, attention="reference")[0])

    with jax.set_mesh(engine.mesh):
        place = sharding.activation("bt", whole.shape)
        expected = np.asarray(full(engine._params, jax.device_put(whole, place)))
    for row, prompt in enumerate(PROMPTS):
        aligned = expected[row, len(prompt) - 1 : len(prompt) - 1 + count]
        np.testing.assert_allclose(cached[row], aligned, **ROUNDING)


@pytest.mark.parametrize("sampling", [GREEDY, RANDOM], ids=["greedy", "random"])
def test_a_row_does_not_depend_on_the_rows_beside_it(engine, sampling):
    together = tokens_of(engine, PROMPTS, sampling)
    for row, prompt in enumerate(PROMPTS):
        assert tokens_of(engine, [prompt], sampling, rows=[row]) == [together[row]]
    assert tokens_of(engine, PROMPTS[::-1], sampling, rows=[3, 2, 1, 0]) == together[::-1]


def test_seed_and_row_number_change_random_tokens(engine):
    prompts = [PROMPTS[0]] * 4
    made = tokens_of(engine, prompts, RANDOM)
    assert made[0] != made[1] != made[2]
    assert tokens_of(engine, prompts, RANDOM) == made
    assert tokens_of(engine, prompts, RANDOM, seed=8) != made
    assert len(tokens_of(engine, prompts, RANDOM, seed=2**32 - 1)[0]) == 12


def test_same_buckets_compile_nothing_new(monkeypatch):
    traces, forward = [], decode.forward

    def counting(config, params, tokens, *args, **kwargs):
        traces.append(tokens.shape)
        return forward(config, params, tokens, *args, **kwargs)

    monkeypatch.setattr(decode, "forward", counting)
    engine = make_engine(norm_eps=7e-5)  # a config no other test has compiled for
    tokens_of(engine, PROMPTS[:1], GREEDY, count=3)
    assert traces == [(1, 64), (1, 1)]
    for prompt, count in ((PROMPTS[2], 9), (PROMPTS[3], 14)):
        tokens_of(engine, [prompt], GREEDY, count=count)
    assert len(traces) == 2

    for temperature, seed in ((0.5, 1), (0.9, 2)):
        tokens_of(engine, PROMPTS[:3], Sampling(temperature=temperature), count=3, seed=seed)
    tokens_of(engine, PROMPTS, Sampling(temperature=0.2), count=3)
    assert traces[2:] == [(4, 64), (4, 1)]


def test_at_most_one_step_is_launched_that_nobody_reads(engine, monkeypatch):
    launched, step = [], decode.step
    monkeypatch.setattr(decode, "step", lambda *a, **k: launched.append(1) or step(*a, **k))
    steps = engine.decode(PROMPTS[:1], GREEDY, seed=0, rows=[0], max_new_tokens=12)
    assert len(list(itertools.islice(steps, 5))) == 5
    assert len(launched) <= 5
    steps.close()
    launched.clear()
    assert len(tokens_of(engine, PROMPTS[:1], GREEDY, count=1)[0]) == 1
    assert not launched


def test_penalty_counts_prompt_and_completion(engine):
    # Nearly greedy: tokens with positive logits lose to every unseen one, and unseen ones last for 12 tokens.
    made = tokens_of(engine, PROMPTS, dataclasses.replace(RANDOM, temperature=1e-4, repetition_penalty=1e6))
    for prompt, completion in zip(PROMPTS, made, strict=True):
        assert not set(prompt) & set(completion)
        assert len(set(completion)) == 12


def test_tokens_beyond_the_tokenizer_are_never_made():
    made = tokens_of(make_engine(num_tokens=3), PROMPTS[:1], GREEDY)
    assert set(made[0]) <= {0, 1, 2}


def test_a_mixture_of_experts_makes_the_same_tokens_on_a_mesh():
    moe = Moe(num_experts=4, top_k=2, expert_width=12, shared_width=16, normalize_top_k=True)
    alone = make_engine(mlp_width=0, moe=moe)
    spread = make_engine(sharding.make_mesh(expert=2, tensor=2, devices=jax.devices()[:4]), mlp_width=0, moe=moe)
    assert tokens_of(spread, PROMPTS, GREEDY) == tokens_of(alone, PROMPTS, GREEDY)


def test_a_mesh_of_several_devices_makes_the_same_tokens(engine):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2, devices=jax.devices()[:8])
    assert tokens_of(make_engine(mesh), PROMPTS, RANDOM) == tokens_of(engine, PROMPTS, RANDOM)


def test_one_row_of_bfloat16_is_what_it_is_in_a_batch():
    engine = make_engine(dtype="bfloat16", param_dtype="bfloat16")
    together = tokens_of(engine, PROMPTS[:2], GREEDY, count=6)
    assert tokens_of(engine, PROMPTS[:1], GREEDY, count=6) == together[:1]


def test_logits_that_are_not_finite_stop_the_run(engine):
    params = dict(engine._params, final_norm=jax.tree.map(lambda x: x * jnp.nan, engine._params["final_norm"]))
    broken = decode.Engine(engine.config, params, num_tokens=90, mesh=engine.mesh)
    with pytest.raises(NumericalError, match="not finite"):
        tokens_of(broken, PROMPTS[:1], GREEDY)


def test_more_tokens_than_positions_are_refused(engine):
    assert len(tokens_of(engine, PROMPTS[3:], GREEDY, count=14)[0]) == 14
    with pytest.raises(ConfigError, match="50 tokens.*max_new_tokens=15.*max_position=64; ask for at most 14"):
        tokens_of(engine, PROMPTS[3:], GREEDY, count=15)
