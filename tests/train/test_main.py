"""The command itself, in processes of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_jax import bindings
from tests.conftest import QUICK_COMPILE
from train.record import METRICS

COMMAND = (sys.executable, "-m", "train")


@pytest.fixture
def environment(compiled):
    """One device, and the programs that other tests have compiled."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(compiled), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return os.environ | cache | {"XLA_FLAGS": QUICK_COMPILE}


@pytest.fixture
def file(tmp_path, config):
    path = tmp_path / "run.gin"
    path.write_text(bindings.render(config))
    return path


@pytest.mark.parametrize("arguments", [["--help"], ["FILE", "--print", "--set", "seed=9"]])
def test_help_and_print_never_load_jax(file, arguments):
    arguments = [str(file) if word == "FILE" else word for word in arguments]
    code = f"""
import sys
from train.__main__ import main
try:
    code = main({arguments!r})
except SystemExit as leave:
    code = leave.code
sys.exit(code or ("jax" in sys.modules) or ("numpy" in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_printed_config_is_a_config_that_prints_the_same(file, tmp_path, config):
    printed = subprocess.run([*COMMAND, file, "--print", "--set", "seed=9"], capture_output=True, text=True).stdout
    assert "--set seed=9" in printed and f"{file}:" in printed
    again = tmp_path / "again.gin"
    again.write_text(printed)
    values = lambda path: {b.path: b.text for b in bindings.read(path)}
    twice = subprocess.run([*COMMAND, again, "--print"], capture_output=True, text=True).stdout
    final = tmp_path / "final.gin"
    final.write_text(twice)
    assert values(final) == values(again) and values(again)["seed"] == "9"


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["absent.gin"], 4, "absent.gin"),
        (["FILE", "--set", "stepz=3"], 2, "did you mean steps?"),
        (["FILE", "--fresh", "--resume"], 2, "not allowed with"),
        (["FILE", "--set", "mesh.data=4"], 2, "needs 4 devices, and there are 1"),
    ],
)
def test_mistakes_are_one_line_and_an_exit_code(file, environment, arguments, code, words):
    arguments = [str(file) if word == "FILE" else word for word in arguments]
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == code
    assert words in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_sigterm_saves_and_exits_with_75(file, environment, config):
    endless = [*COMMAND, str(file), "--set", "steps=100000", "checkpoint.every=100000", "evaluation.every=100000"]
    metrics = Path(config.run_dir) / METRICS
    with subprocess.Popen(endless, stderr=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stderr:
            if line.startswith("step 1/"):
                process.send_signal(signal.SIGTERM)
        assert process.wait() == 75
    assert "state saved" in line
    stopped_at = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert (Path(config.run_dir) / "checkpoints" / f"{stopped_at:08}").is_dir()
