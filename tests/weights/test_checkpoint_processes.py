"""Checkpoints with two processes on one file system, started here as a script each."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from qwen_jax.errors import FileError, ModelError
from qwen_jax.weights import manifest
from qwen_jax.weights.checkpoint import Checkpoints, open_checkpoint

VALUES = {"w": np.arange(32, dtype=np.float32).reshape(8, 4), "layers": [np.arange(6, dtype=np.int32)]}
SPECS = {"w": PartitionSpec("fsdp"), "layers": [PartitionSpec()]}


def make_tree(devices):
    """VALUES over all processes: one array split over the devices, one replicated."""
    mesh = jax.make_mesh((len(devices),), ("fsdp",), devices=devices)
    place = lambda x, spec: jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])
    return mesh, jax.tree.map(place, VALUES, SPECS)


def assert_equal(tree) -> None:
    for array, value in zip(jax.tree.leaves(tree), jax.tree.leaves(VALUES), strict=True):
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, value[shard.index])


def save(store: Checkpoints, step: int, tree) -> None:
    store.save(step, params=tree, optimizer=tree, files={"model.json": b"{}"}, meta={})


def disk_full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def work(folder: Path) -> None:
    """What each of the processes does."""
    mesh, tree = make_tree(jax.devices())
    first, warnings = jax.process_index() == 0, []
    store = Checkpoints(folder / "together", warn=warnings.append)
    with jax.set_mesh(mesh):
        assert_equal(open_checkpoint(folder / "alone").load("params", tree))
        assert store.latest_valid() is None
        for step in (1, 2, 3):
            save(store, step, tree)
        store.wait()
        assert store.steps() == [1, 2, 3]
        if first:
            (folder / "together" / "00000003" / "model.json").write_bytes(b"[]")
        checkpoint = store.latest_valid()
        assert checkpoint.step == 2 and len(warnings) == first
        assert_equal(checkpoint.load("optimizer", tree))

        seal = manifest.Manifest.seal
        if first:  # the disk of process 0 is full
            manifest.Manifest.seal = disk_full
        with pytest.raises(FileError, match="No space left on device" if first else "process 0 failed"):
            save(store, 3, tree)
            store.wait()
        manifest.Manifest.seal = seal
        save(store, 3, tree)
        store.wait()
        with pytest.raises(FileError, match="00000003 exists" if first else "process 0"):
            save(store, 3, tree)
        with pytest.raises(ModelError, match="every checkpoint" if first else "process 0"):
            Checkpoints(folder / "broken", warn=pytest.fail).latest_valid()


def test_two_processes(tmp_path):
    mesh, tree = make_tree(jax.devices()[:2])
    alone = Checkpoints(tmp_path / "alone", warn=pytest.fail)
    save(alone, 1, tree)
    alone.wait()
    (tmp_path / "broken" / "00000001").mkdir(parents=True)
    (tmp_path / "broken" / "00000001" / "manifest.json").write_text("{}")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    root = Path(__file__).parents[2]
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    command = [sys.executable, __file__, str(port), str(tmp_path)]
    processes = [
        subprocess.Popen(
            [*command, str(i)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    checkpoint = open_checkpoint(tmp_path / "together")
    assert_equal(checkpoint.load("params", tree))
    assert (checkpoint.path / "arrays" / "params" / "ocdbt.process_1").exists()  # both did write


if __name__ == "__main__":
    port, folder, process = sys.argv[1:]
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(process))
    work(Path(folder))
    jax.distributed.shutdown()
