"""The engine against the plain forward pass, and requests against themselves in other company."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import model, sharding
from qwen_jax.config import DualChunk, DynamicNTK, Moe, QwenNTK, Rope, Yarn
from qwen_jax.engine import Capacity, DraftModel, Engine, PromptLookup, Request, Sampling, VerticalSlash, steps
from qwen_jax.errors import ConfigError, DataError
from tests.conftest import tiny_config

GREEDY = Sampling(temperature=0)
RANDOM = Sampling(temperature=1.5, top_k=50, top_p=0.95, min_p=0.001, repetition_penalty=1.1, presence_penalty=0.3)

# float32 sums over a few hundred terms, taken in another order.
CLOSE = 1e-4

PROMPTS = [np.random.default_rng(n).integers(0, 90, n).tolist() for n in (5, 33, 1, 50)]

TRAINED = 16
MOE = dict(mlp_width=0, moe=Moe(num_experts=4, top_k=2, expert_width=12, shared_width=16, normalize_top_k=True))
YARN = Yarn(factor=4.0, original_positions=TRAINED, beta_fast=32, beta_slow=1, attention_factor=1.1)
GENERATIONS = {
    "qwen1": dict(
        rope=Rope(theta=1e4, scaling=QwenNTK(original_positions=TRAINED)), logn=TRAINED, windows=(9, 0), num_layers=2,
        num_kv_heads=4,
    ),
    "qwen2": dict(num_layers=2, windows=(0, 9), tie_embeddings=False),
    "qwen2-moe": MOE,
    "qwen2.5-1m": dict(
        rope=Rope(theta=1e4, scaling=DualChunk(chunk_size=20, local_size=8, original_positions=TRAINED))
    ),
    "qwen3-yarn": dict(
        rope=Rope(theta=1e4, scaling=YARN), qk_norm=True, qkv_bias=False
    ),
    "dynamic": dict(rope=Rope(theta=1e4, scaling=DynamicNTK(factor=2.0, original_positions=TRAINED))),
}  # fmt: skip


def parameters(config):
    """Numbers far from an initialisation, so that logits differ clearly between tokens."""
    random = np.random.default_rng(0)

    def draw(leaf):
        values = random.normal(0, 0.3, leaf.shape) + (leaf.ndim == 1)
        return jax.device_put(values.astype(leaf.dtype), leaf.sharding.spec)

    return jax.tree.map(draw, jax.eval_shape(model.unstack_layers, model.abstract(config)))


def make_engine(mesh=None, num_tokens=90, capacity=None, sparse=None, speculate=None, **changes):
    config = tiny_config(**{"num_layers": 1} | changes)
    mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
    capacity = capacity or Capacity(max_rows=4, page_size=8)
    with jax.set_mesh(mesh):
        params = parameters(config)
    how = dict(mesh=mesh, capacity=capacity, sparse=sparse, speculate=speculate)
    return Engine(config, params, num_tokens=num_tokens, **how)


@pytest.fixture(scope="module")
def engine():
    return make_engine()


def run(engine, requests, *, at=None):
    """The tokens of each request, which is added before the step that `at` says (default: all before the first)."""
    at, numbers, made, count = at or [0] * len(requests), {}, [[] for _ in requests], 0
    while len(numbers) < len(requests) or engine.busy:
        for index, request in enumerate(requests):
            if index not in numbers.values() and at[index] <= count:
                numbers[engine.add(request)] = index
        for token in engine.step():
            made[numbers[token.request]].append(token)
        count += 1
    return made


def requests_of(prompts, sampling, *, rows=None, count=12, seed=7):
    rows = range(len(prompts)) if rows is None else rows
    return [
        Request(prompt=prompt, max_new_tokens=count, sampling=sampling, seed=seed, row=row)
        for prompt, row in zip(prompts, rows, strict=True)
    ]


def ids(made):
    return [[token.id for token in tokens] for tokens in made]


def tokens_of(engine, prompts, sampling, **how):
    return ids(run(engine, requests_of(prompts, sampling, **how)))


def full_logits(engine, prompts, made, *, attention="reference"):
    """For each prompt the logits [tokens, V] that a forward pass over all of it gives for what was made."""
    length = engine.max_length

    @jax.jit
    def full(params, row, size):
        positions = jnp.arange(length, dtype=jnp.int32)[None]
        # In rows longer than their tokens, rotations by length go by the tokens before padding.
        segments = (positions < size).astype(jnp.int32)
        hidden = model.forward(engine.config, params, row[None], positions, segments=segments, attention=attention)
        return model.logits(params, hidden)[0]

    found = []
    with jax.set_mesh(engine.mesh):
        for prompt, tokens in zip(prompts, made, strict=True):
            row = np.zeros(length, np.int32)
            row[: len(prompt) + len(tokens)] = [*prompt, *tokens]
            logits = np.asarray(full(engine._params, row, len(prompt) + len(tokens)))
            found.append(logits[len(prompt) - 1 : len(prompt) - 1 + len(tokens), :90])
    return found


def crowd(random, count, longest):
    """Requests of mixed lengths that begin alike, some of which a stop token ends, and when they come."""
    begins = [random.integers(0, 90, longest - 25).tolist() for _ in range(3)]
    requests = [
        Request(
            prompt=begins[random.integers(3)][: random.integers(0, longest - 25)]
            + random.integers(0, 90, random.integers(1, 10)).tolist(),
            max_new_tokens=int(random.integers(1, 16)),
            sampling=GREEDY,
            stop_ids=frozenset([3]),
            logprobs=0,
        )
        for _ in range(count)
    ]
    return requests, np.sort(random.integers(0, 4 * count, count)).tolist()


# The other ones are with the slow tests: each compiles its own programs.
@pytest.mark.parametrize("changes, chunk", [(GENERATIONS["qwen1"], 16), (GENERATIONS["qwen2.5-1m"] | MOE, 64)])
def test_a_crowd_is_the_full_forward_pass_token_for_token(changes, chunk):
    check_crowd(changes, count=40, chunk=chunk)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [16, 64])
@pytest.mark.parametrize("name", GENERATIONS)
def test_two_hundred_requests_are_the_full_forward_pass_token_for_token(name, chunk):
    check_crowd(GENERATIONS[name], count=200, chunk=chunk)


def check_crowd(changes, *, count, chunk):
    """Pieces of at most `chunk` tokens: of one prompt where it is 16, of two where it is 64."""
    # Room for the longest request and little more: rows must give way.
    capacity = Capacity(max_rows=4, page_size=4, cache_tokens=80, chunk=chunk)
    engine = make_engine(capacity=capacity, **changes | dict(max_position=80))
    requests, at = crowd(np.random.default_rng(1), count, 70)
    made = run(engine, requests, at=at)
    stats = engine.stats
    assert stats.preemptions > count // 20 and stats.prefix_hits > 2 * count and stats.pages_used == 0

    # What a row is under rotations by length is a function of its prompt's: decoding alone, all at once, tells.
    by_length = engine.config.rope.by_length
    wanted = alone(engine, requests) if by_length else full_logits(engine, [r.prompt for r in requests], ids(made))
    for request, tokens, logits in zip(requests, made, wanted, strict=True):
        assert [token.id for token in tokens] == logits.argmax(-1).tolist()
        assert len(tokens) == request.max_new_tokens or tokens[-1].id == 3
        assert tokens[-1].finish_reason == ("stop" if tokens[-1].id == 3 else "length")
        chances = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        own = chances[np.arange(len(tokens)), [token.id for token in tokens]]
        np.testing.assert_allclose([token.logprob for token in tokens], own, atol=CLOSE, rtol=0)


def alone(engine, requests):
    """The logits of each request when it is taken in and decoded by hand, with nobody else in pages of its own."""
    from tests import paged

    config = engine.config
    step = jax.jit(lambda params, tokens, at, rows: paged.forward(config, params, tokens, at, rows, attention="xla"))
    head = jax.jit(model.logits)
    found = []
    with jax.set_mesh(engine.mesh):
        for request in requests:
            length = len(request.prompt)
            rows = paged.paged(config, 1, 80, jnp.array([length], jnp.int32))
            row = np.zeros((1, 80), np.int32)
            row[0, :length] = request.prompt
            hidden, rows = step(engine._params, row, np.arange(80, dtype=np.int32)[None], rows)
            logits = [np.asarray(head(engine._params, hidden[:, length - 1 : length]))[0, 0, :90]]
            while len(logits) < request.max_new_tokens and logits[-1].argmax() != 3:
                at = np.array([[length + len(logits) - 1]], np.int32)
                hidden, rows = step(engine._params, np.array([[logits[-1].argmax()]], np.int32), at, rows)
                logits.append(np.asarray(head(engine._params, hidden))[0, 0, :90])
            found.append(np.stack(logits))
    return found


def test_prompts_are_taken_in_together_and_share_what_they_have_in_common(engine):
    begin = list(range(20, 36))  # two pages
    prompts = [begin + prompt for prompt in PROMPTS[:3]]
    wanted = [tokens_of(engine, [prompt], GREEDY)[0] for prompt in prompts]
    engine.swap(engine._params)  # which forgets them
    before = engine.stats
    numbers = [engine.add(request) for request in requests_of(prompts, GREEDY)]
    made = engine.step() + engine.step()
    assert [token.request for token in made] == numbers
    assert engine.stats.prefix_hits - before.prefix_hits == 2 * len(begin)
    while engine.busy:
        made += engine.step()
    assert [[token.id for token in made if token.request == number] for number in numbers] == wanted


@pytest.mark.parametrize("sampling", [GREEDY, RANDOM], ids=["greedy", "random"])
def test_a_request_does_not_depend_on_those_beside_it(engine, sampling):
    together = tokens_of(engine, PROMPTS, sampling)
    for row, prompt in enumerate(PROMPTS):
        assert tokens_of(engine, [prompt], sampling, rows=[row]) == [together[row]]
    others = requests_of(PROMPTS[::-1], RANDOM, rows=[9, 8, 7, 6], count=5)
    mixed = run(engine, [*others, *requests_of(PROMPTS, sampling)], at=[0, 0, 1, 2, 1, 2, 4, 7])
    assert ids(mixed)[4:] == together


def test_seed_and_row_number_change_random_tokens(engine):
    prompts = [PROMPTS[0]] * 4
    made = tokens_of(engine, prompts, RANDOM)
    assert made[0] != made[1] != made[2]
    assert tokens_of(engine, prompts, RANDOM) == made
    assert tokens_of(engine, prompts, RANDOM, seed=8) != made
    assert len(tokens_of(engine, prompts, RANDOM, seed=2**32 - 1)[0]) == 12


def test_a_steady_state_compiles_nothing(monkeypatch):
    traces, forward = [], steps.forward_cached

    def counting(config, params, tokens, batch, *args, **kwargs):
        traces.append((batch.rows[0].width, len(tokens)))
        return forward(config, params, tokens, batch, *args, **kwargs)

    monkeypatch.setattr(steps, "forward_cached", counting)
    engine = make_engine(norm_eps=7e-5)  # a config no other test has compiled for
    requests, at = crowd(np.random.default_rng(0), 30, 48)
    run(engine, requests, at=at)
    # One row or four, beside pieces that take 32 or 128 places or none, and pieces alone.
    assert set(traces) <= {(1, 1), (1, 4), (8, 32), (8, 128), (1, 33), (1, 36), (1, 129), (1, 132)}
    assert len(traces) == len(set(traces))
    traces.clear()
    for seed in range(3):
        requests, at = crowd(np.random.default_rng(seed), 10, 48)
        run(engine, [dataclasses.replace(r, sampling=RANDOM, seed=seed) for r in requests], at=at)
    assert not traces


def test_weights_are_swapped_without_compiling_and_what_they_computed_is_forgotten(engine, monkeypatch):
    before = tokens_of(engine, PROMPTS, GREEDY)
    other = jax.tree.map(lambda x: x * 1.1, engine._params)
    kept, traces, forward = engine._params, [], steps.forward_cached
    monkeypatch.setattr(steps, "forward_cached", lambda *a, **k: traces.append(1) or forward(*a, **k))
    numbers = [engine.add(request) for request in requests_of(PROMPTS, GREEDY)]
    early = [token for _ in range(6) for token in engine.step()]
    engine.swap(other)
    late = [token for _ in range(60) for token in engine.step()]
    made = {n: [token.id for token in (*early, *late) if token.request == n] for n in numbers}
    assert all(len(tokens) == 12 for tokens in made.values()) and list(made.values()) != before
    # The new weights say what follows the tokens that the old ones made.
    begun = sum(token.request == numbers[0] for token in early)
    for logits, tokens in zip(full_logits(engine, PROMPTS[:1], [made[numbers[0]]]), [made[numbers[0]]], strict=True):
        assert logits.argmax(-1)[begun + 1 :].tolist() == tokens[begun + 1 :]
    engine.swap(kept)
    assert tokens_of(engine, PROMPTS, GREEDY) == before and not traces


def test_a_cancelled_request_is_gone_at_once_and_nobody_notices(engine):
    alone = tokens_of(engine, PROMPTS[:2], RANDOM)
    waiting = requests_of([PROMPTS[3]] * 4, RANDOM, count=14)
    numbers = [engine.add(request) for request in [*requests_of(PROMPTS[:2], RANDOM), *waiting]]
    made = {number: [] for number in numbers}
    for count in range(50):
        for token in engine.step():
            made[token.request].append(token.id)
        if count == 1:
            engine.cancel(numbers[5])  # waits
        if count == 5:
            before = engine.stats.pages_used
            engine.cancel(numbers[2])
            engine.cancel(numbers[2])
            assert engine.stats.pages_used < before
    assert [made[number] for number in numbers[:2]] == alone
    assert not made[numbers[5]] and len(made[numbers[2]]) < 14 == len(made[numbers[3]])
    assert not engine.busy and engine.stats.pages_used == 0
    engine.cancel(12345)


def test_at_most_one_step_is_launched_that_nobody_reads(engine, monkeypatch):
    launched, compute = [], steps.compute
    monkeypatch.setattr("qwen_jax.engine.engine.compute", lambda *a, **k: launched.append(1) or compute(*a, **k))
    engine.add(requests_of(PROMPTS[:1], GREEDY, count=6)[0])
    got = [len(engine.step()) for _ in range(4)]
    assert got == [0, 1, 1, 1] and len(launched) == 4
    while engine.busy:
        engine.step()
    assert len(launched) == 6


def test_penalty_counts_prompt_and_completion(engine):
    # Nearly greedy: tokens with positive logits lose to every unseen one, and unseen ones last for 12 tokens.
    made = tokens_of(engine, PROMPTS, dataclasses.replace(RANDOM, temperature=1e-4, repetition_penalty=1e6))
    for prompt, completion in zip(PROMPTS, made, strict=True):
        assert not set(prompt) & set(completion)
        assert len(set(completion)) == 12


def test_tokens_beyond_the_tokenizer_are_never_made():
    made = tokens_of(make_engine(num_tokens=3), [[1, 2, 0]], GREEDY)
    assert set(made[0]) <= {0, 1, 2}


class Even:
    """A grammar of even tokens, of which none comes twice."""

    def __init__(self):
        self.left = set(range(0, 90, 2))

    def mask(self):
        bits = np.zeros(96, np.uint32)
        bits[sorted(self.left)] = 1
        return (bits.reshape(3, 32) << np.arange(32, dtype=np.uint32)).sum(1, dtype=np.uint32)

    def accept(self, token):
        self.left.remove(token)


def test_a_constraint_holds_for_its_request_alone(engine):
    free = requests_of(PROMPTS[:2], RANDOM)
    bound = [dataclasses.replace(r, constraint=Even()) for r in requests_of(PROMPTS[2:], GREEDY, count=14)]
    made = ids(run(engine, [*free, *bound], at=[0, 0, 0, 5]))
    assert made[:2] == ids(run(engine, free))
    for tokens in made[2:]:
        assert len(set(tokens)) == 14 and not any(token % 2 for token in tokens)


def test_the_likeliest_tokens_are_told_with_their_probabilities(engine):
    asked = [
        dataclasses.replace(r, logprobs=n) for r, n in zip(requests_of(PROMPTS, RANDOM), (3, None, 0, 7), strict=True)
    ]
    made = run(engine, asked)
    assert ids(made) == tokens_of(engine, PROMPTS, RANDOM)
    assert [len(tokens[0].top) for tokens in made] == [3, 0, 0, 7] and made[1][0].logprob is None
    (logits,) = full_logits(engine, PROMPTS[:1], ids(made)[:1])
    chances = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for token, row in zip(made[0], chances, strict=True):
        order = np.argsort(-row)[:3].tolist()
        assert [top for top, _ in token.top] == order
        np.testing.assert_allclose([chance for _, chance in token.top], row[order], atol=CLOSE, rtol=0)
        np.testing.assert_allclose(token.logprob, row[token.id], atol=CLOSE, rtol=0)


def test_probabilities_are_told_at_the_temperature_of_those_who_ask_for_it(engine):
    """Beside others, which are told those of the model."""
    hot = dataclasses.replace(RANDOM, temperature=1.7)
    asked = [dataclasses.replace(r, logprobs=2, tempered=r.row % 2 == 0) for r in requests_of(PROMPTS, hot)]
    assert {r.tempered for r in asked} == {False, True}
    made = run(engine, asked)
    for request, tokens, logits in zip(asked, made, full_logits(engine, PROMPTS, ids(made)), strict=True):
        logits = logits / (1.7 if request.tempered else 1)
        chances = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for token, row in zip(tokens, chances, strict=True):
            told = [token.logprob, *(chance for _, chance in token.top)]
            wanted = [row[token.id], *(row[top] for top, _ in token.top)]
            np.testing.assert_allclose(told, wanted, atol=CLOSE, rtol=0)


@pytest.mark.parametrize("sizes, changes", [(dict(expert=2, tensor=2), MOE), (dict(data=2, tensor=4), {})])
def test_a_mesh_of_several_devices_makes_the_same_tokens(engine, sizes, changes):
    mesh = sharding.make_mesh(devices=jax.devices()[: int(np.prod(list(sizes.values())))], **sizes)
    made = tokens_of(make_engine(**changes) if changes else engine, PROMPTS, RANDOM)
    assert tokens_of(make_engine(mesh, **changes), PROMPTS, RANDOM) == made


def test_one_row_of_bfloat16_is_what_it_is_in_a_batch():
    engine = make_engine(dtype="bfloat16", param_dtype="bfloat16")
    together = tokens_of(engine, PROMPTS[:2], GREEDY, count=6)
    assert tokens_of(engine, PROMPTS[:1], GREEDY, count=6) == together[:1]


def test_pages_of_int8_are_close(engine):
    capacity = Capacity(max_rows=4, page_size=128, int8=True)
    asked = [dataclasses.replace(r, logprobs=0) for r in requests_of(PROMPTS, GREEDY, count=1)]
    exact, close = run(engine, asked), run(make_engine(capacity=capacity), asked)
    for a, b in zip(exact, close, strict=True):
        assert 0 < abs(a[0].logprob - b[0].logprob) < 0.1  # a step of int8 is 1/127 of the largest of a vector


def test_logits_that_are_not_finite_end_their_request(engine):
    params = dict(engine._params, final_norm=jax.tree.map(lambda x: x * jnp.nan, engine._params["final_norm"]))
    broken = Engine(engine.config, params, num_tokens=90, mesh=engine.mesh, capacity=Capacity(max_rows=4, page_size=8))
    (made,) = run(broken, requests_of(PROMPTS[:1], GREEDY))
    assert [token.finish_reason for token in made] == ["error"] and not broken.busy


def test_what_can_never_fit_is_refused(engine):
    assert len(tokens_of(engine, PROMPTS[3:], GREEDY, count=14)[0]) == 14
    with pytest.raises(DataError, match="50 tokens and 15 new.*64 positions; ask for at most 14 new tokens"):
        tokens_of(engine, PROMPTS[3:], GREEDY, count=15)
    with pytest.raises(DataError, match="70 tokens.*shorten the prompt"):
        tokens_of(engine, [[1] * 70], GREEDY)
    with pytest.raises(DataError, match="token 90; ids from 0 to 89"):
        tokens_of(engine, [[1, 90]], GREEDY)
    for wrong, message in (
        (dict(prompt=[]), "no tokens"), (dict(max_new_tokens=0), "at least 1"), (dict(seed=-1), "seed"),
        (dict(logprobs=21), "logprobs=21"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            Request(**dict(prompt=[1], max_new_tokens=1) | wrong)
    assert not engine.busy


def test_sparse_prefill_is_for_prompts_above_the_threshold_alone():
    short, long = (np.random.default_rng(n).integers(0, 90, n).tolist() for n in (64, 400))
    least = VerticalSlash(threshold=64, vertical=130, slash=100)
    capacity = Capacity(max_rows=1, page_size=8, max_length=420)
    engines = [make_engine(max_position=600, capacity=capacity, sparse=sparse) for sparse in (None, least)]
    asked = [dataclasses.replace(r, logprobs=0) for r in requests_of([short, long], GREEDY, count=2)]
    full, sparse = (run(engine, asked) for engine in engines)
    assert abs(full[0][0].logprob - sparse[0][0].logprob) < CLOSE
    assert abs(full[1][0].logprob - sparse[1][0].logprob) > 100 * CLOSE
    assert run(engines[1], asked[1:])[0] == [dataclasses.replace(t, request=t.request + 1) for t in sparse[1]]


def test_guesses_change_no_token(engine):
    # Prompts that repeat themselves, so that there are guesses; tokens that are counted; a grammar.
    prompts = [[*prompt, *prompt, *prompt[:2]] for prompt in (PROMPTS[0], [4, 4], [8, 9, 8])] + PROMPTS[:2]
    plain = dataclasses.replace(RANDOM, temperature=0.7, repetition_penalty=1, presence_penalty=0)
    samplings = [GREEDY, plain, GREEDY, RANDOM, GREEDY]
    asked = [
        dataclasses.replace(request, sampling=sampling, stop_ids=frozenset([3]), logprobs=0)
        for request, sampling in zip(requests_of(prompts, GREEDY, count=20), samplings, strict=True)
    ]
    bound = lambda: [*asked, dataclasses.replace(asked[1], constraint=Even(), row=9)]
    want = run(engine, bound())
    draft = tiny_config(num_layers=1, width=32)
    with jax.set_mesh(engine.mesh):
        # Nearly the model itself, so that some of its guesses are right.
        noisy = jax.tree.map(lambda x: x * 1.02, parameters(draft))
    for speculate in (PromptLookup(num_guesses=3), DraftModel(config=draft, params=noisy, num_guesses=3)):
        quick = make_engine(speculate=speculate)
        made = run(quick, bound())
        assert ids(made) == ids(want)
        assert quick.stats.steps < engine.stats.steps
        for a, b in zip(want, made, strict=True):
            assert [t.finish_reason for t in a] == [t.finish_reason for t in b]
            np.testing.assert_allclose([t.logprob for t in a], [t.logprob for t in b], atol=CLOSE, rtol=0)
        assert quick.stats.pages_used == 0


def test_what_followed_last_time_is_guessed():
    lookup = PromptLookup(num_guesses=3, ngram=2)
    assert lookup.follow([1, 2, 3, 4, 5, 1, 2]) == [3, 4, 5]
    assert lookup.follow([1, 2, 3, 9, 2, 7, 1, 2]) == [3, 9, 2]  # of two tokens, before of one
    assert lookup.follow([5, 2, 3, 9, 2, 7, 1, 2]) == [7, 1, 2]  # the latest
    assert lookup.follow([6, 6]) == [6] and lookup.follow([1, 2]) == lookup.follow([1]) == []
    # 257 has the bytes of a 1 in the middle of it.
    assert lookup.follow([256, 1 << 8, 7, 1]) == []
