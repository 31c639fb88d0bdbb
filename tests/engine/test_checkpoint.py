"""What an engine cannot be made of."""

from __future__ import annotations

import argparse

import pytest

from qwen_jax.config import Score
from qwen_jax.engine import Capacity, load
from qwen_jax.errors import ModelError
from tests.conftest import tiny_config


def test_a_reward_model_is_refused(mesh):
    model = argparse.Namespace(path="rm", config=tiny_config(score=Score(labels=1, hidden=True), tie_embeddings=False))
    with pytest.raises(ModelError, match="rm is a reward or classification model"):
        load(model, argparse.Namespace(), mesh=mesh, capacity=Capacity())
