"""Who may write a run directory, and what for."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qwen_jax import bindings
from qwen_jax.errors import ConfigError, FileError
from train import directory as run_directory
from train.config import Mesh, Stage
from train.data import PythonStdlib

HOLD = """
import pathlib, sys
from train.directory import claim
with claim(pathlib.Path(sys.argv[1]), warn=print):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_second_process_is_told_who_holds_it(tmp_path):
    with holder(tmp_path) as other:
        with (
            pytest.raises(FileError, match=f"in use by process {other.pid};"),
            run_directory.claim(tmp_path, warn=pytest.fail),
        ):
            pass
        other.stdin.close()
    with run_directory.claim(tmp_path, warn=pytest.fail):
        pass
    assert not list(tmp_path.iterdir()), "nothing is left of the lock"


def test_lock_of_a_killed_process_is_taken_over_with_a_warning(tmp_path):
    warnings = []
    with holder(tmp_path) as other:
        other.kill()
    with run_directory.claim(tmp_path, warn=warnings.append):
        pass
    assert len(warnings) == 1 and str(other.pid) in warnings[0]


def test_directory_that_cannot_be_made_is_a_file_error(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(FileError, match="choose another run_dir"),
        run_directory.claim(tmp_path / "file" / "run", warn=print),
    ):
        pass


def save(directory, config):
    run_directory.write(directory, {"config.gin": bindings.render(config).encode()})


def test_what_is_computed_may_not_change(tmp_path, config, change):
    save(tmp_path, config)
    run_directory.check_same_run(tmp_path, config)
    other = change(change(config, "seed", 4), "model.rope.theta", 2e4)
    with pytest.raises(
        ConfigError, match=r"seed was 3 and is now 4; model\.rope\.theta was 10000\.0 and is now 20000\.0"
    ):
        run_directory.check_same_run(tmp_path, other)


def test_another_class_of_section_is_a_change(tmp_path, config, change):
    save(tmp_path, config)
    with pytest.raises(
        ConfigError, match="data.source was @Text and is now @PythonStdlib; data.source.path was .* nothing"
    ):
        run_directory.check_same_run(tmp_path, change(config, "data.source", PythonStdlib()))


@pytest.mark.parametrize(
    "path, value",
    [("run_dir", "elsewhere"), ("mesh.data", 2), ("log_every", 7), ("checkpoint.keep", 9), ("remat", "full")],
)
def test_how_it_is_computed_may_change(tmp_path, config, change, path, value):
    save(tmp_path, config)
    run_directory.check_same_run(tmp_path, change(config, path, value))


def test_a_stage_is_computed_anywhere_but_stays_what_it_is(tmp_path, config, change):
    stages = lambda **values: change(config, "stages", (Stage(from_step=2, batch_size=16, **values),))
    save(tmp_path, stages())
    run_directory.check_same_run(tmp_path, stages(mesh=Mesh(), remat="full"))
    with pytest.raises(
        ConfigError, match=r"with another config: stages\.1\.theta was None and is now 50000\.0; choose"
    ):
        run_directory.check_same_run(tmp_path, stages(theta=5e4))
    with pytest.raises(ConfigError, match=r"stages\.1 was @Stage and is now nothing"):
        run_directory.check_same_run(tmp_path, config)
