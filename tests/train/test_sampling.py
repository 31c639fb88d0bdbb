"""Engines that follow training: they say what the weights say, on any mesh, and keep and compile nothing."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from qwen_jax.engine import Capacity, Request, Sampling, steps
from qwen_jax.errors import ConfigError
from qwen_jax.sharding import make_mesh
from tests.published import logits
from train import adapter
from train.config import LoRA
from train.sampling import Follower, engines_mesh

PROMPT = [250, 1, 2, 3, 4, 5, 6]
LENGTH, NEW = 16, 6


def answers(replicas) -> list[list[int]]:
    """Of every engine there is, that are asked one after the other."""
    found = []
    for engine in replicas._engines:
        engine.add(Request(prompt=PROMPT, max_new_tokens=NEW, sampling=Sampling(temperature=0)))
        found.append([])
        while engine.busy:
            found[-1] += [token.id for token in engine.step()]
    return found


def parameters(config, lora, *, seed):
    """What is trained and what is not, on the current mesh, far from their beginning."""
    random = np.random.default_rng(seed)
    split = lambda x: jax.NamedSharding(jax.sharding.get_mesh(), x.sharding.spec)
    draw = lambda x: jax.device_put(random.normal(0, 0.4, x.shape).astype(x.dtype), split(x))
    params, base = jax.tree.map(draw, adapter.abstract(config, lora))
    return params, adapter.Frozen(base=base)


def test_it_answers_as_the_weights_do_and_leaves_them(config, monkeypatch):
    """Beside a base, on a mesh that splits sequences, which decoding cannot; engines have more devices than heads."""
    config, lora = dataclasses.replace(config.model, num_kv_heads=1, num_layers=1), LoRA(rank=2)
    mesh = make_mesh(fsdp=2, context=2, tensor=2)
    capacity = Capacity(max_rows=1, max_length=LENGTH, page_size=8)
    follower = Follower(config, num_tokens=264, mesh=mesh, capacity=capacity, adapter=lora, tensor=2)
    traces, forward = [], steps.forward_cached
    monkeypatch.setattr(steps, "forward_cached", lambda *a, **k: traces.append(1) or forward(*a, **k))
    compiled, seen = [], []
    for seed in (1, 2):
        with jax.set_mesh(mesh):
            params, frozen = parameters(config, lora, seed=seed)
        with follower.at(params, frozen) as replicas:
            found, *others = answers(replicas)
        assert others == [found] * 3
        assert not any(jax.tree.leaves((e._params, e._cache)) for e in replicas._engines), "holds on to what was lent"
        compiled.append(len(traces))
        seen.append(found)
        alone = jax.device_get(adapter.join(lora)(params, frozen, None))
        row = np.array([PROMPT + found + [0] * (LENGTH - len(PROMPT) - NEW)], np.int32)
        with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
            likeliest = jax.device_get(logits(config, alone, row, np.arange(LENGTH, dtype=np.int32)[None]))
        assert likeliest[0].argmax(-1)[len(PROMPT) - 1 :][:NEW].tolist() == found
    assert compiled[0] == compiled[1] > 0 and seen[0] != seen[1]


@pytest.mark.parametrize("sizes", [dict(data=2, tensor=4), dict(fsdp=8)])
def test_engines_are_as_wide_as_kv_heads_allow(config, sizes):
    config = dataclasses.replace(config.model, num_heads=8, num_kv_heads=2, vocab_size=264)
    mesh = make_mesh(**sizes)
    found = engines_mesh(mesh, config, None)
    assert found.shape == dict(data=4, fsdp=1, context=1, expert=1, tensor=2)
    assert set(found.devices.flat) == set(mesh.devices.flat)
    assert engines_mesh(mesh, config, 8).shape["data"] == 1
    with pytest.raises(
        ConfigError, match="rollout.tensor=3 devices cannot .* of the 8 that a host has; it can be 1, 2, "
    ):
        engines_mesh(mesh, config, 3)
