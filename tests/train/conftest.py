"""A tiny corpus, a config for it, and compiled programs kept between the runs of a session."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from qwen_jax import sharding
from qwen_jax.config import ModelConfig, Moe, Rope
from train import run as run_module
from train.config import LM, AdamW, Checkpointing, Cosine, Evaluation, Pretrained, TrainConfig
from train.data.config import Data, Prompts, Text, TokenizerFile, TrainBPE
from train.record import METRICS
from train.reinforcement import Rollout
from train.rewards.config import RewardSource, Verifier

TIMINGS = ("seconds", "tokens_per_second", "rollout_seconds", "judge_seconds", "rollout_tokens_per_second")


def record(config) -> list[dict]:
    """The rows of metrics.jsonl, without what differs from run to run."""
    lines = (Path(config.run_dir) / METRICS).read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """Every run compiles the same few programs: this keeps them on disk, for subprocesses too."""
    folder = tmp_path_factory.mktemp("compiled")
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(folder), 0.0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Forty short documents."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(40):
        (folder / f"{i}.txt").write_text("\n".join(f"line {n} of text {i}: {n * i}" for n in range(i % 7 + 3)))
    return folder


@pytest.fixture
def config(tmp_path, corpus) -> TrainConfig:
    """Six steps of a tiny model; the smallest run that saves, evaluates and logs more than once."""
    return TrainConfig(
        run_dir=str(tmp_path / "run"),
        seed=3,
        model=ModelConfig(
            vocab_size=264,
            width=16,
            num_layers=2,
            num_heads=2,
            num_kv_heads=2,
            head_dim=8,
            mlp_width=24,
            max_position=32,
            norm_eps=1e-6,
            qkv_bias=True,
            qk_norm=False,
            tie_embeddings=True,
            rope=Rope(theta=1e4),
        ),
        data=Data(source=Text(path=str(corpus)), tokenizer=TrainBPE(vocab_size=264), sequence_length=16, held_out=0.2),
        batch_size=8,
        steps=6,
        optimizer=AdamW(peak_lr=1e-2),
        schedule=Cosine(warmup_steps=2),
        checkpoint=Checkpointing(every=2),
        evaluation=Evaluation(every=3),
    )


@pytest.fixture
def mixture(config) -> TrainConfig:
    """The same run of a mixture of experts, with both losses of its router."""
    moe = Moe(num_experts=4, top_k=2, expert_width=8, shared_width=12, normalize_top_k=False)
    model = dataclasses.replace(config.model, mlp_width=0, moe=moe)
    return dataclasses.replace(config, model=model, objective=LM(balance=0.02, z=0.003))


@pytest.fixture
def judged_by_rule(config, monkeypatch):
    """A function: a kind of objective to a run of it, on short completions that are never sampled."""
    shape = dataclasses.replace(config.model, num_layers=1)
    monkeypatch.setattr("qwen_jax.weights.source.read_config", lambda path: shape)
    source, tokenizer = Prompts(path="x", format="qwen2"), TokenizerFile(path="x")
    data = dataclasses.replace(config.data, source=source, tokenizer=tokenizer)

    def of(kind, **changes):
        rollout = Rollout(completions=4, max_new_tokens=5, updates=6, passes=2)
        rewards = (RewardSource(source=Verifier(name="math")),)
        objective = kind(rewards=rewards, rollout=rollout, **changes)
        model = Pretrained(path="x", dtype="float32")
        return dataclasses.replace(config, model=model, data=data, objective=objective)

    return of


@pytest.fixture
def enough_devices(monkeypatch, compiled):
    """Runs see as many of the test bench's eight devices as their mesh wants."""
    make_mesh = lambda **sizes: sharding.make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())])
    monkeypatch.setattr(run_module, "make_mesh", make_mesh)


@pytest.fixture
def change():
    """dataclasses.replace, along a path: change(config, "optimizer.peak_lr", 1.0)."""

    def replace(config, path, value):
        name, _, rest = path.partition(".")
        return dataclasses.replace(config, **{name: replace(getattr(config, name), rest, value) if rest else value})

    return replace
