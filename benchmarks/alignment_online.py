"""Alignment on a model's own completions that really learns, from scratch on a CPU: three seeds of a task with a rule.

    python benchmarks/alignment_online.py [SEED ...]

From the root of the repository. The runs are those of configs/demo/align-*.gin: of each seed a small model is tuned to
sort and to reverse digits, and stopped while it reverses them rightly less than half of the time; then GRPO, PPO, DPO
online and offline, and DPO with merging begin with it, and are asked what no run has seen. Trains by the path of
`python -m train`; what is there already in runs/align is not trained again. Writes docs/alignment_online.png and the
part of docs/alignment.md about it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
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
WITHIN = 0.05  # what counts as the same reward
METHODS = dict(grpo="GRPO", ppo="PPO", online="online DPO", merged="online DPO, merging", offline="DPO")
COLORS = ("#b8323a", "#7a9cc6", "#3d7d5a")

TEXT = """
| seed | | reversed rightly, greedy | sampled | sorted rightly | nats per token of sorting |
| --- | --- | --- | --- | --- | --- |
{table}

A model of 166,000 parameters ([configs/demo](../configs/demo/align-base.gin)) learns to sort and to reverse four to
six digits; what follows tuning is about reversing alone, and sorting shows what that unlearns. Asked are 200 tasks of
each kind that no run has seen: greedy is by the likeliest tokens, sampled at temperature 1. GRPO and PPO learn from
answers that a rule judges; both kinds of DPO from about as many pairs of a right and a wrong answer, in as many steps:
offline those that the tuned model gave, online its own of that step, each at the learning rate that was best on the
first seed (of 1e-5, 3e-5 and 1e-4, and of 1e-4 and 4e-4).

![reversed rightly, by step](alignment_online.png)

`python benchmarks/alignment_online.py` trains, measures, and writes this part of the page.
"""


class Found(NamedTuple):
    """What a model does: tasks done rightly by its likeliest tokens and by drawn ones; another task, and its loss."""

    greedy: float
    sampled: float
    kept: float
    kept_loss: float


def stage(seed: int, name: str, config: str, changes: Mapping[str, object]) -> Path:
    """The folder of a seed's run of a config, with some fields changed."""
    folder = RUNS / str(seed) / name
    train(folder, {"seed": seed, **changes}, CONFIGS / f"align-{config}.gin")
    return folder


def own_pairs(seed: int, model: Path) -> Path:
    """Pairs of a right and a wrong answer that the tuned model gives to the prompts of the runs on completions."""
    file = RUNS / str(seed) / "pairs.jsonl"
    if not file.exists():
        tasks = [json.loads(line) for line in (RUNS / "data/prompts.jsonl").read_text().splitlines()]
        lines = []
        for task, texts in zip(tasks, answers(model, tasks, temperature=1.0, samples=SAMPLES), strict=True):
            # Bytes that are no text, which a small model makes now and then, cannot be in a file of pairs.
            by_verdict = {tagged(text, task["answer"]): text for text in texts if text.isprintable()}
            if len(by_verdict) == 2:
                asked, said = conversation(task)
                says = lambda verdict, by=by_verdict, said=said: [said | {"content": by[verdict]}]
                lines.append(json.dumps({"prompt": [asked], "chosen": says(True), "rejected": says(False)}))
        file.write_text("\n".join(lines) + "\n")
    return file


def models(seed: int) -> dict[str, Path]:
    """The folders of all runs of a seed."""
    sft = stage(seed, "sft", "sft", {})
    of = {"MODEL": str(sft)}
    pairs = of | {"data.source.path": str(own_pairs(seed, sft))}
    return {
        "sft": sft,
        "grpo": stage(seed, "grpo", "grpo", of),
        "ppo": stage(seed, "ppo", "ppo", of),
        "online": stage(seed, "online", "online-dpo", of | {"merging": None}),
        "merged": stage(seed, "merged", "online-dpo", of),
        "offline": stage(seed, "offline", "dpo", pairs),
    }


def measured(path: Path) -> Found:
    """What a model does with the tasks that no run has seen; kept beside it."""
    file = path / "found.json"
    if not file.exists():
        reverse, sort = (read_tests(RUNS / "data", kind) for kind in ("reverse", "sort"))
        found = right(path, reverse), right(path, reverse, temperature=1.0), right(path, sort), answer_loss(path, sort)
        file.write_text(json.dumps(found))
    return Found(*json.loads(file.read_text()))


def verdicts(found: Mapping[str, Found]) -> dict[str, bool]:
    """What is promised of a seed."""
    before = found["sft"]
    rises = lambda after: min(after.greedy - before.greedy, after.sampled - before.sampled)
    return {
        "GRPO": rises(found["grpo"]) >= LEAST_RISE,
        "PPO": rises(found["ppo"]) >= LEAST_RISE,
        "online DPO beside offline": found["online"].sampled > found["offline"].sampled,
        "merging beside none": found["merged"].kept > found["online"].kept
        and found["merged"].sampled > found["online"].sampled - WITHIN,
    }


def draw_picture(seeds: Mapping[int, Mapping[str, Path]]) -> None:
    figure, axes = picture()
    for name, color in zip(("grpo", "ppo", "online"), COLORS, strict=True):
        for seed, folders in seeds.items():
            found = [row for row in rows(folders[name] / METRICS) if "reward" in row]
            means = np.array([row["reward"] for row in found])
            smooth = np.convolve(means, np.ones(8) / 8, mode="valid")
            label = METHODS[name] if seed == min(seeds) else None
            axes.plot(range(8, len(means) + 1), smooth, color=color, linewidth=1.5, label=label)
    axes.set(xlabel="step", ylabel="part of the sampled answers that are right", xlim=(0, None), ylim=(0, 1))
    axes.set_title("three seeds each, mean of eight steps", loc="left", fontweight="bold")
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(PICTURE)


def main(seeds: list[int]) -> int:
    """1 if a bar is missed."""
    # All seeds compile the same programs.
    jax.config.update("jax_compilation_cache_dir", str(RUNS.resolve() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    write_data(RUNS / "data")
    train(RUNS / "base", {}, CONFIGS / "align-base.gin")
    folders = {seed: models(seed) for seed in seeds}
    lines, passed = [], True
    for seed, own in folders.items():
        found = {name: measured(path) for name, path in own.items()}
        for name, each in found.items():
            cells = [f"{each.greedy:.1%}", f"{each.sampled:.1%}", f"{each.kept:.1%}", f"{each.kept_loss:.4f}"]
            lines.append(f"| {seed} | {METHODS.get(name, 'tuned')} | {' | '.join(cells)} |")
        for name, held in verdicts(found).items():
            print(f"seed {seed}: {name} {'ok' if held else 'FAILED'}")
            passed &= held
    print("\n".join(lines))
    if len(seeds) == len(SEEDS):
        draw_picture(folders)
        write_measured(PAGE, TEXT.format(table="\n".join(lines)), "Measured online")
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main([int(seed) for seed in sys.argv[1:]] or list(SEEDS)))
