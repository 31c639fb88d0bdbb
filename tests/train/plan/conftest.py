"""A config that fits many meshes."""

from __future__ import annotations

import dataclasses

import pytest

from train.config import Mesh, Zoo
from train.plan import page


@pytest.fixture
def planned(config):
    """Qwen2.5-7B, 4096 tokens, 256 rows."""
    data = dataclasses.replace(config.data, sequence_length=4096)
    return dataclasses.replace(
        config, model=Zoo(name="Qwen2.5-7B"), data=data, batch_size=256, mesh=Mesh(fsdp=256), remat="full"
    )


@pytest.fixture
def a_compiler(monkeypatch):
    """Pages name the compiler, which need not be installed for a test of a page."""
    monkeypatch.setattr(page, "versions", lambda: "a compiler")
