"""What a model config refuses of positions and experts, and its JSON."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from qwen_jax import zoo
from qwen_jax.config import DualChunk, DynamicNTK, Linear, ModelConfig, Moe, QwenNTK, Rope, Yarn
from qwen_jax.errors import ConfigError, ModelError
from tests.conftest import tiny_config

MOE = dict(num_experts=4, top_k=2, expert_width=8, shared_width=0, normalize_top_k=True)
YARN = dict(factor=4.0, original_positions=50, beta_fast=32.0, beta_slow=1.0, attention_factor=1.1)
CHUNKS = DualChunk(chunk_size=20, local_size=8, original_positions=9)
SCALINGS = [
    Linear(factor=2.5), DynamicNTK(factor=2.0, original_positions=9), QwenNTK(original_positions=9), Yarn(**YARN),
    CHUNKS,
]  # fmt: skip


@pytest.mark.parametrize("scaling", [None, *SCALINGS])
def test_json_there_and_back(scaling):
    config = tiny_config(rope=Rope(theta=77.0, scaling=scaling), logn=0 if scaling == CHUNKS else 5)
    assert ModelConfig.from_json(config.to_json()) == config


def test_a_config_from_before_scalings_is_read():
    values = json.loads(tiny_config().to_json())
    del values["rope"]["scaling"], values["logn"]
    assert ModelConfig.from_json(json.dumps(values)) == tiny_config()


@pytest.mark.parametrize(
    "scaling", [{}, 3, "Yarn", {"kind": "NTK"}, {"kind": ["Yarn"]}, {"kind": "Linear"}, {"kind": "Linear", "factor": 0}]
)
def test_a_broken_scaling_is_refused(scaling):
    values = json.loads(tiny_config().to_json())
    values["rope"]["scaling"] = scaling
    with pytest.raises(ModelError, match="not a model config of this library"):
        ModelConfig.from_json(json.dumps(values))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(factor=0.5), "factor=0.5 must be at least 1"),
        (lambda: Linear(factor=math.nan), "factor=nan must be at least 1"),
        (lambda: DynamicNTK(factor=math.inf, original_positions=8), "factor=inf must be at least 1"),
        (lambda: DynamicNTK(factor=2.0, original_positions=0), "original_positions=0 must be at least 1"),
        (lambda: QwenNTK(original_positions=-1), "original_positions=-1 must be at least 1"),
        (lambda: Yarn(**YARN | dict(beta_slow=32.0)), "beta_slow=32.0 must be above 0 and below beta_fast=32.0"),
        (lambda: Yarn(**YARN | dict(beta_slow=0.0)), "beta_slow=0.0 must be above 0"),
        (lambda: Yarn(**YARN | dict(attention_factor=0.0)), "attention_factor=0.0 must be above 0"),
        *(
            (
                lambda s=size: DualChunk(chunk_size=8, local_size=s, original_positions=9),
                f"local_size={size} must be above",
            )
            for size in (-1, 0, 8)
        ),
        (lambda: dataclasses.replace(CHUNKS, original_positions=-1), "original_positions=-1 must be the length"),
        (
            lambda: tiny_config(rope=Rope(theta=9.0, scaling=CHUNKS), windows=(0, 5, 5)),
            r"windows=\(0, 5, 5\) and DualChunk cannot be combined",
        ),
        (lambda: tiny_config(rope=Rope(theta=9.0, scaling=CHUNKS), logn=5), "logn=5 and DualChunk cannot be combined"),
        (lambda: tiny_config(logn=1), "logn=1 must be the training length"),
        (lambda: tiny_config(logn=-5), "logn=-5 must be the training length"),
        (
            lambda: tiny_config(head_dim=2, rope=Rope(theta=9.0, scaling=QwenNTK(original_positions=8))),
            "head_dim=2 has one pair",
        ),
    ],
)
def test_bad_values_are_refused_in_one_line(make, message):
    with pytest.raises(ConfigError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(num_experts=0), "num_experts=0 must be at least 1"),
        (dict(top_k=0), "top_k=0 must be at least 1"),
        (dict(expert_width=0), "expert_width=0 must be at least 1"),
        (dict(shared_width=-1), "shared_width=-1 must not be negative"),
        (dict(top_k=5), "top_k=5 must not exceed num_experts=4"),
    ],
)
def test_bad_experts_are_refused(changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Moe(**MOE | changes)


def test_a_layer_has_an_mlp_or_experts():
    with pytest.raises(ConfigError, match="mlp_width=40 is of a dense model"):
        tiny_config(moe=Moe(**MOE))
    with pytest.raises(ConfigError, match="mlp_width=0 must be at least 1"):
        tiny_config(mlp_width=0)


@pytest.mark.parametrize("name", ["Qwen1.5-MoE-A2.7B", "Qwen3-30B-A3B"])
def test_the_json_of_a_published_mixture(name):
    config = zoo.published(name)
    assert ModelConfig.from_json(config.to_json()) == config
