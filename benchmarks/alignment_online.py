"""Alignment on a model's own completions that really learns, from scratch on a CPU: three seeds of a task with a rule.

    python benchmarks/alignment_online.py

From the root of the repository. The runs are those of configs/demo/align-*.gin: a small model is tuned to sort and to
reverse digits, and stopped while it sorts about half of them rightly; then GRPO, PPO, DPO online and offline, and DPO
with and without merging begin with it, and are asked what no run has seen. Trains by the path of `python -m train`; what is there
already in runs/align is not trained again. Writes docs/alignment_online.png and its part of docs/alignment.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from small_runs import picture, train, write_measured
from small_tasks import answer_loss, answers, conversation, read_tests, right, write_data

from train.record import METRICS, rows
from train.rewards.verifiers import tagged

CONFIGS, RUNS = Path("configs/demo"), Path("runs/align")
PAGE, PICTURE = Path("docs/alignment.md"), Path("docs/alignment_online.png")
SEEDS = (0, 1, 2)
SAMPLES = 8  # answers of the tuned model to a prompt, of which a right and a wrong one are a pair
LEAST_RISE = 0.2  # of what is answered rightly, by GRPO and by PPO


class Found(NamedTuple):
    """What a model does: tasks sorted rightly by its likeliest tokens and drawn ones; the loss of reversing."""

    likeliest: float
    drawn: float
    other_loss: float


def stage(seed: int, name: str, of: str = "", **changes: object) -> Path:
    """The folder of a seed's run, trained by the config `of` that name or its own."""
    folder = RUNS / str(seed) / name
    first = RUNS / "base" if name == "sft" else RUNS / str(seed) / "sft"
    fields = {"seed": seed, "MODEL": str(first)} | {path.replace("__", "."): value for path, value in changes.items()}
    train(folder, fields, CONFIGS / f"align-{of or name}.gin")
    return folder


def own_pairs(seed: int, model: Path) -> Path:
    """Pairs of a right and a wrong answer of the tuned model itself, to the prompts that runs on completions are asked."""
    file = RUNS / str(seed) / "own-pairs.jsonl"
    if not file.exists():
        tasks = [json.loads(line) for line in (RUNS / "data/prompts.jsonl").read_text().splitlines()]
        lines = []
        for task, texts in zip(tasks, answers(model, tasks, temperature=1.0, samples=SAMPLES), strict=True):
            of = {tagged(text, task["answer"]): text for text in texts}
            if len(of) == 2:
                asked, said = conversation(task)
                row = {"prompt": [asked], "chosen": [said | {"content": of[True]}]}
                lines.append(json.dumps(row | {"rejected": [said | {"content": of[False]}]}))
        file.write_text("\n".join(lines) + "\n")
    return file


def measure(path: Path) -> Found:
    sort, reverse = (read_tests(RUNS / "data", kind) for kind in ("sort", "reverse"))
    return Found(right(path, sort), right(path, sort, temperature=1.0), answer_loss(path, reverse))


def run(seed: int) -> dict[str, Found]:
    """What the models of a seed do."""
    models = {"sft": stage(seed, "sft")}
    for name in ("grpo", "ppo"):
        models[name] = stage(seed, name)
    found = {}
    for name, path in models.items():
        found[name] = measure(path)
        print(f"seed {seed}: {name} {found[name]}", flush=True)
    return found
