"""The test bench: eight virtual CPU devices, strict dtypes, warnings as errors (pyproject.toml)."""

from __future__ import annotations

import os
import signal

# Before anything imports jax: the number of devices is read once.
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
# Nearly all the time of a test goes into compiling programs that run once: leave out LLVM's optimiser, and take the
# older of XLA's code generators where there are two, which is three times as quick.
QUICK_COMPILE = "--xla_backend_optimization_level=0 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8", QUICK_COMPILE]
)
# A shell that runs the suite in the background has it ignore the signal that some tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)

import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook

# Before anything imports these, which annotate shapes: arguments and results of every call are compared with them. An
# int is a float, as for pyright.
install_import_hook(
    ["qwen_jax.ops", "qwen_jax.model", "qwen_jax.kernels", "qwen_jax.engine.steps"],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

from qwen_jax import sharding
from qwen_jax.config import ModelConfig, Rope

jax.config.update("jax_numpy_dtype_promotion", "strict")
# The same examples each time: what fails here fails everywhere. `--hypothesis-profile=default` looks for new ones.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same")


def tiny_config(**changes) -> ModelConfig:
    """A small Qwen with every field at a value no default would give."""
    fields = dict(
        vocab_size=96,
        width=32,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=10,
        mlp_width=40,
        max_position=64,
        norm_eps=3e-5,
        qkv_bias=True,
        qk_norm=False,
        tie_embeddings=True,
        rope=Rope(theta=12345.0),
    )
    return ModelConfig(**(fields | changes))


@pytest.fixture
def mesh():
    """A mesh of one device, current during the test."""
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])) as mesh:
        yield mesh
