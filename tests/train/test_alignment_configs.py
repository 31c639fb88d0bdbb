"""Every run of alignment in configs resolves, with a small model in the place of those that it begins with."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qwen_jax import bindings
from tests.conftest import tiny_config
from tests.published import publish
from train.config import TrainConfig

CONFIGS = Path(__file__).parents[2] / "configs"
RUNS = [path for path in sorted(CONFIGS.glob("*.gin")) if re.match("(reward|dpo|online_dpo|ppo|grpo)_", path.name)]
RUNS += sorted(CONFIGS.glob("demo/align-*.gin"))
EPISODES = {"grpo_qwen2.5": 2048, "grpo_math": 4096}  # published


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> str:
    """A model whose width can be split over as many devices as the runs have."""
    folder = tmp_path_factory.mktemp("small") / "model"
    publish(folder, tiny_config(width=64, max_position=32768), "qwen2")
    return str(folder)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_it_is_a_run(path, small):
    text = path.read_text()
    begins = [f"MODEL = {small!r}"] if "MODEL" in text else []
    config, _ = bindings.resolve(TrainConfig, [*bindings.read(path), *bindings.parse_set(begins)])
    assert len(text.splitlines()) <= 40
    assert Path(config.run_dir).name == path.stem.removeprefix("align-")
    if path.stem in EPISODES:
        assert config.completions_per_episode == EPISODES[path.stem]
