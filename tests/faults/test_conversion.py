"""Conversions that are killed, starved and crossed: the whole model is there, or nothing is and a line says why."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import struct
from pathlib import Path

import pytest

from qwen_jax.command import run_command
from qwen_jax.weights import convert, hf, hf_config, verify
from qwen_jax.weights.source import PublishedFolder
from tests.conftest import tiny_config
from tests.faults.conftest import CONFIG
from tests.published import publish, tiny_tokenizer

FORMS = ["hf", "native"]
NO_PRIVILEGES = "import ctypes; ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def digests(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def slow(tmp_path):
    """A model that takes a while, in small pieces."""
    config = tiny_config(vocab_size=260, width=256, num_layers=4, mlp_width=1024)
    publish(tmp_path / "model", config, "qwen2")
    return tmp_path / "model"


SMALL_PIECES = "from qwen_jax.weights import source; source.PIECE_BYTES = 2**18"


@pytest.mark.parametrize("kills", [3, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", FORMS)
def test_a_killed_conversion_leaves_nothing_that_looks_complete(slow, tmp_path, forks, form, kills):
    run = lambda **how: forks.run("convert", slow, tmp_path / "out", "--to", form, first=SMALL_PIECES, **how)
    whole = run()
    assert whole.code == 0, whole
    expected = digests(tmp_path / "out")
    moments = random.Random(0)
    for _ in range(kills):
        shutil.rmtree(tmp_path / "out")
        killed = run(delay=moments.uniform(0.05, 1) * whole.seconds)
        if killed.code == -signal.SIGKILL and not (tmp_path / "out").exists():
            assert set(names(tmp_path)) <= {"model", ".out.partial"}
            assert run().code == 0
        assert names(tmp_path) == ["model", "out"]
        assert form == "native" or digests(tmp_path / "out") == expected
        assert verify.main([str(slow), str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("form", FORMS)
def test_an_interrupted_conversion_says_so_and_leaves_nothing(slow, tmp_path, forks, form):
    run = lambda **how: forks.run("convert", slow, tmp_path / "out", "--to", form, first=SMALL_PIECES, **how)
    whole = run()
    for part in (2, 4, 8):  # the second time it may be done sooner
        shutil.rmtree(tmp_path / "out")
        done = run(delay=whole.seconds / part, number=signal.SIGINT)
        if done.code:
            break
    assert done.code == 130 and done.lines[-1] == "convert: interrupted", done
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("limit", [100, 10_000, 300_000])
def test_a_disk_that_becomes_full(slow, tmp_path, forks, form, limit):
    """A limit on the size of a file refuses a write as a full disk does."""
    first = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    done = forks.run("convert", slow, tmp_path / "out", "--to", form, first=first)
    assert done.code == 4, done
    # Where not even the description of an array can be written, threads of Orbax print their own complaints around it.
    assert any("convert: error: " in line and line.endswith(": File too large") for line in done.lines), done
    assert limit == 100 or "Traceback" not in "".join(done.lines), done
    # They also write while the unfinished folder is removed; what is left of it goes with the next conversion.
    left = {".out.partial"} if limit == 100 else set()
    assert {"model"} <= {*names(tmp_path)} <= {"model"} | left


@pytest.mark.parametrize("name", ["model", "model/config.json", "model/model.safetensors", "model/tokenizer.json"])
def test_what_must_not_be_read(slow, tmp_path, forks, name):
    os.chmod(tmp_path / name, 0)
    done = forks.run("convert", slow, tmp_path / "out", first=NO_PRIVILEGES)
    os.chmod(tmp_path / name, 0o700)
    assert done.code == 4 and len(done.lines) == 1, done
    assert str(tmp_path / name) in done.lines[0] and "Permission denied" in done.lines[0]
    assert names(tmp_path) == ["model"]


def test_a_source_that_must_not_be_written(slow, tmp_path, forks):
    before = digests(slow)
    for path in (*slow.iterdir(), slow):
        path.chmod(0o500 if path.is_dir() else 0o400)
    done = forks.run("convert", slow, tmp_path / "out", first=NO_PRIVILEGES)
    assert done.code == 0, done
    refused = forks.run("convert", tmp_path / "out", slow / "inside", first=NO_PRIVILEGES)
    slow.chmod(0o700)
    assert refused.code == 4 and "Permission denied" in refused.lines[-1], refused
    assert digests(slow) == before


def convert_in_process(*arguments: object) -> int:
    return run_command("convert", lambda: convert.main([*map(str, arguments)]))


def test_targets_that_are_the_source(folder, tmp_path, capfd):
    (tmp_path / "same").symlink_to("model")
    (tmp_path / "round").symlink_to("round")
    for source in ("model", "same"):
        for target in ("model", "same", "model/inside", "same/inside", "model/../same/inside/more"):
            assert convert_in_process(tmp_path / source, tmp_path / target) == 2
            [line] = capfd.readouterr().err.splitlines()
            assert "overlap" in line
    assert convert_in_process(folder, tmp_path / "round") == 4
    assert convert_in_process(folder, tmp_path / ("x" * 300)) == 4
    assert len(capfd.readouterr().err.splitlines()) == 2
    assert names(tmp_path) == ["model", "round", "same"]


def test_a_target_that_is_a_link(folder, tmp_path):
    for target, there in (("empty", True), ("new", False)):
        (tmp_path / f"{target}-link").symlink_to(target)
        if there:
            (tmp_path / target).mkdir()
        assert convert_in_process(folder, tmp_path / f"{target}-link") == 0
        assert (tmp_path / f"{target}-link").is_symlink()
        assert verify.main([str(folder), str(tmp_path / target)]) == 0


def test_a_target_that_is_a_mount_point(folder, tmp_path, capfd, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "out")
    assert convert_in_process(folder, tmp_path / "out") == 4
    assert "is a mount point" in capfd.readouterr().err
    assert names(tmp_path) == ["model", "out"]


def test_a_target_on_another_file_system(folder, tmp_path):
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK) or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs /dev/shm as a file system of its own")
    target = shared / f"qwen-jax-test-{os.getpid()}"
    try:
        assert convert_in_process(folder, target) == 0
        assert verify.main([str(folder), str(target)]) == 0
    finally:
        shutil.rmtree(target, ignore_errors=True)


@pytest.mark.parametrize("form", FORMS)
def test_a_source_that_shrinks(folder, tmp_path, capfd, monkeypatch, form):
    after(monkeypatch, 3, lambda: [os.truncate(path, 1000) for path in folder.glob("*.safetensors")])
    assert convert_in_process(folder, tmp_path / "out", "--to", form) == 3
    assert "bytes early" in capfd.readouterr().err.splitlines()[-1]
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("form", FORMS)
def test_a_source_that_changes(folder, tmp_path, capfd, monkeypatch, form):
    def change() -> None:
        for path in folder.glob("*.safetensors"):
            with open(path, "r+b") as file:
                data = 8 + int.from_bytes(file.read(8), "little")
                file.seek(data)
                file.write(bytes(path.stat().st_size - data))

    # Each tensor here is one piece, and is read once before any is checked.
    after(monkeypatch, len(hf.table(CONFIG, "qwen2")), change)
    assert convert_in_process(folder, tmp_path / "out", "--to", form) == 3
    line = capfd.readouterr().err.splitlines()[-1]
    assert "reads back with other values" in line and str(folder) in line
    assert names(tmp_path) == ["model"]


def after(monkeypatch, reads: int, act) -> None:
    """Has something happen once so many pieces of a published folder have been read."""
    read, count = PublishedFolder.read, iter(range(10**6))

    def counted(self, piece):
        if next(count) == reads:
            act()
        return read(self, piece)

    monkeypatch.setattr(PublishedFolder, "read", counted)


def test_two_conversions_to_one_folder(folder, tmp_path, monkeypatch, forks):
    others = []
    after(monkeypatch, 3, lambda: others.append(forks.run("convert", folder, tmp_path / "out")))
    assert convert_in_process(folder, tmp_path / "out") == 0
    [other] = others
    assert other.code == 4 and "is being written by another conversion" in other.lines[-1], other
    assert names(tmp_path) == ["model", "out"]
    assert verify.main([str(folder), str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("form", FORMS)
def test_nothing_stays_open(folder, tmp_path, monkeypatch, form):
    open_files = lambda: len(os.listdir("/proc/self/fd"))
    assert convert_in_process(folder, tmp_path / "first", "--to", form) == 0
    before = open_files()
    assert convert_in_process(folder, tmp_path / "second", "--to", form) == 0
    assert open_files() == before
    after(monkeypatch, 3, lambda: [os.truncate(path, 1000) for path in folder.glob("*.safetensors")])
    for _ in range(2):
        assert convert_in_process(folder, tmp_path / "third", "--to", form) == 3
    assert open_files() == before


ROOM = 64 * 2**20


def limited(small: Path, target: Path) -> str:
    """Python that leaves a process ROOM more addresses than it has.

    What it has before there is a model differs between machines, so a small one is converted first: then threads have
    been started and libraries loaded.
    """
    return f"""
import resource, threading
from qwen_jax.weights import convert, source, verify
threading.stack_size(2**19)  # not the 8 MiB that each thread reserves and none uses
source.PIECE_BYTES, verify.THREADS = 2**20, 2
for form in {FORMS}:
    convert.main([{str(small)!r}, f"{target}-small-{{form}}", "--to", form])
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + {ROOM}
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
"""


@pytest.mark.parametrize("form", FORMS)
def test_a_model_four_times_larger_than_memory(folder, tmp_path, forks, form):
    config = tiny_config(vocab_size=20_000, width=1024, num_layers=5, mlp_width=8192, param_dtype="bfloat16")
    large = publish_zeros(tmp_path / "large", config)
    assert (large / "model.safetensors").stat().st_size > 4 * ROOM
    done = forks.run("convert", large, tmp_path / "out", "--to", form, first=limited(folder, tmp_path / "out"))
    assert done.code == 0, done
    assert verify.main([str(large), str(tmp_path / "out")]) == 0


def publish_zeros(folder: Path, config) -> Path:
    """A published folder whose weights are a hole in a file."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config.to_hf(config, "qwen2")))
    (folder / "tokenizer.json").write_bytes(tiny_tokenizer().to_bytes())
    entries, end = {}, 0
    for tensor in hf.table(config, "qwen2"):
        start, end = end, end + 2 * math.prod(tensor.shape)
        entries[tensor.name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(folder / "model.safetensors", 8 + len(header) + end)
    return folder
