"""A run folder with a small random model, as training leaves it."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from qwen_jax import model, sharding
from qwen_jax.text import train_bpe
from qwen_jax.weights.checkpoint import Checkpoints
from tests.conftest import tiny_config


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    tokenizer = train_bpe(["low lower lowest, newer newest wider. " * 3], vocab_size=276)
    config = tiny_config(num_layers=1, vocab_size=288)
    random = np.random.default_rng(0)
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        params = jax.tree.map(
            lambda x: jax.device_put(random.normal(0, 0.3, x.shape).astype(x.dtype), x.sharding.spec),
            model.abstract(config),
        )
        checkpoints = Checkpoints(folder / "checkpoints", warn=pytest.fail)
        files = {"model.json": config.to_json().encode(), "tokenizer.json": tokenizer.to_bytes(), "config.gin": b""}
        checkpoints.save(7, params=params, files=files, meta={})
        checkpoints.wait()
    return folder
