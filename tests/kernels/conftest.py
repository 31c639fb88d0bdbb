"""Programs compiled for TPUs that are not there. Nothing runs on a TPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jaxtyping
import pytest

from train.plan.compiled import ENVIRONMENT

# What every program starts with; `array` is one on the first device of the topology.
PREAMBLE = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

topology, *arguments = sys.argv[1:]
devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
whole = NamedSharding(Mesh(np.array(devices[:1]), ("x",)), PartitionSpec())

def array(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)
"""


@pytest.fixture
def unchecked(monkeypatch):
    """Nothing compares arguments with annotations, as where the library is used: its own checks speak."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def compile_for_tpu() -> Callable[..., None]:
    """`compile_for_tpu(program, topology, *arguments)` runs the Python source `program`, which compiles and asserts,
    after `PREAMBLE`: it finds `array(dtype, *shape)`, and the list of strings `arguments`."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")

    def run(program: str, *arguments: str) -> None:
        # A process of its own: a check that fails in the compiler aborts it.
        done = subprocess.run(
            [sys.executable, "-c", PREAMBLE + program, *arguments],
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]

    return run
