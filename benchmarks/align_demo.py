"""The stages of alignment in small, on CPU in minutes, each a run that begins with one before, and what each can do.

    python benchmarks/align_demo.py             # from the root of the repository; make align-demo

What is there already in runs/align goes on where it was stopped.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from small_tasks import read_tests, right, write_data

CONFIGS, DATA = Path("configs/demo"), Path("runs/align/data")
# What begins with what: PPO, DPO and GRPO with the tuned model, online DPO with DPO.
STAGES = ("base", "sft", "reward", "ppo", "dpo", "online-dpo", "grpo")


def main() -> int:
    """The exit code of the first stage that fails, or 0."""
    if not DATA.exists():
        write_data(DATA)
    for stage in STAGES:
        command = [sys.executable, "-m", "train", str(CONFIGS / f"align-{stage}.gin")]
        print(f"\n$ {' '.join(command[1:])}", flush=True)
        if code := subprocess.run(command).returncode:
            return code
    tests = {kind: read_tests(DATA, kind) for kind in ("sort", "reverse")}
    print("\n| stage | sorted rightly | reversed rightly |\n| --- | --- | --- |")
    for stage in STAGES[1:]:
        if stage != "reward":
            model = DATA.parent / stage
            print(f"| {stage} | {' | '.join(f'{right(model, own):.1%}' for own in tests.values())} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
