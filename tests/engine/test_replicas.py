"""Several engines asked as one: what requests get, and to whom they go."""

from __future__ import annotations

import jax
import pytest

from qwen_jax import sharding
from qwen_jax.engine import Capacity, Completion, Replicas, Request, Sampling, generate
from tests.engine.test_engine import GREEDY, PROMPTS, RANDOM, make_engine, run
from tests.published import tiny_tokenizer


@pytest.fixture(scope="module")
def replicas():
    """Three engines, of two devices each, with room for fewer rows than are asked for."""
    meshes = [sharding.make_mesh(tensor=2, devices=jax.devices()[n : n + 2]) for n in (0, 2, 4)]
    return Replicas([make_engine(mesh, capacity=Capacity(max_rows=2, page_size=8)) for mesh in meshes])


def test_requests_get_what_one_engine_gives_them(replicas):
    of = [Request(prompt=p, max_new_tokens=7, sampling=s, seed=4, row=i, logprobs=0)
          for i, (p, s) in enumerate((p, s) for s in (GREEDY, RANDOM) for p in PROMPTS)]  # fmt: skip
    alone, found = run(make_engine(), of), run(replicas, of)
    assert [[token.id for token in each] for each in found] == [[token.id for token in each] for each in alone]
    assert found[0][0].logprob == pytest.approx(alone[0][0].logprob, abs=1e-4)
    assert not replicas.busy and replicas.stats.generated_tokens == 7 * len(of)


def test_prompts_that_are_alike_share_an_engine_and_others_are_spread(replicas):
    before = [engine.stats.prompt_tokens for engine in replicas._engines]
    numbers = [
        replicas.add(Request(prompt=prompt, max_new_tokens=2, sampling=GREEDY)) for prompt in PROMPTS for _ in range(2)
    ]
    given = [engine.stats.prompt_tokens - n for engine, n in zip(replicas._engines, before, strict=True)]
    assert given == [2 * (5 + 50), 2 * 33, 2 * 1]
    assert len(set(numbers)) == 8 and replicas.stats.num_waiting == 8
    for number in numbers:
        replicas.cancel(number)
    assert not replicas.busy


def test_texts_are_made_by_all(replicas):
    jobs = [
        (
            Request(prompt=[n + 1], max_new_tokens=3, sampling=Sampling(temperature=0)),
            Completion(tiny_tokenizer(), (), ()),
        )
        for n in range(12)
    ]
    before = [engine.stats.generated_tokens for engine in replicas._engines]
    generate(replicas, jobs)
    assert all(done.finish_reason == "length" for _, done in jobs)
    given = [engine.stats.generated_tokens - n for engine, n in zip(replicas._engines, before, strict=True)]
    assert sum(given) == 36 and min(given) > 0
