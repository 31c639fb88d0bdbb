"""Checkpoints when the disk, the machine or somebody's hand fails: never a wrong number, never half a step."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.errors import FileError, ModelError
from qwen_jax.weights import manifest
from qwen_jax.weights.checkpoint import Checkpoints, open_checkpoint

# A checkpoint has a file of each of these kinds; faults are tried on one of each.
KINDS = [
    "manifest.json",
    "model.json",
    "arrays/params/**/d/*",
    "arrays/optimizer/**/d/*",
    "arrays/params/_METADATA",
    "arrays/params/manifest.ocdbt",
    "arrays/params/ocdbt.process_0/manifest.ocdbt",
    "arrays/_CHECKPOINT_METADATA",
]


def disk_full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def make_params(step: int):
    return {"layers": {"w": jnp.full((4, 64), step, jnp.float32)}}


def make_state(step: int):
    return [{"mu": jnp.full((4, 64), -step, jnp.float32)}]


class Run:
    """A store with two steps, and what it warned of."""

    def __init__(self, root: Path, steps=(1, 2)) -> None:
        self.root, self.warnings = root, []
        self.store = Checkpoints(root, warn=self.warnings.append)
        for step in steps:
            self.save(step)

    def save(self, step: int) -> None:
        self.store.save(
            step,
            params=make_params(step),
            optimizer=make_state(step),
            files={"model.json": b"{}"},
            meta={"cursor": step},
        )
        self.store.wait()

    def names(self) -> list[str]:
        return sorted(path.name for path in self.root.iterdir())


def assert_whole(checkpoint, step: int) -> None:
    assert (checkpoint.step, checkpoint.meta) == (step, {"cursor": step})
    assert checkpoint.read("model.json") == b"{}"
    assert (checkpoint.load("params", make_params(0))["layers"]["w"] == step).all()
    assert (checkpoint.load("optimizer", make_state(0))[0]["mu"] == -step).all()


def pick(folder: Path, kind: str) -> Path:
    return next(path for path in sorted(folder.glob(kind)) if path.stat().st_size)


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1 << random.Random(path.name).randrange(7)
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip_bit, truncate, Path.unlink])
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_step_is_set_aside(tmp_path, kind, damage):
    run = Run(tmp_path)
    damage(pick(tmp_path / "00000002", kind))
    assert_whole(run.store.latest_valid(), 1)
    assert run.names() == ["00000001", "00000002.corrupt"]
    (line,) = run.warnings
    assert "\n" not in line and "renamed to 00000002.corrupt, step 1 is used instead" in line
    assert kind.split("/")[0] in line
    run.save(2)  # the way is free for the step to be made again
    damage(pick(tmp_path / "00000002", kind))
    run.store.latest_valid()
    assert run.names() == ["00000001", "00000002.corrupt", "00000002.corrupt-2"]


def test_every_bit_of_a_manifest_counts(tmp_path):
    Run(tmp_path, [1])
    path = tmp_path / "00000001" / "manifest.json"
    data = path.read_bytes()
    for position in random.Random(0).sample(range(len(data)), 200):
        path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        with pytest.raises(ModelError):
            manifest.Manifest.read(path.parent)


def test_all_broken_is_an_error_and_stays_one(tmp_path):
    run = Run(tmp_path)
    for step in (1, 2):
        flip_bit(pick(tmp_path / f"0000000{step}", "arrays/params/**/d/*"))
    for _ in range(2):  # a second start must not take the folder for an empty one and train from scratch
        with pytest.raises(ModelError, match="every checkpoint in .* is broken: 00000002: .*; 00000001: ") as caught:
            run.store.latest_valid()
        assert "\n" not in str(caught.value)
    assert run.names() == ["00000001", "00000002"] and not run.warnings


def test_what_is_not_a_step_is_left_alone(tmp_path):
    run = Run(tmp_path, [3])
    for name in ["5", "tmp", "00000007", "000000008", "00000009.corrupt", "7.orbax-checkpoint-tmp", "٠٠٠٠٠٠٠٩"]:
        (tmp_path / name).mkdir()
    for name in [".DS_Store", "00000006", "5/file", "tmp/manifest.json"]:
        (tmp_path / name).write_text("{}")
    before = run.names()
    assert run.store.steps() == [3]
    assert_whole(run.store.latest_valid(), 3)
    assert open_checkpoint(tmp_path).step == 3
    run.save(7)
    assert run.store.steps() == [3, 7]
    assert run.names() == before and not run.warnings


def test_no_step_is_not_an_error(tmp_path):
    store = Checkpoints(tmp_path / "none", warn=pytest.fail)
    assert store.latest_valid() is None and store.steps() == []
    (tmp_path / "none" / "00000005").mkdir(parents=True)
    assert store.latest_valid() is None and store.steps() == []


def test_a_step_under_another_number_is_broken(tmp_path):
    run = Run(tmp_path)
    (tmp_path / "00000002").rename(tmp_path / "00000004")
    assert_whole(run.store.latest_valid(), 1)
    assert "belongs to another step" in run.warnings[0]


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path):
    run = Run(tmp_path)
    (tmp_path / "00000002").rename(tmp_path / ".00000003-1.tmp")
    assert_whole(run.store.latest_valid(), 1)
    run.save(4)
    assert run.names() == ["00000001", "00000004"] and not run.warnings


def test_a_newer_format_is_refused_but_kept(tmp_path, monkeypatch):
    with monkeypatch.context() as newer:
        newer.setattr(manifest, "FORMAT", 2)
        run = Run(tmp_path, [2])
    with pytest.raises(ModelError, match="format 2 and this release reads 1"):
        run.store.latest_valid()
    assert run.names() == ["00000002"]


def test_a_manifest_cannot_point_elsewhere(tmp_path):
    (tmp_path / "secret").write_text("x")
    for name in ["../secret", str(tmp_path / "secret")]:
        contents = manifest.Manifest(step=1, meta={}, arrays={}, files={name: {"size": 1}}, versions={})
        with pytest.raises(ModelError, match="outside the checkpoint"):
            contents.check(tmp_path / "step", lambda name: True)


def test_inference_does_not_read_the_optimizer(tmp_path):
    Run(tmp_path)
    flip_bit(pick(tmp_path / "00000002", "arrays/optimizer/**/d/*"))
    for path in [tmp_path, tmp_path / "00000002"]:
        checkpoint = open_checkpoint(path)
        assert (checkpoint.load("params", make_params(0))["layers"]["w"] == 2).all()
        with pytest.raises(ModelError, match="arrays/optimizer/.* is damaged"):
            checkpoint.load("optimizer", make_state(0))


def test_open_passes_over_broken_steps_and_changes_nothing(tmp_path):
    run = Run(tmp_path)
    flip_bit(pick(tmp_path / "00000002", "arrays/params/**/d/*"))
    assert_whole(open_checkpoint(tmp_path, warn=run.warnings.append), 1)
    assert len(run.warnings) == 1 and "left as it is, step 1 is used instead" in run.warnings[0]
    assert run.names() == ["00000001", "00000002"]
    with pytest.warns(UserWarning, match="step 1 is used"):
        open_checkpoint(tmp_path)
    with pytest.raises(ModelError, match="is damaged"):
        open_checkpoint(tmp_path / "00000002")


def test_quarantine_on_a_read_only_disk(tmp_path, monkeypatch):
    run = Run(tmp_path)
    flip_bit(pick(tmp_path / "00000002", "arrays/params/**/d/*"))

    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "rename", refuse)
    assert_whole(run.store.latest_valid(), 1)
    assert "it cannot be renamed (Read-only file system), step 1 is used" in run.warnings[0]


def test_a_forbidden_file_is_no_reason_to_fall_back(tmp_path, monkeypatch):
    run = Run(tmp_path)

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(manifest, "_describe", refuse)
    with pytest.raises(FileError, match="cannot be read: permission denied"):
        run.store.latest_valid()
    assert run.names() == ["00000001", "00000002"]


def test_a_step_deleted_while_it_is_opened(tmp_path, monkeypatch):
    run, check = Run(tmp_path), manifest.Manifest.check

    def delete_then_check(self, folder, wanted):
        if folder.name == "00000002":
            folder.rename(tmp_path / ".00000002.deleted")
        check(self, folder, wanted)

    monkeypatch.setattr(manifest.Manifest, "check", delete_then_check)
    assert_whole(open_checkpoint(tmp_path), 1)
    assert not run.warnings


def test_a_step_deleted_while_it_is_loaded(tmp_path):
    run = Run(tmp_path, [1])
    checkpoint = open_checkpoint(tmp_path)
    run.store = Checkpoints(tmp_path, keep=1, warn=pytest.fail)
    run.save(2)
    assert run.names() == ["00000002"]
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        checkpoint.load("params", make_params(0))
    assert "\n" not in str(caught.value)
    with pytest.raises(FileError, match="No such file"):
        checkpoint.read("model.json")


def test_full_disk(tmp_path, caplog, capfd):
    run = Run(tmp_path, [1])
    big = {"layers": {"w": jnp.asarray(np.random.default_rng(0).normal(size=(4, 2**18)).astype(np.float32))}}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for surface in [run.store.wait, lambda: run.save(3)]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))  # Python ignores the signal that comes with it
        try:
            run.store.save(2, params=big, files={}, meta={})
            with pytest.raises(FileError, match="step 2 could not be saved in .*: File too large$"):
                surface()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert run.names() == ["00000001"]
    assert capfd.readouterr() == ("", "") and not caplog.records  # the error is one line, and comes once
    run.store.wait()
    run.save(2)
    assert_whole(run.store.latest_valid(), 2)


def test_a_failure_of_ours_in_the_background(tmp_path, monkeypatch):
    run = Run(tmp_path, [1])
    with monkeypatch.context() as failing:
        failing.setattr(manifest.importlib.metadata, "version", lambda name: 1 / 0)
        with pytest.raises(FileError, match="step 2 could not be saved in .*: ZeroDivisionError"):
            run.save(2)
    assert run.names() == ["00000001"]
    run.save(2)
    assert_whole(run.store.latest_valid(), 2)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    for root in [tmp_path / "file", tmp_path / "file" / "checkpoints"]:
        with pytest.raises(FileError, match=f"checkpoints cannot be written to {root}: (Not a directory|File exists)"):
            Run(root)


def test_a_disk_that_is_full_at_once(tmp_path, monkeypatch):
    run = Run(tmp_path, [1])
    with monkeypatch.context() as full:
        full.setattr("qwen_jax.weights.checkpoint.ocp.save_checkpointables_async", disk_full)
        with pytest.raises(FileError, match="step 2 could not be saved in .*: No space left on device"):
            run.save(2)
    run.save(2)
    assert run.names() == ["00000001", "00000002"]
    assert_whole(run.store.latest_valid(), 2)


LEAVE_WITHOUT_WAITING = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
from test_checkpoint_faults import Run, make_params
run = Run(pathlib.Path(sys.argv[2]), [1])
run.store.save(2, params=make_params(2), files={}, meta={})
"""


def test_leaving_without_waiting_does_not_hang(tmp_path):
    tests = Path(__file__).parent
    command = [sys.executable, "-c", LEAVE_WITHOUT_WAITING, tests, tmp_path]
    assert subprocess.run(command, cwd=tests.parents[1], timeout=60).returncode == 0
    assert Checkpoints(tmp_path, warn=pytest.fail).latest_valid() is not None


def test_an_old_step_that_cannot_be_deleted(tmp_path, monkeypatch):
    run = Run(tmp_path, [1])
    run.store = Checkpoints(tmp_path, keep=1, warn=run.warnings.append)

    def refuse(path, **_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("qwen_jax.weights.checkpoint.shutil.rmtree", refuse)
    run.save(2)
    assert_whole(run.store.latest_valid(), 2)
    assert run.warnings == [f"old checkpoint {tmp_path / '00000001'} could not be deleted: Permission denied"]


SAVE_UNTIL_KILLED = """
import itertools, os, pathlib, shutil, signal, sys
sys.path.insert(0, sys.argv[1])
from test_checkpoint_faults import Checkpoints, Run, manifest
run = Run(pathlib.Path(sys.argv[2]), [1])
run.store = Checkpoints(run.root, keep=1, warn=print)
owner, name = {"seal": (manifest.Manifest, "seal"), "rename": (os, "rename"), "delete": (shutil, "rmtree")}.get(
    sys.argv[3], (sys, "unused"))
setattr(owner, name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
print("ready", flush=True)
for step in itertools.count(2):
    run.save(step)
"""


def test_sigkill_leaves_whole_steps_only(tmp_path):
    """Side by side, since starting takes most of the time: kills before three steps of a save, and one at random."""
    tests = Path(__file__).parent
    killed_by_us, environment = "random", os.environ | {"XLA_FLAGS": ""}
    processes = {
        point: subprocess.Popen(
            [sys.executable, "-c", SAVE_UNTIL_KILLED, tests, tmp_path / point, point],
            stdout=subprocess.PIPE,
            cwd=tests.parents[1],
            env=environment,
        )
        for point in ["seal", "rename", "delete", killed_by_us]
    }
    for point, process in processes.items():
        assert process.stdout.readline() == b"ready\n"
        if point == killed_by_us:
            time.sleep(random.uniform(0.0, 0.3))
            process.kill()
        assert process.wait(30) == -signal.SIGKILL
        process.stdout.close()
        store = Checkpoints(tmp_path / point, warn=pytest.fail)
        newest = store.latest_valid()
        assert_whole(newest, store.steps()[-1])
        assert point == killed_by_us or store.steps() == ([2] if point == "delete" else [1])
