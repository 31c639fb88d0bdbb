"""A published model, and processes to convert it in."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import tiny_config
from tests.faults.forks import Forks
from tests.published import publish

CONFIG = tiny_config(vocab_size=260, tie_embeddings=False)


@pytest.fixture(scope="session")
def forks():
    if not Path("/proc/self/task").exists():
        pytest.skip("needs /proc")
    with Forks() as forks:
        yield forks


@pytest.fixture
def folder(tmp_path):
    """A Qwen2 in two files with an index."""
    publish(tmp_path / "model", CONFIG, "qwen2", files=2)
    return tmp_path / "model"
