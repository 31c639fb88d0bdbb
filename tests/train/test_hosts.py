"""A run on several hosts, here processes that share a file system, goes on on fewer, bit for bit."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen_jax import bindings
from tests.conftest import QUICK_COMPILE
from tests.train.conftest import record
from tests.train.test_run import run
from train.config import Mesh, Stage

pytestmark = pytest.mark.usefixtures("enough_devices")

TIMEOUT = 300


@contextlib.contextmanager
def started(file: Path, *, hosts: int, devices: int) -> Iterator[list[subprocess.Popen]]:
    """The command on each of `hosts`, with as many virtual devices; what still runs at the end is killed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK_COMPILE}",
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(hosts),
    }
    command = [sys.executable, "-m", "train", str(file)]
    processes = [
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment | {"JAX_PROCESS_ID": str(host)})
        for host in range(hosts)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def run_on(config, tmp_path: Path, **where) -> None:
    file = tmp_path / "run.gin"
    file.write_text(bindings.render(config))
    with started(file, **where) as processes:
        for process in processes:
            _, errors = process.communicate(timeout=TIMEOUT)
            assert process.returncode == 0, errors


def test_two_hosts_then_one(config, change, tmp_path):
    """One host is this process."""
    # A stage that changes nothing: what it goes on from is saved and restored by all hosts.
    config = change(change(config, "mesh", Mesh(data=2)), "stages", (Stage(from_step=3),))
    moved = change(config, "run_dir", str(tmp_path / "moved"))
    run(config)
    run_on(moved, tmp_path, hosts=2, devices=1)
    assert record(moved) == record(config), "one host or two: the same rows, the same sums"
    forget(moved, 4, 6)
    run(moved)
    assert record(moved) == record(config)


def test_two_hosts_answer_a_share_of_the_prompts_each(config, change, tmp_path):
    """What one host answers alone."""
    config = change(change(config, "model.max_position", 128), "data.sequence_length", 64)
    config = change(change(config, "evaluation.samples", 3), "evaluation.max_new_tokens", 8)
    config = change(change(change(config, "mesh", Mesh(data=2)), "schedule.warmup_steps", 0), "steps", 1)
    moved = change(config, "run_dir", str(tmp_path / "moved"))
    run(config)
    run_on(moved, tmp_path, hosts=2, devices=1)
    alone, shared = (Path(each.run_dir, "samples.jsonl").read_text() for each in (config, moved))
    assert shared == alone and len(alone.splitlines()) == 3


@pytest.mark.slow
def test_four_hosts_then_two(config, change, tmp_path):
    config = change(config, "mesh", Mesh(data=4))
    run_on(config, tmp_path, hosts=4, devices=1)
    unbroken = record(config)
    forget(config, 4, 6)
    run_on(config, tmp_path, hosts=2, devices=2)
    # Sums over four hosts are taken in another order than sums over two.
    for row, expected in zip(record(config), unbroken, strict=True):
        assert row == pytest.approx(expected, rel=1e-6)


def forget(config, *steps: int) -> None:
    for step in steps:
        shutil.rmtree(Path(config.run_dir) / "checkpoints" / f"{step:08}")
