"""The quick start, killed at random moments and started again, ends with the very loss of an unbroken run."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KILLS = 5
# One device, compiled as users compile: the test bench's own flags are left out.
ENVIRONMENT = os.environ | {"XLA_FLAGS": ""}


def command(run_dir: Path, *changes: str) -> list[str]:
    settings = [f'run_dir="{run_dir}"', *changes]
    return [sys.executable, "-m", "train", "configs/quickstart.gin", "--set", *settings]


def losses(run_dir: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row[name]) for row in rows for name in ("loss", "held_out_loss") if name in row]


@pytest.mark.slow
def test_the_quick_start_survives_sigkill(tmp_path):
    changes = ("steps=120", "checkpoint.every=20", "evaluation.every=60")
    unbroken = tmp_path / "unbroken"
    done = subprocess.run(
        command(unbroken, *changes), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr

    broken, moments = tmp_path / "broken", random.Random(0)
    for _ in range(KILLS):
        run = subprocess.Popen(
            command(broken, *changes), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            assert run.wait(timeout=moments.uniform(5, 60)) == 0
        except subprocess.TimeoutExpired:
            run.kill()
            run.wait()
    done = subprocess.run(
        command(broken, *changes), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    assert losses(broken) == losses(unbroken)
