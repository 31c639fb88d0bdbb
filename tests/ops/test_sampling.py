"""Sampling against Hugging Face's processors, and the promises that need no oracle."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.errors import ConfigError
from qwen_jax.ops import draw, sampling
from qwen_jax.ops.sampling import Sampling, Seen, Stages

B, V = 4, 61

sample = jax.jit(sampling.sample, static_argnames="num_tokens")
masses, penalize = jax.jit(sampling.masses), jax.jit(sampling.penalize)
logprobs = jax.jit(sampling.logprobs, static_argnames=("num_tokens", "top"))

# Two float32 softmaxes of the same row, computed in different orders.
TOLERANCE = 2e-6


def make_logits(seed=0, batch=B, scale=3.0):
    return np.random.default_rng(seed).normal(0, scale, (batch, V)).astype(np.float32)


def keys(seed=0, batch=B):
    return jax.random.split(jax.random.key(seed), batch)


def make_seen(prompts):
    """Prompts [B, T] of which the last two tokens are the completion."""
    prompt, generated = np.zeros((len(prompts), V), bool), np.zeros((len(prompts), V), np.int32)
    np.put_along_axis(prompt, prompts[:, :-2], True, axis=1)
    seen = Seen(prompt=jnp.asarray(prompt), generated=jnp.asarray(generated))
    for tokens in prompts[:, -2:].T:
        seen = seen.add(jnp.asarray(tokens))
    return seen


@functools.cache
def hf_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        vocab_size=V, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1,
    )  # fmt: skip
    return transformers.Qwen2ForCausalLM(config)


def hf_scores(logits, seen_ids, **generation):
    """What `generate()` would sample from, with the processors and their order from `generate()` itself."""
    torch = pytest.importorskip("torch")
    model = hf_model()
    settings = type(model.generation_config)(do_sample=True, **generation)
    processors = model._get_logits_processor(settings, input_ids_seq_length=seen_ids.shape[1])
    return processors(torch.tensor(seen_ids), torch.tensor(logits)).numpy()


STAGES = [
    {"temperature": 0.6, "top_k": 0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 1000},
    {"top_k": 0, "top_p": 0.9},
    {"top_k": 0, "top_p": 1e-6},
    {"top_k": 0, "min_p": 0.02},
    {"top_k": 0, "min_p": 1.0},
    {"top_k": 0, "repetition_penalty": 1.7},
    {"temperature": 1.8, "top_k": 30, "top_p": 0.85, "min_p": 0.01, "repetition_penalty": 0.7},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05},
]


@pytest.mark.parametrize("generation", STAGES, ids=str)
def test_distribution_is_that_of_hugging_face(generation):
    logits, seen_ids = make_logits(), np.random.default_rng(1).integers(0, V, (B, 9))
    expected = hf_scores(logits, seen_ids, **generation)

    stages = Stages.of([Sampling(**generation)] * B)
    actual = np.asarray(masses(penalize(jnp.asarray(logits), make_seen(seen_ids), stages), stages))

    np.testing.assert_array_equal(actual > 0, np.isfinite(expected))
    actual = actual / actual.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(actual, jax.nn.softmax(jnp.asarray(expected)), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("generation", STAGES, ids=str)
def test_sample_draws_exactly_the_support_in_proportion(generation):
    # 4000 rows of one distribution: every token of HF's support within 5 standard errors, no other token at all.
    logits, count = make_logits(2, batch=1, scale=1.5), 4_000
    seen_ids = np.random.default_rng(1).integers(0, V, (1, 9))
    p = np.asarray(jax.nn.softmax(jnp.asarray(hf_scores(logits, seen_ids, **generation))[0]), np.float64)

    stages, seen = Stages.of([Sampling(**generation)]), make_seen(seen_ids)
    many = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape[1:])), (logits, stages, seen))
    tokens = sample(many[0], keys(3, count), many[1], num_tokens=V, seen=many[2])
    frequency = np.bincount(tokens, minlength=V) / count
    assert not frequency[p == 0].any()
    np.testing.assert_array_less(np.abs(frequency - p), 5 * np.sqrt(p * (1 - p) / count) + 1e-12 + (p == 0))


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 1000),
    num_tokens=st.sampled_from([1, 17, V - 1, V]),
    temperature=st.sampled_from([0.0, 1e-30, 1.0, 1e6]),
)
def test_padding_rows_are_never_sampled(seed, num_tokens, temperature):
    logits = make_logits(seed)
    logits[:, num_tokens:] += 1e4
    stages = Stages.of([Sampling(temperature=temperature, top_p=0.999, min_p=1e-4)] * B)
    tokens = sample(jnp.asarray(logits), keys(seed), stages, num_tokens=num_tokens)
    assert tokens.dtype == jnp.int32
    assert ((tokens >= 0) & (tokens < num_tokens)).all()


def test_greedy_takes_the_best_and_needs_no_other_stage():
    logits = jnp.asarray(make_logits())
    stages = Stages.of([Sampling(temperature=0, top_k=5, top_p=0.5, min_p=0.1)] * B)
    assert jax.tree.leaves(stages) == []
    np.testing.assert_array_equal(sample(logits, keys(), stages, num_tokens=V), logits.argmax(-1))


def test_rows_keep_their_own_settings_in_a_mixed_batch():
    settings = [
        Sampling(temperature=0),
        Sampling(temperature=1.3, top_k=3, repetition_penalty=1.4),
        Sampling(top_p=0.7, presence_penalty=1.0, logit_bias=((3, 1.5),)),
        Sampling(min_p=0.2, frequency_penalty=-0.5),
    ]
    logits = jnp.asarray(make_logits(7))
    seen = make_seen(np.random.default_rng(2).integers(0, V, (B, 20)))
    together = sample(logits, keys(8), Stages.of(settings), num_tokens=V, seen=seen)
    for row, setting in enumerate(settings):
        only = slice(row, row + 1)
        own = jax.tree.map(lambda x, only=only: x[only], seen)
        alone = sample(logits[only], keys(8)[only], Stages.of([setting]), num_tokens=V, seen=own)
        assert alone[0] == together[row]


def test_new_numbers_compile_nothing_and_new_stages_do():
    traces = []

    @jax.jit
    def step(stages):
        traces.append(stages)
        return sampling.sample(jnp.asarray(make_logits()), keys(), stages, num_tokens=V)

    for number in (0.3, 0.6, 0.9):
        step(Stages.of([Sampling(temperature=number, top_p=number)] * B))
    assert len(traces) == 1
    step(Stages.of([Sampling(temperature=0)] * B))
    assert len(traces) == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_says_so_and_spares_the_others(bad):
    logits = make_logits()
    logits[1, 5] = bad
    for setting in (Sampling(temperature=0), Sampling(top_p=0.9)):
        tokens = sample(jnp.asarray(logits), keys(), Stages.of([setting] * B), num_tokens=V)
        np.testing.assert_array_equal(tokens == -1, np.arange(B) == 1)


def test_presence_and_frequency_are_of_what_was_generated():
    logits, seen = make_logits(4), make_seen(np.array([[1, 2, 3, 3], [1, 2, 3, 4], [5, 5, 5, 6], [7, 8, 9, 9]]))
    rows = [Sampling(presence_penalty=0.5, frequency_penalty=x) for x in (2.0, 0.0, -1.0, 0.25)]
    expected = logits.copy()
    for row, (token, count) in ((0, (3, 2)), (1, (3, 1)), (1, (4, 1)), (2, (5, 1)), (2, (6, 1)), (3, (9, 2))):
        expected[row, token] -= 0.5 + count * rows[row].frequency_penalty
    np.testing.assert_allclose(penalize(jnp.asarray(logits), seen, Stages.of(rows)), expected, rtol=1e-6)


def test_bias_comes_before_the_penalties():
    # A logit of -1 that a bias makes 3 is divided by the penalty: were the penalty first, it would be 4 - 2.
    logits = jnp.full((1, V), -9.0).at[0, 5].set(-1.0).at[0, 6].set(1.75)
    bias = Sampling(temperature=0, logit_bias=((5, 4.0), (60, -100.0)), repetition_penalty=2.0)
    assert sample(logits, keys(0, 1), Stages.of([bias]), num_tokens=V, seen=make_seen(np.array([[5, 0, 0]])))[0] == 6


def test_biases_force_and_ban_and_their_number_compiles_little():
    logits = make_logits(9)
    banned = tuple((int(token), -100.0) for token in logits[1].argsort()[-3:])
    stages = Stages.of([Sampling(temperature=0, logit_bias=bias) for bias in (((2, 100.0),), banned, (), ())])
    assert {x.shape for x in jax.tree.leaves(stages.logit_bias)} == {(B, sampling.FEWEST_BIASES)}
    best = logits.argsort(axis=-1)
    tokens = sample(jnp.asarray(logits), keys(), stages, num_tokens=V)
    np.testing.assert_array_equal(tokens, [2, best[1, -4], best[2, -1], best[3, -1]])
    long = Stages.of([Sampling(logit_bias=tuple((token, 1.0) for token in range(33)))])
    assert {x.shape for x in jax.tree.leaves(long.logit_bias)} == {(1, 64)}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_allowed_tokens_are_chosen_whatever_else_is_asked(temperature):
    allowed = np.random.default_rng(0).random((B, V)) < 0.2
    allowed[1] = np.arange(V) == V - 1
    allowed[3] = False
    words = np.packbits(np.pad(allowed, ((0, 0), (0, 64 - V))), axis=1, bitorder="little").view("<u4")
    logits, seen = make_logits(3) - 20 * allowed, make_seen(np.tile(np.arange(9), (B, 1)))
    asked = Sampling(temperature=temperature, top_p=0.9, presence_penalty=2.0, logit_bias=((0, 100.0),))
    words, stages = jnp.asarray(words), Stages.of([asked] * B)
    for seed in range(5):
        tokens = sample(jnp.asarray(logits), keys(seed), stages, num_tokens=V, seen=seen, allowed=words)
        assert allowed[np.arange(3), tokens[:3]].all() and tokens[3] == -1
    every = jnp.full_like(words, 2**32 - 1)
    padded = jnp.asarray(logits + 1e3 * (np.arange(V) >= 3))
    assert (sample(padded, keys(), stages, num_tokens=3, seen=seen, allowed=every) < 3).all()


def test_logprobs_are_those_of_the_model():
    logits = make_logits(11)
    logits[:, 50:] += 1e4
    exact = logits[:, :50].astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=-1, keepdims=True))
    tokens = np.array([0, 49, 7, 7])
    own, ids, values = logprobs(jnp.asarray(logits), jnp.asarray(tokens), num_tokens=50, top=5)
    np.testing.assert_allclose(own, exact[np.arange(B), tokens], rtol=1e-5)
    np.testing.assert_array_equal(ids, exact.argsort(axis=-1)[:, :-6:-1])
    np.testing.assert_allclose(values, np.take_along_axis(exact, np.asarray(ids), axis=1), rtol=1e-5)
    assert logprobs(jnp.asarray(logits), jnp.asarray(tokens), num_tokens=50, top=0)[1].shape == (B, 0)


def test_few_candidates_change_no_distribution(monkeypatch):
    stages = Stages.of([Sampling(top_k=k, top_p=p) for k, p in ((0, 0.97), (2, 0.9), (40, 0.99), (0, 1.0))])
    logits = jnp.asarray(make_logits(12)).at[2, ::2].set(1.0)  # ties go beyond the candidates
    expected = masses(logits, stages)
    monkeypatch.setattr(draw, "CANDIDATES", 3)
    np.testing.assert_array_equal(jax.jit(lambda *x: sampling.masses(*x))(logits, stages), expected)


def test_no_stage_sorts_the_vocabulary():
    stages = Stages.of([Sampling(temperature=0.7, top_k=20, top_p=0.8, min_p=0.1)] * B)
    traced = sample.trace(jnp.asarray(make_logits()), keys(), stages, num_tokens=V)
    accelerated = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "stablehlo.sort" not in accelerated and "top_k" not in accelerated
    program = traced.lower().as_text()
    assert "stablehlo.sort" not in program and program.count("top_k") >= 1


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")), ("top_k", -1),
        ("top_p", 0.0), ("top_p", 1.01), ("min_p", -0.1), ("min_p", 1.1), ("repetition_penalty", 0.0),
        ("repetition_penalty", float("nan")), ("presence_penalty", 2.1), ("frequency_penalty", -2.1),
        ("frequency_penalty", float("nan")),
    ],
)  # fmt: skip
def test_impossible_values_are_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=f"{field}={value}"):
        Sampling(**{field: value})


@pytest.mark.parametrize("pair", [(-1, 0.0), (3, 100.5), (3, float("nan"))])
def test_impossible_biases_are_refused(pair):
    with pytest.raises(ConfigError, match=f"logit_bias={pair[0]}: {pair[1]}"):
        Sampling(logit_bias=((1, 1.0), pair))
