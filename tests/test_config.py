"""What a mixture of experts may be."""

from __future__ import annotations

import pytest

from qwen_jax import zoo
from qwen_jax.config import ModelConfig, Moe
from qwen_jax.errors import ConfigError
from tests.conftest import tiny_config

MOE = dict(num_experts=4, top_k=2, expert_width=8, shared_width=0, normalize_top_k=True)


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
def test_refused(changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Moe(**MOE | changes)


def test_a_layer_has_an_mlp_or_experts():
    with pytest.raises(ConfigError, match="mlp_width=40 is of a dense model"):
        tiny_config(moe=Moe(**MOE))
    with pytest.raises(ConfigError, match="mlp_width=0 must be at least 1"):
        tiny_config(mlp_width=0)


@pytest.mark.parametrize("name", ["Qwen1.5-MoE-A2.7B", "Qwen3-30B-A3B"])
def test_json_there_and_back(name):
    config = zoo.published(name)
    assert ModelConfig.from_json(config.to_json()) == config
