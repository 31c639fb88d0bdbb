"""Every run for TPUs resolves, has its row in docs/tpu-configs.md, compiles and fits."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path

import pytest

from qwen_jax import bindings
from train.config import TrainConfig
from train.plan import compiled

ROOT = Path(__file__).parents[2]
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")

spec = importlib.util.spec_from_file_location("tpu_configs", ROOT / "benchmarks" / "tpu_configs.py")
tpu_configs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tpu_configs)
RUNS = tpu_configs.runs()
every_run = pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
PRETRAINING = [path for path in RUNS if path.parent == tpu_configs.CONFIGS]
TUNING = [path for path in RUNS if path not in PRETRAINING]
PARTS = ('include "preferences.gin"', 'include "online.gin"')
ALIGNMENT = [
    path for path in sorted(tpu_configs.TUNING.glob("*.gin")) if any(part in path.read_text() for part in PARTS)
]

# The compiler's warnings, which it keeps to its own log files unless told otherwise.
TELLING = {"TPU_STDERR_LOG_LEVEL": "0", "TF_CPP_MIN_LOG_LEVEL": "0"}
WARNING = "Involuntary full rematerialization"

RESHARDS = """
import jax, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
mesh = Mesh(np.array(devices).reshape(4, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
at = lambda *axes: NamedSharding(mesh, P(*axes))
turn = lambda x: jax.lax.with_sharding_constraint(x + 1, at(None, None, ("y", "x")))
jax.jit(turn, in_shardings=at("x", "y", None)).lower(jax.ShapeDtypeStruct((64, 64, 64), np.float32)).compile()
"""


def test_every_size_on_every_chip():
    there = {path.stem for path in PRETRAINING}
    for size in ("0.5b", "7b", "72b"):
        for chip in ("v5e", "v5p", "v6e"):
            assert any(name.startswith(f"qwen2.5-{size}-{chip}-") for name in there), (size, chip)
    assert {"qwen2.5-7b-32k-v5e-256", "qwen2.5-72b-32k-v5p-256", "qwen2.5-7b-long-v5p-256"} <= there


def test_every_other_file_is_included():
    files = {path.name: path.read_text() for path in tpu_configs.CONFIGS.glob("*.gin")}
    others = files.keys() - {path.name for path in PRETRAINING}
    assert others == {name for name in files if any(f'include "{name}"' in text for text in files.values())}


@pytest.mark.parametrize("path", TUNING, ids=lambda path: path.stem)
def test_a_run_of_fine_tuning_fills_its_chips_and_exports_its_best(path):
    config, topology = tpu_configs.load(path)
    assert math.prod(astuple(config.mesh)) == topology.num_devices
    assert config.run_dir == f"runs/{path.stem}"
    assert config.export and config.checkpoint.keep_best
    assert f"python -m train configs/{path.name}" in path.read_text()


def test_published_numbers_of_fine_tuning():
    """Of each report: length, batch, peak and last learning rate, warm-up, weight decay."""
    found = {}
    for path in TUNING:
        config, _ = tpu_configs.load(path)
        rate, schedule = config.optimizer.peak_lr, config.schedule
        length, last = config.data.sequence_length, round(rate * schedule.final_fraction, 12)
        found[path.stem.removeprefix("sft_")] = (length, config.batch_size, rate, last, schedule.warmup(1000))
        assert (config.optimizer.weight_decay, config.optimizer.clip_norm) == (0.1, 1.0)
    assert found["qwen1"] == (2048, 128, 2e-6, 2e-7, 1430)
    assert found["qwen2"] == found["qwen2.5"] == (32768, 32, 7e-6, 7e-7, 30)
    assert found["math"] == (4096, 128, 2e-5, 7e-7, 30)
    assert found["coder"] == (8192, 128, 1e-5, 1e-5, 30)
    assert found["lora"] == (2048, 16, 3e-4, 0, 10)
    assert found["qwen2.5-1m"][0] == 262144


@pytest.mark.parametrize("path", PRETRAINING, ids=lambda path: path.stem)
def test_a_run_is_what_its_file_is_called(path):
    last, topology = tpu_configs.load(path)
    config, _ = bindings.resolve(TrainConfig, bindings.read(path))
    assert math.prod(astuple(config.mesh)) == topology.num_devices
    length = {4096: "", 32768: "-32k", 262144: "-long"}[last.data.sequence_length]
    chips = f"{topology.chip.name}-{topology.num_chips * topology.chip.cores}"
    assert path.stem == f"{config.model.name.lower()}{length}-{chips}"
    assert config.run_dir == f"runs/{path.stem}"


@every_run
def test_the_table_has_a_row_with_these_settings(path):
    found = tpu_configs.rows(tpu_configs.PAGE.read_text())
    if path in TUNING and path.name not in found:
        pytest.skip(f"python benchmarks/tpu_configs.py {path.name} was not run yet")
    cells = found[path.name]
    assert len(cells) == len(tpu_configs.HEAD)
    assert cells[:5] == tpu_configs.settings(path), "python benchmarks/tpu_configs.py " + path.name


def test_every_row_has_its_run():
    text = tpu_configs.PAGE.read_text()
    found = tpu_configs.rows(text)
    assert list(found) == [path.name for path in RUNS if path in PRETRAINING or path.name in found]
    assert "Compiled, not run: compiler estimates (jax" in text


def test_every_way_of_alignment():
    assert {path.stem.split("_")[0] for path in ALIGNMENT} == {"reward", "dpo", "online", "grpo", "ppo"}


@pytest.mark.parametrize("path", ALIGNMENT, ids=lambda path: path.stem)
def test_a_run_of_alignment_fills_its_chips(path):
    config, topology = tpu_configs.load(path)
    assert math.prod(astuple(config.mesh)) == topology.num_devices
    assert config.run_dir == f"runs/{path.stem}"


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("path", [*RUNS, *ALIGNMENT], ids=lambda path: path.stem)
def test_it_compiles_fits_and_rebuilds_no_activation(path, tmp_path):
    config, topology = tpu_configs.load(path)
    request, result = tmp_path / "config.gin", tmp_path / "result.json"
    request.write_text(bindings.render(config))
    done = compile_here("-m", "train.plan.aot", request, topology.label, topology.slices, result, "")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(result.read_text())
    assert found["program"] is not None and found["peak"] <= topology.hbm
    assert WARNING not in done.stderr


@needs_libtpu
@pytest.mark.slow
def test_the_compiler_does_warn():
    assert WARNING in compile_here("-c", RESHARDS).stderr


def compile_here(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    env = os.environ | compiled.ENVIRONMENT | TELLING
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
