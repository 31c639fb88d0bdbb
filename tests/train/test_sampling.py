"""An engine that follows training: it says what the weights say, on any mesh, and keeps and compiles nothing."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from qwen_jax.engine import Capacity, Request, Sampling, steps
from qwen_jax.sharding import make_mesh
from tests.published import logits
from train import adapter
from train.config import LoRA
from train.sampling import Follower

PROMPT = [250, 1, 2, 3, 4, 5, 6]
LENGTH, NEW = 16, 6


def answer(engine) -> list[int]:
    engine.add(Request(prompt=PROMPT, max_new_tokens=NEW, sampling=Sampling(temperature=0)))
    made = []
    while engine.busy:
        made += [token.id for token in engine.step()]
    return made


def parameters(config, lora, *, seed):
    """What is trained and what is not, on the current mesh, far from their beginning."""
    random = np.random.default_rng(seed)
    split = lambda x: jax.NamedSharding(jax.sharding.get_mesh(), x.sharding.spec)
    draw = lambda x: jax.device_put(random.normal(0, 0.4, x.shape).astype(x.dtype), split(x))
    params, base = jax.tree.map(draw, adapter.abstract(config, lora))
    return params, adapter.Frozen(base=base)


def test_it_answers_as_the_weights_do_and_leaves_them(config, monkeypatch):
    """Beside a base, on a mesh that has more devices than kv heads and splits sequences, which decoding cannot."""
    config, lora = dataclasses.replace(config.model, num_kv_heads=1, num_layers=1), LoRA(rank=2)
    mesh = make_mesh(fsdp=2, context=2, tensor=2)
    capacity = Capacity(max_rows=1, max_length=LENGTH, page_size=8)
    follower = Follower(config, num_tokens=264, mesh=mesh, capacity=capacity, adapter=lora)
    traces, forward = [], steps.forward_cached
    monkeypatch.setattr(steps, "forward_cached", lambda *a, **k: traces.append(1) or forward(*a, **k))
    compiled, seen = [], []
    for seed in (1, 2):
        with jax.set_mesh(mesh):
            params, frozen = parameters(config, lora, seed=seed)
        with follower.at(params, frozen) as engine:
            found = answer(engine)
        assert not jax.tree.leaves((engine._params, engine._cache)), "it holds on to what it was lent"
        compiled.append(len(traces))
        seen.append(found)
        alone = jax.device_get(adapter.join(lora)(params, frozen, None))
        row = np.array([PROMPT + found + [0] * (LENGTH - len(PROMPT) - NEW)], np.int32)
        with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
            likeliest = jax.device_get(logits(config, alone, row, np.arange(LENGTH, dtype=np.int32)[None]))
        assert likeliest[0].argmax(-1)[len(PROMPT) - 1 :][:NEW].tolist() == found
    assert compiled[0] == compiled[1] > 0 and seen[0] != seen[1]
