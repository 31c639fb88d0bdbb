"""`infer generate --output` killed and run again: the file of an unbroken run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROMPTS = ["low", "newer\nwidé", "", "wider"]
OPTIONS = ["--max-new-tokens", "9", "--batch-size", "2", "--n", "2"]


def test_a_run_that_is_killed_goes_on_to_the_file_of_an_unbroken_one(run_infer, run_folder, tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    command = ["generate", run_folder, "--input", tmp_path / "in.jsonl", *OPTIONS, "--output"]
    assert run_infer(*command, tmp_path / "whole")[0] == 0
    whole = (tmp_path / "whole").read_bytes()
    assert whole.count(b"\n") == 8
    process = subprocess.Popen(
        [sys.executable, "-m", "infer", *map(str, command), str(tmp_path / "killed")],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while process.poll() is None and not (tmp_path / "killed").exists() or (tmp_path / "killed").stat().st_size < 300:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    code, _, err = run_infer(*command, tmp_path / "killed")
    assert code == 0 and (tmp_path / "killed").read_bytes() == whole
    code, _, err = run_infer(*command, tmp_path / "killed")
    assert code == 0 and "all 8 completions are in" in err
    code, _, err = run_infer(*command, tmp_path / "killed", "--seed", 1)
    assert code == 3 and "--overwrite" in err and (tmp_path / "killed").read_bytes() == whole
