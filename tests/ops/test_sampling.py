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
from qwen_jax.ops import sampling
from qwen_jax.ops.sampling import Sampling, Stages

B, V = 4, 61

sample = jax.jit(sampling.sample, static_argnames="num_tokens")
draw, penalize, temper = jax.jit(sampling.draw), jax.jit(sampling.penalize), jax.jit(sampling.temper)
keep_top_k, keep_top_p = jax.jit(sampling.keep_top_k), jax.jit(sampling.keep_top_p)
keep_min_p = jax.jit(sampling.keep_min_p)

# Two float32 softmaxes of the same row, computed in different orders.
TOLERANCE = 2e-6


def make_logits(seed=0, batch=B, scale=3.0):
    return np.random.default_rng(seed).normal(0, scale, (batch, V)).astype(np.float32)


def keys(seed=0, batch=B):
    return jax.random.split(jax.random.key(seed), batch)


def rows(value, batch=B):
    return jnp.full(batch, value, jnp.float32)


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

    seen = np.zeros((B, V), bool)
    np.put_along_axis(seen, seen_ids, True, axis=1)
    stages = Stages.of([Sampling(**generation)] * B)
    actual = jnp.asarray(logits)
    for value, stage in (
        (stages.repetition_penalty, lambda x, v: penalize(x, jnp.asarray(seen), v)),
        (stages.temperature, temper),
        (stages.top_k, keep_top_k),
        (stages.top_p, keep_top_p),
        (stages.min_p, keep_min_p),
    ):
        actual = actual if value is None else stage(actual, value)

    np.testing.assert_array_equal(np.isfinite(actual), np.isfinite(expected))
    np.testing.assert_allclose(jax.nn.softmax(actual), jax.nn.softmax(jnp.asarray(expected)), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("generation", STAGES, ids=str)
def test_sample_draws_exactly_the_support_in_proportion(generation):
    # 4000 rows of one distribution: every token of HF's support within 5 standard errors, no other token at all.
    logits, count = make_logits(2, batch=1, scale=1.5), 4_000
    seen_ids = np.random.default_rng(1).integers(0, V, (1, 9))
    seen = np.zeros((1, V), bool)
    seen[0, seen_ids[0]] = True
    p = np.asarray(jax.nn.softmax(jnp.asarray(hf_scores(logits, seen_ids, **generation))[0]), np.float64)

    stages = jax.tree.map(lambda x: jnp.broadcast_to(x, count), Stages.of([Sampling(**generation)]))
    tokens = sample(
        jnp.broadcast_to(logits, (count, V)), keys(3, count), stages, num_tokens=V,
        seen=jnp.broadcast_to(seen, (count, V)),
    )  # fmt: skip
    frequency = np.bincount(tokens, minlength=V) / count
    assert not frequency[p == 0].any()
    np.testing.assert_array_less(np.abs(frequency - p), 5 * np.sqrt(p * (1 - p) / count) + 1e-12 + (p == 0))


@settings(deadline=None, max_examples=40)
@given(data=st.data(), k=st.integers(1, V), p=st.floats(0.01, 0.999), m=st.floats(0.0, 1.0))
def test_kept_sets_on_ties_and_extremes(data, k, p, m):
    values = st.sampled_from([-3e38, -50.0, -1.0, -0.5, 0.25, 0.5, 7.0, 3e4, -np.inf])
    row = np.array(data.draw(st.lists(values, min_size=V, max_size=V)), np.float32)
    row[0] = 1.0  # a row of nothing but -inf is no distribution
    x = jnp.asarray(row[None])

    kth = np.sort(row)[::-1][k - 1]
    np.testing.assert_array_equal(np.isfinite(keep_top_k(x, rows(k, 1)))[0], np.isfinite(row) & (row >= kth))

    probability = np.exp(row.astype(np.float64) - row.max())
    probability /= probability.sum()
    kept = np.isfinite(keep_top_p(x, rows(p, 1)))[0]
    larger = np.array([probability[row > value].sum() for value in row])
    sure = np.abs(larger - p) > 1e-5
    np.testing.assert_array_equal(kept[sure], (np.isfinite(row) & (larger < p))[sure])

    kept = np.isfinite(keep_min_p(x, rows(m, 1)))[0]
    sure = np.abs(probability - m * probability.max()) > 1e-5 * probability.max()
    np.testing.assert_array_equal(kept[sure], (np.isfinite(row) & (probability >= m * probability.max()))[sure])
    assert kept[row == row.max()].all()


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


def test_draw_never_takes_a_token_without_mass():
    # Masses so uneven that partial sums round; the masked tokens sit first, last and between.
    logits = jnp.where(jnp.arange(V) % 3 == 1, jnp.linspace(-20.0, 0.0, V), -jnp.inf)
    count = 4_000
    tokens = draw(jnp.broadcast_to(logits, (count, V)), keys(5, count))
    assert (np.asarray(tokens) % 3 == 1).all()


def test_greedy_takes_the_best_and_needs_no_other_stage():
    logits = jnp.asarray(make_logits())
    stages = Stages.of([Sampling(temperature=0, top_k=5, top_p=0.5, min_p=0.1)] * B)
    assert jax.tree.leaves(stages) == []
    np.testing.assert_array_equal(sample(logits, keys(), stages, num_tokens=V), logits.argmax(-1))


def test_rows_keep_their_own_settings_in_a_mixed_batch():
    settings = [
        Sampling(temperature=0),
        Sampling(temperature=1.3, top_k=3, repetition_penalty=1.4),
        Sampling(top_p=0.7),
        Sampling(min_p=0.2),
    ]
    logits = jnp.asarray(make_logits(7))
    seen = jnp.asarray(np.random.default_rng(2).random((B, V)) < 0.4)
    together = sample(logits, keys(8), Stages.of(settings), num_tokens=V, seen=seen)
    for row, setting in enumerate(settings):
        only = slice(row, row + 1)
        alone = sample(logits[only], keys(8)[only], Stages.of([setting]), num_tokens=V, seen=seen[only])
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


def test_no_stage_sorts_the_vocabulary():
    stages = Stages.of([Sampling(temperature=0.7, top_k=20, top_p=0.8, min_p=0.1)] * B)
    program = sample.lower(jnp.asarray(make_logits()), keys(), stages, num_tokens=V).as_text()
    assert "stablehlo.sort" not in program and "top_k" not in program


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")), ("top_k", -1),
        ("top_p", 0.0), ("top_p", 1.01), ("min_p", -0.1), ("min_p", 1.1), ("repetition_penalty", 0.0),
        ("repetition_penalty", float("nan")),
    ],
)  # fmt: skip
def test_impossible_values_are_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=f"{field}={value}"):
        Sampling(**{field: value})
